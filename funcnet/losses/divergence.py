"""Distances between distributions: `kl_div`."""

import torch
from torch import Tensor

from funcnet.core import Loss
from funcnet.losses.lift import pointwise
from funcnet.losses.reductions import REDUCTIONS


def _kl_div(prediction: Tensor, target: Tensor, log_target: bool) -> Tensor:
    if log_target:
        return target.exp() * (target - prediction)
    return torch.xlogy(target, target) - target * prediction


def _kl_div_derivative(prediction: Tensor, target: Tensor, log_target: bool) -> Tensor:
    return -target.exp() if log_target else -target


def kl_div(reduction: str = "mean", log_target: bool = False) -> Loss:
    """Kullback-Leibler divergence ``t (log t - y)`` of log-probabilities y from probabilities t.

    Args:
        reduction: "none", "sum", "mean" over all elements, or "batchmean", over the examples, which
            is the mathematical definition.
        log_target: whether the target holds log-probabilities too.

    VJP:
        ``dprediction = -d t / n``.

    Source: ``torch.nn.KLDivLoss``.

    >>> kl_div("sum").apply(torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]))
    tensor(0.6931)
    """
    return pointwise(
        _kl_div,
        _kl_div_derivative,
        reduction,
        options=(log_target,),
        reductions=(*REDUCTIONS, "batchmean"),
        name="kl_div",
    )
