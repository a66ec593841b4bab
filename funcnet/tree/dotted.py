"""The dotted paths of leaves, and trees as flat dicts of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optree
from torch import Tensor


def path_string(path: Sequence[Any]) -> str:
    """The dotted form of a path, as in the keys of ``torch.nn.Module.state_dict()``.

    >>> path_string(("hidden", 0, "weight"))
    'hidden.0.weight'
    """
    return ".".join(str(entry) for entry in path)


def paths(tree: Any) -> list[str]:
    """The dotted paths of the leaves, in the order of `leaves`; of a single leaf, "".

    Keys of dicts, fields of NamedTuples and indices of tuples and lists are the parts of a path.

    >>> paths({"b": (torch.ones(2), torch.ones(2)), "a": {"w": torch.zeros(1)}})
    ['a.w', 'b.0', 'b.1']
    """
    accessors, _, _ = optree.tree_flatten_with_accessor(tree)
    return [path_string([getattr(e, "field", e.entry) for e in each]) for each in accessors]


def to_dotted(tree: Any) -> dict[str, Tensor]:
    """A tree as a flat dict with dotted keys: of params, those of torch's ``state_dict()``.

    The order is that of the names in the tree; see `paths` for the names.

    >>> to_dotted({"0": {"weight": torch.ones(1), "bias": torch.zeros(1)}})
    {'0.weight': tensor([1.]), '0.bias': tensor([0.])}
    """
    children = _children(tree)
    if children is None:
        return {"": tree}
    flat: dict[str, Tensor] = {}
    for name, child in children:
        if _children(child) is None:
            flat[name] = child
        else:
            flat.update({f"{name}.{path}": leaf for path, leaf in to_dotted(child).items()})
    return flat


def _children(tree: Any) -> Any:
    """The named parts of a dict, NamedTuple, tuple, list or registered node; None for a leaf."""
    if isinstance(tree, Mapping):
        return tree.items()
    if isinstance(tree, Tensor) or optree.tree_is_leaf(tree):
        return None
    parts, _, entries, *_ = optree.tree_flatten_one_level(tree)
    return zip(map(str, getattr(tree, "_fields", entries)), parts, strict=True)


def from_dotted(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inverse of `to_dotted`: a parameter tree from a ``state_dict()``.

    The leaves are the tensors that were given: clone them if their module goes on training.

    >>> from_dotted({"0.weight": torch.ones(1), "0.bias": torch.zeros(1)})
    {'0': {'weight': tensor([1.]), 'bias': tensor([0.])}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"from_dotted: {path!r} lies below {parent!r}, which is a leaf")
        if name in node:
            raise ValueError(f"from_dotted: {path!r} is a leaf, and others lie below it")
        node[name] = leaf
    return tree


def partition(predicate: Callable[[str], bool], params: Any) -> tuple[Any, Any]:
    """A parameter tree as two: the leaves whose dotted path the predicate is true of, and the rest.

    Both are sparse: they have no empty dicts.

    >>> partition(lambda path: path.endswith("bias"), {"0": {"weight": 1, "bias": 2}})
    ({'0': {'bias': 2}}, {'0': {'weight': 1}})
    """
    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for path, leaf in to_dotted(params).items():
        parts[not predicate(path)][path] = leaf
    return from_dotted(parts[0]), from_dotted(parts[1])


def merge(*trees: Any) -> Any:
    """The leaves of several parameter trees as one; no leaf may be in two of them.

    >>> merge({"0": {"weight": 1}}, {"0": {"bias": 2}})
    {'0': {'weight': 1, 'bias': 2}}
    """
    whole: dict[str, Any] = {}
    for tree in trees:
        for name, child in tree.items():
            if name not in whole:
                whole[name] = child
            elif isinstance(child, Mapping) and isinstance(whole[name], Mapping):
                whole[name] = merge(whole[name], child)
            else:
                raise ValueError(f"merge: {name!r} is in two of the trees")
    return whole
