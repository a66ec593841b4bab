"""The embedding of a vocabulary, each rank with some of its rows."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import tree
from funcnet.collectives import Split
from funcnet.core import Forward, Grads, Key, Layer, Params, Pullback
from funcnet.distributed.processes.start import Mesh
from funcnet.distributed.tensor_parallel.parting import Region, axis_for, own_rows, parted
from funcnet.errors import check_count, require
from funcnet.initializers import Initializer
from funcnet.layers.embedding import Rows, embedding_backward, is_index
from funcnet.lift import fastest, stateful
from funcnet.losses.checks import extremes
from funcnet.params import Param, declare


def vocabulary_embedding_rule(
    residuals: dict[str, Tensor],
    dy: Tensor,
    split: Split,
    region: Region,
    padding: int,
    *,
    params: bool,
    x: bool,
) -> Grads:
    """``dweight[i] = sum of dy where x = i``, of own rows."""
    if not params:
        return None, None
    given, dy = residuals["x"], region.leave_backward(dy)
    index, is_own = own_rows(given, split)
    if padding >= 0:
        is_own = is_own & (given != padding)
    dy = torch.where(is_own[..., None], dy, 0.0)
    backward = fastest(embedding_backward, dy)
    return {"weight": backward(dy, index, split.part_shape[0], -1, False)}, None


def vocabulary_embedding(
    num_embeddings: int,
    embedding_dim: int,
    mesh: Mesh,
    padding_idx: int | None = None,
    *,
    axis: str = "model",
    sequence: int | None = None,
    weight_init: Initializer | None = None,
    dtype: torch.dtype = torch.float32,
) -> Layer:
    """`funcnet.embedding`, each rank with some of the rows: ``y = sum_r weight_r[x]``, of own rows.

    Args:
        num_embeddings: the number of rows of all ranks. Where ranks do not divide it, the last ones
            have rows of zeros beyond it, which stay zero.
        embedding_dim: the size of a row.
        mesh: the ranks; see `mesh` and `axis_of`.
        padding_idx: a row that starts as zeros and gets no gradient.
        axis: the axis of the mesh over which the weight is parted.
        sequence: the dimension of y along which each rank gets some of the tokens; ranks divide
            them. Default: each rank gets the whole y. Layers that count positions, such as
            `funcnet.learned_positions`, would count from the first token of each rank: use rotary
            or alibi of `parallel_encoder_layer`, or add a second ``vocabulary_embedding``, with the
            same ``sequence``, whose x are the position numbers.
        weight_init, dtype: those of `funcnet.embedding`.

    Inputs:
        x of shape ``(*)``, int32 or int64, the same on all ranks.
    Returns:
        y of shape ``(*, embedding_dim)``, the same on all ranks; with ``sequence`` a rank's tokens
        of it.
    Learned params:
        ``weight`` (ceil(num_embeddings / ranks), embedding_dim): a part of what
        `funcnet.embedding` has, and of what its init gives.
    VJP:
        ``dweight_r[i] = sum dy[x = i]``; dx is None.
    Raises:
        TypeError: x that is not an integer.
        ValueError: an index out of range, in eager mode on the CPU. Where values are not read,
            such as under `funcnet.jit`, its output is NaN.

    Source: Shoeybi et al. 2019, "Megatron-LM"; sequence: Korthikanti et al. 2022.

    >>> import funcnet as fn
    >>> layer = vocabulary_embedding(65, 8, {"model": 2})
    >>> params, _ = layer.init(fn.key(0), torch.ones(3, dtype=torch.int64, device="meta"))
    >>> params["weight"].shape
    torch.Size([33, 8])
    """
    name = "vocabulary_embedding"
    check_count(name, 0, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
    rows = Rows.of(name, num_embeddings, embedding_dim, padding_idx, False)
    region = Region(axis_for(name, mesh, axis), sequence)
    split = Split(region.axis, (num_embeddings, embedding_dim), 0)

    @declare
    def init(x: Tensor) -> Mapping[str, Param]:
        wrong = f"expects int32 or int64 indices, got {tree.describe(x)}"
        require(is_index(x), wrong, TypeError)
        region.check(x.unsqueeze(-1), whole=True)
        return parted(rows.declared(weight_init, dtype), {"weight": split})

    def forward(params: Params, x: Tensor, state: Params, key: Key, train: bool) -> Forward:
        found = extremes(x)
        low, high = found or (0, 0)
        inside = low >= 0 and (high < num_embeddings or x.numel() == 0)
        got = f"got indices from {low} to {high}"
        require(inside, f"{name}: expects indices in [0, {num_embeddings}), {got}")
        index, is_own = own_rows(x, split)
        y = torch.where(is_own[..., None], F.embedding(index, params["weight"]), 0.0)
        if found is None:
            known = (x >= 0) & (x < num_embeddings)
            y = torch.where(known[..., None], y, torch.nan)
        pullback = Pullback(vocabulary_embedding_rule, {"x": x}, (split, region, rows.padding))
        return region.leave(y), pullback, {}

    breaks = ("derivative",) if padding_idx is not None else ()
    return stateful(init, forward, name=name, breaks=breaks, placed=lambda x: {"weight": split})
