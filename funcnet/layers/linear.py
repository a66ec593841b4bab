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


def _check(params: Params, x: Tensor, names: tuple[str, ...], out_features: int) -> None:
    """Raise what is wrong with arguments that do not fit."""
    check_floating("linear", x)
    check_params("linear", params, names)
    for name in names:
        leaf = params[name]
        if leaf.dtype != x.dtype:
            raise TypeError(f"linear: {name} is {leaf.dtype}, x is {x.dtype}")
        if leaf.shape[:1] != (out_features,) or leaf.dim() != 1 + (name == "weight"):
            raise ValueError(
                f"linear: expects a {name} for {out_features} features of y, "
                f"got shape {tuple(leaf.shape)}"
            )
    if x.shape[-1:] != params["weight"].shape[1:]:
        raise ValueError(
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
    if not isinstance(bias, bool):
        raise TypeError(
            f"linear: bias must be True or False, got {bias!r}; "
            "the size of the input is found by init, give that of the output alone"
        )
    if not isinstance(out_features, int) or out_features < 0:
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
        # A small net feels each microsecond: torch checks what it can, and only what it would
        # let pass is checked before.
        try:
            weight = params["weight"]
            offset = params["bias"] if bias else None
            if (
                len(params) == len(names)
                and weight.dim() == 2
                and weight.shape[0] == out_features
                and x.is_floating_point()
                and (offset is None or (offset.dim() == 1 and offset.numel() == out_features))
            ):
                return F.linear(x, weight, offset)
        except Exception:
            _check(params, x, names, out_features)
            raise
        _check(params, x, names, out_features)
        return F.linear(x, weight, offset)

    def vjp(params: Params, x: Tensor) -> tuple[Tensor, Pullback]:
        y = apply(params, x)
        return y, Pullback(linear_rule, {"x": x, "weight": params["weight"]}, (bias,))

    return stateless(init, apply, vjp)
