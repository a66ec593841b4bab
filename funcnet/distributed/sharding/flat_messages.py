"""Tensors that are parted as vectors: many gathered or reduced in a few flat messages."""

from collections.abc import Iterator, Sequence
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet.collectives import Split, sum_dtype
from funcnet.runtime import is_transformed

_MOST_MESSAGES = 64


class _Piece(NamedTuple):
    """What a message has of a tensor: of each part the numbers from ``start`` to ``stop``."""

    leaf: int
    start: int
    stop: int


def gathered(parts: list[Any], splits: Sequence[Split], most: float = inf) -> list[Tensor]:
    """The whole tensors, on all ranks, of the parts of each, which are taken out of the list.

    Args:
        parts: vectors; the list is emptied, so that those that nobody else has go one by one.
        splits: how each whole is parted, all over one axis.
        most: about the bytes of a message; inf for one message for each dtype.
    """
    rows = [_Filled(split.axis.size, split.part_shape[0]) for split in splits]
    wholes: list[Any] = [None] * len(parts)
    for message in _messages([part.dtype for part in parts], splits, most):
        chosen = [parts[piece.leaf][piece.start : piece.stop] for piece in message]
        _drop_sent(parts, message, splits)
        sizes = [len(each) for each in chosen]
        sent = torch.cat(chosen) if len(chosen) > 1 else chosen[0]
        del chosen
        axis = splits[message[0].leaf].axis
        ranks = axis.gather(sent).unflatten(0, (axis.size, sum(sizes)))
        del sent
        for piece, each in zip(message, ranks.split(sizes, 1), strict=True):
            row, split = rows[piece.leaf], splits[piece.leaf]
            if (full := row.put(piece, each)) is not None:
                wholes[piece.leaf] = split.trimmed(full.reshape(-1))
    return wholes


def reduced(
    wholes: list[Any], splits: Sequence[Split], mean: bool = True, most: float = inf
) -> list[Tensor]:
    """This rank's part of the mean, or the sum, of the ranks' tensors, taken out of the list.

    Half precision is summed in float32. See `gathered` for the arguments.
    """
    kinds = [whole.dtype for whole in wholes]
    dtypes = [*map(sum_dtype, kinds)]
    filled = [_Filled(1, split.part_shape[0]) for split in splits]
    rows: dict[int, Tensor] = {}
    parts: list[Any] = [None] * len(wholes)
    for message in _messages(dtypes, splits, most):
        axis, wide = splits[message[0].leaf].axis, dtypes[message[0].leaf]
        for index in {piece.leaf for piece in message} - rows.keys():
            padded = splits[index].padded(wholes[index])
            rows[index] = padded.unflatten(0, (axis.size, *splits[index].part_shape))
            wholes[index] = None
        chosen = [rows[piece.leaf][:, piece.start : piece.stop].to(wide) for piece in message]
        _drop_sent(rows, message, splits)
        sizes = [each.shape[1] for each in chosen]
        sent = torch.cat(chosen, 1) if len(chosen) > 1 else chosen[0]
        del chosen
        own = axis.scatter_sum(sent)
        del sent
        own = own / axis.size if mean and axis.size > 1 else own
        for piece, each in zip(message, own.split(sizes, 1), strict=True):
            if (full := filled[piece.leaf].put(piece, each)) is not None:
                parts[piece.leaf] = full.reshape(-1).to(kinds[piece.leaf])
    return parts


def own_piece(split: Split, whole: Tensor) -> Tensor:
    """This rank's part of a tensor that all ranks have, without a copy where that can be."""
    if is_transformed(whole) or whole.is_meta:
        return split.part(whole)
    (size,) = split.part_shape
    piece = whole.reshape(-1)[split.axis.index * size :][:size]
    return piece if len(piece) == size else torch.cat((piece, piece.new_zeros(size - len(piece))))


class _Filled:
    """A matrix that comes in pieces, some columns at a time."""

    def __init__(self, rows: int, columns: int) -> None:
        self.shape = rows, columns
        self.pieces: list[Tensor] = []
        self.made: Tensor | None = None

    def put(self, piece: _Piece, columns: Tensor) -> Tensor | None:
        """The whole matrix, if these columns are the last."""
        if piece.stop - piece.start == self.shape[1]:
            return columns
        last = piece.stop == self.shape[1]
        if is_transformed(columns):
            self.pieces.append(columns)
            return torch.cat(self.pieces, 1) if last else None
        if self.made is None:
            self.made = columns.new_empty(self.shape)
        self.made[:, piece.start : piece.stop] = columns
        return self.made if last else None


def _drop_sent(tensors: Any, message: Sequence[_Piece], splits: Sequence[Split]) -> None:
    for piece in message:
        if piece.stop == splits[piece.leaf].part_shape[0]:
            tensors[piece.leaf] = None


def _messages(
    dtypes: Sequence[torch.dtype], splits: Sequence[Split], most: float
) -> Iterator[list[_Piece]]:
    """What each message has: tensors of one dtype, those that are too large cut into pieces."""
    for dtype in dict.fromkeys(dtypes):
        chosen = [index for index, each in enumerate(dtypes) if each is dtype]
        size = splits[chosen[0]].axis.size
        total = sum([splits[index].part_shape[0] for index in chosen])
        # A program has them one by one: not more than so many, however large the model is.
        room = max(most / (dtype.itemsize * size), total / _MOST_MESSAGES, 1)
        message: list[_Piece] = []
        left = room
        for index in chosen:
            (extent,) = splits[index].part_shape
            step = extent if extent <= room else int(room)
            for start in range(0, extent, step) if extent else [0]:
                stop = min(start + step, extent)
                if message and stop - start > left:
                    yield message
                    message, left = [], room
                message.append(_Piece(index, start, stop))
                left -= stop - start
        if message:
            yield message
