"""Losses that are 0 beyond a margin: of signs, of an order, of a choice among classes."""

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet.core import Loss
from funcnet.losses.checks import (
    check_classes,
    check_indices,
    check_prediction,
    check_range,
    check_scores,
    check_several,
    check_signs,
    labels,
    refuse_reduction,
)
from funcnet.losses.lift import from_formulas


def _signs(name: str, prediction: Tensor, target: Tensor) -> Tensor:
    check_prediction(name, prediction)
    target = labels(name, target, prediction, tuple(prediction.shape))
    check_signs(name, target)
    return target


def _hinge(prediction: Tensor, target: Tensor, margin: float) -> Tensor:
    return (margin - prediction * target).clamp(min=0)


def _hinge_derivative(prediction: Tensor, target: Tensor, margin: float) -> Tensor:
    return torch.where(prediction * target < margin, -target, 0.0)


def hinge(reduction: str = "mean", margin: float = 1.0) -> Loss:
    """``max(0, margin - t y)`` of scores y and targets t of -1 and 1.

    Args:
        reduction: "mean", "sum", or "none" for the loss of each element.
        margin: the ``t y`` from which on an element costs nothing.

    VJP:
        ``dprediction = -d t [t y < margin] / n``.
    Raises:
        ValueError: a target other than -1 and 1.

    Source: Crammer and Singer 2001; ``optax.losses.hinge_loss``.

    >>> hinge().apply(torch.tensor([0.5, -2.0]), torch.tensor([1.0, -1.0]))
    tensor(0.2500)
    """
    return from_formulas(
        _hinge, _hinge_derivative, reduction, check=_signs, options=(margin,), name="hinge"
    )


def _soft_margin(prediction: Tensor, target: Tensor) -> Tensor:
    return -F.logsigmoid(target * prediction)


def _soft_margin_derivative(prediction: Tensor, target: Tensor) -> Tensor:
    return -target * torch.sigmoid(-target * prediction)


def soft_margin(reduction: str = "mean") -> Loss:
    """``log(1 + exp(-t y))`` of scores y and targets t of -1 and 1, exact for any score.

    Args:
        reduction: "mean", "sum", or "none" for the loss of each element.

    VJP:
        ``dprediction = -d t sigmoid(-t y) / n``.
    Raises:
        ValueError: a target other than -1 and 1.

    Source: ``torch.nn.SoftMarginLoss``.

    >>> soft_margin().apply(torch.tensor([0.0, -1e4]), torch.tensor([1.0, -1.0]))
    tensor(0.3466)
    """
    return from_formulas(
        _soft_margin, _soft_margin_derivative, reduction, check=_signs, name="soft_margin"
    )


def _hinge_embedding(prediction: Tensor, target: Tensor, margin: float) -> Tensor:
    return torch.where(target == 1, prediction, (margin - prediction).clamp(min=0))


def _hinge_embedding_derivative(prediction: Tensor, target: Tensor, margin: float) -> Tensor:
    near = (prediction <= margin).to(prediction.dtype)
    return torch.where(target == 1, 1.0, -near)


def hinge_embedding(margin: float = 1.0, reduction: str = "mean") -> Loss:
    """A distance y where the target is 1, ``max(0, margin - y)`` where it is -1.

    Args:
        margin: the distance from which on a pair of target -1 costs nothing.
        reduction: "mean", "sum", or "none" for the loss of each element.

    VJP:
        ``dprediction = d / n`` where the target is 1, ``-d [y <= margin] / n`` where it is -1.
    Raises:
        ValueError: a target other than -1 and 1.

    Source: ``torch.nn.HingeEmbeddingLoss``.

    >>> hinge_embedding().apply(torch.tensor([0.5, 0.25]), torch.tensor([1.0, -1.0]))
    tensor(0.6250)
    """
    refuse_reduction("hinge_embedding", margin)
    return from_formulas(
        _hinge_embedding,
        _hinge_embedding_derivative,
        reduction,
        check=_signs,
        options=(margin,),
        name="hinge_embedding",
    )


