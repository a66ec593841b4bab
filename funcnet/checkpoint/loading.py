"""`load`: a tree of tensors from safetensors files, that anybody may have written."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet.checkpoint.saving import ALIGNMENT, HEADER_LIMIT, crc32
from funcnet.checkpoint.shards import index_of
from funcnet.checkpoint.structure import (
    EMPTY,
    LIMIT,
    STORED_AS_PAIRS,
    Structure,
    below,
    decode,
    leaves_by_path,
    rebuild,
)
from funcnet.errors import located, require
from funcnet.tree import describe

_OFFSETS = re.compile(rb'"data_offsets"\s*:\s*\[')


def load(path: str | os.PathLike[str], like: Any = None, *, at: str = "") -> Any:
    """The tree of tensors of a file that `save` wrote, or of any safetensors file.

    Args:
        path: the file, or that which `save` was given for several. An index in the form of
            Hugging Face's may be named too.
        like: a tree of the same structure, shapes and dtypes, such as a new train state, whose
            structure the result has, with its NamedTuples, on its devices. A tensor on meta gives
            the shape and dtype only. Without it the result is of nested dicts, by the parts of the
            dotted paths, with lists, tuples and None where `save` was given some; a NamedTuple is
            a dict of its fields.
        at: the dotted path of the part to load, such as "params" or "params.0.weight".

    Only what is used is read: tensors on the CPU are those of the file, mapped into memory, until
    they are written to, when a page of them is copied; the file does not change. `save` and other
    programs that replace a file by another one leave a loaded tree as it is. Do not write into a
    file whose tensors are in use, as ``cp`` does: clone the tree before,
    ``fn.tree.map(torch.clone, tree)``. A tensor that does not start at a multiple of 64 bytes,
    such as those of other programs, or small ones, is copied.

    Raises: ValueError for a file that is damaged, or is no safetensors file; and, naming all paths
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
    target = Path(path)
    tensors, structure = open_checkpoint(target)
    names, values, nodes = (
        below(at, part) for part in (tensors, structure.values, structure.nodes)
    )
    if at and not (names or values or nodes):
        parts = sorted({name.split(".")[0] for name in (*tensors, *structure.values)})
        raise ValueError(f"load: there is nothing at {at!r} in {path}, which has {parts}")
    with _explained(target):
        require(not names.keys() & values.keys(), "a leaf is there twice")
        found: dict[str, Any] = {
            key: _read(name, tensors[name], structure) for key, name in names.items()
        }
        found |= {key: structure.values[name] for key, name in values.items()}
        if like is None:
            return rebuild(found, {key: structure.nodes[name] for key, name in nodes.items()})
    return _like(target, found, like)


def _read(name: str, read: Callable[[], Tensor], structure: Structure) -> Tensor:
    """A tensor as `save` was given it."""
    tensor = read()
    if name in structure.crc32:
        intact = crc32(tensor) == structure.crc32[name]
        require(intact, f"the bytes of {name!r} are not those that were saved")
    return _unpaired(tensor, structure.dtypes[name]) if name in structure.dtypes else tensor


def _like(path: Path, found: Mapping[str, Any], like: Any) -> Any:
    """The leaves that were found in the structure of ``like``."""
    with located("load: `like`"):
        expected, _ = leaves_by_path(like)
    faults = dict.fromkeys(expected.keys() - found.keys(), "not in the file")
    for name in found.keys() - expected.keys():
        faults[name] = f"{describe(found[name])} in the file, not expected"
    for name in expected.keys() & found.keys():
        if describe(found[name]) != describe(expected[name]):
            faults[name] = f"{describe(found[name])} in the file"
    if faults:
        for name in faults.keys() & expected.keys():
            faults[name] += f", expected {describe(expected[name])}"
        count = "a leaf differs" if len(faults) == 1 else f"{len(faults)} leaves differ"
        lines = [f"  {name}: {fault}" for name, fault in sorted(faults.items())]
        message = f"load: {path} is not like the tree `like`, {count}:"
        raise ValueError("\n".join([message, *lines]))
    return optree.tree_structure(like).unflatten(
        [_on_device(found[name], leaf) for name, leaf in expected.items()]
    )


