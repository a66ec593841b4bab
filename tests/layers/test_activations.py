import pytest
import torch
from layers.oracle import (
    assert_near,
    check_against,
    check_module,
    cotangent,
    randn,
    randomize,
    strided,
    transposed,
)
from torch import nn

import funcnet as fn
from funcnet import lift

# name: (layer, module), with every option of the module at its default and away from it
PAIRS = {
    "relu": (fn.relu(), nn.ReLU()),
    "leaky_relu": (fn.leaky_relu(), nn.LeakyReLU()),
    "leaky_relu 0.3": (fn.leaky_relu(0.3), nn.LeakyReLU(0.3)),
    "leaky_relu 0": (fn.leaky_relu(0.0), nn.LeakyReLU(0.0)),
    "leaky_relu -1": (fn.leaky_relu(-1.0), nn.LeakyReLU(-1.0)),
    "leaky_relu keyword": (fn.leaky_relu(negative_slope=2), nn.LeakyReLU(negative_slope=2)),
    "tanh": (fn.tanh(), nn.Tanh()),
    "sigmoid": (fn.sigmoid(), nn.Sigmoid()),
    "gelu": (fn.gelu(), nn.GELU()),
    "gelu tanh": (fn.gelu(approximate="tanh"), nn.GELU(approximate="tanh")),
    "silu": (fn.silu(), nn.SiLU()),
    "elu": (fn.elu(), nn.ELU()),
    "elu 2.5": (fn.elu(alpha=2.5), nn.ELU(alpha=2.5)),
    "elu 0": (fn.elu(0.0), nn.ELU(0.0)),
    "elu int": (fn.elu(2), nn.ELU(2)),
    "celu": (fn.celu(), nn.CELU()),
    "celu 4": (fn.celu(alpha=4.0), nn.CELU(alpha=4.0)),
    # A power of two, for autograd takes 1 / alpha in float32; FORMULAS has another alpha.
    "celu 0.25": (fn.celu(0.25), nn.CELU(0.25)),
    "celu int": (fn.celu(2), nn.CELU(2)),
    "selu": (fn.selu(), nn.SELU()),
    "softplus": (fn.softplus(), nn.Softplus()),
    "softplus 3": (fn.softplus(beta=3.0), nn.Softplus(beta=3.0)),
    "softplus 0.5, 1": (fn.softplus(0.5, threshold=1.0), nn.Softplus(0.5, threshold=1.0)),
    "softplus int": (fn.softplus(2, 1), nn.Softplus(2, 1)),
    "softsign": (fn.softsign(), nn.Softsign()),
    "mish": (fn.mish(), nn.Mish()),
    "hardtanh": (fn.hardtanh(), nn.Hardtanh()),
    "hardtanh -2, 0.5": (fn.hardtanh(-2.0, max_val=0.5), nn.Hardtanh(-2.0, max_val=0.5)),
    "hardsigmoid": (fn.hardsigmoid(), nn.Hardsigmoid()),
    "hardswish": (fn.hardswish(), nn.Hardswish()),
    "relu6": (fn.relu6(), nn.ReLU6()),
    "logsigmoid": (fn.logsigmoid(), nn.LogSigmoid()),
    "softmax": (fn.softmax(), nn.Softmax(-1)),
    "softmax 0": (fn.softmax(dim=0), nn.Softmax(dim=0)),
    "log_softmax": (fn.log_softmax(), nn.LogSoftmax(-1)),
    "log_softmax 0": (fn.log_softmax(dim=0), nn.LogSoftmax(dim=0)),
    "glu": (fn.glu(), nn.GLU()),
    "glu 0": (fn.glu(dim=0), nn.GLU(dim=0)),
    "prelu": (fn.prelu(), nn.PReLU()),
    "threshold": (fn.threshold(0.5, 20.0), nn.Threshold(0.5, 20.0)),
    "threshold int": (fn.threshold(-1, value=-3), nn.Threshold(-1, value=-3)),
    "hardshrink": (fn.hardshrink(), nn.Hardshrink()),
    "hardshrink 0": (fn.hardshrink(0.0), nn.Hardshrink(0.0)),
    "hardshrink 2": (fn.hardshrink(lambd=2), nn.Hardshrink(lambd=2)),
    "hardshrink -1": (fn.hardshrink(-1.0), nn.Hardshrink(-1.0)),
    "softshrink": (fn.softshrink(), nn.Softshrink()),
    "softshrink 0": (fn.softshrink(0.0), nn.Softshrink(0.0)),
    "softshrink 2": (fn.softshrink(lambd=2), nn.Softshrink(lambd=2)),
    "tanhshrink": (fn.tanhshrink(), nn.Tanhshrink()),
    "softmin": (fn.softmin(), nn.Softmin(-1)),
    "softmin 0": (fn.softmin(dim=0), nn.Softmin(dim=0)),
}
ELEMENTWISE = [name for name in PAIRS if not name.startswith(("softmax", "log_", "softmin", "glu"))]

