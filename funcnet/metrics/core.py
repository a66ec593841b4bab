"""What a metric is, and the lift from the sums over a batch to one."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet import tree
from funcnet.checks import check_tensors
from funcnet.core import Loss, Tree

Accumulated = Mapping[str, Tensor]
"""A dict of sums over examples."""

Sums = Callable[[Any, Any, Tensor | None], Mapping[str, Tensor | int]]
"""``(prediction, target, keep) -> sums``; keep, unless None, says which elements count."""


class Metric(NamedTuple):
    """Three pure functions, ``(init, update, value)``; see `funcnet.metrics`.

    ``init(device=None) -> acc`` is of no examples, ``update(acc, prediction, target, mask=None)
    -> acc`` adds those of a batch, and ``value(acc)`` is the metric of all of them.
    """

    init: Callable[..., dict[str, Tensor]]
    update: Callable[..., dict[str, Tensor]]
    value: Callable[[Accumulated], Tensor]

    def of_batch(self, prediction: Tree, target: Tree) -> Tensor:
        """The value of one batch.

        >>> import funcnet as fn
        >>> fn.metrics.accuracy().of_batch(torch.tensor([0, 1]), torch.tensor([0, 0]))
        tensor(0.5000, dtype=torch.float64)
        """
        check_tensors("of_batch", "prediction and target", (prediction, target))
        acc = self.init(tree.device_of(prediction))
        return self.value(self.update(acc, prediction, target))


def summed(
    name: str,
    sums: Sums,
    value: Callable[[Any], Tensor],
    *,
    counts: Mapping[str, tuple[int, ...]] | None = None,
    totals: Mapping[str, tuple[int, ...]] | None = None,
    ignore_index: int | None = None,
    like_target: bool = True,
) -> Metric:
    """A metric, from the sums over a batch and what its value is of the sums over all.

    Args:
        name: what errors call it.
        sums: ``(prediction, target, keep) -> {name: sum}``; keep is None, or a tensor of bools,
            false for what does not count.
        value: of a dict of such sums.
        counts: the names and shapes of the int64 sums.
        totals: those of the float64 sums.
        ignore_index: a target that does not count.
        like_target: whether keep has the target's shape, or that of the mask that was given.

    >>> def sums(prediction, target, keep):
    ...     return {"total": prediction.sum(), "n": prediction.numel()}
    >>> average = summed("average", sums, lambda acc: acc["total"] / acc["n"],
    ...                  counts={"n": ()}, totals={"total": ()})
    >>> average.of_batch(torch.tensor([1.0, 2.0]), None)
    tensor(1.5000, dtype=torch.float64)
    """
    kinds = {
        **{key: (shape, torch.int64) for key, shape in (counts or {}).items()},
        **{key: (shape, torch.float64) for key, shape in (totals or {}).items()},
    }
    if ignore_index is not None and (
        isinstance(ignore_index, bool) or not isinstance(ignore_index, int)
    ):
        raise TypeError(f"{name}: expects an integer as ignore_index, got {ignore_index!r}")

    def init(device: torch.device | str | None = None) -> dict[str, Tensor]:
        return {
            key: torch.zeros(shape, dtype=dtype, device=device)
            for key, (shape, dtype) in kinds.items()
        }

    def update(
        acc: Accumulated, prediction: Any, target: Any, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        if not isinstance(acc, Mapping) or acc.keys() != kinds.keys():
            found = sorted(acc) if isinstance(acc, Mapping) else type(acc).__name__
            raise ValueError(f"{name}: expects acc with {sorted(kinds)}, got {found}")
        check_tensors(name, "prediction and target", (prediction, target))
        keep = _kept(name, target, ignore_index, mask, like_target)
        of_batch = sums(prediction, target, keep)
        return {
            key: acc[key] + _as_dtype(of_batch[key], dtype) for key, (_, dtype) in kinds.items()
        }

    return Metric(init, update, value)


def _as_dtype(value: Tensor | int, dtype: torch.dtype) -> Tensor | int:
    return value.to(dtype) if isinstance(value, Tensor) else value


def _kept(
    name: str, target: Any, ignore_index: int | None, mask: Any, like_target: bool
) -> Tensor | None:
    """Which elements of the target count; None for all of them."""
    keep = None
    if ignore_index is not None:
        if not isinstance(target, Tensor):
            raise TypeError(
                f"{name}: expects a tensor as target for ignore_index, got {tree.describe(target)}"
            )
        keep = target != ignore_index
    if mask is None:
        return keep
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name}: expects a mask of bools, got {tree.describe(mask)}")
    if like_target and isinstance(target, Tensor):
        mask = spread(name, mask, target.shape)
    return mask if keep is None else keep & mask


def spread(name: str, mask: Tensor, shape: torch.Size) -> Tensor:
    """A mask of the leading dimensions of a shape, such as of the examples, as one of it all.

    >>> spread("f", torch.tensor([True, False]), torch.Size([2, 2]))
    tensor([[ True,  True],
            [False, False]])
    """
    if mask.shape != shape[: mask.dim()]:
        raise ValueError(
            f"{name}: expects a mask of the shape {tuple(shape)} or its first dimensions, "
            f"got {tuple(mask.shape)}"
        )
    return mask.reshape(mask.shape + (1,) * (len(shape) - mask.dim())).expand(shape)


def masked(metric: Metric) -> Metric:
    """A metric whose target is ``(target, mask)``: an example with a mask of False counts nothing.

    For batches that are filled up to one size, as `funcnet.scan` and `funcnet.jit` like them.

    Args:
        metric: any metric of this module. A mask has the target's shape, or that of its first
            dimensions, such as (batch,).

    >>> import funcnet as fn
    >>> accuracy = masked(fn.metrics.accuracy())
    >>> target, mask = torch.tensor([0, 0, 0]), torch.tensor([True, True, False])
    >>> accuracy.of_batch(torch.tensor([0, 1, 1]), (target, mask))
    tensor(0.5000, dtype=torch.float64)
    """
    if not isinstance(metric, Metric):
        raise TypeError(f"masked: expects a Metric, got {type(metric).__name__}")

    def update(acc: Accumulated, prediction: Tree, target: Any) -> dict[str, Tensor]:
        if not isinstance(target, (tuple, list)) or len(target) != 2:
            raise ValueError(f"masked: expects (target, mask), got {tree.describe(target)}")
        return metric.update(acc, prediction, *target)

    return Metric(metric.init, update, metric.value)


def count_of(elements: Tensor, keep: Tensor | None) -> Tensor | int:
    """How many elements count."""
    return elements.numel() if keep is None else keep.sum()


def total_of(elements: Tensor, keep: Tensor | None) -> Tensor:
    """The sum of the elements that count; in float64, or for bools in int64."""
    if keep is not None:
        elements = torch.where(keep, elements, torch.zeros_like(elements))
    return elements.sum(dtype=torch.int64 if elements.dtype == torch.bool else torch.float64)


def divide(a: Tensor, b: Tensor, zero_division: float | None = None) -> Tensor:
    """``a / b`` in float64; where b is 0, NaN or ``zero_division``."""
    ratio = a.double() / b.double()
    return ratio if zero_division is None else torch.where(b == 0, zero_division, ratio)


def batch_function(metric: Any, where: str = "") -> Callable[[Tree, Tree], Tensor]:
    """The function ``(prediction, target) -> tensor`` of a `Metric`, a `Loss` or a function."""
    if isinstance(metric, Metric):
        return metric.of_batch
    if isinstance(metric, Loss):
        return metric.apply
    made = getattr(metric, "__annotations__", {}).get("return")
    if not callable(metric) or made in (Metric, Loss):
        got = f"{metric.__name__}; call it" if callable(metric) else type(metric).__name__
        message = f"{where} expects a Metric, a Loss or a function as a metric, got {got}"
        raise TypeError(message.lstrip())
    return metric
