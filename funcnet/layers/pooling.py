"""Pooling: a layer whose residual is where the values came from."""

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet.core import Layer, Params, Pullback, check_floating, check_params, stateless
from funcnet.layers.conv import Pair, pair


def max_pool2d_rule(
    residuals: dict[str, Tensor],
    dy: Tensor | tuple[Tensor, None],
    shape: tuple[int, ...],
    *,
    params: bool,
    x: bool,
) -> tuple[Params | None, Tensor | None]:
    """``dx[i] = sum of dy whose maximum was x[i]``."""
    if not x:
        return ({} if params else None), None
    values = dy[0] if isinstance(dy, tuple) else dy
    indices = residuals["indices"]
    height, width = shape[-2:]
    flat = torch.zeros((*shape[:-2], height * width), dtype=values.dtype, device=values.device)
    dx = flat.scatter_add(-1, indices.flatten(-2), values.flatten(-2))
    return ({} if params else None), dx.reshape(shape)


def max_pool2d(
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    return_indices: bool = False,
    ceil_mode: bool = False,
) -> Layer:
    """The maximum of each window of an image.

    Args:
        kernel_size: (height, width) of the window, or one int for both; so with the next three.
        stride: the step between windows; default ``kernel_size``.
        padding: of -infinity on each side, at most half the window.
        dilation: the step between a window's points.
        return_indices: whether y is ``(y, indices)``, with places in the flattened image.
        ceil_mode: whether the last, incomplete window counts.

    Inputs: x of shape (batch, channels, height, width) or (channels, height, width), floating.
    VJP: dy goes to where the maximum was found; the residual is these indices.
    Source: ``torch.nn.MaxPool2d``.

    >>> max_pool2d(2).apply({}, torch.arange(16.0).reshape(1, 1, 4, 4))[0]
    tensor([[[[ 5.,  7.],
              [13., 15.]]]])
    """
    kernel = pair("max_pool2d: kernel_size", kernel_size, 1)
    stride = kernel if stride is None else pair("max_pool2d: stride", stride, 1)
    padding = pair("max_pool2d: padding", padding, 0)
    dilation = pair("max_pool2d: dilation", dilation, 1)

    def pool(params: Params, x: Tensor) -> tuple[Tensor, Tensor]:
        check_floating("max_pool2d", x)
        check_params("max_pool2d", params, ())
        if x.dim() not in (3, 4):
            raise ValueError(
                f"max_pool2d: expects (batch, channels, height, width), got {tuple(x.shape)}"
            )
        try:
            return F.max_pool2d(
                x, kernel, stride, padding, dilation, ceil_mode, return_indices=True
            )
        except RuntimeError as error:
            raise ValueError(f"max_pool2d: does not fit {tuple(x.shape)}: {error}") from None

    def apply(params: Params, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y, indices = pool(params, x)
        return (y, indices) if return_indices else y

    def vjp(params: Params, x: Tensor) -> tuple[Tensor | tuple[Tensor, Tensor], Pullback]:
        y, indices = pool(params, x)
        pullback = Pullback(max_pool2d_rule, {"indices": indices}, (tuple(x.shape),))
        return ((y, indices) if return_indices else y), pullback

    return stateless(lambda key, x: {}, apply, vjp, name="max_pool2d")
