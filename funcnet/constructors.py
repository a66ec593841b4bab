"""What a layer, a loss or an optimizer was asked for: the call of its constructor, for its repr.

A constructor such as ``linear(25)`` is a function that ends in `Layer`, `Loss` or `Optimizer`, and
the name of what it makes is its own. So when that is made, the constructor is still being called,
a few calls up, and its arguments are there to be read. A constructor of the user's needs nothing
for it.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from types import CodeType
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor

from funcnet.tree import describe

_UP = 12
"""How many calls a constructor may be from what it makes."""
_LONG = 120
"""The length of a call from which on repeated arguments are shown once, with their number."""
_SHOWN = 8
"""How many arguments of a long call are shown."""
_DEEP = 8
"""How many calls within calls are shown with their arguments."""
_TOO_LONG = 1000
"""The length of the whole from which on fewer of them are."""


class Call(NamedTuple):
    """A call of a constructor.

    Attributes:
        function: the constructor, if its module has it under its name.
        code: that of the constructor.
        values: its arguments by name, with those that were not given.
    """

    function: Any
    code: CodeType
    values: Mapping[str, Any]

    def of_others(self, before: Iterable[Any], after: Iterable[Any]) -> "Call | None":
        """The call with other children as arguments; None if one that changed was no argument."""
        pairs = list(zip(before, after, strict=True))
        others = {id(a): b for a, b in pairs if a is not b}
        found: set[int] = set()

        def replaced(value: Any) -> Any:
            if id(value) in others:
                found.add(id(value))
                return others[id(value)]
            if type(value) in (tuple, list):
                return type(value)([replaced(each) for each in value])
            if isinstance(value, dict):
                return {name: replaced(each) for name, each in value.items()}
            return value

        values = replaced(dict(self.values))
        changed = {id(a) for a, b in pairs if a is not b and repr(a) != repr(b)}
        return self._replace(values=values) if changed <= found else None


def call_of(name: str) -> Call | None:
    """The call of the constructor of this name that is under way; None if there is none."""
    frame = sys._getframe(2)
    for _ in range(_UP):
        code = frame.f_code
        if code.co_name == name:
            count = code.co_argcount + code.co_kwonlyargcount
            count += bool(code.co_flags & inspect.CO_VARARGS)
            count += bool(code.co_flags & inspect.CO_VARKEYWORDS)
            found, arguments = frame.f_locals, code.co_varnames[:count]
            values = {each: found[each] for each in arguments if each in found}
            return Call(frame.f_globals.get(name), code, values)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None


def function_name(function: Callable[..., Any]) -> str:
    """``linear`` for the function ``linear.<locals>.apply``: what defines it, or its own name."""
    path = getattr(function, "__qualname__", type(function).__name__).split(".<locals>.")
    return path[-2].rpartition(".")[2] if len(path) > 1 else path[0].split(".")[0]


class Constructed:
    """What shows itself as the call of its constructor.

    ``call`` is that call, if it is known, and ``children`` what is shown where it is not.
    ``not_called`` is the error for one that is called itself.
    """

    name: str
    call: Call | None
    children: Mapping[Any, Any]
    not_called: ClassVar[str]

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise TypeError: it is a tuple of functions, and none of them is the one to call."""
        raise TypeError(f"{self.name}: {self.not_called}")

    def __repr__(self) -> str:
        shown = _shown(self, _DEEP)
        for depth in range(_DEEP - 1, 0, -1):
            if len(shown) <= _TOO_LONG:
                break
            shown = _shown(self, depth)
        return shown


def _shown(made: Constructed, depth: int) -> str:
    if made.call is None:
        items = _parts(getattr(made, "children", {}), depth)
    else:
        items = _arguments(made.call, depth)
    inside = ", ".join(items) if depth or not items else "..."
    return f"{made.name}({inside})"


def _parts(parts: Mapping[Any, Any], depth: int) -> list[str]:
    """Layers by name, or by position if that is what they are named by; folded if they are many."""
    numbered = list(parts) == [str(index) for index in range(len(parts))]
    items = [
        _text(part, depth)
        if numbered or not name or not isinstance(name, str)
        else f"{name}={_text(part, depth)}"
        for name, part in parts.items()
    ]
    return _folded(items) if len(", ".join(items)) > _LONG else items


