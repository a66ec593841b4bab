"""Small convolutions in maps are products of matrices, and give what the convolutions give."""

import pytest
import torch
from torch.testing import assert_close

import funcnet as fn

MEMBERS = 3


def population(layer, x):
    params = fn.vmap(lambda key: layer.init(key, x[0])[0])(fn.random.split(fn.key(0), MEMBERS))

    def forward_and_backward(params, x):
        y, pullback, _ = layer.vjp(params, x)
        return y, pullback(y.sin())

    return fn.vmap(forward_and_backward), params


PRODUCTS = {
    "plain": (fn.conv2d(8, 3), (4, 3, 8, 8)),
    "oblong, padded": (fn.conv2d(5, (2, 3), 1, (1, 2)), (4, 3, 8, 7)),
    "points": (fn.conv2d(5, 1, bias=False), (4, 3, 8, 8)),
    "same": (fn.conv2d(4, 3, padding="same"), (2, 1, 5, 5)),
}
CONVOLUTIONS = {
    "dx of a stride": (fn.conv2d(8, 3, 2, 1), (4, 3, 9, 8)),
    "dilated": (fn.conv2d(4, 3, 1, 1, 2), (2, 4, 8, 8)),
    "in groups": (fn.conv2d(4, 3, 1, 1, 1, 2), (2, 4, 8, 8)),
    "large": (fn.conv2d(4, 3), (32, 16, 34, 34)),
}


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_small_convolution_in_a_map_is_a_product(name, dtype):
    layer, shape = PRODUCTS[name]
    x = fn.random.normal(fn.key(1), (MEMBERS, *shape), dtype)
    step, params = population(layer, x)
    compiled = fn.jit(step)
    assert "aten::convolution" not in compiled.lower(params, x).blocks
    within = 1e-4 if dtype == torch.float32 else 1e-10
    for got, expected in zip(
        fn.tree.leaves(compiled(params, x)), fn.tree.leaves(step(params, x)), strict=True
    ):
        assert_close(got, expected, rtol=within, atol=within)


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_another_convolution_is_called(name):
    layer, shape = CONVOLUTIONS[name]
    x = torch.ones(MEMBERS, *shape)
    step, params = population(layer, x)
    assert "aten::convolution_backward" in fn.jit(step).lower(params, x).blocks


@pytest.mark.cpu_only
def test_out_of_a_map_a_small_convolution_is_called():
    layer, x = fn.conv2d(8, 3), torch.ones(4, 3, 8, 8)
    params, _ = layer.init(fn.key(0), x)
    lowered = fn.jit(lambda params, x: layer.apply(params, x)[0]).lower(params, x)
    assert "aten::convolution" in lowered.blocks
