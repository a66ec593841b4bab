"""A forward pass as data: steps, whose arguments refer to the values of the ones before."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Ref:
    """The value of a step, by its index."""

    index: int


@dataclass(frozen=True)
class _Slice:
    parts: tuple[Any, Any, Any]


@dataclass(frozen=True)
class _List:
    items: tuple[Any, ...]


@dataclass(frozen=True)
class _Dict:
    items: tuple[tuple[Any, Any], ...]


def frozen(argument: Any, replaced: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
    """A hashable form of an argument; ``replaced`` is called for what has no parts.

    >>> frozen([slice(1, None), (2, 3)])
    _List(items=(_Slice(parts=(1, None, None)), (2, 3)))
    """

    def inside(items: Any) -> tuple[Any, ...]:
        return tuple([frozen(item, replaced) for item in items])

    if isinstance(argument, slice):
        return _Slice(inside((argument.start, argument.stop, argument.step)))
    if isinstance(argument, tuple):
        return inside(argument)
    if isinstance(argument, list):
        return _List(inside(argument))
    if isinstance(argument, Mapping):
        return _Dict(tuple([(name, frozen(item, replaced)) for name, item in argument.items()]))
    return replaced(argument)


def thawed(argument: Any, value_of: Callable[[Ref], Any]) -> Any:
    """The argument of a frozen form, with ``value_of`` of each `Ref` in it.

    >>> thawed(frozen([slice(1, None), (Ref(0), 3)]), lambda ref: "y")
    [slice(1, None, None), ('y', 3)]
    """
    kind = type(argument)
    if kind is Ref:
        return value_of(argument)
    if kind is tuple:
        return tuple([thawed(item, value_of) for item in argument])
    if kind is _List:
        return [thawed(item, value_of) for item in argument.items]
    if kind is _Dict:
        return {name: thawed(item, value_of) for name, item in argument.items}
    if kind is _Slice:
        return slice(*[thawed(item, value_of) for item in argument.parts])
    return argument


def refs_of(argument: Any) -> Iterator[Ref]:
    """Each `Ref` in a frozen argument, in order."""
    kind = type(argument)
    if kind is Ref:
        yield argument
    elif kind in (tuple, _List, _Slice, _Dict):
        items = argument if kind is tuple else argument.parts if kind is _Slice else argument.items
        for item in items:
            yield from refs_of(item)


class Step(NamedTuple):
    """One step of a forward pass.

    Args:
        name: for errors; different for each step.
        kind: "input", a part of x; "child", a layer; "op", a function that `operations` has a
            layer for, or a Python function of numbers.
        target: the name of the part of x or of the child, or the path of the function.
        args, kwargs: in the form of `frozen`. Those of a child are its x alone.
        use: tells several uses of one child apart.
        with_none: whether the value is a pair of the child's output and None.
    """

    name: str
    kind: str
    target: Any
    args: Any = ()
    kwargs: Any = _Dict(())
    use: int | None = None
    with_none: bool = False


class Program(NamedTuple):
    """The steps of a forward pass, and its output in the form of `frozen`."""

    steps: tuple[Step, ...]
    output: Any

    def done_after(self) -> list[list[int]]:
        """By step, the indices of the values that no later step and not the output need."""
        last = list(range(len(self.steps)))
        for index, step in enumerate(self.steps):
            for ref in refs_of((step.args, step.kwargs)):
                last[ref.index] = index
        kept = {ref.index for ref in refs_of(self.output)}
        return [
            [value for value in range(index + 1) if last[value] == index and value not in kept]
            for index in range(len(self.steps))
        ]
