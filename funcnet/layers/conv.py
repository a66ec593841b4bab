"""Convolution."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import tree
from funcnet.core import EMPTY, Forward, Grads, Key, Layer, Params, Pullback
from funcnet.errors import require
from funcnet.initializers import Initializer
from funcnet.lift import fastest, require_floating, stateful, with_kernel
from funcnet.params import Param, declare, weight_and_bias

Pair = int | tuple[int, int]
Padding = tuple[int, int, int, int]


def pair(name: str, value: Pair, least: int) -> tuple[int, int]:
    """``(height, width)`` of an option given as one int or two."""
    both = (value, value) if isinstance(value, int) else tuple(value)
    fits = len(both) == 2 and min(both) >= least
    require(fits, f"{name} must be one or two ints >= {least}, got {value}")
    return both[0], both[1]


def pad_vjp(dy: Tensor, padding: Padding, mode: str) -> Tensor:
    """The pullback of ``F.pad(x, padding, mode)``: what came from x's edges goes back to them.

    ``padding`` is (left, right, top, bottom), as in F.pad.
    """
    for dim, (before, after) in ((-1, padding[:2]), (-2, padding[2:])):
        size = dy.shape[dim] - before - after
        first, inner, last = dy.split([before, size, after], dim)
        if mode == "reflect":  # the edge itself is not repeated
            parts = [(first.flip(dim), 1), (last.flip(dim), size - 1 - after)]
        elif mode == "replicate":
            parts = [(first.sum(dim, keepdim=True), 0), (last.sum(dim, keepdim=True), size - 1)]
        elif mode == "circular":
            parts = [(first, size - before), (last, 0)]
        else:  # zeros
            parts = []
        dy = inner
        for part, start in parts:
            blank = [0, 0] * (-1 - dim) + [start, size - start - part.shape[dim]]
            dy = dy + torch.constant_pad_nd(part, blank)
    return dy


def require_images(x: Tensor) -> Mapping[str, Param]:
    """The declaration of a layer without parameters, of one image or a batch of them."""
    require_floating(x)
    shape = tuple(x.shape)
    require(len(shape) in (3, 4), f"expects (batch, channels, height, width), got {shape}")
    return EMPTY


def _conv2d_kernel(dy: Tensor, x: Tensor, weight: Tensor, wanted: Any, *geometry: Any) -> Any:
    stride, padding, dilation, groups = geometry
    options = (stride, padding, dilation, False, (0, 0), groups)
    return torch.ops.aten.convolution_backward(dy, x, weight, weight.shape[:1], *options, wanted)


@with_kernel(_conv2d_kernel)
def conv2d_backward(dy: Tensor, x: Tensor, weight: Tensor, wanted: Any, *geometry: Any) -> Any:
    """``(dx, dweight, dbias)``, those that are ``wanted``.

    With the patches of x that the kernel sees as the columns of a matrix, y is ``weight patches``,
    so ``dweight = dy patches^T``, and dx adds up the columns of ``weight^T dy`` where they came
    from.
    """
    stride, padding, dilation, groups = geometry
    window = {"dilation": dilation, "padding": padding, "stride": stride}
    n, out, kernel = x.shape[0], weight.shape[0], weight.shape[2:]
    g = dy.reshape(n, groups, out // groups, -1)
    dx = dweight = None
    if wanted[0]:
        dpatches = weight.reshape(groups, out // groups, -1).mT @ g
        dx = F.fold(dpatches.flatten(1, 2), x.shape[-2:], kernel, **window)
    if wanted[1]:
        patches = F.unfold(x, kernel, **window).unflatten(1, (groups, -1))
        dweight = (g @ patches.mT).sum(0).reshape(weight.shape)
    return dx, dweight, dy.sum((0, 2, 3)) if wanted[2] else None


def conv2d_rule(
    residuals: Any, dy: Tensor, bias: bool, edges: Any, *geometry: Any, params: bool, x: bool
) -> Grads:
    """`conv2d_backward`, then the pullback of the padding."""
    inputs, weight = residuals["x"], residuals["weight"]
    single = inputs.dim() == 3
    if single:
        inputs, dy = inputs[None], dy[None]
    backward = fastest(conv2d_backward, dy, inputs, weight)
    wanted = (x, params, params and bias)
    dx, dweight, dbias = backward(dy, inputs, weight, wanted, *geometry)
    dparams = {"weight": dweight, "bias": dbias} if bias else {"weight": dweight}
    if x and edges is not None:
        dx = pad_vjp(dx, *edges)
    return dparams if params else None, dx[0] if single and x else dx


def conv2d(
    out_channels: int,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    bias: bool = True,
    padding_mode: str = "zeros",
    *,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """Cross-correlation of images with learned kernels, plus a bias by channel.

    Args:
        out_channels: the number of kernels.
        kernel_size: (height, width), or one int for both; so with the next three.
        stride: the step between positions of the kernel.
        padding: what is added on each side of x, "valid" for nothing, or "same" for as much as
            keeps the image's size (with stride 1).
        dilation: the step between the kernel's points.
        groups: out channel group i sees only in channel group i.
        bias: whether a bias is learned.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        weight_init: default U(-b, b) with ``b = 1 / sqrt(fan_in)``, as torch.nn.Conv2d.
        bias_init: default the same U(-b, b).
        dtype: of the parameters; default that of x.

    Inputs: x of shape (batch, channels, height, width) or (channels, height, width), floating.
    Returns: y of shape (batch, out_channels, height', width'), with
    ``height' = floor((height + 2 padding - dilation (kernel - 1) - 1) / stride) + 1``.
    Params: ``weight`` (out_channels, channels / groups, *kernel_size), ``bias`` (out_channels,).
    VJP: dweight is x correlated with dy, dx is dy convolved with the weight, ``dbias = sum dy``.
    Raises: ValueError for another rank or number of channels.
    Source: ``torch.nn.Conv2d``.

    >>> import funcnet as fn
    >>> layer = fn.conv2d(8, 3, padding="same")
    >>> params, _ = layer.init(fn.key(0), torch.ones(5, 1, 28, 28))
    >>> layer.apply(params, torch.ones(5, 1, 28, 28))[0].shape
    torch.Size([5, 8, 28, 28])
    """
    kernel = pair("conv2d: kernel_size", kernel_size, 1)
    stride = pair("conv2d: stride", stride, 1)
    dilation = pair("conv2d: dilation", dilation, 1)
    require(out_channels >= 1, f"conv2d: out_channels must be at least 1, got {out_channels}")
    divides = groups >= 1 and out_channels % groups == 0
    require(divides, f"conv2d: groups must divide out_channels, got {groups}, {out_channels}")
    modes = ("zeros", "reflect", "replicate", "circular")
    known = "conv2d: padding_mode must be zeros, reflect, replicate or circular"
    require(padding_mode in modes, f"{known}, got {padding_mode!r}")
    if isinstance(padding, str):
        known = f"conv2d: padding must be 'valid', 'same' or ints, got {padding!r}"
        require(padding in ("valid", "same"), known)
        fits = padding == "valid" or stride == (1, 1)
        require(fits, f"conv2d: padding='same' needs stride 1, got {stride}")
        spans = [d * (k - 1) * (padding == "same") for d, k in zip(dilation, kernel, strict=True)]
        (top, bottom), (left, right) = ((span // 2, span - span // 2) for span in spans)
    else:
        top, left = bottom, right = pair("conv2d: padding", padding, 0)
    # The kernel pads with zeros, the same on both sides; all else is padded before it.
    within = padding_mode == "zeros" and top == bottom and left == right
    edges = None if within else ((left, right, top, bottom), padding_mode)
    inner = (top, left) if within else (0, 0)
    static = (bias, edges, stride, inner, dilation, groups)

    @declare
    def init(x: Tensor) -> dict[str, Param]:
        require_images(x)
        channels = x.shape[-3]
        require(channels % groups == 0, f"groups must divide channels, got {groups}, {channels}")
        seen = (1, "{} channels" if groups == 1 else f"{{}} channels for each of {groups} groups")
        shape = (out_channels, channels // groups, *kernel)
        return weight_and_bias(shape, seen, bias, weight_init, bias_init, dtype)

    def forward(params: Params, x: Tensor, state: Params, key: Key, train: bool) -> Forward:
        weight, offset = params["weight"], params.get("bias")
        try:
            if edges is not None:
                x = F.pad(x, edges[0], "constant" if padding_mode == "zeros" else padding_mode)
            y = F.conv2d(x, weight, offset, stride, inner, dilation, groups)
        except RuntimeError as error:
            raise ValueError(f"conv2d: does not fit {tree.describe(x)}: {error}") from None
        return y, Pullback(conv2d_rule, {"x": x, "weight": weight}, static), state

    return stateful(init, forward)
