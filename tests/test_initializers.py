import inspect
import math

import pytest
import torch
from torch import nn

import funcnet as fn
from funcnet import initializers

KEY = fn.key(11)
DEVICE = torch.get_default_device()

LINEAR = (250, 160)
CONV1D, CONV2D, CONV3D = (50, 40, 20), (60, 40, 3, 5), (40, 20, 3, 4, 5)
SHAPES = [LINEAR, (160, 250), CONV1D, CONV2D, CONV3D]


def draw(initializer, shape, *, key=KEY, dtype=torch.float64, device=DEVICE):
    return initializer(key, shape, dtype, device)


# The standard deviation of N(0, 1) cut to (-2, 2): sqrt(1 - 4 phi(2) / (Phi(2) - Phi(-2))).
CUT_STD = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))


def fans_of(shape):
    """``torch.nn.init``'s fan_in and fan_out, from its documentation."""
    receptive = math.prod(shape[2:])
    return shape[1] * receptive, shape[0] * receptive


def uniform_cdf(low, high):
    return lambda x: ((x - low) / (high - low)).clamp(0, 1)


def normal_cdf(mean, std):
    return lambda x: torch.special.ndtr((x - mean) / std)


def truncated_cdf(mean, std, low, high):
    phi = normal_cdf(mean, std)
    below, above = phi(torch.tensor(low).double()), phi(torch.tensor(high).double())
    return lambda x: ((phi(x) - below) / (above - below)).clamp(0, 1)


def kolmogorov_smirnov(sample, cdf):
    """sqrt(n) times the largest distance of the sample's distribution from ``cdf``."""
    x = sample.double().flatten().sort().values
    n = x.numel()
    expected, steps = cdf(x), torch.arange(n + 1).double() / n
    distance = torch.maximum((steps[1:] - expected).max(), (expected - steps[:-1]).max())
    return float(distance) * math.sqrt(n)


# Kolmogorov's distribution is above this once in 10**5 samples.
KS_LIMIT = 2.47


def has_distribution(sample, cdf):
    return kolmogorov_smirnov(sample, cdf) < KS_LIMIT


def is_plus_minus(bound):
    return uniform_cdf(-bound, bound)


