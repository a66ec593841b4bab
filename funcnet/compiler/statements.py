"""What a program does, statement by statement; `program` writes each as C++."""

from typing import NamedTuple

from funcnet.compiler.memory import Address


class Copy(NamedTuple):
    """Copy so many bytes."""

    to: Address
    source: Address
    size: int


class Launch(NamedTuple):
    """Call a kernel of Inductor's; ``source`` is its text, in which it has this name."""

    name: str
    source: str
    arguments: list[tuple[str, Address]]


class Apply(NamedTuple):
    """Call a primitive: a C++ statement, and the header that it needs."""

    text: str
    header: str


class Iterate(NamedTuple):
    """A loop.

    Attributes:
        counter: the name of its index.
        length: how many iterations it has.
        base: the name of an iteration's workspace.
        workspace: its address, for the first thread.
        stride: how far apart the threads' are.
        workers: how many threads share the iterations.
        threads: how many may run each statement of the body.
        body: what an iteration does.
    """

    counter: str
    length: int
    base: str
    workspace: Address
    stride: int
    workers: int
    threads: int
    body: list["Statement"]


Statement = Copy | Launch | Apply | Iterate
