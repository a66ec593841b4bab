"""`total`: a loss of the whole batch, on all ranks; `everywhere`: a metric of what all saw."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcnet.checks import check_kind
from funcnet.core import Fraction, Loss, LossPullback, Tree
from funcnet.distributed.data.buckets import all_summed
from funcnet.distributed.processes.start import AxisName, Mesh, axis_of
from funcnet.errors import require
from funcnet.losses.reductions import divided, of_all_ranks
from funcnet.metrics.core import Accumulated, Metric, summed


def total_rule(residuals: dict[str, Any], dvalue: Tensor | float) -> Tree:
    """``dprediction = numerator's pullback(dvalue / n)`` with the n of all ranks."""
    return residuals["loss"](divided(dvalue, residuals.get("n", 1)))


def _over_batches(name: str, fraction: Callable[[Tree, Tree], Fraction]) -> Metric:
    """A loss as a metric of several batches: of the sums over all of them."""

    def sums(prediction: Any, target: Any, keep: Tensor | None) -> dict[str, Any]:
        require(keep is None, f"{name}: takes no mask", TypeError)
        numerator, n, _ = fraction(prediction, target)
        # A sum is divided by nothing, which is told by a denominator that no mean has.
        return {"numerator": numerator, "denominator": -1 if n is None else n}

    def value(acc: Accumulated) -> Tensor:
        is_mean = acc["denominator"] >= 0
        return acc["numerator"] / torch.where(is_mean, acc["denominator"], 1.0)

    totals = {"numerator": (), "denominator": ()}
    return summed(name, sums, value, totals=totals, like_target=False)


def total(loss: Loss, mesh: Mesh, *, axis: AxisName = "data") -> Loss:
    """The loss of the whole batch, of which each rank has a part.

        (a_0 + ... + a_{n-1}) / (b_0 + ... + b_{n-1})

    with the numerator a and the denominator b of each rank's own value, or none for a sum. So each
    example, token or weight counts the same, whichever rank it is on; the mean of the ranks' means
    is something else where parts have different lengths, masks, weights, or targets that are
    ignored. All ranks get the value. The gradients that the pullbacks lead to are this rank's part
    of the whole, so the optimizer's chain begins with `sum`, not with `mean`.

    Args:
        loss: of the library, with a scalar value; or one with a ``fraction``, see `funcnet.Loss`.
        mesh: that of all ranks, or a dict of the sizes of its axes.
        axis: the ranks that share the batch.

    In `funcnet.evaluate` it is the loss of all batches of all ranks, of which each may have
    another number.

    VJP:
        ``dprediction = d da / (b_0 + ... + b_{n-1})`` with da the derivative of this rank's a.
    Raises:
        ValueError: the loss has a value for each element, or no ``fraction``.

    >>> import funcnet as fn
    >>> loss = total(fn.cross_entropy(ignore_index=0), {"data": 1})
    >>> value, pullback = loss.vjp(torch.zeros(2, 2), torch.tensor([0, 1]))
    >>> value, pullback()
    (tensor(0.6931), tensor([[ 0.0000,  0.0000],
            [ 0.5000, -0.5000]]))
    """
    check_kind("total", loss, Loss, "loss")
    ranks, fraction = axis_of(mesh, axis), loss.fraction
    hint = "a sum over elements, by the number of what counts"
    require(
        fraction is not None,
        f"total: expects a loss with a scalar value that is {hint}, got {loss!r}; use "
        "reduction='mean' or 'sum', or give your Loss a fraction",
    )
    assert fraction is not None
    name = f"total {loss.name}"

    def vjp(prediction: Tree, target: Tree) -> tuple[Tensor, LossPullback]:
        numerator, n, pullback = fraction(prediction, target)
        value, n = of_all_ranks(ranks, numerator, n)
        residuals = {"loss": pullback} if n is None else {"loss": pullback, "n": n}
        return value, LossPullback(total_rule, residuals, (), value, name)

    def apply(prediction: Tree, target: Tree) -> Tensor:
        return vjp(prediction, target)[0]

    return Loss(
        apply,
        vjp,
        loss.name,
        over_batches=everywhere(_over_batches(name, fraction), mesh, axis=axis),
    )


def everywhere(metric: Metric, mesh: Mesh, *, axis: AxisName = "data") -> Metric:
    """The same metric, of the examples of all ranks.

    A rank's accumulator has the sums over its own examples. They are added up over the ranks when
    the value is asked for, so in `funcnet.evaluate` once, and each rank may have another number of
    batches. The value is the same on all ranks.

    Args:
        metric: any of `funcnet.metrics`; `funcnet.metrics.mean` makes one of a function.
        mesh: that of all ranks, or a dict of the sizes of its axes.
        axis: the ranks that share the batch.

    >>> import funcnet as fn
    >>> accuracy = everywhere(fn.metrics.accuracy(), {"data": 1})
    >>> accuracy.of_batch(torch.tensor([0, 1]), torch.tensor([0, 0]))
    tensor(0.5000, dtype=torch.float64)
    """
    if not isinstance(metric, Metric):
        hint = "; fn.metrics.mean(function) makes one, and total is for losses"
        raise TypeError(f"everywhere: expects a Metric, got {type(metric).__name__}{hint}")
    ranks = axis_of(mesh, axis)
    if ranks.size == 1:
        return metric

    def value(acc: Accumulated) -> Tensor:
        names = sorted(acc)
        return metric.value(
            dict(zip(names, all_summed(ranks, [acc[name] for name in names]), strict=True))
        )

    return Metric(metric.init, metric.update, value)
