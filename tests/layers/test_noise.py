"""Dropout of channels and examples, alpha dropout and Gaussian noise; plain dropout is beside."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from layers.oracle import assert_near, check_against, randn, strided, transposed
from torch import nn

import funcnet as fn

KEY = fn.key(7)
SCALE = -1.7580993408473766

# Each layer with a shape of its input, and the shape of its mask.
LAYERS = {
    "dropout1d": (fn.dropout1d, (4, 6, 5), (4, 6, 1)),
    "dropout1d unbatched": (fn.dropout1d, (6, 5), (6, 1)),
    "dropout2d": (fn.dropout2d, (4, 6, 5, 3), (4, 6, 1, 1)),
    "dropout2d of lengths": (fn.dropout2d, (4, 6, 5), (4, 6, 1)),
    "dropout3d": (fn.dropout3d, (4, 6, 2, 5, 3), (4, 6, 1, 1, 1)),
    "dropout3d unbatched": (fn.dropout3d, (6, 2, 5, 3), (6, 1, 1, 1)),
    "alpha_dropout": (fn.alpha_dropout, (4, 6, 5), (4, 6, 5)),
    "alpha_dropout of one": (fn.alpha_dropout, (), ()),
    "feature_alpha_dropout": (fn.feature_alpha_dropout, (4, 6, 5, 3), (4, 6, 1, 1)),
    "feature_alpha_dropout of rows": (fn.feature_alpha_dropout, (4, 6), (4, 6)),
    "drop_path": (fn.drop_path, (8, 6, 5), (8, 1, 1)),
    "drop_path of numbers": (fn.drop_path, (8,), (8,)),
    "drop_path of the batch": (lambda p: fn.drop_path(p, "batch"), (8, 6, 5), ()),
}
TORCHS = {
    "dropout1d": nn.Dropout1d,
    "dropout2d": nn.Dropout2d,
    "dropout3d": nn.Dropout3d,
    "alpha_dropout": nn.AlphaDropout,
    "feature_alpha_dropout": nn.FeatureAlphaDropout,
}


def is_alpha(name):
    return "alpha" in name


def constants(name, p):
    """Scale of what is kept, and what is dropped and added, as PyTorch computes them."""
    if not is_alpha(name):
        return (1 / (1 - p) if p < 1 else 0.0), 0.0, 0.0
    if p == 1:
        return 0.0, 0.0, 0.0
    a = 1 / ((SCALE * SCALE * p + 1) * (1 - p)) ** 0.5
    return a, SCALE * a, -SCALE * a * p


def kept_by(layer, shape, key=KEY):
    """The layer's mask, found with an input that no dropped value equals."""
    y, pullback, _ = layer.vjp({}, torch.full(shape, 3.0), key=key)
    return pullback(torch.ones_like(y))[1] != 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", LAYERS)
def test_given_its_mask_a_layer_is_torchs_formula(name, p):
    make, shape, _ = LAYERS[name]
    layer, x = make(p), randn(*shape)
    kept = kept_by(layer, shape)
    scale, dropped, shift = constants(name, p)
    check_against(
        lambda params, x: torch.where(kept, x * scale, dropped) + shift, layer, {}, x, key=KEY
    )


@pytest.mark.parametrize("name", LAYERS)
def test_what_shares_a_mask_element_is_dropped_together(name):
    make, shape, mask = LAYERS[name]
    mask = mask or [1] * len(shape)
    for seed in range(20):
        kept = kept_by(make(0.5), shape, fn.key(seed))
        first = kept
        for dim, size in enumerate(mask):
            first = first.narrow(dim, 0, size)
        assert torch.equal(first.expand_as(kept), kept)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("dropout1d", (6, 5)),
        ("dropout1d", (4, 6, 5)),
        ("dropout2d", (4, 6, 5, 3)),
        ("dropout3d", (6, 2, 5, 3)),
        ("dropout3d", (4, 6, 2, 5, 3)),
        ("alpha_dropout", (4, 6, 5)),
        ("feature_alpha_dropout", (4, 6, 5, 3)),
        ("feature_alpha_dropout", (4, 6)),
    ],
)
def test_torch_drops_the_same_groups_and_gives_the_same_values(name, shape):
    theirs = TORCHS[name](0.4)
    x = torch.ones(shape, dtype=torch.float64)
    torch.manual_seed(0)
    drawn = [theirs(x) for _ in range(50)]
    ours = [getattr(fn, name)(0.4).apply({}, x, key=fn.key(i), train=True)[0] for i in range(50)]
    assert_near(torch.stack(ours).unique(), torch.stack(drawn).unique())
    for dim in range(x.dim()):
        constant = [
            all(torch.equal(y, y.narrow(dim, 0, 1).expand_as(y)) for y in ys)
            for ys in (ours, drawn)
        ]
        assert constant[0] == constant[1]


