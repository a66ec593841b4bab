"""Which layers have a formula for the gradients of single examples, beside each other.

A layer without one here works as well: its rule runs under vmap, and the gradients of its params
are formed for each example. These formulas save that, where the gradient is larger than what it is
made of. In all of them the first axis of residuals and cotangents is that of the examples.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcnet.backward.per_example.factors import Factors, Formed, Joined, Products, Rows
from funcnet.core import Tree
from funcnet.layers.conv import convolution_rule
from funcnet.layers.embedding import embedding_rule
from funcnet.layers.group_norm import group_norm_backward
from funcnet.layers.layer_norm import layer_norm_backward, rms_norm_backward
from funcnet.layers.linear import linear_like_rule, linear_rule
from funcnet.layers.norm import norm_rule
from funcnet.layers.projections import PROJECTION, cross_rule, self_rule
from funcnet.layers.spatial import Window

FACTORS: dict[Callable[..., Any], Callable[..., dict[str, Factors] | None]] = {}
"""By rule: ``(residuals, dy, *static)`` to the factors of each of its params; None for those of its
static arguments for which there is no formula."""

AS_ONE_BATCH: dict[Callable[..., Any], Callable[..., tuple[Any, Any] | None]] = {}
"""By rule: ``(residuals, dy, *static)`` of examples to those of one batch, so that the rule gives
the sum over all examples, at once; None as above."""


def factors_of(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the formula for the factors of a rule's gradients."""
    return lambda function: FACTORS.setdefault(rule, function)


