"""`load`: a tree of tensors from safetensors files, that anybody may have written."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet.checkpoint.files import check_path
from funcnet.checkpoint.parted import Shards, Stored, decode_parts, in_one_file
from funcnet.checkpoint.safetensors import HEADER_LIMIT, crc32, open_mapped, parse
from funcnet.checkpoint.shards import index_of
from funcnet.checkpoint.structure import (
    EMPTY,
    Structure,
    below,
    decode,
    parts_by_path,
    rebuild,
)
from funcnet.errors import located, require
from funcnet.tree import describe


def load(path: str | os.PathLike[str], like: Any = None, *, at: str = "") -> Any:
    """The tree of tensors of a file that `save` wrote, or of any safetensors file.

    Args:
        path: the file, or that which `save` was given for several. An index in the form of
            Hugging Face's may be named too.
        like: a tree of the same structure, shapes and dtypes, such as a new train state, whose
            structure the result has, with its NamedTuples, on its devices, and in its strides, if
            they leave no gaps. A tensor on meta gives no device. Without it the result is as
            `save` was given it, but for NamedTuples and other nodes, which are dicts of their
            fields; of another program's file it is nested dicts by the parts of the dotted paths.
        at: the dotted path of the part to load, such as "params" or "params.0.weight".

    Only what is used is read: tensors on the CPU are those of the file, mapped into memory, until
    they are written to, when a page of them is copied; the file does not change. `save` and other
    programs that replace a file by another one leave a loaded tree as it is. Do not write into a
    file whose tensors are in use, as ``cp`` does: clone the tree before,
    ``fn.tree.map(torch.clone, tree)``. A tensor that does not start at a multiple of 64 bytes,
    such as those of other programs, or small ones, is copied.

    Raises:
        ValueError: a file that is damaged, or is no safetensors file; and, naming all paths
            that differ, for one that is not like ``like``. No code of a file is ever run.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fn.save(f"{folder}/net.safetensors", {"0": {"weight": torch.ones(2)}})
    ...     fn.load(f"{folder}/net.safetensors", at="0.weight")
    ...     fn.load(f"{folder}/net.safetensors", like={"0": {"weight": torch.ones(3)}})
    Traceback (most recent call last):
    ...
    ValueError: load: .../net.safetensors is not like the tree `like`, a leaf differs:
      0.weight: float32 (2,) in the file, expected float32 (3,)
    """
    check_path("load", path)
    target = Path(path)
    tensors, structure = open_checkpoint(target)
    names, values, nodes = (
        below(at, part) for part in (tensors, structure.values, structure.nodes)
    )
    if at and not (names or values or nodes):
        parts = sorted({name.split(".")[0] for name in (*tensors, *structure.values)})
        raise ValueError(f"load: there is nothing at {at!r} in {path}, which has {parts}")
    with explained(target):
        require(not names.keys() & values.keys(), "a leaf is there twice")
        found: dict[str, Any] = {
            key: _read(tensors[name], structure) for key, name in names.items()
        }
        found |= {key: structure.values[name] for key, name in values.items()}
        if like is None:
            kinds = {key: structure.nodes[name] for key, name in nodes.items()}
            dots = {key: structure.dots[name] for key, name in below(at, structure.dots).items()}
            return rebuild(found, kinds, dots)
    return _like(target, found, like)


def _read(stored: Stored, structure: Structure) -> Tensor:
    """A tensor as `save` was given it."""
    name, tensor = stored.name, stored.whole()
    if name in structure.crc32:
        pairs = torch.view_as_real(tensor) if tensor.dtype == torch.complex128 else tensor
        intact = crc32(pairs) == structure.crc32[name]
        require(intact, f"the bytes of {name!r} are not those that were saved")
    return tensor


def _like(path: Path, found: Mapping[str, Any], like: Any) -> Any:
    """The leaves that were found in the structure of ``like``."""
    with located("load: `like`"):
        expected = parts_by_path(like).leaves
    faults = dict.fromkeys(expected.keys() - found.keys(), "not in the file")
    for name in found.keys() - expected.keys():
        faults[name] = f"{describe(found[name])} in the file, not expected"
    for name in expected.keys() & found.keys():
        if not _same_kind(found[name], expected[name]):
            faults[name] = f"{describe(found[name])} in the file"
    if faults:
        for name in faults.keys() & expected.keys():
            faults[name] += f", expected {describe(expected[name])}"
        raise unlike(path, faults)
    return optree.tree_structure(like).unflatten(
        [laid_out(on_device(found[name], leaf), leaf) for name, leaf in expected.items()]
    )


def unlike(path: Path, faults: Mapping[str, str]) -> ValueError:
    """The error that says what of a file is not like the tree that it is loaded into."""
    count = "a leaf differs" if len(faults) == 1 else f"{len(faults)} leaves differ"
    lines = [f"  {name}: {fault}" for name, fault in sorted(faults.items())]
    return ValueError("\n".join([f"load: {path} is not like the tree `like`, {count}:", *lines]))


def _same_kind(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape
    return type(a) is type(b)


def on_device(leaf: Any, like: Any) -> Any:
    """A tensor on the device of ``like``, unless that is meta."""
    kept = not isinstance(leaf, Tensor) or like.is_cpu or like.is_meta
    return leaf if kept else leaf.to(like.device)


def laid_out(leaf: Any, like: Any) -> Any:
    """A tensor in the strides of ``like``: kernels that are picked by them round differently."""
    if not isinstance(leaf, Tensor) or like.is_contiguous():
        return leaf
    return torch.empty_like(like, device=leaf.device, requires_grad=False).copy_(leaf)


def open_checkpoint(path: Path, *, lazily: bool = False) -> tuple[dict[str, Stored], Structure]:
    """The tensors of a checkpoint, by name, and the rest of it.

    Args:
        path: as for `load`.
        lazily: open a file of several when a tensor of it is read, not all now.

    Raises:
        ValueError: no checkpoint.
        OSError, such as FileNotFoundError.
    """
    index = path if path.name.endswith(".json") else index_of(path)
    if index != path and (path.exists() or not index.exists()):
        with explained(path):
            file = open_mapped(path)
            structure = _structure(file.metadata.get("funcnet"))
            stored = {name: in_one_file(name, entry, file) for name, entry in file.entries.items()}
            return _unpaired(stored, structure), structure
    with explained(index):
        stored, structure = _open_index(index, lazily)
        return _unpaired(stored, structure), structure


def _structure(text: Any) -> Structure:
    """What `save` wrote; nothing in a file of another program's."""
    if text is None:
        return EMPTY
    require(isinstance(text, str), "the description is no text")
    return decode(text)


