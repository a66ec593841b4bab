"""Layers that move values and compute nothing: their pullbacks move cotangents back."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import Layer, Params, Pullback, check_params, stateless


def _place_back(dy: Tensor, shape: tuple[int, ...], dim: int, start: int, size: int) -> Tensor:
    """Zeros of a shape, with dy where ``size`` slices along ``dim`` were taken from ``start``."""
    dim %= len(shape)
    taken = dy.reshape(*shape[:dim], size, *shape[dim + 1 :])
    padding = [0, 0] * (len(shape) - 1 - dim) + [start, shape[dim] - start - size]
    return torch.constant_pad_nd(taken, padding)


def _cut(
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


# The ways back, by name: dx from dy and static arguments.
MOVES: dict[str, Callable[..., Any]] = {
    "same": lambda dy: dy,
    "reshape": lambda dy, shape: dy.reshape(shape),
    "permute": lambda dy, dims: dy.permute(dims),
    "place back": _place_back,
    "join": lambda dy, dim: torch.cat(dy, dim),
    "cut": _cut,
}


def moves_rule(
    residuals: dict[str, Any], dy: Any, name: str, way: str, *static: Any, params: bool, x: bool
) -> tuple[Params | None, Any]:
    """``dx = MOVES[way](dy, *static)``; None for integers, which have no cotangent."""
    moved = None
    present = any(part is not None for part in (dy if isinstance(dy, tuple) else (dy,)))
    if x and (present or way == "cut"):
        moved = MOVES[way](dy, *static)
    return ({} if params else None), moved


def _moves(
    name: str,
    apply: Callable[[Any], Any],
    way: str,
    static_of: Callable[[Any], tuple[Any, ...]],
) -> Layer:
    """A layer without parameters and residuals, whose way back knows all from static arguments."""

    def lifted_apply(params: Params, x: Any) -> Any:
        check_params(name, params, ())
        try:
            return apply(x)
        except (ValueError, RuntimeError, IndexError, AttributeError, ZeroDivisionError) as error:
            raise ValueError(f"{name}: does not fit {tree.describe(x)}: {error}") from None

    def vjp(params: Params, x: Any) -> tuple[Any, Pullback]:
        return lifted_apply(params, x), Pullback(moves_rule, {}, (name, way, *static_of(x)))

    return stateless(lambda key, x: {}, lifted_apply, vjp, name=name)


def identity() -> Layer:
    """``y = x``, any tree. Source: ``torch.nn.Identity``.

    >>> identity().apply({}, torch.ones(2))[0]
    tensor([1., 1.])
    """
    return _moves("identity", lambda x: x, "same", lambda x: ())


def _shape_of(x: Tensor) -> tuple[Any, ...]:
    return (tuple(x.shape),)


def flatten(start_dim: int = 1, end_dim: int = -1) -> Layer:
    """Dimensions ``start_dim`` to ``end_dim`` as one. Source: ``torch.nn.Flatten``.

    >>> flatten().apply({}, torch.ones(5, 2, 3))[0].shape
    torch.Size([5, 6])
    """
    return _moves("flatten", lambda x: x.flatten(start_dim, end_dim), "reshape", _shape_of)


def unflatten(dim: int, unflattened_size: Sequence[int]) -> Layer:
    """Dimension ``dim`` as several; one size may be -1. Source: ``torch.nn.Unflatten``.

    >>> unflatten(1, (2, -1)).apply({}, torch.ones(5, 6))[0].shape
    torch.Size([5, 2, 3])
    """
    sizes = tuple(unflattened_size)
    return _moves("unflatten", lambda x: x.unflatten(dim, sizes), "reshape", _shape_of)


def reshape(*shape: int) -> Layer:
    """The same values in another shape, the batch included; one size may be -1.

    Source: ``torch.reshape``.

    >>> reshape(-1, 1, 2, 3).apply({}, torch.ones(5, 6))[0].shape
    torch.Size([5, 1, 2, 3])
    """
    return _moves("reshape", lambda x: x.reshape(shape), "reshape", _shape_of)


def permute(*dims: int) -> Layer:
    """Dimension i of y is dimension ``dims[i]`` of x. Source: ``torch.permute``.

    >>> permute(0, 2, 1).apply({}, torch.ones(5, 2, 3))[0].shape
    torch.Size([5, 3, 2])
    """
    ordered = [dim % len(dims) for dim in dims]
    if sorted(ordered) != list(range(len(dims))):
        raise ValueError(f"permute: expects every dimension once, got {dims}")
    inverse = tuple(ordered.index(dim) for dim in range(len(dims)))
    return _moves("permute", lambda x: x.permute(dims), "permute", lambda x: (inverse,))


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

    def extent(x: Tensor) -> tuple[int, int]:
        if isinstance(index, slice):
            start, stop, _ = index.indices(x.shape[dim])
            return start, max(stop - start, 0)
        return index % x.shape[dim], 1

    def apply(x: Tensor) -> Tensor:
        if isinstance(index, int):
            return x.select(dim, index)
        return x.narrow(dim, *extent(x))

    return _moves("select", apply, "place back", lambda x: (tuple(x.shape), dim, *extent(x)))


def split(split_size_or_sections: int | Sequence[int], dim: int = -1) -> Layer:
    """A tuple of pieces of x along ``dim``. Source: ``torch.split``.

    >>> [tuple(y.shape) for y in split([1, 2]).apply({}, torch.ones(5, 3))[0]]
    [(5, 1), (5, 2)]
    """
    sizes = split_size_or_sections
    if not isinstance(sizes, int):
        sizes = list(sizes)
    return _moves("split", lambda x: tuple(x.split(sizes, dim)), "join", lambda x: (dim,))


def concat(dim: int = -1) -> Layer:
    """A tuple of tensors as one along ``dim``. Source: ``torch.cat``.

    >>> concat().apply({}, (torch.zeros(2, 1), torch.ones(2, 2)))[0].shape
    torch.Size([2, 3])
    """

    def apply(x: tuple[Tensor, ...]) -> Tensor:
        if type(x) is not tuple:
            raise TypeError(f"concat: expects a tuple of tensors, got {tree.describe(x)}")
        return torch.cat(x, dim)

    def extents(x: tuple[Tensor, ...]) -> tuple[Any, ...]:
        return tuple(part.shape[dim] for part in x), tuple(part.dtype for part in x), dim

    return _moves("concat", apply, "cut", extents)
