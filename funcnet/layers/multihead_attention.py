"""Attention in several subspaces at once, with projections into them and out of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import initializers, tree
from funcnet.combinators.combine import Pull, Run, combine
from funcnet.core import Layer, Tree, sum_cotangents
from funcnet.errors import located, require
from funcnet.initializers import Initializer
from funcnet.layers.arguments import in_form, parts_of
from funcnet.layers.attention import scaled_dot_product_attention
from funcnet.layers.cache import counter, key_value_cache
from funcnet.layers.linear import linear_to
from funcnet.layers.masks import Shape, both, require_mask, visible
from funcnet.layers.projections import PROJECTION, TOKEN, Heads, in_projection, learned_token

INPUTS = ("query", "key", "value")
MASKS = ("key_padding_mask", "attn_mask")
NAMES = (*INPUTS, *MASKS)
_NAME = "multihead_attention"


class Told(NamedTuple):
    """The options of `multihead_attention` that both passes need."""

    heads: Heads
    is_causal: bool
    window: int | None
    need_weights: bool
    average_attn_weights: bool
    add_bias_kv: bool
    add_zero_attn: bool
    rotary: bool
    cache: int | None
    kdim: int | None
    vdim: int | None
    name: str = _NAME

    @property
    def extra(self) -> int:
        """How many keys there are that are of no token. Every query sees them."""
        return self.add_bias_kv + self.add_zero_attn


def inputs_of(told: Told, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The query, key and value; ValueError or TypeError unless they fit each other."""
    query = parts["query"]
    key = parts.get("key", query)
    inputs = query, key, parts.get("value", key)
    got = f"got {tree.describe(inputs)}"
    floating = query.is_floating_point() and len({each.dtype for each in inputs}) == 1
    require(floating, f"expects query, key and value of one floating dtype, {got}", TypeError)
    ranks, batch_first = {each.dim() for each in inputs}, told.heads.batch_first
    form = "(batch, tokens, features)" if batch_first else "(tokens, batch, features)"
    known = len(ranks) == 1 and (query.dim() in (2, 3) or (batch_first and query.dim() > 3))
    require(known, f"expects inputs of shape {form} or (tokens, features), {got}")
    tokens = 0 if query.dim() == 2 or not batch_first else -2
    batches = [each.shape[:-2] if tokens else each.shape[1:-1] for each in inputs]
    require(batches == batches[:1] * 3, f"expects inputs of one batch, {form}, {got}")
    require(key.shape[tokens] == inputs[2].shape[tokens], f"expects as many keys as values, {got}")
    for name, size, each in (("kdim", told.kdim, key), ("vdim", told.vdim, inputs[2])):
        fits = size in (None, each.shape[-1])
        require(fits, f"expects {name}={size} features, got {tuple(each.shape)}")
    number, features = told.heads.queries, query.shape[-1]
    divides = features % number == 0
    require(divides, f"expects a number of features that {number} heads divide, got {features}")
    alone = told.cache is None or parts.keys() == {"query"}
    require(alone, f"with a cache it expects a query alone, got {list(parts)}")
    return inputs


