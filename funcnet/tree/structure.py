"""Trees that must have the structure of another one: errors by path, and flattening in a loop."""

from operator import attrgetter
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet.tree.dotted import path_string
from funcnet.tree.trees import describe

_shape = attrgetter("shape")


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
        if [*map(_shape, found)] == shapes:
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
