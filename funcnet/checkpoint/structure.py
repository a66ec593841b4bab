"""What a checkpoint says of its tree beside the tensors: as text, in the file's metadata.

The tensors of a file are named by their dotted paths, which say how dicts, and the fields of
NamedTuples, lie in one another. The rest is here: which parts are lists, tuples, None or empty
dicts, the leaves that are numbers or strings, and the dtypes that the format does not have.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from funcnet.errors import require
from funcnet.tree import from_dotted

VERSION = 1
LIMIT = 2**25
"""Of the text's characters, so that a hostile file takes no more memory than a large one."""

_PARTS = 2**21
"""Of all paths of a file that is loaded as nested dicts; each may become a dict."""

Value = bool | int | float | str


class Structure(NamedTuple):
    """What is not in the names of the tensors, by dotted path."""

    nodes: dict[str, str]
    """"list", "tuple", "none" or, if it is empty, "dict"."""
    values: dict[str, Value]
    """Leaves that are no tensors."""
    dtypes: dict[str, str]
    """Of tensors that are stored as another dtype."""
    crc32: dict[str, int]
    """Checksums of the tensors' bytes, if any."""
    score: float | None
    """What `save_step` was given to choose the best by."""


EMPTY = Structure({}, {}, {}, {}, None)

_FIELDS: dict[str, tuple[type, ...]] = {
    "nodes": (str,),
    "values": (bool, int, float, str),
    "dtypes": (str,),
    "crc32": (int,),
}


def leaves_by_path(tree: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The leaves of a tree by dotted path, in optree's order, and the `Structure.nodes`.

    Raises: ValueError for two leaves of one path, or one below another; TypeError for a key that
    is no name.

    >>> leaves_by_path({"w": (1, 2), "state": {}})
    ({'w.0': 1, 'w.1': 2}, {'state': 'dict', 'w': 'tuple'})
    """
    leaves: dict[str, Any] = {}
    nodes: dict[str, str] = {}
    _visit(tree, "", True, leaves, nodes)
    for path in (*leaves, *nodes):
        end = path.rfind(".")
        while end >= 0:
            require(path[:end] not in leaves, f"{path!r} lies below {path[:end]!r}, a leaf")
            end = path.rfind(".", 0, end)
        require("" not in leaves or path == "", f"{path!r} lies below '', a leaf")
    return leaves, nodes


def _visit(tree: Any, path: str, root: bool, leaves: dict[str, Any], nodes: dict[str, str]) -> None:
    children: Any = None
    if not isinstance(tree, (Tensor, int, float, str)) and not optree.tree_is_leaf(tree):
        children, _, names, _ = optree.tree_flatten_one_level(tree)
    if children is None:
        require(path not in leaves and path not in nodes, f"two leaves have the path {path!r}")
        leaves[path] = tree
        return
    kind = "none" if tree is None else "dict"
    if optree.is_namedtuple(tree):
        names = tree._fields
    elif optree.is_structseq(tree):
        names = optree.structseq_fields(tree)
    elif isinstance(tree, (tuple, list)):
        kind = "tuple" if isinstance(tree, tuple) else "list"
    if not children or kind != "dict":
        require(path not in leaves and path not in nodes, f"two parts have the path {path!r}")
        nodes[path] = kind
    for name, child in zip(names, children, strict=True):
        if not isinstance(name, (str, int)):
            what = f"{type(name).__name__} below {path!r}"
            raise TypeError(f"expects keys that are strings or integers, got a {what}")
        _visit(child, f"{name}" if root else f"{path}.{name}", False, leaves, nodes)


def encode(structure: Structure) -> str:
    """The structure as text, without what is empty."""
    content = {name: part for name, part in structure._asdict().items() if part or part == 0.0}
    text = json.dumps({"version": VERSION, **content}, separators=(",", ":"))
    require(
        len(text) <= LIMIT,
        f"the numbers and strings of the tree take {len(text)} characters, more than {LIMIT}; "
        "make tensors of them",
    )
    return text


def decode(text: str) -> Structure:
    """The structure of a text, which may be anybody's.

    Raises: ValueError.
    """
    require(len(text) <= LIMIT, f"its description has {len(text)} characters")
    try:
        found = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("its description is nested too deeply") from None
    require(isinstance(found, dict), "its description is no dict")
    version = found.pop("version", None)
    newer = isinstance(version, int) and version > VERSION
    advice = "; install a newer funcnet" if newer else ""
    require(version == VERSION, f"its format is version {version!r}, not {VERSION}{advice}")
    unknown = sorted(found.keys() - set(Structure._fields))
    require(not unknown, f"its description has {unknown[:3]}, which is unknown")
    for name, kinds in _FIELDS.items():
        part = found.get(name, {})
        correct = isinstance(part, dict) and all(type(value) in kinds for value in part.values())
        require(correct, f"its {name} are not what they should be")
    score = found.get("score")
    require(score is None or type(score) is float, "its score is no number")
    unknown = sorted({*found.get("nodes", {}).values()} - {"dict", "list", "tuple", "none"})
    require(not unknown, f"its nodes have the kind {unknown[:1]}")
    return EMPTY._replace(**found)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    require(len(found) == len(pairs), "a name is in its description twice")
    return found


def rebuild(leaves: Mapping[str, Any], nodes: Mapping[str, str]) -> Any:
    """The tree of dicts, lists, tuples and None that has these leaves and nodes.

    >>> rebuild({"w.0": 1, "w.1": 2}, {"state": "dict", "w": "tuple"})
    {'w': (1, 2), 'state': {}}
    """
    if leaves.keys() == {""}:
        return leaves[""]
    parts = sum([path.count(".") for path in (*leaves, *nodes)])
    require(parts <= _PARTS, f"its paths have {parts} parts, more than {_PARTS}")
    tree: Any = {"": from_dotted(leaves)}
    by_depth = sorted(nodes.items(), key=lambda item: len(_keys(item[0])))
    for path, _ in by_depth:
        _parent(tree, path).setdefault(_keys(path)[-1], {})
    for path, kind in reversed(by_depth):
        parent, name = _parent(tree, path), _keys(path)[-1]
        parent[name] = _converted(parent[name], kind)
    return tree[""]


def _keys(path: str) -> list[str]:
    """The keys on the way to a part of ``{"": tree}``."""
    return ["", *path.split(".")] if path else [""]


def _parent(tree: dict[str, Any], path: str) -> dict[str, Any]:
    for key in _keys(path)[:-1]:
        tree = tree.setdefault(key, {})
        require(isinstance(tree, dict), f"{path!r} lies below a leaf")
    return tree


def _converted(node: Any, kind: str) -> Any:
    require(isinstance(node, dict), "a leaf is described as a node")
    if kind == "none":
        return node or None
    if kind == "dict" or node.keys() != {str(index) for index in range(len(node))}:
        return node
    items = [node[str(index)] for index in range(len(node))]
    return tuple(items) if kind == "tuple" else items


def below(path: str, names: Iterable[str]) -> dict[str, str]:
    """Of the names those at or below a path: from the path that is left to the name.

    >>> below("params", ["params.w", "step"]), below("step", ["params.w", "step"])
    ({'w': 'params.w'}, {'': 'step'})
    """
    if not path:
        return {name: name for name in names}
    return {
        name[len(path) + 1 :]: name for name in names if name == path or name.startswith(f"{path}.")
    }


STORED_AS_PAIRS = (torch.complex128, torch.complex32)
"""Dtypes that are stored as real and imaginary parts, in a last dimension of 2."""
