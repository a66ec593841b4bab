"""Losses of a decision between two classes: `bce`, `bce_with_logits`, `hinge`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet.core import Loss
from funcnet.losses.checks import extremes
from funcnet.losses.lift import pointwise


def _bce(prediction: Tensor, target: Tensor) -> Tensor:
    log_p = prediction.log().clamp(min=-100)
    log_not_p = (-prediction).log1p().clamp(min=-100)
    return -(target * log_p + (1 - target) * log_not_p)


def _bce_derivative(prediction: Tensor, target: Tensor) -> Tensor:
    # PyTorch bounds the denominator by the same constant.
    return (prediction - target) / (prediction * (1 - prediction)).clamp(min=1e-12)


def _check_probabilities(prediction: Tensor, target: Tensor) -> None:
    for name, values in (("probabilities", prediction), ("targets", target)):
        found = extremes(values)
        # NaN passes: check_finite names the layer that it came from.
        if found is not None and (found[0] < 0 or found[1] > 1):
            raise ValueError(f"bce: expects {name} in [0, 1], got {found[0]:g} to {found[1]:g}")


def bce(reduction: str = "mean", weight: Tensor | None = None) -> Loss:
    """Binary cross-entropy ``-(t log p + (1 - t) log(1 - p))`` of probabilities.

    Both logs are kept at least -100, so the loss stays finite at p = 0 and 1.

    Args:
        reduction: "mean" or "sum".
        weight: of each element; broadcasts.

    VJP: ``dprediction = d (p - t) / max(p (1 - p), 1e-12) / n``.
    Raises: ValueError for a probability outside [0, 1].
    Source: ``torch.nn.BCELoss``.

    >>> bce().apply(torch.tensor([0.0, 0.5]), torch.tensor([1.0, 1.0]))
    tensor(50.3466)
    """
    return pointwise(
        _bce, _bce_derivative, reduction, weight=weight, check=_check_probabilities, name="bce"
    )


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


def bce_with_logits(
    reduction: str = "mean", weight: Tensor | None = None, pos_weight: Tensor | None = None
) -> Loss:
    """`bce` of ``sigmoid(y)``, exact for any logit y.

    Args:
        reduction: "mean" or "sum".
        weight: of each element; broadcasts.
        pos_weight: of the positive targets; broadcasts.

    VJP: with ``s = sigmoid(y)``, ``d ((1 - t) s - pos_weight t (1 - s)) / n``.
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
        name="bce_with_logits",
    )


def _hinge(prediction: Tensor, target: Tensor, margin: float) -> Tensor:
    return (margin - prediction * target).clamp(min=0)


def _hinge_derivative(prediction: Tensor, target: Tensor, margin: float) -> Tensor:
    return torch.where(prediction * target < margin, -target, 0.0)


def hinge(reduction: str = "mean", margin: float = 1.0) -> Loss:
    """``max(0, margin - t y)`` of scores y and targets of -1 and 1.

    VJP: ``dprediction = -d t [t y < margin] / n``.
    Source: Crammer and Singer 2001; ``optax.losses.hinge_loss``.

    >>> hinge().apply(torch.tensor([0.5, -2.0]), torch.tensor([1.0, -1.0]))
    tensor(0.2500)
    """
    return pointwise(_hinge, _hinge_derivative, reduction, options=(margin,), name="hinge")
