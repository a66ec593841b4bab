"""Tensors that are parted as vectors: many gathered or reduced in a few flat messages."""

from collections.abc import Iterator, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from funcnet.collectives import Split, sum_dtype
from funcnet.runtime import is_transformed

_MOST_MESSAGES = 64


def gathered(parts: list[Any], splits: Sequence[Split], most: float = inf) -> list[Tensor]:
    """The whole tensors, on all ranks, of the parts of each, which are taken out of the list.

    Args:
        parts: vectors; the list is emptied, so that those that nobody else has go one by one.
        splits: how each whole is parted, all over one axis.
        most: about the bytes of a message; inf for one message for each dtype.
    """
    wholes: list[Any] = [None] * len(parts)
    for message in _messages([part.dtype for part in parts], splits, most):
        chosen = [parts[index] for index in message]
        for index in message:
            parts[index] = None
        sizes = [len(each) for each in chosen]
        sent = torch.cat(chosen) if len(chosen) > 1 else chosen[0]
        del chosen
        axis = splits[message[0]].axis
        ranks = axis.gather(sent).unflatten(0, (axis.size, sum(sizes)))
        del sent
        for index, each in zip(message, ranks.split(sizes, 1), strict=True):
            # Not a view that would keep all of a message, as that of a few numbers.
            wholes[index] = splits[index].trimmed(each.contiguous().view(-1))
    return wholes


def reduced(
    wholes: list[Any], splits: Sequence[Split], mean: bool = True, most: float = inf
) -> list[Tensor]:
    """This rank's part of the mean, or the sum, of the ranks' tensors, taken out of the list.

    Half precision is summed in float32. See `gathered` for the arguments.
    """
    kinds = [whole.dtype for whole in wholes]
    dtypes = [*map(sum_dtype, kinds)]
    parts: list[Any] = [None] * len(wholes)
    for message in _messages(dtypes, splits, most):
        axis, wide = splits[message[0]].axis, dtypes[message[0]]
        chosen = []
        for index in message:
            split = splits[index]
            rows = split.padded(wholes[index]).unflatten(0, (axis.size, *split.part_shape))
            wholes[index] = None
            chosen.append(rows.to(wide))
            del rows
        sizes = [each.shape[1] for each in chosen]
        sent = torch.cat(chosen, 1) if len(chosen) > 1 else chosen[0]
        del chosen
        own = axis.scatter_sum(sent)
        del sent
        own = own / axis.size if mean and axis.size > 1 else own
        for index, each in zip(message, own.split(sizes, 1), strict=True):
            parts[index] = each.reshape(-1).to(kinds[index])
    return parts


def own_piece(split: Split, whole: Tensor) -> Tensor:
    """This rank's part of a tensor that all ranks have, without a copy where that can be."""
    if is_transformed(whole) or whole.is_meta:
        return split.part(whole)
    (size,) = split.part_shape
    piece = whole.reshape(-1)[split.axis.index * size :][:size]
    return piece if len(piece) == size else torch.cat((piece, piece.new_zeros(size - len(piece))))


def _messages(
    dtypes: Sequence[torch.dtype], splits: Sequence[Split], most: float
) -> Iterator[list[int]]:
    """The tensors that each message has: of one dtype, a large one alone."""
    for dtype in dict.fromkeys(dtypes):
        chosen = [index for index, each in enumerate(dtypes) if each is dtype]
        size = splits[chosen[0]].axis.size
        total = sum([splits[index].part_shape[0] for index in chosen])
        # A program has them one by one: not more than so many, however large the model is.
        room = max(most / (dtype.itemsize * size), total / _MOST_MESSAGES, 1)
        message: list[int] = []
        left = room
        for index in chosen:
            (extent,) = splits[index].part_shape
            if message and extent > left:
                yield message
                message, left = [], room
            message.append(index)
            left -= extent
        if message:
            yield message
