"""Tensors as positions: ``x[i]`` of a 0-d tensor ``i`` takes the element that it says when it runs.

PyTorch reads such an i at once and takes a view. While a function is recorded its value is not
known, so that ``x[i]`` becomes the operator ``aten::index``, and ``x[i] = value`` becomes
``aten::index_put``, which take a tensor's elements as positions. What they give is a copy of the
elements: to write to it in place, which would write to x, is refused.
"""

import operator
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcnet.compiler.composites import FORMULAS
from funcnet.compiler.numbers import is_traced
from funcnet.compiler.user_code import calling_line

aten = torch.ops.aten

_POSITIONS = (torch.int64, torch.int32, torch.int16, torch.int8)


class _Copies(threading.local):
    """What ``x[i]`` gave while a function is recorded.

    Attributes:
        results: the tensors, by their ids; None where nothing is recorded.
        storages: their memory, by its address.
        making: whether the next ``aten::index`` is one.
        written: the line of the user's on which the last operator wrote to one.
    """

    results: weakref.WeakValueDictionary[int, Tensor] | None = None
    storages: dict[int, Any] | None = None
    making = False
    written: Any = None


_copies = _Copies()


@contextmanager
def tensors_as_positions() -> Iterator[None]:
    """Let 0-d integer tensors be indices, whose values are not read."""
    before = _copies.results, _copies.storages
    _copies.results, _copies.storages = weakref.WeakValueDictionary(), {}
    try:
        with _Positions():
            yield
            _check_written_back()
    finally:
        _copies.results, _copies.storages = before
        _copies.written = None


def note_copy(called: Any, args: Any, result: Any) -> None:
    """Remember the memory of what ``x[i]`` gives; called for each operator that is recorded."""
    if _copies.storages is None:
        return
    if _copies.making and called is aten.index.Tensor:
        storage = result.untyped_storage()
        _copies.storages[storage._cdata] = storage
    if called._schema.is_mutable and _copies.storages and isinstance(args[0], Tensor):
        written = args[0].untyped_storage()._cdata
        if written in _copies.storages:
            _copies.written = calling_line() or ""


def _check_written_back(value: Any = None) -> None:
    """Refuse to write to what ``x[i]`` gave, unless ``x[i] = value`` follows, as in ``x[i] += 1``.

    Without that the write would not reach x.
    """
    if _copies.written is not None and not _is_copy(value):
        line = _copies.written
        raise ValueError(
            "jit: the function writes in place to x[i], where i is a tensor: in a program that is "
            "a copy, and x would stay as it is. Write x[i] = value, or write to x[i].clone()"
            f"{line and ': '}{line}"
        )
    _copies.written = None


def _is_copy(value: Any) -> bool:
    return _copies.results is not None and _copies.results.get(id(value)) is not None


class _Positions(TorchFunctionMode):
    """Finds the indices that are positions, in the functions that take an index as an int."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _copies.written is not None:
            _check_written_back(args[2] if func is Tensor.__setitem__ else None)
        rule = _RULES.get(func)
        if rule is not None:
            result = rule(*args, **(kwargs or {}))
            if result is not NotImplemented:
                if result is not None and _copies.results is not None:
                    _copies.results[id(result)] = result
                return result
        return func(*args, **(kwargs or {}))


def _is_position(index: Any) -> bool:
    """Whether an index is one element's position, as a tensor or as a number that is traced."""
    if isinstance(index, Tensor):
        return index.dim() == 0 and index.dtype in _POSITIONS
    return is_traced(index) and isinstance(index, int) and not isinstance(index, bool)


class _Index(NamedTuple):
    """An index in three parts, to be taken one after the other.

    Attributes:
        view: ints, slices and None.
        positions: for each axis of that view the 0-d tensor that says where, or None.
        rest: for what is left, the tensors with axes, masks and lists; None without any.
    """

    view: tuple[Any, ...]
    positions: list[Tensor | None]
    rest: tuple[Any, ...] | None


def _taken_apart(x: Tensor, index: Any) -> _Index | None:
    """An index of x in the order in which PyTorch takes it; None if it has no positions."""
    items = [*index] if isinstance(index, tuple) else [index]
    # True is a new axis, as None is; False one without elements, which is left to torch.
    items = [None if item is True else item for item in items]
    if not any([_is_position(item) for item in items]) or any([item is False for item in items]):
        return None
    taken = [1 if _is_position(item) else _axes_taken(item) for item in items]
    free = x.dim() - sum(taken)
    if free < 0:
        raise IndexError(f"too many indices for tensor of dimension {x.dim()}")
    if sum([item is Ellipsis for item in items]) > 1:
        raise IndexError("an index can only have a single ellipsis ('...')")
    view: list[Any] = []
    positions: list[Tensor | None] = []
    rest: list[Any] = []
    for item, axes in zip(items, taken, strict=True):
        if _is_position(item):
            view.append(slice(None))
            positions.append(_as_index(item))
        elif item is Ellipsis:
            view += [slice(None)] * free
            positions += [None] * free
            rest += [slice(None)] * free
        elif isinstance(item, slice) or item is None:
            view.append(item)
            positions.append(None)
            rest.append(slice(None))
        elif _is_int(item):
            view.append(item)
        else:
            view += [slice(None)] * axes
            positions += [None] * axes
            rest.append(item)
    whole = all([isinstance(item, slice) and item == slice(None) for item in rest])
    return _Index(tuple(view), positions, None if whole else tuple(rest))


def _axes_taken(item: Any) -> int:
    """How many axes of a tensor an item of its index is for."""
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8):
        return item.dim()
    if isinstance(item, (list, tuple)):
        mask = torch.empty(0) if not item else torch.as_tensor(item)
        return mask.dim() if mask.dtype == torch.bool else 1
    return 1


