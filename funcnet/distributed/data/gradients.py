"""`mean` and `sum`: the gradients of all ranks, as the first transform of an optimizer's chain."""

from typing import Any

from funcnet.collectives import Axis
from funcnet.core import Optimizer
from funcnet.distributed.data.buckets import BUCKET_BYTES, all_summed
from funcnet.distributed.processes.start import AxisName, Mesh, axis_of
from funcnet.errors import check_count
from funcnet.optimizers.chains import chained
from funcnet.optimizers.leaves import Leaves
from funcnet.optimizers.lift import stateless


def mean(mesh: Mesh, *, axis: AxisName = "data", bucket_bytes: int = BUCKET_BYTES) -> Optimizer:
    """The mean of the ranks' gradients: data-parallel training.

        g = (g_0 + ... + g_{n-1}) / n

    Each rank has its part of the batch, of equal size, and the loss is the mean over it; then this
    is the gradient of the loss of the whole batch. For parts that do not count the same, use `sum`
    and `total`.

    Args:
        mesh: that of all ranks, or a dict of the sizes of its axes.
        axis: the ranks that share the batch; several names for several axes.
        bucket_bytes: the gradients are put together to vectors of about so many bytes, one
            collective each, and what it gives are views of these.

    It is of gradients alone: the loss and the metrics of a step are those of the rank's own part,
    unless they are a `total` and `everywhere`.

    Params that are parts over these ranks, such as those of `sharded` layers, have the mean of
    their gradients already, and are left as they are: `funcnet.train_step` knows them, and
    `over_parts` tells them to an optimizer in a loop of one's own.

    It is the first of a `funcnet.chain`, so that what follows sees the same on all ranks. With
    ``train_step(micro_batches=k)``, and within `funcnet.optimizers.accumulate`, gradients are added
    up on each rank, and reduced once. Half precision is summed in float32.

    Raises:
        PeerError: another rank failed, or did not come.

    Source: Li et al. 2020, "PyTorch Distributed"; ``DistributedDataParallel``.

    >>> import torch
    >>> import funcnet as fn
    >>> optimizer = fn.chain(fn.distributed.mean({"data": 1}), fn.sgd(0.5))
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update({"w": torch.ones(1)}, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.5000])}
    """
    return reduction("mean", axes_of(mesh, axis), bucket_bytes)


def sum(mesh: Mesh, *, axis: AxisName = "data", bucket_bytes: int = BUCKET_BYTES) -> Optimizer:
    """The sum of the ranks' gradients, for a loss that is the `total` of all ranks.

        g = g_0 + ... + g_{n-1}

    Args:
        mesh, axis, bucket_bytes: see `mean`.

    >>> import torch
    >>> import funcnet as fn
    >>> params = {"w": torch.ones(1)}
    >>> fn.distributed.sum({"data": 1}).update({"w": torch.ones(1)}, {}, params)
    ({'w': tensor([1.])}, {})
    """
    return reduction("sum", axes_of(mesh, axis), bucket_bytes)


def axes_of(mesh: Mesh, names: AxisName) -> list[Axis]:
    """The axes of these names, one after another: params may be parts over some of them."""
    return [axis_of(mesh, each) for each in ((names,) if isinstance(names, str) else names)]


def reduction(name: str, axes: list[Axis], bucket_bytes: int) -> Optimizer:
    """The sum or the mean of the ranks' gradients over each axis."""
    check_count(name, bucket_bytes=bucket_bytes)
    names = [ranks.name for ranks in axes]
    each = [
        over_axis(name, ranks, 1.0 / ranks.size if name == "mean" else 1.0, bucket_bytes)
        for ranks in axes
    ]
    return each[0] if len(each) == 1 else chained(name, dict(zip(names, each, strict=True)))


def over_axis(name: str, ranks: Axis, factor: float, bucket_bytes: int) -> Optimizer:
    """The sum of the gradients of an axis's ranks, times a factor."""

    def update(g: Any, p: Any) -> Any:
        if ranks.size == 1:
            return g
        # They are read here for the last time, and go bucket by bucket.
        left, g.tensors = [*g.tensors], []
        axes = p.axes or [()] * len(left)
        reduced = [ranks in each for each in axes]
        kept = [leaf for leaf, own in zip(left, reduced, strict=True) if own]
        left = [leaf for leaf, own in zip(left, reduced, strict=True) if not own]
        summed = iter(all_summed(ranks, left, factor, bucket_bytes))
        parts = iter(kept)
        found = [next(parts) if own else next(summed) for own in reduced]
        return Leaves(found, fresh=not kept)

    reduces = ((name, ranks),) if ranks.size > 1 else ()
    return stateless(update, name=name, elementwise=True, reduces=reduces)
