"""Local response normalization: each channel is divided by a power of the mean square around it."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet.core import EMPTY, Layer, Params
from funcnet.errors import require
from funcnet.lift import Step, parameterless, require_floating


def sum_around(x: Tensor, before: int, after: int) -> Tensor:
    """The sums of x over the channels ``c - before ... c + after``, those that there are."""
    if x.numel() == 0:  # pooling takes no empty images
        return x
    size, most = before + after + 1, max(before, after)
    examples, channels = x.shape[:2]
    flat = x.reshape(examples, 1, channels, math.prod(x.shape[2:]))
    pooled = F.avg_pool2d(flat, (size, 1), 1, (most, 0), divisor_override=1)
    return pooled.narrow(2, most - before, channels).reshape(x.shape)


def respond(x: Tensor, sums: Tensor, factor: float, beta: float, k: float) -> tuple[Tensor, Any]:
    """``y = x d^-beta`` with ``d = k + factor sums``, and the residuals of both backward passes."""
    d = sums * factor + k
    scale = d.pow(-beta)
    return x * scale, {"x": x, "d": d, "scale": scale}


def local_response_backward(
    dy: Tensor, factor: float, beta: float, size: int, *, x: Tensor, d: Tensor, scale: Tensor
) -> Tensor:
    """``dx = dy d^-beta - 2 factor beta x sum_around(dy x d^(-beta - 1))``, mirrored."""
    by_scale = dy * scale
    around = sum_around(by_scale * x / d, (size - 1) // 2, size // 2)
    return torch.addcmul(by_scale, x, around, value=-2 * factor * beta)


def local_response_norm(
    size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Layer:
    """``y = x / (k + alpha / size sum x^2)^beta``, the sum over ``size`` channels around its own.

    They are ``c - size // 2 ... c + (size - 1) // 2``, those that there are.

    Args:
        size: the number of channels of a sum.
        alpha, beta, k: see the formula.

    Inputs:
        x of shape ``(batch, channels, *)``, floating, any rank from 3.
    VJP:
        with d what is raised to the power,
        ``dx = dy d^-beta - 2 alpha beta / size x sum dy x d^(-beta - 1)``, the sum over the
        channels in whose sum x is.

    Source: ``torch.nn.LocalResponseNorm``; Krizhevsky, Sutskever and Hinton 2012.

    >>> import funcnet as fn
    >>> fn.local_response_norm(2, alpha=2.0, beta=1.0).apply({}, torch.ones(1, 3, 1))[0].flatten()
    tensor([0.5000, 0.3333, 0.3333])
    """
    check_size("local_response_norm", size)

    def declaration(x: Tensor) -> Params:
        require_floating(x)
        expected = "(batch, channels, *) of at least 3 dimensions"
        require(x.dim() >= 3, f"expects {expected}, got {tuple(x.shape)}")
        return EMPTY

    def forward(x: Tensor) -> Step:
        sums = sum_around(x * x, size // 2, (size - 1) // 2)
        return *respond(x, sums, alpha / size, beta, k), (alpha / size, beta, size)

    return parameterless(forward, local_response_backward, declaration=declaration)


def check_size(name: str, size: Any) -> None:
    """Raise unless the number of channels of a sum is a positive integer."""
    enough = isinstance(size, int) and size > 0
    require(enough, f"{name}: size must be an integer > 0, got {size!r}")


def cross_map_window(x: Tensor, size: int) -> Tensor:
    """1 where the square of channel j is in the sum of channel i, else 0, of shape (i, j)."""
    j = torch.arange(x.shape[1], device=x.device)
    near = (j.unsqueeze(1) - j).abs() <= (size - 1) // 2
    return (near | (j == 0)).to(x.dtype)


def sum_in_window(window: Tensor, x: Tensor) -> Tensor:
    """``sum_j window[i, j] x[:, j]``."""
    return (window @ x.flatten(2)).reshape(x.shape)


def cross_map_backward(
    dy: Tensor, factor: float, beta: float, *, x: Any, d: Any, scale: Any, window: Any
) -> Tensor:
    """`local_response_backward` with sums over the window's columns."""
    by_scale = dy * scale
    sums = sum_in_window(window.t(), by_scale * x / d)
    return torch.addcmul(by_scale, x, sums, value=-2 * factor * beta)


def cross_map_lrn(size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Layer:
    """``y = x / (k + alpha / size sum x^2)^beta``, the sum over the first channel and those near.

    The channels near c are those that there are of ``c - r ... c + r`` with
    ``r = (size - 1) // 2``. That the first one is in every sum is due to a loop of
    ``torch.nn.CrossMapLRN2d``, whose values these are; `local_response_norm` has it not.

    Args:
        size: what alpha is divided by, and the number of channels near, if it is odd.
        alpha, beta, k: see the formula.

    Inputs:
        x of shape (batch, channels, H, W), floating.
    VJP:
        with d what is raised to the power,
        ``dx = dy d^-beta - 2 alpha beta / size x sum dy x d^(-beta - 1)``, the sum over the
        channels in whose sum x is. The backward pass of torch's module sums over others, which is
        not the derivative.

    Source: ``torch.nn.CrossMapLRN2d``.

    >>> import funcnet as fn
    >>> layer = fn.cross_map_lrn(3, alpha=3.0, beta=1.0)
    >>> layer.apply({}, torch.ones(1, 4, 1, 1))[0].flatten()
    tensor([0.3333, 0.2500, 0.2000, 0.2500])
    """
    check_size("cross_map_lrn", size)

    def declaration(x: Tensor) -> Params:
        require_floating(x)
        require(x.dim() == 4, f"expects (batch, channels, H, W), got {tuple(x.shape)}")
        return EMPTY

    def forward(x: Tensor) -> Step:
        window = cross_map_window(x, size)
        y, residuals = respond(x, sum_in_window(window, x * x), alpha / size, beta, k)
        return y, {**residuals, "window": window}, (alpha / size, beta)

    return parameterless(forward, cross_map_backward, declaration=declaration)
