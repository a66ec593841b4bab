import pytest
import torch
from hypothesis import given, settings, strategies as st
from layers.oracle import (
    assert_near,
    check_against,
    check_module,
    cotangent,
    randn,
    strided,
    transposed,
)
from torch import nn
from torch.nn import functional as F

import funcnet as fn


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(4,), (7, 4), (2, 3, 4), (2, 1, 3, 4), (0, 4), (2, 0, 4), (1, 4)]
)
def test_linear_is_torchs_at_any_number_of_leading_dimensions(shape, bias):
    check_module(fn.linear(3, bias), nn.Linear(4, 3, bias), randn(*shape))


# nn.Linear warns of zero-element weights, so the formula is the oracle.
@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4), (4,), (5, 0), (2, 3, 0), (0,)])
@pytest.mark.parametrize("out_features", [0, 3])
def test_linear_may_have_no_features(shape, out_features):
    x = randn(*shape)
    layer = fn.linear(out_features)
    params, _ = layer.init(fn.key(0), x)
    assert params["weight"].shape == (out_features, shape[-1])
    check_against(lambda params, x: x @ params["weight"].T + params["bias"], layer, params, x)


@pytest.mark.parametrize("rearrange", [transposed, strided])
def test_linear_takes_inputs_and_cotangents_that_are_not_contiguous(rearrange):
    x = rearrange(randn(5, 6, 4))
    assert not x.is_contiguous()
    check_module(fn.linear(3), nn.Linear(4, 3), x, dy=rearrange(randn(5, 6, 3, seed=3)))


