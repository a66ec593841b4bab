"""Attention and the Transformer, with inputs to check them on."""

import torch

import funcnet as fn

DOUBLE = torch.float64


def draw(seed, *shape):
    return fn.random.normal(fn.key(seed), shape, DOUBLE)


BATCH, TOKENS, OTHERS, FEATURES = 2, 3, 4, 4
QUERY, KEY, VALUE = (
    draw(40 + i, BATCH, 2, size, 3) for i, size in enumerate((TOKENS, OTHERS, OTHERS))
)
ADDED = draw(43, TOKENS, OTHERS)
# The first token of the second sequence sees nothing.
SEEN = torch.tensor([[[1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 1]], [[0] * 4, [1] * 4, [0, 0, 1, 1]]])
SEEN = SEEN.bool()[:, None]
X = draw(44, TOKENS, BATCH, FEATURES)
MEMORY = draw(45, OTHERS, BATCH, FEATURES)
PADDED = torch.tensor([[False, False, True], [False] * 3])
HIDDEN = torch.ones(TOKENS, TOKENS).triu(1).bool()
PARTS = {"query": X, "key": MEMORY, "value": draw(46, OTHERS, BATCH, FEATURES)}

ATTENTION = {
    "scaled_dot_product_attention": (
        fn.scaled_dot_product_attention(0.3, need_weights=True),
        (QUERY, KEY, VALUE, ADDED),
    ),
    "attention is causal": (
        fn.scaled_dot_product_attention(is_causal=True, scale=0.7),
        (QUERY, KEY, VALUE),
    ),
    "attention of a mask": (fn.scaled_dot_product_attention(), (QUERY, KEY, VALUE, SEEN)),
    "attention of an added mask": (
        fn.scaled_dot_product_attention(is_causal=True),
        (QUERY, KEY, VALUE, draw(47, BATCH, 1, 1, OTHERS)),
    ),
    "attention in a window": (
        fn.scaled_dot_product_attention(is_causal=True, window=2),
        {
            "query": QUERY,
            "key": KEY,
            "value": VALUE,
            "attn_mask": ADDED,
            "query_positions": torch.arange(1, 4),
            "key_positions": torch.arange(OTHERS),
        },
    ),
    "attention of groups": (
        fn.scaled_dot_product_attention(0.3, enable_gqa=True),
        (draw(48, BATCH, 4, TOKENS, 3), KEY, VALUE),
    ),
    "attention of matrices": (
        fn.scaled_dot_product_attention(need_weights=True),
        (QUERY[0, 0], KEY[0, 0], draw(49, OTHERS, 2)),
    ),
}

MULTIHEAD = {
    "multihead_attention": (fn.multihead_attention(2, 0.3), X),
    "multihead_attention with weights": (
        fn.multihead_attention(2, 0.3, need_weights=True),
        {**PARTS, "attn_mask": ADDED, "key_padding_mask": draw(50, BATCH, OTHERS)},
    ),
    "multihead_attention of extra keys": (
        fn.multihead_attention(
            2,
            add_bias_kv=True,
            add_zero_attn=True,
            need_weights=True,
            average_attn_weights=False,
        ),
        {"query": X, "key_padding_mask": PADDED, "attn_mask": draw(51, BATCH * 2, TOKENS, TOKENS)},
    ),
    "multihead_attention of sizes": (
        fn.multihead_attention(2, bias=False, kdim=3, vdim=5, batch_first=True),
        (X, draw(52, TOKENS, OTHERS, 3), draw(53, TOKENS, OTHERS, 5)),
    ),
    "multihead_attention of a key": (fn.multihead_attention(2, add_bias_kv=True), (X, MEMORY)),
    "multihead_attention of a sequence": (
        fn.multihead_attention(2),
        (X[:, 0], None, None, PADDED[0], HIDDEN),
    ),
    "multihead_attention of groups": (
        fn.multihead_attention(4, batch_first=True, num_kv_heads=2, is_causal=True, window=2),
        X,
    ),
    "multihead_attention of extra keys, causal": (
        fn.multihead_attention(2, add_zero_attn=True, is_causal=True, window=2),
        X,
    ),
    "multihead_attention with a cache": (
        fn.multihead_attention(2, num_kv_heads=1, batch_first=True, is_causal=True, cache=4),
        X,
    ),
}

TRANSFORMER = {
    "transformer_encoder_layer": (fn.transformer_encoder_layer(2, 5), X),
    "transformer_encoder_layer of a GPT": (
        fn.transformer_encoder_layer(
            *(2, 5, 0.0, fn.gelu("tanh"), 1e-3, True, True), is_causal=True, cache=4
        ),
        X,
    ),
    "transformer_decoder_layer": (
        fn.transformer_decoder_layer(2, 5, norm_first=True, tgt_is_causal=True),
        {"tgt": X, "memory": MEMORY, "memory_mask": ADDED, "tgt_key_padding_mask": PADDED},
    ),
    "transformer_encoder": (
        fn.transformer_encoder(
            fn.transformer_encoder_layer(2, 5, 0.0, "gelu", norm_first=True, bias=False),
            num_layers=2,
            norm=fn.layer_norm(),
        ),
        {"src": X, "mask": draw(55, TOKENS, TOKENS), "src_key_padding_mask": None},
    ),
    "transformer_decoder": (
        fn.transformer_decoder(fn.transformer_decoder_layer(2, 5, 0.0), 2),
        (X, MEMORY, draw(56, TOKENS, TOKENS)),
    ),
    "transformer": (
        fn.transformer(2, 1, 1, 5, 0.0, tgt_is_causal=True),
        {
            "src": X,
            "tgt": MEMORY,
            "memory_mask": draw(57, OTHERS, TOKENS),
            "src_key_padding_mask": PADDED,
            "memory_key_padding_mask": PADDED,
        },
    ),
}

LAYERS = {
    "linear of another's size": (fn.linear(None), (draw(58, 5, 3), draw(59, 2, 4))),
    "linear of the size of indices": (
        fn.linear(None, bias=False),
        (draw(58, 5, 3), torch.zeros(2, 4, dtype=torch.int64)),
    ),
    **ATTENTION,
    **MULTIHEAD,
    **TRANSFORMER,
}