def _arguments(call: Call, depth: int) -> list[str]:
    """Those that are not the default itself: by position where they have none, else by name."""
    items: list[str] = []
    by_position = True
    for parameter in _parameters(call):
        if parameter.name not in call.values:
            continue
        value = call.values[parameter.name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            items += _parts({str(index): each for index, each in enumerate(value)}, depth)
        elif parameter.kind is parameter.VAR_KEYWORD:
            items += _parts(value, depth)
        elif value is not parameter.default:
            required = parameter.default is parameter.empty
            by_position &= required and parameter.kind is not parameter.KEYWORD_ONLY
            text = _text(value, depth)
            items.append(text if by_position else f"{parameter.name}={text}")
    return items


def _parameters(call: Call) -> list[inspect.Parameter]:
    if callable(call.function):
        function = inspect.unwrap(call.function)
        if getattr(function, "__code__", None) is call.code:
            return list(inspect.signature(function).parameters.values())
    code, kinds = call.code, inspect.Parameter
    names = iter(code.co_varnames)
    made = [kinds(next(names), kinds.POSITIONAL_OR_KEYWORD) for _ in range(code.co_argcount)]
    made += [kinds(next(names), kinds.KEYWORD_ONLY) for _ in range(code.co_kwonlyargcount)]
    if code.co_flags & inspect.CO_VARARGS:
        made.insert(code.co_argcount, kinds(next(names), kinds.VAR_POSITIONAL))
    if code.co_flags & inspect.CO_VARKEYWORDS:
        made.append(kinds(next(names), kinds.VAR_KEYWORD))
    return made


def _text(value: Any, depth: int) -> str:
    """An argument: of a tensor its shape, of a function its name."""
    if isinstance(value, Constructed):
        return _shown(value, depth - 1)
    if isinstance(value, Tensor):
        return describe(value)
    if isinstance(value, tuple):
        inside = ", ".join([_text(each, depth) for each in value])
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, list):
        return f"[{', '.join([_text(each, depth) for each in value])}]"
    if isinstance(value, Mapping):
        inside = ", ".join([f"{name!r}: {_text(each, depth)}" for name, each in value.items()])
        return f"{{{inside}}}"
    if isinstance(value, functools.partial):
        return _text(value.func, depth)
    name, own = getattr(value, "__qualname__", None), getattr(value, "__name__", "")
    if name is not None and getattr(torch, own, None) is value:
        return f"torch.{own}"
    if name is not None:
        # What a function made, such as an initializer, has the name of that function.
        maker, made, _ = name.rpartition(".<locals>.")
        return f"{maker.rpartition('.')[2]}(...)" if made else name
    shown = repr(value)
    return type(value).__name__ if " at 0x" in shown or "\n" in shown else shown


def _folded(items: list[str]) -> list[str]:
    """Runs of equal items, or of equal groups of items, once with their number; not too many."""
    found: list[tuple[str, int]] = []
    start = 0
    while start < len(items):
        runs = [(size, _repeats(items, start, size)) for size in range(1, _SHOWN + 1)]
        size, times = max(runs, key=lambda run: run[0] * run[1] if run[1] > 2 else 0)
        if times > 2:
            group = ", ".join(items[start : start + size])
            text = f"{times} x {group}" if size == 1 else f"{times} x ({group})"
        else:
            size, times, text = 1, 1, items[start]
        found.append((text, size * times))
        start += size * times
    shown = [text for text, _ in found[:_SHOWN]]
    left = sum([count for _, count in found[_SHOWN:]])
    return [*shown, f"... {left} more"] if left else shown


def _repeats(items: list[str], start: int, size: int) -> int:
    """How often the ``size`` items from ``start`` on come one after another."""
    group, times = items[start : start + size], 1
    while items[start + times * size : start + (times + 1) * size] == group:
        times += 1
    return times if len(group) == size else 1
