import pytest
import torch
from layers.oracle import (
    assert_near,
    check_against,
    check_module,
    params_of,
    randn,
    randomize,
    strided,
    transposed,
)
from torch import nn

import funcnet as fn

GROUPS = {
    "two": ((2,), {}),
    "layer": ((1,), {}),
    "instance": ((6,), {}),
    "eps": ((3, 0.3), {}),
    "not affine": ((2, 1e-5, False), {}),
    "no bias": ((2,), {"bias": False}),
    "keywords": ((), {"num_groups": 3, "eps": 0.1, "affine": True}),
}


def group_norms(name, channels):
    arguments, options = GROUPS[name]
    if arguments:
        module = nn.GroupNorm(arguments[0], channels, *arguments[1:], **options)
    else:
        module = nn.GroupNorm(num_channels=channels, **options)
    return fn.group_norm(*arguments, **options), module


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 6), (3, 6, 5), (2, 6, 3, 4), (2, 6, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_group_norm_is_torchs(name, shape, dtype, train):
    check_module(*group_norms(name, 6), 2 * randn(*shape, dtype=dtype) + 1, train=train)


@pytest.mark.parametrize(
    "rearrange",
    [
        transposed,
        strided,
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x[:, :, :1].expand(x.shape),
    ],
    ids=["transposed", "strided", "channels_last", "expanded"],
)
@pytest.mark.parametrize("name", ["two", "not affine"])
def test_group_norm_takes_inputs_and_cotangents_that_are_not_contiguous(name, rearrange):
    x, dy = rearrange(randn(2, 6, 3, 4)), rearrange(randn(2, 6, 3, 4, seed=2))
    check_module(*group_norms(name, 6), x, dy=dy)
    check_module(*group_norms(name, 6), x.contiguous(), dy=dy)


def test_group_norm_takes_float32_params_for_bfloat16_inputs_as_torch_does():
    module = randomize(nn.GroupNorm(2, 6))
    check_against(
        lambda params, x: torch.func.functional_call(module, params, (x,)),
        fn.group_norm(2, dtype=torch.float32), params_of(module),
        randn(4, 6, 5, dtype=torch.bfloat16), tolerance=3e-2,
    )  # fmt: skip


def test_group_norm_is_its_formula():
    def formula(params, x):
        groups = x.reshape(3, 2, 3, 5)
        centred = groups - groups.mean((2, 3), keepdim=True)
        n = centred / (centred.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
        return n.reshape(x.shape) * params["weight"][:, None] + params["bias"][:, None]

    params = params_of(randomize(nn.GroupNorm(2, 6).double()))
    check_against(formula, fn.group_norm(2), params, randn(3, 6, 5))


@pytest.mark.parametrize("shape", [(0, 6), (0, 6, 3), (2, 6, 0)])
def test_group_norm_of_no_values_is_empty_and_its_params_have_no_gradient(shape):
    layer, x = fn.group_norm(2), randn(*shape)
    params, _ = layer.init(fn.key(0), x)
    y, pullback, _ = layer.vjp(params, x)
    nothing = torch.zeros(6, dtype=torch.float64)
    assert_near((y, pullback(x)), (x, ({"weight": nothing, "bias": nothing}, x)))


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (fn.group_norm(4), randn(2, 6, 5),
         "group_norm: expects channels that 4 groups divide, in dimension 1, got (2, 6, 5)"),
        (fn.group_norm(2), randn(6), "group_norm: expects (batch, channels, *), got (6,)"),
        (fn.group_norm(6), randn(1, 6),
         "group_norm: needs more than one value per group, got (1, 6)"),
        (fn.group_norm(2), randn(2, 4, 5),
         "group_norm: weight expects 6 channels in dimension 1, got (2, 4, 5)"),
    ],
)  # fmt: skip
def test_group_norm_refuses(layer, x, message):
    params, _ = fn.group_norm(2).init(fn.key(0), randn(2, 6))
    for call in (layer.apply, layer.vjp):
        with pytest.raises(ValueError) as raised:  # noqa: PT011 - the whole message is compared
            call(params, x)
        assert str(raised.value) == message


def test_group_norm_takes_one_value_a_group_of_several_examples_as_torch_does():
    check_module(fn.group_norm(6), nn.GroupNorm(6, 6), randn(2, 6))


@pytest.mark.parametrize("groups", [0, -1, 2.0])
def test_group_norm_refuses_a_number_of_groups_that_is_none(groups):
    with pytest.raises(ValueError, match=r"^group_norm: num_groups must be an integer > 0, got"):
        fn.group_norm(groups)


def test_group_norm_refuses_integers():
    with pytest.raises(TypeError, match=r"^group_norm: expects a floating-point tensor, got int64"):
        fn.group_norm(2).init(fn.key(0), torch.ones(2, 6, dtype=torch.int64))
