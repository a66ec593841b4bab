"""Operators that say how a graph runs: the two ends of a loop, and a barrier.

`scan` and `vmap` run their body once, on tensors that the operator ``funcnet::begin`` gives, and
hand its results to ``funcnet::end``. What lies between the two and depends on the first is the body
of the loop; what does not is computed once, before it. So the body may close over any tensor.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from funcnet.compiler.specs import Spec, spec_of

CONTROL = ("funcnet::begin", "funcnet::end", "funcnet::barrier")
"""The names of these operators."""

PRINTS = "funcnet::debug_print"
"""The name of the operator that a program is to call although nothing reads what it gives."""


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
        outer: the results of the whole loop.
    """

    is_map: bool
    length: int
    carried: int
    inner: list[Spec]
    outer: list[Spec] = field(default_factory=list)

    def __str__(self) -> str:
        name = "map" if self.is_map else "scan"
        carries = f", {self.carried} carried" if self.carried else ""
        return f"{name} of {self.length} iterations{carries}"

    def signature(self) -> str:
        """What an iteration takes, and what the loop gives."""
        inner, outer = (", ".join(map(str, specs)) for specs in (self.inner, self.outer))
        return f"{self}, ({inner}) -> ({outer})"


_functional_level = torch._C._functorch.peek_interpreter_stack
library = torch.library.Library("funcnet", "FRAGMENT")
"""Where operators of funcnet are registered."""

# The tag keeps make_fx from calling them at once on small constants.
for _schema in (
    "begin(Tensor[] operands, int loop) -> Tensor[]",
    "end(Tensor[] results, int loop) -> Tensor[]",
    "barrier(Tensor[] values) -> Tensor[]",
):
    library.define(_schema, tags=torch.Tag.nondeterministic_seeded)


@torch.library.register_fake("funcnet::begin", lib=library)
def _begin(operands: list[Tensor], loop: int) -> list[Tensor]:
    return [spec.empty() for spec in _recorded()[loop].inner]


@torch.library.register_fake("funcnet::end", lib=library)
def _end(results: list[Tensor], loop: int) -> list[Tensor]:
    return [spec.empty() for spec in _recorded()[loop].outer]


@torch.library.register_fake("funcnet::barrier", lib=library)
def _barrier(values: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(value, memory_format=torch.contiguous_format) for value in values]


class _Recording(threading.local):
    """The loops that this thread has recorded so far; None while it records nothing."""

    loops: list[Loop] | None = None


_recording = _Recording()


def _recorded() -> list[Loop]:
    assert _recording.loops is not None
    return _recording.loops


@contextmanager
def recording(loops: list[Loop]) -> Iterator[None]:
    """Let this thread add the loops that it meets to a list."""
    before, _recording.loops = _recording.loops, loops
    try:
        yield
    finally:
        _recording.loops = before


def is_recording() -> bool:
    """Whether jit is recording here, so that a loop can be an operator of the graph.

    Under torch.vmap or torch.func inside the recorded function it cannot: there loops unroll.
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
) -> list[Tensor]:
    """Record a loop: ``body(carry + slices) -> new carry + what is stacked``; see `Loop`."""
    inner = [spec_of(leaf) for leaf in carry]
    inner += [Spec(tuple(x.shape[1:]), x.dtype, x.device) for x in xs]
    loop = Loop(is_map, length, len(carry), inner)
    index = len(_recorded())
    _recorded().append(loop)
    results = body(torch.ops.funcnet.begin([*carry, *xs], index))
    for position, result in enumerate(results):
        spec = spec_of(result)
        if position >= len(carry):
            spec = spec._replace(shape=(length, *spec.shape))
        loop.outer.append(spec)
    return torch.ops.funcnet.end(results, index)


def barrier(values: list[Tensor]) -> list[Tensor]:
    """The same values, of which the compiler may compute nothing before this point."""
    return torch.ops.funcnet.barrier(values) if is_recording() and values else values
