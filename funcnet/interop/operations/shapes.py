"""Operations that move values: shapes, indices, pieces, dtypes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcnet.core import Layer
from funcnet.errors import require
from funcnet.interop.operations.arithmetic import Call, cached, moved
from funcnet.interop.operations.indexing import INDEXING
from funcnet.layers.shape import (
    concat,
    identity,
    permute as permuted,
    reshape_backward,
    split as pieces,
)
from funcnet.layers.tuples import item
from funcnet.lift import Step, accept_any, parameterless


def _shape_of(x: Tensor) -> tuple[Any, ...]:
    return (tuple(x.shape),)


def _numbers(sizes: Any) -> tuple[Any, ...]:
    """Sizes that were given one by one, or as one sequence."""
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], Sequence) else tuple(sizes)


def _to_shape(shape: Any) -> Layer:
    return moved(lambda x: x.reshape(shape), reshape_backward, _shape_of)


def reshape(x: Tensor, *sizes: Any, shape: Any = None) -> Call:
    """``reshape`` and ``view`` to a shape; ``view`` to a dtype is refused."""
    shape = _numbers(sizes) if sizes else tuple(shape)
    require(
        not any([isinstance(s, torch.dtype) for s in shape]), "view: expects sizes, got a dtype"
    )
    return _to_shape(shape), x


def _shaped_by(function: Callable[..., Tensor]) -> Callable[..., Call]:
    """An operation that gives the same values in another shape."""

    def call(x: Tensor, *args: Any, **options: Any) -> Call:
        def forward(x: Tensor) -> Tensor:
            return function(x, *args, **options)

        return moved(forward, reshape_backward, _shape_of), x

    return call


def permute(x: Tensor, *dims: Any) -> Call:
    """``torch.permute``."""
    return permuted(*_numbers(dims)), x


def transpose(x: Tensor, dim0: int, dim1: int) -> Call:
    """Two dimensions change places."""
    dims = list(range(x.dim()))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return permuted(*dims), x


def movedim(x: Tensor, source: Any, destination: Any) -> Call:
    """``torch.movedim``."""
    order = torch.empty(tuple(range(x.dim())), device="meta").movedim(source, destination).shape
    return permuted(*order), x


def attribute(x: Any, name: str) -> Call:
    """``x.T``, ``x.mT``, and the parts of what ``torch.max`` gives."""
    if name in ("values", "indices"):
        return item(("values", "indices").index(name)), x
    require(name in ("T", "mT", "real", "data"), f"no layer for the attribute {name!r}")
    if name in ("real", "data"):
        return identity(), x
    return permute(x, *reversed(range(x.dim()))) if name == "T" else transpose(x, -1, -2)


def sum_to_backward(dy: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The sum over what was repeated."""
    return dy.sum_to_size(shape)


def expand(x: Tensor, *sizes: Any) -> Call:
    """``Tensor.expand``."""
    sizes = _numbers(sizes)
    return moved(lambda x: x.expand(sizes), sum_to_backward, _shape_of), x


def repeat_backward(dy: Tensor, shape: tuple[int, ...], repeats: tuple[int, ...]) -> Tensor:
    """The sum over the copies."""
    shape = (1,) * (len(repeats) - len(shape)) + shape
    apart = [size for pair in zip(repeats, shape, strict=True) for size in pair]
    return dy.reshape(apart).sum(list(range(0, len(apart), 2))).reshape(shape)


def repeat(x: Tensor, *repeats: Any) -> Call:
    """``Tensor.repeat``."""
    counts = _numbers(repeats)

    def static(x: Tensor) -> Any:
        return tuple(x.shape), counts

    def backward_shape(x: Tensor) -> Tensor:
        return x.repeat(counts)

    require(len(counts) == x.dim(), "repeat: expects a number for each dimension of x")
    return moved(backward_shape, repeat_backward, static), x


def stack_backward(dy: Tensor, dim: int, dtypes: Any) -> tuple[Tensor | None, ...]:
    """The slices of dy."""
    parts = zip(dy.unbind(dim), dtypes, strict=True)
    return tuple([part.to(dtype) if dtype.is_floating_point else None for part, dtype in parts])


def stack(tensors: Sequence[Tensor], dim: int = 0) -> Call:
    """``torch.stack``."""

    def static(x: Any) -> Any:
        return dim, tuple([each.dtype for each in x])

    return moved(lambda x: torch.stack(x, dim), stack_backward, static), tuple(tensors)


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Call:
    """``torch.cat``."""
    return concat(dim), tuple(tensors)


def unbind_backward(dy: tuple[Tensor, ...], dim: int) -> Tensor:
    """The slices together."""
    return torch.stack(dy, dim)


def unbind(x: Tensor, dim: int = 0) -> Call:
    """``torch.unbind``."""
    return moved(lambda x: tuple(x.unbind(dim)), unbind_backward, lambda x: (dim,)), x


def split(x: Tensor, split_size_or_sections: Any = None, dim: int = 0, **options: Any) -> Call:
    """``torch.split``."""
    sizes = options.get("split_size", split_size_or_sections)
    return pieces(sizes, dim), x


