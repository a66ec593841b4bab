"""Normalization: by the statistics of each example, or of each channel over the batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcnet import runtime
from funcnet.core import Forward, Grads, Key, Layer, Params, Pullback
from funcnet.errors import require
from funcnet.initializers import ones, zeros
from funcnet.lift import fastest, require_floating, stateful, with_kernel
from funcnet.params import Param, State, declare

aten = torch.ops.aten


def norm_backward(
    dy: Tensor, x: Tensor, weight: Any, mean: Tensor, rstd: Tensor, dims: list[int], wanted: Any
) -> Any:
    """``(dx, dweight, dbias)``, those that are ``wanted``, of ``y = n weight + bias``.

    ``n = (x - mean) rstd``, with the statistics of x over ``dims``. With ``g = dy weight``,
    ``dx = rstd (g - mean g - n mean(g n))``, ``dweight = sum dy n`` and ``dbias = sum dy``.
    """
    n = (x - mean) * rstd
    g = dy if weight is None else dy * weight
    average = g.mean(dims, keepdim=True)
    along_n = n * (g * n).mean(dims, keepdim=True)
    dx = (rstd * (g - average - along_n)).to(x.dtype) if wanted[0] else None
    dweight = (dy * n).sum_to_size(weight.shape).to(weight.dtype) if wanted[1] else None
    return dx, dweight, dy.sum_to_size(weight.shape).to(weight.dtype) if wanted[2] else None


@with_kernel(lambda x, mean, rstd, dims, eps: (mean, rstd))
def norm_statistics(
    x: Tensor, mean: Tensor, rstd: Tensor, dims: list[int], eps: float
) -> tuple[Tensor, Tensor]:
    """``mean`` and ``rstd = 1 / sqrt(var + eps)`` of x over ``dims``.

    The forward kernels return both, given here, but without a derivative.
    """
    var, again = torch.var_mean(x.to(mean.dtype), dims, correction=0, keepdim=True)
    return again.reshape(mean.shape), (var + eps).rsqrt().reshape(rstd.shape)


def _layer_norm_kernel(
    dy: Tensor, x: Tensor, weight: Any, bias: Any, mean: Any, rstd: Any, shape: Any, wanted: Any
) -> Any:
    return aten.native_layer_norm_backward(dy, x, shape, mean, rstd, weight, bias, wanted)


@with_kernel(_layer_norm_kernel)
def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Any, bias: Any, mean: Any, rstd: Any, shape: Any, wanted: Any
) -> Any:
    """`norm_backward` over the last dimensions."""
    dims = list(range(-len(shape), 0))
    return norm_backward(dy, x, weight, mean, rstd, dims, wanted)


def layer_norm_rule(
    residuals: Any, dy: Tensor, shape: Any, names: tuple[str, ...], *, params: bool, x: bool
) -> Grads:
    """See `norm_backward`."""
    saved = [residuals.get(name) for name in ("x", "weight", "bias", "mean", "rstd")]
    backward = fastest(layer_norm_backward, dy, *residuals.values())
    wanted = (x, params and "weight" in names, params and "bias" in names)
    dx, *grads = backward(dy, *saved, shape, wanted)
    return dict(zip(names, grads, strict=False)) if params else None, dx if x else None


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

    Inputs: x of shape (*, *normalized_shape), floating.
    Params: ``weight`` (ones), ``bias`` (zeros), each of shape ``normalized_shape``.
    VJP: with ``n`` the normalized x and ``g = dy weight``,
    ``dx = (g - mean g - n mean(g n)) / sqrt(var + eps)``, ``dweight = sum dy n``,
    ``dbias = sum dy``.
    Source: ``torch.nn.LayerNorm``; Ba, Kiros and Hinton 2016.

    >>> import funcnet as fn
    >>> layer = fn.layer_norm()
    >>> params, _ = layer.init(fn.key(0), torch.ones(1, 2))
    >>> layer.apply(params, torch.tensor([[1.0, 3.0]]))[0]
    tensor([[-1.0000,  1.0000]])
    """
    if isinstance(normalized_shape, int):
        normalized_shape = (normalized_shape,)
    require(eps >= 0, f"layer_norm: eps must be >= 0, got {eps}")
    names = () if not elementwise_affine else ("weight", "bias") if bias else ("weight",)
    start = {"weight": ones(), "bias": zeros()}

    def shape_of(x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape[-1:] if normalized_shape is None else normalized_shape)

    @declare
    def init(x: Tensor) -> dict[str, Param]:
        require_floating(x)
        shape, got = shape_of(x), tuple(x.shape)
        fits = shape and got[-len(shape) :] == shape
        require(fits, f"expects last dimensions {shape or '(n,)'}, got {got}")
        of_x = (slice(None), "last dimensions {}")
        return {name: Param(shape, start[name], dtype, wide=True, of_x=of_x) for name in names}

    def forward(params: Params, x: Tensor, state: Params, key: Key, train: bool) -> Forward:
        shape, weight, bias = shape_of(x), params.get("weight"), params.get("bias")
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        dims = list(range(-len(shape), 0))
        mean, rstd = fastest(norm_statistics, x)(x, mean, rstd, dims, eps)
        residuals = {"x": x, "mean": mean, "rstd": rstd, **params}
        return y, Pullback(layer_norm_rule, residuals, (shape, names)), state

    return stateful(init, forward)


