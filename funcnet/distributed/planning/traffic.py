"""What a function communicates, counted from its own operators, and how long that takes."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from funcnet import runtime, tree
from funcnet.distributed.planning.networks import Link, Network


class Ring(NamedTuple):
    """How a collective over n ranks goes round a ring, which is the least that ranks can send."""

    rounds: Callable[[int], int]
    """How many messages a rank sends, one after another."""

    share: Callable[[int], tuple[int, int]]
    """The part of the whole tensor that it sends in all of them."""


RINGS = {
    "all_reduce": Ring(lambda n: 2 * (n - 1), lambda n: (2 * (n - 1), n)),
    "all_gather": Ring(lambda n: n - 1, lambda n: (n - 1, n)),
    "reduce_scatter": Ring(lambda n: n - 1, lambda n: (n - 1, n)),
    "send": Ring(lambda n: 1, lambda n: (1, 1)),
}
"""Chan, Heimlich, Purkayastha, van de Geijn 2007, Collective communication."""

# Operators that have an axis, and send nothing; and those that are others with another argument.
_SILENT = {"axis_rank"}
_SAME = {"sum_flat": "all_reduce"}


class Traffic(NamedTuple):
    """The collectives of one kind over one axis."""

    kind: str
    """One of ``RINGS``."""

    axis: str
    """The name of the axis."""

    ranks: int
    """Its size."""

    calls: int
    """How many collectives."""

    bytes: int
    """Of the whole tensors together: what is summed, or gathered, or scattered of all ranks."""

    @property
    def sent(self) -> int:
        """The bytes that a rank sends, if they go round a ring."""
        numerator, denominator = RINGS[self.kind].share(self.ranks)
        return self.bytes * numerator // denominator

    def seconds(self, link: Link) -> float:
        """``rounds * alpha + sent * beta``."""
        return self.calls * RINGS[self.kind].rounds(self.ranks) * link.alpha + self.sent * link.beta


class Recorded:
    """The collectives that were counted in a block."""

    def __init__(self, mesh: Mapping[str, int]) -> None:
        self.mesh = mesh
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.largest = 0
        """The bytes of the largest tensors that one of them reads and makes."""

    def told(self, kind: str, arguments: Mapping[str, Any], result: Any) -> None:
        """Count an operator that was called."""
        if "axis" not in arguments or kind in _SILENT:
            return
        kind = _SAME.get(kind, kind)
        if kind not in RINGS:
            raise NotImplementedError(f"plan: knows no formula for the collective {kind!r}")
        axis = arguments["axis"].partition(" of ")[0]
        given, made = tree.bytes([*arguments.values()]), tree.bytes(result)
        self.calls[kind, axis] += 1
        self.bytes[kind, axis] += max(given, made)
        self.largest = max(self.largest, given + made)

    def traffic(self, times: int = 1) -> tuple[Traffic, ...]:
        """What was counted, in a block that runs so many times."""
        return tuple(
            [
                Traffic(kind, axis, self.mesh[axis], times * calls, times * self.bytes[kind, axis])
                for (kind, axis), calls in self.calls.items()
            ]
        )


@contextmanager
def recorded(mesh: Mapping[str, int]) -> Iterator[Recorded]:
    """Counts the collectives of the functions that are called in a block.

    >>> import torch, funcnet as fn
    >>> axis = fn.distributed.axis_of({"data": 4}, "data")
    >>> with recorded({"data": 4}) as found:
    ...     _ = axis.sum(torch.ones(100, device="meta"))
    >>> found.traffic()
    (Traffic(kind='all_reduce', axis='data', ranks=4, calls=1, bytes=400),)
    >>> found.traffic()[0].sent
    600
    """
    found = Recorded(mesh)
    with runtime.watching("funcnet", found.told):
        yield found


def merged(*parts: tuple[Traffic, ...]) -> tuple[Traffic, ...]:
    """Those of the same kind and axis as one."""
    found: dict[tuple[str, str, int], tuple[int, int]] = {}
    for each in [each for part in parts for each in part]:
        calls, size = found.get(each[:3], (0, 0))
        found[each[:3]] = calls + each.calls, size + each.bytes
    return tuple([Traffic(*name, *sums) for name, sums in found.items()])


def seconds(
    traffic: tuple[Traffic, ...], mesh: Mapping[str, int], network: Network
) -> dict[str, float]:
    """How long the collectives over each axis take, one after another."""
    found: dict[str, float] = {}
    for each in traffic:
        link = network.link(mesh, each.axis, collective=each.kind != "send")
        found[each.axis] = found.get(each.axis, 0.0) + each.seconds(link)
    return found
