"""Maxima over windows, whose residual is where they were found, and what puts them back there."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcnet import runtime, tree
from funcnet.core import EMPTY, Layer
from funcnet.errors import require
from funcnet.layers.spatial import (
    NAMES,
    Size,
    Window,
    filled,
    like_x,
    of_images,
    output_sizes,
    require_spatial,
    sizes,
    spatial,
    values_of,
    window_of,
)
from funcnet.lift import Step, parameterless, require_floating, with_kernel
from funcnet.params import Param

aten = torch.ops.aten


def put(dy: Tensor, indices: Tensor, size: Sequence[int]) -> Tensor:
    """Zeros of a size, with dy added at the indices into their last dimensions as one."""
    dims = len(size)
    flat = dy.new_zeros((*dy.shape[:-dims], math.prod(size)))
    return flat.scatter_add(-1, indices.flatten(-dims), dy.flatten(-dims)).unflatten(-1, size)


@of_images
def _max_pool_kernel(
    dy: Tensor, size: tuple[int, ...], window: Window, ceil_mode: bool, indices: Tensor
) -> Tensor:
    backward = aten.max_pool2d_with_indices_backward
    if len(size) == 3:
        if runtime.is_tracing():  # jit has a program for images alone
            return put(dy, indices, size)
        backward = aten.max_pool3d_with_indices_backward
    options = (window.kernel, window.stride, window.padding, window.dilation, ceil_mode)
    return backward(dy, like_x(dy, size), *options, indices)


@with_kernel(_max_pool_kernel)
def max_pool_backward(
    dy: Any, size: tuple[int, ...], window: Window, ceil_mode: bool, indices: Tensor
) -> Tensor:
    """``dx[i] = sum of dy whose maximum was x[i]``."""
    return put(values_of(dy), indices, size)


def maxima(x: Tensor, window: Window, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    """The maxima of windows and their indices into the spatial dimensions of x as one."""
    pool = getattr(aten, f"max_pool{len(window.kernel)}d_with_indices")
    return pool(x, window.kernel, window.stride, window.padding, window.dilation, ceil_mode)


def _max_pool(
    dims: int,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    return_indices: bool = False,
    ceil_mode: bool = False,
) -> Layer:
    """The maximum of each window: ``y_i = max x_j`` over the points j of window i.

    Args:
        kernel_size: (height, width) of the window, or one int for all; so with the next three.
        stride: the step between windows; default ``kernel_size``.
        padding: of -infinity on each side, at most half the window.
        dilation: the step between a window's points.
        return_indices: whether y is ``(y, indices)``, with indices into the dimensions
            (height, width) of x as one, which `max_unpool2d` takes.
        ceil_mode: whether a window may end beyond the padding; it starts before its end.

    Inputs:
        x of shape (batch, channels, height, width) or without a batch, floating.
    VJP:
        dy goes to where the maximum was found: the first of equal ones, or a NaN, which is taken
        for greater than all numbers. The residual is these indices.
    Raises:
        ValueError: no window fits into x with its padding.

    Source: ``torch.nn.MaxPool2d``.

    >>> fn.max_pool2d(2).apply({}, torch.arange(16.0).reshape(1, 1, 4, 4))[0]
    tensor([[[[ 5.,  7.],
              [13., 15.]]]])
    """
    name = f"max_pool{dims}d"
    window = window_of(name, dims, kernel_size, stride, padding, dilation)

    def forward(x: Tensor) -> Step:
        y, indices = maxima(x, window, ceil_mode)
        static = (tuple(x.shape[-dims:]), window, ceil_mode)
        return (y, indices) if return_indices else y, {"indices": indices}, static

    return parameterless(forward, max_pool_backward, declaration=require_spatial(dims), name=name)


@of_images
def _adaptive_max_pool_kernel(dy: Tensor, size: tuple[int, ...], indices: Tensor) -> Tensor:
    if runtime.is_tracing():  # jit has no program for it
        return put(dy, indices, size)
    images, volumes = aten.adaptive_max_pool2d_backward, aten.adaptive_max_pool3d_backward
    return (images if len(size) == 2 else volumes)(dy, like_x(dy, size), indices)


@with_kernel(_adaptive_max_pool_kernel)
def adaptive_max_pool_backward(dy: Any, size: tuple[int, ...], indices: Tensor) -> Tensor:
    """``dx[i] = sum of dy whose maximum was x[i]``."""
    return put(values_of(dy), indices, size)


def _adaptive_max_pool(
    dims: int, output_size: Size | Sequence[int | None] | None, return_indices: bool = False
) -> Layer:
    """The maxima of windows that make y of a given size, whatever that of x.

    Along a dimension of size n, window i of m is from ``floor(i n / m)`` to
    ``ceil((i + 1) n / m)``: windows may overlap and differ in size by one.

    Args:
        output_size: (height, width) of y, or one int for all; None keeps the size of x.
        return_indices: whether y is ``(y, indices)``, with indices into the dimensions
            (height, width) of x as one.

    Inputs:
        x of shape (batch, channels, height, width) or without a batch, floating.
    VJP:
        dy goes to where the maximum was found; the residual is these indices.

    Source: ``torch.nn.AdaptiveMaxPool2d``.

    >>> fn.adaptive_max_pool2d((1, 2)).apply({}, torch.arange(9.0).reshape(1, 1, 3, 3))[0]
    tensor([[[[7., 8.]]]])
    """
    name = f"adaptive_max_pool{dims}d"
    wanted = output_sizes(f"{name}: output_size", output_size, dims)
    pool = getattr(aten, name)

    def forward(x: Tensor) -> Step:
        size = tuple(x.shape[-dims:])
        y, indices = pool(x, filled(wanted, size))
        return (y, indices) if return_indices else y, {"indices": indices}, (size,)

    check = require_spatial(dims)
    return parameterless(forward, adaptive_max_pool_backward, declaration=check, name=name)


def max_unpool_backward(dy: Tensor, dims: int, indices: Tensor) -> tuple[Tensor, None]:
    """What is in dy at the indices; these have no cotangent."""
    dvalues = dy.flatten(-dims).gather(-1, indices.flatten(-dims))
    return dvalues.reshape(indices.shape), None


def _max_unpool(
    dims: int,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    *,
    output_size: Size | None = None,
) -> Layer:
    """Values where a pooling found them, and zeros elsewhere: what is left of its input.

    Args:
        kernel_size: (height, width) of the pooling's window, or one int for all; so with the
            next two.
        stride: the step between its windows; default ``kernel_size``.
        padding: on each side of its input.
        output_size: (height, width) of y, or the shape of y, where several are possible; each is
            less than a stride from the default, ``(size - 1) stride - 2 padding + kernel``.

    Inputs:
        x is ``(values, indices)``, as of ``max_pool2d(..., return_indices=True)``, both of shape
        (batch, channels, height, width) or without a batch.
    Returns:
        y of shape ``(batch, channels, *output_size)``. One of the values is in it where several
        have one index.
    VJP:
        dvalues is what is in dy at the indices.
    Raises:
        ValueError: an index that is not in y, as of another pooling, or an output size that the
            values cannot be of.

    Source: ``torch.nn.MaxUnpool2d``, whose ``forward`` takes the output size.

    >>> pool, unpool = fn.max_pool2d(2, return_indices=True), fn.max_unpool2d(2)
    >>> fn.serial(pool, unpool).apply({}, torch.arange(8.0).reshape(1, 1, 2, 4))[0]
    tensor([[[[0., 0., 0., 0.],
              [0., 5., 0., 7.]]]])
    """
    name = f"max_unpool{dims}d"
    window = window_of(name, dims, kernel_size, stride, padding)
    if isinstance(output_size, Sequence) and len(output_size) in (dims + 1, dims + 2):
        output_size = output_size[-dims:]
    wanted = None if output_size is None else sizes(f"{name}: output_size", output_size, dims, 0)

    def size_of(values: Tensor) -> tuple[int, ...]:
        options = zip(
            values.shape[-dims:], window.stride, window.padding, window.kernel, strict=True
        )
        default = tuple([(n - 1) * s - 2 * p + k for n, s, p, k in options])
        if wanted is None:
            return default
        ranges = [(n - s + 1, n + s - 1) for n, s in zip(default, window.stride, strict=True)]
        fits = [low <= n <= high for n, (low, high) in zip(wanted, ranges, strict=True)]
        least, most = zip(*ranges, strict=True)
        got = f"got {wanted} for values of size {tuple(values.shape[-dims:])}"
        require(all(fits), f"output_size must be from {least} to {most}, {got}")
        return wanted

    def declaration(x: Any) -> Mapping[str, Param]:
        pair = isinstance(x, tuple) and len(x) == 2 and all([isinstance(e, Tensor) for e in x])
        require(pair, f"expects a tuple (values, indices), got {tree.describe(x)}", TypeError)
        values, indices = x
        require_floating(values)
        is_index = indices.dtype == torch.int64
        require(is_index, f"expects int64 indices, got {tree.describe(indices)}", TypeError)
        same = values.shape == indices.shape
        require(same, f"expects indices of the values' shape, got {tree.describe(x)}")
        fits = values.dim() in (dims + 1, dims + 2)
        expected = f"expects values of shape (batch, channels, {NAMES[dims]})"
        require(fits, f"{expected}, got {tuple(values.shape)}")
        size = size_of(values)
        require(min(size) >= 0, f"expects values of an output that is not empty, got {size}")
        return EMPTY

    def forward(x: tuple[Tensor, Tensor]) -> Step:
        values, indices = x
        size = size_of(values)
        flat = values.new_zeros((*values.shape[:-dims], math.prod(size)))
        flat = flat.scatter(-1, indices.flatten(-dims), values.flatten(-dims))
        return flat.unflatten(-1, size), {"indices": indices}, (dims,)

    return parameterless(forward, max_unpool_backward, declaration=declaration, name=name)


max_pool1d, max_pool2d, max_pool3d = (spatial(_max_pool, dims) for dims in (1, 2, 3))
adaptive_max_pool1d, adaptive_max_pool2d, adaptive_max_pool3d = (
    spatial(_adaptive_max_pool, dims) for dims in (1, 2, 3)
)
max_unpool1d, max_unpool2d, max_unpool3d = (spatial(_max_unpool, dims) for dims in (1, 2, 3))
