"""Attention: for each query the mean of the values, weighted by how well their keys fit it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet import random, runtime, tree
from funcnet.batch_axis import BatchAxis, first_indices
from funcnet.collectives import Axis
from funcnet.core import Forward, Grads, Key, Layer, Params, Pullback, Tree
from funcnet.errors import require
from funcnet.layers.arguments import Form, in_form, parts_of
from funcnet.layers.embedding import is_index
from funcnet.layers.linear_biases import alibi_bias
from funcnet.layers.masks import Shape, additive, both, require_broadcast, visible
from funcnet.lift import fastest, stateful, with_kernel
from funcnet.params import Param, declare

NAMES = ("query", "key", "value", "attn_mask", "query_positions", "key_positions")


class Attention(NamedTuple):
    """What attention is told beside its tensors.

    Attributes:
        scale: of the scores.
        is_causal: whether query i sees the keys 0 to i only.
        dropped: by what a weight that dropout keeps is multiplied.
    """

    scale: float
    is_causal: bool = False
    dropped: float = 1.0


def causal_mask(scores: Tensor) -> Tensor:
    """Which keys each query sees: those up to its own index."""
    queries, keys = (torch.arange(size, device=scores.device) for size in scores.shape[-2:])
    return visible(queries, keys, None, True)


def at_least_float32(*tensors: Tensor) -> list[Tensor]:
    """The same numbers, those of half precision in float32."""
    return [each.to(torch.promote_types(each.dtype, torch.float32)) for each in tensors]


def attention_scores(query: Tensor, key: Tensor, mask: Tensor | None, told: Attention) -> Tensor:
    """``scale q k^T + mask``, minus infinity where a key is hidden."""
    query, key = at_least_float32(query, key)
    scores = (query * told.scale) @ key.mT
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.masked_fill(~causal_mask(scores), -torch.inf) if told.is_causal else scores


def attention_weights(scores: Tensor, mask: Tensor | None) -> Tensor:
    """``softmax(scores)`` over the keys, and 0 where the mask hides all of them from a query."""
    weights = scores.softmax(-1)
    if mask is None:
        return weights
    return weights.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)


def _fits_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Any, kept: Any) -> bool:
    """Whether PyTorch's kernel takes them: it has no dropout of ours and no rule for vmap."""
    plain = kept is None and query.device.type in ("cpu", "meta") and not runtime.is_batched()
    sizes = query.dim() == 4 and query.shape[-1] == value.shape[-1]
    return plain and sizes and query.numel() > 0 and key.numel() > 0


