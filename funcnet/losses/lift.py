"""Lifts of losses: `pointwise` from a function of each element, `loss_of` from a ``vjp``."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import Tensor

from funcnet.core import EMPTY, Loss, LossPullback, function_name
from funcnet.losses.checks import broadcastable, check_pair
from funcnet.losses.reductions import check_reduction, divided, divisor, reduced


def pointwise_rule(
    residuals: dict[str, Any],
    dvalue: Tensor | float,
    derivative: Callable[..., Tensor],
    reduction: str,
    *options: Hashable,
) -> Tensor:
    """``dprediction = d weight derivative(prediction, target) / n``."""
    prediction, target = residuals["prediction"], residuals["target"]
    gradient = derivative(prediction, target, *options, **residuals["tensors"])
    if "weight" in residuals:
        gradient = gradient * residuals["weight"]
    return gradient * divided(dvalue, divisor(prediction, reduction))


def pointwise(
    function: Callable[..., Tensor],
    derivative: Callable[..., Tensor],
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
    options: tuple[Hashable, ...] = (),
    tensors: Mapping[str, Tensor | None] = EMPTY,
    reductions: tuple[str, ...] = ("mean", "sum"),
    check: Callable[[Tensor, Tensor], None] | None = None,
    name: str | None = None,
) -> Loss:
    """A loss that is the mean or the sum of a function of each element.

    Args:
        function: ``(prediction, target) -> elements``, all of one shape.
        derivative: ``(prediction, target)``, the derivative of the elements by the prediction: a
            module-level function, because the pullback keeps it.
        reduction: one of ``reductions``.
        weight: of each element; broadcasts.
        options: passed to both functions after the target, such as a margin.
        tensors: passed to both functions by name, in the prediction's dtype; they broadcast to
            its shape. Those that are None are left out.
        reductions: what ``reduction`` may be: "mean" and "sum", "batchmean", the sum divided by
            the size of the first dimension, or "half_mean", half of that.
        check: ``(prediction, target)`` raises where it refuses their values.
        name: what errors call the loss; by default the function's name.

    VJP: ``dprediction = d weight derivative(prediction, target) / n``.

    >>> import funcnet as fn
    >>> def log_cosh(y, t):
    ...     return torch.log(torch.cosh(y - t))
    >>> def log_cosh_derivative(y, t):
    ...     return torch.tanh(y - t)
    >>> loss = pointwise(log_cosh, log_cosh_derivative)
    >>> value, pullback = loss.vjp(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    >>> value, pullback()
    (tensor(0.2169), tensor([0.0000, 0.3808]))
    >>> fn.testing.check_loss(loss, torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.0]))
    """
    name = name or function_name(function)
    check_reduction(name, reduction, reductions)
    present = {option: value for option, value in tensors.items() if value is not None}
    static = (derivative, reduction, *options)

    def vjp(prediction: Tensor, target: Tensor) -> tuple[Tensor, LossPullback]:
        check_pair(name, prediction, target)
        given = {
            option: broadcastable(name, option, value, prediction)
            for option, value in present.items()
        }
        residuals: dict[str, Any] = {"prediction": prediction, "target": target, "tensors": given}
        if weight is not None:
            residuals["weight"] = broadcastable(name, "weight", weight, prediction)
        if check is not None:
            check(prediction, target)
        elements = function(prediction, target, *options, **given)
        if weight is not None:
            elements = elements * residuals["weight"]
        return reduced(elements, reduction), LossPullback(pointwise_rule, residuals, static)

    return loss_of(vjp)


def loss_of(vjp: Callable[[Tensor, Tensor], tuple[Tensor, LossPullback]]) -> Loss:
    """The loss with this ``vjp``, whose ``apply`` is its value, so that the two agree."""

    def apply(prediction: Tensor, target: Tensor) -> Tensor:
        return vjp(prediction, target)[0]

    return Loss(apply, vjp)
