from functools import reduce

import pytest
import torch
from layers.oracle import assert_near, check_against, randn, transposed

import funcnet as fn


def tensors(n, *shape, dtype=torch.float64):
    return tuple(randn(*shape, seed=seed, dtype=dtype) for seed in range(n))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_fan_out_gives_copies_and_sums_their_cotangents(n):
    check_against(lambda params, x: (x,) * n, fn.fan_out(n), {}, randn(3, 4))


def test_fan_out_sums_cotangents_of_trees_leaf_by_leaf():
    x = {"a": randn(2), "b": (randn(3), randn(1))}
    check_against(lambda params, x: (x, x, x), fn.fan_out(3), {}, x)


def test_fan_out_of_an_integer_gives_it_no_cotangent():
    x = (randn(2), torch.arange(3))
    (first, second), pullback, _ = fn.fan_out(2).vjp({}, x)
    assert first is second is x
    dy = randn(2, seed=3), randn(2, seed=4)
    assert_near(pullback(((dy[0], None), (dy[1], None))), ({}, (dy[0] + dy[1], None)))
    _, pullback, _ = fn.fan_out(2).vjp({}, torch.arange(3))
    assert pullback((None, None)) == ({}, None)


@pytest.mark.parametrize("join", ["add", "multiply"])
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("shape", [(3, 4), (), (0, 2)])
def test_join_is_the_sum_or_product(join, n, shape):
    function = {"add": torch.add, "multiply": torch.mul}[join]
    layer = getattr(fn, join)()
    check_against(lambda params, x: reduce(function, x), layer, {}, tensors(n, *shape))
    check_against(
        lambda params, x: reduce(function, x),
        layer, {}, tuple(transposed(x) for x in tensors(n, *shape)),
    )  # fmt: skip


@pytest.mark.parametrize("join", ["add", "multiply"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_join_computes_in_the_dtype_of_its_inputs(join, dtype):
    function = {"add": torch.add, "multiply": torch.mul}[join]
    layer, x = getattr(fn, join)(), tensors(3, 4, 2, dtype=dtype)
    check_against(lambda params, x: reduce(function, x), layer, {}, x)


@pytest.mark.parametrize("zeros", [1, 2])
def test_multiply_has_the_right_gradient_where_factors_are_zero(zeros):
    x = tuple(torch.zeros(3, dtype=torch.float64) for _ in range(zeros)) + tensors(2, 3)
    check_against(lambda params, x: reduce(torch.mul, x), fn.multiply(), {}, x)


def test_multiply_of_one_tensor_twice_has_the_gradient_of_its_square():
    net = fn.serial(fn.fan_out(2), fn.multiply())
    check_against(lambda params, x: x.square(), net, {}, randn(5))


@pytest.mark.parametrize("join", ["add", "multiply"])
@pytest.mark.parametrize(
    ("x", "got"),
    [
        ((randn(2), randn(3)), "(float64 (2,), float64 (3,))"),
        ((randn(2), randn(1)), "(float64 (2,), float64 (1,))"),
        ((randn(2), torch.ones(2)), "(float64 (2,), float32 (2,))"),
        ((), "()"),
        (randn(2, 2), "float64 (2, 2)"),
        ([randn(2), randn(2)], "list"),
        ({"a": randn(2)}, "{'a': float64 (2,)}"),
    ],
)
def test_join_refuses_what_does_not_match(join, x, got):
    layer = getattr(fn, join)()
    message = f"{join}: expects a tuple of tensors of one shape and dtype, got {got}"
    for call in (layer.apply, layer.vjp):
        with pytest.raises(ValueError) as raised:  # noqa: PT011 - the whole message is compared
            call({}, x)
        assert str(raised.value) == message


@pytest.mark.parametrize("join", ["add", "multiply"])
@pytest.mark.parametrize("dy", [(3,), (1, 3), (2, 1), (2, 4), ()])
def test_join_refuses_a_cotangent_that_would_broadcast(join, dy):
    _, pullback, _ = getattr(fn, join)().vjp({}, tensors(2, 2, 3))
    with pytest.raises(ValueError, match=rf"^{join}: pullback expects dy of shape \(2, 3\), got "):
        pullback(randn(*dy))


@pytest.mark.parametrize("dy", [(randn(2),), (randn(2),) * 3, randn(2)])
def test_fan_out_refuses_another_number_of_cotangents(dy):
    _, pullback, _ = fn.fan_out(2).vjp({}, randn(2))
    with pytest.raises(ValueError, match=r"^fan_out: pullback expects a tuple of 2, got "):
        pullback(dy)


def test_fan_out_refuses_cotangents_that_would_broadcast():
    _, pullback, _ = fn.fan_out(2).vjp({}, randn(2, 3))
    for dy in ((randn(2, 3), randn(3)), (randn(3), randn(3))):
        with pytest.raises(ValueError, match=r"^fan_out: pullback expects dy of shape"):
            pullback(dy)


def test_fan_out_refuses_no_copies():
    with pytest.raises(ValueError, match=r"^fan_out: n must be at least 1, got 0$"):
        fn.fan_out(0)


@pytest.mark.parametrize(
    ("layer", "x"),
    [(fn.fan_out(2), randn(2)), (fn.add(), tensors(2, 2)), (fn.multiply(), tensors(2, 2))],
)
def test_tuple_layer_refuses_params(layer, x):
    with pytest.raises(ValueError, match=rf"^{layer.name}: expects params \[\], got \['w'\]$"):
        layer.apply({"w": randn(1)}, x)