Pair = tuple[Tensor, Tensor]


def _margin_ranking(prediction: Pair, target: Tensor, margin: float) -> Tensor:
    first, second = prediction
    return (margin - target * (first - second)).clamp(min=0)


def _margin_ranking_derivative(prediction: Pair, target: Tensor, margin: float) -> Pair:
    first, second = prediction
    slope = torch.where(target * (first - second) <= margin, target, 0.0)
    return -slope, slope


def _check_order(name: str, prediction: Pair, target: Tensor) -> Tensor:
    check_several(name, prediction, ("x1", "x2"))
    target = labels(name, target, prediction[0], tuple(prediction[0].shape))
    check_range(name, "targets", target, -1, 1)
    return target


def margin_ranking(margin: float = 0.0, reduction: str = "mean") -> Loss:
    """``max(0, margin - t (x1 - x2))``: 0 where x1 is larger by the margin, or smaller if t = -1.

    Args:
        margin: by how much the larger one should be larger.
        reduction: "mean", "sum", or "none" for the loss of each element.

    Inputs:
        prediction, a tuple (x1, x2) of tensors of one shape; target of that shape, 1 where x1
        should be the larger and -1 where x2 should; a 0, for neither, counts ``max(0, margin)``.
    VJP:
        ``dx1 = -d t [t (x1 - x2) <= margin] / n``, ``dx2 = -dx1``.
    Raises:
        ValueError: a target outside [-1, 1].

    Source: ``torch.nn.MarginRankingLoss``.

    >>> x = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0])
    >>> value, pullback = margin_ranking().vjp(x, torch.tensor([1, 1]))
    >>> value, pullback()
    (tensor(1.), (tensor([-0.5000, -0.0000]), tensor([0.5000, 0.0000])))
    """
    refuse_reduction("margin_ranking", margin)
    return from_formulas(
        _margin_ranking,
        _margin_ranking_derivative,
        reduction,
        check=_check_order,
        options=(margin,),
        name="margin_ranking",
    )


def _excess(prediction: Tensor, target: Tensor, margin: float) -> Tensor:
    """``max(0, margin - y_t + y_c)`` for each class c, and 0 for the target's own."""
    index = target.unsqueeze(-1)
    excess = (margin - prediction.gather(-1, index) + prediction).clamp(min=0)
    return excess.scatter(-1, index, 0.0)


def _weight_of(target: Tensor, weight: Tensor | None, like: Tensor) -> Tensor | float:
    """The weight of each target's class, with one dimension more."""
    return 1.0 if weight is None else weight.expand_as(like).gather(-1, target.unsqueeze(-1))


def _multi_margin(
    prediction: Tensor, target: Tensor, p: int, margin: float, weight: Tensor | None = None
) -> Tensor:
    excess = _excess(prediction, target, margin)
    return (_weight_of(target, weight, prediction) * excess**p).mean(-1)


def _multi_margin_derivative(
    prediction: Tensor, target: Tensor, p: int, margin: float, weight: Tensor | None = None
) -> Tensor:
    excess = _excess(prediction, target, margin)
    slope = (excess > 0).to(excess.dtype) if p == 1 else 2 * excess
    slope = _weight_of(target, weight, prediction) * slope / prediction.shape[-1]
    return slope.scatter(-1, target.unsqueeze(-1), -slope.sum(-1, keepdim=True))


