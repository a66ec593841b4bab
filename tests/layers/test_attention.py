"""Attention held to torch's function; its masks, windows, groups of heads, cache and errors."""

import pytest
import torch
from layers.oracle import TOLERANCE, assert_near, autograd, cotangent, randn
from torch.nn import functional as F

import funcnet as fn

QUERY, KEY, VALUE = randn(2, 4, 3, 5), randn(2, 4, 6, 5, seed=1), randn(2, 4, 6, 5, seed=2)
SEEN = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()


def sdpa(x, **options):
    given = [*x] if isinstance(x, tuple) else [x[name] for name in ("query", "key", "value")]
    return F.scaled_dot_product_attention(*given, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("x", "options"),
    [
        ((QUERY, KEY, VALUE), {}),
        ((QUERY, KEY, VALUE), {"scale": 0.3}),
        ((QUERY, KEY, VALUE), {"is_causal": True}),
        ((KEY, QUERY, VALUE[:, :, :3]), {"is_causal": True, "scale": 2.0}),
        ((QUERY, KEY, VALUE, SEEN), {}),
        ((QUERY, KEY, VALUE, SEEN[None, None].repeat(2, 1, 1, 1)), {}),
        ((QUERY, KEY, VALUE, randn(3, 6, seed=3)), {}),
        ((QUERY, KEY, VALUE, randn(2, 1, 1, 6, seed=3)), {"scale": 0.3}),
        ((QUERY, KEY[:, :2], VALUE[:, :2]), {"enable_gqa": True}),
        ((QUERY, KEY[:, :1], VALUE[:, :1], SEEN), {"enable_gqa": True}),
        ((QUERY, KEY[:, :2], VALUE[:, :2]), {"enable_gqa": True, "is_causal": True}),
        ((QUERY[0], KEY[0], VALUE[0, ..., :2]), {}),
        ((QUERY[0, 0], KEY[0, 0], VALUE[0, 0]), {"is_causal": True}),
        ((QUERY[:0], KEY[:0], VALUE[:0]), {}),
    ],
)
def test_it_is_torchs_function(x, options, dtype):
    x = fn.tree.map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, x)
    names = ("query", "key", "value", "attn_mask")[: len(x)]
    layer = fn.scaled_dot_product_attention(**options)

    def theirs(params, x):
        return sdpa(x[:3], attn_mask=x[3] if len(x) > 3 else None, **options)

    y, pullback, _ = layer.vjp({}, x)
    dy = cotangent(y)
    expected, _, dexpected = autograd(theirs, {}, x, dy)
    tolerance = 5 * TOLERANCE[dtype] if dtype == torch.bfloat16 else TOLERANCE[dtype]
    assert_near(y, expected, tolerance)
    assert_near(pullback(dy)[1], dexpected, tolerance)
    by_name = layer.vjp({}, dict(zip(names, x, strict=True)))
    assert torch.equal(by_name[0], y)
    assert_near(by_name[1](dy)[1], dict(zip(names, pullback(dy)[1], strict=True)), 0.0)


def test_the_weights_are_an_output_after_dropout():
    layer = fn.scaled_dot_product_attention(0.5, need_weights=True)
    y, weights = layer.apply({}, (QUERY, KEY, VALUE), key=fn.key(0), train=True)[0]
    assert_near(y, weights @ VALUE)
    assert 0.3 < float((weights == 0).double().mean()) < 0.7
    kept = weights != 0
    _, all_weights = layer.apply({}, (QUERY, KEY, VALUE))[0]
    assert_near(all_weights.sum(-1), torch.ones(2, 4, 3, dtype=torch.float64))
    assert_near(weights[kept], 2 * all_weights[kept])


def test_half_precision_has_weights_that_sum_to_1_and_gradients_as_near_as_torchs():
    x = tuple(4 * leaf for leaf in (QUERY, KEY, VALUE, randn(3, 6, seed=3)))
    half = fn.tree.map(torch.Tensor.bfloat16, x)
    layer = fn.scaled_dot_product_attention(need_weights=True)
    (_, weights), pullback, _ = layer.vjp({}, half)
    assert_near(weights.sum(-1), torch.ones(2, 4, 3).bfloat16(), 1e-2)
    dy = cotangent(QUERY).bfloat16()
    _, dx = pullback((dy, torch.zeros_like(weights)))

    def theirs(params, x):
        return sdpa(x[:3], attn_mask=x[3])

    wide = fn.tree.map(torch.Tensor.double, half)
    exact, rounded = [autograd(theirs, {}, x, dy.to(x[0].dtype))[2] for x in (wide, half)]
    for ours, their, truth in zip(dx, rounded, exact, strict=True):
        assert (ours - truth).norm() < 1.1 * (their - truth).norm()


