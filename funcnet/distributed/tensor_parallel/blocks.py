"""The layer of a Transformer, each rank with some of the heads and of the hidden features."""

from typing import Any

import torch

from funcnet import random
from funcnet.core import Layer
from funcnet.distributed.processes.start import Mesh
from funcnet.distributed.tensor_parallel.heads import parallel_attention
from funcnet.distributed.tensor_parallel.linears import column_linear, row_linear
from funcnet.distributed.tensor_parallel.pieces import own_tokens, parted_dropout
from funcnet.errors import require
from funcnet.initializers import Initializer
from funcnet.layers.dropout import dropout as dropping
from funcnet.layers.layer_norm import layer_norm
from funcnet.layers.transformer import ENCODER, Parts, Told, activation_of, block_of, masks_of


def parallel_encoder_layer(
    nhead: int,
    mesh: Mesh,
    dim_feedforward: int = 2048,
    dropout: float = 0.1,
    activation: str | Layer = "relu",
    layer_norm_eps: float = 1e-5,
    batch_first: bool = False,
    norm_first: bool = False,
    bias: bool = True,
    *,
    axis: str = "model",
    sequence: bool = False,
    is_causal: bool = False,
    num_kv_heads: int | None = None,
    window: int | None = None,
    rotary: Layer | None = None,
    alibi: bool = False,
    cache: int | None = None,
    weight_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """`funcnet.transformer_encoder_layer`, each rank with some of its heads and hidden features.

    ``self_attn`` is a `parallel_attention`, ``linear1`` a `column_linear` and ``linear2`` a
    `row_linear`: two sums over ranks forward, and two backward. Norms are whole on each rank.

    Args:
        nhead: the heads of all ranks; ranks divide them.
        mesh: the ranks; see `mesh` and `axis_of`.
        dim_feedforward: the features between the two linear layers, of all ranks; they need not
            be divided by ranks.
        dropout, activation, layer_norm_eps, batch_first, norm_first, bias: of
            `funcnet.transformer_encoder_layer`. Each rank applies the activation to its own
            features, so it must work on each number alone, without params and without draws.
            Softmax and norms, which mix features, would silently mix those of a rank.
        axis: the axis of the mesh over which the layer is parted.
        sequence: whether each rank has some of the tokens of x and y, which ranks divide: sums
            become as many sums of parts and gathers, and norms are of own tokens (`own_tokens`).
            Attention sees all tokens and their positions, so rotary and alibi are as without; for
            positions that are added to x see `vocabulary_embedding`.
        is_causal, num_kv_heads, window, rotary, alibi, cache: of `parallel_attention`.
        weight_init, dtype: of `funcnet.transformer_encoder_layer`.

    Inputs:
        those of `funcnet.transformer_encoder_layer`, the same on all ranks; with ``sequence`` src
        is a rank's tokens, and masks are those of the tokens of all ranks. A key, the same on all
        ranks, when ``train=True`` and dropout > 0.
    Returns:
        y of the shape of src, the same on all ranks.
    Learned params:
        parts of those of `funcnet.transformer_encoder_layer`, and of what its init gives.
    VJP:
        the children's.
    Raises:
        ValueError: heads that the ranks do not divide; an activation that has params or state, or
            draws numbers; the children's errors.

    Source: Shoeybi et al. 2019, "Megatron-LM"; sequence: Korthikanti et al. 2022.

    >>> import funcnet as fn
    >>> layer = parallel_encoder_layer(2, {"model": 2}, 9, dropout=0.0, batch_first=True)
    >>> params, _ = layer.init(fn.key(0), torch.ones(3, 5, 4, device="meta"))
    >>> params["linear1"]["weight"].shape, params["linear2"]["weight"].shape
    (torch.Size([5, 4]), torch.Size([4, 5]))
    """
    name = "parallel_encoder_layer"
    tokens = -2 if batch_first else 0
    attention = parallel_attention(
        nhead,
        mesh,
        dropout,
        bias,
        batch_first,
        axis=axis,
        sequence=sequence,
        num_kv_heads=num_kv_heads,
        is_causal=is_causal,
        window=window,
        rotary=rotary,
        alibi=alibi,
        cache=cache,
        weight_init=weight_init,
        dtype=dtype,
    )
    told = Told(name, ENCODER, 1, norm_first, (("self_attn", masks_of("src")),))
    norm = layer_norm(None, layer_norm_eps, bias=bias, dtype=dtype)
    linear: Any = {
        "axis": axis,
        "sequence": tokens if sequence else None,
        "weight_init": weight_init,
        "dtype": dtype,
    }
    parts = Parts(
        column_linear(dim_feedforward, mesh, bias, **linear),
        _of_each_number(name, activation_of(name, activation), dim_feedforward),
        parted_dropout(dropout, mesh, size=dim_feedforward, axis=axis),
        row_linear(None, mesh, bias, dim_feedforward, **linear),
        own_tokens(norm, mesh, axis=axis) if sequence else norm,
        parted_dropout(dropout, mesh, dim=tokens, axis=axis) if sequence else dropping(dropout),
    )
    return block_of(told, {"self_attn": attention}, parts, batch_first)


def _of_each_number(name: str, activation: Layer, features: int) -> Layer:
    """The activation; ValueError for what would silently differ between ranks.

    Each rank would sum a param's gradient over its own features only, and draw the numbers that the
    other ranks draw for theirs.
    """
    words = f"{name}: expects an activation that draws no numbers"
    told = "for dropout after the activation pass dropout=p"
    require(not activation.takes_key, f"{words}, got {activation}; {told}")
    kept = activation.init(random.key(0), torch.empty(1, 1, features, device="meta"))
    words = f"{name}: expects an activation without params and state"
    told = "each rank has other features, and would change them in another way"
    require(not any(kept), f"{words}, got {activation}: {told}")
    return activation
