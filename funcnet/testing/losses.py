"""`check_loss`: the laws of losses, each a named check of one loss with one example."""

from collections.abc import Callable

import torch
from torch import Tensor

from funcnet import random, tree
from funcnet.core import Loss, Tree
from funcnet.testing.assertions import (
    Unchanged,
    alike,
    check_laws,
    close,
    equal,
    list_of_laws,
    module_level,
    named,
    require,
)
from funcnet.testing.derivatives import autograd, require_finite_differences
from funcnet.testing.samples import cast, cotangent, non_contiguous, perturbed, scaled, stack
from funcnet.transforms import vmap as mapping


class Case:
    """A loss with a prediction and a target, and what it gave for them."""

    def __init__(self, loss: Loss, prediction: Tree, target: Tree, rtol: float) -> None:
        self.loss, self.prediction, self.target, self.rtol = loss, prediction, target, rtol
        self.arguments = Unchanged(prediction=prediction, target=target)
        self.value, self.pullback = loss.vjp(prediction, target)
        self.residuals = Unchanged(residuals=self.pullback)
        self.gradient = self.pullback()
        self.dvalue = cotangent(random.key(0), self.value)


def check_value(case: Case) -> None:
    """The value is a floating-point tensor; dvalue has its shape, and no other."""
    floating = isinstance(case.value, Tensor) and case.value.is_floating_point()
    require(floating, "the value is a floating-point tensor")
    require(_takes(case, case.dvalue), "the pullback takes a dvalue of the value's shape")
    other = _takes(case, torch.ones_like(case.value)[None])
    require(not other, "the pullback refuses a dvalue of another shape with ValueError")


def _takes(case: Case, dvalue: Tensor) -> bool:
    try:
        case.pullback(dvalue)
    except ValueError:
        return False
    return True


def check_pure(case: Case) -> None:
    """The same arguments give the same results bit for bit; no argument or residual is changed."""
    case.loss.apply(case.prediction, case.target)
    case.arguments.check()
    case.residuals.check()
    equal("pullback() is pullback(1.0)", case.gradient, case.pullback(1.0))
    ones = case.pullback(torch.ones_like(case.value))
    close("pullback() is that of a dvalue of ones", case.gradient, ones)
    equal("the same pullback gives the same gradient", case.gradient, case.pullback())
    value, pullback = case.loss.vjp(case.prediction, case.target)
    equal("the same arguments, the same value", case.value, value)
    equal("the same arguments, the same gradient", case.gradient, pullback())
    case.loss.vjp(scaled(case.prediction, 0.5), case.target)
    equal("a pullback is not changed by another call", case.gradient, case.pullback())
    case.residuals.check()
    case.arguments.check()


def check_vjp_equals_apply(case: Case) -> None:
    """With the same arguments vjp gives the same value as apply."""
    applied = case.loss.apply(case.prediction, case.target)
    equal("vjp's value is apply's", applied, case.value)
    case.arguments.check()


def check_structure(case: Case) -> None:
    """The gradient has the structure, shapes and dtypes of the prediction.

    The pullback's rule is a module-level function.
    """
    alike("dprediction is like the prediction", case.prediction, case.gradient)
    module_level(case.pullback)


def check_linear(case: Case) -> None:
    """The pullback is linear in dvalue, a number or a tensor."""
    expected = scaled(case.gradient, -2.5)
    close("the pullback is linear", expected, case.pullback(-2.5), case.rtol)
    other = cotangent(random.key(1), case.value)
    expected = tree.map(
        lambda a, b: 2.0 * a - 3.0 * b, case.pullback(case.dvalue), case.pullback(other)
    )
    mixed = case.pullback(2.0 * case.dvalue - 3.0 * other)
    close("the pullback is linear in a tensor", expected, mixed, case.rtol)
    case.residuals.check()
    case.arguments.check()