def spread_out(masks: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """Masks of torch.nn, whose True hides a key, as masks that broadcast to scores of a shape.

    ValueError or TypeError for one that does not fit.
    """
    *batch, heads, queries, keys = shape
    spread = []
    for name, mask in masks.items():
        if name == "attn_mask":
            stacked = (heads * batch[0] if batch else heads, queries, keys)
            shapes = [(queries, keys), *([stacked] if len(batch) < 2 else [])]
            require_mask(name, mask, shapes, dtype)
            wide = mask.unflatten(0, (batch[0], heads)) if batch and mask.dim() == 3 else mask
        else:
            require_mask(name, mask, [(*batch, keys)], dtype)
            wide = mask[..., None, None, :]
        spread.append(~wide if wide.dtype == torch.bool else wide)
    return spread


def merged(told: Told, masks: list[Tensor], query: Tensor, key: Tensor) -> Tensor | None:
    """One mask of all, and of causality where there are keys of no token."""
    if told.extra and (told.is_causal or told.window is not None):
        queries, keys = (torch.arange(each.shape[-2], device=each.device) for each in (query, key))
        masks = [*masks, visible(queries, keys, told.window, told.is_causal)]
    mask = None
    for each in masks:
        mask = both(mask, each, query.dtype)
    if mask is None or not told.extra:
        return mask
    return F.pad(mask, (0, told.extra), value=mask.dtype == torch.bool)


def masks_backward(
    told: Told, masks: Mapping[str, Tensor], shape: Shape, dmask: Tensor | None
) -> dict[str, Tensor]:
    """The cotangents of the masks that were added, from that of the merged one."""
    if dmask is None:
        return {}
    floating = {name: mask for name, mask in masks.items() if mask.is_floating_point()}
    dmask = dmask[..., : dmask.shape[-1] - told.extra]
    spread = spread_out(floating, shape, dmask.dtype)
    return {
        name: dmask.sum_to_size(wide.shape).reshape(mask.shape)
        for (name, mask), wide in zip(floating.items(), spread, strict=True)
    }


def multihead_forward(run: Run, x: Tree, told: Told) -> tuple[Tree, Mapping[str, Tree]]:
    """Projections into the heads, attention in each, a projection of all of them."""
    heads, places = told.heads, {}
    with located(f"{told.name}:"):
        parts, form = parts_of(x, NAMES, 1)
        inputs = inputs_of(told, parts)
    is_self = not parts.keys() & {"key", "value"}
    projected = run(PROJECTION, inputs[0] if is_self else inputs)
    query, key, value = map(heads.split, projected, (heads.queries, heads.keys, heads.keys))
    masks = {name: parts[name] for name in MASKS if name in parts}
    with located(f"{told.name}:"):
        spread = spread_out(masks, (*query.shape[:-1], key.shape[-2]), query.dtype)
    mask = merged(told, spread, query, key)
    if told.cache is not None:
        at = run("positions", query)
        places["query_positions"] = at
        places["key_positions"] = torch.arange(told.cache, device=at.device)
    if told.rotary:
        at = [] if told.cache is None else [places["query_positions"]]
        query = run("rotary", (query, *at) if at else query, use=0)
        key = run("rotary", (key, *at) if at else key, use=1)
    if told.cache is not None:
        key, value = run("cache", (key, value, places["query_positions"]))
    if told.add_bias_kv:
        key, value = run(TOKEN, (key, value))
    if told.add_zero_attn:
        key, value = (F.pad(each, (0, 0, 0, 1)) for each in (key, value))
    masked = {} if mask is None else {"attn_mask": mask}
    y = run("attention", {"query": query, "key": key, "value": value, **masked, **places})
    y, weights = y if told.need_weights else (y, None)
    y = run("out_proj", heads.join(y))
    # Of x the backward pass reads the masks, and which inputs there were.
    known = {name: () for name in INPUTS if name in parts} | masks
    residuals = {} if form is None else {"x": in_form(known, NAMES, form)}
    if weights is None:
        return y, residuals
    return (y, weights.mean(-3) if told.average_attn_weights else weights), residuals


def multihead_backward(pull: Pull, dy: Tree, residuals: Mapping[str, Tree], told: Told) -> Tree:
    """The children's, from the last to the first."""
    parts, form = parts_of(residuals.get("x", ((),)), NAMES, 1)
    heads = told.heads
    dy, dweights = dy if told.need_weights else (dy, None)
    dattended = heads.split(pull("out_proj", dy), heads.queries)
    if dweights is not None and told.average_attn_weights:
        shape = (*dattended.shape[:-1], dweights.shape[-1])
        dweights = (dweights / heads.queries).unsqueeze(-3).expand(shape)
    cotangents = pull("attention", dattended if dweights is None else (dattended, dweights))
    dquery, dkey, dvalue = (cotangents[name] for name in INPUTS)
    if told.add_zero_attn:
        dkey, dvalue = dkey[..., :-1, :], dvalue[..., :-1, :]
    if told.add_bias_kv:
        dkey, dvalue = pull(TOKEN, (dkey, dvalue))
    if told.cache is not None:
        dkey, dvalue, _ = pull("cache", (dkey, dvalue))
    shape = (*dquery.shape[:-1], dkey.shape[-2])
    if told.rotary:
        dquery, dkey = pull("rotary", dquery, use=0), pull("rotary", dkey, use=1)
        if told.cache is not None:
            dquery, dkey = dquery[0], dkey[0]
    dx = pull(PROJECTION, tuple(map(heads.join, (dquery, dkey, dvalue))), needed=pull.x)
    if not pull.x:
        return None
    masks = {name: parts[name] for name in MASKS if name in parts}
    made = masks_backward(told, masks, shape, cotangents.get("attn_mask"))
    given = [name for name in INPUTS if name in parts]
    if given == ["query"]:
        return in_form({"query": dx, **made}, NAMES, form) if residuals else dx
    # What is missing was the input before it.
    for name, each in zip(INPUTS, dx, strict=True):
        into = name if name in given else "query" if "key" not in given else "key"
        made[into] = sum_cotangents(made.get(into), each)
    return in_form(made, NAMES, form)


def multihead_attention(
    num_heads: int,
    dropout: float = 0.0,
    bias: bool = True,
    add_bias_kv: bool = False,
    add_zero_attn: bool = False,
    kdim: int | None = None,
    vdim: int | None = None,
    batch_first: bool = False,
    *,
    num_kv_heads: int | None = None,
    is_causal: bool = False,
    window: int | None = None,
    need_weights: bool = False,
    average_attn_weights: bool = True,
    rotary: Layer | None = None,
    alibi: bool = False,
    cache: int | None = None,
    weight_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """``y = concat_h(softmax(q_h k_h^T / sqrt(features / heads)) v_h) out_proj^T``.

    q, k and v are linear functions of query, key and value; head h has its part of their features.
    Torch's ``embed_dim`` is not given: init finds the features from x.

    Args:
        num_heads: the number of heads; it divides the features of the query.
        dropout: the probability that dropout, in training, drops a weight.
        bias: whether the projections have biases.
        add_bias_kv: whether there is a learned key and value beside those of the tokens.
        add_zero_attn: whether there is a key and a value of zeros beside those of the tokens.
        kdim, vdim: the features of key and value, for a check; init finds them.
        batch_first: whether inputs are (batch, tokens, features), not (tokens, batch, features).
        num_kv_heads: the number of heads of keys and values, which groups of the query's heads
            share (grouped-query attention); default ``num_heads``.
        is_causal: whether a query sees only the keys that do not come after it.
        window: a query sees only the keys that are less than this away from it.
        need_weights: whether the weights are an output too. In torch they are by default.
        average_attn_weights: whether these are their mean over the heads.
        rotary: a `rotary` layer that turns queries and keys by their positions.
        alibi: whether scores fall with the distance of query and key, see `alibi`.
        cache: the number of tokens that are remembered. A call then attends to all tokens of the
            calls before it as well, whose keys and values are state; for decoding token by token.
        weight_init: of all weights; by default ``in_proj_weight`` is
            `funcnet.initializers.glorot_uniform`, and ``out_proj.weight`` as in `linear`, as in
            torch.
        dtype: of the parameters; default that of x.

    Inputs:
        x, a tensor, which is query, key and value; or a tuple (query, key, value, key_padding_mask,
        attn_mask), or a dict with these names, whose first must be there: query (tokens, batch,
        features), key (keys, batch, kdim), value (keys, batch, vdim), or all three without the
        batch; key_padding_mask (batch, keys); attn_mask (tokens, keys) or (batch * num_heads,
        tokens, keys). Masks are bool, True where a key is hidden, the opposite of
        `scaled_dot_product_attention`'s, as in torch; or of x's dtype and added to the scores. A
        key of `funcnet.random` when ``train=True`` and dropout > 0.
    Returns:
        y of the shape of the query, or (y, weights), weights of shape (batch, tokens, keys) or
        (batch, num_heads, tokens, keys). A query that sees no key attends to zeros, and not to NaN
        as in torch.
    Learned params:
        ``in_proj_weight`` (3 features, features), or, where kdim or vdim is another,
        ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight``; ``in_proj_bias``,
        ``out_proj.weight``, ``out_proj.bias``; ``bias_k`` and ``bias_v`` (1, 1, features).
    State:
        with a cache ``positions.length``, ``cache.key`` and ``cache.value``, of shape (batch,
        num_kv_heads, cache, features / num_heads).
    VJP:
        that of the linear projections, and of `scaled_dot_product_attention` between them.
    Raises:
        ValueError: features that the heads do not divide, for inputs and masks that do not fit,
            and a cache that is full (under `jit`, which cannot read values, y is NaN then).
        TypeError: a mask of another dtype.

    Source: ``torch.nn.MultiheadAttention``; Vaswani et al. 2017; groups: Ainslie et al. 2023.

    >>> import funcnet as fn
    >>> layer = fn.multihead_attention(2, batch_first=True, is_causal=True)
    >>> params, _ = layer.init(fn.key(0), torch.ones(3, 5, 4))
    >>> {path: tuple(leaf.shape) for path, leaf in fn.tree.to_dotted(params).items()}
    {'in_proj_weight': (12, 4), 'in_proj_bias': (12,), 'out_proj.weight': (4, 4),
     'out_proj.bias': (4,)}
    >>> layer.apply(params, torch.ones(3, 5, 4))[0].shape
    torch.Size([3, 5, 4])
    """
    check_options(_NAME, num_heads, num_kv_heads, is_causal, cache, dropout)
    beside = not (add_bias_kv or add_zero_attn)
    require(not alibi or beside, f"{_NAME}: alibi goes with neither add_bias_kv nor add_zero_attn")
    wrong = f"{_NAME}: a cache goes with neither add_bias_kv nor add_zero_attn"
    require(cache is None or beside, wrong)
    heads = Heads(num_heads, num_kv_heads or num_heads, batch_first)
    told = Told(
        heads,
        is_causal,
        window,
        need_weights,
        average_attn_weights,
        add_bias_kv,
        add_zero_attn,
        rotary is not None,
        cache,
        kdim,
        vdim,
    )
    attention = scaled_dot_product_attention(
        dropout,
        is_causal and not told.extra,
        enable_gqa=heads.keys != num_heads,
        window=None if told.extra else window,
        alibi=alibi,
        need_weights=need_weights,
    )
    projection = in_projection(heads, bias, weight_init, dtype)
    out = linear_to(lambda features: features, bias, weight_init, initializers.zeros(), dtype)
    token = learned_token(heads, dtype) if add_bias_kv else None
    children = children_of(told, projection, attention, out, rotary, token)
    return combine(_NAME, children, multihead_forward, multihead_backward, told)


def check_options(
    name: str,
    num_heads: int,
    num_kv_heads: int | None,
    is_causal: bool,
    cache: int | None,
    dropout: float,
) -> None:
    """ValueError, with this name in front, for options that do not fit each other."""
    require(0.0 <= dropout <= 1.0, f"{name}: dropout must be in [0, 1], got {dropout}")
    whole = isinstance(num_heads, int) and num_heads >= 1
    require(whole, f"{name}: num_heads must be an integer of at least 1, got {num_heads}")
    keys = num_heads if num_kv_heads is None else num_kv_heads
    divides = keys >= 1 and num_heads % keys == 0
    require(divides, f"{name}: num_kv_heads must divide {num_heads} heads, got {num_kv_heads}")
    in_order = cache is None or (is_causal and cache >= 1)
    require(in_order, f"{name}: a cache must be at least 1, with is_causal=True, got {cache}")


def children_of(
    told: Told,
    projection: Layer,
    attention: Layer,
    out: Layer,
    rotary: Layer | None,
    token: Layer | None = None,
) -> dict[Any, Layer]:
    """The layers that the passes run, by name."""
    children: dict[Any, Layer] = {PROJECTION: projection}
    if token is not None:
        children[TOKEN] = token
    if told.cache is not None:
        children |= {"positions": counter(told.cache), "cache": key_value_cache(told.cache)}
    if rotary is not None:
        children["rotary"] = rotary
    return {**children, "attention": attention, "out_proj": out}
