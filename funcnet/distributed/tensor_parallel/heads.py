"""Attention, each rank with some of the heads."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from funcnet import initializers, tree
from funcnet.collectives import Split
from funcnet.combinators.combine import Pull, Run, combine
from funcnet.core import Forward, Grads, Key, Layer, Params, Pullback, Tree
from funcnet.deferred import for_dx
from funcnet.distributed.processes.start import Mesh
from funcnet.distributed.tensor_parallel.linears import row_linear_to
from funcnet.distributed.tensor_parallel.parting import Region, axis_for
from funcnet.errors import located, require
from funcnet.initializers import Initializer
from funcnet.layers.arguments import parts_of
from funcnet.layers.attention import attention_over
from funcnet.layers.multihead_attention import (
    MASKS,
    NAMES,
    Told,
    check_options,
    children_of,
    multihead_backward,
    multihead_forward,
)
from funcnet.layers.projections import PROJECTION, Heads, in_projection
from funcnet.lift import stateful

_NAME = "parallel_attention"


@for_dx("weight")
def heads_projection_rule(
    residuals: Any,
    dy: Tree,
    rule: Callable[..., Grads],
    region: Region,
    *static: Any,
    params: bool,
    x: bool,
) -> Grads:
    """The rule of the projection into own heads; dx is summed over ranks."""
    if params:
        residuals["x"] = tree.map(region.enter, residuals["x"])
    dparams, dx = rule(residuals, dy, *static, params=params, x=x)
    return dparams, tree.map(region.enter_backward, dx) if x else None


def heads_projection(
    whole: Heads,
    own: Heads,
    region: Region,
    bias: bool,
    weight_init: Initializer | None,
    dtype: torch.dtype | None,
) -> Layer:
    """`in_projection` into the heads of a rank: in each weight the rows of these heads."""
    of_all = in_projection(whole, bias, weight_init, dtype)
    of_own = in_projection(own, bias, weight_init, dtype)

    def placed(x: Tree) -> dict[str, Split]:
        inputs = x if isinstance(x, tuple) else (x, x, x)
        ins = [each.shape[-1] for each in inputs]
        sizes = whole.sizes(ins[0])
        if len({*ins}) == 1:
            shape = (sum(sizes), ins[0])
            splits = {"in_proj_weight": Split(region.axis, shape, 0, sections=sizes)}
        else:
            rows = zip(PROJECTION[1:4], sizes, ins, strict=True)
            splits = {name: Split(region.axis, (out, size), 0) for name, out, size in rows}
        if bias:
            splits["in_proj_bias"] = Split(region.axis, (sum(sizes),), 0, sections=sizes)
        return splits

    def init(key: Tensor, x: Tree) -> tuple[Params, Params]:
        params, state = of_all.init(key, x)
        splits = placed(x)
        return {name: splits[name].part(leaf) for name, leaf in params.items()}, state

    def apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Any:
        return of_own.apply(params, tree.map(region.enter, x))

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        y, pullback, _ = of_own.forward(params, tree.map(region.enter, x), {}, None, train)
        residuals = {**pullback.residuals, "x": x}
        told = (pullback.rule, region, *pullback.static)
        return y, Pullback(heads_projection_rule, residuals, told), {}

    return stateful(init, forward, apply=apply, name="in_projection", placed=placed)


def heads_forward(
    run: Run, x: Tree, told: Told, region: Region, number: int
) -> tuple[Tree, Mapping[str, Tree]]:
    """That of `funcnet.multihead_attention`, of own heads."""
    with located(f"{_NAME}:"):
        parts, _ = parts_of(x, NAMES, 1)
        features = parts["query"].shape[-1]
        words = f"a number of features that {number} heads divide"
        require(features % number == 0, f"expects {words}, got {features}")
        mask = parts.get("attn_mask")
        one = mask is None or mask.dim() == 2
        require(
            one, f"expects one attn_mask (tokens, keys) for all heads, got {tree.describe(mask)}"
        )
        region.check(parts["query"], whole=False)
    return multihead_forward(run, x, told)


def heads_backward(
    pull: Pull, dy: Tree, residuals: Mapping[str, Tree], told: Told, region: Region, number: int
) -> Tree:
    """That of `funcnet.multihead_attention`; the cotangents of masks are summed over ranks."""
    dx = multihead_backward(pull, dy, residuals, told)
    if not isinstance(dx, (tuple, dict)):
        return dx
    named = dx if isinstance(dx, dict) else dict(zip(NAMES, dx, strict=False))
    made = {
        name: region.axis.sum(each) if name in MASKS and each is not None else each
        for name, each in named.items()
    }
    return made if isinstance(dx, dict) else tuple(made.values())


def parallel_attention(
    num_heads: int,
    mesh: Mesh,
    dropout: float = 0.0,
    bias: bool = True,
    batch_first: bool = False,
    *,
    axis: str = "model",
    sequence: bool = False,
    num_kv_heads: int | None = None,
    is_causal: bool = False,
    window: int | None = None,
    rotary: Layer | None = None,
    alibi: bool = False,
    cache: int | None = None,
    weight_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """`funcnet.multihead_attention`, each rank with some of the heads; y is the sum over ranks.

    Args:
        num_heads: the heads of all ranks; ranks divide them.
        mesh: the ranks; see `mesh` and `axis_of`.
        dropout: the probability that dropout, in training, drops a weight.
        bias: whether the projections have biases.
        batch_first: whether inputs are (batch, tokens, features), not (tokens, batch, features).
        axis: the axis of the mesh over which the heads are parted.
        sequence: whether each rank has some of the tokens of x and y, which ranks divide.
        num_kv_heads: the number of heads of keys and values; ranks divide it too.
        is_causal, window, rotary, alibi, cache, weight_init, dtype: of
            `funcnet.multihead_attention`.

    Inputs:
        those of `funcnet.multihead_attention`, the same on all ranks; attn_mask is (tokens, keys).
        With ``sequence`` query, key and value are a rank's tokens, and masks are those of the
        tokens of all ranks: key_padding_mask (batch, keys) and attn_mask stay whole.
    Returns:
        y of the shape of the query, the same on all ranks.
    Learned params:
        parts of those of `funcnet.multihead_attention`, and of what its init gives: of
        ``in_proj_weight`` and ``in_proj_bias`` the rows of the rank's heads, of
        ``out_proj.weight`` their columns; ``out_proj.bias`` is whole.
    State:
        with a cache that of `funcnet.multihead_attention`, for the rank's heads.
    VJP:
        that of `funcnet.multihead_attention`; dx is the sum of what the ranks' heads give.
    Raises:
        ValueError: heads that the ranks do not divide; the errors of `funcnet.multihead_attention`.

    Source: Shoeybi et al. 2019, "Megatron-LM"; sequence: Korthikanti et al. 2022.

    >>> import funcnet as fn
    >>> layer, x = parallel_attention(4, {"model": 2}), torch.ones(3, 5, 8, device="meta")
    >>> params, _ = layer.init(fn.key(0), x)
    >>> {path: tuple(leaf.shape) for path, leaf in fn.tree.to_dotted(params).items()}
    {'in_proj_weight': (12, 8), 'in_proj_bias': (12,), 'out_proj.weight': (8, 4),
     'out_proj.bias': (8,)}
    """
    check_options(_NAME, num_heads, num_kv_heads, is_causal, cache, dropout)
    region = Region(axis_for(_NAME, mesh, axis), (-2 if batch_first else 0) if sequence else None)
    ranks, keys = region.axis.size, num_heads if num_kv_heads is None else num_kv_heads
    for option, heads in (("num_heads", num_heads), ("num_kv_heads", keys)):
        divides = heads % ranks == 0
        require(divides, f"{_NAME}: {option} must be a multiple of {ranks} ranks, got {heads}")
    whole = Heads(num_heads, keys, batch_first)
    own = Heads(num_heads // ranks, keys // ranks, batch_first, ranks)
    told = Told(
        heads=own,
        is_causal=is_causal,
        window=window,
        need_weights=False,
        average_attn_weights=True,
        add_bias_kv=False,
        add_zero_attn=False,
        rotary=rotary is not None,
        cache=cache,
        kdim=None,
        vdim=None,
        name=_NAME,
    )
    attention = attention_over(
        region.axis,
        dropout,
        is_causal,
        None,
        keys != num_heads,
        window=window,
        alibi=alibi,
        need_weights=False,
    )
    projection = heads_projection(whole, own, region, bias, weight_init, dtype)
    start = initializers.zeros()
    out = row_linear_to(lambda features: features, region, bias, None, weight_init, start, dtype)
    children = children_of(told, projection, attention, out, rotary)
    return combine(_NAME, children, heads_forward, heads_backward, told, region, num_heads)
