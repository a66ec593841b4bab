"""`load`: a tree of tensors from safetensors files, that anybody may have written."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet.checkpoint.files import check_path
from funcnet.checkpoint.safetensors import HEADER_LIMIT, Mapped, crc32, open_mapped, parse
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
    with _explained(target):
        require(not names.keys() & values.keys(), "a leaf is there twice")
        found: dict[str, Any] = {
            key: _read(name, tensors[name], structure) for key, name in names.items()
        }
        found |= {key: structure.values[name] for key, name in values.items()}
        if like is None:
            kinds = {key: structure.nodes[name] for key, name in nodes.items()}
            dots = {key: structure.dots[name] for key, name in below(at, structure.dots).items()}
            return rebuild(found, kinds, dots)
    return _like(target, found, like)


def _read(name: str, file: Mapped, structure: Structure) -> Tensor:
    """A tensor as `save` was given it."""
    tensor = file.read(name)
    if name in structure.crc32:
        intact = crc32(tensor) == structure.crc32[name]
        require(intact, f"the bytes of {name!r} are not those that were saved")
    return _unpaired(tensor, structure.dtypes[name]) if name in structure.dtypes else tensor


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
        count = "a leaf differs" if len(faults) == 1 else f"{len(faults)} leaves differ"
        lines = [f"  {name}: {fault}" for name, fault in sorted(faults.items())]
        message = f"load: {path} is not like the tree `like`, {count}:"
        raise ValueError("\n".join([message, *lines]))
    return optree.tree_structure(like).unflatten(
        [_laid_out(_on_device(found[name], leaf), leaf) for name, leaf in expected.items()]
    )


def _same_kind(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape
    return type(a) is type(b)


def _on_device(leaf: Any, like: Any) -> Any:
    kept = not isinstance(leaf, Tensor) or like.is_cpu or like.is_meta
    return leaf if kept else leaf.to(like.device)


def _laid_out(leaf: Any, like: Any) -> Any:
    """A tensor in the strides of ``like``: kernels that are picked by them round differently."""
    if not isinstance(leaf, Tensor) or like.is_contiguous():
        return leaf
    return torch.empty_like(like, device=leaf.device, requires_grad=False).copy_(leaf)


def open_checkpoint(path: Path) -> tuple[dict[str, Mapped], Structure]:
    """The file of each tensor, by name, and the rest of a checkpoint.

    Raises:
        ValueError: no checkpoint.
        OSError, such as FileNotFoundError.
    """
    index = path if path.name.endswith(".json") else index_of(path)
    if index != path and (path.exists() or not index.exists()):
        with _explained(path):
            file = open_mapped(path)
            return dict.fromkeys(file.entries, file), _structure(file.metadata.get("funcnet"))
    with _explained(index):
        return _open_index(index)


def _structure(text: Any) -> Structure:
    """What `save` wrote; nothing in a file of another program's."""
    if text is None:
        return EMPTY
    require(isinstance(text, str), "the description is no text")
    return decode(text)


def _open_index(path: Path) -> tuple[dict[str, Mapped], Structure]:
    require(not path.exists() or path.is_file(), "not a file")
    with open(path, "rb") as file:
        text = file.read(HEADER_LIMIT + 1)
    require(len(text) <= HEADER_LIMIT, f"more than {HEADER_LIMIT} bytes")
    index = parse(text, "the index")
    places, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(places, dict) or not isinstance(metadata, dict):
        raise ValueError("the index has no weight_map, or its metadata are no dict")
    shards: dict[str, Mapped] = {}
    for key, name in places.items():
        # A name and no path: an index must not reach into other folders.
        plain = isinstance(name, str) and re.fullmatch(r"(?!\.\.?$)[^/\\:\0]+", name)
        require(plain, f"the index names {name!r}, which is no file's name")
        if name not in shards:
            try:
                shards[name] = open_mapped(path.with_name(name))
            except OSError as error:
                raise ValueError(f"{name[:99]!r}, of the index: {error.strerror}") from error
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        require(key in shards[name].entries, f"{key!r} is not in {name!r}, where the index has it")
    tensors = {key: shards[name] for key, name in places.items()}
    return tensors, _structure(metadata.get("funcnet"))


def _unpaired(tensor: Tensor, dtype: str) -> Tensor:
    pairs = tensor.dtype == torch.float64 and tensor.shape[-1:] == (2,)
    require(dtype == "complex128" and pairs, f"a tensor is stored as {dtype!r}")
    return torch.view_as_complex(tensor)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Any error of reading as one that says which file it is, and what is wrong with it."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        reason = f"{error}".partition("\n")[0][:500] or type(error).__name__
        raise ValueError(f"load: {path} is damaged, or is no checkpoint: {reason}") from error
