"""Normalization of each channel by its statistics over the batch, or by running ones."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from funcnet import runtime
from funcnet.batch_axis import BatchAxis
from funcnet.core import Forward, Key, Layer, Params, Pullback
from funcnet.errors import require
from funcnet.layers.batch_statistics import (
    all_backward,
    average,
    by_channel,
    normalize_by_all,
    other_dims,
)
from funcnet.layers.norm import (
    affine_names,
    channel_params,
    check_eps,
    norm_backward,
    norm_rule,
    norm_statistics,
)
from funcnet.lift import fastest, require_floating, stateful, with_kernel
from funcnet.params import Param, declare

aten = torch.ops.aten


def _batch_norm_kernel(
    dy: Tensor, wanted: Any, *, x: Tensor, mean: Tensor, rstd: Tensor, weight: Any = None
) -> Any:
    running = (None, None)
    return aten.native_batch_norm_backward(dy, x, weight, *running, mean, rstd, True, 0.0, wanted)


@with_kernel(_batch_norm_kernel)
def batch_norm_backward(
    dy: Tensor, wanted: Any, *, x: Tensor, mean: Tensor, rstd: Tensor, weight: Any = None
) -> Any:
    """`norm_backward` by channel."""
    weight, mean, rstd = (by_channel(leaf, x) for leaf in (weight, mean, rstd))
    return norm_backward(dy, x, weight, mean, rstd, other_dims(x), wanted)


def _alike(weight: Any, running: Tensor) -> bool:
    """Whether a kernel takes both: it wants one dtype."""
    return weight is None or weight.dtype == running.dtype


def _batch_norm_in_one(
    x: Tensor, weight: Any, bias: Any, running: Any, rate: Any, eps: float
) -> tuple[Tensor, Tensor, Tensor, Any]:
    plain = running is not None and x.is_cpu and not runtime.is_transformed()
    if not plain or not _alike(weight, running[0]):
        return batch_norm_forward(x, weight, bias, running, rate, eps)
    # The kernel writes to the running statistics. It wants the rate as a number: where that is
    # a tensor, it writes those of the batch alone.
    known = isinstance(rate, float)
    mean, var = [each.clone() if known else torch.zeros_like(each) for each in running]
    kernel_rate = rate if known else 1.0
    forward = torch.native_batch_norm(x, weight, bias, mean, var, True, kernel_rate, eps)
    return *forward, (mean, var) if known else average(running, (mean, var), rate)


@with_kernel(_batch_norm_in_one)
def batch_norm_forward(
    x: Tensor, weight: Any, bias: Any, running: Any, rate: Any, eps: float
) -> tuple[Tensor, Tensor, Tensor, Any]:
    """y, the batch's ``mean`` and ``rstd``, and the new running mean and variance, if any."""
    if runtime.is_forward_mode():
        # The operator's own derivative mixes devices on fake tensors where x alone moves.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, other_dims(x), correction=0)
        rstd = (var + eps).rsqrt()
        y = (wide - by_channel(mean, x)) * by_channel(rstd, x)
        y = y if weight is None else y * by_channel(weight, x)
        y = y if bias is None else y + by_channel(bias, x)
        return y.to(x.dtype), mean, rstd, running and running_statistics(x, running, rate)
    y, mean, rstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    mean, rstd = fastest(norm_statistics, x)(x, mean, rstd, other_dims(x), eps)
    return y, mean, rstd, running and running_statistics(x, running, rate)


def running_statistics(x: Tensor, running: Any, rate: Any) -> list[Tensor]:
    """The `average` of the running and the batch's mean and unbiased variance by channel."""
    var, mean = torch.var_mean(x.to(running[0].dtype), other_dims(x))
    return average(running, (mean, var), rate)


def normalize_by_batch(
    params: Params, x: Tensor, running: Any, rate: Any, eps: float
) -> tuple[Tensor, dict[str, Tensor], Any]:
    """y, the residuals of `batch_norm_backward`, and the new running mean and variance, if any."""
    weight, bias = params.get("weight"), params.get("bias")
    residuals = {"x": x} if weight is None else {"x": x, "weight": weight}
    if x.numel() == 0:  # the kernel divides by the number of values
        nothing = x.new_zeros(x.shape[1], dtype=(x if weight is None else weight).dtype)
        return x.clone(), {**residuals, "mean": nothing, "rstd": nothing}, running
    forward = fastest(batch_norm_forward, x, *running or ())
    y, mean, rstd, running = forward(x, weight, bias, running, rate, eps)
    return y, {**residuals, "mean": mean, "rstd": rstd}, running


def _running_norm_kernel(
    x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    if not _alike(weight, mean):
        return running_norm_forward(x, weight, bias, mean, var, eps)
    return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]


