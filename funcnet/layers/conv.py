"""Convolution, with PyTorch's fused backward kernel."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import initializers
from funcnet.core import Layer, Params, Pullback, check_floating, check_params, stateless
from funcnet.initializers import Initializer
from funcnet.random import fold_in

Pair = int | tuple[int, int]
Padding = tuple[int, int, int, int]


def pair(name: str, value: Pair, least: int) -> tuple[int, int]:
    """``(height, width)`` of an option given as one int or two."""
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or min(both) < least:
        raise ValueError(f"{name} must be one or two ints >= {least}, got {value}")
    return both


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


def conv2d_rule(
    residuals: dict[str, Tensor],
    dy: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    bias: bool,
    edges: tuple[Padding, str] | None,
    *,
    params: bool,
    x: bool,
) -> tuple[Params | None, Tensor | None]:
    """dweight is x correlated with dy, dx is dy convolved with the weight, ``dbias = sum dy``."""
    inputs, weight = residuals["x"], residuals["weight"]
    single = inputs.dim() == 3
    if single:
        inputs, dy = inputs[None], dy[None]
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        dy,
        inputs,
        weight,
        [weight.shape[0]] if bias else None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [x, params, params and bias],
    )
    dparams = None
    if params:
        dparams = {"weight": dweight, "bias": dbias} if bias else {"weight": dweight}
    if not x:
        return dparams, None
    if edges is not None:
        dx = pad_vjp(dx, *edges)
    return dparams, dx[0] if single else dx


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
        stride: the step between places of the kernel.
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
    if out_channels < 1:
        raise ValueError(f"conv2d: out_channels must be at least 1, got {out_channels}")
    if groups < 1 or out_channels % groups:
        raise ValueError(f"conv2d: groups must divide out_channels, got {groups}, {out_channels}")
    if padding_mode not in ("zeros", "reflect", "replicate", "circular"):
        raise ValueError(
            "conv2d: padding_mode must be zeros, reflect, replicate or circular, "
            f"got {padding_mode!r}"
        )
    if isinstance(padding, str):
        if padding not in ("valid", "same"):
            raise ValueError(f"conv2d: padding must be 'valid', 'same' or ints, got {padding!r}")
        if padding == "same" and stride != (1, 1):
            raise ValueError(f"conv2d: padding='same' needs stride 1, got {stride}")
        totals = [
            d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)
        ]
        (top, bottom), (left, right) = ((total // 2, total - total // 2) for total in totals)
    else:
        top, left = bottom, right = pair("conv2d: padding", padding, 0)
    # The kernel pads with zeros, the same on both sides; all else is padded before it.
    within = padding_mode == "zeros" and top == bottom and left == right
    edges = None if within else ((left, right, top, bottom), padding_mode)
    inner = (top, left) if within else (0, 0)
    static = (stride, inner, dilation, groups, bias, edges)
    names = ("weight", "bias") if bias else ("weight",)

    def check_images(x: Tensor) -> int:
        check_floating("conv2d", x)
        if x.dim() not in (3, 4):
            raise ValueError(
                f"conv2d: expects (batch, channels, height, width), got {tuple(x.shape)}"
            )
        return x.shape[-3]

    def init(key: Tensor, x: Tensor) -> Params:
        channels = check_images(x)
        if channels % groups:
            raise ValueError(f"conv2d: groups must divide channels, got {groups}, {channels}")
        shape = (out_channels, channels // groups, *kernel)
        kind = (dtype or x.dtype, x.device)
        fan_in = math.prod(shape[1:])
        bound = fan_in**-0.5 if fan_in else 0.0
        default = initializers.uniform(-bound, bound)
        params = {"weight": (weight_init or default)(fold_in(key, "weight"), shape, *kind)}
        if bias:
            params["bias"] = (bias_init or default)(fold_in(key, "bias"), (out_channels,), *kind)
        return params

    def padded(params: Params, x: Tensor) -> Tensor:
        channels = check_images(x)
        check_params("conv2d", params, names)
        weight = params["weight"]
        for name in names:
            if params[name].dtype != x.dtype:
                raise TypeError(f"conv2d: {name} is {params[name].dtype}, x is {x.dtype}")
        shapes = {"weight": (out_channels, *weight.shape[1:2], *kernel), "bias": (out_channels,)}
        for name in names:
            if params[name].shape != shapes[name]:
                raise ValueError(
                    f"conv2d: expects a {name} of shape {shapes[name]}, "
                    f"got {tuple(params[name].shape)}"
                )
        if weight.shape[1] * groups != channels:
            raise ValueError(
                f"conv2d: weight expects {weight.shape[1] * groups} channels, got {tuple(x.shape)}"
            )
        if edges is None:
            return x
        try:
            return F.pad(x, edges[0], "constant" if padding_mode == "zeros" else padding_mode)
        except RuntimeError as error:
            raise ValueError(f"conv2d: cannot pad {tuple(x.shape)}: {error}") from None

    def convolve(params: Params, x: Tensor) -> Tensor:
        bias_ = params["bias"] if bias else None
        try:
            return F.conv2d(x, params["weight"], bias_, stride, inner, dilation, groups)
        except RuntimeError as error:
            raise ValueError(f"conv2d: does not fit {tuple(x.shape)}: {error}") from None

    def apply(params: Params, x: Tensor) -> Tensor:
        return convolve(params, padded(params, x))

    def vjp(params: Params, x: Tensor) -> tuple[Tensor, Pullback]:
        x = padded(params, x)
        residuals = {"x": x, "weight": params["weight"]}
        return convolve(params, x), Pullback(conv2d_rule, residuals, static)

    return stateless(init, apply, vjp)
