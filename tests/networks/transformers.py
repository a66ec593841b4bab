"""Networks with attention as funcnet's users write them; their twins are in `transformer_twins`."""

from typing import Any

import torch
from torch import Tensor

import funcnet as fn

DOUBLE = torch.float64


def positions_rule(residuals: Any, dy: Tensor, max_len: int, *, params: bool, x: bool) -> Any:
    """``dweight[p] = sum of dy at position p``, ``dx = dy``."""
    dparams = None
    if params:
        rows = dy.sum(0)
        dparams = {"weight": torch.cat([rows, rows.new_zeros(max_len - len(rows), rows.shape[1])])}
    return dparams, dy if x else None


def positions(max_len: int) -> fn.Layer:
    """``y = x + weight``, a learned row for each position of a batch of sequences."""

    @fn.declare
    def init(x: Tensor) -> dict[str, fn.Param]:
        return {"weight": fn.Param((max_len, x.shape[-1]), fn.initializers.normal(0.02))}

    def apply(params: Any, x: Tensor) -> Tensor:
        return x + params["weight"][: x.shape[1]]

    def vjp(params: Any, x: Tensor) -> tuple[Tensor, fn.Pullback]:
        return apply(params, x), fn.Pullback(positions_rule, {}, (max_len,))

    return fn.stateless(init, apply, vjp)


def class_token_rule(residuals: Any, dy: Tensor, *, params: bool, x: bool) -> Any:
    """``dweight = sum dy`` of the first token, ``dx = dy`` of the others."""
    return {"weight": dy[:, :1].sum(0)} if params else None, dy[:, 1:] if x else None


def class_token() -> fn.Layer:
    """A learned token before those of each sequence."""

    @fn.declare
    def init(x: Tensor) -> dict[str, fn.Param]:
        return {"weight": fn.Param((1, x.shape[-1]), fn.initializers.normal(0.02))}

    def apply(params: Any, x: Tensor) -> Tensor:
        return torch.cat([params["weight"].expand(len(x), 1, -1), x], 1)

    def vjp(params: Any, x: Tensor) -> tuple[Tensor, fn.Pullback]:
        return apply(params, x), fn.Pullback(class_token_rule, {})

    return fn.stateless(init, apply, vjp)


def gpt(
    vocabulary: int = 512,
    width: int = 128,
    heads: int = 4,
    layers: int = 4,
    length: int = 64,
    dtype: torch.dtype = DOUBLE,
) -> fn.Layer:
    """The architecture of GPT-2: logits of the next token of each, (batch, tokens, vocabulary)."""
    block = fn.transformer_encoder_layer(
        *(heads, 4 * width, 0.0, fn.gelu("tanh")),
        batch_first=True,
        norm_first=True,
        is_causal=True,
    )
    net = fn.serial(
        embedding=fn.embedding(vocabulary, width, dtype=dtype),
        positions=positions(length),
        blocks=fn.transformer_encoder(block, layers, fn.layer_norm()),
        head=fn.linear(vocabulary, bias=False),
    )
    return fn.tie(net, {"head.weight": "embedding.weight"})


def language_model(**options: int) -> fn.Layer:
    """`gpt`, with the classes where `cross_entropy` has them."""
    return fn.serial(gpt=gpt(**options), classes=fn.permute(0, 2, 1))


def vit(patch: int = 4, width: int = 128, heads: int = 4, layers: int = 4) -> fn.Layer:
    """A Transformer of the patches of an image. Dosovitskiy et al. 2021."""
    block = fn.transformer_encoder_layer(
        heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
    )
    return fn.serial(
        patches=fn.conv2d(width, patch, stride=patch),
        row=fn.flatten(2),
        tokens=fn.permute(0, 2, 1),
        first=class_token(),
        positions=positions(1 + (32 // 4) ** 2),
        blocks=fn.transformer_encoder(block, layers, fn.layer_norm()),
        select=fn.select(0, dim=1),
        head=fn.linear(10),
    )


def translator_forward(run: Any, x: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """Both sequences by one embedding; the padding of the source is masked in both attentions."""
    parts = {
        name: run("positions", run("embedding", x[name], use=use), use=use)
        for use, name in enumerate(("src", "tgt"))
    }
    for name in ("src_key_padding_mask", "memory_key_padding_mask"):
        parts[name] = x["padding"]
    return run("classes", run("head", run("transformer", parts))), {}


def translator_backward(pull: Any, dy: Tensor, residuals: Any) -> Any:
    """Tokens have no cotangent, the embedding has those of both sequences."""
    dparts = pull("transformer", pull("head", pull("classes", dy)))
    for use, name in enumerate(("src", "tgt")):
        pull("embedding", pull("positions", dparts[name], use=use), use=use, needed=False)
    return dict.fromkeys(("src", "tgt", "padding")) if pull.x else None


def translator(
    vocabulary: int = 512,
    width: int = 64,
    heads: int = 4,
    layers: int = 3,
    length: int = 32,
) -> fn.Layer:
    """The Transformer of Vaswani et al. 2017, with learned positions; x has src, tgt, padding."""
    net = fn.transformer(
        *(heads, layers, layers, 4 * width, 0.0), batch_first=True, tgt_is_causal=True
    )
    children = {
        "embedding": fn.embedding(vocabulary, width, dtype=DOUBLE),
        "positions": positions(length),
        "transformer": net,
        "head": fn.linear(vocabulary),
        "classes": fn.permute(0, 2, 1),
    }
    return fn.combine("translator", children, translator_forward, translator_backward)
