"""Metrics of classes: accuracy, top-k accuracy, the confusion matrix."""

from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.losses.checks import check_indices, check_prediction, class_dim
from funcnet.metrics.core import Metric, count_of, divide, summed, total_of


def accuracy(threshold: float = 0.5, ignore_index: int | None = None) -> Metric:
    """The part of the examples whose class is predicted: ``correct / count``.

    Args:
        threshold: of predictions of the target's shape, which mean class 1 above it: 0.5 for
            probabilities, 0.0 for logits.
        ignore_index: a target that does not count.

    Inputs:
        see `funcnet.metrics`. Of several scores the class is that of the greatest one, of equal
        ones the first.
    Returns:
        NaN without examples.

    Source: ``sklearn.metrics.accuracy_score``, ``torchmetrics.Accuracy`` with "micro".

    >>> accuracy().of_batch(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0]))
    tensor(0.5000, dtype=torch.float64)
    """

    def sums(prediction: Tensor, target: Tensor, keep: Tensor | None) -> dict[str, Any]:
        predicted, target = labels("accuracy", prediction, target, keep, threshold)
        return {
            "correct": total_of(predicted == target, keep),
            "count": count_of(target, keep),
        }

    return summed("accuracy", sums, _accuracy, counts=_CORRECT, ignore_index=ignore_index)


def top_k_accuracy(k: int, ignore_index: int | None = None) -> Metric:
    """The part of the examples whose class has one of the k greatest scores.

    Of equal scores the first count as greater, so that with k of 1 this is `accuracy`.

    Args:
        k: at least 1.
        ignore_index: a target that does not count.

    Inputs:
        prediction, scores ``(batch, classes, *)``; target, class indices.
    Returns:
        NaN without examples.

    Source: ``sklearn.metrics.top_k_accuracy_score``, ``torchmetrics.Accuracy(top_k=k)``.

    >>> scores = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.2, 0.3]])
    >>> top_k_accuracy(2).of_batch(scores, torch.tensor([1, 1]))
    tensor(0.5000, dtype=torch.float64)
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"top_k_accuracy: expects k of at least 1, got {k!r}")

    def sums(prediction: Tensor, target: Tensor, keep: Tensor | None) -> dict[str, Any]:
        classes = scored("top_k_accuracy", prediction, target, keep)
        dim = class_dim(prediction)
        index = classes.unsqueeze(dim)
        score = prediction.gather(dim, index)
        order = torch.arange(prediction.shape[dim], device=prediction.device)
        order = order.reshape([-1 if d == dim else 1 for d in range(prediction.dim())])
        # Not "greater": a score of NaN is below no other, and a target's has all above it.
        above = ~(prediction <= score) | ((prediction == score) & (order < index))
        hits = above.sum(dim) < k
        return {"correct": total_of(hits, keep), "count": count_of(classes, keep)}

    return summed("top_k_accuracy", sums, _accuracy, counts=_CORRECT, ignore_index=ignore_index)


_CORRECT: dict[str, tuple[int, ...]] = {"correct": (), "count": ()}


def _accuracy(acc: Any) -> Tensor:
    return divide(acc["correct"], acc["count"])


def confusion_matrix(
    classes: int,
    threshold: float = 0.5,
    ignore_index: int | None = None,
    normalize: str | None = None,
) -> Metric:
    """How many examples of the class i, the row, were predicted as the class j, the column.

    Args:
        classes: their number.
        threshold: see `accuracy`.
        ignore_index: a target that does not count.
        normalize: None for int64 counts; "true", "pred" or "all" to divide them by the sum of
            their row, of their column, or of all.

    Returns:
        (classes, classes); divided by a sum of 0, 0.

    Source: ``sklearn.metrics.confusion_matrix``, ``torchmetrics.ConfusionMatrix``.

    >>> prediction, target = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1])
    >>> confusion_matrix(2).of_batch(prediction, target)
    tensor([[1, 1],
            [0, 2]])
    """
    name = "confusion_matrix"
    check_class_count(name, classes)
    dims = {"true": (1,), "pred": (0,), "all": (0, 1)}
    if normalize is not None and normalize not in dims:
        expected = f"normalize to be None or one of {[*dims]}"
        raise ValueError(f"{name}: expects {expected}, got {normalize!r}")

    def sums(prediction: Tensor, target: Tensor, keep: Tensor | None) -> dict[str, Any]:
        predicted, target = labels(name, prediction, target, keep, threshold, classes)
        counts = count_classes(target * classes + predicted, keep, classes**2)
        return {"matrix": counts.unflatten(0, (classes, classes))}

    def value(acc: Any) -> Tensor:
        matrix = acc["matrix"]
        if normalize is None:
            return matrix
        return divide(matrix, matrix.sum(dims[normalize], keepdim=True), 0.0)

    return summed(
        name, sums, value, counts={"matrix": (classes, classes)}, ignore_index=ignore_index
    )


def count_classes(index: Tensor, keep: Tensor | None, classes: int) -> Tensor:
    """How often each class is there, int64.

    >>> count_classes(torch.tensor([0, 2, 2]), None, 3)
    tensor([1, 0, 2])
    """
    ones = torch.ones_like(index) if keep is None else keep.long()
    zeros = torch.zeros(classes, dtype=torch.int64, device=index.device)
    return zeros.scatter_add(0, index.flatten(), ones.flatten())


def scored(name: str, prediction: Any, target: Any, keep: Tensor | None) -> Tensor:
    """The target's class indices, 0 for what does not count, for scores of classes."""
    check_prediction(name, prediction)
    check_labels(name, target)
    dim = class_dim(prediction)
    shape = (*prediction.shape[:dim], *prediction.shape[dim + 1 :])
    if prediction.dim() == 0 or tuple(target.shape) != shape:
        raise ValueError(
            f"{name}: expects a prediction of shape (batch, classes, *) for a target of shape "
            f"{tuple(target.shape)}, got {tuple(prediction.shape)}"
        )
    return indices(name, target, keep, prediction.shape[dim])


