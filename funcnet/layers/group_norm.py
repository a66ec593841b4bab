"""Normalization of each example by groups of its channels."""

import math
from typing import Any

import torch
from torch import Tensor

from funcnet.core import Forward, Key, Layer, Params, Pullback
from funcnet.errors import require
from funcnet.layers.norm import (
    affine_names,
    channel_params,
    check_eps,
    norm_backward,
    norm_rule,
    norm_statistics,
    with_affine,
)
from funcnet.lift import fastest, require_floating, stateful, with_kernel
from funcnet.params import Param, declare

aten = torch.ops.aten


def group_sizes(x: Tensor, num_groups: int) -> tuple[int, int, int, int]:
    """The sizes of examples, groups, channels of a group, and values of a channel."""
    examples, channels, *rest = x.shape
    return examples, num_groups, channels // num_groups, math.prod(rest)


def _group_norm_kernel(
    dy: Tensor, num_groups: int, wanted: Any, *, x: Any, mean: Any, rstd: Any, weight: Any = None
) -> Any:
    examples, _, group, values = group_sizes(x, num_groups)
    sizes = (examples, num_groups * group, values, num_groups)
    # The kernel reads dy as if it were contiguous.
    dy = dy.contiguous()
    return aten.native_group_norm_backward(dy, x, mean, rstd, weight, *sizes, wanted)


@with_kernel(_group_norm_kernel)
def group_norm_backward(
    dy: Tensor, num_groups: int, wanted: Any, *, x: Any, mean: Any, rstd: Any, weight: Any = None
) -> Any:
    """`norm_backward` by group."""
    sizes = group_sizes(x, num_groups)
    if weight is not None:
        weight = weight.reshape(*sizes[1:3], 1)
    mean, rstd = (leaf.reshape(*sizes[:2], 1, 1) for leaf in (mean, rstd))
    return norm_backward(dy.reshape(sizes), x.reshape(sizes), weight, mean, rstd, [2, 3], wanted)


def group_norm(
    num_groups: int,
    eps: float = 1e-5,
    affine: bool = True,
    *,
    bias: bool = True,
    dtype: torch.dtype | None = None,
) -> Layer:
    """``y = (x - mean) / sqrt(var + eps) weight + bias`` by groups of channels of each example.

    Args:
        num_groups: into how many groups the channels, dimension 1 of x, are divided.
        eps: added to the (biased) variance.
        affine: whether a weight and a bias are learned for each channel.
        bias: False for a weight without a bias.
        dtype: of the parameters; default that of x.

    The number of channels is found by init; there is no argument for it.

    Inputs:
        x of shape ``(batch, channels, *)``, floating, any rank from 2.
    Learned params:
        ``weight`` (ones) and ``bias`` (zeros), each (channels,).
    VJP:
        with ``n`` the normalized x, ``g = dy weight`` and means over a group,
        ``dx = (g - mean g - n mean(g n)) / sqrt(var + eps)``; ``dweight = sum dy n``,
        ``dbias = sum dy``.
    Raises:
        ValueError: channels that ``num_groups`` does not divide, and one example with one value
            a group.

    Source: ``torch.nn.GroupNorm``; Wu and He 2018.

    >>> import funcnet as fn
    >>> layer = fn.group_norm(2)
    >>> x = torch.tensor([[1.0, 3.0, 4.0, 4.0]])
    >>> params, _ = layer.init(fn.key(0), x)
    >>> layer.apply(params, x)[0]
    tensor([[-1.0000,  1.0000,  0.0000,  0.0000]])
    """
    enough = isinstance(num_groups, int) and num_groups > 0
    require(enough, f"group_norm: num_groups must be an integer > 0, got {num_groups!r}")
    check_eps("group_norm", eps)
    names = affine_names(affine, bias)

    @declare
    def init(x: Tensor) -> dict[str, Param]:
        require_floating(x)
        require(x.dim() >= 2, f"expects (batch, channels, *), got {tuple(x.shape)}")
        divides = x.shape[1] % num_groups == 0
        expected = f"expects channels that {num_groups} groups divide, in dimension 1"
        require(divides, f"{expected}, got {tuple(x.shape)}")
        return channel_params(x, 1, names, dtype)

    def forward(params: Params, x: Tensor, state: Params, key: Key, train: bool) -> Forward:
        what = "group_norm: needs more than one value per group"
        require(x.numel() != num_groups, f"{what}, got {tuple(x.shape)}")
        sizes = examples, _, group, values = group_sizes(x, num_groups)
        x = x.contiguous()
        weight, bias = params.get("weight"), params.get("bias")
        y, mean, rstd = with_affine(
            lambda weight, bias: torch.native_group_norm(
                x, weight, bias, examples, num_groups * group, values, num_groups, eps
            ),
            *(weight, bias, lambda leaf: leaf.reshape(-1, *[1] * (x.dim() - 2))),
        )
        mean, rstd = fastest(norm_statistics, x)(x.reshape(sizes), mean, rstd, [2, 3], eps)
        residuals = {"x": x, "mean": mean, "rstd": rstd}
        if weight is not None:
            residuals["weight"] = weight
        rule = (group_norm_backward, (num_groups,), names)
        return y, Pullback(norm_rule, residuals, rule), state

    return stateful(init, forward)
