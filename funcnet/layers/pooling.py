"""Pooling: a layer whose residual is where the values came from."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet.core import Layer
from funcnet.layers.spatial import Size, require_spatial, sizes
from funcnet.lift import Step, parameterless, with_kernel


def _max_pool2d_kernel(dy: Any, shape: tuple[int, ...], window: Any, indices: Tensor) -> Tensor:
    dy = dy[0] if isinstance(dy, tuple) else dy
    x = dy.new_empty(()).expand(shape)  # of which only the shape is read
    return torch.ops.aten.max_pool2d_with_indices_backward(dy, x, *window, indices)


@with_kernel(_max_pool2d_kernel)
def max_pool2d_backward(dy: Any, shape: tuple[int, ...], window: Any, indices: Tensor) -> Tensor:
    """``dx[i] = sum of dy whose maximum was x[i]``."""
    dy = dy[0] if isinstance(dy, tuple) else dy
    flat = torch.zeros((*shape[:-2], shape[-2] * shape[-1]), dtype=dy.dtype, device=dy.device)
    return flat.scatter_add(-1, indices.flatten(-2), dy.flatten(-2)).reshape(shape)


def max_pool2d(
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    return_indices: bool = False,
    ceil_mode: bool = False,
) -> Layer:
    """The maximum of each window of an image.

    Args:
        kernel_size: (height, width) of the window, or one int for both; so with the next three.
        stride: the step between windows; default ``kernel_size``.
        padding: of -infinity on each side, at most half the window.
        dilation: the step between a window's points.
        return_indices: whether y is ``(y, indices)``, with indices into the flattened image.
        ceil_mode: whether the last, incomplete window counts.

    Inputs: x of shape (batch, channels, height, width) or (channels, height, width), floating.
    VJP: dy goes to where the maximum was found; the residual is these indices.
    Source: ``torch.nn.MaxPool2d``.

    >>> max_pool2d(2).apply({}, torch.arange(16.0).reshape(1, 1, 4, 4))[0]
    tensor([[[[ 5.,  7.],
              [13., 15.]]]])
    """
    kernel = sizes("max_pool2d: kernel_size", kernel_size, 2, 1)
    stride = kernel if stride is None else sizes("max_pool2d: stride", stride, 2, 1)
    padding = sizes("max_pool2d: padding", padding, 2, 0)
    dilation = sizes("max_pool2d: dilation", dilation, 2, 1)

    window = (kernel, stride, padding, dilation, ceil_mode)

    def forward(x: Tensor) -> Step:
        y, indices = F.max_pool2d(x, *window, return_indices=True)
        static = (tuple(x.shape), window)
        return (y, indices) if return_indices else y, {"indices": indices}, static

    return parameterless(forward, max_pool2d_backward, declaration=require_spatial(2))
