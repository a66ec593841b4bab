"""Trees of tensors: the few helpers on top of optree that the rest of funcnet needs.

A tree is any optree pytree; a *parameter tree* is a nested dict with string keys and tensor
leaves. Functions here never change a tree, they return new ones.
"""

import builtins
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet.errors import require

_shape = attrgetter("shape")


def leaves(tree: Any) -> list[Any]:
    """The leaves of a tree, in optree's order (dict keys sorted).

    >>> leaves({"b": torch.ones(2), "a": torch.zeros(1)})
    [tensor([0.]), tensor([1., 1.])]
    """
    return optree.tree_leaves(tree)


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of a tree, and its structure, whose ``unflatten`` makes such a tree of others.

    >>> flatten((1, {"a": 2}))
    ([1, 2], PyTreeSpec((*, {'a': *})))
    """
    return optree.tree_flatten(tree)


def map(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """``function`` applied leaf by leaf; ``rest`` are trees of the same structure.

    >>> map(lambda a, b: a + b, {"w": torch.ones(1)}, {"w": torch.ones(1)})
    {'w': tensor([2.])}
    """
    return optree.tree_map(function, tree, *rest)


def path_string(path: Sequence[Any]) -> str:
    """The dotted form of a path, as in the keys of ``torch.nn.Module.state_dict()``."""
    return ".".join(str(entry) for entry in path)


def to_dotted(tree: Any) -> dict[str, Tensor]:
    """A tree as a flat dict with dotted keys: of params, those of torch's ``state_dict()``.

    Keys of dicts, fields of NamedTuples and indices of tuples and lists are the parts of a path.

    >>> to_dotted({"0": {"weight": torch.ones(1), "bias": torch.zeros(1)}})
    {'0.weight': tensor([1.]), '0.bias': tensor([0.])}
    """
    flat: dict[str, Tensor] = {}
    for name, child in _children(tree):
        if _children(child) is None:
            flat[name] = child
        else:
            flat.update({f"{name}.{path}": leaf for path, leaf in to_dotted(child).items()})
    return flat


def _children(tree: Any) -> Any:
    """The named parts of a dict, NamedTuple, tuple or list; None for a leaf."""
    if isinstance(tree, Mapping):
        return tree.items()
    if isinstance(tree, (tuple, list)):
        return zip(
            getattr(tree, "_fields", None) or [str(i) for i in range(len(tree))], tree, strict=True
        )
    return None


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


Where = str | Collection[str] | Callable[[str], bool]
"""Some leaves of a tree: dotted paths of leaves or of what is above them, in which ``*`` stands for
any characters, dots too; or a function of the path."""


def selector(where: Where) -> Callable[[str], bool]:
    """Whether a dotted path is of a leaf that is meant; see `Where`.

    >>> chosen = selector(["0", "head.weight", "*.scale"])
    >>> chosen("0.bias"), chosen("head.weight"), chosen("head.bias"), chosen("1.norm.scale")
    (True, True, False, True)
    """
    if callable(where):
        return where
    plain = tuple([each for each in named_paths(where) if "*" not in each])
    patterns = [each for each in named_paths(where) if "*" in each]
    below = tuple([f"{each}." for each in plain])

    def chosen(path: str) -> bool:
        if path in plain or path.startswith(below):
            return True
        return any([fnmatchcase(path, each) or fnmatchcase(path, f"{each}.*") for each in patterns])

    return chosen


def named_paths(where: Where) -> tuple[str, ...]:
    """The paths that are meant by name."""
    return () if callable(where) else (where,) if isinstance(where, str) else tuple(where)


def chosen_leaves(where: Where, params: Any) -> list[str]:
    """The dotted paths of the leaves that are meant; ValueError for a path that no leaf has."""
    paths, chosen = list(to_dotted(params)), selector(where)
    for each in named_paths(where):
        known = any([selector(each)(path) for path in paths])
        require(known, f"no leaf has the path {each!r}, only {paths}")
    found = [path for path in paths if chosen(path)]
    require(found, f"no leaf is chosen of {paths}")
    return found


def leaf_at(path: str, params: Any) -> Tensor:
    """The leaf with a dotted path; ValueError where there is none, or a layer."""
    found = chosen_leaves(path, params)
    require(found == [path], f"expects the path of a leaf, and {path!r} has {found} in it")
    return to_dotted(params)[path]


def check_same_structure(expected: Any, tree: Any, what: str) -> None:
    """Raise ValueError, naming the first path that differs, unless both have one structure.

    >>> check_same_structure({"a": {"w": 1}}, {"a": {"v": 1}}, "grads")
    Traceback (most recent call last):
    ...
    ValueError: grads: the tree has no leaf 'a.w', and has 'a.v', which was not expected
    """
    if optree.tree_structure(expected) == optree.tree_structure(tree):
        return
    wanted = {path_string(path) for path in optree.tree_paths(expected)}
    present = {path_string(path) for path in optree.tree_paths(tree)}
    missing, extra = sorted(wanted - present), sorted(present - wanted)
    faults = []
    if missing:
        faults.append(f"has no leaf {missing[0]!r}")
    if extra:
        faults.append(f"has {extra[0]!r}, which was not expected")
    if not faults:
        faults.append(
            f"is a {optree.tree_structure(tree)}, expected {optree.tree_structure(expected)}"
        )
    raise ValueError(f"{what}: the tree {', and '.join(faults)}")


def _order(tree: Any) -> Any:
    """The names in a nested dict of tensors, in their order; None for any other tree."""
    if type(tree) is not dict:
        return None
    order: list[Any] = []
    nodes = [tree]
    for node in nodes:
        order.append(len(node))
        for name, child in node.items():
            order.append(name)
            if type(child) is dict:
                nodes.append(child)
                order.append(dict)
            elif type(child) is not Tensor:
                return None
    return order


class Flattener:
    """``optree.tree_flatten`` for a loop: it remembers the parameter tree that it saw last.

    A training loop flattens trees of one structure over and over. To compare a tree's names, and
    match it against a known treedef, takes a third of the time of finding its treedef. The result
    is the same.
    """

    def __init__(self) -> None:
        self._seen: tuple[Any, optree.PyTreeSpec | None] = (None, None)

    def __call__(self, tree: Any) -> tuple[list[Any], optree.PyTreeSpec]:
        order = _order(tree)
        seen, treedef = self._seen
        if treedef is not None and order is not None and order == seen:
            return treedef.flatten_up_to(tree), treedef
        leaves, treedef = optree.tree_flatten(tree)
        self._seen = (order, treedef)
        return leaves, treedef


def leaves_like(
    shapes: list[torch.Size], treedef: optree.PyTreeSpec, tree: Any, what: str
) -> list[Tensor]:
    """The leaves of a tree that must have this structure, and leaves of these shapes.

    >>> _, treedef = optree.tree_flatten({"a": torch.ones(2)})
    >>> leaves_like([torch.Size([2])], treedef, {"a": torch.ones(3)}, "grads")
    Traceback (most recent call last):
    ...
    ValueError: grads: expects shape (2,) at 'a', got float32 (3,)
    """
    try:
        found: list[Any] = treedef.flatten_up_to(tree)
        if [*builtins.map(_shape, found)] == shapes:
            return found
    except (ValueError, TypeError, AttributeError):
        pass
    expected = treedef.unflatten(range(len(shapes)))
    check_same_structure(expected, tree, what)
    paths = optree.tree_paths(expected)
    for path, shape, leaf in zip(paths, shapes, treedef.flatten_up_to(tree), strict=True):
        if not isinstance(leaf, Tensor) or leaf.shape != shape:
            at = path_string(path)
            raise ValueError(
                f"{what}: expects shape {tuple(shape)} at {at!r}, got {describe(leaf)}"
            )
    raise ValueError(f"{what}: expects a tree of tensors, got {describe(tree)}")


def alike(a: Any, b: Any) -> bool:
    """Whether two trees have one structure, and tensors of the same shapes and dtypes.

    >>> alike({"a": torch.ones(1), "b": torch.ones(2)}, {"b": torch.zeros(2), "a": torch.zeros(1)})
    True
    """
    leaves, treedef = optree.tree_flatten(a)
    others, other_treedef = optree.tree_flatten(b)
    return treedef == other_treedef and all(
        leaf.shape == other.shape and leaf.dtype == other.dtype
        for leaf, other in zip(leaves, others, strict=True)
    )


def to_meta(tree: Any) -> Any:
    """The tree with each tensor replaced by one of the same shape and dtype without data."""
    return optree.tree_map(
        lambda leaf: torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf,
        tree,
    )


def placeholder(tree: Any, device: torch.device) -> Any:
    """Tensors of the shapes and dtypes of ``tree`` on ``device`` that own a single element.

    For code that reads the shape, dtype and device of an example, never its values.
    """
    return optree.tree_map(
        lambda leaf: torch.empty((), dtype=leaf.dtype, device=device).expand(leaf.shape), tree
    )


def device_of(tree: Any) -> torch.device:
    """The device of the first tensor of a tree."""
    for leaf in optree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            return leaf.device
    raise ValueError("expected at least one tensor in the tree, got none")


def describe(tree: Any) -> str:
    """The shapes and dtypes in a tree, for error messages.

    >>> describe((torch.ones(2, 3), {"a": torch.tensor(1)}))
    "(float32 (2, 3), {'a': int64 ()})"
    """
    if isinstance(tree, Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')} {tuple(tree.shape)}"
    if isinstance(tree, tuple):
        return f"({', '.join([describe(child) for child in tree])})"
    if isinstance(tree, Mapping):
        return f"{{{', '.join([f'{name!r}: {describe(child)}' for name, child in tree.items()])}}}"
    return type(tree).__name__
