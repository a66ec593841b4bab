"""Into the heads of attention: projections, and the keys and values that no token has."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import initializers
from funcnet.core import Grads, Layer, Params, Pullback, Tree
from funcnet.deferred import for_dx
from funcnet.initializers import Initializer
from funcnet.layers.linear import linear_rule
from funcnet.lift import stateless
from funcnet.params import Param, declare

PROJECTION = ("in_proj_weight", *[f"{each}_proj_weight" for each in "qkv"], "in_proj_bias")
TOKEN = ("bias_k", "bias_v")


class Heads(NamedTuple):
    """How the features are split.

    Attributes:
        queries: the number of heads.
        keys: the number of heads of keys and values.
        batch_first: whether x is (batch, tokens, features), not (tokens, batch, features).
        ranks: how many processes have as many heads each, of their part of the features.
    """

    queries: int
    keys: int
    batch_first: bool
    ranks: int = 1

    def split(self, x: Tensor, heads: int) -> Tensor:
        """(batch, tokens, features), as x has them, to (batch, heads, tokens, features)."""
        x = x.unflatten(-1, (heads, -1))
        if self.batch_first or x.dim() == 3:
            return x.transpose(-3, -2)
        return x.permute(1, 2, 0, 3)

    def join(self, x: Tensor) -> Tensor:
        """The inverse of `split`."""
        if self.batch_first or x.dim() == 3:
            return x.transpose(-3, -2).flatten(-2)
        return x.permute(2, 0, 1, 3).flatten(-2)

    def sizes(self, features: int) -> tuple[int, int, int]:
        """Those of the projected query, key and value."""
        own = features // self.ranks
        shared = own // self.queries * self.keys
        return own, shared, shared


def in_projection(
    heads: Heads, bias: bool, weight_init: Initializer | None, dtype: torch.dtype | None
) -> Layer:
    """Queries, keys and values, each a linear function of its input.

    Inputs:
        x, a tensor for all three, or a tuple (query, key, value).
    Returns:
        (query, key, value); the query keeps its number of features.
    Learned params:
        ``in_proj_weight``, those of all three one above the other, or ``q_proj_weight``,
        ``k_proj_weight`` and ``v_proj_weight`` where their inputs differ in size; ``in_proj_bias``.
    """

    @declare
    def init(x: Tree) -> dict[str, Param]:
        inputs = x if isinstance(x, tuple) else (x, x, x)
        features = inputs[0].shape[-1]
        sizes, ins = heads.sizes(features), [each.shape[-1] for each in inputs]
        start = weight_init or initializers.glorot_uniform()
        if len({*ins}) == 1:
            of_x = (1, "{} features in the last dimension")
            declared = {"in_proj_weight": Param((sum(sizes), features), start, dtype, of_x=of_x)}
        else:
            each = zip(PROJECTION[1:4], sizes, ins, strict=True)
            declared = {name: Param((out, size), start, dtype) for name, out, size in each}
        if bias:
            declared["in_proj_bias"] = Param((sum(sizes),), initializers.zeros(), dtype)
        return declared

    def weights(params: Params, sizes: tuple[int, ...]) -> list[Tensor]:
        if "in_proj_weight" in params:
            return [*params["in_proj_weight"].split(sizes)]
        return [params[name] for name in PROJECTION[1:4]]

    def apply(params: Params, x: Tree) -> Tree:
        found = params.get("in_proj_bias")
        if not isinstance(x, tuple):
            sizes = heads.sizes(x.shape[-1])
            return F.linear(x, params["in_proj_weight"], found).split(sizes, -1)
        sizes = heads.sizes(x[0].shape[-1])
        biases = (None, None, None) if found is None else found.split(sizes)
        return tuple(map(F.linear, x, weights(params, sizes), biases))

    def vjp(params: Params, x: Tree) -> tuple[Tree, Pullback]:
        is_self = not isinstance(x, tuple)
        weight = params["in_proj_weight"] if is_self else None
        if is_self:
            return apply(params, x), Pullback(self_rule, {"x": x, "weight": weight}, (bias,))
        sizes = heads.sizes(x[0].shape[-1])
        residuals = {"x": x, "weight": weights(params, sizes)}
        return apply(params, x), Pullback(cross_rule, residuals, ("in_proj_weight" in params, bias))

    return stateless(init, apply, vjp)


@for_dx("weight")
def self_rule(residuals: Any, dy: Tree, bias: bool, *, params: bool, x: bool) -> Grads:
    """That of `linear`, of the three side by side."""
    dparams, dx = linear_rule(residuals, torch.cat(dy, -1), bias, params=params, x=x)
    return dparams and {f"in_proj_{name}": leaf for name, leaf in dparams.items()}, dx


@for_dx("weight")
def cross_rule(
    residuals: Any, dy: Tree, packed: bool, bias: bool, *, params: bool, x: bool
) -> Grads:
    """That of `linear`, of each input."""
    made: list[Any] = [
        linear_rule({"x": each, "weight": weight}, d, bias, params=params, x=x)
        for each, weight, d in zip(residuals["x"], residuals["weight"], dy, strict=True)
    ]
    dx = tuple([each for _, each in made]) if x else None
    if not params:
        return None, dx
    dweights = [dparams["weight"] for dparams, _ in made]
    if packed:
        dparams = {"in_proj_weight": torch.cat(dweights)}
    else:
        dparams = dict(zip(PROJECTION[1:4], dweights, strict=True))
    if bias:
        dparams["in_proj_bias"] = torch.cat([dparams["bias"] for dparams, _ in made])
    return dparams, dx


def learned_token(heads: Heads, dtype: torch.dtype | None) -> Layer:
    """A learned key and a learned value after those of the tokens.

    Inputs:
        x, a tuple (key, value), each of shape ``(*, heads, tokens, features)``.
    Learned params:
        ``bias_k`` and ``bias_v``, of shape ``(1, 1, heads * features)``.
    """

    @declare
    def init(x: Tree) -> dict[str, Param]:
        shape, start = (1, 1, heads.keys * x[0].shape[-1]), initializers.glorot_normal()
        return {name: Param(shape, start, dtype) for name in TOKEN}

    def apply(params: Params, x: Tree) -> Tree:
        return tuple([_appended(each, params[name]) for each, name in zip(x, TOKEN, strict=True)])

    def vjp(params: Params, x: Tree) -> tuple[Tree, Pullback]:
        return apply(params, x), Pullback(learned_token_rule, {})

    return stateless(init, apply, vjp)


def _appended(tokens: Tensor, learned: Tensor) -> Tensor:
    (*_, heads, _, features) = tokens.shape
    last = learned.reshape(heads, 1, features).expand(*tokens.shape[:-2], 1, features)
    return torch.cat([tokens, last], -2)


def learned_token_rule(residuals: Any, dy: Tree, *, params: bool, x: bool) -> Grads:
    """``dbias_k`` and ``dbias_v`` are the cotangents of the last token, summed over the batch."""
    dparams = None
    if params:
        last = [each[..., -1, :].flatten(-2) for each in dy]
        dparams = {
            name: each.reshape(-1, each.shape[-1]).sum(0)[None, None]
            for name, each in zip(TOKEN, last, strict=True)
        }
    return dparams, tuple([each[..., :-1, :] for each in dy]) if x else None
