"""Slices whose start is a tensor: `dynamic_slice` and `dynamic_update_slice`.

The shape of the slice is known when a function is traced, and its place when the program runs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.runtime import is_batched, read

Start = Sequence[Any] | Tensor
"""An integer or a 0-d integer tensor for each dimension, or a tensor with one element for each."""


def dynamic_slice(
    x: Tensor, start: Start, size: Sequence[int], *, allow_negative_indices: bool = True
) -> Tensor:
    """A block of ``x`` of a known size, at a place that tensors say.

    ``y[i, j, ...] = x[start[0] + i, start[1] + j, ...]``, where ``start`` is clamped to
    ``0 <= start[d] <= x.shape[d] - size[d]``: a block that would reach over the end is moved back.

    Args:
        x: of any number of dimensions.
        start: where the block begins: an integer or a 0-d integer tensor for each dimension, or
            one 1-d integer tensor.
        size: the shape of the block, a Python integer for each dimension.
        allow_negative_indices: whether a negative start counts from the end of the dimension;
            otherwise it is clamped to 0.

    Returns:
        A new tensor of the shape ``size``.

    Raises:
        ValueError: ``start`` or ``size`` does not have an entry for each dimension, or ``size`` is
            larger than x.
        TypeError: a start is no integer.

    Source: ``jax.lax.dynamic_slice``.

    >>> x = torch.arange(12).reshape(3, 4)
    >>> dynamic_slice(x, (1, torch.tensor(1)), (2, 3))
    tensor([[ 5,  6,  7],
            [ 9, 10, 11]])
    >>> dynamic_slice(x, (1, 1), (2, 4))
    tensor([[ 4,  5,  6,  7],
            [ 8,  9, 10, 11]])
    """
    name = "dynamic_slice"
    _check_sizes(name, x, size)
    starts = _starts(name, x, start, size, allow_negative_indices)
    for dim, (first, length) in enumerate(zip(starts, size, strict=True)):
        if not isinstance(first, Tensor):
            x = x.narrow(dim, first, length)
    moved = [dim for dim, first in enumerate(starts) if isinstance(first, Tensor)]
    for dim in sorted(moved, key=lambda dim: size[dim] / x.shape[dim] if x.shape[dim] else 0):
        positions = starts[dim] + torch.arange(size[dim], device=x.device)
        index: list[Any] = [slice(None)] * dim
        x = x[(*index, positions)]
    return x if moved else x.clone(memory_format=torch.contiguous_format)


def dynamic_update_slice(
    x: Tensor, update: Tensor, start: Start, *, allow_negative_indices: bool = True
) -> Tensor:
    """``x`` with the block at ``start`` replaced by ``update``.

    ``y[start[0] + i, start[1] + j, ...] = update[i, j, ...]``, and elsewhere y is x. ``start`` is
    clamped as in `dynamic_slice`. In a compiled loop whose carry is x, and in which nothing reads
    the old x later, only the block is written.

    Args:
        x: of any number of dimensions.
        update: of as many dimensions and the same dtype, in no dimension larger than x.
        start: where the block begins, as in `dynamic_slice`.
        allow_negative_indices: as in `dynamic_slice`.

    Returns:
        A new tensor of the shape of x.

    Raises:
        ValueError: ``update`` does not fit into x, or ``start`` does not have an entry for each
            dimension.
        TypeError: the dtypes differ, or a start is no integer.

    Source: ``jax.lax.dynamic_update_slice``.

    >>> dynamic_update_slice(torch.zeros(6), torch.ones(3), (torch.tensor(2),))
    tensor([0., 0., 1., 1., 1., 0.])
    >>> dynamic_update_slice(torch.zeros(6), torch.ones(3), (torch.tensor(5),))
    tensor([0., 0., 0., 1., 1., 1.])
    """
    name = "dynamic_update_slice"
    if not isinstance(update, Tensor) or update.dtype != x.dtype:
        raise TypeError(
            f"{name}: expects an update of x's dtype {x.dtype}, got {tree.describe(update)}"
        )
    size = tuple(update.shape)
    _check_sizes(name, x, size)
    starts = _starts(name, x, start, size, allow_negative_indices)
    if not any([isinstance(first, Tensor) for first in starts]) and not is_batched():
        result = x.clone()
        block = result
        for dim, (first, length) in enumerate(zip(starts, size, strict=True)):
            block = block.narrow(dim, first, length)
        block.copy_(update)
        return result
    # Positions in all dimensions up to the last that is not whole, so that axes keep their places.
    partial = [dim for dim, length in enumerate(size) if length != x.shape[dim]]
    axes = max(partial, default=-1) + 1
    if not axes:
        return update.clone() if x.dim() else update.expand(x.shape).clone()
    positions = []
    for dim in range(axes):
        along = starts[dim] + torch.arange(size[dim], device=x.device)
        positions.append(along.reshape([-1] + [1] * (axes - dim - 1)))
    return x.index_put(tuple(positions), update)


def dynamic_slice_in_dim(x: Tensor, start: Any, size: int, dim: int = 0) -> Tensor:
    """`dynamic_slice` along one dimension, and all of the others.

    As ``x.narrow(dim, start, size)``, but with ``start`` clamped so that the slice fits.

    Source: ``jax.lax.dynamic_slice_in_dim``.

    >>> dynamic_slice_in_dim(torch.arange(5), torch.tensor(2), 2)
    tensor([2, 3])
    """
    dim = _dim("dynamic_slice_in_dim", x, dim)
    sizes = [*x.shape]
    sizes[dim] = size
    return dynamic_slice(x, _along(x, start, dim), sizes)


def dynamic_update_slice_in_dim(x: Tensor, update: Tensor, start: Any, dim: int = 0) -> Tensor:
    """`dynamic_update_slice` along one dimension; in the others the update begins at 0.

    Source: ``jax.lax.dynamic_update_slice_in_dim``.

    >>> dynamic_update_slice_in_dim(torch.zeros(5), torch.ones(2), torch.tensor(2))
    tensor([0., 0., 1., 1., 0.])
    """
    dim = _dim("dynamic_update_slice_in_dim", x, dim)
    return dynamic_update_slice(x, update, _along(x, start, dim))


def _dim(name: str, x: Tensor, dim: int) -> int:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{name}: expects a dim of {tree.describe(x)}, got {dim}")
    return dim % x.dim()


def _along(x: Tensor, start: Any, dim: int) -> list[Any]:
    starts: list[Any] = [0] * x.dim()
    starts[dim] = start
    return starts


def _check_sizes(name: str, x: Tensor, size: Sequence[int]) -> None:
    fits = len(size) == x.dim() and all(
        [0 <= length <= extent for length, extent in zip(size, x.shape, strict=True)]
    )
    if not fits:
        raise ValueError(
            f"{name}: expects a block that fits into {tree.describe(x)}, got the shape "
            f"{tuple(size)}"
        )


def _starts(
    name: str, x: Tensor, start: Start, size: Sequence[int], negative: bool
) -> list[int | Tensor]:
    """The clamped starts: integers where their values are known, else 0-d tensors."""
    given = [*start.unbind()] if isinstance(start, Tensor) and start.dim() == 1 else start
    if not isinstance(given, (list, tuple)) or len(given) != x.dim():
        raise ValueError(
            f"{name}: expects a start for each dimension of {tree.describe(x)}, got "
            f"{tree.describe(start)}"
        )
    found: list[int | Tensor] = []
    for first, length, extent in zip(given, size, x.shape, strict=True):
        _check_integer(name, first)
        if length == extent:
            found.append(0)
            continue
        if type(first) is not int:
            known = read(first) if isinstance(first, Tensor) else None
            first = torch.as_tensor(first).to(torch.int64) if known is None else known
        if isinstance(first, Tensor):
            wrapped = torch.where(first < 0, first + extent, first) if negative else first
            found.append(wrapped.clamp(0, extent - length))
        else:
            wrapped = first + extent if negative and first < 0 else first
            found.append(min(max(wrapped, 0), extent - length))
    return found


def _check_integer(name: str, first: Any) -> None:
    if isinstance(first, Tensor):
        of_integers = not (first.is_floating_point() or first.is_complex())
        fits = first.dim() == 0 and of_integers and first.dtype != torch.bool
    else:
        fits = isinstance(first, int) and not isinstance(first, bool)
    if not fits:
        raise TypeError(
            f"{name}: expects integers and 0-d integer tensors as starts, got "
            f"{tree.describe(first)}"
        )
