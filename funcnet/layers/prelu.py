"""PReLU: an activation with a parameter."""

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import tree
from funcnet.core import Layer, Params, Pullback
from funcnet.initializers import constant
from funcnet.lift import require_floating, stateless
from funcnet.params import Param, declare


def prelu_rule(
    residuals: dict[str, Tensor], dy: Tensor, *, params: bool, x: bool
) -> tuple[Params | None, Tensor | None]:
    """``dx = dy [x > 0] + weight dy [x <= 0]``, ``dweight = sum dy x [x <= 0]`` by channel."""
    inputs, weight = residuals["x"], residuals["weight"]
    positive = inputs > 0
    dparams = None
    if params:
        by_slope = torch.where(positive, 0.0, dy * inputs)
        channelwise = weight.shape[0] > 1
        dims = [dim for dim in range(inputs.dim()) if not (channelwise and dim == 1)]
        dweight = by_slope.sum(dims) if dims else by_slope
        dparams = {"weight": dweight.reshape(weight.shape)}
    dx = torch.where(positive, dy, dy * _along_channels(weight, inputs)) if x else None
    return dparams, dx


def _along_channels(weight: Tensor, x: Tensor) -> Tensor:
    """A weight by channel, dimension 1, in a shape that broadcasts against x."""
    if weight.shape[0] > 1:
        return weight.reshape(-1, *[1] * (x.dim() - 2))
    return weight.reshape([1] * x.dim())


def prelu(
    num_parameters: int = 1, init: float = 0.25, *, dtype: torch.dtype | None = None
) -> Layer:
    """``y = x if x > 0 else weight x``, with a learned slope.

    Args:
        num_parameters: 1, or the size of x's dimension 1 for a slope of each channel.
        init: the first value of the slopes.
        dtype: of the slopes; default that of x.

    Params: ``weight`` (num_parameters,).
    VJP: ``dx = dy`` or ``weight dy``; ``dweight = sum dy x [x <= 0]``.
    Source: ``torch.nn.PReLU``; He et al. 2015.

    >>> prelu().apply({"weight": torch.tensor([0.1])}, torch.tensor([-1.0, 2.0]))[0]
    tensor([-0.1000,  2.0000])
    """
    if num_parameters < 1:
        raise ValueError(f"prelu: num_parameters must be at least 1, got {num_parameters}")

    @declare
    def start(x: Tensor) -> dict[str, Param]:
        require_floating(x)
        if num_parameters > 1 and (x.dim() < 2 or x.shape[1] != num_parameters):
            raise ValueError(
                f"weight expects {num_parameters} channels in dimension 1, got {tree.describe(x)}"
            )
        return {"weight": Param((num_parameters,), constant(init), dtype)}

    def apply(params: Params, x: Tensor) -> Tensor:
        return F.prelu(x, params["weight"])

    def vjp(params: Params, x: Tensor) -> tuple[Tensor, Pullback]:
        return apply(params, x), Pullback(prelu_rule, {"x": x, "weight": params["weight"]})

    return stateless(start, apply, vjp)
