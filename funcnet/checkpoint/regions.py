"""Where the numbers of a part lie in the whole tensor, and what two parts have in common.

A part comes about by splits, one after another: of a dimension, in parts of one extent, or of the
numbers one after another, as a vector. What the parts do not divide has zeros at its end.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

from torch import Tensor

Divisions = tuple[tuple[int, int | None], ...]
"""``(parts, dim)`` of each split, the first one first; dim None for a vector's."""

Corners = tuple[tuple[int, ...], tuple[int, ...]]
"""A box of a tensor: its least index in each dimension, and the one after its greatest."""


class Piece(NamedTuple):
    """A part of a tensor as a vector: a box of it, row by row, or a range of that."""

    start: tuple[int, ...]
    """The box's first index in each dimension of the whole tensor."""
    shape: tuple[int, ...]
    """The box's shape."""
    stop: tuple[int, ...]
    """The index in each dimension from which on the box has zeros."""
    begin: int
    """The first number of the range."""
    end: int
    """The number from which on the range has zeros."""
    length: int
    """Of the range with its zeros."""

    @property
    def is_padded(self) -> bool:
        """Whether there are zeros that are not the whole tensor's."""
        extents = zip(self.start, self.shape, self.stop, strict=True)
        beyond = any([start + extent > stop for start, extent, stop in extents])
        return beyond or self.end - self.begin < self.length

    def strides(self) -> tuple[int, ...]:
        """Of the box."""
        return tuple([prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))])

    def boxes(self) -> Iterator[Corners]:
        """What it has of the whole tensor, as boxes of that."""
        for low, high in boxes_of_range(self.shape, self.begin, self.end):
            least = tuple([a + b for a, b in zip(low, self.start, strict=True)])
            after = [a + b for a, b in zip(high, self.start, strict=True)]
            greatest = tuple([min(a, b) for a, b in zip(after, self.stop, strict=True)])
            if all([a < b for a, b in zip(least, greatest, strict=True)]):
                yield least, greatest

    def view(self, values: Tensor, box: Corners) -> Tensor:
        """A box of the whole tensor in the vector that the piece is."""
        strides = self.strides()
        offset = sum([(a - b) * n for a, b, n in zip(box[0], self.start, strides, strict=True)])
        size = [high - low for low, high in zip(*box, strict=True)]
        return values.as_strided(size, strides, values.storage_offset() + offset - self.begin)


def piece_of(shape: Sequence[int], divisions: Divisions, indexes: Sequence[int]) -> Piece:
    """The piece that has these places among the parts of the splits.

    >>> piece_of((5, 3), ((2, 0),), [1])
    Piece(start=(3, 0), shape=(3, 3), stop=(5, 3), begin=0, end=9, length=9)
    >>> piece_of((5, 3), ((2, 0), (2, None)), [1, 1])
    Piece(start=(3, 0), shape=(3, 3), stop=(5, 3), begin=5, end=9, length=5)
    """
    start, extents, stop = [0] * len(shape), [*shape], [*shape]
    begin, end, length = 0, prod(shape), prod(shape)
    flat = False
    for (parts, dim), index in zip(divisions, indexes, strict=True):
        if dim is None or flat:
            flat = True
            length = -(-length // parts)
            begin += index * length
            end = min(end, begin + length)
        else:
            extents[dim] = -(-extents[dim] // parts)
            start[dim] += index * extents[dim]
            stop[dim] = min(stop[dim], start[dim] + extents[dim])
            end = length = prod(extents)
    end = max(begin, end)
    return Piece(tuple(start), tuple(extents), tuple(stop), begin, end, length)


def part_shape(shape: Sequence[int], divisions: Divisions) -> tuple[int, ...]:
    """The shape that all parts have.

    >>> part_shape((5, 3), ((2, 0),)), part_shape((5, 3), ((2, 0), (2, None)))
    ((3, 3), (5,))
    """
    piece = piece_of(shape, divisions, [0] * len(divisions))
    flat = any([dim is None for _, dim in divisions])
    return (piece.length,) if flat else piece.shape


def boxes_of_range(shape: tuple[int, ...], begin: int, end: int) -> Iterator[Corners]:
    """The boxes that the numbers of a range of a tensor, row by row, make up.

    >>> list(boxes_of_range((4, 3), 2, 10))
    [((0, 2), (1, 3)), ((1, 0), (3, 3)), ((3, 0), (4, 1))]
    """
    if begin >= end:
        return
    if not shape:
        yield (), ()
        return
    row = prod(shape[1:])
    first, last = -(-begin // row), end // row
    rows = [(first - 1, begin - (first - 1) * row, min(row, end - (first - 1) * row))]
    if first <= last:
        rows.append((last, 0, end - last * row))
    for number, (index, low, high) in enumerate(rows):
        if number == 1 and first < last:
            yield (first, *[0] * len(shape[1:])), (last, *shape[1:])
        for least, greatest in boxes_of_range(shape[1:], low, high) if low < high else ():
            yield (index, *least), (index + 1, *greatest)


def common(a: Piece, b: Piece) -> Iterator[Corners]:
    """The boxes of the whole tensor that two pieces have in common."""
    for low, high in a.boxes():
        for other_low, other_high in b.boxes():
            least = tuple([max(pair) for pair in zip(low, other_low, strict=True)])
            greatest = tuple([min(pair) for pair in zip(high, other_high, strict=True)])
            if all([one < other for one, other in zip(least, greatest, strict=True)]):
                yield least, greatest
