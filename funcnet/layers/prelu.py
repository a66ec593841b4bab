"""PReLU: an activation with a parameter."""

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import runtime, tree
from funcnet.core import Grads, Layer, Params, Pullback
from funcnet.deferred import for_dx
from funcnet.errors import require
from funcnet.initializers import constant
from funcnet.lift import fastest, require_floating, stateless, with_kernel
from funcnet.params import Param, declare


@with_kernel(runtime.prelu_backward)
def prelu_backward(dy: Tensor, x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """``dx = dy [x > 0] + slope dy [x <= 0]``, and ``dslope = dy x [x <= 0]`` of each element."""
    positive = x > 0
    return torch.where(positive, dy, dy * slope), torch.where(positive, 0.0, dy * x)


@for_dx("weight")
def prelu_rule(residuals: dict[str, Tensor], dy: Tensor, *, params: bool, x: bool) -> Grads:
    """``dweight`` is the sum of `prelu_backward`'s dslope, by channel if there are several."""
    inputs, weight = residuals["x"], residuals["weight"]
    # One slope is for all, several are for dimension 1.
    several = weight.numel() > 1
    slope = weight.reshape([-1 if several and dim == 1 else 1 for dim in range(inputs.dim())])
    dx, by_slope = fastest(prelu_backward, dy, inputs, slope)(dy, inputs, slope)
    dparams = None
    if params:
        dparams = {"weight": by_slope.sum_to_size(slope.shape).reshape(weight.shape)}
    return dparams, dx if x else None


def prelu(
    num_parameters: int = 1, init: float = 0.25, *, dtype: torch.dtype | None = None
) -> Layer:
    """``y = x if x > 0 else weight x``, with a learned slope.

    Args:
        num_parameters: 1, or the size of x's dimension 1 for a slope of each channel.
        init: the first value of the slopes.
        dtype: of the slopes; default that of x.

    Learned params:
        ``weight`` (num_parameters,).
    VJP:
        ``dx = dy`` or ``weight dy``; ``dweight = sum dy x [x <= 0]``.

    Source: ``torch.nn.PReLU``; He et al. 2015.

    >>> prelu().apply({"weight": torch.tensor([0.1])}, torch.tensor([-1.0, 2.0]))[0]
    tensor([-0.1000,  2.0000])
    """
    least = f"prelu: num_parameters must be at least 1, got {num_parameters}"
    require(num_parameters >= 1, least)

    @declare
    def start(x: Tensor) -> dict[str, Param]:
        require_floating(x)
        fits = num_parameters in (1, *x.shape[1:2])
        got = f"got {tree.describe(x)}"
        require(fits, f"weight expects {num_parameters} channels in dimension 1, {got}")
        return {"weight": Param((num_parameters,), constant(init), dtype)}

    def apply(params: Params, x: Tensor) -> Tensor:
        return F.prelu(x, params["weight"])

    def vjp(params: Params, x: Tensor) -> tuple[Tensor, Pullback]:
        return apply(params, x), Pullback(prelu_rule, {"x": x, "weight": params["weight"]})

    return stateless(start, apply, vjp)
