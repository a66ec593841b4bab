"""Negative log-likelihoods of numbers: `poisson_nll`, `gaussian_nll`."""

import math

import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import Loss
from funcnet.losses.checks import check_prediction, check_range, labels, refuse_reduction
from funcnet.losses.lift import Elements, from_formulas, loss_of, times


def _log_factorial(target: Tensor) -> Tensor:
    """Stirling's approximation of ``log(target!)``; 0 up to 1."""
    approximation = target * target.log() - target + 0.5 * (2 * math.pi * target).log()
    return torch.where(target <= 1, 0.0, approximation)


def _poisson_nll(
    prediction: Tensor, target: Tensor, log_input: bool, full: bool, eps: float
) -> Tensor:
    if log_input:
        elements = prediction.exp() - target * prediction
    else:
        elements = prediction - target * (prediction + eps).log()
    return elements + _log_factorial(target) if full else elements


def _poisson_nll_derivative(
    prediction: Tensor, target: Tensor, log_input: bool, full: bool, eps: float
) -> Tensor:
    return prediction.exp() - target if log_input else 1 - target / (prediction + eps)


def _check_counts(name: str, prediction: Tensor, target: Tensor) -> Tensor:
    check_prediction(name, prediction)
    return labels(name, target, prediction, tuple(prediction.shape))


def poisson_nll(
    log_input: bool = True, full: bool = False, eps: float = 1e-8, reduction: str = "mean"
) -> Loss:
    """``rate - t log(rate)``: how unlikely a count t is of a Poisson distribution with that rate.

    Args:
        log_input: whether the prediction y is the log of the rate; else it is the rate.
        full: whether to add Stirling's approximation of ``log(t!)`` where t is above 1.
        eps: added to a rate before its log.
        reduction: "none", "mean" or "sum".

    VJP:
        ``d (exp(y) - t) / n``, or ``d (1 - t / (y + eps)) / n`` of a rate.

    Source: ``torch.nn.PoissonNLLLoss``.

    >>> poisson_nll(log_input=False, full=True).apply(torch.tensor([2.0]), torch.tensor([2.0]))
    tensor(1.2655)
    """
    refuse_reduction("poisson_nll", log_input)
    return from_formulas(
        _poisson_nll,
        _poisson_nll_derivative,
        reduction,
        check=_check_counts,
        options=(log_input, full, eps),
        name="poisson_nll",
    )


def _spread(name: str, what: str, values: Tensor, mean: Tensor) -> Tensor:
    """Values that broadcast to the mean's shape in one dimension, of size 1."""
    fits = values.dim() == mean.dim()
    other = [(a, b) for a, b in zip(values.shape, mean.shape, strict=False) if a != b]
    if not fits or len(other) > 1 or any(size != 1 for size, _ in other):
        raise ValueError(
            f"{name}: expects a {what} of the mean's shape {tuple(mean.shape)}, or with one "
            f"dimension of size 1, got {tuple(values.shape)}"
        )
    return values


def _bounded(var: Tensor, eps: float) -> Tensor:
    """``max(var, eps)``, with the derivative 1 everywhere, as PyTorch has it."""
    return torch.where(var < eps, var - (var.detach() - eps), var)


def gaussian_nll_backward(
    d: Tensor | float, var_shape: tuple[int, ...] | None, *, error: Tensor, var: Tensor
) -> tuple[Tensor, Tensor | None]:
    """``dmean = d error / var`` and ``dvar = d (1 - error^2 / var) / (2 var)``."""
    dmean = times(d, error / var)
    if var_shape is None:
        return dmean, None
    dvar = times(d, 0.5 * (1 - error.square() / var) / var)
    shared = [i for i, size in enumerate(var.shape) if size != error.shape[i]]
    return dmean, (dvar.sum(shared) if shared else dvar).reshape(var_shape)


def gaussian_nll(*, full: bool = False, eps: float = 1e-6, reduction: str = "mean") -> Loss:
    """``(log var + (mean - t)^2 / var) / 2``: how unlikely t is of a normal distribution.

    Args:
        full: whether to add ``log(2 pi) / 2``.
        eps: a smaller variance counts as this one.
        reduction: "none", "mean" or "sum".

    Inputs:
        prediction, a tuple (mean, var); target. ``var`` has the mean's shape, or that with one
        dimension of size 1, or that without the last one, or is a Python number, whose gradient is
        None. The target has the mean's shape, or that with one dimension of size 1.
    VJP:
        ``dmean = d (mean - t) / var / n`` and ``dvar = d (1 - (mean - t)^2 / var) / (2 var) / n``,
        summed over the elements that share a variance, as if eps were not there.
    Raises:
        ValueError: a negative variance.

    Source: ``torch.nn.GaussianNLLLoss``; Nix and Weigend 1994.

    >>> mean, var, target = torch.tensor([1.0, 2.0]), torch.tensor([1.0]), torch.zeros(2)
    >>> value, pullback = gaussian_nll().vjp((mean, var), target)
    >>> value, pullback()
    (tensor(1.2500), (tensor([0.5000, 1.0000]), tensor([-0.7500])))
    """
    name = "gaussian_nll"

    def forward(prediction: tuple[Tensor, Tensor | float], target: Tensor) -> Elements:
        if not isinstance(prediction, tuple) or len(prediction) != 2:
            raise TypeError(
                f"{name}: expects a tuple (mean, var) as prediction, "
                f"got {tree.describe(prediction)}"
            )
        mean, var = prediction
        check_prediction(name, mean)
        var_shape = tuple(var.shape) if isinstance(var, Tensor) else None
        if not isinstance(var, Tensor):
            var = torch.full_like(mean, var)
        for what, values in (("variance", var), ("target", target)):
            if not isinstance(values, Tensor) or values.dtype != mean.dtype:
                raise TypeError(
                    f"{name}: expects a {what} of dtype {mean.dtype}, got {tree.describe(values)}"
                )
        if var.shape == mean.shape[:-1] and mean.dim():
            var = var.unsqueeze(-1)
        var = _spread(name, "variance", var, mean)
        check_range(name, "variances", var, 0)
        error = mean - _spread(name, "target", target, mean)
        var = _bounded(var, eps)
        elements = 0.5 * (var.log() + error.square() / var)
        if full:
            elements = elements + 0.5 * math.log(2 * math.pi)
        return Elements(elements, {"error": error, "var": var}, (var_shape,))

    return loss_of(forward, gaussian_nll_backward, reduction, name=name)