def check_no_autograd(case: Case) -> None:
    """No result needs a gradient, and inference mode changes nothing."""
    for leaf in tree.leaves((case.value, case.gradient)):
        require(not leaf.requires_grad, "results need no gradient")
    with torch.inference_mode():
        inferred = case.loss.vjp(case.prediction, case.target)[1]()
        equal("inference mode changes nothing in the gradient", case.gradient, inferred)


def check_derivative(case: Case) -> None:
    """The pullback agrees with torch's autograd through apply, and with finite differences."""

    def value(prediction: Tree) -> Tensor:
        return case.loss.apply(prediction, case.target)

    gradient = case.pullback(case.dvalue)
    expected = autograd(value, case.prediction, case.dvalue)
    close("the pullback agrees with autograd", expected, gradient, case.rtol)
    key = random.key(2)
    require_finite_differences(key, value, case.prediction, case.dvalue, gradient)


def check_memory_layout(case: Case) -> None:
    """A prediction or a dvalue that is not contiguous gives the same result."""
    value, pullback = case.loss.vjp(tree.map(non_contiguous, case.prediction), case.target)
    close("a non-contiguous prediction gives the same value", case.value, value)
    expected, got = case.pullback(case.dvalue), pullback(non_contiguous(case.dvalue))
    close("a non-contiguous dvalue gives the same gradient", expected, got)


def check_float32(case: Case) -> None:
    """The value and the gradient of a float32 prediction are float32."""
    prediction, target = cast(case.prediction, torch.float32), cast(case.target, torch.float32)
    value, pullback = case.loss.vjp(prediction, target)
    alike("dprediction is like the prediction", prediction, pullback())
    alike("whatever the dtype of dvalue", prediction, pullback(case.dvalue))
    require(value.dtype == torch.float32, "the value has the prediction's dtype")


def check_vmap(case: Case) -> None:
    """Under vmap each member of a population has the results of its solo run."""
    members = [perturbed(key, case.prediction) for key in random.split(random.key(1), 3)]

    def run(prediction: Tree) -> Tree:
        value, pullback = case.loss.vjp(prediction, case.target)
        return value, pullback(), pullback(case.dvalue)

    together = mapping.vmap(run)(stack(members))
    alone = stack([run(member) for member in members])
    close("under vmap each member equals its solo run", alone, together)


LAWS: dict[str, Callable[[Case], None]] = {
    "value": check_value,
    "pure": check_pure,
    "vjp equals apply": check_vjp_equals_apply,
    "structure": check_structure,
    "linear": check_linear,
    "no autograd": check_no_autograd,
    "derivative": check_derivative,
    "memory layout": check_memory_layout,
    "float32": check_float32,
    "vmap": check_vmap,
}
"""The laws of losses, in the order of the checks; the first broken one is reported."""


def check_loss(
    loss: Loss,
    prediction: Tree,
    target: Tree,
    *,
    derivative: bool = True,
    vmap: bool = True,
    rtol: float = 1e-10,
) -> None:
    """Check that a loss keeps the laws of the protocol; it is computed in float64.

    Args:
        loss: the loss.
        prediction, target: examples, away from kinks. Either may be a tree.
        derivative: False for a rule that is meant not to be the derivative.
        vmap: False for a loss that cannot.
        rtol: the greatest relative error of the derivative.

    Raises:
        AssertionError: its message names the law, and what differs.

    The laws:

    {laws}

    >>> import funcnet as fn
    >>> check_loss(fn.mse(), torch.ones(4, 2), torch.zeros(4, 2))
    """
    optional = {"derivative": derivative, "vmap": vmap}
    prediction, target = tree.map(torch.Tensor.detach, cast((prediction, target), torch.float64))
    with named("loss"):
        case = Case(loss, prediction, target, rtol)
    check_laws("loss", LAWS, case, optional)


check_loss.__doc__ = (check_loss.__doc__ or "").replace("{laws}", list_of_laws(LAWS))
