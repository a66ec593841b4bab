"""Softmax and its logarithm: each value depends on all along one dimension."""

import torch
from torch import Tensor

from funcnet import runtime
from funcnet.core import Layer
from funcnet.lift import Step, parameterless, with_kernel


@with_kernel(lambda dy, dim, y: runtime.softmax_backward(dy, y, dim, y.dtype))
def softmax_backward(dy: Tensor, dim: int, y: Tensor) -> Tensor:
    """``dx = y (dy - sum y dy)``."""
    return y * (dy - (y * dy).sum(dim, keepdim=True))


def softmax(dim: int = -1) -> Layer:
    """``y = exp(x) / sum exp(x)`` over ``dim``; ``dx = y (dy - sum y dy)``. ``torch.nn.Softmax``.

    >>> softmax().apply({}, torch.tensor([0.0, 0.0]))[0]
    tensor([0.5000, 0.5000])
    """

    def forward(x: Tensor) -> Step:
        y = torch.softmax(x, dim)
        return y, {"y": y}, (dim,)

    return parameterless(forward, softmax_backward)


@with_kernel(lambda dy, dim, y: runtime.log_softmax_backward(dy, y, dim, y.dtype))
def log_softmax_backward(dy: Tensor, dim: int, y: Tensor) -> Tensor:
    """``dx = dy - exp(y) sum dy``."""
    return dy - y.exp() * dy.sum(dim, keepdim=True)


def log_softmax(dim: int = -1) -> Layer:
    """``y = x - log sum exp(x)`` over ``dim``; ``dx = dy - exp(y) sum dy``.

    Source: ``torch.nn.LogSoftmax``.

    >>> log_softmax().apply({}, torch.tensor([0.0, 0.0]))[0]
    tensor([-0.6931, -0.6931])
    """

    def forward(x: Tensor) -> Step:
        y = torch.log_softmax(x, dim)
        return y, {"y": y}, (dim,)

    return parameterless(forward, log_softmax_backward)
