"""The fully connected layer."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import initializers
from funcnet.core import Layer, Params, Pullback, check_floating, check_params, stateless
from funcnet.initializers import Initializer
from funcnet.random import fold_in


def linear_rule(
    residuals: dict[str, Tensor], dy: Tensor, bias: bool, *, params: bool, x: bool
) -> tuple[Params | None, Tensor | None]:
    """``dweight = dy^T x``, ``dbias = sum dy``, ``dx = dy weight``."""
    inputs, weight = residuals["x"], residuals["weight"]
    dparams = None
    if params:
        rows, columns = dy, inputs
        if dy.dim() != 2:
            n = math.prod(dy.shape[:-1])
            rows, columns = dy.reshape(n, dy.shape[-1]), inputs.reshape(n, inputs.shape[-1])
        dparams = {"weight": rows.t().mm(columns)}
        if bias:
            dparams["bias"] = rows.sum(0)
    return dparams, dy.matmul(weight) if x else None


def _misfit(params: Params, x: Tensor, names: tuple[str, ...], size: int) -> Exception:
    """What is wrong with arguments that do not fit."""
    check_floating("linear", x)
    check_params("linear", params, names)
    for name, expected in (("weight", 2), ("bias", 1)):
        if name in params and params[name].dtype != x.dtype:
            return TypeError(f"linear: {name} is {params[name].dtype}, x is {x.dtype}")
        if name in params and (params[name].dim(), *params[name].shape[:1]) != (expected, size):
            return ValueError(
                f"linear: expects {name} for {size} features of y, "
                f"got shape {tuple(params[name].shape)}"
            )
    return ValueError(
        f"linear: weight expects {params['weight'].shape[1]} features in the last dimension, "
        f"got {tuple(x.shape)}"
    )


def linear(
    out_features: int,
    bias: bool = True,
    *,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """``y = x weight^T + bias``.

    Args:
        out_features: the size of the last dimension of y.
        bias: whether a bias is learned.
        weight_init: default U(-b, b) with ``b = 1 / sqrt(in_features)``, as torch.nn.Linear.
        bias_init: default the same U(-b, b).
        dtype: of the parameters; default that of x.

    Inputs: x of shape (*, in_features), floating.
    Returns: y of shape (*, out_features).
    Params: ``weight`` (out_features, in_features), ``bias`` (out_features,).
    VJP: ``dweight = sum_* dy x^T``, ``dbias = sum_* dy``, ``dx = dy weight``.
    Raises: ValueError for another number of features, TypeError for another dtype.
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
    if out_features < 0:
        raise ValueError(f"linear: out_features must be >= 0, got {out_features}")
    names = ("weight", "bias") if bias else ("weight",)

    def init(key: Tensor, x: Tensor) -> Params:
        check_floating("linear", x)
        if x.dim() == 0:
            raise ValueError("linear: expects at least one dimension, got ()")
        in_features = x.shape[-1]
        kind = (dtype or x.dtype, x.device)
        bound = in_features**-0.5 if in_features else 0.0
        default = initializers.uniform(-bound, bound)
        params = {
            "weight": (weight_init or default)(
                fold_in(key, "weight"), (out_features, in_features), *kind
            )
        }
        if bias:
            params["bias"] = (bias_init or default)(fold_in(key, "bias"), (out_features,), *kind)
        return params

    def apply(params: Params, x: Tensor) -> Tensor:
        try:
            weight = params["weight"]
            offset = params["bias"] if bias else None
            fits = (
                len(params) == len(names)
                and x.dtype is weight.dtype
                and weight.shape == (out_features, x.shape[-1])
                and (offset is None or offset.shape == (out_features,))
            )
        except (KeyError, AttributeError, IndexError, TypeError):
            fits = False
        if not fits or (offset is not None and offset.dtype is not x.dtype):
            raise _misfit(params, x, names, out_features)
        return F.linear(x, weight, offset)

    def vjp(params: Params, x: Tensor) -> tuple[Tensor, Pullback]:
        y = apply(params, x)
        residuals = {"x": x, "weight": params["weight"]}
        return y, Pullback(linear_rule, residuals, (bias,), y)

    return stateless(init, apply, vjp)
