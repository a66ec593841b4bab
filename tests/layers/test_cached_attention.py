"""Decoding token by token: a cache of keys and values gives what the whole sequence gives."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from layers.oracle import assert_near, randn

import funcnet as fn

TOKENS = 5
X = randn(2, TOKENS, 8)
OPTIONS = {"batch_first": True, "is_causal": True}


def pair(**options):
    """``(whole, cached, params, state)``: a layer without a cache and one with it."""
    whole = fn.multihead_attention(4, **OPTIONS, **options)
    cached = fn.multihead_attention(4, cache=TOKENS + 1, **OPTIONS, **options)
    return whole, cached, *cached.init(fn.key(0), X[:, :1])


def decoded(layer, params, state, pieces):
    made = []
    for piece in pieces:
        y, state = layer.apply(params, piece, state)
        made.append(y)
    return torch.cat(made, 1), state


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=5),
    st.sampled_from([{}, {"num_kv_heads": 2}, {"num_kv_heads": 1, "window": 2}, {"bias": False}]),
)
def test_any_split_of_the_tokens_gives_what_the_whole_gives(sizes, options):
    whole, cached, params, state = pair(**options)
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes)) if sum(sizes[:index]) < TOKENS]
    pieces = torch.tensor_split(X, [end for end in ends if end < TOKENS], 1)
    y, state = decoded(cached, params, state, pieces)
    assert_near(y, whole.apply(params, X)[0])
    assert int(state["positions"]["length"]) == TOKENS


def decoder(cache):
    layer = fn.transformer_encoder_layer(
        2, 6, 0.0, "gelu", batch_first=True, norm_first=True, is_causal=True, cache=cache
    )
    return fn.transformer_encoder(layer, 2, fn.layer_norm())


def test_a_stack_decodes_what_it_gives_for_the_whole_sequence():
    whole, cached = decoder(None), decoder(TOKENS)
    params, state = cached.init(fn.key(0), X)
    y, _ = decoded(cached, params, state, X.split([2, 1, 2], 1))
    assert_near(y, whole.apply(params, X)[0])


def test_one_program_decodes_every_token_and_a_full_cache_gives_nan():
    whole, cached, params, state = pair(num_kv_heads=2)
    traces = []

    def run(params, x, state):
        traces.append(x.shape)
        return cached.apply(params, x, state)

    step = fn.jit(run, donate=2)
    expected, made = whole.apply(params, X)[0], []
    state = fn.tree.map(torch.clone, state)
    for token in range(TOKENS + 2):
        x = X[:, token % TOKENS, None].clone()
        y, state = step(params, x, state)
        made.append(y)
    assert len(traces) == 1
    assert_near(torch.cat(made[:TOKENS], 1), expected)
    assert made[TOKENS].isfinite().all()
    assert made[TOKENS + 1].isnan().all()


def test_a_scan_decodes_the_tokens():
    whole, cached, params, state = pair(window=3)

    def run(params, x, state):
        def step(state, token):
            y, state = cached.apply(params, token, state)
            return state, y

        return fn.scan(step, state, x)

    tokens = X.transpose(0, 1)[:, :, None].contiguous()
    expected = whole.apply(params, X)[0]
    for transform in (lambda f: f, fn.jit):
        _, y = transform(run)(params, tokens, state)
        assert_near(y[:, :, 0].transpose(0, 1), expected)


def of_member(tree, member):
    return fn.tree.map(lambda leaf: leaf[member], tree)


def test_members_of_a_population_decode_as_alone():
    _, cached, *_ = pair()
    keys = fn.random.split(fn.key(1), 3)
    params, state = fn.vmap(lambda key: cached.init(key, X[:, :1]))(keys)

    def run(params, state):
        _, state = cached.apply(params, X[:, :2], state)
        return cached.apply(params, X[:, 2:4], state)

    together = fn.vmap(run)(params, state)
    for member in range(3):
        alone = run(*of_member((params, state), member))
        assert_near(of_member(together, member), alone)


def test_a_full_cache_is_an_error_and_leaves_the_state():
    _, cached, params, state = pair()
    _, state = cached.apply(params, X, state)
    before = fn.tree.map(torch.clone, state)
    told = r"multihead_attention\['positions'\] cache: has 5 of at most 6 tokens, 2 more do not fit"
    with pytest.raises(ValueError, match=told):
        cached.apply(params, X[:, :2], state)
    assert_near(state, before, 0.0)


def test_a_cache_is_of_one_batch():
    _, cached, params, state = pair()
    with pytest.raises(ValueError, match=r"\['cache'\].*expects a key of shape \(1, 4, 6, 2\)"):
        cached.apply(params, X[:1], state)


@pytest.mark.parametrize("index", [5, -1])
def test_a_token_that_no_row_has_is_an_error_eager_and_compiled(index):
    net = fn.serial(fn.embedding(5, 4), fn.multihead_attention(2, **OPTIONS))
    tokens = torch.tensor([[0, 4]])
    params, _ = net.init(fn.key(0), tokens)
    compiled = fn.jit(lambda params, tokens: net.apply(params, tokens)[0])
    assert_near(compiled(params, tokens), net.apply(params, tokens)[0])
    wrong = torch.tensor([[0, index]])
    with pytest.raises(ValueError, match=r"\['0'\] embedding: expects indices in \[0, 5\)"):
        net.apply(params, wrong)
    with pytest.raises(RuntimeError, match="out of bounds: expected 0 <= index < 5"):
        compiled(params, wrong)
