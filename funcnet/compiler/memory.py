"""Memory of a program: addresses, and a workspace in which buffers take turns.

An address is a C++ expression. ``in[3]`` and ``out[0]`` are arguments and results; ``w0`` is the
workspace, ``w1`` that of an iteration of the first loop, whose index is ``i1``.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from funcnet.compiler.nodes import Node, memory_of

_ALIGNMENT = 64
# To compare the lives of more buffers than this takes seconds.
_MANY = 1000


@dataclass(frozen=True)
class Address:
    """Where a value lies; ``outer`` is the buffer of which it is a part, if it is one.

    >>> row = Address("in[3]").at(64).slice("i1", 32)
    >>> print(row, row.lies_in(Address("in[3]")))
    ((in[3] + 64) + i1 * 32) True
    """

    text: str
    outer: "Address | None" = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.text

    def at(self, offset: int) -> "Address":
        """So many bytes further on."""
        return Address(f"({self} + {offset})", self) if offset else self

    def slice(self, index: str, size: int) -> "Address":
        """The slice that an iteration of a loop reads or writes."""
        return Address(f"({self} + {index} * {size})", self)

    def lies_in(self, other: "Address") -> bool:
        """Whether it is the other address, or a part of the buffer there."""
        return self == other or (self.outer is not None and self.outer.lies_in(other))


@dataclass
class Buffer:
    """Memory in a workspace, and the values that have it one after the other.

    ``first`` and ``last`` count the statements of its block from 0: it is taken from the one until
    the other is done.
    """

    offset: int
    size: int
    values: list[str]
    first: int
    last: int | None = None

    def meets(self, other: "Buffer") -> bool:
        """Whether both are taken at some time."""
        return self._starts_before_end_of(other) and other._starts_before_end_of(self)

    def _starts_before_end_of(self, other: "Buffer") -> bool:
        return other.last is None or self.first <= max(other.first, other.last)


def _gap(taken: Sequence[Buffer], size: int) -> int:
    """The offset of the first gap of this size between buffers, which are in order."""
    start = 0
    for buffer in taken:
        if buffer.offset - start >= size:
            break
        start = max(start, buffer.offset + buffer.size)
    return start


class Arena:
    """Offsets for buffers that live at different times.

    Args:
        offsets: those of all buffers, in order, if they are known; else each takes the first gap
            that fits.
    """

    def __init__(self, offsets: Sequence[int] | None = None) -> None:
        self.live: list[Buffer] = []
        self.all: list[Buffer] = []
        self.size = 0
        self._offsets = offsets

    def allocate(self, size: int, value: str, now: int) -> int:
        """The offset of a new buffer, from statement ``now`` on."""
        size = max(aligned(size), _ALIGNMENT)
        known = self._offsets
        start = _gap(self.live, size) if known is None else known[len(self.all)]
        new = Buffer(start, size, [value], now)
        bisect.insort(self.live, new, key=lambda buffer: buffer.offset)
        self.all.append(new)
        self.size = max(self.size, start + size)
        return start

    def packed(self) -> list[int] | None:
        """Offsets with which the buffers take less memory, as their lives are known now, if any.

        The large ones are placed first, each in the first gap among those that live when it does.
        """
        if len(self.all) > _MANY:
            return None
        placed: list[Buffer] = []
        order = sorted(range(len(self.all)), key=lambda index: -self.all[index].size)
        offsets = [0] * len(self.all)
        for index in order:
            buffer = self.all[index]
            offsets[index] = _gap([other for other in placed if buffer.meets(other)], buffer.size)
            new = replace(buffer, offset=offsets[index])
            bisect.insort(placed, new, key=lambda buffer: buffer.offset)
        size = max([buffer.offset + buffer.size for buffer in placed], default=0)
        return offsets if size < self.size else None

    def free(self, offset: int, now: int) -> None:
        """Give a buffer back, before statement ``now``."""
        self.at(offset).last = max(now - 1, 0)
        self.live = [buffer for buffer in self.live if buffer.offset != offset]

    def at(self, offset: int) -> Buffer:
        """The buffer that has this offset now."""
        return next(buffer for buffer in self.live if buffer.offset == offset)


def aligned(size: int) -> int:
    """A size, rounded up to whole cache lines."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass
class Target:
    """Where an output must end up; while ``owner`` is needed, its memory may not be written."""

    address: Address
    owner: Node | None = None