# The bends of all rows, both zeros, and numbers where exp and squares leave double's comfort.
EDGES = torch.tensor(
    [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 0.5, 6.0]
    + [1e-300, -1e-300, 40.0, -40.0, 200.0, -200.0],
    dtype=torch.float64,
)


@pytest.mark.parametrize("name", PAIRS)
def test_activation_is_torchs(name):
    check_module(*PAIRS[name], 3 * randn(8, 5, 6))


@pytest.mark.parametrize("name", PAIRS)
def test_activation_is_torchs_at_its_bends_and_far_out(name):
    check_module(*PAIRS[name], EDGES)


EXTREMES = torch.tensor(
    [float("inf"), -float("inf"), float("nan"), 1e30, -1e30, 1e300, -1e300]
    + [88.0, -88.0, 100.0, -104.0, 710.0, -710.0, -745.0, 20.0, -20.0],
    dtype=torch.float64,
)


def by_torch(module, x, dy):
    """``(y, dx)`` by autograd."""
    x = x.clone().requires_grad_()
    y = module(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def assert_each_near(actual, expected, dtype):
    """Each number for itself, however small it is beside the others."""
    rtol = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
    # Autograd of tanhshrink and softsign subtracts numbers that are near each other.
    atol = {torch.float64: 1e-16, torch.float32: 1e-7, torch.float16: 1e-3, torch.bfloat16: 5e-3}
    torch.testing.assert_close(actual, expected, rtol=rtol[dtype], atol=atol[dtype], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_activation_is_torchs_at_every_number_by_itself(name, dtype):
    layer, module = PAIRS[name]
    module = module.to(dtype)
    params = {name: leaf.detach() for name, leaf in module.named_parameters()}
    x = torch.cat([EDGES, EXTREMES, -EDGES / 3]).to(dtype)
    if name == "softsign":
        x = x[x.isfinite()]
    dy = torch.linspace(0.5, 1.5, len(x), dtype=dtype)
    y, pullback, _ = layer.vjp(params, x)
    expected_y, expected_dx = by_torch(module, x, dy)
    assert_each_near(y, expected_y, dtype)
    assert_each_near(pullback(dy)[1], expected_dx, dtype)
    module.double()


def test_softsign_has_slope_0_at_infinity_where_autograd_has_none():
    x = torch.tensor([float("inf"), -float("inf")])
    _, pullback, _ = fn.softsign().vjp({}, x)
    assert pullback(torch.ones(2))[1].tolist() == [0.0, 0.0]
    assert by_torch(nn.Softsign(), x, torch.ones(2))[1].isnan().all()


@pytest.mark.parametrize("name", [name for name in ELEMENTWISE if name != "softsign"])
def test_the_formula_of_an_activation_is_torchs_at_every_number_too(name, monkeypatch):
    monkeypatch.setattr(lift, "KERNELS", {})
    layer, module = PAIRS[name]
    params = {name: leaf.detach() for name, leaf in module.double().named_parameters()}
    x = torch.cat([EDGES, EXTREMES, -EDGES / 3])
    dy = torch.linspace(0.5, 1.5, len(x), dtype=torch.float64)
    got = layer.vjp(params, x)[1](dy)[1]
    # Formulas of the form 1 - y^2 cancel, and aten's hardsigmoid has 1/6 in float32.
    torch.testing.assert_close(
        got, by_torch(module, x, dy)[1], rtol=1e-7, atol=1e-14, equal_nan=True
    )


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0, 2)])
def test_activation_takes_empty_inputs(name, shape):
    check_module(*PAIRS[name], randn(*shape))


@pytest.mark.parametrize("name", [name for name in PAIRS if not name.startswith("glu")])
def test_activation_takes_a_scalar(name):
    check_module(*PAIRS[name], randn(seed=4))
    check_module(*PAIRS[name], -randn(seed=4))


