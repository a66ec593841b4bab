"""Averages over windows: linear maps, of each dimension alone."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import runtime
from funcnet.core import Layer
from funcnet.errors import require
from funcnet.layers.spatial import (
    Size,
    Window,
    apply_each,
    filled,
    like_x,
    of_images,
    output_sizes,
    require_spatial,
    spatial,
    window_of,
)
from funcnet.lift import Step, parameterless, with_kernel

aten = torch.ops.aten


def averages(size: int, start: Tensor, end: Tensor, count: Tensor) -> Tensor:
    """The matrix that makes of a dimension its sums from start to end, divided by a count.

    >>> averages(3, torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([2, 2]))
    tensor([[0.5000, 0.5000, 0.0000],
            [0.0000, 0.5000, 0.5000]], dtype=torch.float64)
    """
    place = torch.arange(size, device=start.device)
    inside = (start[:, None] <= place) & (place < end[:, None])
    return inside.to(torch.float64) / count[:, None]


@of_images
def _avg_pool_kernel(
    dy: Tensor,
    size: tuple[int, ...],
    window: Window,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    if ceil_mode and runtime.is_tracing():  # Inductor counts points beyond the padding
        return avg_pool_backward(dy, size, window, ceil_mode, count_include_pad, divisor)
    backward = aten.avg_pool2d_backward if len(size) == 2 else aten.avg_pool3d_backward
    options = (window.kernel, window.stride, window.padding, ceil_mode, count_include_pad, divisor)
    return backward(dy, like_x(dy, size), *options)


@with_kernel(_avg_pool_kernel)
def avg_pool_backward(
    dy: Tensor,
    size: tuple[int, ...],
    window: Window,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    """``dx[i] = sum of dy / divisor over the windows that x[i] is in``: `averages` transposed."""
    matrices = []
    options = zip(size, dy.shape[-len(size) :], *window, strict=True)
    for n, windows, kernel, _, padding, stride in options:
        start = torch.arange(windows, device=dy.device) * stride - padding
        end = (start + kernel).clamp(max=n + padding)
        if not count_include_pad:
            start, end = start.clamp(min=0), end.clamp(max=n)
        count = torch.ones_like(start) if divisor else end - start
        matrices.append(averages(n, start, end, count).mT)
    dx = apply_each(dy, matrices)
    return dx / divisor if divisor else dx


def average(x: Tensor, window: Window, *options: Any) -> Tensor:
    """``F.avg_pool2d`` of any number of dimensions, all with its options."""
    if len(window.kernel) == 1:
        return average(x.unsqueeze(-2), window.over_images(), *options).squeeze(-2)
    pool = F.avg_pool2d if len(window.kernel) == 2 else F.avg_pool3d
    return pool(x, window.kernel, window.stride, window.padding, *options)


def _avg_pool(
    dims: int,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Layer:
    """The average of each window: ``y_i = sum x_j / n`` over the n points j of window i.

    Args:
        kernel_size: (height, width) of the window, or one int for all; so with the next two.
        stride: the step between windows; default ``kernel_size``.
        padding: of zeros on each side, at most half the window.
        ceil_mode: whether a window may end beyond the padding; it starts before its end, and what
            is beyond the padding counts for nothing.
        count_include_pad: whether the zeros of the padding count.
        divisor_override: what the sums are divided by; default the number of points that count.

    Inputs:
        x of shape (batch, channels, height, width) or without a batch, floating.
    VJP:
        dy, divided as y is, is added to all values of its window.
    Raises:
        ValueError: no window fits into x with its padding.

    Source: ``torch.nn.AvgPool2d``.

    >>> fn.avg_pool2d(2).apply({}, torch.arange(16.0).reshape(1, 1, 4, 4))[0]
    tensor([[[[ 2.5000,  4.5000],
              [10.5000, 12.5000]]]])
    """
    name = f"avg_pool{dims}d"
    window = window_of(name, dims, kernel_size, stride, padding)
    divisor = divisor_override
    require(divisor != 0, f"{name}: divisor_override must not be 0, got {divisor}")
    options = (ceil_mode, count_include_pad, divisor)

    def forward(x: Tensor) -> Step:
        return average(x, window, *options), {}, (tuple(x.shape[-dims:]), window, *options)

    return parameterless(forward, avg_pool_backward, declaration=require_spatial(dims), name=name)


def adaptive_averages(size: Sequence[int], windows: Sequence[int], device: Any) -> list[Tensor]:
    """The matrices of windows that make so many of a size."""
    matrices = []
    for n, m in zip(size, windows, strict=True):
        window = torch.arange(m, device=device)
        start, end = window * n // m, ((window + 1) * n + m - 1) // m
        matrices.append(averages(n, start, end, end - start))
    return matrices


@of_images
def _adaptive_avg_pool_kernel(dy: Tensor, size: tuple[int, ...]) -> Tensor:
    windows = dy.shape[-len(size) :]
    if math.prod(windows) == 1:
        return dy.expand(like_x(dy, size).shape) / math.prod(size)
    if not runtime.is_tracing():
        return runtime.adaptive_avg_pool_backward[len(size)](dy, like_x(dy, size))
    # jit has no program for that one. Windows of one size are those of `avg_pool2d`.
    if any([n % m for n, m in zip(size, windows, strict=True)]):
        return adaptive_avg_pool_backward(dy, size)
    kernel = tuple([n // m for n, m in zip(size, windows, strict=True)])
    window = Window(kernel, (1,) * len(size), (0,) * len(size), kernel)
    return _avg_pool_kernel(dy, size, window, False, True, None)


@with_kernel(_adaptive_avg_pool_kernel)
def adaptive_avg_pool_backward(dy: Tensor, size: tuple[int, ...]) -> Tensor:
    """``dx[i] = sum of dy / points over the windows that x[i] is in``: its matrices transposed."""
    matrices = adaptive_averages(size, dy.shape[-len(size) :], dy.device)
    return apply_each(dy, [matrix.mT for matrix in matrices])


def _adaptive_avg_pool(dims: int, output_size: Size | Sequence[int | None] | None) -> Layer:
    """The averages of windows that make y of a given size, whatever that of x.

    Along a dimension of size n, window i of m is from ``floor(i n / m)`` to
    ``ceil((i + 1) n / m)``: windows may overlap and differ in size by one.

    Args:
        output_size: (height, width) of y, or one int for all; None stands for the size of x.

    Inputs:
        x of shape (batch, channels, height, width) or without a batch, floating.
    VJP:
        dy, divided by the points of its window, is added to all values of the window.

    Source: ``torch.nn.AdaptiveAvgPool2d``.

    >>> fn.adaptive_avg_pool2d((1, 2)).apply({}, torch.arange(9.0).reshape(1, 1, 3, 3))[0]
    tensor([[[[3.5000, 4.5000]]]])
    """
    name = f"adaptive_avg_pool{dims}d"
    wanted = output_sizes(f"{name}: output_size", output_size, dims)
    pool = getattr(F, name)

    def forward(x: Tensor) -> Step:
        size = tuple(x.shape[-dims:])
        windows = filled(wanted, size)
        if dims == 3 and runtime.is_tracing():  # jit has no program for torch's
            return apply_each(x, adaptive_averages(size, windows, x.device)), {}, (size,)
        return pool(x, windows), {}, (size,)

    check = require_spatial(dims)
    return parameterless(forward, adaptive_avg_pool_backward, declaration=check, name=name)


avg_pool1d, avg_pool2d, avg_pool3d = (spatial(_avg_pool, dims) for dims in (1, 2, 3))
adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d = (
    spatial(_adaptive_avg_pool, dims) for dims in (1, 2, 3)
)
