"""The fully connected layer."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet.core import Grads, Layer, Params, Pullback
from funcnet.deferred import for_dx
from funcnet.errors import require
from funcnet.initializers import Initializer
from funcnet.layers.arguments import zero_cotangent
from funcnet.lift import require_floating, stateless
from funcnet.params import Param, declare, weight_and_bias
from funcnet.tree import describe


@for_dx("weight")
def linear_rule(
    residuals: dict[str, Tensor], dy: Tensor, bias: bool, *, params: bool, x: bool
) -> Grads:
    """``dweight = dy^T x``, ``dbias = sum dy``, ``dx = dy weight``."""
    weight, rows, dparams, dx = residuals["weight"], dy, None, None
    if dy.dim() != 2:
        rows = dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1])
    if params:
        columns = residuals["x"].reshape(len(rows), weight.shape[-1])
        dparams = {"weight": rows.t().mm(columns)}
        if bias:
            dparams["bias"] = rows.sum(0)
    if x:
        # Of matrices: matmul takes other tensors apart into small products, unless they are dense.
        dx = rows.mm(weight)
        if dy.dim() != 2:
            dx = dx.view(*dy.shape[:-1], weight.shape[-1])
    return dparams, dx


@for_dx("weight")
def linear_like_rule(
    residuals: dict[str, Tensor], dy: Tensor, other: Any, bias: bool, *, params: bool, x: bool
) -> Grads:
    """That of `linear`; of the tensor of which the size alone was read the cotangent is zero."""
    dparams, dx = linear_rule(residuals, dy, bias, params=params, x=x)
    return dparams, (dx, zero_cotangent(*other)) if x else None


def linear(
    out_features: int | None,
    bias: bool = True,
    *,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """``y = x weight^T + bias``.

    Args:
        out_features: the size of the last dimension of y. None for that of another tensor: x is
            then a tuple (x, other), of which the other one gives its size alone.
        bias: whether a bias is learned.
        weight_init: default U(-b, b) with ``b = 1 / sqrt(in_features)``, as torch.nn.Linear.
        bias_init: default the same U(-b, b).
        dtype: of the parameters; default that of x.

    Inputs:
        x of shape ``(*, in_features)``, floating.
    Returns:
        y of shape ``(*, out_features)``.
    Learned params:
        ``weight`` (out_features, in_features), ``bias`` (out_features,).
    VJP:
        ``dweight = sum_* dy x^T``, ``dbias = sum_* dy``, ``dx = dy weight``.
    Raises:
        ValueError: another number of features.
        TypeError: another dtype.

    Source: ``torch.nn.Linear``.

    >>> import funcnet as fn
    >>> layer = fn.linear(3, weight_init=fn.initializers.ones(), bias_init=fn.initializers.zeros())
    >>> params, _ = layer.init(fn.key(0), torch.ones(5, 2))
    >>> y, pullback, _ = layer.vjp(params, torch.ones(1, 2))
    >>> y
    tensor([[2., 2., 2.]])
    >>> pullback(torch.ones(1, 3), params=False)
    (None, tensor([[3., 3.]]))
    """
    hint = "the size of the input is found by init, give that of the output alone"
    wrong = f"linear: bias must be True or False, got {bias!r}; {hint}"
    require(isinstance(bias, bool), wrong, TypeError)
    enough = out_features is None or (isinstance(out_features, int) and out_features >= 0)
    require(enough, f"linear: out_features must be >= 0, got {out_features}")

    size = None if out_features is None else lambda features: out_features
    return linear_to(size, bias, weight_init, bias_init, dtype)


def linear_to(
    out_features: Callable[[int], int] | None,
    bias: bool,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """`linear`, where the size of the output is a function of that of the input."""

    @declare
    def init(x: Any) -> dict[str, Param]:
        other = x
        if out_features is None:
            pair = isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], Tensor)
            require(pair, f"expects a tuple (x, other) of tensors, got {describe(x)}", TypeError)
            x, other = x
            require(other.dim() > 0, "expects at least one dimension of other, got ()")
        require_floating(x)
        require(x.dim() > 0, "expects at least one dimension, got ()")
        features = (1, "{} features in the last dimension")
        size = other.shape[-1] if out_features is None else out_features(x.shape[-1])
        shape = (size, x.shape[-1])
        return weight_and_bias(shape, features, bias, weight_init, bias_init, dtype)

    def apply(params: Params, x: Any) -> Tensor:
        x = x[0] if out_features is None else x
        return F.linear(x, params["weight"], params.get("bias"))

    def vjp(params: Params, x: Any) -> tuple[Tensor, Pullback]:
        y = apply(params, x)
        if out_features is None:
            x, other = x
            residuals = {"x": x, "weight": params["weight"]}
            told = tuple(other.shape), other.dtype, other.device
            return y, Pullback(linear_like_rule, residuals, (told, bias))
        return y, Pullback(linear_rule, {"x": x, "weight": params["weight"]}, (bias,))

    return stateless(init, apply, vjp, name="linear")
