"""Stacks of the Transformer's layers, and the whole of it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from funcnet import initializers
from funcnet.checks import check_kind
from funcnet.combinators.combine import Pull, Run, combine
from funcnet.combinators.serial import serial_backward, serial_forward
from funcnet.core import Layer, Tree, sum_cotangents
from funcnet.errors import located, require
from funcnet.layers.arguments import in_form, parts_of, without_tensors
from funcnet.layers.layer_norm import layer_norm
from funcnet.layers.transformer import (
    DECODER,
    transformer_decoder_layer,
    transformer_encoder_layer,
)

ENCODER = ("src", "mask", "src_key_padding_mask")
TRANSFORMER = ("src", "tgt", "src_mask", *DECODER[2:4], "src_key_padding_mask", *DECODER[4:])


def _given(x: Tensor, parts: Mapping[str, Tensor], names: tuple[str, ...]) -> Tree:
    """The x of a layer of the stack: a tensor where that is all."""
    return (x, *[parts.get(name) for name in names[1:]]) if len(parts) > 1 else x


def stack_forward(run: Run, x: Tree, names: tuple[str, ...]) -> tuple[Tree, Mapping[str, Tree]]:
    """Each layer of what the one before gives, and of the memory and masks of x."""
    with located("layers:"):
        parts, form = parts_of(x, names, 1)
    y = parts[names[0]]
    for child in run.names:
        y = run(child, _given(y, parts, names))
    return y, without_tensors(parts, names, form)


def stack_backward(
    pull: Pull, dy: Tree, residuals: Mapping[str, Tree], names: tuple[str, ...]
) -> Tree:
    """The layers' pullbacks; the cotangents of memory and masks are summed."""
    made: dict[str, Tree] = {}
    for child in reversed(pull.names):
        dy = pull(child, dy, needed=pull.x or child != pull.names[0])
        if isinstance(dy, tuple):
            dy, *others = dy
            for name, other in zip(names[1:], others, strict=True):
                made[name] = sum_cotangents(made.get(name), other)
    return in_form({names[0]: dy, **made}, names, residuals) if pull.x else None


def _stack(
    name: str, names: tuple[str, ...], layer: Layer, num_layers: int, norm: Layer | None
) -> Layer:
    check_kind(name, layer, Layer)
    require(num_layers >= 1, f"{name}: num_layers must be at least 1, got {num_layers}")
    copies = {str(index): layer for index in range(num_layers)}
    children = {"layers": combine("layers", copies, stack_forward, stack_backward, names)}
    if norm is not None:
        children["norm"] = norm
    return combine(name, children, serial_forward, serial_backward)


def transformer_encoder(encoder_layer: Layer, num_layers: int, norm: Layer | None = None) -> Layer:
    """Encoder layers one after the other, and a norm.

    Args:
        encoder_layer: such as `transformer_encoder_layer`; each copy has params of its own, drawn
            with a key of its own. In torch all copies start from the same values.
        num_layers: how many there are.
        norm: a layer for the output of the last one, such as `layer_norm`; default none.

    Inputs:
        x, a tensor, or a tuple (src, mask, src_key_padding_mask), or a dict with these names.
    Returns:
        y of the shape of src.
    Learned params:
        ``layers.0`` and so on, ``norm``. Where there are no masks, `repeat` has the same layers
        with stacked params, which `jit` compiles once.
    VJP:
        the layers', from the last to the first.
    Raises:
        ValueError: num_layers below 1.
        TypeError: what is no Layer; the layers' errors.

    Source: ``torch.nn.TransformerEncoder``.

    >>> import funcnet as fn
    >>> net = fn.transformer_encoder(fn.transformer_encoder_layer(2, 8), 2, fn.layer_norm())
    >>> params, _ = net.init(fn.key(0), torch.ones(5, 3, 4))
    >>> sorted(params), sorted(params["layers"])
    (['layers', 'norm'], ['0', '1'])
    """
    return _stack("transformer_encoder", ENCODER, encoder_layer, num_layers, norm)


def transformer_decoder(decoder_layer: Layer, num_layers: int, norm: Layer | None = None) -> Layer:
    """Decoder layers one after the other, all with the same memory, and a norm.

    Args:
        decoder_layer: such as `transformer_decoder_layer`; each copy has params of its own, as in
            `transformer_encoder`.
        num_layers: how many there are.
        norm: a layer for the output of the last one, such as `layer_norm`; default none.

    Inputs:
        x, a tuple (tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask,
        memory_key_padding_mask), of which two must be there, or a dict with these names.
    Returns:
        y of the shape of tgt.
    Learned params:
        ``layers.0`` and so on, ``norm``.
    VJP:
        the layers', from the last to the first; dmemory is the sum of theirs.
    Raises:
        as `transformer_encoder`.

    Source: ``torch.nn.TransformerDecoder``.

    >>> import funcnet as fn
    >>> net = fn.transformer_decoder(fn.transformer_decoder_layer(2, 8), 2)
    >>> x = torch.ones(5, 3, 4), torch.ones(6, 3, 4)
    >>> params, _ = net.init(fn.key(0), x)
    >>> net.apply(params, x)[0].shape
    torch.Size([5, 3, 4])
    """
    return _stack("transformer_decoder", DECODER, decoder_layer, num_layers, norm)