def labels(
    name: str,
    prediction: Any,
    target: Any,
    keep: Tensor | None,
    threshold: float,
    classes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The classes that are predicted, and those of the target, int64, both of its shape."""
    if not isinstance(prediction, Tensor) or not isinstance(target, Tensor):
        given = tree.describe((prediction, target))
        raise TypeError(f"{name}: expects tensors as prediction and target, got {given}")
    if prediction.shape == target.shape:
        if not prediction.is_floating_point():
            check_labels(name, target)
            predicted = indices(name, prediction, keep, classes, "predicted classes")
            return predicted, indices(name, target, keep, classes)
        # The targets of binary losses are floats.
        return (prediction > threshold).long(), indices(name, target.long(), keep, 2)
    if prediction.shape == (*target.shape, 1):
        raise ValueError(
            f"{name}: expects scores of two classes or more, got {tuple(prediction.shape)}; "
            "one score for two classes has the target's shape"
        )
    target = scored(name, prediction, target, keep)
    dim = class_dim(prediction)
    if classes is not None and prediction.shape[dim] != classes:
        found = prediction.shape[dim]
        raise ValueError(f"{name}: expects scores of {classes} classes, got {found}")
    return prediction.argmax(dim), target


def check_labels(name: str, target: Any) -> None:
    """Raise TypeError unless a target is a tensor of integers or bools."""
    if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex():
        raise TypeError(
            f"{name}: expects a target of integer class indices, got {tree.describe(target)}"
        )


def indices(
    name: str, target: Tensor, keep: Tensor | None, classes: int | None, what: str = "classes"
) -> Tensor:
    """Class indices as int64, 0 for what does not count; ValueError for one out of range."""
    target = target.long()
    if keep is not None:
        target = torch.where(keep, target, 0)
    if classes is not None:
        check_indices(name, target, 0, classes)
    return target


def check_class_count(name: str, classes: Any) -> None:
    """Raise ValueError unless there are two classes or more."""
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
        raise ValueError(f"{name}: expects classes of at least 2, got {classes!r}")
