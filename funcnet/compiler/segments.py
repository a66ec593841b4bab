"""The memory of a segment: its kernels are made, and their buffers get addresses."""

from typing import Any

from funcnet.compiler.errors import NoKernelError
from funcnet.compiler.instructions import Allocate, Call, Free, Kernels, Rename, View
from funcnet.compiler.memory import Address, Frame, Values
from funcnet.compiler.missing import kernels_or_missing
from funcnet.compiler.nodes import Node, memory_of, size_of, value_of
from funcnet.compiler.progress import stage
from funcnet.compiler.statements import Copy, Launch
from funcnet.compiler.steps import Segment


class Segments:
    """Plans segments.

    Args:
        values: where values lie.
        made: the kernels of the segments that were seen so far; equal ones have the same.
    """

    def __init__(self, values: Values, made: dict[Any, Kernels]) -> None:
        self._values = values
        self._made = made

    def plan(self, frame: Frame, segment: Segment, step: int) -> None:
        """Add what a segment does to the statements of a frame, whose step of this index it is."""
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
        compiled = self._kernels(segment, frame.threads, in_place, dying)
        where = {
            name: self._values.address(node)
            for name, node in zip(compiled.inputs, segment.inputs, strict=True)
        }
        for source, index in in_place:
            self._values.put(frame, segment.outputs[index], where[compiled.inputs[source]])
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
                self._values.put(frame, node, frame.own(node, size_of(node), step))
                frame.statements.append(Copy(self._values.addresses[node], given, size_of(node)))
                continue
            self._values.put(frame, node, given)
            taken = first.get(place.buffer)
            if place.buffer not in owners and taken in compiled.inputs:
                owners[place.buffer] = node
                root = segment.inputs[compiled.inputs.index(taken)]
                self._values.reuse(frame, root, node, step)
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

    def _kernels(
        self,
        segment: Segment,
        threads: int,
        in_place: list[tuple[int, int]],
        dying: list[int],
    ) -> Kernels:
        """The kernels of a segment, made once for those that are equal."""
        key = segment.key(), threads, *in_place, *dying
        if key not in self._made:
            stage(f"Inductor writes kernels, {len(self._made)} segments are done")
            self._made[key] = kernels_or_missing(segment, threads, in_place, dying)
        return self._made[key]

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
                own = self._values.addresses[node]
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
                raise NoKernelError([node], f"an output with strides {place.stride}")
            buffer = first.get(place.buffer, place.buffer)
            target = frame.free_target(node, step)
            if target is not None and buffer not in where and sizes.get(buffer) == size_of(node):
                where[buffer] = target


def _are_alike(a: Node, b: Node) -> bool:
    one, other = value_of(a), value_of(b)
    return bool(one.shape == other.shape and one.dtype == other.dtype)
