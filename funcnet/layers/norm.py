"""Normalization: by the statistics of each example, or of each channel over the batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcnet.core import Layer, Params, Pullback
from funcnet.initializers import ones, zeros
from funcnet.lift import fastest, require_floating, stateful, stateless, with_kernel
from funcnet.params import Param, State, declare

aten = torch.ops.aten
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]
"""``(dx, dweight, dbias)``; None for those that are not wanted."""
Wanted = tuple[bool, bool, bool]


def normalize_backward(dy: Tensor, n: Tensor, rstd: Tensor, dims: list[int]) -> Tensor:
    """dx of ``n = (x - mean) rstd``, where mean and rstd are those of x over ``dims``.

    ``dx = rstd (dy - mean dy - n mean(dy n))``
    """
    mean = dy.mean(dims, keepdim=True)
    return rstd * (dy - mean - n * (dy * n).mean(dims, keepdim=True))


@with_kernel(
    lambda dy, x, mean, rstd, weight, bias, shape, wanted: aten.native_layer_norm_backward(
        dy, x, shape, mean, rstd, weight, bias, wanted
    )
)
def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, ...],
    wanted: Wanted,
) -> Grads:
    """With ``n = (x - mean) rstd``: dx as in `normalize_backward`, for ``dy weight``;
    ``dweight = sum dy n``, ``dbias = sum dy``.
    """
    dims = list(range(x.dim() - len(shape), x.dim()))
    n = (x - mean) * rstd
    dn = dy if weight is None else dy * weight
    return (
        normalize_backward(dn, n, rstd, dims).to(x.dtype) if wanted[0] else None,
        (dy * n).sum_to_size(shape).to(dy.dtype) if wanted[1] else None,
        dy.sum_to_size(shape) if wanted[2] else None,
    )


def layer_norm_rule(
    residuals: dict[str, Tensor],
    dy: Tensor,
    shape: tuple[int, ...],
    names: tuple[str, ...],
    *,
    params: bool,
    x: bool,
) -> tuple[Params | None, Tensor | None]:
    """See `layer_norm_backward`."""
    saved = [residuals.get(name) for name in ("x", "mean", "rstd", "weight", "bias")]
    backward = fastest(layer_norm_backward, dy, *residuals.values())
    wanted = (x, params and "weight" in names, params and "bias" in names)
    dx, dweight, dbias = backward(dy, *saved, shape, wanted)
    grads = {"weight": dweight, "bias": dbias}
    return ({name: grads[name] for name in names} if params else None), dx if x else None


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
    if eps < 0:
        raise ValueError(f"layer_norm: eps must be >= 0, got {eps}")
    fixed = None if normalized_shape is None else tuple(normalized_shape)
    names = () if not elementwise_affine else ("weight", "bias") if bias else ("weight",)

    @declare
    def init(x: Tensor) -> dict[str, Param]:
        require_floating(x)
        shape = tuple(x.shape[-1:]) if fixed is None else fixed
        if not shape or tuple(x.shape[-len(shape) :]) != shape:
            raise ValueError(f"expects last dimensions {shape or '(n,)'}, got {tuple(x.shape)}")
        start = {"weight": ones(), "bias": zeros()}
        of_x = (slice(None), "last dimensions {}")
        return {name: Param(shape, start[name], dtype, wide=True, of_x=of_x) for name in names}

    def normalize(params: Params, x: Tensor) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
        shape = tuple(x.shape[-1:]) if fixed is None else fixed
        weight, bias = params.get("weight"), params.get("bias")
        return shape, *torch.native_layer_norm(x, shape, weight, bias, eps)

    def apply(params: Params, x: Tensor) -> Tensor:
        return normalize(params, x)[1]

    def vjp(params: Params, x: Tensor) -> tuple[Tensor, Pullback]:
        shape, y, mean, rstd = normalize(params, x)
        residuals = {"x": x, "mean": mean, "rstd": rstd, **params}
        return y, Pullback(layer_norm_rule, residuals, (shape, names))

    return stateless(init, apply, vjp)


def _by_channel(leaf: Tensor, x: Tensor) -> Tensor:
    """A tensor of shape (channels,), dimension 1 of x, so that it broadcasts against x."""
    return leaf.reshape(-1, *[1] * (x.dim() - 2))


def _other_dims(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


@with_kernel(
    lambda dy, x, weight, mean, rstd, wanted: aten.native_batch_norm_backward(
        dy, x, weight, None, None, mean, rstd, True, 0.0, wanted
    )
)
def batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, wanted: Wanted
) -> Grads:
    """`layer_norm_backward` by channel: mean and rstd are those of the batch."""
    dims = _other_dims(x)
    n = (x - _by_channel(mean, x)) * _by_channel(rstd, x)
    dn = dy if weight is None else dy * _by_channel(weight, x)
    return (
        normalize_backward(dn, n, _by_channel(rstd, x), dims).to(x.dtype) if wanted[0] else None,
        (dy * n).sum(dims).to(mean.dtype) if wanted[1] else None,
        dy.sum(dims).to(mean.dtype) if wanted[2] else None,
    )


def batch_norm_rule(
    residuals: dict[str, Tensor], dy: Tensor, affine: bool, *, params: bool, x: bool
) -> tuple[Params | None, Tensor | None]:
    """With the batch's statistics; see `batch_norm_backward`."""
    inputs = residuals["x"]
    if inputs.numel() == 0:  # the kernel divides by the number of values
        zeros = {name: torch.zeros_like(residuals["mean"]) for name in ("weight", "bias")}
        return (zeros if affine else {}) if params else None, dy if x else None
    saved = [residuals.get(name) for name in ("x", "weight", "mean", "rstd")]
    backward = fastest(batch_norm_backward, dy, *residuals.values())
    dx, dweight, dbias = backward(dy, *saved, (x, params and affine, params and affine))
    dparams = {"weight": dweight, "bias": dbias} if affine else {}
    return dparams if params else None, dx if x else None


