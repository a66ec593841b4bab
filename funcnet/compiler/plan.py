"""The memory plan: what a program does, statement by statement, with the address of every value.

Steps are planned in order. A value gets memory when its step is planned, and gives it back when
nothing reads it any more. An output is made where it must end up, if that is free in time: a result
in a donated argument, the new carry of a loop in the old one, a slice of a stack in that stack.
"""

from collections.abc import Sequence
from typing import Any

from funcnet.compiler.calls import CALLS, call_sites, call_text
from funcnet.compiler.errors import NoKernelError, UnsupportedError
from funcnet.compiler.instructions import Kernels
from funcnet.compiler.memory import Address, Arena, Frame, Target, Values, aligned
from funcnet.compiler.nodes import Node, memory_of, size_of, value_of
from funcnet.compiler.primitives import Operand
from funcnet.compiler.results import Results
from funcnet.compiler.segments import Segments
from funcnet.compiler.statements import Apply, Choose, Copy, Iterate, Nest, Repeat, Statement
from funcnet.compiler.steps import (
    Block,
    BranchStep,
    LoopStep,
    PrimitiveStep,
    RepeatStep,
    Segment,
    WhileStep,
    blocks_of,
    reads,
    reads_inside,
)


class Plan:
    """The statements of a program, and the frames in which they were planned."""

    def __init__(
        self,
        program: Block,
        inputs: Sequence[Node],
        donated: dict[int, int],
        passed: dict[int, int],
        threads: int,
        kernels: dict[Any, Kernels],
    ) -> None:
        """Plan a program.

        Args:
            program: what it does.
            inputs: the nodes of its inputs.
            donated: for outputs, by index, the input whose memory each takes.
            passed: for outputs, by index, the input that each is, for which nothing is done.
            threads: how many threads may run.
            kernels: those that were made before, by segment.
        """
        self.threads = threads
        self.inputs = len(inputs)
        # The operators that are called through PyTorch.
        self.calls = [site.step.node for site in call_sites(program)]
        self._kernels = kernels
        self._offsets: list[list[int] | None] = []
        self._make(program, inputs, donated, passed)
        # Once more, with the lives of all buffers known, if they take less memory so.
        self._offsets = [frame.arena.packed() for frame in self.frames]
        if any(self._offsets):
            self._make(program, inputs, donated, passed)

    def _make(
        self,
        program: Block,
        inputs: Sequence[Node],
        donated: dict[int, int],
        passed: dict[int, int],
    ) -> None:
        self._values = Values()
        self._segments = Segments(self._values, self._kernels)
        self._results = Results(self._values)
        # The memory of what each while loop carries.
        self._carries: dict[RepeatStep, list[Address]] = {}
        self.frames: list[Frame] = []
        self._loops = 0
        given = [Address(f"in[{index}]") for index in range(len(inputs))]
        self._values.addresses.update(zip(inputs, given, strict=True))
        targets = []
        for index in range(len(program.outputs)):
            if index in passed:
                targets.append(Target(given[passed[index]]))
            elif index in donated:
                targets.append(Target(given[donated[index]], inputs[donated[index]]))
            else:
                targets.append(Target(Address(f"out[{index}]")))
        owned: dict[Node, int | None] = {inputs[source]: None for source in donated.values()}
        frame = self._block(
            program, "w0", "", self.threads, targets, owned, dict(self._values.addresses)
        )
        self.statements: list[Statement] = frame.statements
        self.workspace = frame.arena.size

    def __str__(self) -> str:
        return "\n".join(map(str, self.frames))

    def _block(
        self,
        block: Block,
        base: str,
        loop: str,
        threads: int,
        targets: Sequence[Target],
        owned: dict[Node, int | None],
        given: dict[Node, Address],
    ) -> Frame:
        last_use: dict[Node, int] = {}
        for index, step in enumerate(block.steps):
            for node in reads(step):
                last_use[node] = index
        wanted: dict[Node, Target] = {}
        for node, target in zip(block.outputs, targets, strict=True):
            root, offset = memory_of(node)
            last_use[root] = len(block.steps)
            if offset == 0 and size_of(root) == size_of(node):
                wanted.setdefault(root, target)
        offsets = self._offsets[len(self.frames)] if self._offsets else None
        frame = Frame(base, loop, threads, last_use, dict(owned), wanted, Arena(offsets))
        self.frames.append(frame)
        for node, address in given.items():
            frame.note(address, node)
        for index, step in enumerate(block.steps):
            match step:
                case Segment():
                    self._segments.plan(frame, step, index)
                case LoopStep():
                    self._loop(frame, step, index)
                case WhileStep():
                    self._while(frame, step, index)
                case RepeatStep():
                    self._iteration(frame, step)
                case BranchStep():
                    self._branches(frame, step, index)
                case PrimitiveStep():
                    self._primitive(frame, step, index)
            frame.free_dead(index)
        self._deliver(frame, block, targets)
        return frame

    def _deliver(self, frame: Frame, block: Block, targets: Sequence[Target]) -> None:
        """Copy the outputs that are not where they must be."""
        moves = []
        for node, target in zip(block.outputs, targets, strict=True):
            address = self._values.address(node)
            if address != target.address and size_of(node):
                moves.append((address, target, size_of(node)))
                frame.note(target.address, node)
        overwritten = {target.address for _, target, _ in moves if target.owner is not None}
        # Those that overwrite something go last, and read copies of what is overwritten.
        for address, target, size in [move for move in moves if move[1].owner is None]:
            frame.statements.append(Copy(target.address, address, size))
        late = []
        for address, target, size in [move for move in moves if move[1].owner is not None]:
            if any([address.lies_in(other) for other in overwritten]):
                copy = frame.address(frame.allocate(size, f"copy of {address}"))
                frame.statements.append(Copy(copy, address, size))
                address = copy
            late.append(Copy(target.address, address, size))
        frame.statements += late

    def _primitive(self, frame: Frame, item: PrimitiveStep, step: int) -> None:
        for node in item.results.values():
            target = frame.free_target(node, step)
            self._values.put(frame, node, target or frame.own(node, size_of(node), step))
        operands = [
            Operand(str(self._values.address(node)), value_of(node)) for node in item.operands
        ]
        results = {
            index: Operand(str(self._values.addresses[node]), value_of(node))
            for index, node in item.results.items()
        }
        if item.is_called:
            number, operator = self.calls.index(item.node), item.primitive.operator
            text, header = call_text(number, operator, operands, results), CALLS
        else:
            try:
                text = item.primitive.call(operands, results, item.options)
            except UnsupportedError as reason:
                raise NoKernelError([item.node], reason) from reason
            header = f"primitives/{item.primitive.header}"
        if text:
            frame.statements.append(Apply(text, header))

    def _loop(self, frame: Frame, item: LoopStep, step: int) -> None:
        self._loops += 1
        number = self._loops
        index, base = f"i{number}", f"w{number}"
        loop = item.loop
        inside = reads_inside(item)
        owned: dict[Node, int | None] = {}
        carries = self._results.carries(frame, item, step)
        targets, given = _new_carries(carries, item.slices, owned)
        for position, operand in enumerate(item.operands):
            if position >= loop.carried and position in item.slices:
                node = item.slices[position]
                given[node] = self._values.address(operand).slice(index, size_of(node))
        self._values.addresses.update(given)
        for position in range(loop.carried, len(loop.outer)):
            targets.append(self._results.stack(frame, item, position, index, step, inside, owned))
        has_threads = any([_starts_threads(each) for each in item.body.steps])
        parallel = loop.is_map and frame.threads != 1 and not has_threads
        threads = 1 if loop.is_map else frame.threads
        title = f"loop {number}, {loop}"
        body = self._block(item.body, base, title, threads, targets, owned, given)
        # A cache line between the workspaces of threads keeps them out of each other's way.
        stride = aligned(body.arena.size) + (aligned(1) if parallel else 0)
        workers = frame.threads if parallel else 1
        offset = frame.allocate(stride * workers, f"{base}, the workspace of loop {number}")
        frame.statements.append(
            Iterate(
                index,
                loop.length,
                loop.reverse,
                base,
                frame.address(offset),
                stride if parallel else 0,
                workers,
                threads,
                body.statements,
            )
        )
        frame.free(offset)

    def _while(self, frame: Frame, item: WhileStep, step: int) -> None:
        carries = self._results.carries(frame, item, step)
        self._carries[item.repeated] = carries
        flag = frame.allocate(1, "whether the loop goes on")
        holds = frame.address(flag)
        given = {node: carries[position] for position, node in item.tested.items()}
        self._values.addresses.update(given)
        parts = [
            (item.condition, f"the condition of a {item.loop}", [Target(holds)], given),
            (item.entered, f"the body of a {item.loop}", [], {}),
        ]
        nests, offsets = [], [flag]
        for block, title, targets, seen in parts:
            base = self._next_base()
            inner = self._block(block, base, title, frame.threads, targets, {}, seen)
            what = f"{base}, the workspace of {title}"
            offsets.append(frame.allocate(inner.arena.size, what))
            nests.append(Nest(base, frame.address(offsets[-1]), inner.statements))
        condition, entered = nests
        frame.statements.append(Repeat(f"first_{condition.base}", condition, holds, entered))
        for offset in offsets:
            frame.free(offset)

    def _iteration(self, frame: Frame, item: RepeatStep) -> None:
        owned: dict[Node, int | None] = {}
        targets, given = _new_carries(self._carries[item], item.slices, owned)
        self._values.addresses.update(given)
        base, title = self._next_base(), "each iteration"
        body = self._block(item.body, base, title, frame.threads, targets, owned, given)
        offset = frame.allocate(body.arena.size, f"{base}, the workspace of {title}")
        frame.statements.append(Nest(base, frame.address(offset), body.statements))
        frame.free(offset)

    def _branches(self, frame: Frame, item: BranchStep, step: int) -> None:
        # Where the branch is chosen, the selector is still what it was.
        selector, is_bool = self._values.address(item.selector), item.is_bool
        owned: dict[Node, int | None] = {}
        targets = [
            self._results.of_branches(frame, item, position, step, owned)
            for position in range(len(item.branches.outer))
        ]
        made = []
        for name, block in zip(item.names, item.blocks, strict=True):
            base, title = self._next_base(), f"branch {name}"
            inner = self._block(block, base, title, frame.threads, targets, owned, {})
            made.append((base, inner))
        bases = " and ".join([base for base, _ in made])
        size = max([inner.arena.size for _, inner in made])
        offset = frame.allocate(size, f"{bases}, the workspaces of the branches")
        nests = [Nest(base, frame.address(offset), inner.statements) for base, inner in made]
        frame.statements.append(Choose(selector, is_bool, nests))
        frame.free(offset)

    def _next_base(self) -> str:
        self._loops += 1
        return f"w{self._loops}"


def _new_carries(
    carries: Sequence[Address], slices: dict[int, Node], owned: dict[Node, int | None]
) -> tuple[list[Target], dict[Node, Address]]:
    """Where an iteration puts the new carries, and where it finds the old ones, which it owns."""
    # What no iteration reads may be written at any time.
    targets = [Target(carry, slices.get(position)) for position, carry in enumerate(carries)]
    given = {
        node: carries[position] for position, node in slices.items() if position < len(carries)
    }
    owned.update(dict.fromkeys(given))
    return targets, given


def _starts_threads(step: Any) -> bool:
    """Whether a primitive in a step has threads of its own: in a parallel loop it would hang."""
    inside = [each for block in blocks_of(step) for each in block.steps]
    return any([_starts_threads(each) for each in inside]) or (
        isinstance(step, PrimitiveStep) and step.primitive.has_threads
    )
