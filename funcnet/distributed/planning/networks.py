"""What ranks compute with and talk over: how fast it is, in a few numbers."""

import statistics
import time
from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch

from funcnet.distributed.processes.start import Mesh, axis_of


class Link(NamedTuple):
    """A message of n bytes from one rank to another takes ``alpha + beta * n`` seconds.

    Source: Hockney 1994.
    """

    alpha: float
    """Seconds before the first byte comes."""

    beta: float
    """Seconds a byte."""


class Network(NamedTuple):
    """The links between ranks: inside a machine, and between machines.

    >>> network = Network(machine=2, inside=Link(1e-6, 1e-11), between=Link(1e-5, 1e-10))
    >>> mesh = {"data": 4, "model": 2}
    >>> network.link(mesh, "model") == network.inside, network.link(mesh, "data") == network.between
    (True, True)
    """

    machine: int
    """Ranks a machine."""

    inside: Link
    """Between two ranks of a machine, as a collective of all of them sees it."""

    between: Link
    """Between two machines, for one rank, which has a network card of its own."""

    def link(self, mesh: Mapping[str, int], axis: str, *, collective: bool = True) -> Link:
        """The slowest link that a message over an axis of a mesh goes through.

        Neighbours on the mesh's last axis are neighbours in a machine. An axis that leaves the
        machine and has k ranks in each one has their k network cards, as NCCL's rings use them.

        Args:
            mesh: the sizes of its axes.
            axis: the name of one.
            collective: a collective of the whole axis, not a message from one rank to the next.
        """
        names = [*mesh]
        stride = prod([mesh[name] for name in names[names.index(axis) + 1 :]])
        if stride * mesh[axis] <= self.machine:
            return self.inside
        cards = max(1, self.machine // stride) if collective else 1
        beta = max(self.inside.beta, self.between.beta / cards)
        return Link(max(self.inside.alpha, self.between.alpha), beta)

    @classmethod
    def h100(cls) -> "Network":
        """Machines of 8 H100s: NVLink inside, a port of InfiniBand NDR for each between them.

        The bandwidths of the data sheet of NVIDIA's DGX H100, 450 GB/s and 50 GB/s in one
        direction, less a fifth and a sixth, which rings of NCCL without reduction in the switch
        do not reach. The latencies are those of a round of a ring; NCCL's trees have fewer rounds.
        """
        return cls(machine=8, inside=Link(3e-6, 1 / 360e9), between=Link(1e-5, 1 / 42e9))

    @classmethod
    def loopback(cls) -> "Network":
        """Processes of one machine, by gloo over its loopback address.

        ``python -m tests.benchmarks.plan`` measures it; these are of two cores.
        """
        link = Link(1e-4, 1 / 0.8e9)
        return cls(machine=2**30, inside=link, between=link)


class Device(NamedTuple):
    """What a rank computes with."""

    memory: float
    """Bytes."""

    flops: float
    """Multiplications and additions a second, at best."""

    utilization: float = 0.5
    """The part of them that matrix products and what is between them reach."""

    bandwidth: float = float("inf")
    """Bytes of memory that are read or written a second: the time of an optimizer's update."""

    @classmethod
    def h100(cls) -> "Device":
        """An NVIDIA H100 SXM of 80 GB in bfloat16, by its data sheet, half of whose FLOPs are used.

        NVIDIA's NeMo computes a LLaMA-2 of 7 billion parameters at 780 TFLOP/s a GPU in FP8, of
        which the peak is twice that of bfloat16 (NeMo 24.12, performance summary).
        """
        return cls(memory=80e9, flops=989e12, utilization=0.5, bandwidth=3.35e12)


def link_of(
    mesh: Mesh,
    axis: str,
    *,
    sizes: tuple[int, int] = (2**10, 2**23),
    repeats: int = 9,
    device: torch.device | str | None = None,
) -> Link:
    """The link that sums over an axis find, measured; all ranks call it, and get the same.

    Args:
        mesh: a mesh of processes.
        axis: the name of one of its axes.
        sizes: the bytes of a small and of a large sum.
        repeats: how often each is timed; the median counts.
        device: of the tensors.

    >>> import funcnet as fn
    >>> _ = fn.distributed.initialize(device="cpu")
    >>> link_of(fn.distributed.mesh(), "data")
    Link(alpha=0.0, beta=0.0)
    >>> fn.distributed.finalize()
    """
    ranks = axis_of(mesh, axis)
    if ranks.size == 1:
        return Link(0.0, 0.0)
    found = []
    for size in sizes:
        x, times = torch.zeros(size // 4, device=device), []
        for _ in range(repeats + 2):
            ranks.sum(x[:1]).tolist()  # all begin together
            begin = time.perf_counter()
            ranks.sum(x)[:1].tolist()
            times.append(time.perf_counter() - begin)
        found.append(statistics.median(times[2:]))
    mean = ranks.mean(torch.tensor(found, dtype=torch.float64, device=device))
    small, large = mean.tolist()
    rounds = 2 * (ranks.size - 1)
    beta = (large - small) / (sizes[1] - sizes[0]) * ranks.size / rounds
    alpha = small / rounds - beta * sizes[0] / ranks.size
    return Link(max(0.0, alpha), max(0.0, beta))
