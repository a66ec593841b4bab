"""Softmax and its kin: each value depends on all along one dimension.

The dimension is the last one by default. In torch.nn the default is chosen by the rank of x, which
is deprecated there.
"""

import torch
from torch import Tensor

from funcnet import runtime
from funcnet.core import EMPTY, Layer, Params
from funcnet.errors import require
from funcnet.lift import Step, parameterless, require_floating, with_kernel


@with_kernel(lambda dy, dim, y: runtime.softmax_backward(dy, y, dim, y.dtype))
def softmax_backward(dy: Tensor, dim: int, y: Tensor) -> Tensor:
    """``dx = y (dy - sum y dy)``."""
    return y * (dy - (y * dy).sum(dim, keepdim=True))


def softmax(dim: int = -1) -> Layer:
    """``y = exp(x) / sum exp(x)`` over ``dim``; ``dx = y (dy - sum y dy)``.

    Args:
        dim: the dimension whose values have the sum 1.

    Source: ``torch.nn.Softmax``.

    >>> softmax().apply({}, torch.tensor([0.0, 0.0]))[0]
    tensor([0.5000, 0.5000])
    """

    def forward(x: Tensor) -> Step:
        y = torch.softmax(x, dim)
        return y, {"y": y}, (dim,)

    return parameterless(forward, softmax_backward)


def softmax2d() -> Layer:
    """`softmax` over the channels of images, at each pixel. Source: ``torch.nn.Softmax2d``.

    Inputs:
        x of shape (batch, channels, H, W) or (channels, H, W).

    >>> softmax2d().apply({}, torch.zeros(2, 1, 1))[0].flatten()
    tensor([0.5000, 0.5000])
    """

    def declaration(x: Tensor) -> Params:
        require_floating(x)
        expected = "(batch, channels, H, W) or (channels, H, W)"
        require(x.dim() in (3, 4), f"expects {expected}, got {tuple(x.shape)}")
        return EMPTY

    def forward(x: Tensor) -> Step:
        y = torch.softmax(x, -3)
        return y, {"y": y}, (-3,)

    return parameterless(forward, softmax_backward, declaration=declaration)


@with_kernel(lambda dy, dim, y: -runtime.softmax_backward(dy, y, dim, y.dtype))
def softmin_backward(dy: Tensor, dim: int, y: Tensor) -> Tensor:
    """``dx = y (sum y dy - dy)``."""
    return y * ((y * dy).sum(dim, keepdim=True) - dy)


def softmin(dim: int = -1) -> Layer:
    """``y = exp(-x) / sum exp(-x)`` over ``dim``; ``dx = y (sum y dy - dy)``.

    Args:
        dim: the dimension whose values have the sum 1.

    Source: ``torch.nn.Softmin``.

    >>> softmin().apply({}, torch.tensor([0.0, 0.0]))[0]
    tensor([0.5000, 0.5000])
    """

    def forward(x: Tensor) -> Step:
        y = torch.softmax(-x, dim)
        return y, {"y": y}, (dim,)

    return parameterless(forward, softmin_backward)


@with_kernel(lambda dy, dim, y: runtime.log_softmax_backward(dy, y, dim, y.dtype))
def log_softmax_backward(dy: Tensor, dim: int, y: Tensor) -> Tensor:
    """``dx = dy - exp(y) sum dy``."""
    return dy - y.exp() * dy.sum(dim, keepdim=True)


def log_softmax(dim: int = -1) -> Layer:
    """``y = x - log sum exp(x)`` over ``dim``; ``dx = dy - exp(y) sum dy``.

    Args:
        dim: the dimension whose values have the sum 1.

    Source: ``torch.nn.LogSoftmax``.

    >>> log_softmax().apply({}, torch.tensor([0.0, 0.0]))[0]
    tensor([-0.6931, -0.6931])
    """

    def forward(x: Tensor) -> Step:
        y = torch.log_softmax(x, dim)
        return y, {"y": y}, (dim,)

    return parameterless(forward, log_softmax_backward)