@pytest.mark.parametrize("rearrange", [transposed, strided, lambda x: x[:1].expand(*x.shape)])
@pytest.mark.parametrize("name", PAIRS)
def test_activation_takes_inputs_and_cotangents_that_are_not_contiguous(name, rearrange):
    layer, module = PAIRS[name]
    x = rearrange(randn(4, 6, 8))
    y, _ = layer.apply({"weight": randn(1)} if name == "prelu" else {}, x)
    check_module(layer, module, x, dy=rearrange(randn(*y.shape, seed=2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PAIRS)
def test_activation_computes_in_the_dtype_of_its_input(name, dtype):
    check_module(*PAIRS[name], 2 * randn(6, 6, dtype=dtype))


@pytest.mark.parametrize("name", PAIRS)
def test_activation_passes_nan_on(name):
    layer, module = PAIRS[name]
    params = {"weight": torch.full((1,), 0.25, dtype=torch.float64)} if name == "prelu" else {}
    x = torch.tensor([float("nan"), 1.0], dtype=torch.float64)
    y, _ = layer.apply(params, x)
    assert_near(y, module.double()(x).detach())


FORMULAS = {
    "relu": (fn.relu(), lambda x: x * (x > 0)),
    "leaky_relu": (fn.leaky_relu(0.1), lambda x: torch.where(x > 0, x, 0.1 * x)),
    "tanh": (fn.tanh(), lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp())),
    "sigmoid": (fn.sigmoid(), lambda x: 1 / (1 + (-x).exp())),
    "gelu": (fn.gelu(), lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2),
    "gelu tanh": (
        fn.gelu("tanh"),
        lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    ),
    "silu": (fn.silu(), lambda x: x / (1 + (-x).exp())),
    "elu": (fn.elu(2.0), lambda x: torch.where(x > 0, x, 2 * (x.exp() - 1))),
    "celu": (fn.celu(0.3), lambda x: torch.where(x > 0, x, 0.3 * ((x / 0.3).exp() - 1))),
    "selu": (
        fn.selu(),
        lambda x: (
            1.0507009873554804934193349852946
            * torch.where(x > 0, x, 1.6732632423543772848170429916717 * (x.exp() - 1))
        ),
    ),
    "softplus": (
        fn.softplus(2.0, 3.0),
        lambda x: torch.where(2 * x > 3, x, (1 + (2 * x).exp()).log() / 2),
    ),
    "softsign": (fn.softsign(), lambda x: x / (1 + x.abs())),
    "mish": (fn.mish(), lambda x: x * torch.tanh((1 + x.exp()).log())),
    "hardtanh": (fn.hardtanh(-0.5, 0.7), lambda x: x.clamp(-0.5, 0.7)),
    "hardsigmoid": (fn.hardsigmoid(), lambda x: (x / 6 + 0.5).clamp(0, 1)),
    "hardswish": (fn.hardswish(), lambda x: x * (x / 6 + 0.5).clamp(0, 1)),
    "relu6": (fn.relu6(), lambda x: x.clamp(0, 6)),
    "logsigmoid": (fn.logsigmoid(), lambda x: -(1 + (-x).exp()).log()),
    "softmax": (fn.softmax(1), lambda x: x.exp() / x.exp().sum(1, keepdim=True)),
    "log_softmax": (fn.log_softmax(1), lambda x: x - x.exp().sum(1, keepdim=True).log()),
    "glu": (fn.glu(1), lambda x: x[:, :3] / (1 + (-x[:, 3:]).exp())),
    "threshold": (fn.threshold(0.5, 20.0), lambda x: torch.where(x > 0.5, x, 20.0)),
    "hardshrink": (fn.hardshrink(0.7), lambda x: x * (x.abs() > 0.7)),
    "softshrink": (fn.softshrink(0.7), lambda x: x.sign() * (x.abs() - 0.7).clamp(min=0)),
    "tanhshrink": (fn.tanhshrink(), lambda x: x - x.tanh()),
    "softmin": (fn.softmin(1), lambda x: (-x).exp() / (-x).exp().sum(1, keepdim=True)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_activation_is_its_formula(name):
    layer, formula = FORMULAS[name]
    # PyTorch's kernel has 1/6 in float32 for every dtype.
    tolerance = 1e-7 if name == "hardsigmoid" else None
    x = 3 * randn(7, 6, 4)
    check_against(lambda params, x: formula(x), layer, {}, x, tolerance=tolerance)


@pytest.mark.parametrize("slopes", [1, 3])
@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (2, 3, 4, 5), (0, 3), (2, 3, 0), (1, 3)])
def test_prelu_has_one_slope_or_one_for_each_channel(slopes, shape):
    check_module(fn.prelu(slopes), nn.PReLU(slopes), randn(*shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slopes", [1, 3])
def test_prelu_computes_in_the_dtype_of_its_input(slopes, dtype):
    check_module(fn.prelu(slopes), nn.PReLU(slopes), randn(4, 3, 2, dtype=dtype))


def test_prelu_with_channels_takes_inputs_that_are_not_contiguous():
    check_module(fn.prelu(6), nn.PReLU(6), transposed(randn(4, 6, 8)), dy=strided(randn(4, 6, 8)))


def test_prelu_starts_at_init():
    params, state = fn.prelu(2, init=0.5, dtype=torch.float64).init(fn.key(0), torch.ones(1, 2))
    assert_near(params, {"weight": torch.full((2,), 0.5, dtype=torch.float64)})
    assert state == {}
    assert fn.prelu().init(fn.key(0), torch.ones(3))[0]["weight"].tolist() == [0.25]


@pytest.mark.parametrize(
    ("x", "got"),
    [(randn(3), "float64 (3,)"), (randn(3, 4), "float64 (3, 4)"), (randn(), "float64 ()")],
)
def test_prelu_names_the_channels_that_it_expects(x, got):
    message = f"prelu: weight expects 3 channels in dimension 1, got {got}"
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the whole message is compared
        fn.prelu(3).apply({"weight": randn(3)}, x)
    assert str(raised.value) == message


def test_prelu_refuses_another_dtype_than_its_weights():
    with pytest.raises(TypeError, match=r"^prelu: weight is torch.float64, x is torch.float32$"):
        fn.prelu().apply({"weight": randn(1)}, torch.ones(3))


INTEGERS = torch.ones(4, 4, dtype=torch.int64)


@pytest.mark.parametrize("name", PAIRS)
def test_activation_refuses_integers_by_name(name):
    layer, module = PAIRS[name]
    params = dict(randomize(module.double()).named_parameters())
    message = rf"^{name.split()[0]}: expects a floating-point tensor, got int64 \(4, 4\)$"
    for call in (layer.apply, layer.vjp):
        with pytest.raises(TypeError, match=message):
            call(params, INTEGERS)
    with pytest.raises(TypeError, match=message):
        layer.init(fn.key(0), INTEGERS)


@pytest.mark.parametrize("name", [name for name in PAIRS if name != "prelu"])
def test_activation_refuses_params_and_state(name):
    layer = PAIRS[name][0]
    short = name.split()[0]
    with pytest.raises(ValueError, match=rf"^{short}: expects params \[\], got \['weight'\]$"):
        layer.apply({"weight": randn(4)}, randn(4, 4))
    with pytest.raises(ValueError, match=rf"^{short}: has no state, got state with \['seen'\]$"):
        layer.apply({}, randn(4, 4), {"seen": randn(1)})


@pytest.mark.parametrize("name", PAIRS)
def test_activation_refuses_a_cotangent_that_would_broadcast(name):
    layer, module = PAIRS[name]
    params = {k: v.detach() for k, v in randomize(module.double()).named_parameters()}
    y, pullback, _ = layer.vjp(params, randn(4, 6))
    for dy in (cotangent(y)[:1], cotangent(y)[0], randn(), randn(1, *y.shape)):
        with pytest.raises(ValueError, match=rf"^{name.split()[0]}: pullback expects dy of shape"):
            pullback(dy)


@pytest.mark.parametrize(
    "layer",
    [fn.softmax(2), fn.softmax(-3), fn.log_softmax(2), fn.softmin(2), fn.glu(2), fn.glu(-3)],
    ids=repr,
)
def test_activation_refuses_a_dimension_that_x_has_not(layer):
    with pytest.raises(ValueError, match=f"^{layer.name}: "):
        layer.apply({}, randn(4, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fn.gelu("erf"), "gelu: approximate must be 'none' or 'tanh', got 'erf'"),
        (lambda: fn.celu(0), "celu: alpha must not be 0"),
        (lambda: fn.hardtanh(1, -1), "hardtanh: expects min_val < max_val, got 1 and -1"),
        (lambda: fn.hardtanh(1, 1), "hardtanh: expects min_val < max_val, got 1 and 1"),
        (lambda: fn.softshrink(-0.1), "softshrink: lambd must be >= 0, got -0.1"),
        (lambda: fn.rrelu(0.3, 0.1), "rrelu: expects lower <= upper, got 0.3 and 0.1"),
    ],
)
def test_activation_refuses_wrong_options(make, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the whole message is compared
        make()
    assert str(raised.value) == message


@pytest.mark.parametrize("slopes", [0, -1])
def test_prelu_refuses_to_have_no_slopes(slopes):
    with pytest.raises(ValueError, match=rf"^prelu: num_parameters must be .*, got {slopes}$"):
        fn.prelu(slopes)


@pytest.mark.parametrize("shape", [(4, 3), (), (3,)])
def test_glu_refuses_what_has_no_halves(shape):
    with pytest.raises(ValueError, match=r"^glu: expects an even size along dim -1, got \("):
        fn.glu().apply({}, randn(*shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 4, 5), (0, 3, 4, 5), (3, 0, 5)])
def test_softmax2d_is_torchs(shape, dtype):
    x = randn(*shape, dtype=dtype)
    check_module(fn.softmax2d(), nn.Softmax2d(), x)
    check_module(fn.softmax2d(), nn.Softmax2d(), transposed(x), dy=strided(x))


@pytest.mark.parametrize("shape", [(3, 4), (1, 2, 3, 4, 5), ()])
def test_softmax2d_refuses_what_is_not_images(shape):
    with pytest.raises(
        ValueError, match=r"^softmax2d: expects \(batch, channels, H, W\) or .*, got"
    ):
        fn.softmax2d().apply({}, randn(*shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bounds", [(), (0.1, 0.5), (-0.3, 0.2), (0.25, 0.25)])
def test_rrelu_is_torchs_in_eval(bounds, dtype):
    x = randn(4, 5, dtype=dtype)
    check_module(fn.rrelu(*bounds), nn.RReLU(*bounds), x, train=False)
    check_module(fn.rrelu(*bounds), nn.RReLU(*bounds), EDGES.to(dtype), train=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rrelu_in_training_multiplies_negative_values_and_their_cotangents_by_a_slope(dtype):
    x = torch.cat([EDGES, randn(2000)]).to(dtype)
    layer = fn.rrelu(0.1, 0.6)
    y, pullback, _ = layer.vjp({}, x, key=fn.key(0), train=True)
    dy = torch.ones_like(x)
    slopes = pullback(dy)[1]
    assert_near(y, x * slopes, 0.0)
    # As aten's backward pass of the same noise.
    backward = torch.ops.aten.rrelu_with_noise_backward
    assert_near(slopes, backward(dy, x, slopes, 0.1, 0.6, True, False))
    assert (slopes[x > 0] == 1).all()
    drawn = slopes[x <= 0].double()
    assert drawn.min() >= 0.1 - 2e-3
    assert drawn.max() <= 0.6 + 2e-3
    assert abs(drawn.mean() - 0.35) < 0.02
    assert abs(drawn.std() - 0.5 / 12**0.5) < 0.01
    assert y.dtype == slopes.dtype == dtype


def test_rrelu_passes_nan_on_and_takes_empty_inputs_and_scalars():
    layer, key = fn.rrelu(), fn.key(0)
    y, pullback, _ = layer.vjp({}, torch.tensor([float("nan"), 1.0]), key=key)
    assert y.isnan().tolist() == [True, False]
    assert pullback(torch.ones(2))[1].tolist() == [1.0, 1.0]
    assert layer.apply({}, torch.ones(0, 3), key=key, train=True)[0].shape == (0, 3)
    assert layer.apply({}, torch.tensor(2.0), key=key, train=True)[0].item() == 2.0


def test_rrelu_draws_from_its_key_alone():
    x, layer = -torch.ones(100), fn.rrelu()
    first, again, other = (
        layer.apply({}, x, key=fn.key(seed), train=True)[0] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(ValueError, match=r"^rrelu: needs a key when train=True, got None"):
        layer.apply({}, x, train=True)


def test_every_activation_of_torch_is_there():
    missing = {
        name
        for name in nn.modules.activation.__all__
        if not hasattr(fn, SNAKE_CASE.get(name, name.lower()))
    }
    assert missing == {"MultiheadAttention"}


SNAKE_CASE = {"LeakyReLU": "leaky_relu", "LogSoftmax": "log_softmax"}
