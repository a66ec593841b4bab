"""`save`: all ranks write the parts that they have; then one names them in an index."""

import contextlib
import errno
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funcnet.checkpoint import safetensors
from funcnet.checkpoint.files import check_path, locked, replaced, sync_folder, synced
from funcnet.checkpoint.parted import encode_parts
from funcnet.checkpoint.regions import Division, Divisions
from funcnet.checkpoint.saving import check_size, prepared, unchanged
from funcnet.checkpoint.shards import index_of, new_save, old_shards, shard_paths
from funcnet.checkpoint.structure import EMPTY as NOTHING, Structure, encode
from funcnet.distributed.checkpoints.agreement import everyone
from funcnet.distributed.checkpoints.states import as_single, divisions_of, leaves_of
from funcnet.distributed.processes.sameness import check_same
from funcnet.distributed.processes.start import Mesh
from funcnet.errors import located, require
from funcnet.parted_params import Splits


def save(
    path: str | os.PathLike[str], tree: Any, mesh: Mesh, placed: Mapping[str, Splits] | None = None
) -> None:
    """Write a tree of tensors that lie on several ranks, such as a train state, to a folder.

    All ranks call it. Each writes a file of the parts that it has, and of what several have one of
    them writes it, so that all write about as much; nothing is sent but their names. When all files
    are on the disk, one rank writes an index ``path + ".index.json"`` that names them, and then
    the files of the checkpoint before are removed: whenever a process is killed, or a disk is full,
    ``path`` is the old checkpoint or the new one, whole.

    `load` gives it to as many ranks as there are then, in other parts, `funcnet.load` to a single
    process, and `export` makes one file of it.

    Args:
        path: as for `funcnet.save`, and the same on all ranks. All ranks share its folder.
        tree: this rank's; as for `funcnet.save`. The paths and values of its leaves are those of a
            single process, or parts of those. A rank may have some of the leaves alone, as the
            stages of a pipeline do.
        mesh: of all ranks that save.
        placed: how leaves are parted, by dotted path, as `state_placements` gives it; what is
            not named is whole, and the same on all ranks that have it. Without it all is whole,
            and `check_same` looks whether it is the same on all ranks but those of other stages.

    Raises:
        ValueError, TypeError: what cannot be written; they name the path of the leaf.
        OSError, such as of a full disk. Where one rank fails, it is an error on all.
        PeerError: another rank has died, or is late.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fn.distributed.save(f"{folder}/run.safetensors", {"w": torch.ones(2)}, {"data": 1})
    ...     fn.load(f"{folder}/run.safetensors")
    {'w': tensor([1., 1.])}
    """
    write("save", path, tree, mesh, placed)


def write(
    name: str,
    path: str | os.PathLike[str],
    tree: Any,
    mesh: Mesh,
    placed: Mapping[str, Splits] | None,
    score: float | None = None,
) -> None:
    """`save`, with a score beside the tree; ``name`` is the function that errors name."""
    if placed is None:
        placed = {}
        check_whole(name, tree, mesh)
    ranks = everyone(mesh)
    first = ranks.place == 0
    with contextlib.ExitStack() as lock:
        tensors, told = ranks.agree(
            name, lambda: _prepared(name, path, tree, placed, lock if first else None)
        )
        target = Path(path)
        with located(f"{name}:"):
            plan = Plan(told)
        files = shard_paths(target, len(told), told[0]["save"])
        own = {leaf: tensors[leaf] for leaf in plan.own(ranks.place)}
        _, sizes = ranks.agree(
            name,
            lambda: _write_own(name, target, files[ranks.place], own, needed=first),
            undo=lambda: _remove(files[ranks.place]),
        )
        # A rank that fails from here on removes nothing: the index may be there.
        _, told = ranks.agree(
            name,
            lambda: (None, _commit(name, target, files, sizes, plan, score) if first else []),
        )
        # To remove files takes time, as to write them does: each rank removes some.
        old = [target.with_name(each) for each in told[0][ranks.place :: len(told)]]
        ranks.agree(name, lambda: (None, _remove_all(old)))


def check_whole(name: str, tree: Any, mesh: Mesh) -> None:
    """Raise ValueError unless a tree is the same on the ranks that should have the same."""
    hint = "pass placed=state_placements(train_state, model, x) for what is in parts"
    for axis in ("data", "model"):
        try:
            check_same(as_single(tree), mesh, axis=axis)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; {hint}") from None


