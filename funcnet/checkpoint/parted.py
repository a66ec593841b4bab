"""Tensors whose parts lie in several files: what the index says of them, and how they are read.

Beside the ``weight_map`` of Hugging Face's, of the tensors that lie in one file, an index has

::

    "parts": {
        "files": ["run-1a2b3c4d-00001-of-00002.safetensors", ...],
        "layouts": [[[[2, 0, [], 0], [4, null, [], 0]], [0, 1, ...]], ...],
        "tensors": {"params.0.weight": ["F32", [512, 128], 0], ...}
    }

A layout is the splits, each as `Division` is written, and the number of the file that has each
part, the places among the parts of the last split running fastest. A tensor has its dtype, its
whole shape and the number of its layout; each of its files has the part under the tensor's name,
with the zeros that make all parts of one shape.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet.checkpoint.regions import (
    Copy,
    Division,
    Divisions,
    Piece,
    copies,
    part_shape,
    piece_of,
)
from funcnet.checkpoint.safetensors import ALIGNMENT, DTYPES, NAMES, Entry, Mapped, open_mapped
from funcnet.errors import require

_PARTS = 2**20
"""Of one tensor, and its splits: what a hostile index may make a loop of."""

_SPLITS = 16


class Shards(dict[str, Callable[[], Mapped]]):
    """What opens the files beside an index, each once, by name."""

    def __init__(self, index: Path) -> None:
        self._index = index

    def checked(self, name: Any) -> Callable[[], Mapped]:
        """What opens a file of a name that the index, which may be anybody's, has."""
        # A name and no path: an index must not reach into other folders.
        plain = isinstance(name, str) and re.fullmatch(r"(?!\.\.?$)[^/\\:\0]+", name)
        require(plain, f"the index names {name!r}, which is no file's name")
        return self[name]

    def __missing__(self, name: str) -> Callable[[], Mapped]:
        @cache
        def opened() -> Mapped:
            try:
                return open_mapped(self._index.with_name(name))
            except OSError as error:
                raise ValueError(f"{name[:99]!r}, of the index: {error.strerror}") from error
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

        self[name] = opened
        return opened


class Stored(NamedTuple):
    """A tensor of a checkpoint, whole in one file or in parts."""

    name: str
    dtype: torch.dtype
    """complex128 for what is stored as pairs of float64."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    divisions: Divisions
    files: tuple[Callable[[], Mapped], ...]
    """Open the file of each part."""

    def pieces(self) -> Iterator[tuple[Piece, Callable[[], Mapped]]]:
        """Each part, and its file."""
        places = product(*[range(each.parts) for each in self.divisions])
        for place, file in zip(places, self.files, strict=True):
            yield piece_of(self.shape, self.divisions, place), file

    def whole(self) -> Tensor:
        """All of it."""
        return self.read(piece_of(self.shape, (), ())).view(self.shape)

    def read(self, wanted: Piece) -> Tensor:
        """A piece, as a vector: mapped from the file that has it as it is, else copied.

        Of the files only what the piece has is read.
        """
        sources: list[tuple[Tensor, Copy]] = []
        for piece, file in self.pieces():
            if piece == wanted:
                return self._values(file(), aligned=True)
            if common := [*copies(piece, wanted)]:
                values = self._values(file())
                sources += [(piece.view(values, copy.shape, copy.source), copy) for copy in common]
        whole = sum([source.numel() for source, _ in sources]) == wanted.length
        if whole and len(sources) == 1:
            found = sources[0][0]
            if found.is_contiguous() and found.data_ptr() % ALIGNMENT == 0:
                return found.view(-1)
        make = torch.empty if whole else torch.zeros
        made = make(wanted.length, dtype=self.dtype, device="cpu")
        for source, copy in sources:
            wanted.view(made, copy.shape, copy.target).copy_(source)
        return made

    def check(self) -> None:
        """Raise ValueError unless all of its files are there, and have their parts."""
        for file in self.files:
            self._values(file())

    def _values(self, file: Mapped, aligned: bool = False) -> Tensor:
        """A part as a vector."""
        entry, expected = file.entries.get(self.name), part_shape(self.shape, self.divisions)
        pairs = self.dtype == torch.complex128
        dtype, shape = (torch.float64, (*expected, 2)) if pairs else (self.dtype, expected)
        right = entry is not None and (entry.dtype, entry.shape) == (dtype, shape)
        require(right, f"a file has not the part of {self.name!r} that the index says")
        values = file.read(self.name) if aligned else file.values(self.name)
        return (torch.view_as_complex(values) if pairs else values).reshape(-1)


def in_one_file(name: str, entry: Entry, file: Mapped | Callable[[], Mapped]) -> Stored:
    """A tensor that lies whole in one file."""
    opened = (lambda: file) if isinstance(file, Mapped) else file
    return Stored(name, entry.dtype, entry.shape, (), (opened,))


def encode_parts(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...], Divisions, list[str]]],
) -> dict[str, Any]:
    """What an index says of tensors, by name: dtype, whole shape, splits and the parts' files."""
    files = sorted({file for *_, names in tensors.values() for file in names})
    numbers = {file: number for number, file in enumerate(files)}
    layouts: dict[Any, int] = {}
    entries = {}
    for name, (dtype, shape, divisions, names) in tensors.items():
        layout = divisions, tuple([numbers[file] for file in names])
        kind = NAMES.get(dtype, "C128")
        entries[name] = [kind, [*shape], layouts.setdefault(layout, len(layouts))]
    return {"files": files, "layouts": [*layouts], "tensors": entries}


