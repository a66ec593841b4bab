"""Linear layers whose weights are parted over ranks: by rows, which are outputs, or by columns."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet.collectives import Split
from funcnet.core import Forward, Grads, Key, Layer, Params, Pullback
from funcnet.deferred import for_dx
from funcnet.distributed.processes.start import Mesh
from funcnet.distributed.tensor_parallel.parting import (
    Region,
    axis_for,
    parted,
    without_padding,
)
from funcnet.errors import check_count, require
from funcnet.initializers import Initializer
from funcnet.layers.arguments import zero_cotangent
from funcnet.layers.linear import linear_rule
from funcnet.lift import require_floating, stateful
from funcnet.params import Param, declare, weight_and_bias
from funcnet.tree import describe

_FEATURES = (1, "{} features in the last dimension")


@for_dx("weight")
def column_rule(
    residuals: dict[str, Tensor],
    dy: Tensor,
    weight: Split,
    bias: bool,
    gather: bool,
    region: Region,
    *,
    params: bool,
    x: bool,
) -> Grads:
    """``dweight = dy^T x``, ``dbias = sum dy``, of own rows; ``dx = sum over ranks dy weight``."""
    if gather:
        dy = Split(weight.axis, tuple(dy.shape), dy.dim() - 1).part(dy)
    if params:
        residuals["x"] = region.enter(residuals["x"])
    dparams, dx = linear_rule(residuals, dy, bias, params=params, x=x)
    if dparams is not None:
        dparams = {name: without_padding(weight, each) for name, each in dparams.items()}
    return dparams, region.enter_backward(dx) if dx is not None else None


def column_linear(
    out_features: int,
    mesh: Mesh,
    bias: bool = True,
    gather: bool = False,
    *,
    axis: str = "model",
    sequence: int | None = None,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """`funcnet.linear`, each rank with some of the output: ``y_r = x weight_r^T + bias_r``.

    Its weight, transposed as in the formula, is parted by columns. What follows, up to a
    `row_linear` or a `vocabulary_cross_entropy`, sees this rank's features only. It may be

    - a function of each number alone, without params and without draws, such as `funcnet.relu`;
    - `parted_dropout`, for dropout;
    - inside `own_tokens`, which sums gradients over ranks, a layer of each number alone whose
      params are for all features alike, such as `funcnet.prelu` with one slope.

    Nothing detects another layer: `funcnet.softmax` and norms would be of the rank's features,
    params would become different ones on each rank, and `funcnet.dropout` would draw the same mask
    for different features. With ``gather`` any layer may follow.

    Args:
        out_features: the features of all ranks. Where ranks do not divide them, the last ones have
            zeros in place of the missing features, whose params stay zero.
        mesh: the ranks; see `mesh` and `axis_of`.
        bias: whether a bias is learned.
        gather: whether y has the features of all ranks, as metrics, such as
            `funcnet.metrics.accuracy`, and all losses but `vocabulary_cross_entropy` need it.
        axis: the axis of the mesh over which the weight is parted.
        sequence: the dimension of x along which each rank has some of the tokens; y has all of
            them. Default: each rank has the whole x.
        weight_init, bias_init, dtype: those of `funcnet.linear`.

    Inputs:
        x of shape ``(*, in_features)``, floating, the same on all ranks; with ``sequence`` a rank's
        tokens.
    Returns:
        y of shape ``(*, ceil(out_features / ranks))``, or, with ``gather``, ``(*, out_features)``.
    Learned params:
        ``weight`` (ceil(out_features / ranks), in_features), ``bias``: parts of what
        `funcnet.linear` has, and of what its init gives.
    VJP:
        ``dx = sum over ranks dy_r weight_r``, ``dweight_r = dy_r^T x``, ``dbias_r = sum dy_r``.
    Raises:
        ValueError: another number of features.
        TypeError: another dtype.

    Source: Shoeybi et al. 2019, "Megatron-LM"; sequence: Korthikanti et al. 2022.

    >>> import funcnet as fn
    >>> layer = column_linear(5, {"model": 2})
    >>> params, _ = layer.init(fn.key(0), torch.ones(3, 4, device="meta"))
    >>> params["weight"].shape, layer.apply(params, torch.ones(3, 4, device="meta"))[0].shape
    (torch.Size([3, 4]), torch.Size([3, 3]))
    """
    name = "column_linear"
    check_count(name, 0, out_features=out_features)
    require(isinstance(bias, bool), f"{name}: bias must be True or False, got {bias!r}", TypeError)
    ranks = axis_for(name, mesh, axis)
    region = Region(ranks, sequence)

    def placed(x: Tensor) -> dict[str, Split]:
        shape = (out_features, x.shape[-1])
        return {
            "weight": Split(ranks, shape, 0),
            **({"bias": Split(ranks, shape[:1], 0)} if bias else {}),
        }

    @declare
    def init(x: Tensor) -> Mapping[str, Param]:
        require_floating(x)
        require(x.dim() > 0, "expects at least one dimension, got ()")
        region.check(x, whole=False)
        shape = (out_features, x.shape[-1])
        whole = weight_and_bias(shape, _FEATURES, bias, weight_init, bias_init, dtype)
        return parted(whole, placed(x))

    def forward(params: Params, x: Tensor, state: Params, key: Key, train: bool) -> Forward:
        weight = Split(ranks, (out_features, x.shape[-1]), 0)
        pullback = Pullback(
            column_rule, {"x": x, "weight": params["weight"]}, (weight, bias, gather, region)
        )
        y = F.linear(region.enter(x), params["weight"], params.get("bias"))
        if gather:
            y = Split(ranks, (*y.shape[:-1], out_features), y.dim() - 1).whole(y)
        return y, pullback, {}

    return stateful(init, forward, name=name, placed=placed)


@for_dx("weight")
def row_rule(
    residuals: dict[str, Tensor],
    dy: Tensor,
    weight: Split,
    bias: bool,
    region: Region,
    other: Any,
    *,
    params: bool,
    x: bool,
) -> Grads:
    """``dweight = dy^T x`` of own columns, ``dbias = sum dy``, ``dx = dy weight`` of own features.

    Of a tensor of which the size alone was read the cotangent is zero.
    """
    dparams, dx = linear_rule(residuals, region.leave_backward(dy), bias, params=params, x=x)
    if dparams is not None:
        dparams["weight"] = without_padding(weight, dparams["weight"])
    return dparams, (dx, zero_cotangent(*other)) if x and other is not None else dx


def row_linear(
    out_features: int | None,
    mesh: Mesh,
    bias: bool = True,
    in_features: int | None = None,
    *,
    axis: str = "model",
    sequence: int | None = None,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """`funcnet.linear`, each rank with some of the input: ``y = sum_r x_r weight_r^T + bias``.

    Its weight, transposed as in the formula, is parted by rows. It ends what a `column_linear`
    began: y is the same on all ranks. Between the two may stand functions of each number alone,
    without params and without draws, and `parted_dropout`; see `column_linear` for the rest.

    Args:
        out_features: the size of the last dimension of y, or None, as in `funcnet.linear`.
        mesh: the ranks; see `mesh` and `axis_of`.
        bias: whether a bias is learned. It is whole on each rank and added once.
        in_features: the features of all ranks together; needed where ranks do not divide them.
        axis: the axis of the mesh over which the weight is parted.
        sequence: the dimension of y along which each rank gets some of the tokens; ranks divide
            them. Default: each rank gets the whole y.
        weight_init, bias_init, dtype: those of `funcnet.linear`.

    Inputs:
        x of shape ``(*, ceil(in_features / ranks))``, floating: a rank's part of the features.
        Without ``out_features`` a tuple (x, other), of which the other one gives its size alone.
    Returns:
        y of shape ``(*, out_features)``; with ``sequence`` a rank's tokens of it.
    Learned params:
        ``weight`` (out_features, ceil(in_features / ranks)), a part of what `funcnet.linear`
        has and of what its init gives; ``bias`` (out_features,).
    VJP:
        ``dx_r = dy weight_r``, ``dweight_r = dy^T x_r``, ``dbias = sum dy``.
    Raises:
        ValueError: another number of features.
        TypeError: another dtype.

    Source: Shoeybi et al. 2019, "Megatron-LM"; sequence: Korthikanti et al. 2022.

    >>> import funcnet as fn
    >>> mesh, x = {"model": 2}, torch.ones(3, 4, device="meta")
    >>> net = fn.serial(column_linear(25, mesh), fn.relu(), row_linear(1, mesh, in_features=25))
    >>> params, _ = net.init(fn.key(0), x)
    >>> {path: tuple(leaf.shape) for path, leaf in fn.tree.to_dotted(params).items()}
    {'0.weight': (13, 4), '0.bias': (13,), '2.weight': (1, 13), '2.bias': (1,)}
    >>> net.apply(params, x)[0].shape
    torch.Size([3, 1])
    """
    name = "row_linear"
    options = {"out_features": out_features, "in_features": in_features}
    check_count(name, 0, **{each: size for each, size in options.items() if size is not None})
    require(isinstance(bias, bool), f"{name}: bias must be True or False, got {bias!r}", TypeError)
    size = None if out_features is None else lambda features: out_features
    region = Region(axis_for(name, mesh, axis), sequence)
    return row_linear_to(size, region, bias, in_features, weight_init, bias_init, dtype)


def row_linear_to(
    out_features: Callable[[int], int] | None,
    region: Region,
    bias: bool,
    in_features: int | None = None,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """`row_linear`, where the size of the output is a function of that of the whole input."""
    name, axis = "row_linear", region.axis

    def weight_split(x: Any) -> Split:
        given = x[0] if out_features is None else x
        features = given.shape[-1] * axis.size if in_features is None else in_features
        size = x[1].shape[-1] if out_features is None else out_features(features)
        return Split(axis, (size, features), 1)

    def placed(x: Any) -> dict[str, Split]:
        return {"weight": weight_split(x)}

    @declare
    def init(x: Any) -> Mapping[str, Param]:
        given = x
        if out_features is None:
            pair = isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], Tensor)
            require(pair, f"expects a tuple (x, other) of tensors, got {describe(x)}", TypeError)
            given, other = x
            require(other.dim() > 0, "expects at least one dimension of other, got ()")
        require_floating(given)
        require(given.dim() > 0, "expects at least one dimension, got ()")
        region.check(given, whole=True)
        split = weight_split(x)
        words = f"{split.part_shape[1]} of {in_features} features in the last dimension"
        fits = in_features is None or given.shape[-1] == split.part_shape[1]
        require(fits, f"expects {words}, got {tuple(given.shape)}")
        whole = weight_and_bias(split.shape, _FEATURES, bias, weight_init, bias_init, dtype)
        return parted(whole, {"weight": split})

    def forward(params: Params, x: Any, state: Params, key: Key, train: bool) -> Forward:
        split, told = weight_split(x), None
        if out_features is None:
            x, other = x
            told = tuple(other.shape), other.dtype, other.device
        pullback = Pullback(
            row_rule, {"x": x, "weight": params["weight"]}, (split, bias, region, told)
        )
        y = region.leave(F.linear(x, params["weight"]))
        return y + params["bias"] if bias else y, pullback, {}

    return stateful(init, forward, name=name, placed=placed)
