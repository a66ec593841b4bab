"""Similarity and distance of the vectors of two inputs."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet.core import EMPTY, Layer
from funcnet.errors import require
from funcnet.layers.tuples import floating_pair
from funcnet.lift import Step, parameterless
from funcnet.params import Param

Pair = tuple[Tensor, Tensor]


def _require_pair(x: Any) -> Mapping[str, Param]:
    """ValueError or TypeError unless x is two floating-point tensors that broadcast."""
    x1, x2 = floating_pair(x)
    try:
        shape = torch.broadcast_shapes(x1.shape, x2.shape)
    except RuntimeError:
        got = f"{tuple(x1.shape)} and {tuple(x2.shape)}"
        raise ValueError(f"expects shapes that broadcast, got {got}") from None
    require(len(shape) > 0, "expects vectors, got () and ()")
    return EMPTY


def cosine_similarity_backward(
    dy: Tensor, dim: int, eps: float, x: Pair, y: Tensor
) -> tuple[Tensor, Tensor]:
    """``dx1 = dy (x2 / |x2| - y x1 / |x1|) / |x1|``, and likewise dx2.

    Norms that divide are at least eps, but for that below ``y x1``, which is x1's own; where it
    is 0 that term is 0. That is PyTorch's derivative.
    """
    dy, y = dy.unsqueeze(dim), y.unsqueeze(dim)
    pair = torch.broadcast_tensors(*x)
    norms = [torch.linalg.vector_norm(part, 2, dim, keepdim=True) for part in pair]
    units = [part / norm.clamp(min=eps) for part, norm in zip(pair, norms, strict=True)]

    def half(own: int, other: int) -> Tensor:
        direction = torch.where(norms[own] == 0, 0.0, pair[own] / norms[own])
        dx = dy * (units[other] - y * direction) / norms[own].clamp(min=eps)
        return dx.sum_to_size(x[own].shape)

    return half(0, 1), half(1, 0)


def cosine_similarity(dim: int = 1, eps: float = 1e-8) -> Layer:
    """``y = x1 . x2 / (max(|x1|, eps) max(|x2|, eps))`` of the vectors along ``dim``.

    Args:
        dim: the dimension of the vectors, in the shape that x1 and x2 are broadcast to.
        eps: the least norm that is divided by.

    Inputs:
        x = (x1, x2) of shapes that broadcast, floating.
    Returns:
        y, of the shape without ``dim``.
    VJP:
        ``dx1 = dy (x2 / |x2| - y x1 / |x1|) / |x1|``, and likewise dx2; each summed to the shape of
        its input.
    Raises:
        ValueError: shapes that do not broadcast, or have no dimension ``dim``.

    Source: ``torch.nn.CosineSimilarity``.

    >>> import funcnet as fn
    >>> x = (torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
    >>> y, pullback, _ = fn.cosine_similarity().vjp({}, x)
    >>> y, pullback(torch.ones(1))[1]
    (tensor([0.6000]), (tensor([[0.0000, 0.8000]]), tensor([[ 0.1280, -0.0960]])))
    """

    def declaration(x: Any) -> Mapping[str, Param]:
        declared = _require_pair(x)
        dims = max(part.dim() for part in x)
        got = f"{tuple(x[0].shape)} and {tuple(x[1].shape)}"
        require(-dims <= dim < dims, f"expects a dimension {dim}, got {got}")
        return declared

    def forward(x: Pair) -> Step:
        y = F.cosine_similarity(*x, dim, eps)
        return y, {"x": x, "y": y}, (dim % max(part.dim() for part in x), eps)

    return parameterless(forward, cosine_similarity_backward, declaration=declaration)


def pairwise_distance_backward(
    dy: Tensor,
    p: float,
    keepdim: bool,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    difference: Tensor,
    y: Tensor,
) -> tuple[Tensor, Tensor]:
    """``dx1 = dy sign(d) (|d| / y)^(p - 1) = -dx2``, 0 where d is 0.

    With p = inf or -inf, dy is shared evenly among the elements with ``|d| = y``; with p = 0 it
    reaches none.
    """
    if not keepdim:
        dy, y = dy.unsqueeze(-1), y.unsqueeze(-1)
    size = difference.abs()
    if p == 0.0:
        direction = torch.zeros_like(size)
    elif p == 2.0:  # what the last case is then, in half the time
        direction = torch.where(y == 0, 0.0, difference / y)
    elif math.isinf(p):
        extreme = (size == y) | size.isnan()
        direction = difference.sign() * extreme / extreme.sum(-1, keepdim=True)
    else:
        direction = difference.sign() * torch.where(size == 0, 0.0, (size / y) ** (p - 1))
    dx = dy * direction
    return dx.sum_to_size(shapes[0]), (-dx).sum_to_size(shapes[1])


def pairwise_distance(p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Layer:
    """``y = (sum |x1 - x2 + eps|^p)^(1/p)`` over the last dimension.

    Args:
        p: the degree of the norm: any number, inf and -inf too; with 0 it counts.
        eps: added to each difference.
        keepdim: whether the last dimension stays, with size 1.

    Inputs:
        x = (x1, x2) of shapes ``(*, features)`` that broadcast, floating.
    Returns:
        y of shape ``(*)`` or ``(*, 1)``.
    VJP:
        with ``d = x1 - x2 + eps``: ``dx1 = dy sign(d) (|d| / y)^(p - 1) = -dx2``, 0 where d is 0;
        each summed to the shape of its input.
    Raises:
        ValueError: shapes that do not broadcast.

    Source: ``torch.nn.PairwiseDistance``.

    >>> import funcnet as fn
    >>> x = (torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
    >>> y, pullback, _ = fn.pairwise_distance().vjp({}, x)
    >>> y, pullback(torch.ones(1))[1]
    (tensor([5.0000]), (tensor([[0.6000, 0.8000]]), tensor([[-0.6000, -0.8000]])))
    """

    def forward(x: Pair) -> Step:
        x1, x2 = x
        difference = x1 - x2 + eps
        y = torch.linalg.vector_norm(difference, p, -1, keepdim)
        shapes = tuple(x1.shape), tuple(x2.shape)
        return y, {"difference": difference, "y": y}, (p, keepdim, shapes)

    return parameterless(forward, pairwise_distance_backward, declaration=_require_pair)
