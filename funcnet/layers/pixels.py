"""Layers that move values between the channels and the pixels of images."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from funcnet import tree
from funcnet.core import EMPTY, Layer
from funcnet.errors import require
from funcnet.lift import Step, parameterless
from funcnet.params import Param


def _checked(least: int, form: str) -> Any:
    """The declaration of a layer of tensors with a number of dimensions; integers, too."""

    def declaration(x: Any) -> Mapping[str, Param]:
        require(isinstance(x, Tensor), f"expects a tensor, got {tree.describe(x)}", TypeError)
        require(x.dim() >= least, f"expects {form}, got {tuple(x.shape)}")
        return EMPTY

    return declaration


_images = _checked(3, "(*, channels, height, width)")


def _shuffled(x: Tensor, factor: int) -> Tensor:
    """``F.pixel_shuffle``, of no images too."""
    *batch, channels, height, width = x.shape
    if x.numel() > 0:
        return F.pixel_shuffle(x, factor)
    return x.reshape(*batch, channels // factor**2, height * factor, width * factor)


def _unshuffled(x: Tensor, factor: int) -> Tensor:
    """``F.pixel_unshuffle``, of no images too."""
    *batch, channels, height, width = x.shape
    if x.numel() > 0:
        return F.pixel_unshuffle(x, factor)
    return x.reshape(*batch, channels * factor**2, height // factor, width // factor)


def pixel_shuffle_backward(dy: Tensor | None, factor: int) -> Tensor | None:
    """Each square of pixels back to channels."""
    return None if dy is None else _unshuffled(dy, factor)


def pixel_shuffle(upscale_factor: int) -> Layer:
    """Each ``r^2`` channels as one, r times as high and as wide, with r the factor.

    ``y[c, h r + i, w r + j] = x[c r^2 + i r + j, h, w]``.

    Args:
        upscale_factor: r.

    Inputs:
        x of shape ``(*, channels r^2, height, width)``.
    Returns:
        y of shape ``(*, channels, height r, width r)``.
    VJP:
        `pixel_unshuffle`.

    Source: ``torch.nn.PixelShuffle``; Shi et al. 2016.

    >>> pixel_shuffle(2).apply({}, torch.arange(4.0).reshape(4, 1, 1))[0]
    tensor([[[0., 1.],
             [2., 3.]]])
    """
    r = upscale_factor
    require(r >= 1, f"pixel_shuffle: upscale_factor must be at least 1, got {r}")

    def declaration(x: Tensor) -> Mapping[str, Param]:
        _images(x)
        fits = x.shape[-3] % r**2 == 0
        require(fits, f"expects a multiple of {r**2} channels, got {tuple(x.shape)}")
        return EMPTY

    def forward(x: Tensor) -> Step:
        return _shuffled(x, r), {}, (r,)

    return parameterless(forward, pixel_shuffle_backward, declaration=declaration)


def pixel_unshuffle_backward(dy: Tensor | None, factor: int) -> Tensor | None:
    """Channels back to squares of pixels."""
    return None if dy is None else _shuffled(dy, factor)


def pixel_unshuffle(downscale_factor: int) -> Layer:
    """Each square of r by r pixels as ``r^2`` channels, with r the factor.

    ``y[c r^2 + i r + j, h, w] = x[c, h r + i, w r + j]``.

    Args:
        downscale_factor: r.

    Inputs:
        x of shape ``(*, channels, height r, width r)``.
    Returns:
        y of shape ``(*, channels r^2, height, width)``.
    VJP:
        `pixel_shuffle`.

    Source: ``torch.nn.PixelUnshuffle``.

    >>> pixel_unshuffle(2).apply({}, torch.arange(4.0).reshape(1, 2, 2))[0].flatten()
    tensor([0., 1., 2., 3.])
    """
    r = downscale_factor
    require(r >= 1, f"pixel_unshuffle: downscale_factor must be at least 1, got {r}")

    def declaration(x: Tensor) -> Mapping[str, Param]:
        _images(x)
        fits = x.shape[-1] % r == 0 and x.shape[-2] % r == 0
        require(fits, f"expects height and width that {r} divides, got {tuple(x.shape)}")
        return EMPTY

    def forward(x: Tensor) -> Step:
        return _unshuffled(x, r), {}, (r,)

    return parameterless(forward, pixel_unshuffle_backward, declaration=declaration)


def channel_shuffle_backward(dy: Tensor | None, groups: int) -> Tensor | None:
    """The shuffle with as many groups as a group has channels, which undoes it."""
    return None if dy is None else F.channel_shuffle(dy, dy.shape[1] // groups)


def channel_shuffle(groups: int) -> Layer:
    """The first channels of all groups, then the second ones, and so on.

    ``y[:, i groups + g] = x[:, g channels / groups + i]``.

    Args:
        groups: their number, which divides that of the channels.

    Inputs:
        x of shape ``(batch, channels, *)`` with three dimensions or more.
    VJP:
        the channels in their first order.

    Source: ``torch.nn.ChannelShuffle``; Zhang et al. 2018, "ShuffleNet".

    >>> channel_shuffle(2).apply({}, torch.arange(6.0).reshape(1, 6, 1))[0].flatten()
    tensor([0., 3., 1., 4., 2., 5.])
    """
    require(groups >= 1, f"channel_shuffle: groups must be at least 1, got {groups}")
    check = _checked(3, "(batch, channels, *)")

    def declaration(x: Tensor) -> Mapping[str, Param]:
        check(x)
        fits = x.shape[1] % groups == 0
        require(fits, f"groups must divide channels, got {groups}, {x.shape[1]}")
        return EMPTY

    def forward(x: Tensor) -> Step:
        return F.channel_shuffle(x, groups), {}, (groups,)

    return parameterless(forward, channel_shuffle_backward, declaration=declaration)
