"""`replicated`: a layer whose gradients are summed over ranks while its backward pass goes on."""

from collections.abc import Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet import tree
from funcnet.checks import check_kind
from funcnet.collectives import Axis, sum_dtype
from funcnet.core import (
    Forward,
    Grads,
    Key,
    Layer,
    Params,
    Pullback,
    Sums,
    Tree,
    around,
    pull,
)
from funcnet.distributed.data.buckets import BUCKET_BYTES, Summed
from funcnet.distributed.data.gradients import axes_of
from funcnet.distributed.processes.start import AxisName, Mesh, axis_of
from funcnet.errors import check_count, require
from funcnet.lift import stateful
from funcnet.parted_params import Splits, for_each_form, has_parts, placements


class Place:
    """Where the reduced gradients of one leaf of the params come; several, if it is used again."""

    __slots__ = ("gradients", "is_part")

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []
        self.is_part = False
        """Whether it is a part over these ranks, whose gradients are reduced already."""

    def taken(self) -> Tensor:
        """The sum of what came."""
        first, *others = self.gradients
        for each in others:
            first = first + each
        return first


class Filling(list[tuple[Place, Tensor]]):
    """The gradients of a bucket that is not full yet, each with its place."""

    size = 0


class Buckets:
    """Takes gradients as they come, and starts to sum each bucket over the ranks when it is full.

    All ranks run one program, so on all of them the same gradients come in the same order.
    """

    def __init__(self, axis: Axis, factor: float, bucket_bytes: int) -> None:
        self._axis, self._factor, self._bytes = axis, factor, bucket_bytes
        self._filling: dict[tuple[torch.dtype, torch.device], Filling] = {}
        self._started: list[tuple[list[Place], Summed]] = []

    def take(self, place: Place, gradient: Tensor) -> None:
        """Put a gradient into the bucket of its dtype and device."""
        if place.is_part or not gradient.numel():
            place.gradients.append(gradient)
            return
        kind = sum_dtype(gradient.dtype), gradient.device
        filling = self._filling.setdefault(kind, Filling())
        filling.append((place, gradient))
        filling.size += gradient.numel() * kind[0].itemsize
        if filling.size >= self._bytes:
            self._start(self._filling.pop(kind))

    def _start(self, filling: Filling) -> None:
        places, gradients = zip(*filling, strict=True)
        self._started.append(([*places], Summed(self._axis, gradients, self._factor)))

    def finish(self) -> None:
        """Wait for all, and bring the sums to their places."""
        while self._filling:
            self._start(self._filling.pop(next(iter(self._filling))))
        for places, summed in self._started:
            for place, gradient in zip(places, summed.tensors(), strict=True):
                place.gradients.append(gradient)


class Reduced(Sums):
    """What a rule gets for ``params`` where gradients go to `Buckets` as they come.

    ``total`` is a tree like the params, of places.
    """

    __slots__ = ("buckets",)

    def __init__(self, total: Tree, buckets: Buckets) -> None:
        super().__init__(total)
        self.buckets = buckets

    def of(self, total: Tree) -> "Reduced":
        """The same for a child's gradients."""
        return Reduced(total, self.buckets)

    def plus(self, dparams: Tree) -> Tree:
        """The places, to which the gradients of a layer come later."""
        places: dict[str, Any] = tree.to_dotted(self.total)
        for path, gradient in tree.to_dotted(dparams).items():
            self.buckets.take(places[path], gradient)
        return self.total


def replicated_rule(
    residuals: Any,
    dy: Tree,
    treedef: Any,
    axis: Axis,
    factor: float,
    bucket_bytes: int,
    parts: tuple[str, ...],
    *,
    params: bool,
    x: bool,
) -> Grads:
    """The layer's own pullback, with the sums of its dparams over the ranks, times a factor."""
    if not params:
        return pull(residuals, "", dy, params=False, x=x)
    total = treedef.unflatten([Place() for _ in range(treedef.num_leaves)])
    places: dict[str, Any] = tree.to_dotted(total)
    for path in parts:
        places[path].is_part = True
    buckets = Buckets(axis, factor, bucket_bytes)
    _, dx = pull(residuals, "", dy, params=Reduced(total, buckets), x=x)
    buckets.finish()
    # Inside `freeze` and `lora` some leaves have none.
    reached = {path: place for path, place in places.items() if place.gradients}
    if len(reached) < len(places):
        total = tree.from_dotted(reached)
    return optree.tree_map(Place.taken, total), dx


