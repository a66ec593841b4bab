"""Normalization. The gradients are PyTorch's fused kernels; the tests hold them to the formula."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcnet import runtime
from funcnet.core import (
    EMPTY,
    Anatomy,
    Layer,
    Params,
    Pullback,
    check_floating,
    check_params,
    stateless,
    with_anatomy,
)

aten = torch.ops.aten


def check_kinds(name: str, tensors: Params, x: Tensor) -> None:
    """Raise TypeError unless all are of x's dtype, or of float32 beside an x of half precision."""
    dtypes = {leaf.dtype for leaf in tensors.values() if leaf.is_floating_point()}
    half = x.dtype in (torch.float16, torch.bfloat16)
    if dtypes <= {x.dtype} or (half and dtypes == {torch.float32}):
        return
    found = ", ".join(f"{entry} is {leaf.dtype}" for entry, leaf in tensors.items())
    raise TypeError(f"{name}: {found}, x is {x.dtype}")


def layer_norm_rule(
    residuals: dict[str, Tensor],
    dy: Tensor,
    normalized_shape: tuple[int, ...],
    names: tuple[str, ...],
    *,
    params: bool,
    x: bool,
) -> tuple[Params | None, Tensor | None]:
    """``dx = rstd (g - mean g - n mean(g n))`` with ``n = (x - mean) rstd``, ``g = dy weight``."""
    inputs = residuals["x"]
    wanted = [x, params and "weight" in names, params and "bias" in names]
    dx, dweight, dbias = aten.native_layer_norm_backward(
        dy,
        inputs,
        normalized_shape,
        residuals["mean"],
        residuals["rstd"],
        residuals.get("weight"),
        residuals.get("bias"),
        wanted,
    )
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

    def shape_of(x: Tensor) -> tuple[int, ...]:
        check_floating("layer_norm", x)
        shape = tuple(x.shape[-1:]) if fixed is None else fixed
        if not shape or tuple(x.shape[-len(shape) :]) != shape:
            raise ValueError(
                f"layer_norm: expects last dimensions {shape or '(n,)'}, got {tuple(x.shape)}"
            )
        return shape

    def init(key: Tensor, x: Tensor) -> Params:
        kind: Any = {"dtype": dtype or x.dtype, "device": x.device}
        shape = shape_of(x)
        start = {"weight": torch.ones, "bias": torch.zeros}
        return {name: start[name](shape, **kind) for name in names}

    def normalize(params: Params, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = shape_of(x)
        check_params("layer_norm", params, names)
        for name in names:
            if params[name].shape != shape:
                raise ValueError(
                    f"layer_norm: {name} expects last dimensions {tuple(params[name].shape)}, "
                    f"got {tuple(x.shape)}"
                )
        check_kinds("layer_norm", params, x)
        return torch.native_layer_norm(x, shape, params.get("weight"), params.get("bias"), eps)

    def apply(params: Params, x: Tensor) -> Tensor:
        return normalize(params, x)[0]

    def vjp(params: Params, x: Tensor) -> tuple[Tensor, Pullback]:
        y, mean, rstd = normalize(params, x)
        residuals = {"x": x, "mean": mean, "rstd": rstd, **{name: params[name] for name in names}}
        return y, Pullback(layer_norm_rule, residuals, (shape_of(x), names))

    return stateless(init, apply, vjp)


def batch_norm_rule(
    residuals: dict[str, Tensor],
    dy: Tensor,
    by_batch: bool,
    eps: float,
    affine: bool,
    *,
    params: bool,
    x: bool,
) -> tuple[Params | None, Tensor | None]:
    """By the batch's statistics layer_norm's formula by channel; else ``dx = dy weight rstd``."""
    inputs, mean, spread = residuals["x"], residuals["mean"], residuals["spread"]
    if inputs.numel() == 0:
        zeros = {name: torch.zeros_like(mean) for name in ("weight", "bias") if affine}
        return zeros if params else None, dy if x else None
    # Without by_batch the kernel reads the running statistics alone, but vmap's rule for it wants
    # the saved ones to be there.
    running = (None, None) if by_batch else (mean, spread)
    dx, dweight, dbias = aten.native_batch_norm_backward(
        dy,
        inputs,
        residuals.get("weight"),
        *running,
        mean,
        spread,
        by_batch,
        eps,
        [x, params and affine, params and affine],
    )
    dparams = ({"weight": dweight, "bias": dbias} if affine else {}) if params else None
    return dparams, dx if x else None


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
    names = ("weight", "bias") if affine else ()
    state_names = (
        ("running_mean", "running_var", "num_batches_tracked") if track_running_stats else ()
    )

    def check(params: Params, x: Tensor, state: Params, by_batch: bool) -> None:
        check_shape(x)
        check_params("batch_norm", params, names)
        if set(state) != set(state_names):
            raise ValueError(f"batch_norm: expects state {list(state_names)}, got {sorted(state)}")
        for name, value in {**params, **state}.items():
            if name != "num_batches_tracked" and value.shape != x.shape[1:2]:
                raise ValueError(
                    f"batch_norm: {name} expects {value.shape[0]} channels in dimension 1, "
                    f"got {tuple(x.shape)}"
                )
        check_kinds("batch_norm", {**params, **state}, x)
        if by_batch and x.numel() == x.shape[1] > 0:
            raise ValueError(
                f"batch_norm: needs more than one value per channel when train=True, "
                f"got {tuple(x.shape)}"
            )

    def check_shape(x: Tensor) -> None:
        check_floating("batch_norm", x)
        if x.dim() < 2:
            raise ValueError(f"batch_norm: expects (batch, channels, *), got {tuple(x.shape)}")

    def init(key: Tensor, x: Tensor) -> tuple[Params, Params]:
        check_shape(x)
        kind: Any = {"dtype": dtype or x.dtype, "device": x.device}
        channels = x.shape[1]
        params, state = {}, {}
        if affine:
            params = {"weight": torch.ones(channels, **kind), "bias": torch.zeros(channels, **kind)}
        if track_running_stats:
            state = {
                "running_mean": torch.zeros(channels, **kind),
                "running_var": torch.ones(channels, **kind),
                "num_batches_tracked": torch.zeros((), dtype=torch.int64, device=x.device),
            }
        return params, state

    def normalize(
        params: Params, x: Tensor, state: Params, train: bool
    ) -> tuple[Tensor, Tensor, Tensor, bool, Params]:
        """y, mean, the spread that the rule needs with it, whether by batch, and the new state."""
        by_batch = train or not track_running_stats
        check(params, x, state, by_batch)
        state = {**state}
        weight, bias = params.get("weight"), params.get("bias")
        if x.numel() == 0:  # the kernel divides by the number of values
            zeros = params["weight"] if affine else x.new_zeros(x.shape[1])
            if by_batch and track_running_stats:
                seen = state["num_batches_tracked"] + 1
                state = {**state, "num_batches_tracked": seen}
            return x.clone(), zeros, zeros, by_batch, state
        if not by_batch:
            mean, spread = state["running_mean"], state["running_var"]
            if runtime.is_transformed(mean, spread):
                y = by_formula(x, weight, bias, mean, spread)
            else:
                y = torch.native_batch_norm(x, weight, bias, mean, spread, False, 0.0, eps)[0]
            return y, mean, spread, False, state
        y, mean, spread = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        if track_running_stats:
            state = updated(state, x)
        return y, mean, spread, True, state

    def by_formula(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor
    ) -> Tensor:
        """For where the running statistics are differentiated, which the kernel does not do."""

        def channels(leaf: Tensor) -> Tensor:
            return leaf.reshape(-1, *[1] * (x.dim() - 2))

        y = (x - channels(mean)) * channels((var + eps).rsqrt())
        if weight is not None and bias is not None:
            y = y * channels(weight) + channels(bias)
        return y.to(x.dtype)

    def updated(state: Params, x: Tensor) -> Params:
        seen = state["num_batches_tracked"] + 1
        running_mean, running_var = state["running_mean"], state["running_var"]
        # The kernel's own statistics are the spread's inverse, and have no derivative.
        dims = [dim for dim in range(x.dim()) if dim != 1]
        var, mean = torch.var_mean(x.to(running_mean.dtype), dims)
        # Half precision cannot count far.
        exact = torch.promote_types(running_mean.dtype, torch.float32)
        rate = momentum if momentum is not None else seen.to(exact).reciprocal()
        return {
            "running_mean": ((1 - rate) * running_mean + rate * mean).to(running_mean.dtype),
            "running_var": ((1 - rate) * running_var + rate * var).to(running_var.dtype),
            "num_batches_tracked": seen,
        }

    def apply(
        params: Params,
        x: Tensor,
        state: Params = EMPTY,
        *,
        key: Tensor | None = None,
        train: bool = False,
    ) -> tuple[Tensor, Params]:
        y, _, _, _, state = normalize(params, x, state, train)
        return y, state

    def vjp(
        params: Params,
        x: Tensor,
        state: Params = EMPTY,
        *,
        key: Tensor | None = None,
        train: bool = True,
    ) -> tuple[Tensor, Pullback, Params]:
        y, mean, spread, by_batch, state = normalize(params, x, state, train)
        residuals = {"x": x, "mean": mean, "spread": spread}
        if affine:
            residuals["weight"] = params["weight"]
        return y, Pullback(batch_norm_rule, residuals, (by_batch, eps, affine), y), state

    return with_anatomy(Layer(init, apply, vjp), Anatomy("batch_norm", takes_key=False))