def _open_index(path: Path, lazily: bool) -> tuple[dict[str, Stored], Structure]:
    require(not path.exists() or path.is_file(), "not a file")
    with open(path, "rb") as file:
        text = file.read(HEADER_LIMIT + 1)
    require(len(text) <= HEADER_LIMIT, f"more than {HEADER_LIMIT} bytes")
    index = parse(text, "the index")
    places, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(places, dict) or not isinstance(metadata, dict):
        raise ValueError("the index has no weight_map, or its metadata are no dict")
    shards = Shards(path)
    tensors = {}
    for key, name in places.items():
        entries = shards.checked(name)().entries
        require(key in entries, f"{key!r} is not in {name!r}, where the index has it")
        tensors[key] = in_one_file(key, entries[key], shards[name])
    parted = decode_parts(index["parts"], shards.checked) if "parts" in index else {}
    both = sorted(parted.keys() & tensors.keys())
    require(not both, f"the index has {both[:3]} twice")
    for stored in () if lazily else parted.values():
        stored.check()
    return tensors | parted, _structure(metadata.get("funcnet"))


def _unpaired(tensors: dict[str, Stored], structure: Structure) -> dict[str, Stored]:
    """The tensors with the dtypes that they had, where these are stored as others."""
    for name, dtype in structure.dtypes.items():
        if (stored := tensors.get(name)) is not None and stored.dtype != torch.complex128:
            pairs = stored.dtype == torch.float64 and stored.shape[-1:] == (2,)
            require(dtype == "complex128" and pairs, f"a tensor is stored as {dtype!r}")
            tensors[name] = stored._replace(dtype=torch.complex128, shape=stored.shape[:-1])
    return tensors


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Any error of reading as one that says which file it is, and what is wrong with it."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        reason = f"{error}".partition("\n")[0][:500] or type(error).__name__
        raise ValueError(f"load: {path} is damaged, or is no checkpoint: {reason}") from error
