"""Losses of yes or no: `bce`, `bce_with_logits`, `focal`; of many: `multilabel_soft_margin`."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet.core import Loss
from funcnet.losses.checks import check_prediction, check_range, labels, refuse_reduction
from funcnet.losses.lift import from_formulas, pointwise


def _bce(prediction: Tensor, target: Tensor) -> Tensor:
    log_p = prediction.log().clamp(min=-100)
    log_not_p = (-prediction).log1p().clamp(min=-100)
    return -(target * log_p + (1 - target) * log_not_p)


def _bce_derivative(prediction: Tensor, target: Tensor) -> Tensor:
    # PyTorch bounds the denominator by the same constant.
    return (prediction - target) / (prediction * (1 - prediction)).clamp(min=1e-12)


def _check_bce(prediction: Tensor, target: Tensor) -> None:
    check_range("bce", "probabilities", prediction, 0, 1)
    check_range("bce", "targets", target, 0, 1)


def bce(weight: Tensor | None = None, reduction: str = "mean") -> Loss:
    """Binary cross-entropy ``-(t log p + (1 - t) log(1 - p))`` of probabilities.

    Both logs are kept at least -100, so the loss stays finite at p = 0 and 1.

    Args:
        weight: of each element; broadcasts.
        reduction: "none", "mean" or "sum".

    VJP:
        ``dprediction = d weight (p - t) / max(p (1 - p), 1e-12) / n``.
    Raises:
        ValueError: a probability or a target outside [0, 1].

    Source: ``torch.nn.BCELoss``.

    >>> bce().apply(torch.tensor([0.0, 0.5]), torch.tensor([1.0, 1.0]))
    tensor(50.3466)
    """
    return pointwise(_bce, _bce_derivative, reduction, weight=weight, check=_check_bce, name="bce")


def _bce_with_logits(
    prediction: Tensor, target: Tensor, pos_weight: Tensor | None = None
) -> Tensor:
    return F.binary_cross_entropy_with_logits(
        prediction, target, reduction="none", pos_weight=pos_weight
    )


def _bce_with_logits_derivative(
    prediction: Tensor, target: Tensor, pos_weight: Tensor | None = None
) -> Tensor:
    positive = target if pos_weight is None else target * pos_weight
    return (1 - target) * torch.sigmoid(prediction) - positive * torch.sigmoid(-prediction)


def _check_targets(name: str, prediction: Tensor, target: Tensor) -> None:
    check_range(name, "targets", target, 0, 1)


def bce_with_logits(
    weight: Tensor | None = None, reduction: str = "mean", pos_weight: Tensor | None = None
) -> Loss:
    """`bce` of ``sigmoid(y)``, exact for any logit y.

    Args:
        weight: of each element; broadcasts.
        reduction: "none", "mean" or "sum".
        pos_weight: of the positive targets; broadcasts.

    VJP:
        with ``s = sigmoid(y)``, ``d weight ((1 - t) s - pos_weight t (1 - s)) / n``.
    Raises:
        ValueError: a target outside [0, 1].

    Source: ``torch.nn.BCEWithLogitsLoss``.

    >>> bce_with_logits().apply(torch.tensor([0.0, 1e4]), torch.tensor([1.0, 1.0]))
    tensor(0.3466)
    """
    return pointwise(
        _bce_with_logits,
        _bce_with_logits_derivative,
        reduction,
        weight=weight,
        tensors={"pos_weight": pos_weight},
        check=partial(_check_targets, "bce_with_logits"),
        name="bce_with_logits",
    )


def _balance(target: Tensor, alpha: float) -> Tensor | float:
    return alpha * target + (1 - alpha) * (1 - target) if alpha >= 0 else 1.0


def _miss(prediction: Tensor, target: Tensor) -> Tensor:
    """``1 - p_t``, exact where it is small."""
    return (1 - target) * torch.sigmoid(prediction) + target * torch.sigmoid(-prediction)


def _focal(prediction: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
    focus = _miss(prediction, target) ** gamma
    return _balance(target, alpha) * focus * _bce_with_logits(prediction, target)


def _focal_derivative(prediction: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
    miss = _miss(prediction, target)
    slope = (1 - 2 * target) * torch.sigmoid(prediction) * torch.sigmoid(-prediction)
    # Bounded from 0, whose negative power times the slope, 0 as well, is not a number.
    steep = gamma * miss.clamp(min=torch.finfo(miss.dtype).tiny) ** (gamma - 1)
    error = _bce_with_logits_derivative(prediction, target)
    return _balance(target, alpha) * (
        miss**gamma * error + steep * slope * _bce_with_logits(prediction, target)
    )


def focal(alpha: float = 0.25, gamma: float = 2.0, reduction: str = "mean") -> Loss:
    """``alpha_t (1 - p_t)^gamma bce``: `bce_with_logits` that easy examples count little in.

    With ``s = sigmoid(y)``: ``p_t = t s + (1 - t) (1 - s)``, the probability of the right
    decision, and ``alpha_t = t alpha + (1 - t) (1 - alpha)``.

    Args:
        alpha: the weight of the positive targets, in [0, 1]; -1 for none.
        gamma: how little: 0 for all alike.
        reduction: "none", "mean" or "sum".

    VJP:
        with ``q = 1 - p_t``, ``d alpha_t (q^gamma (s - t) + gamma q^(gamma - 1) q' bce) / n`` where
        ``q' = (1 - 2 t) s (1 - s)``.
    Raises:
        ValueError: a target outside [0, 1].

    Source: Lin et al. 2017; ``torchvision.ops.sigmoid_focal_loss``.

    >>> focal().apply(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 1.0]))
    tensor(0.0217)
    """
    refuse_reduction("focal", alpha)
    if not (0.0 <= alpha <= 1.0 or alpha == -1):
        raise ValueError(f"focal: alpha must be in [0, 1] or -1, got {alpha}")
    if not gamma >= 0:
        raise ValueError(f"focal: gamma must be >= 0, got {gamma}")
    return pointwise(
        _focal,
        _focal_derivative,
        reduction,
        options=(alpha, gamma),
        check=partial(_check_targets, "focal"),
        name="focal",
    )


def _multilabel(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    elements = _bce_with_logits(prediction, target)
    if weight is not None:
        elements = elements * weight
    return elements.mean(-1)


def _multilabel_derivative(
    prediction: Tensor, target: Tensor, weight: Tensor | None = None
) -> Tensor:
    gradient = _bce_with_logits_derivative(prediction, target)
    if weight is not None:
        gradient = gradient * weight
    return gradient / prediction.shape[-1]


def _check_multilabel(name: str, prediction: Tensor, target: Tensor) -> Tensor:
    check_prediction(name, prediction)
    if prediction.dim() == 0:
        raise ValueError(f"{name}: expects (*, classes), got ()")
    target = labels(name, target, prediction, tuple(prediction.shape))
    _check_targets(name, prediction, target)
    return target


def multilabel_soft_margin(weight: Tensor | None = None, reduction: str = "mean") -> Loss:
    """`bce_with_logits` of each class, averaged over the classes of an example.

    Args:
        weight: of each class; broadcasts.
        reduction: "none", "mean" or "sum", over the examples.

    Inputs:
        prediction, logits ``(*, classes)``; target of that shape, numbers in [0, 1].
    Returns:
        with "none", a tensor of shape ``(*)``.
    VJP:
        ``dprediction = d weight (sigmoid(y) - t) / classes / n``.
    Raises:
        ValueError: a target outside [0, 1].

    Source: ``torch.nn.MultiLabelSoftMarginLoss``.

    >>> multilabel_soft_margin().apply(torch.tensor([[0.0, 1e4]]), torch.tensor([[1, 1]]))
    tensor(0.3466)
    """
    return from_formulas(
        _multilabel,
        _multilabel_derivative,
        reduction,
        tensors={"weight": weight},
        check=_check_multilabel,
        name="multilabel_soft_margin",
    )