@with_kernel(_running_norm_kernel)
def running_norm_forward(
    x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """``y = (x - mean) / sqrt(var + eps) weight + bias`` by channel, with running statistics."""
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    return torch.addcmul(by_channel(shift, x), x, by_channel(scale, x)).to(x.dtype)


def _running_norm_backward_kernel(
    dy: Tensor, eps: float, wanted: Any, *, x: Tensor, mean: Tensor, var: Tensor, weight: Any = None
) -> Any:
    if not _alike(weight, mean):
        return running_norm_backward(dy, eps, wanted, x=x, mean=mean, var=var, weight=weight)
    # Statistics of the batch, which it does not read, must be there under vmap.
    batch = (mean, var)
    return aten.native_batch_norm_backward(dy, x, weight, mean, var, *batch, False, eps, wanted)


@with_kernel(_running_norm_backward_kernel)
def running_norm_backward(
    dy: Tensor, eps: float, wanted: Any, *, x: Tensor, mean: Tensor, var: Tensor, weight: Any = None
) -> Any:
    """``dx = dy weight rstd``, ``dweight = sum dy n``, ``dbias = sum dy``, those ``wanted``.

    ``rstd = 1 / sqrt(var + eps)`` and ``n = (x - mean) rstd``, with running statistics.
    """
    rstd, dims = (var + eps).rsqrt(), other_dims(x)
    dx = dweight = dbias = None
    if wanted[0]:
        scale = rstd if weight is None else rstd * weight
        dx = (dy * by_channel(scale, x)).to(x.dtype)
    if wanted[1]:
        n = (x - by_channel(mean, x)) * by_channel(rstd, x)
        dweight = (dy * n).sum(dims).to(weight.dtype)
    if wanted[2]:
        dbias = dy.sum(dims).to(weight.dtype)
    return dx, dweight, dbias


def normalize_by_running(
    params: Params, x: Tensor, state: Params, eps: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """y and the residuals of `running_norm_backward`."""
    weight, bias = params.get("weight"), params.get("bias")
    mean, var = state["running_mean"], state["running_var"]
    forward = fastest(running_norm_forward, x, mean, var, *params.values())
    residuals = {"x": x, "mean": mean, "var": var}
    if weight is not None:
        residuals["weight"] = weight
    return forward(x, weight, bias, mean, var, eps), residuals


def batch_norm(
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
    track_running_stats: bool = True,
    *,
    bias: bool = True,
    dtype: torch.dtype | None = None,
) -> Layer:
    """``y = (x - mean) / sqrt(var + eps) weight + bias`` by channel, dimension 1 of x.

    With ``train=True`` mean and (biased) variance are those of the batch, and the returned state
    has ``running = (1 - momentum) running + momentum batch``, where the batch's variance is the
    unbiased one. With ``train=False`` they are the running ones, if they are tracked.

    Args:
        eps: added to the variance; positive in training.
        momentum: None averages over all batches so far.
        affine: whether weight and bias are learned.
        track_running_stats: False always uses the batch's statistics and keeps no state.
        bias: False for a weight without a bias.
        dtype: of parameters and state; default that of x.

    The number of channels is found by init; there is no argument for it.

    Inputs:
        x of shape ``(batch, channels, *)``, floating, any rank from 2.
    Learned params:
        ``weight`` (ones) and ``bias`` (zeros), each (channels,).
    State:
        ``running_mean`` (zeros) and ``running_var`` (ones), each (channels,), and
        ``num_batches_tracked``, an int64 scalar.
    VJP:
        in training, with ``n`` the normalized x, ``g = dy weight`` and means over a channel,
        ``dx = (g - mean g - n mean(g n)) / sqrt(var + eps)``; ``dweight = sum dy n``,
        ``dbias = sum dy``. Else ``dx = g / sqrt(running_var + eps)``.
    Raises:
        ValueError: one value a channel in training.

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
    check_eps("batch_norm", eps)
    names = affine_names(affine, bias)

    @declare
    def init(x: Tensor) -> dict[str, Param]:
        require_floating(x)
        require(x.dim() >= 2, f"expects (batch, channels, *), got {tuple(x.shape)}")
        return channel_params(x, 1, names, dtype, track_running_stats)

    def by_batch(params: Params, x: Tensor, state: Any, axis: Any) -> tuple[Tensor, Any]:
        # Other ranks have values too.
        several, got = axis or x.numel() != x.shape[1] or x.numel() == 0, tuple(x.shape)
        what = "batch_norm: needs more than one value per channel when train=True"
        require(several, f"{what}, got {got}")
        require(eps > 0, "batch_norm: eps must be positive when train=True, got 0")
        normalize = partial(normalize_by_all, axis=axis) if axis else normalize_by_batch
        if not track_running_stats:
            return normalize(params, x, None, 0.0, eps)[:2]
        running, rate = (state["running_mean"], state["running_var"]), momentum
        state["num_batches_tracked"] = state["num_batches_tracked"] + 1
        if momentum is None:
            # Half precision cannot count far.
            exact = torch.promote_types(running[0].dtype, torch.float32)
            rate = state["num_batches_tracked"].to(exact).reciprocal()
        y, residuals, running = normalize(params, x, running, rate, eps)
        state["running_mean"], state["running_var"] = running
        return y, residuals

    def forward(
        params: Params,
        x: Tensor,
        state: Params,
        key: Key,
        train: bool,
        axis: BatchAxis | None = None,
    ) -> Forward:
        rule: tuple[Any, ...]
        if train or not track_running_stats:
            y, residuals = by_batch(params, x, state, axis)
            rule = (all_backward, (axis,), names) if axis else (batch_norm_backward, (), names)
        else:
            y, residuals = normalize_by_running(params, x, state, eps)
            rule = (running_norm_backward, (eps,), names)
        return y, Pullback(norm_rule, residuals, rule), state

    return stateful(init, forward, mixes_examples=True, takes_axis=True)
