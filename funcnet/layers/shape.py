"""Layers that move values and compute nothing: their pullbacks move cotangents back.

They take integers, too, which have no cotangent, so a dy may be None.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import EMPTY, Layer, Params
from funcnet.lift import Step, accept_any, parameterless


def identity() -> Layer:
    """``y = x``, any tree. Source: ``torch.nn.Identity``.

    >>> identity().apply({}, torch.ones(2))[0]
    tensor([1., 1.])
    """

    def forward(x: Any) -> Step:
        return x, {}, ()

    return parameterless(forward, identity_backward, declaration=accept_any)


def identity_backward(dy: Any) -> Any:
    """``dx = dy``."""
    return dy


def reshape_backward(dy: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """dy in the shape of x."""
    return None if dy is None else dy.reshape(shape)


def flatten(start_dim: int = 1, end_dim: int = -1) -> Layer:
    """Dimensions ``start_dim`` to ``end_dim`` as one.

    Args:
        start_dim, end_dim: the first and the last dimension that become one.

    Source: ``torch.nn.Flatten``.

    >>> flatten().apply({}, torch.ones(5, 2, 3))[0].shape
    torch.Size([5, 6])
    """

    def forward(x: Tensor) -> Step:
        return x.flatten(start_dim, end_dim), {}, (tuple(x.shape),)

    return parameterless(forward, reshape_backward, declaration=accept_any)


def unflatten(dim: int, unflattened_size: Sequence[int]) -> Layer:
    """Dimension ``dim`` as several; one size may be -1.

    Args:
        dim: the dimension that becomes several.
        unflattened_size: their sizes.

    Source: ``torch.nn.Unflatten``.

    >>> unflatten(1, (2, -1)).apply({}, torch.ones(5, 6))[0].shape
    torch.Size([5, 2, 3])
    """
    sizes = tuple(unflattened_size)

    def forward(x: Tensor) -> Step:
        return x.unflatten(dim, sizes), {}, (tuple(x.shape),)

    return parameterless(forward, reshape_backward, declaration=accept_any)


def reshape(*shape: int) -> Layer:
    """The same values in another shape, the batch included; one size may be -1.

    Source: ``torch.reshape``.

    >>> reshape(-1, 1, 2, 3).apply({}, torch.ones(5, 6))[0].shape
    torch.Size([5, 1, 2, 3])
    """

    def forward(x: Tensor) -> Step:
        return x.reshape(shape), {}, (tuple(x.shape),)

    return parameterless(forward, reshape_backward, declaration=accept_any)


def permute_backward(dy: Tensor | None, inverse: tuple[int, ...]) -> Tensor | None:
    """dy with its dimensions in x's order."""
    return None if dy is None else dy.permute(inverse)


def permute(*dims: int) -> Layer:
    """Dimension i of y is dimension ``dims[i]`` of x. Source: ``torch.permute``.

    >>> permute(0, 2, 1).apply({}, torch.ones(5, 2, 3))[0].shape
    torch.Size([5, 3, 2])
    """
    ordered = [dim % len(dims) for dim in dims]
    if sorted(ordered) != list(range(len(dims))):
        raise ValueError(f"permute: expects every dimension once, got {dims}")
    inverse = tuple(ordered.index(dim) for dim in range(len(dims)))

    def forward(x: Tensor) -> Step:
        return x.permute(dims), {}, (inverse,)

    return parameterless(forward, permute_backward, declaration=accept_any)


def select_backward(
    dy: Tensor | None, shape: tuple[int, ...], dim: int, start: int, size: int
) -> Tensor | None:
    """Zeros of x's shape, with dy where ``size`` slices along ``dim`` were taken from ``start``."""
    if dy is None:
        return None
    dim %= len(shape)
    taken = dy.reshape(*shape[:dim], size, *shape[dim + 1 :])
    padding = [0, 0] * (len(shape) - 1 - dim) + [start, shape[dim] - start - size]
    return torch.constant_pad_nd(taken, padding)


def select(index: int | slice, dim: int = -1) -> Layer:
    """One feature of x (an index drops the dimension), or a slice of features.

    Args:
        index: an int, or a slice with step 1; negative numbers count from the end.
        dim: the dimension of the features.

    Source: ``torch.select``, ``torch.narrow``.

    >>> select(slice(1, 3)).apply({}, torch.arange(4.0))[0]
    tensor([1., 2.])
    """
    if isinstance(index, slice) and index.step not in (None, 1):
        raise ValueError(f"select: expects a slice with step 1, got {index}")

    def forward(x: Tensor) -> Step:
        if isinstance(index, int):
            y, start, size = x.select(dim, index), index % x.shape[dim], 1
        else:
            start, stop, _ = index.indices(x.shape[dim])
            size = max(stop - start, 0)
            y = x.narrow(dim, start, size)
        return y, {}, (tuple(x.shape), dim, start, size)

    return parameterless(forward, select_backward, declaration=accept_any)


def split_backward(dy: tuple[Tensor | None, ...], dim: int) -> Tensor | None:
    """The pieces joined again."""
    pieces = [piece for piece in dy if piece is not None]
    return torch.cat(pieces, dim) if pieces else None


def split(split_size_or_sections: int | Sequence[int], dim: int = -1) -> Layer:
    """A tuple of pieces of x along ``dim``.

    Args:
        split_size_or_sections: the size of a piece, the last of which may be smaller, or the
            sizes of all.
        dim: the dimension that is split.

    Source: ``torch.split``.

    >>> [tuple(y.shape) for y in split([1, 2]).apply({}, torch.ones(5, 3))[0]]
    [(5, 1), (5, 2)]
    """
    sizes = split_size_or_sections
    if not isinstance(sizes, int):
        sizes = list(sizes)

    def forward(x: Tensor) -> Step:
        return tuple(x.split(sizes, dim)), {}, (dim,)

    return parameterless(forward, split_backward, declaration=accept_any)


def concat_backward(
    dy: Tensor | None, sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...], dim: int
) -> tuple[Tensor | None, ...]:
    """The pieces of dy, of the given sizes and dtypes."""
    if dy is None:
        return (None,) * len(sizes)
    starts = accumulate(sizes[:-1], initial=0)
    return tuple(
        dy.narrow(dim, start, size).to(dtype) if dtype.is_floating_point else None
        for start, size, dtype in zip(starts, sizes, dtypes, strict=True)
    )


def concat(dim: int = -1) -> Layer:
    """A tuple of tensors as one along ``dim``.

    Args:
        dim: the dimension along which they are put.

    Source: ``torch.cat``.

    >>> concat().apply({}, (torch.zeros(2, 1), torch.ones(2, 2)))[0].shape
    torch.Size([2, 3])
    """

    def declaration(x: tuple[Tensor, ...]) -> Params:
        if type(x) is not tuple:
            raise TypeError(f"expects a tuple of tensors, got {tree.describe(x)}")
        return EMPTY

    def forward(x: tuple[Tensor, ...]) -> Step:
        sizes, dtypes = [part.shape[dim] for part in x], [part.dtype for part in x]
        return torch.cat(x, dim), {}, (tuple(sizes), tuple(dtypes), dim)

    return parameterless(forward, concat_backward, declaration=declaration)