def chunk(x: Tensor, chunks: int, dim: int = 0) -> Call:
    """``torch.chunk``."""
    return pieces(max(-(-x.shape[dim] // chunks), 1), dim), x


def flip_backward(dy: Tensor, dims: tuple[int, ...]) -> Tensor:
    """dy in the opposite order."""
    return dy.flip(dims)


def flip(x: Tensor, *dims: Any) -> Call:
    """``torch.flip``."""
    order = _numbers(dims)
    return moved(lambda x: x.flip(order), flip_backward, lambda x: (order,)), x


def roll_backward(dy: Tensor, shifts: Any, dims: Any) -> Tensor:
    """dy, shifted back."""
    return dy.roll(shifts, dims)


def roll(x: Tensor, shifts: Any, dims: Any = ()) -> Call:
    """``torch.roll``."""
    by, along = [tuple(n) if isinstance(n, Sequence) else (n,) for n in (shifts, dims)]
    back = tuple([-n for n in by])
    return moved(lambda x: x.roll(by, along), roll_backward, lambda x: (back, along)), x


def cast_backward(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """dy in x's dtype."""
    return dy.to(dtype)


def to(x: Tensor, *args: Any, **options: Any) -> Call:
    """``Tensor.to`` a dtype, a device, or those of another tensor."""

    def forward(x: Tensor) -> Any:
        return x.to(*args, **options)

    return moved(forward, cast_backward, lambda x: (x.dtype,)), x


def _to_dtype(dtype: torch.dtype) -> Callable[..., Call]:
    return lambda x: to(x, dtype)


def masked_backward(dy: Tensor, shape: tuple[int, ...], *, mask: Tensor) -> Tensor:
    """0 where the mask is."""
    return dy.masked_fill(mask, 0.0).sum_to_size(shape)


def masked_fill(x: Tensor, mask: Tensor, value: Any) -> Call:
    """``torch.masked_fill`` with a number, or a tensor that is a constant."""

    def forward(x: Tensor) -> Step:
        return x.masked_fill(mask, value), {"mask": mask}, (tuple(x.shape),)

    return parameterless(forward, masked_backward, declaration=accept_any, name="masked_fill"), x


def where_backward(dy: Tensor, kinds: Any, *, condition: Tensor) -> Any:
    """dy where the value came from, summed where it was repeated."""
    parts = torch.where(condition, dy, 0.0), torch.where(condition, 0.0, dy)
    return tuple(
        [
            part.sum_to_size(shape).to(dtype) if dtype.is_floating_point else None
            for part, (shape, dtype) in zip(parts, kinds, strict=True)
        ]
    )


def where(condition: Tensor, a: Any, b: Any) -> Call:
    """``torch.where``; a number stands for a tensor."""
    one = a if isinstance(a, Tensor) else b
    a, b = [n if isinstance(n, Tensor) else one.new_full((), n) for n in (a, b)]

    def forward(x: tuple[Tensor, Tensor]) -> Step:
        kinds = tuple([(tuple(each.shape), each.dtype) for each in x])
        return torch.where(condition, *x), {"condition": condition}, (kinds,)

    layer = parameterless(forward, where_backward, declaration=accept_any, name="where")
    return layer, (a, b)


def triangle_backward(dy: Tensor, upper: bool, diagonal: int) -> Tensor:
    """The triangle of dy."""
    return dy.triu(diagonal) if upper else dy.tril(diagonal)


def _triangle(upper: bool) -> Callable[..., Call]:
    def call(x: Tensor, diagonal: int = 0) -> Call:
        def forward(x: Tensor) -> Tensor:
            return triangle_backward(x, upper, diagonal)

        return moved(forward, triangle_backward, lambda x: (upper, diagonal)), x

    return call


@cached
def _identity() -> Layer:
    return identity()


def same(x: Tensor, *args: Any, **options: Any) -> Call:
    """What gives x itself, or a copy."""
    return _identity(), x


SHAPES: dict[str, Callable[..., Call]] = {
    **INDEXING,
    **dict.fromkeys(["reshape", "view"], reshape),
    **dict.fromkeys(["view_as", "reshape_as"], lambda x, other: reshape(x, *other.shape)),
    "flatten": _shaped_by(torch.flatten),
    "unflatten": _shaped_by(Tensor.unflatten),
    "squeeze": _shaped_by(torch.squeeze),
    "unsqueeze": _shaped_by(torch.unsqueeze),
    "ravel": _shaped_by(torch.ravel),
    **dict.fromkeys(["permute"], permute),
    **dict.fromkeys(["transpose", "swapaxes", "swapdims"], transpose),
    "t": lambda x: transpose(x, 0, 1) if x.dim() == 2 else same(x),
    **dict.fromkeys(["movedim", "moveaxis"], movedim),
    "getattr": attribute,
    "expand": expand,
    "expand_as": lambda x, other: expand(x, *other.shape),
    "broadcast_to": expand,
    "repeat": repeat,
    "stack": stack,
    **dict.fromkeys(["cat", "concat", "concatenate"], cat),
    "unbind": unbind,
    "split": split,
    "chunk": chunk,
    "flip": flip,
    "roll": roll,
    "to": to,
    "type_as": to,
    "float": _to_dtype(torch.float32),
    "double": _to_dtype(torch.float64),
    "half": _to_dtype(torch.float16),
    "bfloat16": _to_dtype(torch.bfloat16),
    "masked_fill": masked_fill,
    "where": where,
    "tril": _triangle(False),
    "triu": _triangle(True),
    **dict.fromkeys(["contiguous", "clone", "identity"], same),
}
"""From the name of a function or method of torch to its layer and what that is applied to."""