def _is_int(item: Any) -> bool:
    return isinstance(item, int) or (not isinstance(item, (Tensor, list, tuple, range)))


def _as_index(position: Any) -> Tensor:
    if is_traced(position):
        # A copy is a tensor like others; the input itself promotes dtypes as a number does.
        position = position._arithmetic.input(position).clone()
    return position if position.dtype == torch.int32 else position.long()


def _viewed(x: Tensor, view: Sequence[Any]) -> Tensor:
    whole = all([isinstance(item, slice) and item == slice(None) for item in view])
    return x if whole else x[tuple(view)]


def _elements(x: Tensor, positions: Sequence[Tensor | None]) -> Tensor:
    """The elements at these positions, in memory of their own."""
    _copies.making = True
    try:
        return aten.index.Tensor(x, [*positions])
    finally:
        _copies.making = False


def _get(x: Tensor, index: Any) -> Any:
    parts = _taken_apart(x, index)
    if parts is None:
        return NotImplemented
    found = _elements(_viewed(x, parts.view), parts.positions)
    return found if parts.rest is None else found[parts.rest]


def _set(x: Tensor, index: Any, value: Any) -> Any:
    parts = _taken_apart(x, index)
    if parts is None:
        return NotImplemented
    if isinstance(value, Tensor):
        value = value.to(x.device, x.dtype)
    elif isinstance(value, (bool, int, float, complex)):
        value = torch.full((), value, dtype=x.dtype, device=x.device)
    else:
        raise TypeError(f"can't assign a {type(value).__name__} to a {x.type()}")
    if parts.rest is None:
        _put(x, parts, value)
        return None
    view = _viewed(x, parts.view)
    part = aten.index.Tensor(view, parts.positions)
    part[parts.rest] = value
    aten.index_put_(view, parts.positions, part)
    return None


def _put(x: Tensor, parts: _Index, value: Tensor) -> None:
    """``x[...] = value`` as one ``index_put_``, so that in a loop nothing else is written.

    Slices become positions too, up to the last axis that is not whole.
    """
    positions = iter(parts.positions)
    where: list[Tensor | range] = []
    # The axes of the result, and which of them come of None.
    shape: list[int] = []
    new: list[int] = []
    for item in parts.view:
        if item is None:
            next(positions)
            new.append(len(shape))
            shape.append(1)
            continue
        extent = x.shape[len(where)]
        if not isinstance(item, slice):
            at = operator.index(item)
            if not -extent <= at < extent:
                raise IndexError(f"index {at} is out of bounds for an axis of size {extent}")
            where.append(torch.full((), at % extent, device=x.device))
        elif (position := next(positions)) is not None:
            where.append(position)
        else:
            where.append(range(*item.indices(extent)))
            shape.append(len(where[-1]))
    for extent in x.shape[len(where) :]:
        where.append(range(extent))
        shape.append(extent)
    while value.dim() > len(shape) and value.shape[0] == 1:
        value = value.squeeze(0)
    value = value.expand(shape)
    for axis in reversed(new):
        value = value.squeeze(axis)
    while isinstance(where[-1], range) and where[-1] == range(x.shape[len(where) - 1]):
        where.pop()
    axes = sum([isinstance(each, range) for each in where])
    indices: list[Tensor] = []
    for each in where:
        if isinstance(each, range):
            axes -= 1
            steps = torch.arange(each.start, each.stop, each.step, device=x.device)
            indices.append(steps.reshape([-1] + [1] * axes))
        else:
            indices.append(each)
    aten.index_put_(x, indices, value)


def _select(x: Tensor, dim: int, index: Any) -> Any:
    if not _is_position(index):
        return NotImplemented
    return _elements(x, _at(x, dim, index))


def _select_scatter(x: Tensor, src: Tensor, dim: int, index: Any) -> Any:
    if not _is_position(index):
        return NotImplemented
    expected = [*x.shape]
    del expected[dim]
    if [*src.shape] != expected:
        raise RuntimeError(
            "expected src to have a size equal to the slice of self. src size = "
            f"{[*src.shape]}, slice size = {expected}"
        )
    return aten.index_put(x, _at(x, dim, index), src.to(x.dtype))


def _narrow(x: Tensor, dim: int, start: Any, length: int) -> Any:
    if not _is_position(start):
        return NotImplemented
    extent = x.shape[dim]
    if not 0 <= length <= extent:
        raise RuntimeError(
            f"start (a tensor) + length ({length}) exceeds dimension size ({extent})."
        )
    first = _as_index(start)
    first = torch.where(first < 0, first + extent, first)
    # A start that is no position makes all of them too large, which is an error when it runs.
    first = torch.where(first < 0, extent, first)
    steps = torch.arange(length, device=x.device)
    return _elements(x, _at(x, dim, first + steps))


def _at(x: Tensor, dim: int, index: Any) -> list[Tensor | None]:
    if not -x.dim() <= dim < x.dim():
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-x.dim()}, {x.dim() - 1}], but "
            f"got {dim})"
        )
    return [*[None] * (dim % x.dim()), index if _has_axes(index) else _as_index(index)]


def _has_axes(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dim() > 0


_RULES: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _get,
    Tensor.__setitem__: _set,
    **dict.fromkeys((torch.select, Tensor.select), _select),
    **dict.fromkeys((torch.select_scatter, Tensor.select_scatter), _select_scatter),
    **dict.fromkeys((torch.narrow, Tensor.narrow), _narrow),
    **FORMULAS,
}
