"""Normalization of each example over its last dimensions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcnet import runtime
from funcnet.core import Forward, Key, Layer, Params, Pullback
from funcnet.errors import require
from funcnet.layers.norm import (
    FIRST,
    affine_names,
    check_eps,
    norm_backward,
    norm_rule,
    norm_statistics,
    with_affine,
)
from funcnet.lift import fastest, require_floating, stateful, with_kernel
from funcnet.params import Declaration, Param, declare

aten = torch.ops.aten


def last_dims(shape: tuple[int, ...]) -> list[int]:
    """The dimensions of a tensor whose shape ends in ``shape``."""
    return list(range(-len(shape), 0))


def as_shape(normalized_shape: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """The shape that is normalized over; None for the last dimension, whatever its size."""
    if isinstance(normalized_shape, int):
        return (normalized_shape,)
    return None if normalized_shape is None else tuple(normalized_shape)


def shaped_params(
    shape: tuple[int, ...] | None, names: tuple[str, ...], dtype: torch.dtype | None
) -> Declaration:
    """Declares parameters of the shape of x's last dimensions, and requires x to have them."""

    @declare
    def init(x: Tensor) -> dict[str, Param]:
        require_floating(x)
        got = tuple(x.shape)
        last = got[-1:] if shape is None else shape
        fits = last and got[-len(last) :] == last
        require(fits, f"expects last dimensions {last or '(n,)'}, got {got}")
        of_x = (slice(None), "last dimensions {}")
        return {name: Param(last, FIRST[name], dtype, wide=True, of_x=of_x) for name in names}

    return init


def _layer_norm_kernel(
    dy: Tensor, shape: Any, wanted: Any, *, x: Any, mean: Any, rstd: Any, weight: Any = None,
    bias: Any = None,
) -> Any:  # fmt: skip
    return aten.native_layer_norm_backward(dy, x, shape, mean, rstd, weight, bias, wanted)


@with_kernel(_layer_norm_kernel)
def layer_norm_backward(
    dy: Tensor, shape: Any, wanted: Any, *, x: Any, mean: Any, rstd: Any, weight: Any = None,
    bias: Any = None,
) -> Any:  # fmt: skip
    """`norm_backward` over the last dimensions."""
    return norm_backward(dy, x, weight, mean, rstd, last_dims(shape), wanted)


def layer_norm(
    normalized_shape: int | Sequence[int] | None = None,
    eps: float = 1e-5,
    elementwise_affine: bool = True,
    bias: bool = True,
    *,
    dtype: torch.dtype | None = None,
) -> Layer:
    """``y = (x - mean) / sqrt(var + eps) weight + bias`` over the last dimensions of x.

    Args:
        normalized_shape: the sizes of the dimensions to normalize over; default the last one.
        eps: added to the (biased) variance.
        elementwise_affine: whether weight and bias are learned.
        bias: False for a weight without a bias.
        dtype: of the parameters; default that of x.

    Inputs:
        x of shape ``(*, *normalized_shape)``, floating.
    Learned params:
        ``weight`` (ones), ``bias`` (zeros), each of shape ``normalized_shape``.
    VJP:
        with ``n`` the normalized x and ``g = dy weight``,
        ``dx = (g - mean g - n mean(g n)) / sqrt(var + eps)``, ``dweight = sum dy n``,
        ``dbias = sum dy``.
    Raises:
        ValueError: other last dimensions.

    Source: ``torch.nn.LayerNorm``; Ba, Kiros and Hinton 2016.

    >>> import funcnet as fn
    >>> layer = fn.layer_norm()
    >>> params, _ = layer.init(fn.key(0), torch.ones(1, 2))
    >>> layer.apply(params, torch.tensor([[1.0, 3.0]]))[0]
    tensor([[-1.0000,  1.0000]])
    """
    check_eps("layer_norm", eps)
    normalized, names = as_shape(normalized_shape), affine_names(elementwise_affine, bias)

    def forward(params: Params, x: Tensor, state: Params, key: Key, train: bool) -> Forward:
        shape = tuple(x.shape[-1:]) if normalized is None else normalized
        weight, bias = params.get("weight"), params.get("bias")
        y, mean, rstd = with_affine(
            lambda weight, bias: torch.native_layer_norm(x, shape, weight, bias, eps),
            *(weight, bias, lambda leaf: leaf),
        )
        mean, rstd = fastest(norm_statistics, x)(x, mean, rstd, last_dims(shape), eps)
        residuals = {"x": x, "mean": mean, "rstd": rstd, **params}
        return y, Pullback(norm_rule, residuals, (layer_norm_backward, (shape,), names)), state

    return stateful(shaped_params(normalized, names, dtype), forward)


