"""Arithmetic on lists of leaves, for optimizers.

One call of a ``torch._foreach_*`` operator does what a loop over the leaves would do. vmap has no
rules for these operators, so there the loop runs. No function changes a list or a tensor that it
is given, but those that say "in place" may reuse the tensors of their first argument, which the
caller made itself.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from funcnet.runtime import is_transformed

Leaves = list[Tensor]


class Constant:
    """A Python number that multiplies lists of leaves.

    On CPU ``_foreach_mul`` by a 0-d tensor takes half the time of that by a number, for which
    it makes a tensor a leaf. Half precision keeps the number, which is then not rounded to it.
    """

    __slots__ = ("tensors", "value")

    def __init__(self, value: float) -> None:
        self.value = value
        self.tensors = {
            dtype: torch.tensor(value, dtype=dtype, device="cpu")
            for dtype in (torch.float32, torch.float64)
        }


Factor = Constant | Tensor | float
_ONE = Constant(1.0)
_dtype = attrgetter("dtype")
_HALF = (torch.float16, torch.bfloat16)


def _common_dtype(leaves: Leaves) -> torch.dtype | None:
    """The dtype of all leaves, if they have one and lie on the CPU."""
    dtype = leaves[0].dtype
    if leaves[0].is_cpu and {*map(_dtype, leaves)} == {dtype}:
        return dtype
    return None


def _scalar(leaves: Leaves, factor: Factor) -> float | Tensor | None:
    """The factor in the form that is fastest for these leaves, None for one a leaf."""
    if isinstance(factor, Constant):
        return factor.tensors.get(_common_dtype(leaves), factor.value)  # type: ignore[arg-type]
    if isinstance(factor, Tensor):
        dtype, *others = {*map(_dtype, leaves)}
        if others:
            return None
        # Rounding the factor to half precision would cost accuracy.
        return None if dtype in _HALF and dtype != factor.dtype else factor.to(dtype)
    return factor


def _each(
    foreach: Callable[..., Any], one: Callable[..., Tensor], lists: tuple[Leaves, ...], *args: Any
) -> Leaves:
    if not lists[0]:
        return []
    # On meta tensors a 0-d factor would be read.
    if lists[0][0].is_meta or is_transformed():
        return [one(*leaves, *args) for leaves in zip(*lists, strict=True)]
    return list(foreach(*lists, *args) or lists[0])


def _by_scalar(
    foreach: Callable[..., Any], one: Callable[..., Tensor], leaves: Leaves, factor: Factor
) -> Leaves:
    if not leaves:
        return []
    scalar = _scalar(leaves, factor)
    # Autograd's rule for one tensor and a list of leaves wants all leaves of one shape.
    if scalar is None or (isinstance(scalar, Tensor) and scalar.requires_grad):
        return [one(leaf, factor).to(leaf.dtype) for leaf in leaves]
    return _each(foreach, one, (leaves,), scalar)


def multiply(leaves: Leaves, factor: Factor) -> Leaves:
    """``leaf * factor``."""
    return _by_scalar(torch._foreach_mul, torch.mul, leaves, factor)


def add(leaves: Leaves, others: Leaves) -> Leaves:
    """``leaf + other``."""
    return _each(torch._foreach_add, torch.add, (leaves, others))


def subtract(leaves: Leaves, others: Leaves) -> Leaves:
    """``leaf - other``."""
    return _each(torch._foreach_sub, torch.sub, (leaves, others))


def add_in_place(leaves: Leaves, others: Leaves) -> Leaves:
    """``leaf + other``, in place."""
    return _each(torch._foreach_add_, torch.add, (leaves, others))


def add_scalar(leaves: Leaves, scalar: float) -> Leaves:
    """``leaf + scalar``."""
    return _each(torch._foreach_add, torch.add, (leaves,), scalar)


def add_scalar_in_place(leaves: Leaves, scalar: Tensor) -> Leaves:
    """``leaf + scalar``, in place."""
    # Given by position a tensor is read, for the overload that takes a number.
    return _by_scalar(
        lambda leaves, other: torch._foreach_add_(leaves, other=other), torch.add, leaves, scalar
    )


def lerp(leaves: Leaves, others: Leaves, weight: float) -> Leaves:
    """``leaf + weight (other - leaf)``."""
    return _each(torch._foreach_lerp, torch.lerp, (leaves, others), weight)


def add_square_in_place(leaves: Leaves, others: Leaves, weight: float) -> Leaves:
    """``leaf + weight other^2``, in place."""
    return _each(
        lambda a, b: torch._foreach_addcmul_(a, b, b, weight),
        lambda a, b: torch.addcmul(a, b, b, value=weight),
        (leaves, others),
    )


def divide(leaves: Leaves, others: Leaves) -> Leaves:
    """``leaf / other``."""
    return _each(torch._foreach_div, torch.div, (leaves, others))


def negate(leaves: Leaves) -> Leaves:
    """``-leaf``."""
    return _each(torch._foreach_neg, torch.neg, (leaves,))


def sign(leaves: Leaves) -> Leaves:
    """``sign(leaf)``."""
    return _each(torch._foreach_sign, torch.sign, (leaves,))


def sqrt(leaves: Leaves) -> Leaves:
    """``sqrt(leaf)``, whose derivative at 0 is taken as 0."""
    if is_transformed(*leaves):
        roots = [torch.where(leaf > 0, leaf, 1.0).sqrt() for leaf in leaves]
        return [
            torch.where(leaf > 0, root, leaf.detach())
            for leaf, root in zip(leaves, roots, strict=True)
        ]
    return _each(torch._foreach_sqrt, torch.sqrt, (leaves,))


def square(leaves: Leaves) -> Leaves:
    """``leaf^2``."""
    return _each(torch._foreach_mul, torch.mul, (leaves, leaves))


def maximum(leaves: Leaves, others: Leaves) -> Leaves:
    """``max(leaf, other)``."""
    return _each(torch._foreach_maximum, torch.maximum, (leaves, others))


def _plain(leaves: Leaves) -> bool:
    """Whether all lie on the CPU, contiguous, of one dtype, and none needs a gradient."""
    if not leaves or not leaves[0].is_cpu:
        return False
    dtype = leaves[0].dtype
    return all(
        [leaf.dtype is dtype and leaf.is_contiguous() and not leaf.requires_grad for leaf in leaves]
    )


def adam(
    grads: Leaves,
    mu: Leaves,
    nu: Leaves,
    nu_max: Leaves,
    step: Tensor,
    betas: tuple[float, float],
    eps: float,
    factor: float = 1.0,
) -> tuple[Leaves, Leaves, Leaves, Leaves]:
    """Adam's direction after ``step`` gradients, times a factor, and the new mu, nu and nu_max.

    ``nu_max`` is empty without amsgrad.

    ``torch._fused_adam_`` does it all in one call, where it may: it checks neither shapes nor
    strides, and autograd and torch.func do not see into it.
    """
    if is_transformed() or not _plain([*grads, *mu, *nu, *nu_max]):
        return _adam_by_formula(grads, mu, nu, nu_max, step, betas, eps, factor)
    # From params of 0 and with a learning rate of -factor the kernel steps to what is wanted.
    direction = [torch.zeros_like(leaf) for leaf in grads]
    # Multiplying by 1 copies a list in one call.
    one = _ONE.tensors.get(grads[0].dtype, 1.0)
    new_mu, new_nu, new_max = (
        list(torch._foreach_mul(leaves, one)) if leaves else [] for leaves in (mu, nu, nu_max)
    )
    torch._fused_adam_(
        direction,
        grads,
        new_mu,
        new_nu,
        new_max,
        [step.to(torch.float32)] * len(grads),
        lr=-factor,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=0.0,
        eps=eps,
        amsgrad=bool(nu_max),
        maximize=False,
    )
    return direction, new_mu, new_nu, new_max


def _adam_by_formula(
    grads: Leaves,
    mu: Leaves,
    nu: Leaves,
    nu_max: Leaves,
    step: Tensor,
    betas: tuple[float, float],
    eps: float,
    factor: float,
) -> tuple[Leaves, Leaves, Leaves, Leaves]:
    beta1, beta2 = betas
    kept = [leaf.dtype for leaf in grads]
    grads, mu, nu, nu_max = (
        [leaf.float() if leaf.dtype in _HALF else leaf for leaf in leaves]
        for leaves in (grads, mu, nu, nu_max)
    )
    mu = lerp(mu, grads, 1.0 - beta1)
    nu = add_square_in_place(multiply(nu, beta2), grads, 1.0 - beta2)
    nu_max = maximum(nu_max, nu)
    # m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) = m / (sqrt(v) spread + floor)
    time = step.to(torch.float64)
    correction = 1.0 - beta1**time
    spread = correction / (1.0 - beta2**time).sqrt()
    root = multiply(sqrt(nu_max or nu), spread)
    direction = divide(mu, add_scalar_in_place(root, correction * eps))
    if factor != 1.0:
        direction = multiply(direction, factor)
    direction, mu, nu, nu_max = (
        [leaf.to(dtype) for leaf, dtype in zip(leaves, kept, strict=False)]
        for leaves in (direction, mu, nu, nu_max)
    )
    return direction, mu, nu, nu_max