def replicated(
    layer: Layer,
    mesh: Mesh,
    *,
    axis: AxisName = "data",
    reduction: str = "mean",
    bucket_bytes: int = BUCKET_BYTES,
) -> Layer:
    """The same layer, whose pullback gives the mean of the ranks' dparams.

    It is `mean` for the params of a layer, in the backward pass itself: as soon as the layers in it
    have made gradients for a bucket, its reduction starts, and goes on while the layers before them
    make theirs. The pullback waits for all before it returns. So the more layers are in it, the
    less the network's time is seen: it is best put around the whole net. Under ``jit`` the same
    buckets are reduced one after another, where the program comes to them.

    Args:
        layer: a net, or a block of one. Its gradients are reduced here, and nowhere else: the
            optimizer's chain has no `mean`, or one that is `funcnet.optimizers.masked` to the rest.
        mesh: that of all ranks, or a dict of the sizes of its axes.
        axis: the ranks that share the batch.
        reduction: "mean", or "sum" for a `total` loss.
        bucket_bytes: about how many bytes are reduced at once.

    Params that are parts over these ranks, such as those of `sharded` layers, have the mean of
    their gradients already, and are left as they are.

    With ``train_step(micro_batches=k)`` it reduces k times, where `mean` does it once.

    Params, State, key: those of the layer.
    VJP:
        that of the layer, with ``dparams = (dparams_0 + ... + dparams_{n-1}) / n``.
    Raises:
        ValueError: layers in it sum the gradients of their parts, and it takes means, or the
            other way round.

    Source: Li et al. 2020, "PyTorch Distributed"; ``DistributedDataParallel``.

    >>> import funcnet as fn
    >>> net = replicated(fn.serial(fn.linear(3), fn.relu()), {"data": 1})
    >>> params, _ = net.init(fn.key(0), torch.ones(4, 2))
    >>> y, pullback, _ = net.vjp(params, torch.ones(4, 2))
    >>> list(fn.tree.to_dotted(pullback(y)[0]))
    ['0.weight', '0.bias']
    """
    check_kind("replicated", layer, Layer, "layer")
    check_count("replicated", bucket_bytes=bucket_bytes)
    kinds = ("mean", "sum")
    require(reduction in kinds, f"replicated: reduction must be one of {kinds}, got {reduction!r}")
    ranks = axis_of(mesh, axis)
    factor = 1.0 / ranks.size if reduction == "mean" else 1.0

    several = axes_of(mesh, axis)
    parts_of = for_each_form(lambda x: _parts_over(ranks, several, reduction, placements(layer, x)))
    parted = has_parts(layer)

    def apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Any:
        return layer.apply(params, x, state, key=key, train=train)

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        y, pullback, state = layer.forward(params, x, state, key, train)
        if ranks.size == 1:
            return y, pullback, state
        treedef = tree.flatten(params)[1]
        static = treedef, ranks, factor, bucket_bytes, parts_of(x) if parted else ()
        return y, Pullback(replicated_rule, {"": pullback}, static), state

    def again(layer: Layer) -> Layer:
        return replicated(layer, mesh, axis=axis, reduction=reduction, bucket_bytes=bucket_bytes)

    return stateful(layer.init, forward, apply=apply, name="replicated", **around(layer, again))


def _parts_over(
    ranks: Axis, several: Sequence[Axis], reduction: str, placed: Mapping[str, Splits]
) -> tuple[str, ...]:
    """The paths of the params that are parts over these ranks, as their layers reduced them."""
    found = []
    for path, splits in placed.items():
        for split in splits:
            if split.axis.size == 1 or split.axis not in (ranks, *several):
                continue
            require(
                split.axis == ranks,
                f"replicated: {path!r} is a part over {split.axis.name!r} alone, and the gradients "
                f"are reduced over {ranks.name!r}: use mean in the optimizer's chain",
            )
            require(
                split.reduced in ("", reduction),
                f"replicated: the gradient of {path!r} is the {split.reduced} of the ranks', and "
                f"reduction is {reduction!r}: see `sums` of the layer",
            )
            found.append(path)
    return tuple(found)
