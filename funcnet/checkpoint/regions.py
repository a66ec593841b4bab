"""Where the numbers of a part lie in the whole tensor, and what two parts have in common.

A part comes about by splits, one after another: of a dimension, in parts of one extent, or of the
numbers one after another, as a vector. What the parts do not divide has zeros at its end.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

from torch import Tensor


class Division(NamedTuple):
    """A split: into so many parts of a dimension, or of a vector."""

    parts: int
    dim: int | None = None
    """None for the numbers one after another."""
    sections: tuple[int, ...] = ()
    """The sizes of what the dimension consists of: each is parted, and a part has its part of the
    first, of the second, and so on."""


Divisions = tuple[Division, ...]
"""The first split first; the second one is of the parts of the first."""


class Run(NamedTuple):
    """Some indices of a dimension of a part that are one after another in the whole tensor too."""

    first: int
    """In the part."""
    start: int
    """In the whole tensor."""
    extent: int


class Box(NamedTuple):
    """A box of the whole tensor that a piece has."""

    low: tuple[int, ...]
    """Its least index in each dimension."""
    high: tuple[int, ...]
    """One more than the greatest."""
    offset: int
    """Of the number at ``low`` in the piece."""


class Copy(NamedTuple):
    """A box that two pieces have, by where it begins in each."""

    shape: tuple[int, ...]
    source: int
    target: int


class Piece(NamedTuple):
    """A part of a tensor as a vector: its numbers row by row, or a range of them."""

    shape: tuple[int, ...]
    """The part's."""
    runs: tuple[tuple[Run, ...], ...]
    """Of each dimension; the indices in none of them have zeros."""
    begin: int
    """The first number of the range."""
    end: int
    """The number from which on the range has zeros."""
    length: int
    """Of the range with its zeros."""

    def strides(self) -> tuple[int, ...]:
        """Of the part."""
        return tuple([prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))])

    def boxes(self) -> Iterator[Box]:
        """What it has of the whole tensor."""
        strides = self.strides()
        for low, high in boxes_of_range(self.shape, self.begin, self.end):
            kept = [
                [cut for run in runs if (cut := _cut(run, a, b)).extent > 0]
                for runs, a, b in zip(self.runs, low, high, strict=True)
            ]
            for runs in product(*kept):
                start = tuple([run.start for run in runs])
                stop = tuple([run.start + run.extent for run in runs])
                offset = sum([run.first * n for run, n in zip(runs, strides, strict=True)])
                yield Box(start, stop, offset - self.begin)

    def view(self, values: Tensor, shape: tuple[int, ...], offset: int) -> Tensor:
        """A box that begins there in the vector that the piece is."""
        return values.as_strided(shape, self.strides(), values.storage_offset() + offset)


def piece_of(shape: Sequence[int], divisions: Divisions, places: Sequence[int]) -> Piece:
    """The piece at these places among the parts of the splits.

    >>> piece_of((5,), (Division(2, 0),), [1])
    Piece(shape=(3,), runs=((Run(first=0, start=3, extent=2),),), begin=0, end=3, length=3)
    >>> piece_of((5,), (Division(2, 0), Division(2)), [1, 1])[2:]
    (2, 3, 2)
    """
    extents = [*shape]
    runs: list[tuple[Run, ...]] = [(Run(0, 0, extent),) for extent in shape]
    begin, end, length = 0, prod(shape), prod(shape)
    flat = False
    for (parts, dim, sections), place in zip(divisions, places, strict=True):
        if dim is None or flat:
            flat = True
            length = -(-length // parts)
            begin += place * length
            end = min(end, begin + length)
        else:
            kept, first = [], 0
            for section, start in _sections(sections or (extents[dim],)):
                extent = -(-section // parts)
                low = start + place * extent
                high = min(low + extent, start + section)
                cuts = [_cut(run, low, high) for run in runs[dim]]
                kept += [cut._replace(first=cut.first - low + first) for cut in cuts]
                first += extent
            runs[dim] = tuple([run for run in kept if run.extent > 0])
            extents[dim] = first
            end = length = prod(extents)
    return Piece(tuple(extents), tuple(runs), begin, max(begin, end), length)


def _sections(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Each size, and where it begins."""
    start = 0
    for size in sizes:
        yield size, start
        start += size


def _cut(run: Run, low: int, high: int) -> Run:
    """Of a run what is from ``low`` up to ``high`` in the part."""
    first = max(run.first, low)
    last = min(run.first + run.extent, high)
    return Run(first, run.start + first - run.first, last - first)


def part_shape(shape: Sequence[int], divisions: Divisions) -> tuple[int, ...]:
    """The shape that all parts have.

    >>> part_shape((5, 3), (Division(2, 0),)), part_shape((5, 3), (Division(2, 0), Division(2)))
    ((3, 3), (5,))
    """
    piece = piece_of(shape, divisions, [0] * len(divisions))
    flat = any([division.dim is None for division in divisions])
    return (piece.length,) if flat else piece.shape


def boxes_of_range(
    shape: tuple[int, ...], begin: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
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
    if first > last:
        within = [(last, begin - last * row, end - last * row)]
    else:
        within = [(first - 1, begin - (first - 1) * row, row), (last, 0, end - last * row)]
    for number, (index, low, high) in enumerate(within):
        if number == 1 and first < last:
            yield (first, *[0] * len(shape[1:])), (last, *shape[1:])
        for least, greatest in boxes_of_range(shape[1:], low, high):
            yield (index, *least), (index + 1, *greatest)


def copies(source: Piece, target: Piece) -> Iterator[Copy]:
    """What two pieces have in common."""
    of_source, of_target = source.strides(), target.strides()
    targets = [*target.boxes()]
    for a in source.boxes():
        for b in targets:
            low = [*map(max, a.low, b.low)]
            shape = tuple(
                [min(pair) - least for *pair, least in zip(a.high, b.high, low, strict=True)]
            )
            if all([extent > 0 for extent in shape]):
                yield Copy(shape, _offset(a, low, of_source), _offset(b, low, of_target))


def _offset(box: Box, index: Sequence[int], strides: Sequence[int]) -> int:
    steps = zip(index, box.low, strides, strict=True)
    return box.offset + sum([(at - low) * stride for at, low, stride in steps])
