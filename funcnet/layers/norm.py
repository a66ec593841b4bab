"""What the normalizations share: their parameters, their statistics, and their derivative."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcnet import runtime
from funcnet.core import Grads
from funcnet.deferred import for_dx
from funcnet.errors import require
from funcnet.initializers import Initializer, ones, zeros
from funcnet.lift import fastest, with_kernel
from funcnet.params import Param, State

FIRST: dict[str, Initializer] = {"weight": ones(), "bias": zeros()}
"""The first values of the parameters."""


def affine_names(affine: bool, bias: bool) -> tuple[str, ...]:
    """The parameters that are learned."""
    return () if not affine else ("weight", "bias") if bias else ("weight",)


def check_eps(name: str, eps: Any) -> None:
    """Raise unless eps is a number >= 0; 16, say, was meant as a number of channels."""
    hint = "the size of the input is found by init, there is no argument for it"
    right = isinstance(eps, float) or eps == 0
    require(right, f"{name}: eps must be a float, got {eps!r}; {hint}", TypeError)
    require(eps >= 0, f"{name}: eps must be >= 0, got {eps}")


def channel_params(
    x: Tensor, dim: int, names: tuple[str, ...], dtype: torch.dtype | None, tracked: bool = False
) -> dict[str, Param]:
    """Declares a parameter for each channel, and running statistics if they are tracked.

    ``dim`` is the dimension of the channels in x.
    """
    shape, of_x = (x.shape[dim],), (0, f"{{}} channels in dimension {dim}")
    declared = {name: Param(shape, FIRST[name], dtype, wide=True, of_x=of_x) for name in names}
    if tracked:
        declared["running_mean"] = State(shape, zeros(), dtype, wide=True, of_x=of_x)
        declared["running_var"] = State(shape, ones(), dtype, wide=True, of_x=of_x)
        declared["num_batches_tracked"] = State((), zeros(), torch.int64)
    return declared


def with_affine(
    normalize: Callable[[Any, Any], Any], weight: Any, bias: Any, shaped: Callable[[Any], Any]
) -> Any:
    """``(y, mean, rstd)`` of ``normalize(weight, bias)``, an operator of PyTorch's.

    In forward mode they are applied to its y: where x alone moves, the operator's own derivative
    mixes devices on fake tensors, so that it could not be compiled.
    """
    if not runtime.is_forward_mode():
        return normalize(weight, bias)
    y, mean, rstd = normalize(None, None)
    made = y if weight is None else y * shaped(weight)
    made = made if bias is None else made + shaped(bias)
    return made.to(y.dtype), mean, rstd


@with_kernel(lambda x, mean, rstd, dims, eps: (mean, rstd))
def norm_statistics(
    x: Tensor, mean: Tensor, rstd: Tensor, dims: list[int], eps: float
) -> tuple[Tensor, Tensor]:
    """``mean`` and ``rstd = 1 / sqrt(var + eps)`` of x over ``dims``.

    The forward kernels return both, given here, but without a derivative.
    """
    var, again = torch.var_mean(x.to(mean.dtype), dims, correction=0, keepdim=True)
    return again.reshape(mean.shape), (var + eps).rsqrt().reshape(rstd.shape)


def norm_backward(
    dy: Tensor, x: Tensor, weight: Any, mean: Any, rstd: Tensor, dims: list[int], wanted: Any
) -> Any:
    """``(dx, dweight, dbias)``, those that are ``wanted``, of ``y = n weight + bias``.

    ``n = (x - mean) rstd``, with the statistics of x over ``dims``. With ``g = dy weight``,
    ``dx = rstd (g - mean g - n mean(g n))``, ``dweight = sum dy n`` and ``dbias = sum dy``.
    Without a mean, where ``n = x rstd``, dx has no term ``mean g`` either.
    """
    n = x * rstd if mean is None else (x - mean) * rstd
    dx = dweight = dbias = None
    if wanted[0]:
        g = dy if weight is None else dy * weight
        constant = n * (g * n).mean(dims, keepdim=True)
        if mean is not None:
            constant = constant + g.mean(dims, keepdim=True)
        dx = (rstd * (g - constant)).to(x.dtype)
    if wanted[1]:
        dweight = (dy * n).sum_to_size(weight.shape).to(weight.dtype)
    if wanted[2]:
        dbias = dy.sum_to_size(weight.shape).to(weight.dtype)
    return dx, dweight, dbias


@for_dx("weight", "bias")
def norm_rule(
    residuals: Any,
    dy: Tensor,
    backward: Any,
    static: tuple[Any, ...],
    names: tuple[str, ...],
    *,
    params: bool,
    x: bool,
) -> Grads:
    """The rule of all normalizations, by their backward pass.

    It is ``(dx, dweight, dbias) = backward(dy, *static, wanted, **residuals)``; see
    `norm_backward`. ``names`` are those of the parameters that there are.
    """
    wanted = (x, params and "weight" in names, params and "bias" in names)
    if residuals["x"].numel():  # the kernels divide by the number of values
        backward = fastest(backward, dy, *residuals.values())
    dx, *grads = backward(dy, *static, wanted, **residuals)
    dparams = None
    if params:
        shape = residuals["weight"].shape if names else ()
        dparams = {name: grad.reshape(shape) for name, grad in zip(names, grads, strict=False)}
    return dparams, dx.reshape(dy.shape) if x else None
