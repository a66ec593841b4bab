"""Losses of a prediction of numbers: `mse`, `mae`, `huber`, `smooth_l1`.

`mse` keeps the error, of which its gradient is a multiple; the others are pointwise.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet.core import Loss, LossPullback
from funcnet.losses.checks import check_pair
from funcnet.losses.lift import loss_of, pointwise
from funcnet.losses.reductions import check_reduction, divided, divisor, reduced


def mse_rule(residuals: dict[str, Tensor], dvalue: Tensor | float, reduction: str) -> Tensor:
    """``dprediction = 2 d (prediction - target) / n``."""
    error = residuals["error"]
    return error * divided(2 * dvalue, divisor(error, reduction))


def mse(reduction: str = "mean") -> Loss:
    """``(prediction - target)^2``; ``dprediction = 2 d (prediction - target) / n``.

    Args:
        reduction: "mean", "sum", or "half_mean": the sum over all divided by twice the batch's
            size, so that the gradient of an example is plainly ``prediction - target``.

    Source: ``torch.nn.MSELoss``.

    >>> value, pullback = mse().vjp(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))
    >>> value, pullback()
    (tensor(2.5000), tensor([1., 2.]))
    """
    check_reduction("mse", reduction, ("mean", "sum", "half_mean"))

    def vjp(prediction: Tensor, target: Tensor) -> tuple[Tensor, LossPullback]:
        check_pair("mse", prediction, target)
        error = prediction - target
        value = reduced(error.square(), reduction)
        return value, LossPullback(mse_rule, {"error": error}, (reduction,))

    return loss_of(vjp)


def _absolute_error(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).abs()


def _absolute_error_derivative(prediction: Tensor, target: Tensor) -> Tensor:
    return torch.sign(prediction - target)


def mae(reduction: str = "mean") -> Loss:
    """``|prediction - target|``; ``dprediction = d sign(prediction - target) / n``.

    Source: ``torch.nn.L1Loss``.

    >>> mae().apply(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))
    tensor(1.5000)
    """
    return pointwise(_absolute_error, _absolute_error_derivative, reduction, name="mae")


def _huber(prediction: Tensor, target: Tensor, delta: float) -> Tensor:
    distance = (prediction - target).abs()
    return torch.where(distance <= delta, 0.5 * distance.square(), delta * (distance - 0.5 * delta))


def _huber_derivative(prediction: Tensor, target: Tensor, delta: float) -> Tensor:
    return (prediction - target).clamp(-delta, delta)


def huber(reduction: str = "mean", delta: float = 1.0) -> Loss:
    """``e^2 / 2`` where ``|e| < delta``, else ``delta (|e| - delta / 2)``.

    ``e = prediction - target``; ``dprediction = d min(max(e, -delta), delta) / n``.
    Source: ``torch.nn.HuberLoss``.

    >>> huber().apply(torch.tensor([0.5, 3.0]), torch.tensor([0.0, 0.0]))
    tensor(1.3125)
    """
    if not delta > 0:
        raise ValueError(f"huber: delta must be positive, got {delta}")
    return pointwise(_huber, _huber_derivative, reduction, options=(delta,), name="huber")


def _smooth_l1(prediction: Tensor, target: Tensor, beta: float) -> Tensor:
    return F.smooth_l1_loss(prediction, target, reduction="none", beta=beta)


def _smooth_l1_derivative(prediction: Tensor, target: Tensor, beta: float) -> Tensor:
    error = prediction - target
    return (error / beta).clamp(-1, 1) if beta else torch.sign(error)


def smooth_l1(reduction: str = "mean", beta: float = 1.0) -> Loss:
    """``e^2 / (2 beta)`` where ``|e| < beta``, else ``|e| - beta / 2``.

    ``e = prediction - target``; ``dprediction = d min(max(e / beta, -1), 1) / n``.
    Source: ``torch.nn.SmoothL1Loss``.

    >>> smooth_l1().apply(torch.tensor([0.5, 3.0]), torch.tensor([0.0, 0.0]))
    tensor(1.3125)
    """
    if not beta >= 0:
        raise ValueError(f"smooth_l1: beta must be >= 0, got {beta}")
    return pointwise(
        _smooth_l1, _smooth_l1_derivative, reduction, options=(beta,), name="smooth_l1"
    )