def _by_channel(leaf: Any, x: Tensor) -> Any:
    """A tensor of shape (channels,), dimension 1 of x, so that it broadcasts against x."""
    return None if leaf is None else leaf.reshape(-1, *[1] * (x.dim() - 2))


def _other_dims(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _batch_norm_kernel(
    dy: Tensor, x: Tensor, weight: Any, mean: Tensor, rstd: Tensor, wanted: Any
) -> Any:
    running = (None, None)
    return aten.native_batch_norm_backward(dy, x, weight, *running, mean, rstd, True, 0.0, wanted)


@with_kernel(_batch_norm_kernel)
def batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Any, mean: Tensor, rstd: Tensor, wanted: Any
) -> Any:
    """`norm_backward` by channel."""
    weight, mean, rstd = (_by_channel(leaf, x) for leaf in (weight, mean, rstd))
    return norm_backward(dy, x, weight, mean, rstd, _other_dims(x), wanted)


def _batch_norm_in_one(
    x: Tensor, weight: Any, bias: Any, running: Any, rate: Any, eps: float
) -> tuple[Tensor, Tensor, Tensor, Any]:
    plain = x.is_cpu and isinstance(rate, float) and not runtime.is_transformed()
    if running is None or not plain:
        return batch_norm_forward(x, weight, bias, running, rate, eps)
    # The kernel writes to the running statistics.
    mean, var = [each.clone() for each in running]
    forward = torch.native_batch_norm(x, weight, bias, mean, var, True, rate, eps)
    return *forward, (mean, var)


@with_kernel(_batch_norm_in_one)
def batch_norm_forward(
    x: Tensor, weight: Any, bias: Any, running: Any, rate: Any, eps: float
) -> tuple[Tensor, Tensor, Tensor, Any]:
    """y, the batch's ``mean`` and ``rstd``, and the new running mean and variance, if any."""
    y, mean, rstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    mean, rstd = fastest(norm_statistics, x)(x, mean, rstd, _other_dims(x), eps)
    return y, mean, rstd, running and running_statistics(x, running, rate)


def running_statistics(x: Tensor, running: Any, rate: Any) -> tuple[Tensor, ...]:
    """``(1 - rate) running + rate batch``, of the mean and the unbiased variance by channel."""
    kind = running[0].dtype
    var, mean = torch.var_mean(x.to(kind), _other_dims(x))
    pairs = zip(running, (mean, var), strict=True)
    return tuple([((1 - rate) * old + rate * new).to(kind) for old, new in pairs])


def batch_norm_rule(residuals: Any, dy: Tensor, affine: bool, *, params: bool, x: bool) -> Grads:
    """With the batch's statistics; see `norm_backward`."""
    inputs, learns = residuals["x"], params and affine
    if inputs.numel() == 0:  # the kernel divides by the number of values
        nothing = torch.zeros_like(residuals["mean"])
        dx, dweight, dbias = dy, nothing, nothing.clone()
    else:
        saved = [residuals.get(name) for name in ("x", "weight", "mean", "rstd")]
        backward = fastest(batch_norm_backward, dy, *residuals.values())
        dx, dweight, dbias = backward(dy, *saved, (x, learns, learns))
    dparams = {"weight": dweight.flatten(), "bias": dbias.flatten()} if learns else {}
    return dparams if params else None, dx if x else None


def frozen_batch_norm_rule(
    residuals: Any, dy: Tensor, eps: float, affine: bool, *, params: bool, x: bool
) -> Grads:
    """With running statistics: ``dx = dy weight rstd``, ``dweight = sum dy n``, ``dbias = sum dy``,
    where ``rstd = 1 / sqrt(var + eps)`` and ``n = (x - mean) rstd``.
    """
    inputs, mean, weight = residuals["x"], residuals["mean"], residuals.get("weight")
    rstd = (residuals["var"] + eps).rsqrt()
    dparams: dict[str, Tensor] = {}
    if params and affine:
        n = (inputs - _by_channel(mean, inputs)) * _by_channel(rstd, inputs)
        sums = {"weight": dy * n, "bias": dy}
        dims = _other_dims(inputs)
        dparams = {name: each.sum(dims).to(weight.dtype) for name, each in sums.items()}
    scale = _by_channel(rstd * weight if affine else rstd, inputs)
    return dparams if params else None, (dy * scale).to(dy.dtype) if x else None