def transformer_forward(run: Run, x: Tree) -> tuple[Tree, Mapping[str, Tree]]:
    """The decoder, with what the encoder gives as its memory."""
    with located("transformer:"):
        parts, form = parts_of(x, TRANSFORMER, 2)
    masks = [parts.get(name) for name in ("src_mask", "src_key_padding_mask")]
    memory = run("encoder", (parts["src"], *masks))
    y = run("decoder", (parts["tgt"], memory, *[parts.get(name) for name in DECODER[2:]]))
    return y, without_tensors(parts, TRANSFORMER, form)


def transformer_backward(pull: Pull, dy: Tree, residuals: Mapping[str, Tree]) -> Tree:
    """The decoder's, then the encoder's of the cotangent of the memory."""
    made = dict(zip(DECODER, pull("decoder", dy), strict=True))
    dencoder = pull("encoder", made.pop("memory"), needed=pull.x)
    if not pull.x:
        return None
    names = "src", "src_mask", "src_key_padding_mask"
    made |= dict(zip(names, dencoder, strict=True))
    return in_form(made, TRANSFORMER, residuals)


def transformer(
    nhead: int = 8,
    num_encoder_layers: int = 6,
    num_decoder_layers: int = 6,
    dim_feedforward: int = 2048,
    dropout: float = 0.1,
    activation: str | Layer = "relu",
    custom_encoder: Layer | None = None,
    custom_decoder: Layer | None = None,
    layer_norm_eps: float = 1e-5,
    batch_first: bool = False,
    norm_first: bool = False,
    bias: bool = True,
    *,
    src_is_causal: bool = False,
    tgt_is_causal: bool = False,
    memory_is_causal: bool = False,
    cache: int | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """``y = decoder(tgt, encoder(src))``: `transformer_encoder` and `transformer_decoder`.

    Args:
        nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            src_is_causal, tgt_is_causal, memory_is_causal, cache: of `transformer_encoder_layer`
            and `transformer_decoder_layer`; the cache is the decoder's.
        num_encoder_layers, num_decoder_layers: how many there are of each.
        custom_encoder, custom_decoder: layers in place of the stacks of both.
        dtype: of the parameters; default that of x.

    Inputs:
        x, a tuple (src, tgt, src_mask, tgt_mask, memory_mask, src_key_padding_mask,
        tgt_key_padding_mask, memory_key_padding_mask) of which two must be there, or a dict with
        these names: src (others, batch, features), tgt (tokens, batch, features), or both without
        the batch; masks as in `multihead_attention`. A key when ``train=True`` and dropout > 0.
    Returns:
        y of the shape of tgt.
    Learned params:
        those of ``encoder`` and ``decoder``: layers, and a norm after the last one of each. Weights
        are `funcnet.initializers.glorot_uniform`, as torch's.
    VJP:
        the children's.
    Raises:
        the children's errors.

    Source: ``torch.nn.Transformer``; Vaswani et al. 2017.

    >>> import funcnet as fn
    >>> net, x = fn.transformer(2, 1, 1, 8), (torch.ones(5, 3, 4), torch.ones(6, 3, 4))
    >>> params, _ = net.init(fn.key(0), x)
    >>> net.apply(params, x)[0].shape
    torch.Size([6, 3, 4])
    """
    block = nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first
    start = initializers.glorot_uniform()

    def norm() -> Layer:
        return layer_norm(None, layer_norm_eps, bias=bias, dtype=dtype)

    if custom_encoder is None:
        layer = transformer_encoder_layer(
            *block, bias, is_causal=src_is_causal, weight_init=start, dtype=dtype
        )
        custom_encoder = transformer_encoder(layer, num_encoder_layers, norm())
    if custom_decoder is None:
        layer = transformer_decoder_layer(
            *block,
            bias,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
            cache=cache,
            weight_init=start,
            dtype=dtype,
        )
        custom_decoder = transformer_decoder(layer, num_decoder_layers, norm())
    children = {"encoder": custom_encoder, "decoder": custom_decoder}
    return combine("transformer", children, transformer_forward, transformer_backward)
