"""Where the results of loops and branches lie: where they must end up, or in what they replace."""

from collections.abc import Sequence

from funcnet.compiler.memory import Address, Frame, Target, Values
from funcnet.compiler.nodes import Node, memory_of, size_of
from funcnet.compiler.statements import Copy
from funcnet.compiler.steps import BranchStep, LoopStep, WhileStep, reads_inside


class Results:
    """Gives memory to the results of loops and branches.

    Args:
        values: where values lie.
    """

    def __init__(self, values: Values) -> None:
        self._values = values

    def carries(self, frame: Frame, item: LoopStep | WhileStep, step: int) -> list[Address]:
        """The memory of what a loop carries, with the first values in it."""
        inside, taken = reads_inside(item), set[Node]()
        return [
            self._carry(frame, item, position, operand, step, inside, taken)
            for position, operand in enumerate(item.operands[: item.loop.carried])
        ]

    def _carry(
        self,
        frame: Frame,
        item: LoopStep | WhileStep,
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
            self._values.reuse(frame, root, owner, step)
            return self._values.addresses[owner]
        slot = frame.free_target(result, step)
        if slot is None:
            slot = frame.own(owner, size, step)
        if result is not None:
            self._values.put(frame, result, slot)
        if size and slot != self._values.address(operand):
            frame.statements.append(Copy(slot, self._values.address(operand), size))
        return slot

    def stack(
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
        size = spec.bytes
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
                self._values.put(frame, result, target.address)
                return Target(target.address.slice(index, each), node)
        if base is None:
            base = frame.own(result if result is not None else _Unread("stack"), size, step)
        if result is not None:
            self._values.put(frame, result, base)
        return Target(base.slice(index, each))

    def of_branches(
        self,
        frame: Frame,
        item: BranchStep,
        position: int,
        step: int,
        owned: dict[Node, int | None],
    ) -> Target:
        """Where branches put a result; ``owned`` gets the value that they may replace by it."""
        result = item.results.get(position)
        spec = item.branches.outer[position]
        size = spec.bytes
        slot = frame.free_target(result, step)
        owner = result if result is not None else _Unread(f"result {position}")
        if slot is None:
            for root in self._replaceable(frame, item, position):
                dies = root in frame.owned and frame.last_use.get(root) == step
                if dies and root not in owned and size_of(root) == size:
                    owned[root] = None
                    self._values.reuse(frame, root, owner, step)
                    return Target(self._values.addresses[owner], root)
            slot = frame.own(owner, size, step)
        if result is not None:
            self._values.put(frame, result, slot)
        return Target(slot)

    def _replaceable(self, frame: Frame, item: BranchStep, position: int) -> Sequence[Node]:
        """What may lie where a result must end up; else what some branch gives as it is."""
        target = frame.targets.get(item.results.get(position))
        if target is not None:
            addresses = self._values.addresses
            return [node for node in frame.owned if addresses.get(node) == target.address]
        return [memory_of(block.outputs[position])[0] for block in item.blocks]


class _Unread:
    """A key for the memory of a result that nothing reads."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __str__(self) -> str:
        return f"{self._name}, not read"
