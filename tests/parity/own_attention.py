"""Our own cases of attention and the Transformer: options, masks, and forms of input."""

import torch
from torch.nn import functional as F

from tests.parity.draws import Case, Draw, Nested, case, normal

TGT, SRC = (3, 2, 4), (5, 2, 4)
NET = (4, 2, 5, 0.0)
"""d_model, nhead, dim_feedforward and dropout."""


def hidden(*shape: int) -> Draw:
    """A mask that hides some keys, and never the first one."""
    is_later = torch.arange(shape[-1]) > 0
    return Draw(lambda rng, dtype: (normal(*shape).make(rng, dtype) > 0.3) & is_later)


def causal(size: int) -> Draw:
    """A mask that hides the keys that come after a query."""
    return Draw(lambda rng, dtype: torch.ones(size, size, dtype=torch.bool).triu(1))


def nothing(*shape: int) -> Draw:
    """A mask that hides all keys from the first queries."""
    is_first = torch.arange(shape[0])[:, None] == 0
    return Draw(lambda rng, dtype: hidden(*shape).make(rng, dtype) | is_first)


def multihead() -> list[Case]:
    inputs = [TGT, SRC, SRC]
    found = [case(4, 2, x=inputs), case(4, 1, 0.3, x=inputs), case(4, 4, 0.0, False, x=inputs)]
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}, {"bias": False}):
        for forward in (
            {"need_weights": False},
            {"average_attn_weights": False},
            {"attn_mask": hidden(3, 5), "key_padding_mask": hidden(2, 5)},
            {"attn_mask": normal(4, 3, 5), "need_weights": False},
        ):
            found.append(case(4, 2, x=inputs, forward=forward, **options))
    return [
        *found,
        case(4, 2, kdim=3, vdim=6, x=[TGT, (5, 2, 3), (5, 2, 6)]),
        case(4, 2, 0.0, True, True, True, 3, 4, True, x=[(2, 3, 4), (2, 5, 3), (2, 5, 4)]),
        case(4, 2, batch_first=True, x=[(2, 3, 4), (2, 5, 4), (2, 5, 4)]),
        case(4, 2, x=[(3, 4), (5, 4), (5, 4)], forward={"attn_mask": normal(2, 3, 5)}),
        case(4, 2, x=[(3, 4), (5, 4), (5, 4)], forward={"key_padding_mask": normal(5)}),
        case(4, 2, x=[TGT] * 3, forward={"attn_mask": causal(3), "is_causal": True}),
        case(
            *(4, 2),
            x=[TGT] * 3,
            forward={"attn_mask": causal(3), "is_causal": True, "need_weights": False},
        ),
        case(4, 2, x=inputs, forward={"attn_mask": nothing(3, 5)}),
        case(4, 2, x=inputs, forward={"key_padding_mask": nothing(2, 5)}),
        case(4, 2, x=[(3, 0, 4), (5, 0, 4), (5, 0, 4)]),
    ]


def blocks(inputs: list[tuple[int, ...]], masks: dict[str, Draw]) -> list[Case]:
    """Layers with each option, without masks and with them."""
    unbatched = [(size, features) for size, _, features in inputs]
    return [
        case(4, 2, 5, x=inputs),
        case(*NET, F.gelu, 1e-2, False, True, False, x=inputs, forward=masks),
        case(*NET, "gelu", x=inputs),
        case(*NET, norm_first=True, x=inputs, forward=masks),
        case(*NET, batch_first=True, x=[(2, each[0], 4) for each in inputs], forward=masks),
        case(*NET, bias=False, layer_norm_eps=1e-2, x=inputs),
        case(*NET, x=unbatched),
    ]


ENCODER = {"src_key_padding_mask": hidden(2, 5)}
DECODER = {
    "tgt_mask": normal(3, 3),
    "memory_mask": hidden(3, 5),
    "memory_key_padding_mask": hidden(2, 5),
}
ENCODER_LAYER = Nested("TransformerEncoderLayer", (*NET, "gelu", 1e-3))
DECODER_LAYER = Nested("TransformerDecoderLayer", (*NET, F.relu, 1e-3, True, True, False))
NORM = Nested("LayerNorm", (4, 1e-3))
BOTH = (TGT[1], TGT[0], 4), (SRC[1], SRC[0], 4)

ATTENTION = {
    "MultiheadAttention": multihead(),
    "TransformerEncoderLayer": [
        *blocks([SRC], ENCODER | {"src_mask": normal(5, 5)}),
        # In a copy of torch's decoder layer a module as activation has become relu.
        case(*NET, Nested("SiLU"), x=SRC),
        case(*NET, x=SRC, forward={"src_mask": causal(5), "is_causal": True}),
        case(*NET, x=SRC, forward={"src_key_padding_mask": nothing(2, 5)}),
    ],
    "TransformerDecoderLayer": [
        *blocks([TGT, SRC], DECODER),
        case(*NET, x=[TGT, SRC], forward={"tgt_mask": causal(3), "tgt_is_causal": True}),
    ],
    "TransformerEncoder": [
        case(ENCODER_LAYER, 2, x=SRC),
        case(ENCODER_LAYER, 1, NORM, False, x=SRC, forward=ENCODER | {"mask": normal(5, 5)}),
        case(ENCODER_LAYER, 2, NORM, x=SRC, forward={"mask": causal(5), "is_causal": True}),
        case(ENCODER_LAYER, 1, None, True, x=SRC),
        case(ENCODER_LAYER, 1, mask_check=True, x=SRC),
    ],
    "TransformerDecoder": [
        case(DECODER_LAYER, 2, x=[*BOTH]),
        case(DECODER_LAYER, 1, NORM, x=[*BOTH], forward=DECODER),
        case(DECODER_LAYER, 2, x=[*BOTH], forward={"tgt_mask": causal(3), "tgt_is_causal": True}),
    ],
    "Transformer": [
        case(4, 2, 1, 2, 5, x=[SRC, TGT]),
        case(
            4, 2, 1, 1, 5, 0.0, F.gelu, x=[SRC, TGT], forward={"src_mask": hidden(5, 5), **DECODER}
        ),
        case(4, 2, 2, 1, 5, 0.0, "relu", None, None, 1e-2, True, True, False, x=[*BOTH[::-1]]),
        case(
            *(4, 2, 1, 1, 5, 0.0),
            x=[SRC, TGT],
            forward={"tgt_mask": causal(3), "tgt_is_causal": True, **ENCODER},
        ),
        case(
            *(4, 2),
            custom_encoder=Nested("TransformerEncoder", (ENCODER_LAYER, 1)),
            custom_decoder=Nested(
                "TransformerDecoder", (Nested("TransformerDecoderLayer", NET), 1)
            ),
            x=[SRC, TGT],
        ),
        case(4, 2, 1, 1, 5, 0.0, x=[(5, 4), (3, 4)]),
    ],
}
