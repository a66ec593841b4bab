"""The area under the ROC curve, from counts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcnet import runtime
from funcnet.losses.checks import check_prediction, class_dim
from funcnet.metrics.classes import check_class_count, check_labels, indices, scored
from funcnet.metrics.core import Metric, divide, summed


def auroc(
    thresholds: int | Sequence[float] | Tensor = 200,
    *,
    classes: int | None = None,
    average: str | None = "macro",
    ignore_index: int | None = None,
) -> Metric:
    """The area under the ROC curve, from the counts of the scores between thresholds.

    ``sum_b N_b (P_{>b} + P_b / 2) / (P N)``, where P_b of the P positives and N_b of the N
    negatives have a score in the bin b, at or above one threshold and below the next, and P_{>b}
    of the positives are above it: how often a positive is above a negative, where two in one bin
    count a half.

    The error is at most ``sum_b P_b N_b / (2 P N)``: half of the part of the pairs that are in one
    bin. It is exact where all scores of a bin are equal, such as those that are on the grid.

    Args:
        thresholds: n of them from 0 to 1, evenly spaced, or the thresholds themselves, rising.
        classes: None for two classes, with one score each; else each class against all others.
        average: over the classes that have positives and negatives: "macro", or "weighted" by the
            number of positives; None for each class, shape (classes,).
        ignore_index: a target that does not count.

    Inputs:
        prediction, probabilities of the target's shape, or with ``classes`` (batch, classes, *);
        any scores, if the thresholds span them.
    Returns:
        NaN unless there are positives and negatives.

    Source: ``torchmetrics.AUROC`` with thresholds, to which the corner (0, 0) of the curve is
    added; ``sklearn.metrics.roc_auc_score``, with ``multi_class="ovr"``.

    >>> prediction, target = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1])
    >>> auroc().of_batch(prediction, target)
    tensor(0.7500, dtype=torch.float64)
    """
    if classes is not None:
        check_class_count("auroc", classes)
    average = None if average == "none" else average
    if average not in ("macro", "weighted", None):
        expected = "average to be 'macro', 'weighted' or None"
        raise ValueError(f"auroc: expects {expected}, got {average!r}")
    grid = _grid(thresholds)
    rows, bins = classes or 1, len(grid) + 1

    def sums(prediction: Tensor, target: Tensor, keep: Tensor | None) -> dict[str, Any]:
        scores, positive = _one_against_all(prediction, target, keep, classes)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        bounds = grid.to(scores.dtype).to(scores.device, non_blocking=True)
        index = torch.bucketize(scores, bounds, right=True)
        index = index + bins * torch.arange(rows, device=index.device)
        counted = torch.ones_like(positive) if keep is None else keep.flatten().unsqueeze(1)
        zeros = torch.zeros(rows * bins, dtype=torch.int64, device=index.device)

        def count(chosen: Tensor) -> Tensor:
            counts = zeros.scatter_add(0, index.flatten(), (chosen & counted).long().flatten())
            return counts.unflatten(0, (rows, bins))

        return {"positive": count(positive), "negative": count(~positive)}

    def value(acc: Any) -> Tensor:
        positive, negative = acc["positive"].double(), acc["negative"].double()
        above = positive.sum(1, keepdim=True) - positive.cumsum(1)
        pairs = positive.sum(1) * negative.sum(1)
        areas = divide((negative * (above + positive / 2.0)).sum(1), pairs)
        if classes is None:
            return areas.squeeze(0)
        if average is None:
            return areas
        weight = torch.where(pairs > 0, positive.sum(1) if average == "weighted" else 1.0, 0.0)
        return divide((weight * torch.where(pairs > 0, areas, 0.0)).sum(), weight.sum())

    shapes = dict.fromkeys(("positive", "negative"), (rows, bins))
    return summed("auroc", sums, value, counts=shapes, ignore_index=ignore_index)


def _one_against_all(
    prediction: Any, target: Any, keep: Tensor | None, classes: int | None
) -> tuple[Tensor, Tensor]:
    """Scores, and whether each is a positive's, of shape (examples, classes or 1)."""
    check_prediction("auroc", prediction)
    if classes is None:
        if not isinstance(target, Tensor) or target.shape != prediction.shape:
            shape = tuple(prediction.shape)
            found = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise ValueError(
                f"auroc: expects a target of the prediction's shape {shape}, got {found}; "
                "pass classes for scores of several"
            )
        positive = indices("auroc", target.long(), keep, 2) == 1
        return prediction.reshape(-1, 1), positive.reshape(-1, 1)
    check_labels("auroc", target)
    index = scored("auroc", prediction, target, keep)
    dim = class_dim(prediction)
    if prediction.shape[dim] != classes:
        found_classes = prediction.shape[dim]
        raise ValueError(f"auroc: expects scores of {classes} classes, got {found_classes}")
    each = torch.arange(classes, device=index.device)
    scores = prediction.movedim(dim, -1).reshape(-1, classes)
    return scores, index.reshape(-1, 1) == each


def _grid(thresholds: Any) -> Tensor:
    if isinstance(thresholds, int) and not isinstance(thresholds, bool):
        if thresholds < 2:
            raise ValueError(f"auroc: expects at least 2 thresholds, got {thresholds}")
        return torch.linspace(0.0, 1.0, thresholds, dtype=torch.float64, device="cpu")
    grid = torch.as_tensor(thresholds, dtype=torch.float64)
    values = runtime.read(grid)
    if grid.dim() != 1 or (values is not None and values != sorted(values)) or not grid.numel():
        raise ValueError(f"auroc: expects a row of thresholds in rising order, got {thresholds!r}")
    return grid
