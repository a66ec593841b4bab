"""What a checkpoint says of its tree beside the tensors: as text, in the file's metadata.

The tensors of a file are named by their dotted paths, which say how dicts, and the fields of
NamedTuples, lie in one another. The rest is here: which parts are lists, tuples, None or empty
dicts, the leaves that are numbers or strings, and the dtypes that the format does not have.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import optree
from torch import Tensor

from funcnet.checkpoint.safetensors import parse
from funcnet.errors import require

VERSION = 1
_PARTS, _DEPTH = 2**21, 2**8
"""Of all paths of a file that is loaded without ``like``, and of one: each may become a dict."""

Value = bool | int | float | str


class Structure(NamedTuple):
    """What is not in the names of the tensors, by dotted path."""

    nodes: dict[str, str]
    """"list", "tuple", "none" or, if it is empty, "dict"."""
    dots: dict[str, int]
    """How many dots the last key of a path has in it, for those that have."""
    values: dict[str, Value]
    """Leaves that are no tensors."""
    dtypes: dict[str, str]
    """Of tensors that are stored as another dtype."""
    crc32: dict[str, int]
    """Checksums of the tensors' bytes, if any."""
    score: float | None
    """What `save_step` was given to choose the best by."""


EMPTY = Structure({}, {}, {}, {}, {}, None)

NO_DOTS: Mapping[str, int] = {}

_FIELDS: dict[str, tuple[type, ...]] = {
    "nodes": (str,),
    "dots": (int,),
    "values": (bool, int, float, str),
    "dtypes": (str,),
    "crc32": (int,),
}


class Parts(NamedTuple):
    """A tree by dotted path: its leaves, in optree's order, and `Structure`'s nodes and dots."""

    leaves: dict[str, Any]
    nodes: dict[str, str]
    dots: dict[str, int]


def parts_by_path(tree: Any) -> Parts:
    """A tree by dotted path.

    Raises:
        ValueError: two leaves of one path, or one below another.
        TypeError: a key that is no name.

    >>> parts_by_path({"w": (1, 2), "state": {}})
    Parts(leaves={'w.0': 1, 'w.1': 2}, nodes={'state': 'dict', 'w': 'tuple'}, dots={})
    """
    parts = Parts({}, {}, {})
    leaves, nodes, _ = parts
    _visit(tree, "", True, parts)
    folders = {path.rpartition(".")[0] for path in (*leaves, *nodes) if "." in path}
    while folders:
        both = folders & leaves.keys()
        require(not both, f"there are leaves below {sorted(both)[:3]}, which are leaves too")
        folders = {path.rpartition(".")[0] for path in folders if "." in path}
    return parts


def _visit(tree: Any, path: str, root: bool, parts: Parts) -> None:
    leaf = isinstance(tree, Tensor) or optree.tree_is_leaf(tree)
    kind, names, children = ("leaf", (), ()) if leaf else _children(tree)
    if not children or kind != "dict":
        if path in parts.leaves or path in parts.nodes:
            raise ValueError(f"two parts of the tree have the path {path!r}")
        if leaf:
            parts.leaves[path] = tree
            return
        parts.nodes[path] = kind
    for name, child in zip(names, children, strict=True):
        if not isinstance(name, (str, int)):
            what = f"{type(name).__name__} below {path!r}"
            raise TypeError(f"expects keys that are strings or integers, got a {what}")
        name = str(name)
        below = name if root else f"{path}.{name}"
        if "." in name:
            parts.dots[below] = name.count(".")
        _visit(child, below, False, parts)


def _children(tree: Any) -> tuple[str, Any, Any]:
    """The kind of a node, the names of its children, and its children, in optree's order."""
    if type(tree) is dict:
        with suppress(TypeError):  # keys of several types, which optree puts in another order
            in_order = sorted(tree)
            return "dict", in_order, [tree[name] for name in in_order]
    children, _, names, _ = optree.tree_flatten_one_level(tree)
    if optree.is_namedtuple(tree):
        return "dict", tree._fields, children
    if optree.is_structseq(tree):
        return "dict", optree.structseq_fields(tree), children
    if isinstance(tree, (tuple, list)):
        return "tuple" if isinstance(tree, tuple) else "list", names, children
    return "none" if tree is None else "dict", names, children


