"""Whether ranks still have the same numbers, or have drifted apart."""

import ctypes
import hashlib
import json
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from funcnet import tree
from funcnet.collectives import Axis, group_of
from funcnet.core import Tree
from funcnet.distributed.processes.start import Mesh, axis_of, rank_name

_DIGEST = 16
# So many leaves are in an error.
_SHOWN = 5


def check_same(values: Tree, mesh: Mesh, *, axis: str = "data") -> None:
    """Raise an error, on all ranks of a mesh, if those of an axis do not have the same tree.

    Leaves are compared by path, dtype, shape and bit for bit: NaN is the same as NaN, and 0.0 is
    not the same as -0.0. What is gathered is a digest of 16 bytes of the whole tree; those of
    leaves only if it differs. Computing it takes about a second for a GB.

    Args:
        values: any tree that the ranks of the axis should all have, such as a TrainState. Each
            rank's parts along other axes are compared with the same parts. What is parted along
            this axis, such as the optimizer's state of ``zero`` along "data", differs, and does not
            belong there.
        mesh: of the ranks, all of which call it together.
        axis: the axis whose ranks are compared.

    Raises: ValueError: which leaves differ, by dotted path, and which ranks have which.

    >>> import funcnet as fn
    >>> params, _ = fn.linear(2).init(fn.key(0), torch.ones(5, 3))
    >>> fn.distributed.check_same(params, {"data": 1})
    """
    compared = axis_of(mesh, axis)
    if not isinstance(mesh, DeviceMesh) or mesh.size() == 1:
        return
    own = {path: _described(leaf) for path, leaf in tree.to_dotted(values).items()}
    digest = hashlib.blake2b(json.dumps(own).encode(), digest_size=_DIGEST).digest()
    digests = compared.gather(_bytes(digest, mesh)[None])
    differs = (digests != digests[0]).any().to(torch.int32)
    others = [axis_of(mesh, name) for name in mesh.mesh_dim_names or () if name != axis]
    for other in others:
        differs = other.max(differs)
    if not differs:
        return
    listings = [json.loads(text) for text in _texts(json.dumps(own), compared, mesh)]
    ranks = group_of(compared.key).ranks if compared.size > 1 else ()
    told = [_told(listings, [rank_name(mesh, rank) for rank in ranks])]
    # Ranks that are along other axes raise too: else they would wait for these.
    for other in others:
        told = [text for line in told for text in _texts(line, other, mesh)]
    problems = [text for text in dict.fromkeys(told) if text]
    raise ValueError(f"check_same: ranks have drifted apart: {'; '.join(problems)}")


def _described(leaf: Any) -> tuple[str, str]:
    """What a leaf is, and a digest of its bits."""
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__, repr(leaf)
    kind = f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    plain = leaf.detach().resolve_conj().resolve_neg().cpu().contiguous()
    count = plain.numel() * plain.element_size()
    memory = (ctypes.c_char * count).from_address(plain.data_ptr()) if count else b""
    return kind, hashlib.blake2b(memory, digest_size=_DIGEST).hexdigest()


def _told(listings: list[dict[str, list[str]]], names: list[str]) -> str:
    """In which leaves the ranks differ; "" if they do not."""
    paths = dict.fromkeys([path for listing in listings for path in listing])
    problems = []
    for path in paths:
        by_value: dict[tuple[str, ...], list[str]] = {}
        for name, listing in zip(names, listings, strict=False):
            by_value.setdefault(tuple(listing.get(path, ("nothing", ""))), []).append(name)
        if len(by_value) < 2:
            continue
        kinds = {kind for kind, _ in by_value}
        if len(kinds) == 1:
            groups = " and ".join([f"({', '.join(each)})" for each in by_value.values()])
            problems.append(f"{path!r} has different numbers on {groups}")
        else:
            each = [f"{kind} on {', '.join(who)}" for (kind, _), who in by_value.items()]
            problems.append(f"{path!r} is {' and '.join(each)}")
    more = f"; and {len(problems) - _SHOWN} more leaves" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more


def _texts(text: str, axis: Axis, mesh: DeviceMesh) -> list[str]:
    """The texts of the ranks of an axis."""
    if axis.size == 1:
        return [text]
    coded = _bytes(text.encode(), mesh)
    lengths = axis.gather(torch.tensor([len(coded)], device=coded.device)).tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=coded.device)
    padded[: len(coded)] = coded
    rows = axis.gather(padded[None]).tolist()
    return [bytes(row[:n]).decode() for row, n in zip(rows, lengths, strict=True)]


def _bytes(values: bytes, mesh: DeviceMesh) -> Tensor:
    return torch.tensor([*values], dtype=torch.uint8, device=mesh.device_type)
