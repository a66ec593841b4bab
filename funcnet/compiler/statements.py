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
        reverse: whether the index goes down, from the last.
        base: the name of an iteration's workspace.
        workspace: its address, for the first thread.
        stride: how far apart the threads' are.
        workers: how many threads share the iterations.
        threads: how many may run each statement of the body.
        body: what an iteration does.
    """

    counter: str
    length: int
    reverse: bool
    base: str
    workspace: Address
    stride: int
    workers: int
    threads: int
    body: list["Statement"]


class Nest(NamedTuple):
    """Statements with a workspace of their own.

    Attributes:
        base: the name of the workspace.
        workspace: its address.
        body: the statements.
    """

    base: str
    workspace: Address
    body: list["Statement"]


class Repeat(NamedTuple):
    """A while loop.

    Attributes:
        counter: the name of a flag that is True in the first iteration.
        condition: what computes whether there is another iteration.
        holds: where it puts that, a bool.
        entered: what the first iteration does first, and then the body.
    """

    counter: str
    condition: Nest
    holds: Address
    entered: Nest


class Choose(NamedTuple):
    """Branches, of which one is run.

    Attributes:
        selector: where it says which, as a number, or a bool, of which True is the first.
        is_bool: whether it is a bool.
        branches: what each does.
    """

    selector: Address
    is_bool: bool
    branches: list[Nest]


Statement = Copy | Launch | Apply | Iterate | Nest | Repeat | Choose
