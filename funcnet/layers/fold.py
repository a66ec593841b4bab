"""`unfold` and `fold`: an image to its sliding windows and back; each is the other's pullback."""

import math
from collections.abc import Mapping

from torch import Tensor

from funcnet.core import EMPTY, Layer
from funcnet.errors import require
from funcnet.layers.spatial import Size, Window, require_spatial, sizes, window_of
from funcnet.lift import Step, parameterless, require_floating
from funcnet.params import Param


def unfold_backward(dy: Tensor, size: tuple[int, ...], window: Window) -> Tensor:
    """Each value of dy added where its value of y came from."""
    points = math.prod(window.kernel)
    return window.add(
        dy.unflatten(-2, (dy.shape[-2] // points, points)), size, window.windows(size)
    )


def unfold(kernel_size: Size, dilation: Size = 1, padding: Size = 0, stride: Size = 1) -> Layer:
    """The sliding windows of an image, as columns.

    Args:
        kernel_size: (height, width) of a window, or one int for both; so with the next three.
        dilation: the step between a window's points.
        padding: zeros on each side of the image.
        stride: the step between windows.

    Inputs:
        x of shape (batch, channels, height, width) or without a batch, floating.
    Returns:
        y of shape ``(batch, channels * points of a window, windows)``.
    VJP:
        `fold`: the values of the windows, added up where they came from.

    Source: ``torch.nn.Unfold``.

    >>> fn.unfold(2).apply({}, torch.arange(9.0).reshape(1, 1, 3, 3))[0]
    tensor([[[0., 1., 3., 4.],
             [1., 2., 4., 5.],
             [3., 4., 6., 7.],
             [4., 5., 7., 8.]]])
    """
    window = window_of("unfold", 2, kernel_size, stride, padding, dilation)

    def forward(x: Tensor) -> Step:
        size = tuple(x.shape[-2:])
        return fold_backward(x, window), {}, (size, window)

    return parameterless(forward, unfold_backward, declaration=require_spatial(2))


def fold_backward(dy: Tensor, window: Window) -> Tensor:
    """The windows of dy."""
    return window.take(dy, window.windows(dy.shape[-2:])).flatten(-3, -2)


def fold(
    output_size: Size,
    kernel_size: Size,
    dilation: Size = 1,
    padding: Size = 0,
    stride: Size = 1,
) -> Layer:
    """An image of its sliding windows: where they overlap, their values are added up.

    Args:
        output_size: (height, width) of the image, or one int for both.
        kernel_size: (height, width) of a window, or one int for both; so with the next three.
        dilation: the step between a window's points.
        padding: of the image on each side, which is left out of y.
        stride: the step between windows.

    Inputs:
        x of shape ``(batch, channels * points of a window, windows)`` or without a batch.
    Returns:
        y of shape ``(batch, channels, *output_size)``.
    VJP:
        `unfold`: the windows of dy.
    Raises:
        ValueError: the number of windows is not that of such an image.

    Source: ``torch.nn.Fold``.

    >>> fn.fold((1, 3), (1, 2)).apply({}, torch.ones(1, 2, 2))[0]
    tensor([[[[1., 2., 1.]]]])
    """
    size = sizes("fold: output_size", output_size, 2, 1)
    window = window_of("fold", 2, kernel_size, stride, padding, dilation)
    points, windows = math.prod(window.kernel), math.prod(window.windows(size))

    def declaration(x: Tensor) -> Mapping[str, Param]:
        require_floating(x)
        fits = x.dim() in (2, 3)
        require(fits, f"expects (batch, channels * points, windows), got {tuple(x.shape)}")
        form = (f"channels * {points}", str(windows))
        fits = x.shape[-1] == windows and x.shape[-2] % points == 0
        expected = f"({', '.join(form)}) for an image of {size}"
        require(fits, f"expects last dimensions {expected}, got {tuple(x.shape)}")
        return EMPTY

    def forward(x: Tensor) -> Step:
        return unfold_backward(x, size, window), {}, (window,)

    return parameterless(forward, fold_backward, declaration=declaration)