def test_linear_takes_an_expanded_cotangent():
    dy = torch.ones((), dtype=torch.float64).expand(5, 6, 3)
    check_module(fn.linear(3), nn.Linear(4, 3), randn(5, 6, 4), dy=dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_computes_in_the_dtype_of_its_input(dtype):
    check_module(fn.linear(3), nn.Linear(4, 3), randn(8, 4, dtype=dtype))


@given(st.lists(st.integers(0, 3), max_size=4), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_linear_keeps_leading_dimensions(leading, in_features, out_features):
    x = randn(*leading, in_features)
    layer = fn.linear(out_features)
    params, _ = layer.init(fn.key(0), x)
    y, pullback, _ = layer.vjp(params, x)
    assert y.shape == (*leading, out_features)
    dparams, dx = pullback(torch.ones_like(y))
    assert dx.shape == x.shape
    rows = y.numel() // out_features
    assert_near(dparams["bias"], torch.full((out_features,), float(rows), dtype=torch.float64))


def test_linear_uses_the_initializers_and_dtype_it_is_given():
    layer = fn.linear(
        2,
        weight_init=fn.initializers.constant(3.0),
        bias_init=fn.initializers.constant(4.0),
        dtype=torch.float64,
    )
    params, _ = layer.init(fn.key(0), torch.ones(1, 3))
    assert torch.equal(params["weight"], torch.full((2, 3), 3.0, dtype=torch.float64))
    assert torch.equal(params["bias"], torch.full((2,), 4.0, dtype=torch.float64))


@pytest.mark.parametrize("in_features", [3, 400])
def test_linear_starts_within_torchs_bound(in_features):
    params, _ = fn.linear(200).init(fn.key(0), torch.ones(1, in_features))
    bound = in_features**-0.5
    for leaf in params.values():
        assert leaf.abs().max() <= bound
        assert leaf.abs().max() > 0.97 * bound
        assert leaf.min() < 0 < leaf.max()
    assert not torch.equal(params["weight"][:, 0], params["bias"])


DOUBLE = {"weight": randn(3, 4), "bias": randn(3)}

MISUSES = {
    "features": (
        DOUBLE, randn(2, 5), ValueError,
        "linear: weight expects 4 features in the last dimension, got (2, 5)",
    ),
    "a scalar": (
        DOUBLE, randn(), ValueError,
        "linear: expects at least one dimension, got ()",
    ),
    "another dtype": (
        DOUBLE, randn(2, 4, dtype=torch.float32), TypeError,
        "linear: weight is torch.float64, x is torch.float32",
    ),
    "integers": (
        DOUBLE, torch.ones(2, 4, dtype=torch.int64), TypeError,
        "linear: expects a floating-point tensor, got int64 (2, 4)",
    ),
    "complex numbers": (
        DOUBLE, torch.ones(2, 4, dtype=torch.complex64), TypeError,
        "linear: expects a floating-point tensor, got complex64 (2, 4)",
    ),
    "a tuple": (
        DOUBLE, (randn(2, 4),), TypeError,
        "linear: expects a floating-point tensor, got (float64 (2, 4))",
    ),
    "no bias": (
        {"weight": randn(3, 4)}, randn(2, 4), ValueError,
        "linear: expects params ['bias', 'weight'], got ['weight']",
    ),
    "no params": ({}, randn(2, 4), ValueError,
        "linear: expects params ['bias', 'weight'], got []",
    ),
    "one param too many": (
        {**DOUBLE, "scale": randn(3)}, randn(2, 4), ValueError,
        "linear: expects params ['bias', 'weight'], got ['bias', 'scale', 'weight']",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", ["apply", "vjp"])
@pytest.mark.parametrize("misuse", MISUSES)
def test_linear_refuses(misuse, call):
    params, x, kind, message = MISUSES[misuse]
    with pytest.raises(kind) as raised:
        getattr(fn.linear(3), call)(params, x)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    "wrong",
    [
        {"bias": randn(1)},
        {"bias": randn(4)},
        {"bias": randn(3, dtype=torch.float32)},
        {"weight": randn(4)},
        {"weight": randn(2, 3, 4)},
    ],
    ids=["bias of one", "bias of four", "bias of another dtype", "flat weight", "3-d weight"],
)
def test_linear_refuses_params_of_another_shape_or_dtype(wrong):
    with pytest.raises((ValueError, TypeError), match=r"^linear: "):
        fn.linear(3).apply({**DOUBLE, **wrong}, randn(2, 4))


@pytest.mark.parametrize(
    ("x", "dy"),
    [
        ((5, 4), (1, 3)),
        ((5, 4), (3,)),
        ((5, 4), (5, 4)),
        ((4,), (1, 3)),
        ((2, 3, 4), (6, 3)),
        ((2, 3, 4), (3, 2, 3)),
        ((2, 3, 4), (2, 1, 3)),
    ],
)
@pytest.mark.parametrize("half", [{}, {"params": False}, {"x": False}])
def test_linear_refuses_a_cotangent_of_another_shape_than_y(x, dy, half):
    _, pullback, _ = fn.linear(3).vjp(DOUBLE, randn(*x))
    message = rf"^linear: pullback expects dy of shape \({', '.join(map(str, (*x[:-1], 3)))},?\)"
    with pytest.raises(ValueError, match=message):
        pullback(randn(*dy), **half)


def test_linear_refuses_a_negative_size_and_a_scalar_example():
    with pytest.raises(ValueError, match=r"^linear: out_features must be >= 0, got -1$"):
        fn.linear(-1)
    with pytest.raises(ValueError, match=r"^linear: expects at least one dimension, got \(\)$"):
        fn.linear(1).init(fn.key(0), torch.ones(()))
    with pytest.raises(TypeError, match=r"^linear: expects a floating-point tensor, got int64"):
        fn.linear(1).init(fn.key(0), torch.ones(3, dtype=torch.int64))


def test_linear_pullback_is_the_plain_formula():
    x, params = randn(5, 4), DOUBLE
    y, pullback, _ = fn.linear(3).vjp(params, x)
    dy = cotangent(y)
    dparams, dx = pullback(dy)
    assert_near(y, F.linear(x, params["weight"], params["bias"]))
    assert_near(dx, dy @ params["weight"])
    assert_near(dparams, {"weight": dy.T @ x, "bias": dy.sum(0)})


def test_linear_called_as_torchs_is_refused():
    with pytest.raises(TypeError, match=r"^linear: bias must be True or False, got 25; the size"):
        fn.linear(2, 25)
