"""Convolution."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import tree
from funcnet.core import Layer, Params, Pullback
from funcnet.initializers import Initializer, torch_default
from funcnet.lift import fastest, require_floating, stateless, with_kernel
from funcnet.params import Param, declare

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


def require_images(x: Tensor) -> None:
    """Raise ValueError or TypeError unless x is (batch, channels, height, width), or one image."""
    require_floating(x)
    if x.dim() not in (3, 4):
        raise ValueError(f"expects (batch, channels, height, width), got {tuple(x.shape)}")


@with_kernel(
    lambda dy, x, weight, stride, padding, dilation, groups, wanted: (
        torch.ops.aten.convolution_backward(
            dy,
            x,
            weight,
            weight.shape[:1],
            stride,
            padding,
            dilation,
            False,
            (0, 0),
            groups,
            wanted,
        )
    )
)
def conv2d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(dx, dweight, dbias)``, those that are ``wanted``.

    With the patches of x that the kernel sees as the columns of a matrix, y is ``weight patches``,
    so ``dweight = dy patches^T``, and dx adds up the columns of ``weight^T dy`` where they came
    from.
    """
    n, (out, _, *kernel) = x.shape[0], weight.shape
    options: Any = {
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
    }
    g = dy.reshape(n, groups, out // groups, -1)
    dx = dweight = None
    if wanted[0]:
        matrix = weight.reshape(groups, out // groups, -1)
        dpatches = (matrix.mT @ g).flatten(1, 2)
        dx = F.fold(dpatches, x.shape[-2:], **options)
    if wanted[1]:
        patches = F.unfold(x, **options).unflatten(1, (groups, -1))
        dweight = (g @ patches.mT).sum(0).reshape(weight.shape)
    return dx, dweight, dy.sum((0, 2, 3)) if wanted[2] else None


def conv2d_rule(
    residuals: dict[str, Tensor],
    dy: Tensor,
    bias: bool,
    edges: tuple[Padding, str] | None,
    *static: Any,
    params: bool,
    x: bool,
) -> tuple[Params | None, Tensor | None]:
    """`conv2d_backward`, then the pullback of the padding."""
    inputs, weight = residuals["x"], residuals["weight"]
    single = inputs.dim() == 3
    if single:
        inputs, dy = inputs[None], dy[None]
    backward = fastest(conv2d_backward, dy, inputs, weight)
    wanted = (x, params, params and bias)
    dx, dweight, dbias = backward(dy, inputs, weight, *static, wanted)
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
    static = (bias, edges, stride, inner, dilation, groups)

    @declare
    def init(x: Tensor) -> dict[str, Param]:
        require_images(x)
        channels = x.shape[-3]
        if channels % groups:
            raise ValueError(f"groups must divide channels, got {groups}, {channels}")
        shape = (out_channels, channels // groups, *kernel)
        default = torch_default(math.prod(shape[1:]))
        seen = (1, "{} channels" if groups == 1 else f"{{}} channels for each of {groups} groups")
        params = {"weight": Param(shape, weight_init or default, dtype, of_x=seen)}
        if bias:
            params["bias"] = Param((out_channels,), bias_init or default, dtype)
        return params

    def forward(params: Params, x: Tensor) -> tuple[Tensor, Tensor]:
        """y, and the padded x."""
        mode = "constant" if padding_mode == "zeros" else padding_mode
        try:
            if edges is not None:
                x = F.pad(x, edges[0], mode)
            weight, offset = params["weight"], params.get("bias")
            return F.conv2d(x, weight, offset, stride, inner, dilation, groups), x
        except RuntimeError as error:
            raise ValueError(f"conv2d: does not fit {tree.describe(x)}: {error}") from None

    def apply(params: Params, x: Tensor) -> Tensor:
        return forward(params, x)[0]

    def vjp(params: Params, x: Tensor) -> tuple[Tensor, Pullback]:
        y, x = forward(params, x)
        return y, Pullback(conv2d_rule, {"x": x, "weight": params["weight"]}, static)

    return stateless(init, apply, vjp)
