"""Losses of a prediction of numbers: `mse`, `mae`, `huber`, `smooth_l1`.

`mse` keeps the error, of which its gradient is a multiple; the others are pointwise.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet.core import Loss, Tree
from funcnet.losses.checks import check_pair
from funcnet.losses.lift import Elements, loss_of, pointwise, times
from funcnet.losses.reductions import REDUCTIONS


def mse_backward(d: Tensor | float, *, error: Tensor) -> Tree:
    """``2 d (prediction - target)``."""
    return times(2 * d, error)


def mse(reduction: str = "mean") -> Loss:
    """``(prediction - target)^2``; ``dprediction = 2 d (prediction - target) / n``.

    Args:
        reduction: "none", "mean", "sum", or "half_mean": the sum over all divided by twice the
            batch's size, so that the gradient of an example is plainly ``prediction - target``.

    Source: ``torch.nn.MSELoss``.

    >>> value, pullback = mse().vjp(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))
    >>> value, pullback()
    (tensor(2.5000), tensor([1., 2.]))
    """

    def forward(prediction: Tensor, target: Tensor) -> Elements:
        check_pair("mse", prediction, target)
        error = prediction - target
        return Elements(error.square(), {"error": error})

    reductions = (*REDUCTIONS, "half_mean")
    return loss_of(forward, mse_backward, reduction, reductions=reductions, name="mse")


def _absolute_error(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).abs()


def _absolute_error_derivative(prediction: Tensor, target: Tensor) -> Tensor:
    return torch.sign(prediction - target)


def mae(reduction: str = "mean") -> Loss:
    """``|prediction - target|``; ``dprediction = d sign(prediction - target) / n``.

    Args:
        reduction: "mean", "sum", or "none" for the loss of each element.

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

    Args:
        reduction: "mean", "sum", or "none" for the loss of each element.
        delta: the error from which on the loss grows linearly, above 0.

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

    Args:
        reduction: "mean", "sum", or "none" for the loss of each element.
        beta: the error from which on the loss grows linearly; 0 for ``|e|``.

    Source: ``torch.nn.SmoothL1Loss``.

    >>> smooth_l1().apply(torch.tensor([0.5, 3.0]), torch.tensor([0.0, 0.0]))
    tensor(1.3125)
    """
    if not beta >= 0:
        raise ValueError(f"smooth_l1: beta must be >= 0, got {beta}")
    return pointwise(
        _smooth_l1, _smooth_l1_derivative, reduction, options=(beta,), name="smooth_l1"
    )
