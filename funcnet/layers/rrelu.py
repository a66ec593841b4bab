"""RReLU: a leaky ReLU whose slope is drawn for each value."""

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import random
from funcnet.batch_axis import BatchAxis, first_index
from funcnet.core import Forward, Key, Layer, Params, Pullback
from funcnet.errors import require
from funcnet.layers.piecewise import leaky_relu_derivative
from funcnet.lift import backward_rule, elementwise_rule, require_floating, stateful
from funcnet.params import declare


def rrelu_backward(dy: Tensor, slope: Tensor) -> Tensor:
    """``dx = dy slope``."""
    return dy * slope


def rrelu(lower: float = 1 / 8, upper: float = 1 / 3) -> Layer:
    """``y = x if x > 0 else slope x``, the slope of each value drawn from U(lower, upper).

    With ``train=False`` it is their mean, ``(lower + upper) / 2``.

    Args:
        lower, upper: the bounds of the slopes.

    Inputs:
        x of any shape, floating; a key when ``train=True``.
    VJP:
        ``dx = dy`` or ``slope dy``; the residual is the slope, 1 where x > 0.
    Raises:
        ValueError: without a key.

    Source: ``torch.nn.RReLU``; Xu, Wang, Chen and Li 2015.

    >>> import funcnet as fn
    >>> layer = fn.rrelu(0.1, 0.3)
    >>> layer.apply({}, torch.tensor([-1.0, -1.0, 2.0]))[0]
    tensor([-0.2000, -0.2000,  2.0000])
    >>> layer.apply({}, torch.tensor([-1.0, -1.0, 2.0]), key=fn.key(0), train=True)[0]
    tensor([-0.2895, -0.2957,  2.0000])
    """
    require(lower <= upper, f"rrelu: expects lower <= upper, got {lower} and {upper}")
    mean = (lower + upper) / 2

    def forward(
        params: Params,
        x: Tensor,
        state: Params,
        key: Key,
        train: bool,
        axis: BatchAxis | None = None,
    ) -> Forward:
        if not train or key is None:
            static = (leaky_relu_derivative, mean)
            return F.leaky_relu(x, mean), Pullback(elementwise_rule, {"x": x}, static), state
        # A number of half precision has too few bits to be drawn.
        wide = torch.promote_types(x.dtype, torch.float32)
        start = first_index(axis, "rrelu", x.shape, x.device)
        drawn = random.uniform(key, x.shape, wide, lower, upper, device=x.device, start=start)
        slope = torch.where(x <= 0, drawn.to(x.dtype), 1.0)
        return x * slope, Pullback(backward_rule, {"slope": slope}, (rrelu_backward,)), state

    return stateful(declare(require_floating), forward, keyed=True, takes_axis=True)
