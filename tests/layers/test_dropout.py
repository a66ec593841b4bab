import pytest
import torch
from layers.oracle import assert_near, check_against, cotangent, randn, strided, transposed
from torch import nn

import funcnet as fn

KEY = fn.key(7)


def kept_by(layer, x, key=KEY):
    """Which values of x the layer keeps: those of ones that are not 0."""
    return layer.apply({}, torch.ones_like(x), key=key, train=True)[0] != 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(4, 5), (3,), (), (0, 4), (2, 3, 4, 5)])
def test_dropout_scales_what_it_keeps_and_has_that_gradient(p, shape):
    layer, x = fn.dropout(p), randn(*shape)
    kept = kept_by(layer, x)
    scale = 1 / (1 - p) if p < 1 else 0.0
    check_against(lambda params, x: x * kept * scale, layer, {}, x, key=KEY)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.25, 0.5, 0.9])
def test_dropout_drops_a_fraction_p_and_keeps_the_mean(p):
    n = 40_000
    y, _ = fn.dropout(p).apply({}, torch.ones(n), key=KEY, train=True)
    dropped = float((y == 0).double().mean())
    deviation = (p * (1 - p) / n) ** 0.5
    assert abs(dropped - p) <= 4 * deviation
    assert set(y.unique().tolist()) <= {0.0, float(torch.tensor(1 / (1 - p)))}
    assert abs(float(y.mean()) - 1) <= 4 * deviation / (1 - p)


def test_dropout_drops_neighbours_independently():
    kept = kept_by(fn.dropout(0.5), torch.ones(200, 200)).double() - 0.5
    for dim in (0, 1):
        product = (kept * kept.roll(1, dim)).mean() * 4
        assert abs(float(product)) < 4 / 200


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_is_torchs_identity_in_eval_and_needs_no_key(p):
    module = nn.Dropout(p).eval()
    for key in (None, KEY):
        layer, x = fn.dropout(p), randn(4, 5)
        check_against(lambda params, x: module(x), layer, {}, x, train=False, key=key)


def test_dropout_of_probability_one_is_torchs():
    x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    check_against(lambda params, x: nn.Dropout(1.0)(x), fn.dropout(1.0), {}, x, key=KEY)


@pytest.mark.parametrize("key", [None, KEY])
def test_dropout_of_probability_zero_is_the_identity_without_a_key_too(key):
    x = randn(4, 5)
    check_against(lambda params, x: x, fn.dropout(0.0), {}, x, train=True, key=key)


def test_dropout_drops_half_by_default():
    assert_near(kept_by(fn.dropout(), randn(50)), kept_by(fn.dropout(0.5), randn(50)))


def test_dropout_noise_depends_on_the_key_alone():
    x = randn(100)
    layer = fn.dropout(0.5)
    assert torch.equal(kept_by(layer, x), kept_by(fn.dropout(0.5), -x))
    assert torch.equal(kept_by(layer, x), kept_by(layer, x.float()))
    assert not torch.equal(kept_by(layer, x), kept_by(layer, x, fn.key(8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_computes_in_the_dtype_of_its_input(dtype):
    layer, x = fn.dropout(0.3), randn(6, 7, dtype=dtype)
    kept = kept_by(layer, x)
    check_against(lambda params, x: torch.where(kept, x / 0.7, 0.0), layer, {}, x, key=KEY)


@pytest.mark.parametrize("rearrange", [transposed, strided])
def test_dropout_takes_inputs_and_cotangents_that_are_not_contiguous(rearrange):
    layer, x, dy = fn.dropout(0.5), rearrange(randn(5, 6)), rearrange(randn(5, 6, seed=3))
    kept = kept_by(layer, x.contiguous())
    check_against(lambda params, x: 2 * x * kept, layer, {}, x, key=KEY, dy=dy)


def test_dropout_lets_nothing_of_a_dropped_nan_or_infinity_through():
    layer = fn.dropout(0.5)
    x = torch.full((40,), float("inf"))
    x[::2] = float("nan")
    y, pullback, _ = layer.vjp({}, x, key=KEY)
    kept = kept_by(layer, x)
    assert torch.equal(y[~kept], torch.zeros(int((~kept).sum())))
    _, dx = pullback(torch.full_like(x, float("nan")))
    assert torch.equal(dx[~kept], torch.zeros(int((~kept).sum())))


@pytest.mark.parametrize("dy", [(5,), (1, 5), (4, 1), ()])
def test_dropout_refuses_a_cotangent_of_another_shape_than_y(dy):
    _, pullback, _ = fn.dropout(0.5).vjp({}, randn(4, 5), key=KEY)
    with pytest.raises(ValueError, match=r"^dropout: pullback expects dy of shape \(4, 5\), got "):
        pullback(randn(*dy))


def test_dropout_refuses_to_train_without_a_key():
    message = r"^dropout: needs a key when train=True, got None; pass key=fn.key\(...\)$"
    with pytest.raises(ValueError, match=message):
        fn.dropout(0.5).apply({}, randn(3), train=True)
    with pytest.raises(ValueError, match=message):
        fn.dropout(0.5).vjp({}, randn(3))


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_dropout_refuses_what_is_no_probability(p):
    with pytest.raises(ValueError, match=rf"^dropout: p must be in \[0, 1\], got {p}$"):
        fn.dropout(p)


@pytest.mark.parametrize("train", [True, False])
def test_dropout_refuses_integers_params_and_state(train):
    layer, x = fn.dropout(0.5), randn(4)
    with pytest.raises(
        TypeError, match=r"^dropout: expects a floating-point tensor, got int64 \(3,"
    ):
        layer.apply({}, torch.ones(3, dtype=torch.int64), key=KEY, train=train)
    with pytest.raises(ValueError, match=r"^dropout: expects params \[\], got \['w'\]$"):
        layer.apply({"w": x}, x, key=KEY, train=train)
    with pytest.raises(ValueError, match=r"^dropout: has no state, got state with \['s'\]$"):
        layer.vjp({}, x, {"s": x}, key=KEY, train=train)
    with pytest.raises(TypeError, match=r"^dropout: expects a floating-point tensor, got int64"):
        layer.init(KEY, torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize("key", [torch.zeros(3, dtype=torch.int64), torch.zeros(2), 7])
def test_dropout_refuses_what_is_no_key(key):
    with pytest.raises(TypeError, match=r"expect(s|ed) a key, (such as|an int64 tensor of shape)"):
        fn.dropout(0.5).apply({}, randn(4), key=key, train=True)


def test_dropout_adjoint_identity():
    x, u = randn(30), randn(30, seed=9)
    layer = fn.dropout(0.4)
    y, pullback, _ = layer.vjp({}, x, key=KEY)
    dy = cotangent(y)
    forward = layer.apply({}, u, key=KEY, train=True)[0]
    assert_near((forward * dy).sum(), (u * pullback(dy)[1]).sum())