def _prepared(
    name: str,
    path: Any,
    tree: Any,
    placed: Mapping[str, Splits],
    lock: contextlib.ExitStack | None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors to write, and what the other ranks must know; one rank takes the lock."""
    check_path(name, path)
    target = Path(path)
    tensors, told = _described(as_single(tree), placed)
    if lock is not None:
        with _unchanged(name, target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.enter_context(locked(target))
            except BlockingIOError as error:
                message = "another process is saving it now"
                raise BlockingIOError(error.errno, message) from None
    return tensors, {**told, "path": target.name, "save": new_save()}


def _write_own(
    name: str, target: Path, file: Path, own: Mapping[str, Tensor], *, needed: bool
) -> tuple[None, int]:
    """Write this rank's file, and tell its size; 0 if there is none."""
    if not own and not needed:
        return None, 0
    with _unchanged(name, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with synced(file) as opened:
                safetensors.write(opened, own, {"format": "pt"})
        except BaseException:
            _remove(file)
            raise
        sync_folder(target.parent)
        return None, file.stat().st_size


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink()


def _remove_all(files: list[Path]) -> int:
    for file in files:
        _remove(file)
    return len(files)


def _commit(
    name: str, target: Path, files: list[Path], sizes: list[int], plan: "Plan", score: float | None
) -> list[str]:
    """Write the index, and tell the names of the files that it replaces."""
    with _unchanged(name, target):
        _check_seen(files, sizes)
        text = plan.index([file.name for file in files], score)
        with replaced(index_of(target)) as opened:
            opened.write(text)
    # The new one is there, whatever is left of the old.
    _remove(target)
    written = [file for file, size in zip(files, sizes, strict=True) if size]
    return [file.name for file in old_shards(target, written)]


@contextlib.contextmanager
def _unchanged(name: str, target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unchanged(name, target, error) from error


def _check_seen(files: list[Path], sizes: list[int]) -> None:
    """Raise OSError unless this rank sees what all ranks have written."""
    for rank, (file, size) in enumerate(zip(files, sizes, strict=True)):
        if size and not (file.exists() and file.stat().st_size == size):
            message = f"rank {rank} wrote {file.name}, which rank 0 does not see"
            raise FileNotFoundError(errno.ENOENT, f"{message}: all ranks must share the folder")


def _described(tree: Any, placed: Mapping[str, Splits]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors to write, and what the other ranks must know of them."""
    leaves = leaves_of(tree, placed)
    tensors, structure = prepared(tree)
    entries = {}
    for name, tensor in tensors.items():
        leaf = leaves[name]
        shape, divisions, place = divisions_of(leaf, placed.get(name, ()))
        if all([division.parts == 1 for division in divisions]):
            divisions, place = (), ()
            tensors[name] = tensor.reshape((*shape, *tensor.shape[leaf.dim() :]))
        dtype = safetensors.NAMES.get(leaf.dtype, "C128")
        entries[name] = [[dtype, shape, divisions], place, tensor.nbytes]
    kept = ("nodes", "dots", "values", "dtypes")
    return tensors, {"tensors": entries} | {part: getattr(structure, part) for part in kept}


class Plan:
    """Who writes what, the same on all ranks; made of what each told the others."""

    def __init__(self, told: list[dict[str, Any]]) -> None:
        paths = [each["path"] for each in told]
        require(len({*paths}) == 1, f"the ranks have different paths: {sorted({*paths})}")
        self._structure = _merged(told)
        self._kinds: dict[str, Any] = {}
        first: dict[str, int] = {}
        holders: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
        sizes: dict[tuple[str, tuple[int, ...]], int] = {}
        for rank, each in enumerate(told):
            for name, (kind, place, size) in each["tensors"].items():
                known = self._kinds.setdefault(name, kind)
                require(
                    known == kind,
                    f"rank {first.setdefault(name, rank)} has {_said(known)} at {name!r}, rank "
                    f"{rank} has {_said(kind)}",
                )
                first.setdefault(name, rank)
                holders[name, tuple(place)].append(rank)
                sizes[name, tuple(place)] = size
        load = [0] * len(told)
        self._writers: dict[tuple[str, tuple[int, ...]], int] = {}
        for part in sorted(holders, key=lambda part: (-sizes[part], part)):
            writer = min(holders[part], key=lambda rank: (load[rank], rank))
            self._writers[part] = writer
            load[writer] += sizes[part]
        self._size = sum(load)
        for name, (_, _, divisions) in self._kinds.items():
            for place in product(*[range(parts) for parts, *_ in divisions]):
                there = (name, place) in holders
                require(there, f"no rank has the part {place} of {name!r}, parted by {divisions}")

    def own(self, rank: int) -> list[str]:
        """The leaves of which a rank writes its part."""
        return [name for (name, _), writer in self._writers.items() if writer == rank]

    def index(self, files: list[str], score: float | None) -> bytes:
        """The text of the index; the files are those of the ranks."""
        places, parted = {}, {}
        for name, (kind, shape, splits) in sorted(self._kinds.items()):
            divisions: Divisions = tuple(
                [Division(n, dim, tuple(s), front) for n, dim, s, front in splits]
            )
            numbers = product(*[range(parts) for parts, *_ in divisions])
            names = [files[self._writers[name, place]] for place in numbers]
            if divisions:
                dtype = safetensors.DTYPES.get(kind, torch.complex128)
                parted[name] = (dtype, tuple(shape), divisions, names)
            else:
                (places[name],) = names
        text = encode(self._structure._replace(score=score))
        check_size(self._kinds, text)
        index: dict[str, Any] = {
            "metadata": {"total_size": self._size, "funcnet": text},
            "weight_map": places,
        }
        if parted:
            index["parts"] = encode_parts(parted)
        written = json.dumps(index, separators=(",", ":")).encode()
        require(len(written) <= safetensors.HEADER_LIMIT, "the index is too long")
        return written


def _said(kind: Any) -> str:
    dtype, shape, divisions = kind
    return f"{dtype} {tuple(shape)}" + (f" in parts {divisions}" if divisions else "")


def _merged(told: list[dict[str, Any]]) -> Structure:
    """What is beside the tensors, of all ranks; raise ValueError where they do not agree."""
    parts: dict[str, Any] = {}
    for part in ("nodes", "dots", "values", "dtypes"):
        merged = parts[part] = {}
        for rank, each in enumerate(told):
            for name, value in each[part].items():
                known = merged.setdefault(name, value)
                same = known == value or known != known
                require(same, f"{name!r} is {known!r} on a rank, and {value!r} on rank {rank}")
    # What a pipeline's rank has nothing of is empty there, and not on others.
    names = {name for each in told for kind in ("tensors", "values") for name in each[kind]}
    empty = [path for path, kind in parts["nodes"].items() if kind in ("dict", "none")]
    for path in empty:
        if any([name.startswith(f"{path}.") for name in names]):
            del parts["nodes"][path]
    return NOTHING._replace(**parts)
