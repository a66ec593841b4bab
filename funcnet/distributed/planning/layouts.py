"""The layouts of a model on so many ranks, compared by their plans."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from funcnet.core import Tree
from funcnet.distributed.planning.networks import Device, Network
from funcnet.distributed.planning.planned import Plan, plan
from funcnet.distributed.planning.tables import aligned, duration, layout, size
from funcnet.distributed.processes.start import AXES
from funcnet.errors import check_count, require

SHARDINGS = ("none", "zero", "sharded")


class Layout(NamedTuple):
    """A mesh, what is sharded over its data ranks, and the plan for them."""

    sharding: str
    plan: Plan
    fits: bool
    """Whether the peak is at most the memory of a device."""


class Plans(NamedTuple):
    """Layouts, those that fit first, the fastest first; it prints as a table."""

    layouts: tuple[Layout, ...]

    left_out: tuple[str, ...] = ()
    """Why others are not there: a line for each."""

    @property
    def fastest(self) -> Layout:
        """The first that fits.

        Raises: ValueError: none fits.
        """
        require(self.layouts and self.layouts[0].fits, "plans: no layout fits")
        return self.layouts[0]

    def __repr__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, most: int | None = None) -> list[str]:
        """The lines of the table, with so many layouts at most."""
        rows: list[Sequence[str]] = [
            (*AXES, "sharding", "micro", "peak", "fits", "step", "bubble", "talk", "FLOPs")
        ]
        for sharding, found, fits in self.layouts[:most]:
            talk = sum([found.times.get(name, 0.0) for name in found.mesh])
            rows.append(
                (
                    *[str(found.mesh[name]) for name in AXES],
                    sharding,
                    str(found.micro_batches),
                    size(found.memory.peak),
                    "yes" if fits else "no",
                    duration(found.seconds),
                    f"{found.bubble:.1%}",
                    f"{talk / found.seconds if found.seconds else 0.0:.1%}",
                    f"{found.utilization:.1%}",
                )
            )
        return aligned(rows, 0)


def plans(
    make: Callable[[Mapping[str, int], str], Mapping[str, Any]],
    x: Tree,
    ranks: int,
    *,
    target: Tree = None,
    sharding: Collection[str] = SHARDINGS,
    network: Network | None = None,
    device: Device | None = None,
) -> Plans:
    """The plans of all layouts of a model on so many ranks.

    Every way to write ``ranks`` as pipe x data x model is tried, with each of ``sharding``.

    Args:
        make: ``(mesh, sharding) -> arguments``: those of `plan`, of which "model" must be there.
            It raises ValueError for a layout that there is not, such as one of more ranks than
            heads, which is left out, as is one whose ranks do not divide the batch; ``left_out``
            says why.
        x, target: examples of the whole batch of a step.
        ranks: how many.
        sharding: what ``make`` is called with: "none", "zero" for the optimizer's state over the
            ranks of "data", "sharded" for params and gradients too. With one rank of "data" only
            the first is tried.
        network, device: what it would run on; default `Network.h100` and `Device.h100`.

    Returns:
        `Plans`. In print "talk" is the part of a step in which ranks communicate and do not
        compute, and "FLOPs" the part of what the devices could do that a step does.
    Raises:
        ValueError: there is no layout.

    >>> import torch
    >>> import funcnet as fn
    >>> def make(mesh, sharding):
    ...     stage = fn.repeat(fn.residual(fn.linear(1024)), 8 // mesh["pipe"])
    ...     if mesh["model"] > 1:
    ...         raise ValueError("its layers are whole")
    ...     return {"model": [stage] * mesh["pipe"], "optimizer": fn.adam(), "micro_batches": 4}
    >>> plans(make, torch.ones(4096, 1024), 4, sharding=["none"])
    pipe  data  model  sharding  micro     peak  fits    step  bubble   talk  FLOPs
    ----  ----  -----  --------  -----  -------  ----  ------  ------  -----  -----
       1     4      1      none      4   143 MB   yes  174 us    0.0%   0.0%  29.9%
       2     2      1      none      4    84 MB   yes  210 us   16.7%  16.9%  24.9%
       4     1      1      none      4  67.1 MB   yes  405 us   41.0%  28.9%  12.9%
    """
    check_count("plans", ranks=ranks)
    network, device = network or Network.h100(), device or Device.h100()
    found: list[Layout] = []
    left_out: list[str] = []
    for mesh in factorizations(ranks, AXES):
        for kind in sharding if mesh["data"] > 1 else [*sharding][:1]:
            try:
                arguments: dict[str, Any] = {**make(mesh, kind)}
                made = plan(
                    arguments.pop("model"),
                    x,
                    mesh,
                    **{"target": target, "network": network, "device": device, **arguments},
                )
            except ValueError as error:
                left_out.append(f"{layout(mesh)}, {kind}: {error}")
                continue
            found.append(Layout(kind, made, made.memory.peak <= device.memory))
    require(found, "plans: there is no layout:\n" + "\n".join(left_out))
    found.sort(key=lambda each: (not each.fits, each.plan.seconds))
    return Plans(tuple(found), tuple(left_out))


def factorizations(count: int, names: Sequence[str]) -> Iterator[dict[str, int]]:
    """The ways to write a number as a product of so many.

    >>> [*factorizations(3, ("a", "b"))]
    [{'a': 1, 'b': 3}, {'a': 3, 'b': 1}]
    """
    name, *others = names
    if not others:
        yield {name: count}
        return
    for factor in range(1, count + 1):
        if count % factor == 0:
            for rest in factorizations(count // factor, others):
                yield {name: factor, **rest}