def deviations(observed, p, n):
    return abs(observed - p) / (p * (1 - p) / n) ** 0.5


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), p=st.sampled_from([0.05, 0.3, 0.5, 0.9]))
def test_a_fraction_p_of_the_groups_is_dropped(seed, p):
    for make, shape, n in [
        (fn.dropout1d, (50, 40, 2), 2000),
        (fn.dropout2d, (50, 40, 2, 1), 2000),
        (fn.dropout3d, (50, 40, 2, 1, 1), 2000),
        (fn.alpha_dropout, (50, 40), 2000),
        (fn.feature_alpha_dropout, (50, 40, 2), 2000),
        (fn.drop_path, (2000, 2), 2000),
    ]:
        kept = kept_by(make(p), shape, fn.key(seed))
        assert deviations(float((~kept).double().mean()), p, n) < 6


def test_drop_path_of_the_batch_drops_all_or_nothing():
    layer = fn.drop_path(0.3, "batch")
    kept = torch.stack([kept_by(layer, (4, 2), fn.key(seed)) for seed in range(400)])
    every = kept.flatten(1)
    assert torch.equal(every.all(1), every.any(1))
    assert deviations(1 - float(every[:, 0].double().mean()), 0.3, 400) < 5


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("make", [fn.alpha_dropout, fn.feature_alpha_dropout])
def test_alpha_dropout_keeps_mean_0_and_variance_1(make, p):
    x = randn(400, 500)
    y, _ = make(p).apply({}, x, key=KEY, train=True)
    # The fourth moment of y is below 4 / (1 - p), that of a normal number scaled up.
    assert abs(float(y.mean())) < 5 / x.numel() ** 0.5
    assert abs(float(y.var()) - 1) < 5 * (4 / (1 - p) / x.numel()) ** 0.5


@pytest.mark.parametrize("make", [fn.dropout2d, fn.drop_path])
def test_the_mean_is_kept(make):
    x = torch.ones(200, 20, 1, 1)
    total = torch.stack(
        [make(0.4).apply({}, x, key=fn.key(seed), train=True)[0].mean() for seed in range(20)]
    )
    assert abs(float(total.mean()) - 1) < 5 * (0.4 / 0.6 / 4000) ** 0.5


@pytest.mark.parametrize("relative", [False, True])
def test_gaussian_noise_has_the_standard_deviation_that_it_is_given(relative):
    x = torch.full((200, 200), 2.0, dtype=torch.float64)
    y, _ = fn.gaussian_noise(0.3, relative).apply({}, x, key=KEY, train=True)
    expected = 0.6 if relative else 0.3
    assert abs(float(y.mean()) - 2) < 5 * expected / 200
    assert abs(float(y.std()) - expected) < 5 * expected / 200 / 2**0.5
    assert abs(float(((y - 2) / expected).pow(4).mean()) - 3) < 5 * 96**0.5 / 200


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gaussian_noise_is_its_formula(relative, dtype):
    x = randn(4, 5, dtype=dtype)
    noise = 0.3 * fn.random.normal(KEY, (4, 5), dtype)
    layer = fn.gaussian_noise(0.3, relative)

    def function(params, x):
        return x * (1 + noise) if relative else x + noise

    check_against(function, layer, {}, x, key=KEY)
    check_against(lambda params, x: x + 0, layer, {}, x, train=False)


