"""Gated linear units: one half of the features decides how much of the other passes."""

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet.core import EMPTY, Layer, Params
from funcnet.lift import Step, parameterless, require_floating, with_kernel

aten = torch.ops.aten


@with_kernel(lambda dy, dim, x: aten.glu_backward(dy, x, dim))
def glu_backward(dy: Tensor, dim: int, x: Tensor) -> Tensor:
    """``da = dy s``, ``db = dy a s (1 - s)`` with ``s = sigmoid(b)``."""
    a, b = x.chunk(2, dim)
    s = torch.sigmoid(b)
    return torch.cat([dy * s, dy * a * s * (1 - s)], dim)


def glu(dim: int = -1) -> Layer:
    """``y = a sigmoid(b)``, where a and b are the halves of x along ``dim``.

    Args:
        dim: the dimension that is halved.

    Inputs:
        x with an even size along ``dim``.

    Source: ``torch.nn.GLU``; Dauphin et al. 2016.

    >>> glu().apply({}, torch.tensor([3.0, 0.0]))[0]
    tensor([1.5000])
    """

    def declaration(x: Tensor) -> Params:
        require_floating(x)
        if not -x.dim() <= dim < x.dim() or x.shape[dim] % 2:
            raise ValueError(f"expects an even size along dim {dim}, got {tuple(x.shape)}")
        return EMPTY

    def forward(x: Tensor) -> Step:
        return F.glu(x, dim), {"x": x}, (dim,)

    return parameterless(forward, glu_backward, declaration=declaration)