def _is_fused(x: Tensor, weight: Any) -> bool:
    return x.is_cuda and (weight is None or weight.dtype == x.dtype)


def _rms_norm_kernel(x: Tensor, shape: Any, weight: Any, eps: float) -> tuple[Tensor, Tensor]:
    forward = runtime.rms_norm if _is_fused(x, weight) else rms_norm_forward
    return forward(x, shape, weight, eps)


@with_kernel(_rms_norm_kernel)
def rms_norm_forward(x: Tensor, shape: Any, weight: Any, eps: float) -> tuple[Tensor, Tensor]:
    """y and ``rstd = 1 / sqrt(mean x^2 + eps)``, computed in float32 for half precision."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = (wide.square().mean(last_dims(shape), keepdim=True) + eps).rsqrt()
    y = wide * rstd
    return (y if weight is None else y * weight).to(x.dtype), rstd


def _rms_norm_backward_kernel(
    dy: Tensor, shape: Any, wanted: Any, *, x: Tensor, rstd: Tensor, weight: Any = None
) -> Any:
    if not _is_fused(x, weight):
        return rms_norm_backward(dy, shape, wanted, x=x, rstd=rstd, weight=weight)
    return runtime.rms_norm_backward(dy, x, shape, rstd, weight, wanted[:2])


@with_kernel(_rms_norm_backward_kernel)
def rms_norm_backward(
    dy: Tensor, shape: Any, wanted: Any, *, x: Tensor, rstd: Tensor, weight: Any = None
) -> Any:
    """`norm_backward` over the last dimensions, without a mean."""
    return norm_backward(dy, x, weight, None, rstd, last_dims(shape), wanted)


def rms_norm(
    normalized_shape: int | Sequence[int] | None = None,
    eps: float | None = None,
    elementwise_affine: bool = True,
    *,
    dtype: torch.dtype | None = None,
) -> Layer:
    """``y = x / sqrt(mean x^2 + eps) weight`` over the last dimensions of x.

    Args:
        normalized_shape: the sizes of the dimensions to normalize over; default the last one.
        eps: added to the mean square; default the machine epsilon of x's dtype, of float32 for
            half precision.
        elementwise_affine: whether the weight is learned.
        dtype: of the weight; default that of x.

    Inputs:
        x of shape ``(*, *normalized_shape)``, floating.
    Learned params:
        ``weight`` (ones) of shape ``normalized_shape``.
    VJP:
        with ``n`` the normalized x and ``g = dy weight``,
        ``dx = (g - n mean(g n)) / sqrt(mean x^2 + eps)``, ``dweight = sum dy n``.
    Raises:
        ValueError: other last dimensions.

    Source: ``torch.nn.RMSNorm``; Zhang and Sennrich 2019.

    >>> import funcnet as fn
    >>> layer = fn.rms_norm()
    >>> params, _ = layer.init(fn.key(0), torch.ones(1, 2))
    >>> layer.apply(params, torch.tensor([[1.0, 7.0]]))[0]
    tensor([[0.2000, 1.4000]])
    """
    if eps is not None:
        check_eps("rms_norm", eps)
    normalized, names = as_shape(normalized_shape), affine_names(elementwise_affine, bias=False)

    def forward(params: Params, x: Tensor, state: Params, key: Key, train: bool) -> Forward:
        shape = tuple(x.shape[-1:]) if normalized is None else normalized
        least = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if eps is None else eps
        normalize = fastest(rms_norm_forward, x, *params.values())
        y, rstd = normalize(x, shape, params.get("weight"), least)
        residuals = {"x": x, "rstd": rstd, **params}
        return y, Pullback(norm_rule, residuals, (rms_norm_backward, (shape,), names)), state

    return stateful(shaped_params(normalized, names, dtype), forward)