# name: (initializer, the cdf for (fan_in, fan_out) by torch.nn.init's or the paper's formula)
DISTRIBUTIONS = {
    "uniform": (initializers.uniform(), lambda i, o: uniform_cdf(0, 1)),
    "uniform -3, 5": (initializers.uniform(-3.0, 5.0), lambda i, o: uniform_cdf(-3, 5)),
    "normal": (initializers.normal(), lambda i, o: normal_cdf(0, 1)),
    "normal 2, 0.1": (initializers.normal(2.0, 0.1), lambda i, o: normal_cdf(2, 0.1)),
    "truncated_normal": (
        initializers.truncated_normal(), lambda i, o: truncated_cdf(0, 1, -2, 2),
    ),
    "truncated_normal in values": (
        initializers.truncated_normal(1.0, 0.5, 0.8, 3.0),
        lambda i, o: truncated_cdf(1.0, 0.5, 0.8, 3.0),
    ),
    "truncated_normal beyond its mean": (
        initializers.truncated_normal(0.0, 2.0, 1.0, 7.0),
        lambda i, o: truncated_cdf(0.0, 2.0, 1.0, 7.0),
    ),
    "truncated_normal, one side": (
        initializers.truncated_normal(0.0, 1.0, -0.5, math.inf),
        lambda i, o: truncated_cdf(0.0, 1.0, -0.5, math.inf),
    ),
    "lecun_uniform": (
        initializers.lecun_uniform(), lambda i, o: is_plus_minus(math.sqrt(3 / i)),
    ),
    "lecun_normal": (initializers.lecun_normal(), lambda i, o: normal_cdf(0, math.sqrt(1 / i))),
    "glorot_uniform": (
        initializers.glorot_uniform(), lambda i, o: is_plus_minus(math.sqrt(6 / (i + o))),
    ),
    "glorot_uniform 5/3": (
        initializers.glorot_uniform(gain=5 / 3),
        lambda i, o: is_plus_minus(5 / 3 * math.sqrt(6 / (i + o))),
    ),
    "glorot_normal": (
        initializers.glorot_normal(), lambda i, o: normal_cdf(0, math.sqrt(2 / (i + o))),
    ),
    "glorot_normal 0.5": (
        initializers.glorot_normal(0.5), lambda i, o: normal_cdf(0, 0.5 * math.sqrt(2 / (i + o))),
    ),
    "he_uniform": (initializers.he_uniform(), lambda i, o: is_plus_minus(math.sqrt(6 / i))),
    "he_uniform slope": (
        initializers.he_uniform(0.5), lambda i, o: is_plus_minus(math.sqrt(6 / (1.25 * i))),
    ),
    "he_uniform fan_out": (
        initializers.he_uniform(mode="fan_out"), lambda i, o: is_plus_minus(math.sqrt(6 / o)),
    ),
    "he_uniform tanh": (
        initializers.he_uniform(nonlinearity="tanh"),
        lambda i, o: is_plus_minus(5 / 3 * math.sqrt(3 / i)),
    ),
    "he_uniform relu ignores the slope": (
        initializers.he_uniform(0.5, nonlinearity="relu"),
        lambda i, o: is_plus_minus(math.sqrt(6 / i)),
    ),
    "he_normal": (initializers.he_normal(), lambda i, o: normal_cdf(0, math.sqrt(2 / i))),
    "he_normal slope, fan_out": (
        initializers.he_normal(0.2, "fan_out"),
        lambda i, o: normal_cdf(0, math.sqrt(2 / (1.04 * o))),
    ),
    "he_normal linear": (
        initializers.he_normal(nonlinearity="linear"), lambda i, o: normal_cdf(0, math.sqrt(1 / i)),
    ),
    "torch_linear": (initializers.torch_linear(), lambda i, o: is_plus_minus(1 / math.sqrt(i))),
    "variance_scaling fan_avg": (
        initializers.variance_scaling(3.0, "fan_avg", "uniform"),
        lambda i, o: is_plus_minus(math.sqrt(3 * 3 / ((i + o) / 2))),
    ),
    "variance_scaling fan_out": (
        initializers.variance_scaling(0.5, "fan_out", "normal"),
        lambda i, o: normal_cdf(0, math.sqrt(0.5 / o)),
    ),
    "variance_scaling truncated": (
        initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
        # Cut at two standard deviations of what is cut, widened so that 1 / fan_in remains.
        lambda i, o: truncated_cdf(
            0, i**-0.5 / CUT_STD, -2 * i**-0.5 / CUT_STD, 2 * i**-0.5 / CUT_STD
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_initializer_has_its_distribution(name, shape):
    initializer, cdf_of = DISTRIBUTIONS[name]
    sample = draw(initializer, shape)
    assert sample.shape == shape
    assert has_distribution(sample, cdf_of(*fans_of(shape)))


def test_the_kolmogorov_smirnov_test_tells_neighbouring_distributions_apart():
    sample = draw(initializers.normal(), LINEAR)
    assert not has_distribution(sample, normal_cdf(0, 1.1))
    assert not has_distribution(sample, normal_cdf(0.05, 1))
    assert not has_distribution(sample, truncated_cdf(0, 1, -2, 2))
    assert not has_distribution(draw(initializers.uniform(), LINEAR), uniform_cdf(0, 1.05))


# Our initializer and what torch documents as the same.
TORCHS = {
    "uniform": (initializers.uniform(-1.0, 2.0), lambda w: nn.init.uniform_(w, -1.0, 2.0)),
    "normal": (initializers.normal(1.0, 0.3), lambda w: nn.init.normal_(w, 1.0, 0.3)),
    "truncated_normal": (
        initializers.truncated_normal(0.5, 2.0, -1.0, 3.0),
        lambda w: nn.init.trunc_normal_(w, 0.5, 2.0, -1.0, 3.0),
    ),
    "zeros": (initializers.zeros(), nn.init.zeros_),
    "ones": (initializers.ones(), nn.init.ones_),
    "constant": (initializers.constant(0.3), lambda w: nn.init.constant_(w, 0.3)),
    "xavier_uniform": (
        initializers.xavier_uniform(2.0), lambda w: nn.init.xavier_uniform_(w, 2.0),
    ),
    "xavier_normal": (initializers.xavier_normal(0.5), lambda w: nn.init.xavier_normal_(w, 0.5)),
    "kaiming_uniform": (initializers.kaiming_uniform(), nn.init.kaiming_uniform_),
    "kaiming_uniform options": (
        initializers.kaiming_uniform(0.3, "fan_out", "leaky_relu"),
        lambda w: nn.init.kaiming_uniform_(w, 0.3, "fan_out", "leaky_relu"),
    ),
    "kaiming_normal": (initializers.kaiming_normal(), nn.init.kaiming_normal_),
    "kaiming_normal options": (
        initializers.kaiming_normal(mode="fan_out", nonlinearity="selu"),
        lambda w: nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="selu"),
    ),
    "torch_linear": (
        initializers.torch_linear(), lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", [LINEAR, CONV2D], ids=str)
@pytest.mark.parametrize("name", TORCHS)
def test_initializer_draws_as_torch_nn_init_does(name, shape):
    initializer, fill = TORCHS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        theirs = fill(torch.empty(shape, dtype=torch.float64))
    ours = draw(initializer, shape)
    low, high = float(theirs.min()), float(theirs.max())
    if low == high:
        assert torch.equal(ours, theirs)
        return
    # The two-sample statistic: each distribution at the other's points.
    x = torch.cat((ours.flatten(), theirs.flatten())).sort().values
    own, other = (
        torch.searchsorted(sample.flatten().sort().values, x, right=True) / sample.numel()
        for sample in (ours, theirs)
    )
    distance = float((own - other).abs().max())
    assert distance * math.sqrt(ours.numel() / 2) < KS_LIMIT


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("initializer", "variance"),
    [
        (initializers.lecun_normal(), lambda i, o: 1 / i),
        (initializers.lecun_uniform(), lambda i, o: 1 / i),
        (initializers.glorot_normal(), lambda i, o: 2 / (i + o)),
        (initializers.glorot_uniform(), lambda i, o: 2 / (i + o)),
        (initializers.he_normal(), lambda i, o: 2 / i),
        (initializers.he_uniform(), lambda i, o: 2 / i),
        (initializers.torch_linear(), lambda i, o: 1 / (3 * i)),
        (initializers.variance_scaling(2.0, "fan_out", "truncated_normal"), lambda i, o: 2 / o),
    ],
    ids=["lecun_normal", "lecun_uniform", "glorot_normal", "glorot_uniform", "he_normal",
         "he_uniform", "torch_linear", "truncated_normal"],
)  # fmt: skip
def test_initializer_has_mean_zero_and_the_variance_of_its_formula(initializer, variance, shape):
    sample, expected = draw(initializer, shape), variance(*fans_of(shape))
    n = sample.numel()
    assert abs(float(sample.mean())) < 4.5 * math.sqrt(expected / n)
    # A normal sample's variance has the standard deviation sqrt(2 / n) var; a uniform one's less.
    assert abs(float(sample.var()) / expected - 1) < 4.5 * math.sqrt(2 / n)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [LINEAR, CONV2D], ids=str)
@pytest.mark.parametrize(
    ("initializer", "bound"),
    [
        (initializers.glorot_uniform(), lambda i, o: math.sqrt(6 / (i + o))),
        (initializers.he_uniform(), lambda i, o: math.sqrt(6 / i)),
        (initializers.lecun_uniform(), lambda i, o: math.sqrt(3 / i)),
        (initializers.torch_linear(), lambda i, o: math.sqrt(1 / i)),
        (initializers.truncated_normal(0.0, 1.0, -1.5, 1.5), lambda i, o: 1.5),
        (
            initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
            lambda i, o: 2 / CUT_STD / math.sqrt(i),
        ),
    ],
    ids=["glorot", "he", "lecun", "torch_linear", "truncated", "scaled truncated"],
)
def test_bounded_initializer_fills_its_bounds_and_keeps_to_them(initializer, bound, shape, dtype):
    sample, limit = draw(initializer, shape, dtype=dtype), bound(*fans_of(shape))
    slack = 1 + torch.finfo(dtype).eps
    assert sample.dtype == dtype
    assert float(sample.min()) >= -limit * slack
    assert float(sample.max()) <= limit * slack
    # A normal draw in bfloat16 has 128 values, of which few are far out.
    reach = 0.9 if dtype == torch.bfloat16 else 0.97
    assert float(sample.min()) < -reach * limit
    assert float(sample.max()) > reach * limit


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_initializer_in_float32_has_its_distribution_too(name):
    initializer, cdf_of = DISTRIBUTIONS[name]
    sample = draw(initializer, LINEAR, dtype=torch.float32)
    assert sample.dtype == torch.float32
    assert has_distribution(sample, cdf_of(*fans_of(LINEAR)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_initializer_in_half_precision_has_its_mean_and_deviation(name, dtype):
    initializer, _ = DISTRIBUTIONS[name]
    half = draw(initializer, LINEAR, dtype=dtype)
    exact = draw(initializer, LINEAR)
    assert half.dtype == dtype
    assert torch.isfinite(half).all()
    spread = float(exact.std())
    # bfloat16 has 256 numbers a unit, and the draw is rounded down to one.
    scale = max(spread, abs(float(exact.mean())))
    assert abs(float(half.double().mean() - exact.mean())) < 0.02 * scale + 0.03 * spread
    assert abs(float(half.double().std()) / spread - 1) < 0.05


ALL = {
    **{name: initializer for name, (initializer, _) in DISTRIBUTIONS.items()},
    "zeros": initializers.zeros(),
    "ones": initializers.ones(),
    "constant": initializers.constant(3.0),
    "orthogonal": initializers.orthogonal(),
}


@pytest.mark.parametrize("name", ALL)
def test_initializer_gives_shape_dtype_and_device(name):
    for shape in [(4, 3), (3, 4), (4, 3, 2), (2, 3, 2, 2), (1, 1)]:
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            for device in (DEVICE, torch.device("meta")):
                drawn = draw(ALL[name], shape, dtype=dtype, device=device)
                assert (drawn.shape, drawn.dtype, drawn.device) == (shape, dtype, device)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (0, 3, 2), (3, 0, 2, 2)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_initializer_takes_an_empty_shape(name, shape):
    assert draw(ALL[name], shape).shape == shape


@pytest.mark.parametrize("name", ALL)
def test_initializer_is_a_function_of_its_key(name):
    first, again = (draw(ALL[name], (20, 30)) for _ in range(2))
    assert torch.equal(first, again)
    other = draw(ALL[name], (20, 30), key=fn.key(12))
    assert torch.equal(first, other) == (name in ("zeros", "ones", "constant"))


@pytest.mark.parametrize("gain", [1.0, 0.5, math.sqrt(2), -1.0, 0.0])
@pytest.mark.parametrize(
    "shape",
    [(5, 5), (3, 7), (7, 3), (1, 6), (6, 1), (4, 2, 3), (8, 2, 1, 2), (1, 1), (20, 4, 3, 3)],
    ids=str,
)
def test_orthogonal_has_orthogonal_rows_or_columns_of_length_gain(shape, gain):
    weight = draw(initializers.orthogonal(gain), shape)
    assert weight.is_contiguous()
    matrix = weight.flatten(1)
    rows, columns = matrix.shape
    product = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    torch.testing.assert_close(
        product, gain**2 * torch.eye(min(rows, columns), dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_orthogonal_is_orthogonal_in_every_dtype(dtype, atol):
    matrix = draw(initializers.orthogonal(), (6, 10), dtype=dtype)
    assert matrix.dtype == dtype
    product = matrix.double() @ matrix.double().T
    torch.testing.assert_close(product, torch.eye(6, dtype=torch.float64), rtol=0, atol=atol)


def test_orthogonal_is_uniform_over_the_rotations_and_reflections():
    # An entry of a large uniform orthogonal matrix is almost N(0, 1/n). A Householder QR whose
    # signs are not mended has a negative diagonal, with the mean -sqrt(2 / pi / n).
    n = 200
    scaled = math.sqrt(n) * draw(initializers.orthogonal(), (n, n))
    assert has_distribution(scaled, normal_cdf(0, 1))
    assert has_distribution(scaled.diagonal(), normal_cdf(0, 1))


@pytest.mark.parametrize("shape", [(), (4,)])
def test_orthogonal_refuses_a_vector(shape):
    with pytest.raises(
        ValueError, match=r"^orthogonal: expects at least two dimensions, got shape "
    ):
        draw(initializers.orthogonal(), shape)


GAINS = [
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "sigmoid", "tanh", "relu", "selu", "leaky_relu",
]  # fmt: skip


@pytest.mark.parametrize("nonlinearity", GAINS)
def test_gain_is_torchs(nonlinearity):
    assert initializers.gain(nonlinearity) == nn.init.calculate_gain(nonlinearity)


@pytest.mark.parametrize("slope", [0, 0.0, 0.01, 0.5, 1, -2.0, math.sqrt(5)])
def test_gain_of_leaky_relu_is_torchs_at_every_slope(slope):
    assert initializers.gain("leaky_relu", slope) == nn.init.calculate_gain("leaky_relu", slope)


def test_gain_refuses_a_nonlinearity_it_does_not_know():
    with pytest.raises(
        ValueError, match=r"^gain: expects one of \[.*'leaky_relu'.*\], got 'swish'$"
    ):
        initializers.gain("swish")
    with pytest.raises(ValueError, match=r"^gain: expects one of .*, got 'swish'$"):
        initializers.he_normal(nonlinearity="swish")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fans_are_torchs(shape):
    theirs = nn.init._calculate_fan_in_and_fan_out(torch.empty(shape))
    assert initializers.fans(shape) == theirs == fans_of(shape)


@pytest.mark.parametrize("shape", [(), (4,)])
def test_scaled_initializer_refuses_a_vector(shape):
    message = r"fan_in and fan_out need at least two dimensions, got shape \("
    for make in (initializers.glorot_uniform, initializers.he_normal, initializers.lecun_normal):
        with pytest.raises(ValueError, match=message):
            draw(make(), shape)


@pytest.mark.parametrize(
    ("ours", "alias"),
    [
        ("glorot_uniform", "xavier_uniform"),
        ("glorot_normal", "xavier_normal"),
        ("he_uniform", "kaiming_uniform"),
        ("he_normal", "kaiming_normal"),
    ],
)
def test_alias_is_the_same_function(ours, alias):
    assert getattr(initializers, ours) is getattr(initializers, alias)


def test_arguments_are_torchs_where_they_are_the_same():
    ours = inspect.signature(initializers.he_uniform).parameters
    assert [p.default for p in ours.values()] == [0.0, "fan_in", "leaky_relu"]
    theirs = inspect.signature(nn.init.kaiming_uniform_).parameters
    assert [p.default for p in theirs.values()][1:4] == [0, "fan_in", "leaky_relu"]


def test_truncated_normal_of_no_spread_is_constant():
    drawn = draw(initializers.truncated_normal(0.3, 0.0), (2, 2))
    assert torch.equal(drawn, torch.full((2, 2), 0.3, dtype=torch.float64))
    drawn = draw(initializers.truncated_normal(5.0, 0.0), (2, 2))
    assert torch.equal(drawn, torch.full((2, 2), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_truncated_normal_far_out_in_the_tail_keeps_its_distribution(dtype):
    sample = draw(initializers.truncated_normal(0.0, 1.0, 3.0, 4.0), LINEAR, dtype=dtype)
    assert float(sample.min()) >= 3.0
    assert float(sample.max()) <= 4.0
    assert has_distribution(sample, truncated_cdf(0, 1, 3.0, 4.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: initializers.normal(0.0, -1.0), r"^normal: std must be >= 0, got -1\.0$"),
        (
            lambda: initializers.truncated_normal(0.0, -1.0),
            r"^truncated_normal: std must be >= 0, got -1\.0$",
        ),
        (
            lambda: initializers.variance_scaling(0.0, "fan_in", "normal"),
            r"^variance_scaling: scale must be positive, got 0\.0$",
        ),
        (
            lambda: initializers.variance_scaling(float("nan"), "fan_in", "normal"),
            r"^variance_scaling: scale must be positive, got nan$",
        ),
        (
            lambda: initializers.variance_scaling(1.0, "fan", "normal"),
            r"^variance_scaling: mode must be fan_in, fan_out or fan_avg, got 'fan'$",
        ),
        (
            lambda: initializers.variance_scaling(1.0, "fan_in", "cauchy"),
            r"^variance_scaling: distribution must be uniform, normal or truncated_normal, "
            r"got 'cauchy'$",
        ),
        (
            lambda: draw(initializers.truncated_normal(0.0, 1.0, 2.0, -2.0), (2, 2)),
            r"^truncated_normal: expects lower < upper, got 2\.0 and -2\.0$",
        ),
    ],
)
def test_initializer_refuses_wrong_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("layer", "x", "path"),
    [
        (fn.linear(120), (1, 300), "weight"),
        (fn.linear(20_000), (1, 30), "bias"),
        (fn.conv2d(60, (3, 5), groups=2), (1, 40, 9, 9), "weight"),
        (fn.conv2d(20_000, (2, 3)), (1, 5, 9, 9), "bias"),
    ],
)
def test_default_weights_and_biases_are_uniform_within_one_over_the_root_of_fan_in(layer, x, path):
    params, _ = layer.init(KEY, torch.empty(x, dtype=torch.float64))
    fan_in = params["weight"][0].numel()
    assert has_distribution(params[path], is_plus_minus(fan_in**-0.5))