def batch_norm(
    *,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
    track_running_stats: bool = True,
    dtype: torch.dtype | None = None,
) -> Layer:
    """``y = (x - mean) / sqrt(var + eps) weight + bias`` by channel, dimension 1 of x.

    With ``train=True`` mean and (biased) variance are those of the batch, and the returned state
    has ``running = (1 - momentum) running + momentum batch``, where the batch's variance is the
    unbiased one. With ``train=False`` they are the running ones, if they are tracked.

    Args:
        eps: added to the variance.
        momentum: None averages over all batches so far.
        affine: whether weight and bias are learned.
        track_running_stats: False always uses the batch's statistics and keeps no state.
        dtype: of parameters and state; default that of x.

    The number of channels is found by init; there is no argument for it.

    Inputs: x of shape (batch, channels, *), floating, any rank from 2.
    Params: ``weight`` (ones) and ``bias`` (zeros), each (channels,).
    State: ``running_mean`` (zeros) and ``running_var`` (ones), each (channels,), and
    ``num_batches_tracked``, an int64 scalar.
    VJP: in training, with ``n`` the normalized x, ``g = dy weight`` and means over a channel,
    ``dx = (g - mean g - n mean(g n)) / sqrt(var + eps)``; ``dweight = sum dy n``,
    ``dbias = sum dy``. Else ``dx = g / sqrt(running_var + eps)``.
    Raises: ValueError for one value a channel in training.
    Source: ``torch.nn.BatchNorm1d`` to ``3d``; Ioffe and Szegedy 2015.

    >>> import funcnet as fn
    >>> layer = fn.batch_norm()
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> params, state = layer.init(fn.key(0), x)
    >>> y, state = layer.apply(params, x, state, train=True)
    >>> y
    tensor([[-1.0000],
            [ 1.0000]])
    >>> state["running_mean"], state["running_var"], state["num_batches_tracked"]
    (tensor([0.2000]), tensor([1.1000]), tensor(1))
    """
    require(eps >= 0, f"batch_norm: eps must be >= 0, got {eps}")

    @declare
    def init(x: Tensor) -> dict[str, Param]:
        require_floating(x)
        require(x.dim() >= 2, f"expects (batch, channels, *), got {tuple(x.shape)}")
        shape, of_x = (x.shape[1],), (0, "{} channels in dimension 1")
        kind: Any = {"dtype": dtype, "wide": True, "of_x": of_x}
        declared: dict[str, Param] = {}
        if affine:
            declared["weight"] = Param(shape, ones(), **kind)
            declared["bias"] = Param(shape, zeros(), **kind)
        if track_running_stats:
            declared["running_mean"] = State(shape, zeros(), **kind)
            declared["running_var"] = State(shape, ones(), **kind)
            declared["num_batches_tracked"] = State((), zeros(), torch.int64)
        return declared

    def by_batch(params: Params, x: Tensor, state: Any) -> tuple[Tensor, Any, Params]:
        """y, the batch's ``mean`` and ``rstd``, and the state, which is updated."""
        several, got = x.numel() != x.shape[1] or x.numel() == 0, tuple(x.shape)
        what = "batch_norm: needs more than one value per channel when train=True"
        require(several, f"{what}, got {got}")
        weight, bias = params.get("weight"), params.get("bias")
        running: Any = None
        rate: Any = momentum
        if track_running_stats:
            running = state["running_mean"], state["running_var"]
            state["num_batches_tracked"] = state["num_batches_tracked"] + 1
            if momentum is None:
                # Half precision cannot count far.
                exact = torch.promote_types(running[0].dtype, torch.float32)
                rate = state["num_batches_tracked"].to(exact).reciprocal()
        if x.numel() == 0:  # the kernel divides by the number of values
            nothing = x.new_zeros(x.shape[1], dtype=(x if weight is None else weight).dtype)
            return x.clone(), {"mean": nothing, "rstd": nothing}, state
        forward = fastest(batch_norm_forward, x, *running or ())
        y, mean, rstd, new = forward(x, weight, bias, running, rate, eps)
        if new is not None:
            state["running_mean"], state["running_var"] = new
        return y, {"mean": mean, "rstd": rstd}, state

    def by_running(params: Params, x: Tensor, state: Params) -> tuple[Tensor, dict[str, Tensor]]:
        """y and the running ``mean`` and ``var``."""
        mean, var = state["running_mean"], state["running_var"]
        scale = (var + eps).rsqrt()
        shift = -mean * scale
        if affine:
            scale, shift = scale * params["weight"], shift * params["weight"] + params["bias"]
        y = torch.addcmul(_by_channel(shift, x), x, _by_channel(scale, x)).to(x.dtype)
        return y, {"mean": mean, "var": var}

    def forward(params: Params, x: Tensor, state: Params, key: Key, train: bool) -> Forward:
        weight = {"weight": params["weight"]} if affine else {}
        rule: tuple[Any, Any]
        if train or not track_running_stats:
            y, statistics, state = by_batch(params, x, state)
            rule = (batch_norm_rule, (affine,))
        else:
            y, statistics = by_running(params, x, state)
            rule = (frozen_batch_norm_rule, (eps, affine))
        return y, Pullback(rule[0], {"x": x, **statistics, **weight}, rule[1]), state

    return stateful(init, forward)
