"""Tensors that are parted as vectors: many gathered or reduced in a few flat messages."""

from collections.abc import Iterator, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from funcnet.collectives import Split
from funcnet.runtime import is_transformed


def gathered(parts: list[Any], splits: Sequence[Split], most: float = inf) -> list[Tensor]:
    """The whole tensors, on all ranks, of the parts of each, which are taken out of the list.

    Args:
        parts: vectors; the list is emptied, so that those that nobody else has go one by one.
        splits: how each whole is parted, all over one axis.
        most: the bytes of a message; a single part may have more. There is one for each dtype, or
            several.
    """
    wholes: list[Any] = [None] * len(parts)
    for indices in _messages(parts, [part.dtype for part in parts], most):
        chosen = _taken(parts, indices)
        sizes = [part.numel() for part in chosen]
        message = torch.cat(chosen) if len(chosen) > 1 else chosen[0]
        del chosen
        axis = splits[indices[0]].axis
        ranks = axis.gather(message).unflatten(0, (axis.size, sum(sizes)))
        del message
        for index, each in zip(indices, ranks.split(sizes, 1), strict=True):
            wholes[index] = splits[index].trimmed(each.reshape(-1))
    return wholes


def reduced(
    wholes: list[Any], splits: Sequence[Split], mean: bool = True, most: float = inf
) -> list[Tensor]:
    """This rank's part of the mean, or the sum, of the ranks' tensors, taken out of the list.

    Half precision is summed in float32. See `gathered` for the arguments.
    """
    parts: list[Any] = [None] * len(wholes)
    dtypes = [torch.promote_types(whole.dtype, torch.float32) for whole in wholes]
    kinds = [whole.dtype for whole in wholes]
    for indices in _messages(wholes, dtypes, most):
        axis, wide = splits[indices[0]].axis, dtypes[indices[0]]
        rows = [
            splits[index]
            .padded(whole)
            .to(wide)
            .unflatten(0, (axis.size, *splits[index].part_shape))
            for index, whole in zip(indices, _taken(wholes, indices), strict=True)
        ]
        sizes = [row.shape[1] for row in rows]
        message = torch.cat(rows, 1) if len(rows) > 1 else rows[0]
        del rows
        own = axis.scatter_sum(message).flatten()
        del message
        own = own / axis.size if mean and axis.size > 1 else own
        for index, part in zip(indices, own.split(sizes), strict=True):
            parts[index] = part.to(kinds[index])
    return parts


def own_piece(split: Split, whole: Tensor) -> Tensor:
    """This rank's part of a tensor that all ranks have, without a copy where that can be."""
    if is_transformed(whole) or whole.is_meta:
        return split.part(whole)
    (size,) = split.part_shape
    piece = whole.reshape(-1)[split.axis.index * size :][:size]
    return piece if len(piece) == size else torch.cat((piece, piece.new_zeros(size - len(piece))))


def _taken(tensors: list[Any], indices: Sequence[int]) -> list[Tensor]:
    chosen = [tensors[index] for index in indices]
    for index in indices:
        tensors[index] = None
    return chosen


def _messages(
    tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype], most: float
) -> Iterator[list[int]]:
    """The indices of the tensors of each message: of one dtype, and not more than so many bytes."""
    sizes = [each.numel() * dtype.itemsize for each, dtype in zip(tensors, dtypes, strict=True)]
    for dtype in dict.fromkeys(dtypes):
        message: list[int] = []
        bytes_of = 0
        for index in [index for index, each in enumerate(dtypes) if each is dtype]:
            if message and bytes_of + sizes[index] > most:
                yield message
                message, bytes_of = [], 0
            message.append(index)
            bytes_of += sizes[index]
        if message:
            yield message
