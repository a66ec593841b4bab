"""Metrics that are means over examples, or functions of such: errors, perplexity, r2."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import Loss, Tree
from funcnet.losses.checks import class_dim
from funcnet.metrics.classes import scored
from funcnet.metrics.core import (
    Metric,
    batch_function,
    count_of,
    divide,
    spread,
    summed,
    total_of,
)


def mean(function: Loss | Callable[[Tree, Tree], Tensor]) -> Metric:
    """The mean of a function of prediction and target over all examples.

    Args:
        function: a `funcnet.Loss`, best with ``reduction="none"``, or a function
            ``(prediction, target) -> tensor``. Of a tensor with dimensions each element counts
            one. A scalar stands for the mean over the batch: it counts as many times as the
            prediction has examples, the extent of its first dimension. A mask needs elements.

    Returns:
        NaN without examples.

    >>> import funcnet as fn
    >>> distance = mean(lambda prediction, target: (prediction - target).abs())
    >>> distance.of_batch(torch.tensor([1.0, 2.0]), torch.zeros(2))
    tensor(1.5000, dtype=torch.float64)
    """
    if isinstance(function, Metric) or not (isinstance(function, Loss) or callable(function)):
        raise TypeError(f"mean: expects a Loss or a function, got {type(function).__name__}")
    apply = batch_function(function)

    def sums(prediction: Tree, target: Tree, keep: Tensor | None) -> dict[str, Any]:
        value = apply(prediction, target)
        if keep is not None:
            if value.dim() < max(keep.dim(), 1):
                raise ValueError(
                    "mean: expects a value for each example where a mask is given, got "
                    f"{tuple(value.shape)}; pass reduction='none' to the loss"
                )
            keep = spread("mean", keep, value.shape)
        return sum_and_count(value, examples_of(prediction), keep)

    return summed("mean", sums, mean_value, like_target=False, **MEAN)


MEAN: Any = {"counts": {"count": ()}, "totals": {"total": ()}}


def mean_value(acc: Any) -> Tensor:
    """The mean, of a total and a count."""
    return divide(acc["total"], acc["count"])


def sum_and_count(value: Tensor, examples: int, keep: Tensor | None = None) -> dict[str, Any]:
    """The sum of a value and its count: of its elements, or for a scalar as the examples' mean."""
    if not value.dim():
        # Not NaN times 0: the mean over no examples is none of theirs.
        total = value.double() * examples if examples else 0.0 * torch.zeros_like(value)
        return {"total": total, "count": examples}
    return {"total": total_of(value, keep), "count": count_of(value, keep)}


def examples_of(x: Tree) -> int:
    """The extent of the first dimension of the first tensor of a tree; 1 of a scalar."""
    for leaf in tree.leaves(x):
        if isinstance(leaf, Tensor):
            return leaf.shape[0] if leaf.dim() else 1
    raise ValueError(f"expects a tensor, got {tree.describe(x)}")


def perplexity(ignore_index: int | None = None) -> Metric:
    """``exp(-sum log p / count)``, where p is the probability of the target's class.

    Args:
        ignore_index: a target that does not count.

    Inputs:
        prediction, logits ``(batch, classes, *)``, as `funcnet.losses.cross_entropy` takes them;
        target, class indices ``(batch, *)``.
    Returns:
        NaN without examples.

    Source: ``torchmetrics.text.Perplexity``, whose classes are the last dimension.

    >>> perplexity().of_batch(torch.zeros(3, 8), torch.tensor([0, 1, 2]))
    tensor(8.0000, dtype=torch.float64)
    """

    def sums(prediction: Tensor, target: Tensor, keep: Tensor | None) -> dict[str, Any]:
        index = scored("perplexity", prediction, target, keep)
        dim = class_dim(prediction)
        logits = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        surprise = -torch.log_softmax(logits, dim).gather(dim, index.unsqueeze(dim)).squeeze(dim)
        return {"total": total_of(surprise, keep), "count": count_of(surprise, keep)}

    return summed(
        "perplexity", sums, lambda acc: mean_value(acc).exp(), ignore_index=ignore_index, **MEAN
    )


def mean_squared_error(squared: bool = True) -> Metric:
    """``sum (y - t)^2 / count``.

    Args:
        squared: False for the root of it.

    Inputs:
        prediction and target, of one shape.

    Source: ``sklearn.metrics.mean_squared_error``, ``torchmetrics.MeanSquaredError``.

    >>> mean_squared_error().of_batch(torch.tensor([1.0, 3.0]), torch.zeros(2))
    tensor(5., dtype=torch.float64)
    """

    def value(acc: Any) -> Tensor:
        return mean_value(acc) if squared else mean_value(acc).sqrt()

    return summed("mean_squared_error", _of_errors("mean_squared_error", 2), value, **MEAN)