def as_one_batch(*rules: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates how the examples of rules become one batch."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for rule in rules:
            AS_ONE_BATCH[rule] = function
        return function

    return register


def positions(tensor: Tensor, kept: int = 1) -> Tensor:
    """(examples, *, features) as (examples, positions, features).

    >>> positions(torch.ones(5, 1, 3, 2)).shape
    torch.Size([5, 3, 2])
    """
    last = tensor.shape[tensor.dim() - kept :]
    return tensor.reshape(len(tensor), math.prod(tensor.shape[1 : tensor.dim() - kept]), *last)


@factors_of(linear_rule)
def linear_factors(residuals: Any, dy: Tensor, bias: bool) -> dict[str, Factors]:
    """``dweight = sum dy x^T``, ``dbias = sum dy``."""
    rows, columns = positions(dy), positions(residuals["x"])
    shape = (rows.shape[-1], columns.shape[-1])
    found: dict[str, Factors] = {"weight": Products(rows, columns, shape)}
    if bias:
        found["bias"] = Formed(rows.squeeze(1) if rows.shape[1] == 1 else rows.sum(1))
    return found


@factors_of(linear_like_rule)
def linear_like_factors(residuals: Any, dy: Tensor, other: Any, bias: bool) -> dict[str, Factors]:
    """Those of `linear`."""
    return linear_factors(residuals, dy, bias)


@factors_of(self_rule)
def self_factors(residuals: Any, dy: Tree, bias: bool) -> dict[str, Factors]:
    """Those of `linear`, of queries, keys and values side by side."""
    found = linear_factors(residuals, torch.cat(dy, -1), bias)
    return {f"in_proj_{name}": each for name, each in found.items()}


@factors_of(cross_rule)
def cross_factors(residuals: Any, dy: Tree, packed: bool, bias: bool) -> dict[str, Factors]:
    """Those of `linear`, of each input, which may have different numbers of positions."""
    found = [
        linear_factors({"x": x}, each, bias) for x, each in zip(residuals["x"], dy, strict=True)
    ]
    weights = [each["weight"] for each in found]
    made: dict[str, Factors] = dict(zip(PROJECTION[1:4], weights, strict=True))
    if packed:
        made = {"in_proj_weight": Joined(tuple(weights))}
    if bias:
        made["in_proj_bias"] = Joined(tuple([each["bias"] for each in found]))
    return made


@factors_of(convolution_rule)
def convolution_factors(
    residuals: Any, dy: Tensor, bias: bool, edges: Any, *geometry: Any
) -> dict[str, Factors]:
    """``dweight = dy patches(x)^T``, of the transpose ``x patches(dy)^T``; see its rule."""
    stride, padding, dilation, transposed, _, groups = geometry
    weight, n = residuals["weight"], len(dy)
    images, dy = images_as_one_batch(residuals, dy)
    x = images["x"]
    image, places = (dy, x) if transposed else (x, dy)
    window = Window(tuple(weight.shape[2:]), dilation, padding, stride)
    count = tuple(places.shape[2:])
    rows = places.reshape(n, -1, groups, places.shape[1] // groups, math.prod(count))
    columns = patches(image, window, count).reshape(*rows.shape[:3], -1, rows.shape[-1])
    # (examples, batch, groups, features, windows): the windows of all are the positions.
    rows, columns = (each.permute(0, 2, 1, 4, 3).flatten(2, 3) for each in (rows, columns))
    if groups == 1:
        rows, columns = rows.squeeze(1), columns.squeeze(1)
    found: dict[str, Factors] = {"weight": Products(rows, columns, tuple(weight.shape))}
    if bias:
        channels = dy.unflatten(0, (n, -1))
        found["bias"] = Formed(channels.sum([1, *range(3, channels.dim())]))
    return found


def patches(image: Tensor, window: Window, count: tuple[int, ...]) -> Tensor:
    """`Window.take` by strided views and one copy: 0.2 of the time of its indices, for 32 channels.

    Returns: (batch, channels, *kernel, *count).

    >>> patches(torch.arange(4.0).reshape(1, 1, 4), Window((2,), (1,), (0,), (2,)), (2,))
    tensor([[[[0., 2.],
              [1., 3.]]]])
    """
    around = [each for added in reversed(window.padding) for each in (added, added)]
    view, dims = torch.constant_pad_nd(image, around) if any(around) else image, len(count)
    for dim, (k, d, _, s) in enumerate(zip(*window, strict=True), 2):
        view = view.unfold(dim, d * (k - 1) + 1, s)[..., ::d].narrow(dim, 0, count[dim - 2])
    return view.movedim([*range(2, 2 + dims)], [*range(-dims, 0)])


@factors_of(embedding_rule)
def embedding_factors(
    residuals: Any, dy: Tensor, number: int, padding: int, by_frequency: bool
) -> dict[str, Factors] | None:
    """``dweight[i] = sum of dy where x = i``."""
    if by_frequency:
        return None
    index, rows = positions(residuals["x"], 0).long(), positions(dy)
    rows = torch.where((index != padding).unsqueeze(-1), rows, 0.0)
    return {"weight": Rows(index, rows, (number, rows.shape[-1]))}


@factors_of(norm_rule)
def norm_factors(
    residuals: Any, dy: Tensor, backward: Any, static: Any, names: tuple[str, ...]
) -> dict[str, Factors] | None:
    """``dweight = sum dy n``, ``dbias = sum dy``, with the normalized x as n."""
    if backward not in (layer_norm_backward, rms_norm_backward):
        return None
    kept = len(static[0])
    made = {"bias": dy}
    if "weight" in names:
        x, rstd, mean = residuals["x"], residuals["rstd"], residuals.get("mean")
        made["weight"] = dy * (x * rstd if mean is None else (x - mean) * rstd)
    return {
        name: Formed(positions(made[name], kept).sum(1).to(residuals[name].dtype)) for name in names
    }


@as_one_batch(linear_rule, linear_like_rule, self_rule, cross_rule, embedding_rule)
def flattened_by_rule(residuals: Any, dy: Tree, *static: Any) -> tuple[Any, Any] | None:
    """Of rules that sum over all dimensions but the last."""
    by_frequency = static[2:] == (True,)
    return None if by_frequency else (residuals, dy)


@as_one_batch(norm_rule)
def norm_as_one_batch(
    residuals: Any, dy: Tensor, backward: Any, static: Any, names: tuple[str, ...]
) -> tuple[Any, Any] | None:
    """Of rules that sum over all dimensions but those that are normalized, or the channels."""
    if backward in (layer_norm_backward, rms_norm_backward):
        return residuals, dy
    if backward is not group_norm_backward:
        return None
    shaped = {"x", "mean", "rstd"}
    flat = {name: each.flatten(0, 1) for name, each in residuals.items() if name in shaped}
    return {**residuals, **flat}, dy.flatten(0, 1)


@as_one_batch(convolution_rule)
def images_as_one_batch(residuals: Any, dy: Tensor, *static: Any) -> tuple[Any, Any]:
    """An example is one image or several; those of all are a batch."""
    kept = residuals["weight"].dim() - 1
    x, dy = (each.reshape(-1, *each.shape[each.dim() - kept :]) for each in (residuals["x"], dy))
    return {**residuals, "x": x}, dy
