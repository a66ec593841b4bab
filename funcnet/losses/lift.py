"""Lifts of losses: from the formulas of a loss to a `Loss`, with its reductions and its checks.

`loss_of` takes a forward and a backward pass, `from_formulas` a function and its derivative, and
`pointwise` a function of each element and its derivative.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from funcnet import tree
from funcnet.core import EMPTY, Fraction, Loss, LossPullback, Tree, function_name
from funcnet.lift import KERNELS, fastest
from funcnet.losses.checks import broadcastable, check_pair, check_tensor
from funcnet.losses.reductions import REDUCTIONS, check_reduction, divided, reduced, summed


class Elements(NamedTuple):
    """The forward pass of a loss: the loss of each element, and what the backward pass is told."""

    values: Tensor
    residuals: Mapping[str, Tree]
    static: tuple[Hashable, ...] = ()
    total: Tensor | float | None = None
    """What "mean" divides by, where that is not the number of elements."""


def loss_rule(
    residuals: dict[str, Any],
    dvalue: Tensor | float,
    backward: Callable[..., Tree],
    n: float,
    *static: Hashable,
) -> Tree:
    """``dprediction = backward(dvalue / n, *static, **residuals)``."""
    d = divided(dvalue, residuals.get("n", n))
    elements = residuals["elements"]
    if backward in KERNELS:
        tensors = [each for each in (d, *tree.leaves(elements)) if isinstance(each, Tensor)]
        backward = fastest(backward, *tensors)
    return backward(d, *static, **elements)


def loss_of(
    forward: Callable[[Tree, Tree], Elements],
    backward: Callable[..., Tree],
    reduction: str,
    *,
    reductions: tuple[str, ...] = REDUCTIONS,
    name: str,
) -> Loss:
    """A loss, from the forward and the backward pass of its elements.

    Args:
        forward: ``(prediction, target) -> Elements``.
        backward: ``(d, *static, **residuals) -> dprediction``, a module-level function. d is the
            cotangent of the elements: a tensor of their shape, or a scalar for all of them.
        reduction: one of ``reductions``; see ``reduced``.
        name: what errors call the loss.

    >>> def total_backward(d, *, error):
    ...     return 2 * d * error
    >>> def forward(prediction, target):
    ...     error = prediction - target
    ...     return Elements(error.square().sum(), {"error": error})
    >>> total = loss_of(forward, total_backward, "mean", name="total")
    >>> value, pullback = total.vjp(torch.ones(3), torch.zeros(3))
    >>> value, pullback()
    (tensor(3.), tensor([2., 2., 2.]))
    """
    check_reduction(name, reduction, reductions)

    def vjp(prediction: Tree, target: Tree) -> tuple[Tensor, LossPullback]:
        elements, residuals, static, total = forward(prediction, target)
        value, n = reduced(elements, reduction, total)
        kept: dict[str, Any] = {"elements": residuals}
        if not isinstance(n, (int, float)):
            kept["n"], n = n, 1
        return value, LossPullback(loss_rule, kept, (backward, n, *static), value, name)

    def apply(prediction: Tree, target: Tree) -> Tensor:
        return vjp(prediction, target)[0]

    def fraction(prediction: Tree, target: Tree) -> Fraction:
        elements, residuals, static, total = forward(prediction, target)
        numerator, n = summed(elements, reduction, total)
        kept: dict[str, Any] = {"elements": residuals}
        return numerator, n, LossPullback(loss_rule, kept, (backward, 1, *static), numerator, name)

    # Python's own errors name them.
    apply.__qualname__, vjp.__qualname__ = f"{name}.apply", f"{name}.vjp"
    return Loss(apply, vjp, name, None if reduction == "none" else fraction)


def from_formulas(
    function: Callable[..., Tensor],
    derivative: Callable[..., Tree],
    reduction: str,
    *,
    check: Callable[[str, Any, Any], Any],
    weight: Tensor | None = None,
    options: tuple[Hashable, ...] = (),
    tensors: Mapping[str, Tensor | None] = EMPTY,
    reductions: tuple[str, ...] = REDUCTIONS,
    name: str | None = None,
) -> Loss:
    """A loss, from the function that gives its elements and the derivative of these.

    Args:
        function: ``(prediction, target) -> elements``.
        derivative: ``(prediction, target) -> derivative``, a module-level function: a tree like
            the prediction, whose leaves have the elements' dimensions and then any others.
        check: ``(name, prediction, target) -> target``: raises for what does not fit, and gives
            the target that the formulas take.
        weight, options, tensors, reductions, name: see `pointwise`.

    VJP:
        ``dprediction = d weight derivative(prediction, target) / n``.

    >>> def gap(prediction, target):
    ...     return (prediction[0] - prediction[1] - target).square()
    >>> def gap_derivative(prediction, target):
    ...     twice = 2 * (prediction[0] - prediction[1] - target)
    ...     return twice, -twice
    >>> loss = from_formulas(gap, gap_derivative, "mean", check=lambda name, y, target: target)
    >>> value, pullback = loss.vjp((torch.tensor([3.0]), torch.tensor([1.0])), torch.tensor([1.0]))
    >>> value, pullback()
    (tensor(1.), (tensor([2.]), tensor([-2.])))
    """
    name = name or function_name(function)
    for option, value in {"weight": weight, **tensors}.items():
        check_tensor(name, option, value)
    present = {option: value for option, value in tensors.items() if value is not None}

    def forward(prediction: Any, target: Any) -> Elements:
        target = check(name, prediction, target)
        given = {
            option: broadcastable(name, option, value, prediction)
            for option, value in present.items()
        }
        residuals: dict[str, Any] = {"prediction": prediction, "target": target, "tensors": given}
        if weight is not None:
            residuals["weight"] = broadcastable(name, "weight", weight, prediction)
        elements = function(prediction, target, *options, **given)
        if weight is not None:
            elements = elements * residuals["weight"]
        return Elements(elements, residuals, (derivative, *options))

    return loss_of(forward, formula_backward, reduction, reductions=reductions, name=name)


def formula_backward(
    d: Tensor | float,
    derivative: Callable[..., Tree],
    *options: Hashable,
    prediction: Tree,
    target: Tensor,
    tensors: Mapping[str, Tensor],
    weight: Tensor | None = None,
) -> Tree:
    """``d weight derivative(prediction, target)``."""
    gradient = derivative(prediction, target, *options, **tensors)
    if weight is not None:
        gradient = gradient * weight
    return times(d, gradient)


def times(d: Tensor | float, gradient: Tree) -> Tree:
    """Gradients of elements, each times that element's d, in their own dtype."""
    if isinstance(gradient, tuple):
        return tuple([times(d, part) for part in gradient])
    if isinstance(d, (int, float)):
        return gradient * d
    if 0 < d.dim() < gradient.dim():
        d = d.reshape(d.shape + (1,) * (gradient.dim() - d.dim()))
    return (gradient * d).to(gradient.dtype)


