"""What Inductor says to do for a segment: buffers, and calls of kernels."""

from collections.abc import Sequence
from typing import NamedTuple


class Allocate(NamedTuple):
    """A buffer that comes to life."""

    name: str
    size: int


class Free(NamedTuple):
    """A buffer that is not needed any more."""

    name: str


class Rename(NamedTuple):
    """A buffer whose memory goes on under another name."""

    old: str
    new: str


class View(NamedTuple):
    """A buffer that lies in another, so many bytes from its start."""

    name: str
    base: str
    offset: int


class Call(NamedTuple):
    """A kernel and the buffers it works on, with their C++ types."""

    kernel: str
    args: tuple[str, ...]
    types: tuple[str, ...]


class Place(NamedTuple):
    """Where a strided value lies: in a buffer, so many elements from its start."""

    buffer: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def is_contiguous(self) -> bool:
        """Whether its elements follow each other in memory, row by row."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != step:
                return False
            step *= max(size, 1)
        return True


Instruction = Allocate | Free | Rename | View | Call


class Kernels(NamedTuple):
    """A segment in C++: functions by name, what to do in order, and where the outputs are."""

    sources: dict[str, str]
    instructions: list[Instruction]
    inputs: list[str]
    outputs: list[Place | None]

    def first_names(self) -> dict[str, str]:
        """The first name of each buffer that has had another one."""
        first: dict[str, str] = {}
        for instruction in self.instructions:
            if isinstance(instruction, Rename):
                first[instruction.new] = first.get(instruction.old, instruction.old)
        return first

    def last_use_of_inputs(self) -> dict[str, int]:
        """The index of the last instruction that touches each input, by any name it goes by."""
        origin = {name: name for name in self.inputs}
        last: dict[str, int] = {}
        for index, instruction in enumerate(self.instructions):
            names: Sequence[str] = ()
            match instruction:
                case View(name, old, _) | Rename(old, name):
                    if old in origin:
                        origin[name] = origin[old]
                case Call(_, arguments, _):
                    names = arguments
            last.update({origin[name]: index for name in names if name in origin})
        for place in self.outputs:
            if place is not None and place.buffer in origin:
                last[origin[place.buffer]] = len(self.instructions)
        return last