def encode(structure: Structure) -> str:
    """The structure as text, without what is empty."""
    content = {name: part for name, part in structure._asdict().items() if part or part == 0.0}
    return json.dumps({"version": VERSION, **content}, separators=(",", ":"))


def decode(text: str) -> Structure:
    """The structure of a text, which may be anybody's.

    Raises:
        ValueError.
    """
    found = parse(text.encode(), "the description")
    version = found.pop("version", None)
    newer = isinstance(version, int) and version > VERSION
    advice = "; install a newer funcnet" if newer else ""
    require(version == VERSION, f"the format is version {version!r}, not {VERSION}{advice}")
    unknown = sorted(found.keys() - set(Structure._fields))
    require(not unknown, f"the description has {unknown[:3]}, which is unknown")
    for name, kinds in _FIELDS.items():
        part = found.get(name, {})
        correct = isinstance(part, dict) and all(type(value) in kinds for value in part.values())
        require(correct, f"the {name} are not what they should be")
    require(all(n > 0 for n in found.get("dots", {}).values()), "the dots are not counts")
    score = found.get("score")
    require(score is None or type(score) is float, "the score is no number")
    unknown = sorted({*found.get("nodes", {}).values()} - {"dict", "list", "tuple", "none"})
    require(not unknown, f"the nodes have the kind {unknown[:1]}")
    return EMPTY._replace(**found)


def rebuild(
    leaves: Mapping[str, Any], nodes: Mapping[str, str], dots: Mapping[str, int] = NO_DOTS
) -> Any:
    """The tree of dicts, lists, tuples and None that has these leaves and nodes.

    >>> rebuild({"w.0": 1, "w.1": 2, "a.b": 3}, {"state": "dict", "w": "tuple"}, {"a.b": 1})
    {'w': (1, 2), 'a.b': 3, 'state': {}}
    """
    if leaves.keys() == {""}:
        return leaves[""]
    parts = [path.count(".") for path in (*leaves, *nodes)]
    require(sum(parts) <= _PARTS, f"its paths have {sum(parts)} parts, more than {_PARTS}")
    require(max(parts, default=0) <= _DEPTH, f"it is deeper than {_DEPTH} dicts; give `like`")
    tree: Any = {"": {}}
    for path, leaf in leaves.items():
        parent, key = _place(tree, path, dots)
        require(key not in parent, f"{path!r} is a leaf, and others lie below it")
        parent[key] = leaf
    by_depth = sorted(nodes.items(), key=lambda item: len(_keys(item[0], dots)))
    for path, _ in by_depth:
        parent, key = _place(tree, path, dots)
        parent.setdefault(key, {})
    for path, kind in reversed(by_depth):
        parent, key = _place(tree, path, dots)
        parent[key] = _converted(parent[key], kind)
    return tree[""]


def _keys(path: str, dots: Mapping[str, int]) -> list[str]:
    """The keys on the way to a part of ``{"": tree}``."""
    if not dots:
        return ["", *path.split(".")] if path else [""]
    keys = []
    while path:
        count = 1 + dots.get(path, 0)
        path, *key = path.rsplit(".", count) if path.count(".") >= count else ("", path)
        keys.append(".".join(key))
    return ["", *reversed(keys)]


def _place(tree: dict[str, Any], path: str, dots: Mapping[str, int]) -> tuple[dict[str, Any], str]:
    """The dict that a part lies in, which is made if it is not there, and the key of the part."""
    *parents, last = _keys(path, dots)
    for key in parents:
        tree = tree.setdefault(key, {})
        require(isinstance(tree, dict), f"{path!r} lies below {key!r}, which is a leaf")
    return tree, last


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