def pointwise(
    function: Callable[..., Tensor],
    derivative: Callable[..., Tensor],
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
    options: tuple[Hashable, ...] = (),
    tensors: Mapping[str, Tensor | None] = EMPTY,
    reductions: tuple[str, ...] = REDUCTIONS,
    check: Callable[[Tensor, Tensor], None] | None = None,
    name: str | None = None,
) -> Loss:
    """A loss that is a function of each element of a prediction and of a target of its shape.

    Args:
        function: ``(prediction, target) -> elements``, all of one shape.
        derivative: ``(prediction, target)``, the derivative of the elements by the prediction: a
            module-level function, because the pullback keeps it.
        reduction: one of ``reductions``.
        weight: of each element; broadcasts.
        options: passed to both functions after the target, such as a margin.
        tensors: passed to both functions by name, in the prediction's dtype; they broadcast to
            its shape. Those that are None are left out.
        reductions: what ``reduction`` may be: "none", "mean" and "sum", "batchmean", the sum
            divided by the size of the first dimension, or "half_mean", half of that.
        check: ``(prediction, target)`` raises where it refuses their values.
        name: what errors call the loss; by default the function's name.

    VJP:
        ``dprediction = d weight derivative(prediction, target) / n``.

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

    def check_both(name: str, prediction: Tensor, target: Tensor) -> Tensor:
        check_pair(name, prediction, target)
        if check is not None:
            check(prediction, target)
        return target

    return from_formulas(
        function,
        derivative,
        reduction,
        check=check_both,
        weight=weight,
        options=options,
        tensors=tensors,
        reductions=reductions,
        name=name,
    )