@dataclass
class Frame:
    """A block whose memory is being planned.

    Attributes:
        base: the name of its workspace.
        loop: the loop of which it is the body, as text; empty for the program itself.
        threads: how many threads may run each statement.
        last_use: the index of the last step that reads a value.
        owned: the values that can be overwritten after their last use, and the offsets of their
            buffers; None for those whose memory is not in this workspace.
        targets: where outputs must end up.
        arena: its workspace.
        statements: what it does, in order.
        had_before: for a carry, the values that had its memory before it.
        fixed: addresses that are not in its workspace, and the values there, one after the other.
    """

    base: str
    loop: str
    threads: int
    last_use: dict[Node, int]
    owned: dict[Node, int | None]
    targets: dict[Node, Target]
    arena: Arena
    statements: list[Any] = field(default_factory=list)
    had_before: dict[Node, list[Node]] = field(default_factory=dict)
    fixed: dict[Address, list[str]] = field(default_factory=dict)

    def address(self, offset: int) -> Address:
        """An offset in its workspace."""
        return Address(f"({self.base} + {offset})")

    def allocate(self, size: int, value: str) -> int:
        """The offset of a new buffer."""
        return self.arena.allocate(size, value, len(self.statements))

    def free(self, offset: int) -> None:
        """Give a buffer back."""
        self.arena.free(offset, len(self.statements))

    def own(self, node: Node, size: int, step: int) -> Address:
        """New memory for a value that a step makes."""
        offset = self.allocate(size, str(node))
        self.owned[node] = offset
        self.last_use.setdefault(node, step)
        return self.address(offset)

    def free_dead(self, step: int) -> None:
        """Give back the buffers of what no step after this one reads."""
        for node in [node for node in self.owned if self.last_use.get(node, -1) <= step]:
            offset = self.owned.pop(node)
            if offset is not None:
                self.free(offset)

    def free_target(self, node: Node, step: int) -> Address | None:
        """Where a value must end up, if a step may write there already."""
        target = self.targets.get(node)
        if target is None:
            return None
        writable = target.owner is None or self.last_use.get(target.owner, -1) < step
        return target.address if writable else None

    def note(self, address: Address, value: object) -> None:
        """Remember, for those who read the plan, that a value lies outside the workspace."""
        if not address.text.startswith(f"({self.base} + "):
            self.fixed.setdefault(address, []).append(str(value))

    def __str__(self) -> str:
        count = len(self.statements)
        counted = f"statements 0 to {count - 1}" if count else "no statements"
        title = f"{self.loop or 'program'}, {counted}, a workspace {self.base}"
        lines = [f"{title} of {self.arena.size} bytes"]
        for each in sorted(self.arena.all, key=lambda each: (each.offset, each.first)):
            where = f"{self.base} + {each.offset}: {each.size} bytes, {_alive(each, count)}"
            lines.append(f"{where}: {', then '.join(each.values)}")
        lines += [f"{address}: {', then '.join(each)}" for address, each in self.fixed.items()]
        return "\n    ".join(lines)


class Values:
    """Where each value of a program lies."""

    def __init__(self) -> None:
        self.addresses: dict[Node, Address] = {}

    def address(self, node: Node) -> Address:
        """The address of a value, which may be a view of another."""
        root, offset = memory_of(node)
        return self.addresses[root].at(offset)

    def put(self, frame: Frame, node: Node, address: Address) -> None:
        """A value lies there from now on."""
        self.addresses[node] = address
        frame.note(address, node)

    def reuse(self, frame: Frame, root: Node, new: Any, step: int) -> None:
        """Put a new value into the memory of one that is read no more."""
        self.put(frame, new, self.addresses[root])
        offset = frame.owned[new] = frame.owned.pop(root)
        if offset is not None:
            frame.arena.at(offset).values.append(str(new))
        frame.last_use.setdefault(new, step)
        # Targets are free when their owners are dead: no earlier value in this memory counts as
        # dead while the new one is alive.
        frame.had_before[new] = [root, *frame.had_before.get(root, [])]
        for each in frame.had_before[new]:
            frame.last_use[each] = frame.last_use[new]


def _alive(buffer: Buffer, count: int) -> str:
    last = max(count - 1, 0) if buffer.last is None else buffer.last
    first = min(buffer.first, last)
    return f"statement {first}" if first == last else f"statements {first} to {last}"
