"""The safetensors format: a header in JSON with each tensor's dtype, shape and place, then bytes.

::

    8 bytes     the length n of the header, little-endian
    n bytes     {"__metadata__": {name: text}, name: {"dtype": "F32", "shape": [2, 3],
                "data_offsets": [begin, end]}, ...}, and spaces
    the rest    the tensors' bytes, one after another without holes, row by row

The tests hold files to the package safetensors, both ways, and tests/benchmarks/checkpoints.py the
times. That package opens a file twice, and so may take the header of one and the bytes of another
that is just being saved; it lets a tensor be there twice; its writer does not wait for the disk.
"""

import ctypes
import json
import math
import mmap
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet.checkpoint.direct import Sink
from funcnet.errors import require

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""torch's dtypes, by the format's names."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}

HEADER_LIMIT = 2**24
"""Of a header's bytes, some 100 000 tensors: a hostile one takes half a gigabyte to parse."""

ALIGNMENT = 64
"""Of a tensor's address in bytes, as torch's own, on which the last bit of a result may depend."""

_DIMENSIONS = 64
"""What torch's functions take at most."""

_METADATA = "__metadata__"


class Entry(NamedTuple):
    """What a header says of a tensor; the bytes are from ``begin`` to ``end`` of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Mapped(NamedTuple):
    """A file in memory, of which the system reads what is used."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    buffer: mmap.mmap

    def read(self, name: str) -> Tensor:
        """A tensor, mapped; a copy of one that lies otherwise than torch's own."""
        tensor, entry = self.values(name), self.entries[name]
        copied = entry.begin % ALIGNMENT and tensor.numel() and tensor.dtype != torch.bool
        return tensor.clone() if copied else tensor

    def values(self, name: str) -> Tensor:
        """A tensor, mapped, to be copied from: it may lie otherwise than torch's own."""
        dtype, shape, begin, end = self.entries[name]
        if begin == end:
            return torch.empty(shape, dtype=dtype, device="cpu")
        stored = torch.uint8 if dtype == torch.bool else dtype
        count = math.prod(shape)
        tensor = torch.frombuffer(self.buffer, dtype=stored, count=count, offset=begin).view(shape)
        if dtype == torch.bool:
            return tensor != 0  # a byte that is neither 0 nor 1 is no bool
        return tensor


def with_bytes(tensor: Tensor, function: Callable[[Any], Any]) -> Any:
    """What a function gives of the bytes of a tensor: of its memory, or of a contiguous copy."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    size = tensor.nbytes
    if size == 0:
        return function(b"")
    end = size + tensor.storage_offset() * tensor.element_size()
    require(end <= tensor.untyped_storage().nbytes(), "a tensor reaches out of its memory")
    return function(memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B"))


def crc32(tensor: Tensor) -> int:
    """The CRC-32 of a tensor's bytes."""
    return int(with_bytes(tensor, zlib.crc32))


def write(
    file: Sink,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    values: Callable[[str], Iterable[Tensor]] | None = None,
) -> None:
    """Write tensors, whose dtypes are among `DTYPES`, and texts.

    ``values(name)``, if given, are the tensor's in turn, and ``tensors`` may be on meta.
    """
    header: dict[str, Any] = {_METADATA: metadata}
    # There must be no holes: those after which the next one is aligned go first.
    order = sorted(
        tensors,
        key=lambda name: (tensors[name].nbytes % ALIGNMENT != 0, -tensors[name].element_size()),
    )
    end = 0
    for name in order:
        tensor, begin = tensors[name], end
        end += tensor.nbytes
        dtype, shape = NAMES[tensor.dtype], [*tensor.shape]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    require(len(text) <= HEADER_LIMIT, f"the paths and shapes take {len(text)} bytes, too many")
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        for tensor in (tensors[name],) if values is None else values(name):
            with_bytes(tensor, file.write)


def open_mapped(path: Path) -> Mapped:
    """A file's header, and the rest as memory that is its own: what is written there stays there.

    Raises:
        ValueError: no such file.
        OSError.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        found = os.fstat(file.fileno())
        require(stat.S_ISREG(found.st_mode), "not a file")
        first = file.read(8)
        pickled = first[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")
        length = int.from_bytes(first, "little")
        start = 8 + length
        if not 8 < start <= found.st_size:
            hint = "; a pickle, as torch.save writes it, is torch.load's" if pickled else ""
            raise ValueError(f"a file of another kind, or cut{hint}")
        require(length <= HEADER_LIMIT, f"a header of {length} bytes, more than {HEADER_LIMIT}")
        header = parse(file.read(length), "the header")
        metadata = header.pop(_METADATA, {})
        texts = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
        require(texts, "the metadata are not texts")
        entries = {name: _entry(name, entry, start) for name, entry in header.items()}
        end = start
        for begin, following in sorted([entry[2:] for entry in entries.values()]):
            require(begin == end, "tensors overlap, or there are holes between them")
            end = following
        require(end == found.st_size, f"{found.st_size} bytes, where the tensors end at {end}")
        # Of the file that was opened: another one may have taken its name by now.
        return Mapped(entries, metadata, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def _without_waiting(path: str, flags: int) -> int:
    """To open a pipe would wait for one who writes to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def parse(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object that somebody wrote, in which no name is twice."""
    try:
        found = json.loads(text.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError(f"{what} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{what} is a {type(found).__name__}, not a dict")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    require(len(found) == len(pairs), "a name is there twice")
    return found


def _entry(name: str, entry: Any, start: int) -> Entry:
    """An entry of a header, whose tensors begin at ``start``."""
    match entry:
        case {"dtype": str(kind), "shape": [*shape], "data_offsets": [begin, end]} if (
            len(entry) == 3
        ):
            pass
        case _:
            raise ValueError(f"{name!r} has no dtype, shape and place")
    if kind not in DTYPES:
        raise ValueError(f"{name!r} has the dtype {kind!r}, which is none of torch's")
    sizes = (*shape, begin, end)
    if {*map(type, sizes)} != {int} or min(sizes) < 0 or len(shape) > _DIMENSIONS:
        raise ValueError(f"{name!r} has no shape and place")
    dtype = DTYPES[kind]
    count = math.prod(shape)
    # Without the zeros, which do not keep torch from multiplying the others.
    greatest = count or math.prod([n for n in shape if n])
    if end - begin != count * dtype.itemsize or greatest >= 2**60:
        raise ValueError(f"{name!r} of shape {shape} takes {end - begin} bytes")
    return Entry(dtype, tuple(shape), start + begin, start + end)
