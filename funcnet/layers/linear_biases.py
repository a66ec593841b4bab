"""Attention with linear biases: `alibi`, which takes from a score what grows with the distance."""

from collections.abc import Mapping

import torch
from torch import Tensor

from funcnet.core import EMPTY, Layer, Tree
from funcnet.errors import require
from funcnet.layers.positions import of_pair, values_and_positions
from funcnet.lift import Step, parameterless
from funcnet.params import Param


def alibi_slopes(
    heads: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Tensor:
    """``2^(-8 i / heads)`` for i from 1 on, where heads is a power of two.

    Else those of the next lower power, and every second one of twice that.

    >>> alibi_slopes(2), alibi_slopes(3)
    (tensor([0.0625, 0.0039]), tensor([0.0625, 0.0039, 0.2500]))
    """
    power = 1 << (heads.bit_length() - 1)
    index = torch.arange(heads, dtype=dtype, device=device)
    more = (2 * (index - power) + 1) / (2 * power)
    return torch.exp2(-8.0 * torch.where(index < power, (index + 1) / power, more))


def alibi_bias(
    heads: int,
    query_positions: Tensor,
    key_positions: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``-slope |query - key|``, (heads, L, S), or (batch, heads, L, S) for positions of a batch.

    Args:
        heads: their number; see ``alibi_slopes``.
        query_positions, key_positions: ints of shape (L,) or (batch, L), and (S,) or (batch, S).
        dtype: of the bias.

    >>> alibi_bias(1, torch.tensor([1]), torch.tensor([0, 1, 2]))
    tensor([[[-0.0039, -0.0000, -0.0039]]])
    """
    distance = (query_positions[..., :, None] - key_positions[..., None, :]).abs()
    wide = torch.promote_types(dtype, torch.float32)
    slopes = alibi_slopes(heads, wide, distance.device)
    return (-slopes[:, None, None] * distance[..., None, :, :].to(wide)).to(dtype)


def alibi(heads: int) -> Layer:
    """``y = x - slope |query - key|`` for the scores x of each head: attention with linear biases.

    The distance has no sign: a key after its query counts as one before it. In the paper keys after
    the query are masked.

    Args:
        heads: their number; see ``alibi_slopes``.

    Inputs:
        x, scores of shape ``(*, heads, L, S)``, floating: the keys are at 0, ..., S - 1, the
        queries at the last L of these; or (x, positions) with the positions of the queries, (L,) or
        (batch, L).
    VJP:
        ``dx = dy``; positions have none.
    Raises:
        ValueError: another number of heads.

    Source: Press et al. 2022.

    >>> alibi(1).apply({}, torch.zeros(1, 2, 3))[0]
    tensor([[[-0.0039,  0.0000, -0.0039],
             [-0.0078, -0.0039,  0.0000]]])
    """
    enough = isinstance(heads, int) and heads > 0
    require(enough, f"alibi: heads must be > 0, got {heads!r}")

    def declaration(x: Tree) -> Mapping[str, Param]:
        shape = tuple(values_and_positions(x)[0].shape)
        fits = len(shape) >= 3 and shape[-3] == heads
        require(fits, f"expects scores of shape (*, {heads}, L, S), got {shape}")
        return EMPTY

    def forward(x: Tree) -> Step:
        scores, queries = values_and_positions(x)
        length, size = scores.shape[-2:]
        keys = torch.arange(size, device=scores.device)
        if queries is None:
            queries = torch.arange(size - length, size, device=scores.device)
        bias = alibi_bias(heads, queries, keys, scores.dtype)
        if bias.dim() == 4:
            bias = bias[(slice(None), *[None] * (scores.dim() - 4))]
        return scores + bias, {}, (isinstance(x, tuple),)

    return parameterless(forward, of_pair, declaration=declaration)