def _on_device(leaf: Any, like: Any) -> Any:
    return leaf if not isinstance(leaf, Tensor) or like.is_meta else leaf.to(like.device)


def open_checkpoint(path: Path) -> tuple[dict[str, Callable[[], Tensor]], Structure]:
    """What reads each tensor, by name, and the rest of a checkpoint.

    Raises: ValueError for no checkpoint; OSError, such as FileNotFoundError.
    """
    index = path if path.name.endswith(".json") else index_of(path)
    with _explained(path):
        if index == path or (index.exists() and not path.exists()):
            return _open_index(index)
        tensors, metadata = _open_file(path)
        return tensors, _structure(metadata.get("funcnet"))


def _structure(text: Any) -> Structure:
    """What `save` wrote; nothing in a file of another program's."""
    if text is None:
        return EMPTY
    require(isinstance(text, str), "its description is no text")
    return decode(text)


def _open_index(path: Path) -> tuple[dict[str, Callable[[], Tensor]], Structure]:
    _check_regular(path)
    with open(path, "rb") as file:
        text = file.read(LIMIT + 1)
    require(len(text) <= LIMIT, f"an index of more than {LIMIT} bytes")
    try:
        index = json.loads(text)
    except RecursionError:
        raise ValueError("the index is nested too deeply") from None
    index = index if isinstance(index, dict) else {}
    places, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(places, dict) or not isinstance(metadata, dict):
        raise ValueError("the index has no weight_map, or its metadata are no dict")
    shards: dict[str, dict[str, Callable[[], Tensor]]] = {}
    for name in places.values():
        # A name and no path: an index must not reach into other folders.
        plain = (
            isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")
        )
        require(plain, f"the index names {name!r}, which is no file's name")
        if name not in shards:
            try:
                shards[name], _ = _open_file(path.with_name(name))
            except FileNotFoundError:
                raise ValueError(f"the file {name!r}, which the index names, is missing") from None
    for key, name in places.items():
        require(key in shards[name], f"{key!r} is not in {name!r}, where the index has it")
    tensors = {key: shards[name][key] for key, name in places.items()}
    return tensors, _structure(metadata.get("funcnet"))


def _open_file(path: Path) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    try:
        from safetensors import safe_open
    except ImportError:
        raise ImportError('load: needs safetensors: pip install "funcnet[io]"') from None
    _check_regular(path)
    file = safe_open(path, framework="pt", device="cpu")
    names = file.keys()
    with open(path, "rb") as raw:
        size = min(int.from_bytes(raw.read(8), "little"), HEADER_LIMIT)
        entries = len(_OFFSETS.findall(raw.read(size)))
    # The reader takes the last of two tensors of one name.
    require(entries == len(names), "a name is in its header twice")

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            tensor = file.get_tensor(name)
            return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()

        return read

    return {name: reader(name) for name in names}, file.metadata() or {}


def _check_regular(path: Path) -> None:
    require(path.exists() is False or path.is_file(), "not a file")
    if not path.exists():
        raise FileNotFoundError(f"load: there is no file {path}")


def _unpaired(tensor: Tensor, dtype: str) -> Tensor:
    known = {str(kind).removeprefix("torch."): kind for kind in STORED_AS_PAIRS}
    require(dtype in known, f"its dtypes have {dtype!r}")
    real = tensor.dtype.to_complex() if tensor.dtype.is_floating_point else None
    require(real == known[dtype] and tensor.shape[-1:] == (2,), "a tensor is not of pairs")
    return torch.view_as_complex(tensor)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Any error of reading as one that says which file it is, and what is wrong with it."""
    try:
        yield
    except (ImportError, OSError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"load: {path} is damaged, or is no checkpoint: {reason}") from error
