"""Operations that take a part of a tensor, or of a tuple: by ints, slices, and tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcnet.errors import require
from funcnet.interop.operations.arithmetic import Call, moved
from funcnet.layers.tuples import item
from funcnet.lift import Step, accept_any, parameterless


def index_backward(dy: Tensor, shape: tuple[int, ...], *, index: Any) -> Tensor:
    """dy, added up at the places of the indices."""
    return torch.ops.aten.index_put(dy.new_zeros(shape), index, dy, True)


def basic_backward(dy: Tensor, shapes: Any, steps: Any) -> Tensor:
    """dy where slices were taken, zeros elsewhere; from the last dimension that was cut."""
    aten = torch.ops.aten
    dy = dy.reshape(shapes[-1])
    for (kind, dim, *bounds), shape in zip(reversed(steps), reversed(shapes[:-1]), strict=True):
        cut = aten.select_backward if kind == "select" else aten.slice_backward
        dy = cut(dy, shape, dim, *bounds)
    return dy


def _cuts(x: Tensor, index: tuple[Any, ...]) -> tuple[Any, Any]:
    """The selects and slices of an index, and the shapes before, between and after them."""
    shapes, dim = [tuple(x.shape)], 0
    steps: list[tuple[Any, ...]] = []
    for part in index:
        if part is None:
            continue
        shape = list(shapes[-1])
        size = shape[dim]
        if isinstance(part, slice):
            if part != slice(None):
                start, stop, step = part.indices(size)
                steps.append(("slice", dim, start, stop, step))
                shape[dim] = len(range(start, stop, step))
                shapes.append(tuple(shape))
            dim += 1
        else:
            steps.append(("select", dim, part % size if size else part))
            del shape[dim]
            shapes.append(tuple(shape))
    return tuple(shapes), tuple(steps)


def getitem(x: Any, index: Any) -> Call:
    """``x[index]``: of a tuple or dict, or of a tensor by ints, slices, None, ..., or tensors."""
    if not isinstance(x, Tensor):
        require(not isinstance(index, slice), "getitem: expects one index of a tuple, got a slice")
        place = index % len(x) if isinstance(index, int) else index
        return item(place), x
    parts = index if isinstance(index, tuple) else (index,)
    if any([isinstance(part, (Tensor, list)) for part in parts]):
        return _by_tensors(x, parts)
    used = sum([part is not None and part is not Ellipsis for part in parts])
    full = [slice(None)] * (x.dim() - used)
    places = [place for place, part in enumerate(parts) if part is Ellipsis]
    parts = (*parts[: places[0]], *full, *parts[places[0] + 1 :]) if places else (*parts, *full)
    wrong = "getitem: expects ints, slices with a positive step, None, ... and tensors"
    require(all([p is None or type(p) in (int, slice) for p in parts]), wrong)

    def static(x: Tensor) -> Any:
        return _cuts(x, parts)

    return moved(lambda x: x[parts], basic_backward, static), x


def _by_tensors(x: Tensor, parts: tuple[Any, ...]) -> Call:
    """An index of tensors, and of ``:`` in the dimensions before them."""
    full = slice(None)
    device = x.device
    index = [torch.tensor(p, device=device) if isinstance(p, list) else p for p in parts]
    index = [None if type(p) is slice and p == full else p for p in index]
    plain = all([p is None or isinstance(p, Tensor) for p in index]) and None not in parts
    require(plain, "getitem: expects tensors and : together, got other indices beside tensors")

    def forward(x: Tensor) -> Step:
        given = tuple([full if p is None else p for p in index])
        return x[given], {"index": tuple(index)}, (tuple(x.shape),)

    return parameterless(forward, index_backward, declaration=accept_any, name="getitem"), x


def select(x: Tensor, dim: int, index: int) -> Call:
    """``torch.select``."""
    return getitem(x, (*[slice(None)] * (dim % x.dim()), index))


def narrow(x: Tensor, dim: int, start: int, length: int) -> Call:
    """``torch.narrow``."""
    return getitem(x, (*[slice(None)] * (dim % x.dim()), slice(start, start + length)))


def index_select(x: Tensor, dim: int, index: Tensor) -> Call:
    """``torch.index_select``."""
    return _by_tensors(x, (*[slice(None)] * (dim % x.dim()), index))


def gather_backward(dy: Tensor, shape: tuple[int, ...], dim: int, *, index: Tensor) -> Tensor:
    """dy, added up at the places of the indices along a dimension."""
    return dy.new_zeros(shape).scatter_add(dim, index, dy)


def gather(x: Tensor, dim: int, index: Tensor) -> Call:
    """``torch.gather``."""

    def forward(x: Tensor) -> Step:
        return x.gather(dim, index), {"index": index}, (tuple(x.shape), dim)

    return parameterless(forward, gather_backward, declaration=accept_any, name="gather"), x


INDEXING: dict[str, Callable[..., Call]] = {
    "getitem": getitem,
    "select": select,
    "narrow": narrow,
    "index_select": index_select,
    "gather": gather,
}
"""From the name of a function or method of torch to its layer and what that is applied to."""