def test_dropout_of_all_weights_gives_zeros():
    layer = fn.scaled_dot_product_attention(1.0)
    y, pullback, _ = layer.vjp({}, (QUERY, KEY, VALUE), key=fn.key(0))
    assert not y.any()
    assert not any(leaf.any() for leaf in pullback(torch.ones_like(y))[1])


def test_a_window_hides_what_is_as_far_away():
    x = QUERY, KEY, VALUE
    distance = torch.arange(3)[:, None] - torch.arange(6)
    for is_causal in (False, True):
        seen = (distance.abs() < 2) & ((distance >= 0) | (not is_causal))
        y, _ = fn.scaled_dot_product_attention(is_causal=is_causal, window=2).apply({}, x)
        assert_near(y, sdpa(x, attn_mask=seen))


def test_positions_say_what_comes_after_what():
    order = torch.tensor([4, 1, 2])
    x = {"query": QUERY, "key": KEY, "value": VALUE}
    y, _ = fn.scaled_dot_product_attention(is_causal=True).apply({}, x | {"query_positions": order})
    assert_near(y, sdpa(x, attn_mask=order[:, None] >= torch.arange(6)))


def test_a_mask_and_causality_hide_together():
    x = QUERY, KEY, VALUE
    causal = torch.ones(3, 6).tril().bool()
    added = randn(3, 6, seed=3)
    layer = fn.scaled_dot_product_attention(is_causal=True)
    assert_near(layer.apply({}, (*x, SEEN))[0], sdpa(x, attn_mask=SEEN & causal).nan_to_num())
    y, pullback, _ = layer.vjp({}, (*x, added))
    hidden = added.masked_fill(~causal, -torch.inf)
    assert_near(y, sdpa(x, attn_mask=hidden))
    assert not pullback(torch.ones_like(y))[1][3][~causal].any()


def test_groups_of_heads_are_heads_that_are_repeated():
    grouped = fn.multihead_attention(4, num_kv_heads=2, batch_first=True)
    whole = fn.multihead_attention(4, batch_first=True)
    x, sizes = randn(2, 3, 8), (8, 4, 4)
    params, _ = grouped.init(fn.key(0), x)

    def repeated(params):
        def each(leaf):
            query, *kinds = leaf.split(sizes)
            heads = [kind.unflatten(0, (2, 2)).repeat_interleave(2, 0) for kind in kinds]
            return torch.cat([query, *[kind.flatten(0, 1) for kind in heads]])

        projection = {name: each(leaf) for name, leaf in params.items() if name != "out_proj"}
        return {**projection, "out_proj": params["out_proj"]}

    y, pullback, _ = grouped.vjp(params, x)
    dy = cotangent(y)
    expected = autograd(lambda p, x: whole.apply(repeated(p), x)[0], params, x, dy)
    assert_near(y, expected[0])
    assert_near(pullback(dy), expected[1:])


def hidden_rows(kind):
    """A mask, of bool or added, that hides all keys from the second query of the first example."""
    seen = SEEN[None, None].repeat(2, 1, 1, 1)
    seen[0, 0, 1] = False
    return seen if kind == "bool" else randn(2, 1, 3, 6, seed=3).masked_fill(~seen, -torch.inf)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_query_that_sees_no_key_has_zeros_and_no_gradient(compiled):
    x = QUERY, KEY, VALUE
    cases = {
        f"{kind} {need_weights} {dropout_p}": (
            fn.scaled_dot_product_attention(dropout_p, need_weights=need_weights),
            (*x, hidden_rows(kind)),
        )
        for kind in ("bool", "added")
        for need_weights in (False, True)
        for dropout_p in (0.0, 0.5)
    }

    def run(xs):
        results = {}
        for name, (layer, _) in cases.items():
            y, pullback, _ = layer.vjp({}, xs[name], key=fn.key(0))
            results[name] = y, pullback(fn.tree.map(torch.ones_like, y))[1]
        return results

    xs = {name: x for name, (_, x) in cases.items()}
    results = (fn.jit(run) if compiled else run)(xs)
    assert all(bool(leaf.isfinite().all()) for leaf in fn.tree.leaves(results))
    for y, (dquery, *_, dmask) in results.values():
        for leaf in (*fn.tree.leaves(y), dquery, *([] if dmask is None else [dmask])):
            assert not leaf[0, :, 1].any()
            assert leaf[1].any()
    if compiled:
        assert_near(results, run(xs))


