"""The layers of the Transformer: attention and a small net, each with a skip connection."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet.batch_axis import BatchAxis
from funcnet.combinators.combine import Pull, Run, combine
from funcnet.core import Layer, Tree, sum_cotangents
from funcnet.errors import located, require
from funcnet.global_forms import all_in_global_form
from funcnet.initializers import Initializer
from funcnet.layers.activations import gelu
from funcnet.layers.arguments import in_form, parts_of, without_tensors
from funcnet.layers.dropout import dropout as dropping
from funcnet.layers.layer_norm import layer_norm
from funcnet.layers.linear import linear
from funcnet.layers.multihead_attention import multihead_attention
from funcnet.layers.piecewise import relu

ENCODER = ("src", "src_mask", "src_key_padding_mask")
DECODER = (
    *("tgt", "memory", "tgt_mask", "memory_mask"),
    *("tgt_key_padding_mask", "memory_key_padding_mask"),
)
_ACTIVATIONS = {"relu": relu, "gelu": gelu}


class Told(NamedTuple):
    """What the passes of a layer are told.

    Attributes:
        name: of the layer.
        names: of the parts of its x, of which the first is transformed.
        required: how many of them must be there.
        norm_first: whether the norm is before a sublayer, not after it.
        attentions: for each attention the child's name, and what of x is which part of its x.
    """

    name: str
    names: tuple[str, ...]
    required: int
    norm_first: bool
    attentions: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


def skipping(
    run: Run, norm: str, norm_first: bool, x: Tensor, f: Callable[[Tensor], Tensor]
) -> Tensor:
    """``norm(x + f(x))``; or ``x + f(norm(x))``, with ``norm_first``."""
    return x + f(run(norm, x)) if norm_first else run(norm, x + f(x))


def skipping_backward(
    pull: Pull,
    norm: str,
    norm_first: bool,
    dy: Tensor,
    backward: Callable[[Tensor, bool], Tree],
    needed: bool = True,
) -> Tree:
    """The pullback of `skipping`, from ``backward(dy, needed)``, that of f."""
    if not norm_first:
        dy = pull(norm, dy)
    through = backward(dy, norm_first or needed)
    if norm_first:
        through = pull(norm, through, needed=needed)
    return sum_cotangents(dy, through) if needed else None


def feed_forward(run: Run, number: int, x: Tensor) -> Tensor:
    """Two linear layers, with an activation and dropout between them; then dropout."""
    hidden = run("dropout", run("activation", run("linear1", x)))
    return run(f"dropout{number}", run("linear2", (hidden, x)))


def feed_forward_backward(pull: Pull, number: int, dy: Tensor, needed: bool) -> Tree:
    """The pullback of `feed_forward`."""
    dhidden, _ = pull("linear2", pull(f"dropout{number}", dy))
    return pull("linear1", pull("activation", pull("dropout", dhidden)), needed=needed)


def block_forward(run: Run, x: Tree, told: Told) -> tuple[Tree, Mapping[str, Tree]]:
    """Each attention, then the feed-forward net."""
    with located(f"{told.name}:"):
        parts, form = parts_of(x, told.names, told.required)

    def attend(child: str, own: Any, number: int, x: Tensor) -> Tensor:
        given = {name: parts[whole] for name, whole in own if whole in parts}
        y = run(child, {"query": x, **given} if given else x)
        return run(f"dropout{number}", y)

    y = parts[told.names[0]]
    for number, (child, own) in enumerate(told.attentions, 1):
        y = skipping(run, f"norm{number}", told.norm_first, y, partial(attend, child, own, number))
    last = len(told.attentions) + 1
    y = skipping(run, f"norm{last}", told.norm_first, y, partial(feed_forward, run, last))
    return y, without_tensors(parts, told.names, form)


def block_backward(pull: Pull, dy: Tree, residuals: Mapping[str, Tree], told: Told) -> Tree:
    """The pullbacks from the last to the first; memory and masks may have several cotangents."""
    made: dict[str, Tree] = {}

    def attend(child: str, own: Any, number: int, dy: Tensor, needed: bool) -> Tree:
        dx = pull(child, pull(f"dropout{number}", dy), needed=needed)
        if not isinstance(dx, Mapping):
            return dx
        made.update({whole: dx[name] for name, whole in own if dx.get(name) is not None})
        return dx["query"]

    last = len(told.attentions) + 1
    feed = partial(feed_forward_backward, pull, last)
    dy = skipping_backward(pull, f"norm{last}", told.norm_first, dy, feed)
    for number in range(last - 1, 0, -1):
        backward = partial(attend, *told.attentions[number - 1], number)
        needed = pull.x or number > 1
        dy = skipping_backward(pull, f"norm{number}", told.norm_first, dy, backward, needed)
    return in_form({told.names[0]: dy, **made}, told.names, residuals) if pull.x else None


class Parts(NamedTuple):
    """The layers of a block beside its attentions; each norm and each dropout is like the other.

    Attributes:
        linear1, activation, dropout, linear2: the feed-forward net.
        norm: beside each sublayer.
        last: the dropout at the end of each sublayer.
    """

    linear1: Layer
    activation: Layer
    dropout: Layer
    linear2: Layer
    norm: Layer
    last: Layer


def block_of(told: Told, attentions: Mapping[str, Layer], parts: Parts, batch_first: bool) -> Layer:
    """A layer of attentions and a feed-forward net, each with its norm and dropout."""
    numbers = range(1, len(attentions) + 2)
    children = {
        **attentions,
        "linear1": parts.linear1,
        "dropout": parts.dropout,
        "linear2": parts.linear2,
        **{f"norm{each}": parts.norm for each in numbers},
        **{f"dropout{each}": parts.last for each in numbers},
        "activation": parts.activation,
    }

    def made(children: Mapping[str, Layer], axis: BatchAxis | None = None) -> Layer:
        if axis is not None:
            children = all_in_global_form(children, axis.at(0 if batch_first else 1))
        return combine(told.name, children, block_forward, block_backward, told, global_form=made)

    return made(children)


def activation_of(name: str, activation: str | Layer) -> Layer:
    """A layer, or the one of this name; ValueError, with that of the block, for another."""
    if isinstance(activation, Layer):
        return activation
    wrong = f"{name}: activation must be one of {sorted(_ACTIVATIONS)} or a Layer"
    require(activation in _ACTIVATIONS, f"{wrong}, got {activation!r}")
    return _ACTIVATIONS[activation]()


def _block(
    told: Told,
    attentions: Mapping[str, Layer],
    dim_feedforward: int,
    dropout: float,
    activation: str | Layer,
    layer_norm_eps: float,
    bias: bool,
    weight_init: Initializer | None,
    dtype: torch.dtype | None,
    *,
    batch_first: bool,
) -> Layer:
    """The block of a single process."""
    parts = Parts(
        linear(dim_feedforward, bias, weight_init=weight_init, dtype=dtype),
        activation_of(told.name, activation),
        dropping(dropout),
        linear(None, bias, weight_init=weight_init, dtype=dtype),
        layer_norm(None, layer_norm_eps, bias=bias, dtype=dtype),
        dropping(dropout),
    )
    return block_of(told, attentions, parts, batch_first)


def masks_of(prefix: str) -> tuple[tuple[str, str], ...]:
    """What of an attention's x is which mask of the block's."""
    return ("attn_mask", f"{prefix}_mask"), ("key_padding_mask", f"{prefix}_key_padding_mask")


def transformer_encoder_layer(
    nhead: int,
    dim_feedforward: int = 2048,
    dropout: float = 0.1,
    activation: str | Layer = "relu",
    layer_norm_eps: float = 1e-5,
    batch_first: bool = False,
    norm_first: bool = False,
    bias: bool = True,
    *,
    is_causal: bool = False,
    num_kv_heads: int | None = None,
    window: int | None = None,
    rotary: Layer | None = None,
    alibi: bool = False,
    cache: int | None = None,
    weight_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """``z = norm1(x + self_attn(x))``, ``y = norm2(z + linear2(activation(linear1(z))))``.

    With ``norm_first``: ``z = x + self_attn(norm1(x))``, ``y = z + linear2(...(norm2(z)))``. With
    ``is_causal`` and an activation of "gelu" too it is the layer of a GPT. Torch's ``d_model`` is
    not given: init finds the features from x.

    Args:
        nhead: the number of heads of the attention.
        dim_feedforward: the features between the two linear layers.
        dropout: the probability to drop: of attention's weights, after the activation, and of
            what is added to x.
        activation: "relu", "gelu", or a layer.
        layer_norm_eps: the eps of the norms.
        batch_first: whether x is (batch, tokens, features), not (tokens, batch, features).
        norm_first: whether the norms are before attention and the feed-forward net, not after.
        bias: whether linear layers and norms have biases.
        is_causal, num_kv_heads, window, rotary, alibi, cache: of `multihead_attention`.
        weight_init: of all weights; default that of their layers.
        dtype: of the parameters; default that of x.

    Inputs:
        x, a tensor (tokens, batch, features), or without the batch; or a tuple (src, src_mask,
        src_key_padding_mask), or a dict with these names; masks as in `multihead_attention`. A key
        when ``train=True`` and dropout > 0.
    Returns:
        y of the shape of src.
    Learned params:
        those of ``self_attn``, ``linear1``, ``linear2``, ``norm1`` and ``norm2``.
    VJP:
        the children's.
    Raises:
        the children's errors.

    Source: ``torch.nn.TransformerEncoderLayer``; Vaswani et al. 2017; norms first: Xiong et al.
    2020.

    >>> import funcnet as fn
    >>> layer = fn.transformer_encoder_layer(2, 8, dropout=0.0)
    >>> params, _ = layer.init(fn.key(0), torch.ones(5, 3, 4))
    >>> sorted(params), layer.apply(params, torch.ones(5, 3, 4))[0].shape
    (['linear1', 'linear2', 'norm1', 'norm2', 'self_attn'], torch.Size([5, 3, 4]))
    """
    attention = multihead_attention(
        nhead,
        dropout,
        bias,
        batch_first=batch_first,
        num_kv_heads=num_kv_heads,
        is_causal=is_causal,
        window=window,
        rotary=rotary,
        alibi=alibi,
        cache=cache,
        weight_init=weight_init,
        dtype=dtype,
    )
    attentions = (("self_attn", masks_of("src")),)
    told = Told("transformer_encoder_layer", ENCODER, 1, norm_first, attentions)
    net = dim_feedforward, dropout, activation, layer_norm_eps, bias, weight_init, dtype
    return _block(told, {"self_attn": attention}, *net, batch_first=batch_first)


def transformer_decoder_layer(
    nhead: int,
    dim_feedforward: int = 2048,
    dropout: float = 0.1,
    activation: str | Layer = "relu",
    layer_norm_eps: float = 1e-5,
    batch_first: bool = False,
    norm_first: bool = False,
    bias: bool = True,
    *,
    tgt_is_causal: bool = False,
    memory_is_causal: bool = False,
    cache: int | None = None,
    weight_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """`transformer_encoder_layer` with attention to a memory between its two sublayers.

    Args:
        nhead: the number of heads of both attentions.
        dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias: of
            `transformer_encoder_layer`.
        tgt_is_causal: whether a token sees only the tokens that do not come after it.
        memory_is_causal: the same, of the memory, by the indices of both.
        cache: of the first attention, see `multihead_attention`.
        weight_init: of all weights; default that of their layers.
        dtype: of the parameters; default that of x.

    Inputs:
        x, a tuple (tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask,
        memory_key_padding_mask) of which two must be there, or a dict with these names: tgt
        (tokens, batch, features), memory (others, batch, features), or both without the batch;
        masks as in `multihead_attention`. A key when ``train=True`` and dropout > 0.
    Returns:
        y of the shape of tgt.
    Learned params:
        those of ``self_attn``, ``multihead_attn``, ``linear1``, ``linear2``, ``norm1``, ``norm2``
        and ``norm3``.
    VJP:
        the children's.
    Raises:
        the children's errors.

    Source: ``torch.nn.TransformerDecoderLayer``; Vaswani et al. 2017.

    >>> import funcnet as fn
    >>> layer, x = fn.transformer_decoder_layer(2, 8), (torch.ones(5, 3, 4), torch.ones(6, 3, 4))
    >>> params, _ = layer.init(fn.key(0), x)
    >>> layer.apply(params, x)[0].shape
    torch.Size([5, 3, 4])
    """

    def attention(is_causal: bool, cache: int | None) -> Layer:
        return multihead_attention(
            nhead,
            dropout,
            bias,
            batch_first=batch_first,
            is_causal=is_causal,
            cache=cache,
            weight_init=weight_init,
            dtype=dtype,
        )

    memory = (("key", "memory"), *masks_of("memory"))
    attentions = (("self_attn", masks_of("tgt")), ("multihead_attn", memory))
    told = Told("transformer_decoder_layer", DECODER, 2, norm_first, attentions)
    children = {
        "self_attn": attention(tgt_is_causal, cache),
        "multihead_attn": attention(memory_is_causal, None),
    }
    net = dim_feedforward, dropout, activation, layer_norm_eps, bias, weight_init, dtype
    return _block(told, children, *net, batch_first=batch_first)
