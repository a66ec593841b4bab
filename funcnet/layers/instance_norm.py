"""Normalization of each channel of each example, or of each channel by running statistics."""

import math
from typing import Any

import torch
from torch import Tensor

from funcnet.batch_axis import BatchAxis
from funcnet.core import Forward, Grads, Key, Layer, Params, Pullback
from funcnet.deferred import for_dx
from funcnet.errors import require
from funcnet.layers.batch_norm import (
    batch_norm_backward,
    normalize_by_batch,
    normalize_by_running,
    running_norm_backward,
)
from funcnet.layers.batch_statistics import means_over_examples
from funcnet.layers.norm import affine_names, channel_params, check_eps, norm_rule
from funcnet.layers.spatial import NAMES, spatial
from funcnet.lift import require_floating, stateful
from funcnet.params import Param, declare


@for_dx("weight", "bias")
def instance_norm_rule(
    residuals: Any,
    dy: Tensor,
    shape: tuple[int, int],
    backward: Any,
    static: tuple[Any, ...],
    names: tuple[str, ...],
    *,
    params: bool,
    x: bool,
) -> Grads:
    """`norm_rule` for x in the shape in which it was normalized, and parameters for each example.

    ``shape`` is that of all their gradients, (examples, channels), which are summed.
    """
    view = dy.reshape(residuals["x"].shape)
    dparams, dx = norm_rule(residuals, view, backward, static, names, params=params, x=x)
    if dparams:
        dparams = {name: grad.reshape(shape).sum(0) for name, grad in dparams.items()}
    return dparams, dx.reshape(dy.shape) if x else None


def instance_norm(
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = False,
    track_running_stats: bool = False,
    *,
    bias: bool = True,
    dtype: torch.dtype | None = None,
) -> Layer:
    """``y = (x - mean) / sqrt(var + eps) weight + bias`` by channel of each example.

    Mean and (biased) variance are those of the example's channel. With ``track_running_stats``
    the state that is returned with ``train=True`` has
    ``running = (1 - momentum) running + momentum batch``, where the batch's statistics are means
    over its examples, of the unbiased variance; with ``train=False`` x is normalized by those.

    Args:
        eps: added to the variance.
        momentum: None leaves the running statistics as they are.
        affine: whether a weight and a bias are learned for each channel.
        track_running_stats: whether running statistics are kept, and used with ``train=False``.
        bias: False for a weight without a bias.
        dtype: of parameters and state; default that of x.

    The number of channels is found by init; there is no argument for it.

    Inputs:
        x of shape ``(batch, channels, *)``, floating, any rank from 3. An input without a batch is
        taken by `instance_norm1d`, `instance_norm2d` and `instance_norm3d`, which know its rank.
    Learned params:
        ``weight`` (ones) and ``bias`` (zeros), each (channels,).
    State:
        ``running_mean`` (zeros) and ``running_var`` (ones), each (channels,), and
        ``num_batches_tracked``, an int64 scalar, which stays 0 as in torch.
    VJP:
        with ``n`` the normalized x, ``g = dy weight`` and means over a channel of an example,
        ``dx = (g - mean g - n mean(g n)) / sqrt(var + eps)``; ``dweight = sum dy n``,
        ``dbias = sum dy``. With running statistics ``dx = g / sqrt(running_var + eps)``.
    Raises:
        ValueError: one value a channel, unless running statistics are used.

    Source: ``torch.nn.InstanceNorm1d`` to ``3d``; Ulyanov, Vedaldi and Lempitsky 2016.

    >>> import funcnet as fn
    >>> fn.instance_norm().apply({}, torch.tensor([[[1.0, 3.0], [4.0, 4.0]]]))[0]
    tensor([[[-1.0000,  1.0000],
             [ 0.0000,  0.0000]]])
    """
    options = (eps, momentum, affine, track_running_stats, bias, dtype)
    return _of_rank("instance_norm", None, *options)


def _of_rank(
    name: str,
    rank: int | None,
    eps: float,
    momentum: float | None,
    affine: bool,
    track_running_stats: bool,
    bias: bool,
    dtype: torch.dtype | None,
) -> Layer:
    """`instance_norm` of x with ``rank`` dimensions after the channels, with a batch or without."""
    check_eps(name, eps)
    names, rate = affine_names(affine, bias), 0.0 if momentum is None else momentum
    if rank is None:
        expected = "(batch, channels, *) of at least 3 dimensions"
    else:
        expected = f"(batch, channels, {NAMES[rank]}) or (channels, {NAMES[rank]})"

    @declare
    def init(x: Tensor) -> dict[str, Param]:
        require_floating(x)
        fits = x.dim() >= 3 if rank is None else x.dim() in (rank + 1, rank + 2)
        require(fits, f"expects {expected}, got {tuple(x.shape)}")
        return channel_params(x, int(x.dim() - 1 != rank), names, dtype, track_running_stats)

    def by_instance(
        params: Params, x: Tensor, shape: tuple[int, int], state: Any, axis: BatchAxis | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Each channel of each example is a channel of one example to `normalize_by_batch`."""
        examples, values = shape[0], x.shape[2:]
        what = f"{name}: needs more than one value per channel of an example"
        require(math.prod(values) != 1, f"{what}, got {tuple(x.shape)}")
        x = x.reshape(1, math.prod(shape), *values)
        params = {each: leaf.repeat(examples) for each, leaf in params.items()}
        running = None
        if track_running_stats and (x.numel() or axis):
            running = [state[each].repeat(examples) for each in ("running_mean", "running_var")]
        y, residuals, running = normalize_by_batch(params, x, running, rate, eps)
        if running is not None:
            mean, var = means_over_examples([each.reshape(shape) for each in running], axis)
            state.update(running_mean=mean, running_var=var)
        return y, residuals

    def forward(
        params: Params,
        x: Tensor,
        state: Params,
        key: Key,
        train: bool,
        axis: BatchAxis | None = None,
    ) -> Forward:
        batch = x if x.dim() - 1 != rank else x.unsqueeze(0)
        what = f"{name}: expects a part of a batch, got one example"
        require(axis is None or batch is x, f"{what}, {tuple(x.shape)}")
        rule: tuple[Any, ...]
        if train or not track_running_stats:
            shape = (batch.shape[0], batch.shape[1])
            y, residuals = by_instance(params, batch, shape, state, axis)
            rule = (shape, batch_norm_backward, (), names)
        else:
            y, residuals = normalize_by_running(params, batch, state, eps)
            rule = ((1, batch.shape[1]), running_norm_backward, (eps,), names)
        return y.reshape(x.shape), Pullback(instance_norm_rule, residuals, rule), state

    return stateful(init, forward, name=name, takes_axis=track_running_stats)


def _instance_norm(
    dims: int,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = False,
    track_running_stats: bool = False,
    *,
    bias: bool = True,
    dtype: torch.dtype | None = None,
) -> Layer:
    """`instance_norm` of x of shape (batch, channels, height, width) or without a batch.

    Args:
        eps, momentum, affine, track_running_stats, bias, dtype: as in `instance_norm`.

    Source: ``torch.nn.InstanceNorm2d``.

    >>> fn.instance_norm2d().apply({}, torch.tensor([[[1.0, 3.0], [1.0, 3.0]]]))[0]
    tensor([[[-1.0000,  1.0000],
             [-1.0000,  1.0000]]])
    """
    options = (eps, momentum, affine, track_running_stats, bias, dtype)
    return _of_rank(f"instance_norm{dims}d", dims, *options)


instance_norm1d, instance_norm2d, instance_norm3d = (
    spatial(_instance_norm, dims) for dims in (1, 2, 3)
)
