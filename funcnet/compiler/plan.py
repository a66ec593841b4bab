"""The memory plan: what a program does, statement by statement, with the address of every value.

Steps are planned in order. A value gets memory when its step is planned, and gives it back when
nothing reads it any more. An output is made where it must end up, if that is free in time: a result
in a donated argument, the new carry of a loop in the old one, a slice of a stack in that stack.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

from funcnet.compiler.errors import UnsupportedError
from funcnet.compiler.inductor import kernels
from funcnet.compiler.instructions import (
    Allocate,
    Call,
    Free,
    Kernels,
    Rename,
    View,
)
from funcnet.compiler.memory import Address, Arena, Frame, Target, aligned
from funcnet.compiler.nodes import Node, memory_of, size_of, value_of
from funcnet.compiler.primitives import Operand
from funcnet.compiler.progress import stage
from funcnet.compiler.statements import Apply, Copy, Iterate, Launch, Statement
from funcnet.compiler.steps import (
    Block,
    LoopStep,
    PrimitiveStep,
    Segment,
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
    ) -> None:
        """Plan a program.

        Args:
            program: what it does.
            inputs: the nodes of its inputs.
            donated: for outputs, by index, the input whose memory each takes.
            passed: for outputs, by index, the input that each is, for which nothing is done.
            threads: how many threads may run.
        """
        self.threads = threads
        self._kernels: dict[Any, Kernels] = {}
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
        self.address: dict[Node, Address] = {}
        self.frames: list[Frame] = []
        self._loops = 0
        given = [Address(f"in[{index}]") for index in range(len(inputs))]
        self.address.update(zip(inputs, given, strict=True))
        targets = []
        for index in range(len(program.outputs)):
            if index in passed:
                targets.append(Target(given[passed[index]]))
            elif index in donated:
                targets.append(Target(given[donated[index]], inputs[donated[index]]))
            else:
                targets.append(Target(Address(f"out[{index}]")))
        owned: dict[Node, int | None] = {inputs[source]: None for source in donated.values()}
        frame = self._block(program, "w0", "", self.threads, targets, owned, dict(self.address))
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
                    self._segment(frame, step, index)
                case LoopStep():
                    self._loop(frame, step, index)
                case PrimitiveStep():
                    self._primitive(frame, step, index)
            frame.free_dead(index)
        self._deliver(frame, block, targets)
        return frame

    def _deliver(self, frame: Frame, block: Block, targets: Sequence[Target]) -> None:
        """Copy the outputs that are not where they must be."""
        moves = []
        for node, target in zip(block.outputs, targets, strict=True):
            address = self._address(node)
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

    def _address(self, node: Node) -> Address:
        root, offset = memory_of(node)
        return self.address[root].at(offset)

    def _put(self, frame: Frame, node: Node, address: Address) -> None:
        self.address[node] = address
        frame.note(address, node)

    def _segment(self, frame: Frame, segment: Segment, step: int) -> None:
        in_place: list[tuple[int, int]] = []
        for index, node in enumerate(segment.outputs):
            target = frame.targets.get(node)
            if target is None or target.owner is None:
                continue
            owner = target.owner
            dies_here = frame.last_use.get(owner, -1) == step and owner in segment.inputs
            if dies_here and owner in frame.owned and _are_alike(owner, node):
                in_place.append((segment.inputs.index(owner), index))
        dying = self._dying_inputs(frame, segment, step)
        compiled = self._kernels_of(segment, frame.threads, in_place, dying)
        where = {
            name: self._address(node)
            for name, node in zip(compiled.inputs, segment.inputs, strict=True)
        }
        for source, index in in_place:
            self._put(frame, segment.outputs[index], where[compiled.inputs[source]])
        self._aim(frame, segment, compiled, step, where)
        offsets = self._instructions(
            frame, compiled, where, self._dying(frame, compiled, step, where)
        )
        first = compiled.first_names()
        owners: dict[str, Node] = {}
        for node, place in zip(segment.outputs, compiled.outputs, strict=True):
            if place is None:
                continue
            given = where[place.buffer]
            if place.buffer in compiled.inputs:
                # The output is an input: it may not share memory with it.
                self._put(frame, node, frame.own(node, size_of(node), step))
                frame.statements.append(Copy(self.address[node], given, size_of(node)))
                continue
            self._put(frame, node, given)
            taken = first.get(place.buffer)
            if place.buffer not in owners and taken in compiled.inputs:
                owners[place.buffer] = node
                root = segment.inputs[compiled.inputs.index(taken)]
                self._inherit(frame, root, node, step)
            elif place.buffer in offsets:
                owners[place.buffer] = node
                frame.owned[node] = offset = offsets.pop(place.buffer)
                frame.arena.at(offset).values = [str(node)]
            elif place.buffer in owners:
                # Two outputs in one buffer: it lives as long as either.
                first = owners[place.buffer]
                uses = [frame.last_use.get(each, step) for each in (first, node)]
                frame.last_use[first] = max(uses)
        for left in offsets.values():
            frame.free(left)

    def _kernels_of(
        self,
        segment: Segment,
        threads: int,
        in_place: list[tuple[int, int]],
        dying: list[int],
    ) -> Kernels:
        """The kernels of a segment, made once for those that are equal."""
        key = segment.key(), threads, *in_place, *dying
        if key not in self._kernels:
            stage(f"Inductor writes kernels, {len(self._kernels)} segments are done")
            self._kernels[key] = kernels(segment, threads, in_place, dying)
        return self._kernels[key]

    def _dying_inputs(self, frame: Frame, segment: Segment, step: int) -> list[int]:
        """The inputs, by index, in whose memory an output may be made.

        An output that must end up elsewhere is better made there.
        """
        aimed = {size_of(node) for node in segment.outputs if node in frame.targets}
        roots = [memory_of(node)[0] for node in segment.inputs]
        return [
            index
            for index, node in enumerate(segment.inputs)
            if frame.owned.get(node) is not None
            and frame.last_use.get(node) == step
            and roots.count(node) == 1
            and size_of(node) not in aimed
        ]

    def _instructions(
        self,
        frame: Frame,
        compiled: Kernels,
        where: dict[str, Address],
        dying: dict[int, list[Node]],
    ) -> dict[str, int]:
        """Plan what Inductor says to do; the offsets of the buffers that are left at the end."""
        offsets: dict[str, int] = {}
        for index, instruction in enumerate(compiled.instructions):
            match instruction:
                case Allocate(name, size):
                    if name not in where:
                        offsets[name] = frame.allocate(size, name)
                        where[name] = frame.address(offsets[name])
                case Free(name):
                    if name in offsets:
                        frame.free(offsets.pop(name))
                case Rename(old, new):
                    where[new] = where[old]
                    if old in offsets:
                        offsets[new] = offsets.pop(old)
                case View(name, buffer, distance):
                    where[name] = where[buffer].at(distance)
                case Call(kernel, names, types):
                    arguments = [*zip(types, [where[name] for name in names], strict=True)]
                    frame.statements.append(Launch(kernel, compiled.sources[kernel], arguments))
            for node in dying.get(index, ()):
                offset, frame.owned[node] = frame.owned[node], None
                assert offset is not None
                frame.free(offset)
        return offsets

    def _dying(
        self, frame: Frame, compiled: Kernels, step: int, where: dict[str, Address]
    ) -> dict[int, list[Node]]:
        """The values that nothing reads after an instruction of a segment, by its index."""
        last = compiled.last_use_of_inputs()
        dying: dict[int, list[Node]] = {}
        for node, offset in frame.owned.items():
            if offset is not None and frame.last_use.get(node) == step:
                own = self.address[node]
                inside = [name for name in compiled.inputs if where[name].lies_in(own)]
                if inside:
                    dying.setdefault(max([last.get(name, -1) for name in inside]), []).append(node)
        return dying

    def _aim(
        self,
        frame: Frame,
        segment: Segment,
        compiled: Kernels,
        step: int,
        where: dict[str, Address],
    ) -> None:
        """Let the buffers of outputs be the memory in which the outputs must end up."""
        first = compiled.first_names()
        sizes = {
            instruction.name: instruction.size
            for instruction in compiled.instructions
            if isinstance(instruction, Allocate)
        }
        for node, place in zip(segment.outputs, compiled.outputs, strict=True):
            if place is None:
                continue
            if place.offset or not place.is_contiguous():
                raise UnsupportedError(f"an output with strides {place.stride}")
            buffer = first.get(place.buffer, place.buffer)
            target = frame.free_target(node, step)
            if target is not None and buffer not in where and sizes.get(buffer) == size_of(node):
                where[buffer] = target

    def _primitive(self, frame: Frame, item: PrimitiveStep, step: int) -> None:
        for node in item.results.values():
            target = frame.free_target(node, step)
            self._put(frame, node, target or frame.own(node, size_of(node), step))
        operands = [Operand(str(self._address(node)), value_of(node)) for node in item.operands]
        results = {
            index: Operand(str(self.address[node]), value_of(node))
            for index, node in item.results.items()
        }
        frame.statements.append(Apply(item.primitive, operands, results, item.options))

    def _loop(self, frame: Frame, item: LoopStep, step: int) -> None:
        self._loops += 1
        number = self._loops
        index, base = f"i{number}", f"w{number}"
        loop = item.loop
        inside = reads_inside(item)
        owned: dict[Node, int | None] = {}
        targets: list[Target] = []
        taken: set[Node] = set()
        given: dict[Node, Address] = {}
        for position, operand in enumerate(item.operands[: loop.carried]):
            carry = self._carry(frame, item, position, operand, step, inside, taken)
            if position in item.slices:
                node = item.slices[position]
                given[node] = carry
                owned[node] = None
                targets.append(Target(carry, node))
            else:
                # Nothing reads this carry: its memory may be written at any time.
                targets.append(Target(carry))
        for position, operand in enumerate(item.operands):
            if position >= loop.carried and position in item.slices:
                node = item.slices[position]
                given[node] = self._address(operand).slice(index, size_of(node))
        self.address.update(given)
        for position in range(loop.carried, len(loop.outer)):
            targets.append(self._stack(frame, item, position, index, step, inside, owned))
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
                base,
                frame.address(offset),
                stride if parallel else 0,
                workers,
                threads,
                body.statements,
            )
        )
        frame.free(offset)

    def _carry(
        self,
        frame: Frame,
        item: LoopStep,
        position: int,
        operand: Node,
        step: int,
        inside: set[Node],
        taken: set[Node],
    ) -> Address:
        """The memory of a carry, with its first value in it."""
        root, offset = memory_of(operand)
        result = item.results.get(position)
        target = frame.targets.get(result)
        size = size_of(operand)
        dies = (
            root in frame.owned
            and frame.last_use.get(root) == step
            and root not in inside
            and root not in taken
            and offset == 0
            and size_of(root) == size
            and sum(memory_of(other)[0] is root for other in item.operands) == 1
        )
        # A key for the carry's memory, also where no one reads the last value.
        owner = result if result is not None else _Unread(f"carry {position}")
        if dies and (target is None or target.owner in (root, None)):
            taken.add(root)
            self._inherit(frame, root, owner, step)
            return self.address[owner]
        slot = frame.free_target(result, step)
        if slot is None:
            slot = frame.own(owner, size, step)
        if result is not None:
            self._put(frame, result, slot)
        if size and slot != self._address(operand):
            frame.statements.append(Copy(slot, self._address(operand), size))
        return slot

    def _inherit(self, frame: Frame, root: Node, heir: Any, step: int) -> None:
        """Give the memory of a value that is read no more to another."""
        self._put(frame, heir, self.address[root])
        offset = frame.owned[heir] = frame.owned.pop(root)
        if offset is not None:
            frame.arena.at(offset).values.append(str(heir))
        frame.last_use.setdefault(heir, step)
        # Targets are free when their owners are dead: no earlier value in this memory counts as
        # dead while the heir is alive.
        frame.had_before[heir] = [root, *frame.had_before.get(root, [])]
        for each in frame.had_before[heir]:
            frame.last_use[each] = frame.last_use[heir]

    def _stack(
        self,
        frame: Frame,
        item: LoopStep,
        position: int,
        index: str,
        step: int,
        inside: set[Node],
        owned: dict[Node, int | None],
    ) -> Target:
        """Where the iterations of a loop put what is stacked."""
        result = item.results.get(position)
        spec = item.loop.outer[position]
        size = prod(spec.shape) * spec.dtype.itemsize
        each = size // max(item.loop.length, 1)
        target = frame.targets.get(result)
        base = frame.free_target(result, step)
        if target is not None and base is None:
            owner = target.owner
            roots = [memory_of(operand) for operand in item.operands]
            sources = [number for number, (root, _) in enumerate(roots) if root is owner]
            if (
                item.loop.is_map
                and owner in frame.owned
                and frame.last_use[owner] == step
                and owner not in inside
                and len(sources) == 1
                and roots[sources[0]][1] == 0
                and sources[0] in item.slices
                and size_of(item.operands[sources[0]]) == size_of(owner)
            ):
                # Each member overwrites its own slice, when it has been read.
                node = item.slices[sources[0]]
                owned[node] = None
                self._put(frame, result, target.address)
                return Target(target.address.slice(index, each), node)
        if base is None:
            base = frame.own(result if result is not None else _Unread("stack"), size, step)
        if result is not None:
            self._put(frame, result, base)
        return Target(base.slice(index, each))


class _Unread:
    """A key for the memory of a result that nothing reads."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __str__(self) -> str:
        return f"{self._name}, not read"


def _starts_threads(step: Any) -> bool:
    """Whether a primitive in a step has threads of its own: in a parallel loop it would hang."""
    if isinstance(step, LoopStep):
        return any([_starts_threads(each) for each in step.body.steps])
    return isinstance(step, PrimitiveStep) and step.primitive.has_threads


def _are_alike(a: Node, b: Node) -> bool:
    one, other = value_of(a), value_of(b)
    return bool(one.shape == other.shape and one.dtype == other.dtype)
