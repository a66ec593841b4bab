"""Where the numbers of a part lie in the whole tensor, and what two parts have in common.

A part comes about by splits, one after another: of a dimension, in parts of one extent, or of the
numbers one after another, as a vector. What the parts do not divide has zeros at its end.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

from torch import Tensor

from funcnet.errors import require


class Division(NamedTuple):
    """A split: into so many parts of a dimension, or of a vector."""

    parts: int
    dim: int | None = None
    """None for the numbers one after another."""
    sections: tuple[int, ...] = ()
    """The sizes of what the dimension consists of: each is parted, and a part has its part of the
    first, of the second, and so on."""
    front: int = 0
    """How many dimensions are in front of the vector: each of a stack of tensors is parted."""


Divisions = tuple[Division, ...]
"""The first split first; the second one is of the parts of the first."""


class Run(NamedTuple):
    """Some indices of a dimension of a part that are one after another in the whole tensor too."""

    first: int
    """In the part."""
    start: int
    """In the whole tensor."""
    extent: int


Corners = tuple[tuple[int, ...], tuple[int, ...]]
"""Of a box: its least index in each dimension, and one more than its greatest."""


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


class Range(NamedTuple):
    """Some of a vector's numbers."""

    begin: int
    end: int
    """From here on there are zeros."""
    length: int
    """With the zeros."""

    def part(self, parts: int, place: int) -> "Range":
        """One of its parts."""
        length = -(-self.length // parts)
        begin = self.begin + place * length
        return Range(begin, max(begin, min(self.end, begin + length)), length)


class Piece(NamedTuple):
    """A part of a tensor as a vector: its numbers row by row, or a range of them."""

    shape: tuple[int, ...]
    """That the part would have without the splits of vectors."""
    runs: tuple[tuple[Run, ...], ...]
    """Of each of these dimensions; the indices in none of them have zeros."""
    front: int
    """How many dimensions there are before `inner`."""
    inner: Range
    """Of the other dimensions, as a vector."""
    outer: Range
    """Of all of that, as a vector."""

    @property
    def length(self) -> int:
        """How many numbers it has, with zeros."""
        return self.outer.length

    def strides(self) -> tuple[int, ...]:
        """How far its numbers are from one another, in each dimension of the whole tensor."""
        front, last = self.shape[: self.front], self.shape[self.front :]
        return (
            *[prod(front[dim + 1 :]) * self.inner.length for dim in range(len(front))],
            *[prod(last[dim + 1 :]) for dim in range(len(last))],
        )

    def boxes(self) -> Iterator[Box]:
        """What it has of the whole tensor."""
        strides = self.strides()
        for low, high in self._corners():
            kept = [
                [cut for run in runs if (cut := _cut(run, a, b)).extent > 0]
                for runs, a, b in zip(self.runs, low, high, strict=True)
            ]
            for runs in product(*kept):
                start = tuple([run.start for run in runs])
                stop = tuple([run.start + run.extent for run in runs])
                offset = sum([run.first * n for run, n in zip(runs, strides, strict=True)])
                yield Box(start, stop, offset - self.inner.begin - self.outer.begin)

    def _corners(self) -> Iterator[Corners]:
        """The boxes of the part, as it would be without the splits of vectors."""
        begin, end, length = self.inner
        front, last = self.shape[: self.front], self.shape[self.front :]
        for low, high in boxes_of_range((*front, length), self.outer.begin, self.outer.end):
            first, after = begin + low[-1], min(begin + high[-1], end)
            for least, greatest in boxes_of_range(last, first, after):
                yield (*low[:-1], *least), (*high[:-1], *greatest)

    def view(self, values: Tensor, shape: tuple[int, ...], offset: int) -> Tensor:
        """A box that begins there in the vector that the piece is."""
        return values.as_strided(shape, self.strides(), values.storage_offset() + offset)


def piece_of(shape: Sequence[int], divisions: Divisions, places: Sequence[int]) -> Piece:
    """The piece at these places among the parts of the splits.

    >>> piece_of((5,), (Division(2, 0),), [1])[:2]
    ((3,), ((Run(first=0, start=3, extent=2),),))
    >>> piece_of((5,), (Division(2, 0), Division(2)), [1, 1]).inner
    Range(begin=2, end=3, length=2)
    """
    piece = _whole([*shape], [(Run(0, 0, extent),) for extent in shape], 0, None)
    flat = vector = False
    for (parts, dim, sections, front), place in zip(divisions, places, strict=True):
        extents, runs, inner = [*piece.shape], [*piece.runs], piece.inner
        vector = vector or (flat and dim is None and front < piece.front)
        if vector:
            require(front == 0, "a part of a stack of vectors is no stack itself")
            piece = piece._replace(outer=piece.outer.part(parts, place))
        elif dim is None or (flat and dim == piece.front):
            front = piece.front if flat else front
            whole = prod(extents[front:])
            inner = (inner if flat else Range(0, whole, whole)).part(parts, place)
            piece, flat = _whole(extents, runs, front, inner), True
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
            piece = _whole(extents, runs, piece.front, inner if flat else None)
    return piece


def _whole(
    extents: Sequence[int], runs: Sequence[tuple[Run, ...]], front: int, inner: Range | None
) -> Piece:
    """A piece of all of what ``inner`` has; None for all of the other dimensions."""
    count = prod(extents[front:])
    inner = inner or Range(0, count, count)
    count = prod(extents[:front]) * inner.length
    return Piece(tuple(extents), tuple(runs), front, inner, Range(0, count, count))


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
    extents = [*shape]
    for parts, dim, sections, front in divisions:
        if dim is None:
            extents = [*extents[:front], -(-prod(extents[front:]) // parts)]
        else:
            extents[dim] = sum([-(-section // parts) for section in sections or (extents[dim],)])
    return tuple(extents)


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