def multi_margin(
    p: int = 1, margin: float = 1.0, weight: Tensor | None = None, reduction: str = "mean"
) -> Loss:
    """``weight_t sum_c max(0, margin - y_t + y_c)^p / classes`` over the classes c other than t.

    Args:
        p: 1 or 2.
        margin: by which the score of the target's class should be above all others.
        weight: of each class, shape (classes,).
        reduction: "none", "mean" or "sum", over the examples.

    Inputs:
        prediction, scores (batch, classes) or (classes,); target, class indices, int64, of shape
        (batch,) or ().
    Returns:
        with "none", a tensor of the target's shape.
    VJP:
        with ``g_c = p weight_t max(0, margin - y_t + y_c)^(p - 1) / classes`` where that is above
        0, ``dprediction_c = d g_c / n`` and ``dprediction_t = -d sum(g) / n``.
    Raises:
        ValueError: a class out of range.

    Source: ``torch.nn.MultiMarginLoss``.

    >>> multi_margin().apply(torch.tensor([[0.1, 0.2, 0.4, 0.8]]), torch.tensor([3]))
    tensor(0.3250)
    """
    refuse_reduction("multi_margin", margin)
    if p not in (1, 2):
        raise ValueError(f"multi_margin: p must be 1 or 2, got {p!r}")

    def check(name: str, prediction: Tensor, target: Tensor) -> Tensor:
        _check_rows(name, prediction, weight)
        check_classes(name, prediction, target)
        return target

    return from_formulas(
        _multi_margin,
        _multi_margin_derivative,
        reduction,
        check=check,
        options=(p, margin),
        tensors={"weight": weight},
        name="multi_margin",
    )


def _check_rows(name: str, prediction: Tensor, weight: Tensor | None = None) -> None:
    check_scores(name, prediction, weight)
    if prediction.dim() > 2:
        raise ValueError(
            f"{name}: expects (batch, classes) or (classes,), got {tuple(prediction.shape)}"
        )


def _violations(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """``1 - y[target_j] + y_c`` of each listed class j and each class c that is not listed.

    Other entries are 0. And the index of each class that is listed, 0 for other entries.
    """
    listed = (target >= 0).cumprod(-1)  # up to the first that is negative
    index = target * listed
    is_target = torch.zeros_like(prediction).scatter_add(-1, index, listed.to(prediction.dtype))
    other = (is_target == 0).unsqueeze(-2) & (listed == 1).unsqueeze(-1)
    gaps = 1 - prediction.gather(-1, index).unsqueeze(-1) + prediction.unsqueeze(-2)
    return torch.where(other, gaps.clamp(min=0), 0.0), index


def _multilabel_margin(prediction: Tensor, target: Tensor) -> Tensor:
    violations, _ = _violations(prediction, target)
    return violations.sum((-2, -1)) / prediction.shape[-1]


def _multilabel_margin_derivative(prediction: Tensor, target: Tensor) -> Tensor:
    violations, index = _violations(prediction, target)
    active = (violations > 0).to(prediction.dtype)
    return active.sum(-2).scatter_add(-1, index, -active.sum(-1)) / prediction.shape[-1]


def _check_listed(name: str, prediction: Tensor, target: Tensor) -> Tensor:
    _check_rows(name, prediction)
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        raise TypeError(f"{name}: expects a target of int64 class indices")
    if target.shape != prediction.shape:
        raise ValueError(
            f"{name}: expects a target of the prediction's shape {tuple(prediction.shape)}, "
            f"got {tuple(target.shape)}"
        )
    check_indices(name, target, -1, prediction.shape[-1])
    return target


def multilabel_margin(reduction: str = "mean") -> Loss:
    """``sum_jc max(0, 1 - y_j + y_c) / classes`` over the target's classes j and all others c.

    Args:
        reduction: "mean", over the examples, "sum", or "none" for the loss of each example.

    Inputs:
        prediction, scores (batch, classes) or (classes,); target of that shape, int64: the indices
        of an example's classes, then -1; what comes after the first -1 is not looked at.
    Returns:
        with "none", a tensor of shape (batch,) or ().
    VJP:
        ``d / (classes n)`` is added to ``dprediction_c`` and taken from ``dprediction_j`` for each
        pair (j, c) that counts more than 0.
    Raises:
        ValueError: a class out of range.

    Source: ``torch.nn.MultiLabelMarginLoss``.

    >>> y = torch.tensor([[0.1, 0.2, 0.4, 0.8]])
    >>> multilabel_margin().apply(y, torch.tensor([[3, 0, -1, 1]]))
    tensor(0.8500)
    """
    return from_formulas(
        _multilabel_margin,
        _multilabel_margin_derivative,
        reduction,
        check=_check_listed,
        name="multilabel_margin",
    )
