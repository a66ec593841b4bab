"""Precision, recall and their mean, for two classes or many."""

from collections.abc import Callable
from numbers import Real
from typing import Any

from torch import Tensor

from funcnet.metrics.classes import check_class_count, count_classes, labels
from funcnet.metrics.core import Metric, divide, summed

AVERAGES = ("binary", "micro", "macro", "weighted", None)


def precision(
    classes: int = 2,
    average: str | None = "binary",
    *,
    threshold: float = 0.5,
    ignore_index: int | None = None,
    zero_division: float = 0.0,
    pos_label: int = 1,
) -> Metric:
    """How much of what was predicted as a class is of it: ``TP / (TP + FP)``.

    Args:
        classes: their number.
        average: "binary", of the class ``pos_label`` of two; "micro", of the sums over the
            classes; "macro", the mean over the classes that are predicted or in the target;
            "weighted", the mean weighted by the number of the target's examples; None, of each
            class, shape (classes,).
        threshold: of predictions of the target's shape, which mean class 1 above it.
        ignore_index: a target that does not count.
        zero_division: the value where the denominator is 0.
        pos_label: the class of "binary".

    Inputs:
        see `funcnet.metrics`.

    Source: ``sklearn.metrics.precision_score``, ``torchmetrics.Precision``.

    >>> prediction, target = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1])
    >>> precision().of_batch(prediction, target)
    tensor(0.6667, dtype=torch.float64)
    """
    return _of_counts(
        "precision",
        lambda hits, predicted, actual: (hits, predicted),
        (classes, average, threshold, ignore_index, zero_division, pos_label),
    )


def recall(
    classes: int = 2,
    average: str | None = "binary",
    *,
    threshold: float = 0.5,
    ignore_index: int | None = None,
    zero_division: float = 0.0,
    pos_label: int = 1,
) -> Metric:
    """How much of a class was predicted as it: ``TP / (TP + FN)``.

    With "macro" it is the balanced accuracy.

    Args:
        classes, average, threshold, ignore_index, zero_division, pos_label: as for `precision`.

    Source: ``sklearn.metrics.recall_score``, ``torchmetrics.Recall``.

    >>> prediction, target = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1])
    >>> recall(average=None).of_batch(prediction, target)
    tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    return _of_counts(
        "recall",
        lambda hits, predicted, actual: (hits, actual),
        (classes, average, threshold, ignore_index, zero_division, pos_label),
    )


def f1(
    classes: int = 2,
    average: str | None = "binary",
    *,
    threshold: float = 0.5,
    ignore_index: int | None = None,
    zero_division: float = 0.0,
    pos_label: int = 1,
) -> Metric:
    """The harmonic mean of precision and recall: ``2 TP / (2 TP + FP + FN)``.

    Args:
        classes, average, threshold, ignore_index, zero_division, pos_label: as for `precision`.

    Source: ``sklearn.metrics.f1_score``, ``torchmetrics.F1Score``.

    >>> prediction, target = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1])
    >>> f1().of_batch(prediction, target)
    tensor(0.8000, dtype=torch.float64)
    """
    options = (classes, average, threshold, ignore_index, zero_division, pos_label)
    return _of_counts("f1", _fbeta(1.0), options)


def fbeta(
    beta: float,
    classes: int = 2,
    average: str | None = "binary",
    *,
    threshold: float = 0.5,
    ignore_index: int | None = None,
    zero_division: float = 0.0,
    pos_label: int = 1,
) -> Metric:
    """``(1 + beta^2) TP / ((1 + beta^2) TP + FP + beta^2 FN)``.

    Args:
        beta: how many times as much recall counts as precision, a number > 0.
        classes, average, threshold, ignore_index, zero_division, pos_label: as for `precision`.

    Source: ``sklearn.metrics.fbeta_score``, ``torchmetrics.FBetaScore``.

    >>> prediction, target = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1])
    >>> fbeta(2.0).of_batch(prediction, target)
    tensor(0.9091, dtype=torch.float64)
    """
    if not isinstance(beta, Real) or not float(beta) > 0.0:
        raise ValueError(f"fbeta: expects beta > 0, got {beta!r}")
    options = (classes, average, threshold, ignore_index, zero_division, pos_label)
    return _of_counts("fbeta", _fbeta(beta), options)


def _fbeta(beta: float) -> Callable[..., tuple[Tensor, Tensor]]:
    square = beta**2

    def ratio(hits: Tensor, predicted: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
        return (1.0 + square) * hits, predicted + square * actual

    return ratio


def _of_counts(
    name: str, ratio: Callable[..., tuple[Tensor, Tensor]], options: tuple[Any, ...]
) -> Metric:
    """A ratio of TP, TP + FP and TP + FN, which are counted for each class."""
    classes, average, threshold, ignore_index, zero_division, pos_label = options
    check_class_count(name, classes)
    average = None if average == "none" else average
    if average not in AVERAGES:
        raise ValueError(f"{name}: expects average to be one of {[*AVERAGES]}, got {average!r}")
    if average == "binary" and classes != 2:
        raise ValueError(
            f"{name}: expects another average than 'binary' for {classes} classes: "
            "'micro', 'macro', 'weighted' or None"
        )
    if pos_label not in range(classes):
        raise ValueError(f"{name}: expects pos_label of 0 or 1, got {pos_label!r}")
    if isinstance(zero_division, bool) or zero_division not in (0, 1):
        raise ValueError(f"{name}: expects zero_division of 0 or 1, got {zero_division!r}")
    instead = float(zero_division)

    def sums(prediction: Tensor, target: Tensor, keep: Tensor | None) -> dict[str, Any]:
        predicted, target = labels(name, prediction, target, keep, threshold, classes)
        hits = predicted == target
        return {
            "hits": count_classes(target, hits if keep is None else hits & keep, classes),
            "predicted": count_classes(predicted, keep, classes),
            "actual": count_classes(target, keep, classes),
        }

    def value(acc: Any) -> Tensor:
        counts = [acc[key] for key in ("hits", "predicted", "actual")]
        if average == "micro":
            return divide(*ratio(*[count.sum() for count in counts]), instead)
        of_class = divide(*ratio(*counts), instead)
        if average is None:
            return of_class
        if average == "binary":
            return of_class.select(0, pos_label)
        _, predicted, actual = counts
        weight = actual if average == "weighted" else ((predicted + actual) > 0)
        return divide((weight * of_class).sum(), weight.sum(), instead)

    shapes = dict.fromkeys(("hits", "predicted", "actual"), (classes,))
    return summed(name, sums, value, counts=shapes, ignore_index=ignore_index)