def decode_parts(text: Any, open_file: Callable[[str], Callable[[], Mapped]]) -> dict[str, Stored]:
    """The tensors of an index, which may be anybody's.

    Raises:
        ValueError.
    """
    match text:
        case {"files": [*files], "layouts": [*layouts], "tensors": dict(entries)} if len(text) == 3:
            pass
        case _:
            raise ValueError("the index's parts have no files, layouts and tensors")
    known = [_layout(layout, [open_file(name) for name in files]) for layout in layouts]
    found = {}
    for name, entry in entries.items():
        match entry:
            case [str(kind), [*shape], int(number)] if kind in DTYPES or kind == "C128":
                pass
            case _:
                raise ValueError(f"the index has no dtype, shape and layout of {name!r}")
        sizes = (*shape, number)
        correct = {*map(type, sizes)} == {int} and min(sizes) >= 0 and number < len(known)
        require(correct and len(shape) <= 64, f"the index has no shape and layout of {name!r}")
        require(prod([n for n in shape if n]) < 2**60, f"{name!r} has the shape {shape}")
        divisions, opened = known[number]
        require(_fits(tuple(shape), divisions), f"{name!r} of shape {shape} has no such parts")
        dtype = DTYPES.get(kind, torch.complex128)
        found[name] = Stored(name, dtype, tuple(shape), divisions, opened)
    return found


def _layout(
    layout: Any, files: list[Callable[[], Mapped]]
) -> tuple[Divisions, tuple[Callable[[], Mapped], ...]]:
    match layout:
        case [[*splits], [*numbers]] if len(splits) <= _SPLITS:
            pass
        case _:
            raise ValueError("a layout has no splits and files")
    divisions = tuple([_division(split) for split in splits])
    count = prod([division.parts for division in divisions])
    require(count == len(numbers), f"{len(numbers)} files of {count} parts")
    right = all([type(number) is int and 0 <= number < len(files) for number in numbers])
    require(right, "a layout names files that are not there")
    return divisions, tuple([files[number] for number in numbers])


def _division(split: Any) -> Division:
    match split:
        case [parts, dim, [*sections], front] if {
            *map(type, (parts, dim or 0, *sections, front))
        } == {int}:
            pass
        case _:
            raise ValueError("a layout has a split that is none")
    least = min([dim or 0, front, *sections])
    right = 1 <= parts <= _PARTS and least >= 0 and not (dim is None and sections)
    require(right, "a layout has a split that is none")
    return Division(parts, dim, tuple(sections), front)


def _fits(shape: tuple[int, ...], divisions: Divisions) -> bool:
    """Whether a tensor of this shape can be parted so."""
    for place, (parts, dim, sections, front) in enumerate(divisions):
        before = part_shape(shape, divisions[:place])
        flat = any([division.dim is None for division in divisions[:place]])
        if front > len(before) - flat or (flat and dim is None and 0 < front < len(before) - 1):
            return False
        if (dim is not None and (dim >= len(before) or front)) or (flat and sections):
            return False
        if sections and (sum(sections) != before[dim or 0] or any([n % parts for n in sections])):
            return False
    return True
