"""The p-norm of windows, up to the sign of odd powers."""

import math

import torch
from torch import Tensor

from funcnet.core import Layer
from funcnet.errors import require
from funcnet.layers.avg_pool import average, avg_pool_backward
from funcnet.layers.max_pool import max_pool_backward, maxima
from funcnet.layers.spatial import Size, Window, require_spatial, spatial, window_of
from funcnet.lift import Step, fastest, parameterless

# Windows that end beyond x have an average of fewer points.
_COUNTED = (True, None)


def lp_pool_backward(
    dy: Tensor, norm_type: float, window: Window, ceil_mode: bool, x: Tensor, total: Tensor
) -> Tensor:
    """``dx = x^(p - 1) A^T (dy points total^(1/p - 1))``, with A the averages; 0 of no total."""
    slope = dy * math.prod(window.kernel) * total.pow(1.0 / norm_type - 1.0)
    slope = torch.where(total == 0, 0.0, slope)
    size, options = tuple(x.shape[-len(window.kernel) :]), (ceil_mode, *_COUNTED)
    dpowers = fastest(avg_pool_backward, slope, x)(slope, size, window, *options)
    return dpowers * x.pow(norm_type - 1.0)


def lp_pool_of_infinity_backward(
    dy: Tensor, size: tuple[int, ...], window: Window, ceil_mode: bool, x: Tensor, indices: Tensor
) -> Tensor:
    """dy goes to the greatest, or least, ``|x|``, with the sign of x."""
    backward = fastest(max_pool_backward, dy, x)
    return backward(dy, size, window, ceil_mode, indices=indices) * x.sign()


def _lp_pool(
    dims: int,
    norm_type: float,
    kernel_size: Size,
    stride: Size | None = None,
    ceil_mode: bool = False,
) -> Layer:
    """``y = (sum of x^p over a window)^(1/p)``: the sum for p = 1, the greatest for infinity.

    Args:
        norm_type: p, not 0; of infinity the greatest, of -infinity the least absolute value.
        kernel_size: (height, width) of the window, or one int for all; so with the next.
        stride: the step between windows; default ``kernel_size``.
        ceil_mode: whether a window may end beyond x. Its sum is then as if what is missing were
            the average of the rest, as in torch.

    Inputs:
        x of shape (batch, channels, height, width) or without a batch, floating. With an odd p,
        whose powers have signs, y is NaN where their sum is negative.
    VJP:
        ``dx = x^(p - 1) y^(1 - p) dy``, added over the windows that x is in; from a window whose
        sum is 0 it is 0.
    Raises:
        ValueError: no window fits into x.

    Source: ``torch.nn.LPPool2d``.

    >>> fn.lp_pool2d(2, (1, 2)).apply({}, torch.tensor([[[3.0, 4.0, 5.0, 12.0]]]))[0]
    tensor([[[ 5., 13.]]])
    """
    name = f"lp_pool{dims}d"
    window = window_of(name, dims, kernel_size, stride)
    require(norm_type != 0, f"{name}: norm_type must not be 0")
    p, check = float(norm_type), require_spatial(dims)
    points = math.prod(window.kernel)

    def forward(x: Tensor) -> Step:
        total = points * average(x.pow(p), window, ceil_mode, *_COUNTED)
        return total.pow(1.0 / p), {"x": x, "total": total}, (p, window, ceil_mode)

    def forward_of_infinity(x: Tensor) -> Step:
        sign = math.copysign(1.0, p)
        y, indices = maxima(x.abs() * sign, window, ceil_mode)
        residuals = {"x": x, "indices": indices}
        return y * sign, residuals, (tuple(x.shape[-dims:]), window, ceil_mode)

    if math.isinf(p):
        backward = lp_pool_of_infinity_backward
        return parameterless(forward_of_infinity, backward, declaration=check, name=name)
    return parameterless(forward, lp_pool_backward, declaration=check, name=name)


lp_pool1d, lp_pool2d, lp_pool3d = (spatial(_lp_pool, dims) for dims in (1, 2, 3))