def mean_absolute_error() -> Metric:
    """``sum |y - t| / count``.

    Inputs:
        prediction and target, of one shape.

    Source: ``sklearn.metrics.mean_absolute_error``, ``torchmetrics.MeanAbsoluteError``.

    >>> mean_absolute_error().of_batch(torch.tensor([1.0, -3.0]), torch.zeros(2))
    tensor(2., dtype=torch.float64)
    """
    sums = _of_errors("mean_absolute_error", 1)
    return summed("mean_absolute_error", sums, mean_value, **MEAN)


def _of_errors(name: str, power: int) -> Callable[..., dict[str, Any]]:
    def sums(prediction: Any, target: Any, keep: Tensor | None) -> dict[str, Any]:
        y, t = _pair(name, prediction, target)
        error = (y - t).abs()
        return {"total": total_of(error**power, keep), "count": count_of(error, keep)}

    return sums


def _pair(name: str, prediction: Any, target: Any) -> tuple[Tensor, Tensor]:
    """Both in float64; raises unless they have one shape: nothing broadcasts."""
    for what, value in (("prediction", prediction), ("target", target)):
        if not isinstance(value, Tensor) or value.is_complex():
            raise TypeError(f"{name}: expects a tensor as {what}, got {tree.describe(value)}")
    if prediction.shape != target.shape:
        raise ValueError(
            f"{name}: expects a target of the prediction's shape {tuple(prediction.shape)}, "
            f"got {tuple(target.shape)}"
        )
    return prediction.double(), target.double()


def r2(outputs: int = 1, multioutput: str = "uniform_average") -> Metric:
    """The coefficient of determination: ``1 - sum (y - t)^2 / sum (t - mean(t))^2``.

    The denominator is ``sum t^2 - (sum t)^2 / count``, in float64: it loses digits where the mean
    of t is far greater than its spread.

    Args:
        outputs: the number of columns of prediction and target; with 1 their shape is any.
        multioutput: over the columns, "uniform_average", the mean; "variance_weighted", weighted
            by the denominators; "raw_values", one for each, shape (outputs,).

    Inputs:
        prediction and target, (batch, outputs), or of any one shape.
    Returns:
        where t is constant, 1 if all errors are 0, and else 0; NaN without examples.

    Source: ``sklearn.metrics.r2_score``, ``torchmetrics.R2Score``.

    >>> r2().of_batch(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([1.0, 2.0, 3.0]))
    tensor(0.5000, dtype=torch.float64)
    """
    if isinstance(outputs, bool) or not isinstance(outputs, int) or outputs < 1:
        raise ValueError(f"r2: expects outputs of at least 1, got {outputs!r}")
    kinds = ("uniform_average", "raw_values", "variance_weighted")
    if multioutput not in kinds:
        raise ValueError(f"r2: expects multioutput to be one of {[*kinds]}, got {multioutput!r}")

    def sums(prediction: Any, target: Any, keep: Tensor | None) -> dict[str, Any]:
        y, t = _pair("r2", prediction, target)
        if outputs > 1 and (t.dim() < 2 or t.shape[-1] != outputs):
            raise ValueError(f"r2: expects (batch, {outputs}), got {tuple(t.shape)}")
        y, t = y.reshape(-1, outputs), t.reshape(-1, outputs)
        kept = torch.ones_like(t) if keep is None else keep.reshape(-1, outputs).double()
        if keep is not None:
            y, t = torch.where(kept > 0, y, 0.0), torch.where(kept > 0, t, 0.0)
        totals = {"errors": (y - t) ** 2, "squares": t**2, "targets": t}
        return {"count": kept.long().sum(0), **{key: v.sum(0) for key, v in totals.items()}}

    def value(acc: Any) -> Tensor:
        errors, count = acc["errors"], acc["count"].double()
        spreads = (acc["squares"] - acc["targets"] ** 2 / count).clamp(min=0.0)
        constant = torch.where(errors > 0, 0.0, 1.0)
        scores = torch.where(spreads > 0, 1.0 - errors / spreads, constant)
        scores = torch.where(count > 0, scores, torch.nan)
        if multioutput == "raw_values" and outputs > 1:
            return scores
        if multioutput == "variance_weighted":
            weighted = (spreads * scores).sum() / spreads.sum()
            return torch.where(spreads.sum() > 0, weighted, scores.mean())
        return scores.mean()

    shape = (outputs,)
    totals = dict.fromkeys(("errors", "squares", "targets"), shape)
    return summed("r2", sums, value, counts={"count": shape}, totals=totals)
