"""Operators that say how a graph runs: the ends of loops and of branches, and a barrier.

`scan` and `vmap` run their body once, on tensors that the operator ``funcnet::begin`` gives, and
hand its results to ``funcnet::end``. What lies between the two and depends on the first is the body
of the loop; what does not is computed once, before it. So the body may close over any tensor.

``funcnet::next`` ends one part and begins the next: the condition of a `while_loop` and its body,
or two branches of a `cond`. What is recorded in a branch is computed in it, on whatever it depends,
so that a branch that is not taken costs nothing; likewise what a body computes once, if the
condition never holds.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from funcnet.compiler.specs import Spec, spec_of

PARTS = ("funcnet::begin", "funcnet::next", "funcnet::end")
"""The names of those at which a loop or a branch, or a part of it, begins or ends."""
CONTROL = (*PARTS, "funcnet::barrier")
"""The names of all these operators."""

PRINTS = "funcnet::debug_print"
"""The name of the operator that prints."""

CHECKS = "aten::_linalg_check_errors"
"""The name of the operator that raises where a matrix had no factors."""

EFFECTS = (PRINTS, CHECKS)
"""The names of the operators that a program is to call although nothing reads what they give."""


@dataclass(eq=False)
class Loop:
    """A loop over slices of its operands along their first axis.

    A scan hands ``carried`` tensors from each iteration to the next; they come first among its
    operands and results. The iterations of a map (`vmap`) know nothing of each other. What an
    iteration returns beside the carry is stacked.

    Attributes:
        is_map: whether it is a map.
        length: the number of iterations.
        carried: how many tensors are carried.
        inner: what an iteration sees of each operand.
        reverse: whether it goes from the last slices to the first.
        outer: the results of the whole loop.
    """

    is_map: bool
    length: int
    carried: int
    inner: list[Spec]
    reverse: bool = False
    outer: list[Spec] = field(default_factory=list)

    def __str__(self) -> str:
        name = "map" if self.is_map else "scan"
        carries = f", {self.carried} carried" if self.carried else ""
        order = ", from the last to the first" if self.reverse else ""
        return f"{name} of {self.length} iterations{carries}{order}"

    @property
    def iterations(self) -> Iterable[int]:
        """The index of the slices of each iteration."""
        indices = range(self.length)
        return reversed(indices) if self.reverse else indices

    def signature(self) -> str:
        """What an iteration takes, and what the loop gives."""
        inner, outer = (", ".join(map(str, specs)) for specs in (self.inner, self.outer))
        return f"{self}, ({inner}) -> ({outer})"


@dataclass(eq=False)
class WhileLoop:
    """A loop that goes on while a condition of what it carries holds.

    Attributes:
        inner: the tensors that it carries, which are its operands and its results.
    """

    inner: list[Spec]
    is_map = False

    @property
    def carried(self) -> int:
        """How many tensors are carried."""
        return len(self.inner)

    @property
    def outer(self) -> list[Spec]:
        """The results of the whole loop."""
        return self.inner

    def __str__(self) -> str:
        return f"while loop, {self.carried} carried"

    def signature(self) -> str:
        """What it carries."""
        return f"{self}, ({', '.join(map(str, self.inner))})"


@dataclass(eq=False)
class Branches:
    """Branches of which one is run: the first if its operand is True, or the one of that number.

    Attributes:
        count: how many there are.
        outer: the results, which all branches give alike.
    """

    count: int
    outer: list[Spec] = field(default_factory=list)
    inner: tuple[Spec, ...] = ()
    is_map = False

    def __str__(self) -> str:
        return f"one of {self.count} branches"

    def signature(self) -> str:
        """What they give."""
        return f"{self} -> ({', '.join(map(str, self.outer))})"


Control = Loop | WhileLoop | Branches

_functorch = torch._C._functorch
_functional_level = _functorch.peek_interpreter_stack
library = torch.library.Library("funcnet", "FRAGMENT")
"""Where operators of funcnet are registered."""

# The tag keeps make_fx from calling them at once on small constants.
for _schema in (
    "begin(Tensor[] operands, int loop) -> Tensor[]",
    "next(Tensor[] results, int loop) -> Tensor[]",
    "end(Tensor[] results, int loop) -> Tensor[]",
    "barrier(Tensor[] values) -> Tensor[]",
):
    library.define(_schema, tags=torch.Tag.nondeterministic_seeded)


@torch.library.register_fake("funcnet::begin", lib=library)
def _begin(operands: list[Tensor], loop: int) -> list[Tensor]:
    return [spec.empty() for spec in _recorded()[loop].inner]


@torch.library.register_fake("funcnet::next", lib=library)
def _next(results: list[Tensor], loop: int) -> list[Tensor]:
    return [spec.empty() for spec in _recorded()[loop].inner]


@torch.library.register_fake("funcnet::end", lib=library)
def _end(results: list[Tensor], loop: int) -> list[Tensor]:
    return [spec.empty() for spec in _recorded()[loop].outer]


@torch.library.register_fake("funcnet::barrier", lib=library)
def _barrier(values: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(value, memory_format=torch.contiguous_format) for value in values]


class _Recording(threading.local):
    """The loops and branches that this thread has recorded so far; None while it records none."""

    loops: list[Control] | None = None


_recording = _Recording()


def _recorded() -> list[Control]:
    assert _recording.loops is not None
    return _recording.loops


@contextmanager
def recording(loops: list[Control]) -> Iterator[None]:
    """Let this thread add the loops and branches that it meets to a list."""
    before, _recording.loops = _recording.loops, loops
    try:
        yield
    finally:
        _recording.loops = before


def is_recording() -> bool:
    """Whether jit is recording here, so that a loop can be an operator of the graph.

    Under torch.vmap or torch.func inside the recorded function it cannot: there scans unroll, and
    both branches are computed.
    """
    return _recording.loops is not None and _functional_level() is None


def without_values() -> FakeTensorMode:
    """A context in which new tensors have shapes and dtypes, but no values."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def record_loop(
    carry: Sequence[Tensor],
    xs: Sequence[Tensor],
    length: int,
    body: Callable[[list[Tensor]], list[Tensor]],
    *,
    is_map: bool = False,
    reverse: bool = False,
) -> list[Tensor]:
    """Record a loop: ``body(carry + slices) -> new carry + what is stacked``; see `Loop`."""
    inner = [spec_of(leaf) for leaf in carry]
    inner += [Spec(tuple(x.shape[1:]), x.dtype, x.device) for x in xs]
    loop = Loop(is_map, length, len(carry), inner, reverse)
    index = _added(loop)
    results = body(torch.ops.funcnet.begin([*carry, *xs], index))
    for position, result in enumerate(results):
        spec = spec_of(result)
        if position >= len(carry):
            spec = spec._replace(shape=(length, *spec.shape))
        loop.outer.append(spec)
    return torch.ops.funcnet.end(results, index)


