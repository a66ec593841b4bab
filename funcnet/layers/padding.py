"""Padding: values around the spatial dimensions of x, made of x or constant."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import tree
from funcnet.core import Layer
from funcnet.errors import require
from funcnet.layers.spatial import NAMES, Size, spatial
from funcnet.lift import Step, parameterless

Padding = tuple[int, ...]
"""As of ``F.pad``: before and after, for the last dimension first."""


def pad(x: Tensor, padding: Padding, mode: str, value: float = 0.0) -> Tensor:
    """``F.pad``; a negative padding crops."""
    return F.pad(x, padding, mode, value if mode == "constant" else None)


def pad_backward(dy: Any, padding: Padding, mode: str) -> Any:
    """The pullback of `pad`: what came from x's edges goes back to them."""
    if dy is None:  # of integers
        return None
    if mode == "constant":
        return torch.constant_pad_nd(dy, [-each for each in padding])
    cropped = [max(-each, 0) for each in padding]
    crops_first = mode == "circular"  # so that what is cropped is not seen at the other end
    if not crops_first:
        dy = torch.constant_pad_nd(dy, cropped) if any(cropped) else dy
    for i in range(len(padding) // 2):
        before, after = [max(each, 0) for each in padding[2 * i : 2 * i + 2]]
        dy = _fold_edges(dy, -1 - i, before, after, mode)
    return torch.constant_pad_nd(dy, cropped) if crops_first and any(cropped) else dy


def _fold_edges(dy: Tensor, dim: int, before: int, after: int, mode: str) -> Tensor:
    """The cotangent of one dimension before its padding."""
    size = dy.shape[dim] - before - after
    first, inner, last = dy.split([before, size, after], dim)
    if mode == "reflect":  # the edge itself is not repeated
        parts = [(first.flip(dim), 1), (last.flip(dim), size - 1 - after)]
    elif mode == "replicate":
        parts = [(first.sum(dim, keepdim=True), 0), (last.sum(dim, keepdim=True), size - 1)]
    else:  # circular
        parts = [(first, size - before), (last, 0)]
    for part, start in parts:
        if part.shape[dim]:
            blank = [0, 0] * (-1 - dim) + [start, size - start - part.shape[dim]]
            inner = inner + torch.constant_pad_nd(part, blank)
    return inner


def _padded(name: str, dims: int, padding: Size, mode: str, value: float = 0.0) -> Layer:
    """The layer of `pad` over the last ``dims`` dimensions."""
    each = (padding,) * (2 * dims) if isinstance(padding, int) else tuple(padding)
    fits = len(each) == 2 * dims
    require(fits, f"{name}: padding must be one int or {2 * dims} ints, got {padding}")

    def declaration(x: Any) -> dict[str, Any]:
        got = tree.describe(x)
        require(isinstance(x, Tensor), f"expects a tensor, got {got}", TypeError)
        ranks = (dims + 1, dims + 2)
        fits = mode == "constant" or x.dim() in ranks
        require(fits, f"expects (batch, channels, {NAMES[dims]}), got {tuple(x.shape)}")
        return {}

    def forward(x: Tensor) -> Step:
        return pad(x, each, mode, value), {}, (each, mode)

    return parameterless(forward, pad_backward, declaration=declaration, name=name)


def _reflection_pad(dims: int, padding: Size) -> Layer:
    """Pads with the values of x that mirror at its edges: c b [a b c] b a.

    Args:
        padding: one int for all sides, or 2 for each dimension, before and after it, from the
            last dimension to the first; less than the size of x. A negative one crops.

    Inputs:
        x of shape (batch, channels, height, width) or without a batch.
    VJP:
        dy at a mirrored value is added to that of the value.

    Source: ``torch.nn.ReflectionPad2d``.

    >>> fn.reflection_pad2d((2, 0, 0, 0)).apply({}, torch.arange(3.0).expand(1, 1, 3))[0]
    tensor([[[2., 1., 0., 1., 2.]]])
    """
    return _padded(f"reflection_pad{dims}d", dims, padding, "reflect")


def _replication_pad(dims: int, padding: Size) -> Layer:
    """Pads with the values at the edges of x: a a [a b c] c c.

    Args:
        padding: one int for all sides, or 2 for each dimension, before and after it, from the
            last dimension to the first. A negative one crops.

    Inputs:
        x of shape (batch, channels, height, width) or without a batch.
    VJP:
        dy at a repeated value is added to that of the edge.

    Source: ``torch.nn.ReplicationPad2d``.

    >>> fn.replication_pad2d((2, 0, 0, 0)).apply({}, torch.arange(3.0).expand(1, 1, 3))[0]
    tensor([[[0., 0., 0., 1., 2.]]])
    """
    return _padded(f"replication_pad{dims}d", dims, padding, "replicate")


def _circular_pad(dims: int, padding: Size) -> Layer:
    """Pads with the values from the other end of x: b c [a b c] a b.

    Args:
        padding: one int for all sides, or 2 for each dimension, before and after it, from the
            last dimension to the first; at most the size of x. A negative one crops.

    Inputs:
        x of shape (batch, channels, height, width) or without a batch.
    VJP:
        dy at a repeated value is added to that of the value.

    Source: ``torch.nn.CircularPad2d``.

    >>> fn.circular_pad2d((2, 0, 0, 0)).apply({}, torch.arange(3.0).expand(1, 1, 3))[0]
    tensor([[[1., 2., 0., 1., 2.]]])
    """
    return _padded(f"circular_pad{dims}d", dims, padding, "circular")


def _constant_pad(dims: int, padding: Size, value: float) -> Layer:
    """Pads with a value.

    Args:
        padding: one int for all sides, or 2 for each dimension, before and after it, from the
            last dimension to the first. A negative one crops.
        value: what is put there.

    Inputs:
        x of any shape whose last dimensions are (height, width).
    VJP:
        the part of dy that x is in.

    Source: ``torch.nn.ConstantPad2d``.

    >>> fn.constant_pad2d((2, 0, 0, 0), 7.0).apply({}, torch.zeros(1, 3))[0]
    tensor([[7., 7., 0., 0., 0.]])
    """
    return _padded(f"constant_pad{dims}d", dims, padding, "constant", value)


def _zero_pad(dims: int, padding: Size) -> Layer:
    """Pads with zeros.

    Args:
        padding: one int for all sides, or 2 for each dimension, before and after it, from the
            last dimension to the first. A negative one crops.

    Inputs:
        x of any shape whose last dimensions are (height, width).
    VJP:
        the part of dy that x is in.

    Source: ``torch.nn.ZeroPad2d``.

    >>> fn.zero_pad2d((2, 0, 0, 0)).apply({}, torch.ones(1, 3))[0]
    tensor([[0., 0., 1., 1., 1.]])
    """
    return _padded(f"zero_pad{dims}d", dims, padding, "constant")


reflection_pad1d, reflection_pad2d, reflection_pad3d = (
    spatial(_reflection_pad, dims) for dims in (1, 2, 3)
)
replication_pad1d, replication_pad2d, replication_pad3d = (
    spatial(_replication_pad, dims) for dims in (1, 2, 3)
)
circular_pad1d, circular_pad2d, circular_pad3d = (
    spatial(_circular_pad, dims) for dims in (1, 2, 3)
)
constant_pad1d, constant_pad2d, constant_pad3d = (
    spatial(_constant_pad, dims) for dims in (1, 2, 3)
)
zero_pad1d, zero_pad2d, zero_pad3d = (spatial(_zero_pad, dims) for dims in (1, 2, 3))