@pytest.mark.parametrize("name", LAYERS)
def test_in_evaluation_and_with_p_0_a_layer_is_the_identity_without_a_key(name):
    make, shape, _ = LAYERS[name]
    x = randn(*shape)
    check_against(lambda params, x: x + 0, make(0.5), {}, x, train=False)
    check_against(lambda params, x: x + 0, make(0.0), {}, x, train=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_in_the_dtype_of_its_input(name, dtype):
    make, shape, _ = LAYERS[name]
    layer, x = make(0.3), randn(*shape, dtype=dtype)
    kept = kept_by(layer, shape)
    scale, dropped, shift = constants(name, 0.3)

    def function(params, x):
        return torch.where(kept, x * scale, dropped) + shift

    check_against(function, layer, {}, x, key=KEY)


@pytest.mark.parametrize("rearrange", [transposed, strided])
@pytest.mark.parametrize("name", [name for name, (_, shape, _) in LAYERS.items() if shape])
def test_inputs_and_cotangents_need_not_be_contiguous(name, rearrange):
    make, shape, _ = LAYERS[name]
    layer, x = make(0.5), rearrange(randn(*shape))
    kept = kept_by(layer, shape)
    scale, dropped, shift = constants(name, 0.5)

    def function(params, x):
        return torch.where(kept, x * scale, dropped) + shift

    check_against(function, layer, {}, x, key=KEY, dy=rearrange(randn(*shape, seed=3)))


@pytest.mark.parametrize("name", LAYERS)
def test_noise_depends_on_the_key_alone(name):
    make, shape, _ = LAYERS[name]
    layer, x = make(0.5), torch.full(shape, 3.0)
    first = layer.apply({}, x, key=KEY, train=True)[0]
    state = torch.get_rng_state()
    assert torch.equal(layer.apply({}, x, key=KEY, train=True)[0], first)
    assert torch.equal(torch.get_rng_state(), state)
    others = [layer.apply({}, x, key=fn.key(seed), train=True)[0] for seed in range(30)]
    assert any(not torch.equal(other, first) for other in others)


@pytest.mark.parametrize("name", ["dropout2d", "feature_alpha_dropout", "drop_path"])
def test_members_of_a_population_have_the_noise_of_their_own_keys(name):
    make, shape, _ = LAYERS[name]
    layer, x = make(0.5), randn(*shape)
    keys = fn.random.split(KEY, 3)

    def run(key):
        y, pullback, _ = layer.vjp({}, x, key=key)
        return y, pullback(y)[1]

    together = fn.vmap(run)(keys)
    alone = [run(key) for key in keys]
    assert_near(together, tuple(torch.stack(each) for each in zip(*alone, strict=True)))


@pytest.mark.cpu_only
def test_compiled_noise_is_the_eager_one():
    xs = {name: randn(*shape) for name, (_, shape, _) in LAYERS.items()}
    layers = {name: make(0.4) for name, (make, _, _) in LAYERS.items()}
    layers["gaussian_noise"], xs["gaussian_noise"] = fn.gaussian_noise(0.2), randn(5)

    def run(key, xs):
        results = {}
        for name, layer in layers.items():
            y, pullback, _ = layer.vjp({}, xs[name], key=key)
            results[name] = y, pullback(y)[1]
        return results

    assert_near(fn.jit(run)(KEY, xs), run(KEY, xs))


NAMES = ["dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"]


@pytest.mark.parametrize("name", [*NAMES, "drop_path"])
@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_what_is_no_probability_is_refused(name, p):
    with pytest.raises(ValueError, match=rf"^{name}: p must be in \[0, 1\], got {p}$"):
        getattr(fn, name)(p)


@pytest.mark.parametrize("name", NAMES)
def test_half_is_dropped_by_default(name):
    _, shape, _ = LAYERS[name]
    layer = getattr(fn, name)
    assert torch.equal(kept_by(layer(), shape), kept_by(layer(0.5), shape))


def test_a_tenth_of_the_paths_is_dropped_by_default():
    assert torch.equal(kept_by(fn.drop_path(), (50, 2)), kept_by(fn.drop_path(0.1), (50, 2)))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("dropout1d", (4,), r"\(batch, channels, length\) or \(channels, length\)"),
        ("dropout1d", (2, 3, 4, 5), r"\(batch, channels, length\) or \(channels, length\)"),
        ("dropout2d", (3, 4), r"\(batch, channels, height, width\) or \(batch, channels, length\)"),
        ("dropout2d", (1, 2, 3, 4, 5), r"\(batch, channels, height, width\) or \(batch, chann"),
        ("dropout3d", (3, 4, 5), r"\(batch, channels, depth, height, width\) or \(channels, depth"),
        ("feature_alpha_dropout", (3,), r"\(batch, channels, \*\)"),
        ("drop_path", (), r"\(batch, \*\)"),
    ],
)
def test_an_input_of_another_number_of_dimensions_is_refused(name, shape, expected):
    layer, x = getattr(fn, name)(0.5), randn(*shape)
    with pytest.raises(ValueError, match=rf"^{name}: expects {expected}") as error:
        layer.init(KEY, x)
    assert str(error.value).endswith(f", got {shape}")
    for train in (True, False):
        with pytest.raises(ValueError, match=rf"^serial\['noise'\] {name}: expects {expected}"):
            fn.serial(noise=layer).apply({}, x, key=KEY, train=train)


@pytest.mark.parametrize("name", [*NAMES, "drop_path", "gaussian_noise"])
def test_integers_are_refused_and_so_is_training_without_a_key(name):
    shape = LAYERS[name][1] if name in LAYERS else (4,)
    layer = getattr(fn, name)()
    with pytest.raises(TypeError, match=rf"^{name}: expects a floating-point tensor, got int64"):
        layer.apply({}, torch.ones(shape, dtype=torch.int64), key=KEY, train=True)
    message = rf"^{name}: needs a key when train=True, got None; pass key=fn.key\(...\)$"
    with pytest.raises(ValueError, match=message):
        layer.vjp({}, randn(*shape))


def test_gaussian_noise_and_drop_path_refuse_other_options():
    with pytest.raises(ValueError, match=r"^gaussian_noise: std must be >= 0, got -0.1$"):
        fn.gaussian_noise(-0.1)
    with pytest.raises(ValueError, match=r"^drop_path: mode must be 'row' or 'batch', got 'all'$"):
        fn.drop_path(0.1, "all")