def record_while(
    carry: Sequence[Tensor],
    condition: Callable[[list[Tensor]], Tensor],
    body: Callable[[list[Tensor]], list[Tensor]],
) -> list[Tensor]:
    """Record ``while condition(carry): carry = body(carry)``; the condition is a 0-d bool.

    Under torch.vmap the loop goes on while any member's condition holds: the body must leave the
    carry of the others as it is.
    """
    index = _added(WhileLoop([spec_of(leaf) for leaf in carry]))
    tested = torch.ops.funcnet.begin([_batched_everywhere(leaf) for leaf in carry], index)
    holds = condition(tested)
    return torch.ops.funcnet.end(body(torch.ops.funcnet.next([holds, *tested], index)), index)


def records_while() -> bool:
    """Whether jit is recording here, so that a while loop can be an operator, also in torch.vmap.

    Raises:
        ValueError: it is, and a derivative is taken, which unrolls loops.
    """
    if _recording.loops is None:
        return False
    if any([level.key() != _functorch.TransformType.Vmap for level in _levels()]):
        raise ValueError(
            "while_loop: torch.func derives a loop by unrolling it, and under jit the number of "
            "iterations is not known: use scan or fori, or leave jit out"
        )
    return True


def _levels() -> list[Any]:
    """The transformations of torch.func that are at work, the outermost first."""
    return _functorch.get_interpreter_stack() or []


def _batched_everywhere(leaf: Tensor) -> Tensor:
    """The same values, which each enclosing torch.vmap takes for those of its members."""
    for level in _levels():
        size = _functorch.CVmapInterpreterPtr(level).batchSize()
        members = torch.zeros(size, dtype=torch.bool, device=leaf.device)
        each = _functorch._add_batch_dim(members, 0, level.level())
        leaf = torch.where(each, leaf, leaf)
    return leaf


def _members_first(tensors: list[Tensor], axes: list[int | None], count: int) -> list[Tensor]:
    """Tensors with the axis of the members of a batch in front."""
    return [
        tensor.expand(count, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
        for tensor, axis in zip(tensors, axes, strict=True)
    ]


@torch.library.register_vmap("funcnet::begin", lib=library)
def _begin_of_members(info: Any, in_dims: Any, operands: list[Tensor], loop: int) -> Any:
    operands = _members_first(operands, in_dims[0], info.batch_size)
    while_loop = _recorded()[loop]
    assert isinstance(while_loop, WhileLoop)
    while_loop.inner = [*map(spec_of, operands)]
    return torch.ops.funcnet.begin(operands, loop), [0] * len(operands)


@torch.library.register_vmap("funcnet::next", lib=library)
def _next_of_members(info: Any, in_dims: Any, results: list[Tensor], loop: int) -> Any:
    (holds, *carry), (axis, *axes) = results, in_dims[0]
    holds = holds if axis is None else holds.movedim(axis, 0).any(0)
    carry = _members_first(carry, axes, info.batch_size)
    return torch.ops.funcnet.next([holds, *carry], loop), [0] * len(carry)


@torch.library.register_vmap("funcnet::end", lib=library)
def _end_of_members(info: Any, in_dims: Any, results: list[Tensor], loop: int) -> Any:
    results = _members_first(results, in_dims[0], info.batch_size)
    return torch.ops.funcnet.end(results, loop), [0] * len(results)


def record_branches(
    selector: Tensor, branches: Sequence[Callable[[], list[Tensor]]]
) -> list[Tensor]:
    """Record ``branches[selector]()``, or ``branches[0 if selector else 1]()`` for a 0-d bool.

    They must give tensors of the same shapes and dtypes.
    """
    record = Branches(len(branches))
    index = _added(record)
    torch.ops.funcnet.begin([selector], index)
    for branch in branches[:-1]:
        torch.ops.funcnet.next(branch(), index)
    results = branches[-1]()
    record.outer = [*map(spec_of, results)]
    return torch.ops.funcnet.end(results, index)


def _added(control: Control) -> int:
    """The index of a loop or branches, which are recorded from here on."""
    _recorded().append(control)
    return len(_recorded()) - 1


def barrier(values: list[Tensor]) -> list[Tensor]:
    """The same values, of which the compiler may compute nothing before this point."""
    return torch.ops.funcnet.barrier(values) if is_recording() and values else values