def frozen_batch_norm_rule(
    residuals: dict[str, Tensor], dy: Tensor, eps: float, affine: bool, *, params: bool, x: bool
) -> tuple[Params | None, Tensor | None]:
    """With running statistics: ``dx = dy weight rstd``, ``dweight = sum dy n``, ``dbias = sum dy``,
    where ``rstd = 1 / sqrt(var + eps)`` and ``n = (x - mean) rstd``.
    """
    inputs, mean, var = residuals["x"], residuals["mean"], residuals["var"]
    rstd = (var + eps).rsqrt()
    dparams: dict[str, Tensor] = {}
    if params and affine:
        dims = _other_dims(inputs)
        n = (inputs - _by_channel(mean, inputs)) * _by_channel(rstd, inputs)
        dparams = {"weight": (dy * n).sum(dims), "bias": dy.sum(dims)}
        dparams = {name: grad.to(residuals["weight"].dtype) for name, grad in dparams.items()}
    scale = rstd * residuals["weight"] if affine else rstd
    dx = (dy * _by_channel(scale, inputs)).to(dy.dtype) if x else None
    return dparams if params else None, dx


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
    if eps < 0:
        raise ValueError(f"batch_norm: eps must be >= 0, got {eps}")

    @declare
    def init(x: Tensor) -> dict[str, Param]:
        require_floating(x)
        if x.dim() < 2:
            raise ValueError(f"expects (batch, channels, *), got {tuple(x.shape)}")
        kind: Any = {"dtype": dtype, "wide": True, "of_x": (0, "{} channels in dimension 1")}
        shape = (x.shape[1],)
        declared: dict[str, Param] = {}
        if affine:
            declared["weight"] = Param(shape, ones(), **kind)
            declared["bias"] = Param(shape, zeros(), **kind)
        if track_running_stats:
            declared["running_mean"] = State(shape, zeros(), **kind)
            declared["running_var"] = State(shape, ones(), **kind)
            declared["num_batches_tracked"] = State((), zeros(), torch.int64)
        return declared

    def updated(state: Params, x: Tensor) -> Params:
        seen = state["num_batches_tracked"] + 1
        if x.numel() == 0:
            return {**state, "num_batches_tracked": seen}
        running_mean, running_var = state["running_mean"], state["running_var"]
        # The kernel's own statistics have no derivative.
        var, mean = torch.var_mean(x.to(running_mean.dtype), _other_dims(x))
        # Half precision cannot count far.
        exact = torch.promote_types(running_mean.dtype, torch.float32)
        rate = momentum if momentum is not None else seen.to(exact).reciprocal()
        return {
            "running_mean": ((1 - rate) * running_mean + rate * mean).to(running_mean.dtype),
            "running_var": ((1 - rate) * running_var + rate * var).to(running_var.dtype),
            "num_batches_tracked": seen,
        }

    def by_batch(params: Params, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """y and the batch's ``mean`` and ``rstd``."""
        if x.numel() == x.shape[1] > 0:
            raise ValueError(
                f"batch_norm: needs more than one value per channel when train=True, "
                f"got {tuple(x.shape)}"
            )
        weight, bias = params.get("weight"), params.get("bias")
        if x.numel() == 0:  # the kernel divides by the number of values
            nothing = x.new_zeros(x.shape[1], dtype=(x if weight is None else weight).dtype)
            return x.clone(), {"mean": nothing, "rstd": nothing}
        y, mean, rstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        return y, {"mean": mean, "rstd": rstd}

    def by_running(params: Params, x: Tensor, state: Params) -> tuple[Tensor, dict[str, Tensor]]:
        """y and the running ``mean`` and ``var``."""
        mean, var = state["running_mean"], state["running_var"]
        scale = (var + eps).rsqrt()
        shift = -mean * scale
        if affine:
            scale, shift = scale * params["weight"], shift * params["weight"] + params["bias"]
        y = torch.addcmul(_by_channel(shift, x), x, _by_channel(scale, x)).to(x.dtype)
        return y, {"mean": mean, "var": var}

    def forward(
        params: Params, x: Tensor, state: Params, key: Tensor | None, train: bool
    ) -> tuple[Tensor, Pullback, Params]:
        weight = {"weight": params["weight"]} if affine else {}
        if train or not track_running_stats:
            y, statistics = by_batch(params, x)
            if track_running_stats:
                state = updated(state, x)
            return y, Pullback(batch_norm_rule, {"x": x, **statistics, **weight}, (affine,)), state
        y, statistics = by_running(params, x, state)
        residuals = {"x": x, **statistics, **weight}
        return y, Pullback(frozen_batch_norm_rule, residuals, (eps, affine)), state

    return stateful(init, forward)
