"""`load`: each rank reads the parts that it has now, of files that other ranks may have written."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optree
from torch import Tensor

from funcnet.checkpoint.files import check_path
from funcnet.checkpoint.loading import (
    explained,
    laid_out,
    on_device,
    open_checkpoint,
    unlike,
)
from funcnet.checkpoint.parted import Stored
from funcnet.checkpoint.regions import piece_of
from funcnet.checkpoint.structure import below
from funcnet.core import EMPTY
from funcnet.distributed.checkpoints.agreement import everyone
from funcnet.distributed.checkpoints.states import as_single, divisions_of, leaves_of
from funcnet.distributed.processes.start import Mesh
from funcnet.parted_params import Splits
from funcnet.tree import describe


def load(
    path: str | os.PathLike[str],
    like: Any,
    mesh: Mesh,
    placed: Mapping[str, Splits] = EMPTY,
    *,
    at: str = "",
) -> Any:
    """This rank's parts of a checkpoint that `save`, or `funcnet.save`, wrote.

    The ranks that saved may have been more or fewer, or one, and their parts others: each rank
    reads what it has now, and nothing is sent. The values are the same, bit for bit.

    Args:
        path: as `save` was given it.
        like: a tree of this rank's structure, shapes and dtypes, such as a new train state, on
            meta too, as for `funcnet.load`.
        mesh: of all ranks that load; all of them call it.
        placed: how the leaves of ``like`` are parted, as for `save`.
        at: the dotted path of the part to load, such as "params"; paths in ``placed`` are below it.

    Raises:
        ValueError: a checkpoint of other layers or shapes, or a damaged one: on all ranks, naming
            the paths that differ on any.
        OSError, such as FileNotFoundError: on all ranks.
        PeerError: another rank has died, or is late.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fn.save(f"{folder}/run.safetensors", {"w": torch.ones(2)})
    ...     fn.distributed.load(f"{folder}/run.safetensors", {"w": torch.zeros(2)}, {"data": 1})
    {'w': tensor([1., 1.])}
    """
    ranks = everyone(mesh)
    (leaves, found), told = ranks.agree("load", lambda: _find(path, like, placed, at))
    target = Path(path)
    faults = {name: fault for each in told for name, fault in each["wrong"].items()}
    wanted = {name for each in told for name in each["wanted"]}
    for name, what in told[0]["others"].items():
        if name not in wanted:
            faults[name] = f"{what} in the file, not expected"
    if faults:
        raise unlike(target, faults)
    parts, _ = ranks.agree("load", lambda: (_parts(target, leaves, placed, found), None))
    return optree.tree_structure(like).unflatten(parts)


def _find(
    path: Any, like: Any, placed: Mapping[str, Splits], at: str
) -> tuple[Any, dict[str, Any]]:
    """This rank's leaves, and what a checkpoint has; and what the other ranks must know of it."""
    check_path("load", path)
    leaves = leaves_of(as_single(like), placed)
    tensors, structure = open_checkpoint(Path(path), lazily=True)
    stored: dict[str, Any] = {**tensors, **structure.values}
    found = {key: stored[name] for key, name in below(at, stored).items()}
    wrong = {name: _fault(name, leaf, placed.get(name, ()), found) for name, leaf in leaves.items()}
    return (leaves, found), {
        "wrong": {name: fault for name, fault in wrong.items() if fault},
        "wanted": [*leaves],
        "others": {name: _said(each) for name, each in found.items() if name not in leaves},
    }


def _parts(
    path: Path, leaves: Mapping[str, Any], placed: Mapping[str, Splits], found: Mapping[str, Any]
) -> list[Any]:
    """This rank's part of each leaf."""
    with explained(path):
        return [
            _part(leaf, placed.get(name, ()), found[name])
            if isinstance(leaf, Tensor)
            else found[name]
            for name, leaf in leaves.items()
        ]


def _said(found: Any) -> str:
    if isinstance(found, Stored):
        return f"{found.dtype}".removeprefix("torch.") + f" {found.shape}"
    return describe(found)


def _fault(name: str, leaf: Any, splits: Splits, found: Mapping[str, Any]) -> str | None:
    """What is wrong with what a checkpoint has for a leaf, if anything."""
    there, expected = found.get(name), leaf
    if isinstance(leaf, Tensor):
        expected = Stored(name, leaf.dtype, divisions_of(leaf, splits)[0], (), ())
        right = isinstance(there, Stored) and there[1:3] == expected[1:3]
    else:
        right = type(there) is type(leaf)
    if right:
        return None
    return f"{_said(there) if name in found else 'not'} in the file, expected {_said(expected)}"


def _part(leaf: Tensor, splits: Splits, stored: Stored) -> Tensor:
    """This rank's part, as the leaf lies."""
    shape, divisions, place = divisions_of(leaf, splits)
    part = stored.read(piece_of(shape, divisions, place)).view(leaf.shape)
    return laid_out(on_device(part, leaf), leaf)