def test_padding_of_a_whole_sequence_gives_the_bias_of_the_projection():
    x = randn(3, 2, 4)
    layer = fn.multihead_attention(2)
    params, _ = layer.init(fn.key(0), x)
    params["out_proj"]["bias"] = randn(4, seed=1)
    padded = torch.tensor([[True] * 3, [False] * 3])
    y, pullback, _ = layer.vjp(params, {"query": x, "key_padding_mask": padded})
    assert_near(y[:, 0], params["out_proj"]["bias"].expand(3, 4))
    dparams, dx = pullback(torch.ones_like(y))
    assert not dx["query"][:, 0].any()
    assert all(bool(leaf.isfinite().all()) for leaf in fn.tree.leaves((dparams, dx["query"])))


X = randn(2, 3, 4)
ATTEND = fn.scaled_dot_product_attention()
CACHED = {"batch_first": True, "is_causal": True, "cache": 4}
BAD = [
    (fn.multihead_attention(3), X, r"a number of features that 3 heads divide, got 4"),
    (fn.multihead_attention(2), X[0, 0], r"inputs of shape \(tokens, batch, features\)"),
    (fn.multihead_attention(2), X.long(), "one floating dtype, got"),
    (fn.multihead_attention(2), (X, X.float()), "one floating dtype, got"),
    (fn.multihead_attention(2), (X, X[:, :2]), "inputs of one batch"),
    (fn.multihead_attention(2), (X, X, X[:1]), "as many keys as values"),
    (fn.multihead_attention(2), (X, X, X[:, 0]), "inputs of shape"),
    (fn.multihead_attention(2, kdim=3), X, "kdim=3 features, got"),
    (fn.multihead_attention(2), {"query": X, "attn_mask": SEEN}, r"attn_mask of shape \(2, 2\)"),
    (fn.multihead_attention(2), (X, X, X, SEEN), r"key_padding_mask of shape \(3, 2\), got"),
    (fn.multihead_attention(2), (*[X] * 4, SEEN[:2, :2].long()), "key_padding_mask of shape"),
    (fn.multihead_attention(2), (*[X] * 3, None, SEEN[:2, :2].long()), "attn_mask of bool"),
    (fn.multihead_attention(2), {"query": X, "mask": SEEN}, "a dict with 'query', and maybe"),
    (fn.multihead_attention(2), (None, X), r"expects query, got None"),
    (fn.multihead_attention(2), (X, "keys"), "expects tensors, got"),
    (fn.multihead_attention(2), (X,) * 6, "a tuple of 1 to 5"),
    (fn.multihead_attention(2, **CACHED), {"query": X, "attn_mask": X[0]}, "a query alone, got"),
    (fn.multihead_attention(2, **CACHED), (X, X), "a query alone, got"),
    (fn.multihead_attention(2, **CACHED), randn(2, 5, 4), "0 of at most 4 tokens, 5 more do not"),
    (fn.multihead_attention(2, **CACHED), X[:, :0], "expects at least one token"),
    (ATTEND, (X, X[..., :3], X), "query .*, key .* and value"),
    (ATTEND, (X, X[:, :2], X), "query .*, key .* and value"),
    (ATTEND, (QUERY, KEY[:, :2], VALUE[:, :2]), "enable_gqa lets queries share heads"),
    (
        fn.scaled_dot_product_attention(enable_gqa=True),
        (QUERY, KEY[:, :3], VALUE[:, :3]),
        "query .*, key .* and value",
    ),
    (ATTEND, (X, X, X, SEEN), r"attn_mask that broadcasts to \(2, 3, 3\), got \(3, 6\)"),
    (ATTEND, (X, X, X, SEEN[:, :3].float()), "attn_mask of bool, or of torch.float64"),
    (ATTEND, (X, X), "a tuple of 3 to 6"),
    (
        ATTEND,
        {"query": X, "key": X, "value": X, "key_positions": torch.arange(2)},
        r"key_positions of integers, of shape \(3,\), got int64 \(2,\)",
    ),
    (fn.linear(None), X, r"a tuple \(x, other\) of tensors, got float64"),
    (fn.linear(None), (X, None), r"a tuple \(x, other\) of tensors, got"),
    (fn.linear(None), (X, X.sum()), "at least one dimension of other"),
    (fn.transformer_encoder_layer(2), (X,) * 4, "a tuple of 1 to 3"),
    (fn.transformer_decoder_layer(2), X, r"a tuple \(tgt, memory"),
    (fn.transformer_decoder_layer(2), {"tgt": X}, "a dict with 'tgt' and 'memory'"),
    (fn.transformer_decoder_layer(2), (X, X[:, :1]), "inputs of one batch"),
    (fn.transformer(2, 1, 1), X, r"a tuple \(src, tgt"),
    (fn.transformer(2, 1, 1), (X, None), "src and tgt, got None for"),
]


