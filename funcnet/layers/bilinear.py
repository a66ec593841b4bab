"""The bilinear layer: linear in each of two inputs."""

from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import Grads, Layer, Params, Pullback
from funcnet.deferred import for_dx
from funcnet.errors import require
from funcnet.initializers import Initializer, torch_default
from funcnet.layers.tuples import floating_pair
from funcnet.lift import stateless
from funcnet.params import Param, declare


@for_dx("weight")
def bilinear_rule(
    residuals: dict[str, Any], dy: Tensor, bias: bool, *, params: bool, x: bool
) -> Grads:
    """``dweight_oij = sum dy_o x1_i x2_j``, ``dx1_i = sum dy_o weight_oij x2_j``, dx2 likewise."""
    weight, (x1, x2) = residuals["weight"], residuals["x"]
    dy, rows1, rows2 = (part.reshape(-1, part.shape[-1]) for part in (dy, x1, x2))
    dparams, dx = None, None
    if params or x:
        outer = torch.einsum("no,ni->noi", dy, rows1)
    if params:
        dparams = {"weight": torch.einsum("noi,nj->oij", outer, rows2)}
        if bias:
            dparams["bias"] = dy.sum(0)
    if x:
        dx1 = torch.einsum("noj,oij->ni", torch.einsum("no,nj->noj", dy, rows2), weight)
        dx2 = torch.einsum("noi,oij->nj", outer, weight)
        dx = dx1.reshape(x1.shape), dx2.reshape(x2.shape)
    return dparams, dx


def bilinear(
    out_features: int,
    bias: bool = True,
    *,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """``y_o = x1^T weight_o x2 + bias_o``.

    Args:
        out_features: the size of the last dimension of y.
        bias: whether a bias is learned.
        weight_init: default U(-b, b) with ``b = 1 / sqrt(in1_features)``, as torch.nn.Bilinear.
        bias_init: default the same U(-b, b).
        dtype: of the parameters; default that of x.

    Inputs:
        x = (x1, x2) of shapes ``(*, in1_features)`` and ``(*, in2_features)``, floating.
    Returns:
        y of shape ``(*, out_features)``.
    Learned params:
        ``weight`` (out_features, in1_features, in2_features), ``bias`` (out_features,).
    VJP:
        ``dweight_o = sum_* dy_o x1 x2^T``, ``dbias = sum_* dy``, ``dx1 = sum_o dy_o weight_o x2``,
        ``dx2 = sum_o dy_o weight_o^T x1``.
    Raises:
        ValueError: other shapes.
        TypeError: other dtypes.

    Source: ``torch.nn.Bilinear``.

    >>> import funcnet as fn
    >>> layer = fn.bilinear(1, bias=False, weight_init=fn.initializers.ones())
    >>> x = (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    >>> params, _ = layer.init(fn.key(0), x)
    >>> y, pullback, _ = layer.vjp(params, x)
    >>> y, pullback(torch.ones(1))
    (tensor([21.]), ({'weight': tensor([[[3., 4.],
             [6., 8.]]])}, (tensor([7., 7.]), tensor([3., 3.]))))
    """
    hint = "the sizes of the inputs are found by init, give that of the output alone"
    wrong = f"bilinear: bias must be True or False, got {bias!r}; {hint}"
    require(isinstance(bias, bool), wrong, TypeError)
    enough = isinstance(out_features, int) and out_features > 0
    require(enough, f"bilinear: out_features must be > 0, got {out_features}")

    @declare
    def init(x: Any) -> dict[str, Param]:
        x1, x2 = floating_pair(x)
        rows = x1.dim() > 0 and x2.dim() > 0 and x1.shape[:-1] == x2.shape[:-1]
        what = "expects x1 and x2 of the same shape but for the last dimension"
        require(rows, f"{what}, got {tuple(x1.shape)} and {tuple(x2.shape)}")
        in1, in2 = x1.shape[-1], x2.shape[-1]
        require(in1 > 0 and in2 > 0, f"expects features in both, got {tree.describe(x)}")
        default = torch_default(in1)
        shape = (out_features, in1, in2)
        declared = {"weight": Param(shape, weight_init or default, dtype)}
        if bias:
            declared["bias"] = Param(shape[:1], bias_init or default, dtype)
        return declared

    def apply(params: Params, x: Any) -> Tensor:
        x1, x2 = x
        by_x1 = torch.einsum("...i,oij->...oj", x1, params["weight"])
        y = torch.einsum("...oj,...j->...o", by_x1, x2)
        return y + params["bias"] if bias else y

    def vjp(params: Params, x: Any) -> tuple[Tensor, Pullback]:
        residuals = {"x": x, "weight": params["weight"]}
        return apply(params, x), Pullback(bilinear_rule, residuals, (bias,))

    return stateless(init, apply, vjp)