def _for_kernel(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A mask as the kernel wants it: added to the scores, of two or four dimensions."""
    if mask is None:
        return None
    mask = mask if mask.dim() in (2, 4) else mask[(None,) * (4 - mask.dim())]
    return additive(mask, query.dtype)


def _dense_rows(heads: Tensor) -> Tensor:
    """A tensor whose last dimension is contiguous, as the kernel reads it.

    A program sees to that by itself.
    """
    return heads if runtime.is_tracing() or heads.stride(-1) == 1 else heads.contiguous()


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, kept: Any, told: Attention
) -> tuple[Tensor, Tensor]:
    if not _fits_kernel(query, key, value, mask, kept):
        return attention_forward(query, key, value, mask, kept, told)
    mask, inputs = _for_kernel(mask, query), map(_dense_rows, (query, key, value))
    return runtime.flash_attention(*inputs, 0.0, told.is_causal, attn_mask=mask, scale=told.scale)


@with_kernel(_flash_forward)
def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, kept: Any, told: Attention
) -> tuple[Tensor, Tensor]:
    """``y = p v``, with ``p [kept] / (1 - dropout_p)`` for p under dropout, and the logsumexp."""
    scores = attention_scores(query, key, mask, told)
    weights = dropped(attention_weights(scores, mask), kept, told)
    (wide,) = at_least_float32(value)
    # What the kernel of the backward pass reads; it takes no dimension of size 0.
    logsumexp = scores.logsumexp(-1) if scores.shape[-1] else scores.sum(-1)
    return (weights @ wide).to(value.dtype), logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)


def dropped(weights: Tensor, kept: Any, told: Attention) -> Tensor:
    """Weights after dropout."""
    return weights if kept is None else torch.where(kept, weights * told.dropped, 0.0)


def _flash_backward(dy: Tensor, told: Attention, *, of_mask: Any, **saved: Any) -> Any:
    (query, key, value), mask = (saved[name] for name in NAMES[:3]), saved.get("attn_mask")
    fits = _fits_kernel(query, key, value, mask, saved.get("kept"))
    if not fits or of_mask is not None or saved.get("dweights") is not None:
        return attention_backward(dy, told, of_mask=of_mask, **saved)
    rows = [_dense_rows(each) for each in (dy, query, key, value, saved["y"])]
    mask = _for_kernel(mask, query)
    grads = runtime.flash_attention_backward(
        *rows, saved["logsumexp"], 0.0, told.is_causal, attn_mask=mask, scale=told.scale
    )
    return dict(zip(NAMES, grads, strict=False))


@with_kernel(_flash_backward)
def attention_backward(
    dy: Tensor,
    told: Attention,
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    y: Tensor,
    logsumexp: Tensor,
    attn_mask: Any = None,
    kept: Any = None,
    dweights: Any = None,
    of_mask: Shape | None = None,
) -> dict[str, Tensor]:
    """The cotangents, from the inputs: the weights are computed again, in float32 at least.

    That of the mask if it has a shape, ``of_mask``, before others were merged into it.

    With ``dp = dy v^T``, the cotangent of the weights after dropout:
    ``ds = p (dp [kept] / (1 - dropout_p) - sum_keys p dp)``, ``dq = scale ds k``,
    ``dk = scale ds^T q``, ``dv = p^T dy``, ``dmask = ds``. Of y and the logsumexp only
    the kernel makes use.
    """
    weights = attention_weights(attention_scores(query, key, attn_mask, told), attn_mask)
    dtype, (query, key, value, dy) = query.dtype, at_least_float32(query, key, value, dy)
    dthrough = dy @ value.mT
    if dweights is not None:
        dthrough = dthrough + dweights
    dweights = dropped(dthrough, kept, told)
    # The kernel's sum of dy y is the same number, with an error that does not cancel.
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
    cotangents = {
        "query": dscores @ key * told.scale,
        "key": dscores.mT @ query * told.scale,
        "value": dropped(weights, kept, told).mT @ dy,
    }
    if of_mask is not None:
        cotangents["attn_mask"] = dscores.sum_to_size(of_mask)
    return {name: each.to(dtype) for name, each in cotangents.items()}


def repeat_heads(heads: Tensor, groups: int) -> Tensor:
    """Each head, of dimension -3, for ``groups`` heads of the queries."""
    if groups == 1:
        return heads
    shape = (*heads.shape[:-2], groups, *heads.shape[-2:])
    return heads.unsqueeze(-3).expand(shape).flatten(-4, -3)


def sum_heads(dheads: Tensor, groups: int) -> Tensor:
    """The pullback of `repeat_heads`."""
    return dheads if groups == 1 else dheads.unflatten(-3, (-1, groups)).sum(-3)


def attention_rule(
    residuals: dict[str, Any],
    dy: Tree,
    told: Attention,
    groups: int,
    form: Form,
    of_mask: Shape | None,
    *,
    params: bool,
    x: bool,
) -> Grads:
    """`attention_backward`, of heads that several queries may share."""
    dparams: Params | None = {} if params else None
    if not x:
        return dparams, None
    if isinstance(dy, tuple):
        dy, residuals["dweights"] = dy
    for name in ("key", "value"):
        residuals[name] = repeat_heads(residuals[name], groups)
    backward = fastest(attention_backward, *tree.leaves((dy, residuals)))
    cotangents = backward(dy, told, of_mask=of_mask, **residuals)
    for name in ("key", "value"):
        cotangents[name] = sum_heads(cotangents[name], groups)
    return dparams, in_form(cotangents, NAMES, form)


def require_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> int:
    """How many heads of the queries share one of the keys; ValueError where shapes do not fit."""
    shapes = f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
    forms = "query (*, L, features), key (*, S, features) and value (*, S, values)"
    alike = min(query.dim(), key.dim()) >= 2 and query.shape[-1] == key.shape[-1]
    require(alike and key.shape[:-1] == value.shape[:-1], f"expects {forms}, {shapes}")
    if query.shape[:-2] == key.shape[:-2]:
        return 1
    shared = enable_gqa and query.dim() >= 3 and key.dim() == query.dim()
    shared = shared and query.shape[:-3] == key.shape[:-3] and key.shape[-3] > 0
    hint = "" if enable_gqa else "; enable_gqa lets queries share heads of keys"
    fits = shared and query.shape[-3] % key.shape[-3] == 0
    require(fits, f"expects {forms}, {shapes}{hint}")
    return query.shape[-3] // key.shape[-3]


def _positions(parts: dict[str, Any], query: Tensor, key: Tensor) -> list[Tensor]:
    """Those of the queries and the keys: what is given, or their indices."""
    return [
        parts.get(name, torch.arange(each.shape[-2], device=each.device))
        for name, each in zip(NAMES[4:], (query, key), strict=True)
    ]


def scaled_dot_product_attention(
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: int | None = None,
    alibi: bool = False,
    need_weights: bool = False,
) -> Layer:
    """``y = softmax(scale query key^T + attn_mask) value``.

    Args:
        dropout_p: the probability that dropout, in training, drops a weight.
        is_causal: whether a query sees only the keys that do not come after it.
        scale: default ``1 / sqrt(features)``.
        enable_gqa: whether the query may have a multiple of the heads of key and value,
            dimension -3, which groups of its heads then share.
        window: a query sees only the keys that are less than this away from it.
        alibi: whether scores fall with the distance of query and key, see `alibi`; the query then
            has heads, in dimension -3.
        need_weights: whether the weights, after dropout, are an output too.

    Inputs:
        x, a tuple ``(query, key, value)`` or ``(query, key, value, attn_mask)``, or a dict with
        these names: query ``(*, L, features)``, key ``(*, S, features)``, value ``(*, S, values)``,
        floating; attn_mask, which broadcasts to ``(*, L, S)``, is bool, True where a query sees a
        key, or is of query's dtype and is added. The dict may have query_positions (L,) and
        key_positions (S,), for is_causal, window and alibi; default the indices. A key when
        ``train=True`` and dropout_p > 0.
    Returns:
        y of shape ``(*, L, values)``, or (y, weights), weights of shape ``(*, L, S)``. A query that
        sees no key has zeros.
    VJP:
        with ``dp = dy value^T`` and ``ds = p (dp - sum dp p)`` for the weights p:
        ``dquery = scale ds key``, ``dkey = scale ds^T query``, ``dvalue = p^T dy``,
        ``dattn_mask = ds``, None for bool.
    Raises:
        ValueError: shapes that do not fit, a dropout_p outside of [0, 1] or a window below 1.
        TypeError: a mask of another dtype.

    Source: ``torch.nn.functional.scaled_dot_product_attention``; Vaswani et al. 2017. PyTorch's
    flash kernels (Dao et al. 2022) are used for x of four dimensions without dropout and weights.

    >>> import funcnet as fn
    >>> layer = fn.scaled_dot_product_attention(is_causal=True)
    >>> value = torch.tensor([[1.0], [3.0]])
    >>> layer.apply({}, (torch.zeros(2, 1), torch.zeros(2, 1), value))[0]
    tensor([[1.],
            [2.]])
    """
    options: Any = {"window": window, "alibi": alibi, "need_weights": need_weights}
    return attention_over(_ALL_HEADS, dropout_p, is_causal, scale, enable_gqa, **options)


_ALL_HEADS = Axis("model", 1, "")


def attention_over(
    heads: Axis,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    *,
    window: int | None,
    alibi: bool,
    need_weights: bool,
) -> Layer:
    """`scaled_dot_product_attention`, where each rank of an axis has some of the heads.

    Its dropout and its biases are those heads' parts of what they are for all heads.
    """
    name = "scaled_dot_product_attention"
    require(0.0 <= dropout_p <= 1.0, f"{name}: dropout_p must be in [0, 1], got {dropout_p}")
    wide = window is None or window >= 1
    require(wide, f"{name}: window must be at least 1, got {window}")

    def declaration(x: Tree) -> dict[str, Param]:
        parts, _ = parts_of(x, NAMES, 3)
        query, key, value = (parts[each] for each in NAMES[:3])
        dtypes = [each.dtype for each in (query, key, value)]
        right = query.is_floating_point() and len({*dtypes}) == 1
        wrong = f"expects query, key and value of one floating dtype, got {dtypes}"
        require(right, wrong, TypeError)
        require_heads(query, key, value, enable_gqa)
        if "attn_mask" in parts:
            shape = (*query.shape[:-1], key.shape[-2])
            require_broadcast("attn_mask", parts["attn_mask"], shape, query.dtype)
        require(not alibi or query.dim() >= 3, f"expects heads, got query {tuple(query.shape)}")
        for which, places in zip(NAMES[4:], (query, key), strict=True):
            positions = parts.get(which)
            if positions is not None:
                shape, wrong = tuple(places.shape[-2:-1]), tree.describe(positions)
                fits = is_index(positions) and positions.shape == shape
                require(fits, f"expects {which} of integers, of shape {shape}, got {wrong}")
        return {}

    def forward(
        params: Params, x: Tree, state: Params, rng: Key, train: bool, axis: BatchAxis | None = None
    ) -> Forward:
        parts, form = parts_of(x, NAMES, 3)
        (query, key, value), given = (parts[each] for each in NAMES[:3]), parts.get("attn_mask")
        groups = require_heads(query, key, value, enable_gqa)
        factor = 1.0 / max(query.shape[-1], 1) ** 0.5 if scale is None else scale
        of_mask = given.shape if given is not None and given.is_floating_point() else None
        by_index = given is None and window is None and not alibi and len(parts) == 3
        told, mask, kept = Attention(factor, is_causal and by_index), given, None
        if not by_index:
            queries, keys = _positions(parts, query, key)
            if is_causal or window is not None:
                mask = both(given, visible(queries, keys, window, is_causal), query.dtype)
            if alibi:
                number = query.shape[-3] * heads.size
                bias = heads.part(alibi_bias(number, queries, keys, query.dtype), -3)
                mask = both(mask, bias, query.dtype)
        if train and rng is not None and dropout_p > 0.0:
            told = told._replace(dropped=1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0)
            shape = (*query.shape[:-1], key.shape[-2])
            whole = f"{name}: expects a part of a batch, (batch, *, L, features)"
            require(axis is None or query.dim() > 2, f"{whole}, got {tuple(query.shape)}")
            places: Any = {} if axis is None else {0: (axis, None)}
            if heads.size > 1:
                places[query.dim() - 3] = heads, None
            start = first_indices(shape, places, query.device)
            kept = random.bernoulli(rng, 1.0 - dropout_p, shape, device=query.device, start=start)
        shared = repeat_heads(key, groups), repeat_heads(value, groups)
        leaves = [each for each in (query, key, value, mask) if each is not None]
        attend = fastest(attention_forward, *leaves)
        y, logsumexp = attend(query, *shared, mask, kept, told)
        saved = {"query": query, "key": key, "value": value, "y": y, "logsumexp": logsumexp}
        saved |= {} if mask is None else {"attn_mask": mask}
        saved |= {} if kept is None else {"kept": kept}
        of_mask = None if of_mask is None else tuple(of_mask)
        pullback = Pullback(attention_rule, saved, (told, groups, form, of_mask))
        if not need_weights:
            return y, pullback, {}
        weights = attention_weights(attention_scores(query, shared[0], mask, told), mask)
        return (y, dropped(weights, kept, told).to(y.dtype)), pullback, {}

    return stateful(
        declare(declaration), forward, keyed=dropout_p > 0.0, name=name, takes_axis=True
    )
