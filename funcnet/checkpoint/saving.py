"""`save`: a tree of tensors as a file of the safetensors format."""

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funcnet import runtime
from funcnet.checkpoint import safetensors
from funcnet.checkpoint.files import check_path, replaced, synced
from funcnet.checkpoint.shards import index_of, remove_shards, shard_paths
from funcnet.checkpoint.structure import Structure, encode, parts_by_path
from funcnet.errors import located, require
from funcnet.parted_params import refuse_parted_state


def save(
    path: str | os.PathLike[str],
    tree: Any,
    *,
    max_shard_bytes: int | None = None,
    checksum: bool = False,
) -> None:
    """Write a tree of tensors, such as a train state, to a safetensors file.

    The file is written aside, synced and renamed, so that whenever the process is killed, or the
    disk is full, ``path`` is the old file or the new one, whole. Each tensor is named by its
    dotted path, such as ``params.0.weight``, for any program that reads the format. There is no
    pickle in it.

    Args:
        path: the file. Its folder is made if it is not there.
        tree: any pytree whose leaves are tensors, numbers, bools and strings, in dicts, tuples,
            NamedTuples, lists and None. Tensors may lie on any device, and be not contiguous; two
            that share memory are written, and loaded, as two. complex128 is stored as pairs of
            float64, which `load` takes back; a dtype that the format lacks is a TypeError.
        max_shard_bytes: if given, and the tensors take more bytes, they go to several files of
            at most so many bytes, or of one tensor, in the folder of ``path``; an index
            ``path + ".index.json"`` in the form of Hugging Face's is written last. `load` takes
            the same path.
        checksum: also write a CRC-32 of each tensor, which `load` then checks. It takes a third
            of a second for each gigabyte, at both ends, and the tensors are read at once.

    Raises:
        ValueError, TypeError: what cannot be written; they name the path of the leaf.
        OSError, such as of a full disk.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fn.save(f"{folder}/run.safetensors", {"w": torch.ones(2), "epoch": 3})
    ...     fn.load(f"{folder}/run.safetensors")
    {'w': tensor([1., 1.]), 'epoch': 3}
    """
    write(path, tree, max_shard_bytes=max_shard_bytes, checksum=checksum)


def write(
    path: str | os.PathLike[str],
    tree: Any,
    *,
    max_shard_bytes: int | None = None,
    checksum: bool = False,
    score: float | None = None,
) -> None:
    """`save`, with a score beside the tree."""
    check_path("save", path)
    target = Path(path)
    with located("save:"):
        require(
            max_shard_bytes is None or max_shard_bytes >= 1,
            f"max_shard_bytes must be >= 1, got {max_shard_bytes}",
        )
        refuse_parted_state(tree)
        tensors, structure = prepared(tree, score)
        if checksum:
            sums = {name: safetensors.crc32(tensor) for name, tensor in tensors.items()}
            structure = structure._replace(crc32=sums)
        text = encode(structure)
        check_size(tensors, text)
    size = sum([tensor.nbytes for tensor in tensors.values()])
    try:
        if max_shard_bytes is None or size <= max_shard_bytes:
            with replaced(target) as file:
                safetensors.write(file, tensors, {"format": "pt", "funcnet": text})
            remove_shards(target, kept=())
        else:
            _write_shards(target, tensors, text, max_shard_bytes)
    except OSError as error:
        raise unchanged("save", target, error) from error


def prepared(tree: Any, score: float | None = None) -> tuple[dict[str, Tensor], Structure]:
    """The tensors of a tree by path, in dtypes that the format has, and the rest of it.

    Raises:
        ValueError, TypeError: what cannot be written.
    """
    require(sys.byteorder == "little", "needs a little-endian machine")
    transformed = runtime.is_tracing() or runtime.is_batched()
    require(not transformed, "expects values to write; it cannot be in jit or vmap")
    leaves, nodes, dots = parts_by_path(tree)
    tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    values = {name: leaf for name, leaf in leaves.items() if name not in tensors}
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
    for name, value in values.items():
        _check_value(name, value)
    dtypes = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.complex128:
            dtypes[name] = "complex128"
            tensors[name] = torch.view_as_real(tensor.detach().resolve_conj())
    return tensors, Structure(nodes, dots, values, dtypes, {}, score)


def unchanged(name: str, target: Path, error: OSError) -> OSError:
    """An error of writing that says that the checkpoint is the old one."""
    message = f"{name}: {target} is as it was before: {error.strerror or error}"
    return type(error)(error.errno, message)


def _check_tensor(name: str, tensor: Tensor) -> None:
    require(name != "__metadata__", "a leaf must not be named '__metadata__'")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the path {name!r} cannot be written as UTF-8") from None
    if tensor.layout != torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout)
        raise TypeError(f"expects dense tensors, got a {kind} one at {name!r}")
    if tensor.dtype not in safetensors.NAMES and tensor.dtype != torch.complex128:
        raise TypeError(f"the format has no dtype for the {tensor.dtype} at {name!r}")
    storage = tensor.untyped_storage()
    if storage.device.type == "meta" or tensor.nbytes > 0 == storage.nbytes():
        raise ValueError(f"expects values to write, got a tensor without any at {name!r}")


def _check_value(name: str, value: Any) -> None:
    if type(value) not in (bool, int, float, str):
        advice = "; make a tensor of it" if hasattr(value, "__array__") else ""
        if hasattr(value, "state_dict"):
            advice = "; save its state_dict()"
        raise TypeError(
            "expects tensors, numbers, bools and strings as leaves, got "
            f"{type(value).__name__} at {name!r}{advice}"
        )
    if isinstance(value, int):
        require(value.bit_length() <= 4096, f"the number at {name!r} is too large")


def check_size(names: Iterable[str], text: str) -> None:
    """Raise ValueError for what would take a longer header, or index, than `load` reads."""
    sizes = [len(name.encode()) + 200 for name in names]
    require(
        2 * len(text) + sum(sizes) <= safetensors.HEADER_LIMIT,
        f"{len(sizes)} tensors, and numbers and strings of {len(text)} characters, are too many; "
        "make tensors of them",
    )


def _write_shards(target: Path, tensors: Mapping[str, Tensor], text: str, limit: int) -> None:
    shards: list[dict[str, Tensor]] = []
    left = -math.inf
    for name, tensor in tensors.items():
        left -= tensor.nbytes
        if left < 0:
            shards.append({})
            left = limit - tensor.nbytes
        shards[-1][name] = tensor
    size = sum([tensor.nbytes for tensor in tensors.values()])
    target.parent.mkdir(parents=True, exist_ok=True)
    paths = shard_paths(target, len(shards))
    written: list[Path] = []
    try:
        for path, shard in zip(paths, shards, strict=True):
            written.append(path)
            with synced(path) as file:  # no one knows of it before the index is there
                safetensors.write(file, shard, {"format": "pt"})
        index = {
            "metadata": {"total_size": size, "funcnet": text},
            "weight_map": {
                name: path.name for path, shard in zip(paths, shards, strict=True) for name in shard
            },
        }
        with replaced(index_of(target)) as file:
            file.write(json.dumps(index, indent=2).encode())
    except BaseException:
        _remove(written)
        raise
    _remove([target])
    remove_shards(target, kept=paths)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
