"""Operators that a program calls through PyTorch, because there is no kernel for them.

The C++ program hands a function in Python the number of a call, and the addresses of its operands
and results; the function makes tensors of them and runs PyTorch's operator. That takes a few
microseconds, as the operator does eagerly. All else stays what it is in the program: loops are
loops, values have their places, and what is donated is written over.
"""

import contextlib
import ctypes
import functools
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx

from funcnet.compiler.errors import say_once
from funcnet.compiler.loops import CHECKS, EFFECTS, PRINTS
from funcnet.compiler.primitives import Operand, Primitive, any_order
from funcnet.compiler.specs import spec_of
from funcnet.compiler.user_code import Line, line_of

if TYPE_CHECKING:
    from funcnet.compiler.steps import Block, PrimitiveStep

CALLS = "headers/calls.h"
"""The header of a program that calls operators through PyTorch."""

_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_size_t))
# So many calls in a run take milliseconds.
_OFTEN = 1000
# So many tensors are kept for each operand: the slices of a short loop.
_KEPT = 64


_WRITERS: dict[str, Callable[..., Any]] = {}


def writes(operator: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Says how a program calls a collective of one result, in its memory and in order.

    Args:
        operator: its name. The function takes the memory of the result, then what the operator
            takes.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _WRITERS[operator] = function
        return function

    return register


def called(node: Any) -> Primitive:
    """A primitive that calls the operator of a node through PyTorch."""
    name, formula = node.target._schema.name, _function_of(node)
    # Those that print do so in order, and collectives in one that is the same on all ranks.
    in_order = name == PRINTS or name in _WRITERS
    return Primitive(name, formula, _no_text, CALLS, has_threads=in_order, takes=any_order)


def _function_of(node: Any) -> Callable[..., Any]:
    """What a node calls, as a function of its operands alone."""
    return _of_operands(node, node.target)


def _of_operands(node: Any, target: Callable[..., Any]) -> Callable[..., Any]:
    nodes = node.all_input_nodes
    fill = _filled((node.args, node.kwargs), {each: place for place, each in enumerate(nodes)})

    def function(*operands: Tensor) -> Any:
        args, kwargs = fill(operands)
        return target(*args, **kwargs)

    return function


def _writer_of(node: Any) -> Callable[..., Any] | None:
    """What a node calls, as a function of the memory of its result and its operands."""
    writer = _WRITERS.get(node.target._schema.name)
    if writer is None:
        return None
    return lambda out, *operands: _of_operands(node, functools.partial(writer, out))(*operands)


def _filled(given: Any, places: dict[Any, int]) -> Callable[[Sequence[Any]], Any]:
    """A function that puts operands in their places in what an operator is given."""
    if isinstance(given, fx.Node):
        return operator.itemgetter(places[given])
    if isinstance(given, (tuple, list)) and _has_nodes(given):
        parts = [_filled(each, places) for each in given]
        return lambda operands: [part(operands) for part in parts]
    if isinstance(given, dict) and _has_nodes(given):
        named = {name: _filled(each, places) for name, each in given.items()}
        return lambda operands: {name: part(operands) for name, part in named.items()}
    return lambda operands: given


def _has_nodes(given: Any) -> bool:
    if isinstance(given, (tuple, list, dict)):
        return any([*map(_has_nodes, given.values() if isinstance(given, dict) else given)])
    return isinstance(given, fx.Node)


def _no_text(*_: Any) -> str:
    raise AssertionError("the plan numbers calls, and writes them")


def call_text(
    number: int, name: str, operands: Sequence[Operand], results: dict[int, Operand]
) -> str:
    """The C++ statement for the call of this number."""
    places = [*operands, *[results[index] for index in sorted(results)]]
    addresses = ", ".join([f"(const char*)({place.address})" for place in places])
    call = f"funcnet::call(callback, {number}, {{{addresses}}});"
    if name == CHECKS and operands[0].value.is_contiguous():
        # Torch says what it means that a matrix had no factors; mostly, they all have.
        return (
            f"if (funcnet::any((const char*)({operands[0].address}), {operands[0].numel})) {call}"
        )
    return call


class CallSite(NamedTuple):
    """A call in a program, and how often a run of the program makes it."""

    step: "PrimitiveStep"
    times: int

    @property
    def line(self) -> Line | None:
        """The line of the user's code that it comes from."""
        return line_of(self.step.node)


def call_sites(block: "Block", times: int = 1) -> list[CallSite]:
    """The calls of a program, in the order of their numbers.

    Each branch counts as if it were taken, and a while loop as one iteration.
    """
    from funcnet.compiler.steps import LoopStep, PrimitiveStep, blocks_of

    found: list[CallSite] = []
    for step in block.steps:
        if isinstance(step, PrimitiveStep) and step.is_called:
            found.append(CallSite(step, times))
        each = times * step.loop.length if isinstance(step, LoopStep) else times
        for inner in blocks_of(step):
            found += call_sites(inner, each)
    return found


def say_if_often(name: str, sites: Sequence[CallSite]) -> None:
    """Warn of operators that a run of a program calls so often that it is slow."""
    for site in sites:
        name_of_operator = site.step.primitive.operator
        expected = (*EFFECTS, *_WRITERS)
        if site.times >= _OFTEN and name_of_operator not in expected:
            where = f" for {site.line}" if site.line else ""
            say_once(
                f"{name}: a run calls {name_of_operator} {site.times} times{where}",
                "there is no kernel for it, so each call goes through PyTorch and takes "
                "microseconds where a kernel may take nanoseconds; if that is too slow, take it "
                "out of the loop, or write it with operators that lower(...).called does not list",
            )


class Calls:
    """The calls of a program.

    Attributes:
        address: of the function that the program calls.
    """

    def __init__(self, sites: Sequence[CallSite]) -> None:
        self._sites = sites
        self._runs = [_Call(site.step) for site in sites]
        self._failures: list[BaseException] = []
        self._function = _FUNCTION(functools.partial(_run, self._runs, self._failures))
        self.address = ctypes.cast(self._function, ctypes.c_void_p).value or 0

    def failure(self) -> BaseException | None:
        """What a call raised, once."""
        return self._failures.pop() if self._failures else None

    def described(self) -> tuple[str, ...]:
        """What is called, how often and, after a run of the program, how long a call took."""
        lines = []
        for site, run in zip(self._sites, self._runs, strict=True):
            if site.step.primitive.operator == CHECKS:
                continue
            often = "once" if site.times == 1 else f"{site.times} times"
            took = f", {run.seconds / run.count * 1e6:.1f} us each" if run.count else ""
            where = f", for {site.line}" if site.line else ""
            lines.append(f"{site.step.primitive.operator}, {often} a run{took}{where}")
        return tuple(lines)


@contextlib.contextmanager
def calling() -> Iterator[None]:
    """The settings to run a program with calls under: what the caller's did is in the graph."""
    no_autocast = torch._C._DisableAutocast()
    with torch.no_grad(), no_autocast, torch._C.DisableTorchFunction():
        yield


def _run(
    runs: Sequence["_Call"], failures: list[BaseException], number: int, addresses: Any
) -> int:
    try:
        runs[number](addresses)
    except BaseException as error:
        failures.append(error)
        return 1
    return 0


class _Call:
    """Runs an operator on memory of a program, and says how long that took."""

    def __init__(self, step: "PrimitiveStep") -> None:
        self._formula: Callable[..., Any] = step.primitive.formula
        self._operator = step.primitive.operator
        self._writer = _writer_of(step.node)
        self._operands = [_Place(node.meta["val"]) for node in step.operands]
        self._single = isinstance(step.node.meta["val"], Tensor)
        values = [step.results[index].meta["val"] for index in sorted(step.results)]
        self._results = [*zip(sorted(step.results), map(_Place, values), strict=True)]
        self.count = 0
        self.seconds = 0.0

    def __call__(self, addresses: Any) -> None:
        start = time.perf_counter()
        operands = [place(addresses[index]) for index, place in enumerate(self._operands)]
        if self._writer is not None and self._results:
            self._writer(self._results[0][1](addresses[len(operands)]), *operands)
        else:
            self._call(operands, addresses)
        self.count += 1
        self.seconds += time.perf_counter() - start

    def _call(self, operands: list[Tensor], addresses: Any) -> None:
        results = self._formula(*operands)
        if self._single:
            results = (results,)
        for position, (index, place) in enumerate(self._results, len(operands)):
            made, kept = results[index], place(addresses[position])
            if made.shape != kept.shape or made.dtype != kept.dtype:
                raise RuntimeError(
                    f"{self._operator} gave {spec_of(made)}, where its fake kernel says "
                    f"{spec_of(kept)}"
                )
            kept.copy_(made)


class _Place:
    """Makes tensors like a given one at addresses of a program."""

    def __init__(self, like: Tensor) -> None:
        self._shape, self._strides = tuple(like.shape), tuple(like.stride())
        self._dtype = like.dtype
        steps = zip(self._shape, self._strides, strict=True)
        last = sum([(size - 1) * step for size, step in steps])
        self._bytes = (1 + last) * like.element_size() if like.numel() else 0
        self._made: dict[int, Tensor] = {}

    def __call__(self, address: int) -> Tensor:
        tensor = self._made.get(address)
        if tensor is None:
            if len(self._made) >= _KEPT:
                self._made.clear()
            tensor = self._made[address] = self._make(address)
        return tensor

    def _make(self, address: int) -> Tensor:
        if not self._bytes:
            return torch.empty(self._shape, dtype=self._dtype)
        memory = (ctypes.c_char * self._bytes).from_address(address)
        numbers = torch.frombuffer(memory, dtype=self._dtype)
        if len(self._shape) == 1 and self._strides[0] == 1:
            return numbers
        return numbers.as_strided(self._shape, self._strides)
