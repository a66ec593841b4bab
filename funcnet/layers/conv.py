"""Convolution and its transpose, over one, two and three spatial dimensions."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import Forward, Grads, Key, Layer, Params, Pullback
from funcnet.deferred import for_dx
from funcnet.errors import require
from funcnet.initializers import Initializer
from funcnet.layers.padding import Padding, pad, pad_backward
from funcnet.layers.spatial import (
    Size,
    Window,
    require_spatial,
    sizes,
    spatial,
)
from funcnet.lift import fastest, stateful, with_kernel
from funcnet.params import Declaration, Param, declare, weight_and_bias


def _convolution_kernel(
    dy: Tensor, x: Tensor, weight: Tensor, wanted: Any, *geometry: Any
) -> tuple[Any, Any, Any]:
    transposed, groups = geometry[3], geometry[5]
    out = weight.shape[1] * groups if transposed else weight.shape[0]
    backward = torch.ops.aten.convolution_backward
    return backward(dy, x, weight, [out], *geometry, wanted)


@with_kernel(_convolution_kernel)
def convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, wanted: Any, *geometry: Any
) -> tuple[Any, Any, Any]:
    """``(dx, dweight, dbias)``, those that are ``wanted``.

    Let ``patches(image)`` have in its columns what the kernel sees of an image at each place. Then
    y is ``weight patches(x)``, so ``dweight = dy patches(x)^T``, and dx adds up the columns of
    ``weight^T dy`` where they came from. The transpose has x in the place of dy:
    ``dx = weight patches(dy)``, ``dweight = x patches(dy)^T``.
    """
    stride, padding, dilation, transposed, _, groups = geometry
    image, places = (dy, x) if transposed else (x, dy)
    window = Window(tuple(weight.shape[2:]), dilation, padding, stride)
    size, count, n = image.shape[2:], places.shape[2:], len(x)
    # By group: the places' channels, and the kernel as a matrix.
    rows = places.reshape(n, groups, places.shape[1] // groups, math.prod(count))
    matrix = weight.reshape(groups, weight.shape[0] // groups, weight[0].numel())
    patches = window.take(image, count).reshape(n, groups, matrix.shape[2], rows.shape[3])
    dx = dweight = None
    if wanted[0] and transposed:
        dx = (matrix @ patches).reshape(x.shape)
    elif wanted[0]:
        columns = (matrix.mT @ rows).reshape(*x.shape[:2], math.prod(window.kernel), -1)
        dx = window.add(columns, size, count)
    if wanted[1]:
        dweight = (rows @ patches.mT).sum(0).reshape(weight.shape)
    return dx, dweight, dy.sum([0, *range(2, dy.dim())]) if wanted[2] else None


@for_dx("weight")
def convolution_rule(
    residuals: Any, dy: Tensor, bias: bool, edges: Any, *geometry: Any, params: bool, x: bool
) -> Grads:
    """`convolution_backward`, then the pullback of the padding."""
    inputs, weight = residuals["x"], residuals["weight"]
    single = inputs.dim() < weight.dim()
    if single:
        inputs, dy = inputs[None], dy[None]
    backward = fastest(convolution_backward, dy, inputs, weight)
    wanted = (x, params, params and bias)
    dx, dweight, dbias = backward(dy, inputs, weight, wanted, *geometry)
    dparams = {"weight": dweight, "bias": dbias} if bias else {"weight": dweight}
    if x and edges is not None:
        dx = pad_backward(dx, *edges)
    return dparams if params else None, dx[0] if single and x else dx


def _convolution(
    name: str,
    init: Declaration,
    bias: bool,
    geometry_of: Callable[[Tensor], tuple[Any, ...]],
    edges: tuple[Padding, str] | None = None,
) -> Layer:
    """The layer of ``torch.convolution``, after a padding of the ``edges``.

    ``geometry_of(x)`` is ``(stride, padding, dilation, transposed, output_padding, groups)``.
    """

    def forward(params: Params, x: Tensor, state: Params, key: Key, train: bool) -> Forward:
        weight, geometry = params["weight"], geometry_of(x)
        single = x.dim() < weight.dim()
        try:
            x = x if edges is None else pad(x, *edges)
            images = x[None] if single else x
            y = torch.convolution(images, weight, params.get("bias"), *geometry)
        except RuntimeError as error:
            raise ValueError(f"{name}: does not fit {tree.describe(x)}: {error}") from None
        static = (bias, edges, *geometry)
        pullback = Pullback(convolution_rule, {"x": x, "weight": weight}, static)
        return y[0] if single else y, pullback, state

    return stateful(init, forward, name=name)


def _conv(
    dims: int,
    out_channels: int,
    kernel_size: Size,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    bias: bool = True,
    padding_mode: str = "zeros",
    *,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """Cross-correlation of x with learned kernels, plus a bias by channel.

    Args:
        out_channels: the number of kernels.
        kernel_size: (height, width), or one int for all; so with the next three.
        stride: the step between positions of the kernel.
        padding: what is added on each side of x, "valid" for nothing, or "same" for as much as
            keeps its size (with stride 1).
        dilation: the step between the kernel's points.
        groups: out channel group i sees only in channel group i.
        bias: whether a bias is learned.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        weight_init: default U(-b, b) with ``b = 1 / sqrt(fan_in)``, as torch.nn.Conv2d.
        bias_init: default the same U(-b, b).
        dtype: of the parameters; default that of x.

    Inputs:
        x of shape (batch, channels, height, width) or without a batch, floating.
    Returns:
        y of shape ``(batch, out_channels, *size')``, with
        ``size' = floor((size + 2 padding - dilation (kernel - 1) - 1) / stride) + 1``.
    Learned params:
        ``weight`` ``(out_channels, channels / groups, *kernel_size)``, ``bias`` (out_channels,).
    VJP:
        dweight is x correlated with dy, dx is dy convolved with the weight, ``dbias = sum dy``.
    Raises:
        ValueError: another rank or number of channels.

    Source: ``torch.nn.Conv2d``.

    >>> layer = fn.conv2d(8, 3, padding="same")
    >>> params, _ = layer.init(fn.key(0), torch.ones(5, 1, 28, 28))
    >>> layer.apply(params, torch.ones(5, 1, 28, 28))[0].shape
    torch.Size([5, 8, 28, 28])
    """
    name = f"conv{dims}d"
    kernel = sizes(f"{name}: kernel_size", kernel_size, dims, 1)
    stride = sizes(f"{name}: stride", stride, dims, 1)
    dilation = sizes(f"{name}: dilation", dilation, dims, 1)
    _check_channels(name, out_channels, groups)
    modes = ("zeros", "reflect", "replicate", "circular")
    known = f"{name}: padding_mode must be zeros, reflect, replicate or circular"
    require(padding_mode in modes, f"{known}, got {padding_mode!r}")
    if isinstance(padding, str):
        known = f"{name}: padding must be 'valid', 'same' or ints, got {padding!r}"
        require(padding in ("valid", "same"), known)
        fits = padding == "valid" or set(stride) == {1}
        require(fits, f"{name}: padding='same' needs stride 1, got {stride}")
        spans = [d * (k - 1) * (padding == "same") for d, k in zip(dilation, kernel, strict=True)]
        before, after = [span // 2 for span in spans], [span - span // 2 for span in spans]
    else:
        before = after = list(sizes(f"{name}: padding", padding, dims, 0))
    # The kernel pads with zeros, the same on both sides; all else is padded before it.
    within = padding_mode == "zeros" and before == after
    around = [each for pair in zip(before[::-1], after[::-1], strict=True) for each in pair]
    mode = "constant" if padding_mode == "zeros" else padding_mode
    edges = None if within or not any(around) else (tuple(around), mode)
    inner = tuple(before) if within else (0,) * dims
    geometry = (stride, inner, dilation, False, (0,) * dims, groups)

    @declare
    def init(x: Tensor) -> Mapping[str, Param]:
        channels = _channels(x, dims, groups)
        seen = (1, "{} channels" if groups == 1 else f"{{}} channels for each of {groups} groups")
        shape = (out_channels, channels // groups, *kernel)
        return weight_and_bias(shape, seen, bias, weight_init, bias_init, dtype)

    return _convolution(name, init, bias, lambda x: geometry, edges)


def _conv_transpose(
    dims: int,
    out_channels: int,
    kernel_size: Size,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    bias: bool = True,
    dilation: Size = 1,
    padding_mode: str = "zeros",
    *,
    output_size: Sequence[int] | None = None,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """The transpose of a convolution, as a linear map: each value of x puts its kernel into y.

    Args:
        out_channels: the number of channels of y.
        kernel_size: (height, width), or one int for all; so with the next three and dilation.
        stride: the step in y between the kernels of neighbours in x.
        padding: what is left out on each side of y.
        output_padding: what is added at the end of y, where several sizes of x would be possible
            for the convolution; less than the stride or the dilation.
        groups: out channel group i sees only in channel group i.
        bias: whether a bias is learned.
        dilation: the step between the kernel's points.
        padding_mode: "zeros"; there is no other, as in torch.
        output_size: (height, width) of y, in the place of output_padding.
        weight_init: default U(-b, b) with ``b = 1 / sqrt(fan)``, as torch.nn.ConvTranspose2d,
            where fan is the number of elements of ``weight[0]``.
        bias_init: default the same U(-b, b).
        dtype: of the parameters; default that of x.

    Inputs:
        x of shape (batch, channels, height, width) or without a batch, floating.
    Returns:
        y of shape ``(batch, out_channels, *size')``, with
        ``size' = (size - 1) stride - 2 padding + dilation (kernel - 1) + output_padding + 1``.
    Learned params:
        ``weight`` ``(channels, out_channels / groups, *kernel_size)``, ``bias`` (out_channels,).
    VJP:
        dx is dy correlated with the weight, dweight is dy correlated with x, ``dbias = sum dy``.
    Raises:
        ValueError: another rank or number of channels, or an impossible output_size.

    Source: ``torch.nn.ConvTranspose2d``.

    >>> layer = fn.conv_transpose2d(8, 2, stride=2)
    >>> params, _ = layer.init(fn.key(0), torch.ones(5, 4, 14, 14))
    >>> layer.apply(params, torch.ones(5, 4, 14, 14))[0].shape
    torch.Size([5, 8, 28, 28])
    """
    name = f"conv_transpose{dims}d"
    kernel = sizes(f"{name}: kernel_size", kernel_size, dims, 1)
    stride = sizes(f"{name}: stride", stride, dims, 1)
    padding = sizes(f"{name}: padding", padding, dims, 0)
    dilation = sizes(f"{name}: dilation", dilation, dims, 1)
    added = sizes(f"{name}: output_padding", output_padding, dims, 0)
    if output_size is not None:
        output_size = sizes(f"{name}: output_size", output_size, dims, 1)
    _check_channels(name, out_channels, groups)
    known = f"{name}: padding_mode must be zeros, got {padding_mode!r}"
    require(padding_mode == "zeros", known)

    def geometry_of(x: Tensor) -> tuple[Any, ...]:
        end = added if output_size is None else missing(x.shape[-dims:], output_size)
        return (stride, padding, dilation, True, end, groups)

    def missing(size: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...]:
        """What is to be added at the end, for y to have the wanted size."""
        options = zip(size, stride, padding, dilation, kernel, strict=True)
        least = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in options]
        ends = [each - smallest for each, smallest in zip(wanted, least, strict=True)]
        possible = all([0 <= end < step for end, step in zip(ends, stride, strict=True)])
        most = [smallest + step - 1 for smallest, step in zip(least, stride, strict=True)]
        got = f"got {tuple(wanted)} for x of size {tuple(size)}"
        require(possible, f"output_size must be from {tuple(least)} to {tuple(most)}, {got}")
        return tuple(ends)

    @declare
    def init(x: Tensor) -> Mapping[str, Param]:
        channels = _channels(x, dims, groups)
        geometry_of(x)
        shape = (channels, out_channels // groups, *kernel)
        options = (bias, weight_init, bias_init, dtype)
        return weight_and_bias(shape, (0, "{} channels"), *options, out=out_channels)

    return _convolution(name, init, bias, geometry_of)


def _channels(x: Tensor, dims: int, groups: int) -> int:
    """The number of channels of x, which must be such that the groups divide it."""
    require_spatial(dims)(x)
    channels = x.shape[-1 - dims]
    require(channels % groups == 0, f"groups must divide channels, got {groups}, {channels}")
    return channels


def _check_channels(name: str, out_channels: int, groups: int) -> None:
    require(out_channels >= 1, f"{name}: out_channels must be at least 1, got {out_channels}")
    divides = groups >= 1 and out_channels % groups == 0
    require(divides, f"{name}: groups must divide out_channels, got {groups}, {out_channels}")


conv1d, conv2d, conv3d = (spatial(_conv, dims) for dims in (1, 2, 3))
conv_transpose1d, conv_transpose2d, conv_transpose3d = (
    spatial(_conv_transpose, dims) for dims in (1, 2, 3)
)