@pytest.mark.parametrize(("layer", "x", "told"), BAD)
def test_an_x_that_does_not_fit_is_refused_by_name(layer, x, told):
    with pytest.raises((ValueError, TypeError), match=rf"{layer.name}.*{told}"):
        layer.apply(*made_of(layer, x))


def made_of(layer, x):
    """``(params, x, state)``: those of a smaller x for one that a cache has no room for."""
    fits = x[:, :2] if isinstance(x, torch.Tensor) and x.shape[1:2] == (5,) else x
    params, state = layer.init(fn.key(0), fits)
    return params, x, state


@pytest.mark.parametrize(
    ("constructor", "options", "told"),
    [
        ("multihead_attention", {"num_heads": 0}, "num_heads must be"),
        ("multihead_attention", {"num_heads": 1.5}, "num_heads must be"),
        ("multihead_attention", {"num_heads": 2, "dropout": 1.5}, "dropout must be"),
        ("multihead_attention", {"num_heads": 2, "num_kv_heads": 3}, "num_kv_heads must divide 2"),
        ("multihead_attention", {"num_heads": 2, "num_kv_heads": 0}, "num_kv_heads must divide 2"),
        ("multihead_attention", {"num_heads": 2, "cache": 3}, "with is_causal=True"),
        ("multihead_attention", {"num_heads": 2, "cache": 0, "is_causal": True}, "at least 1"),
        (
            "multihead_attention",
            {"num_heads": 2, "cache": 3, "is_causal": True, "add_zero_attn": True},
            "neither add_bias_kv nor add_zero_attn",
        ),
        ("multihead_attention", {"num_heads": 2, "window": 0}, "window must be at least 1"),
        ("multihead_attention", {"num_heads": 2, "rotary": 1}, "expects a Layer"),
        ("scaled_dot_product_attention", {"dropout_p": -0.1}, "dropout_p must be"),
        ("scaled_dot_product_attention", {"window": 0}, "window must be at least 1"),
        ("transformer_encoder_layer", {"nhead": 2, "activation": "tanh"}, "activation must be"),
        ("transformer_encoder", {"encoder_layer": 3, "num_layers": 2}, "expects a Layer"),
        (
            "transformer_decoder",
            {"decoder_layer": fn.identity(), "num_layers": 0},
            "num_layers must be at least 1",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(constructor, options, told):
    with pytest.raises((ValueError, TypeError), match=told):
        getattr(fn, constructor)(**options)


def test_an_error_in_a_stack_has_its_path():
    net = fn.transformer(2, 1, 2, 5)
    params, _ = net.init(fn.key(0), (X, X))
    path = r"transformer\['decoder'\] .*layers\['0'\] .*\['multihead_attn'\] multihead_attention: "
    with pytest.raises(ValueError, match=path + r"expects attn_mask of shape \(2, 2\)"):
        net.apply(params, {"src": X, "tgt": X, "memory_mask": SEEN})
