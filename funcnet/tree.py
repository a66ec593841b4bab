"""Trees of tensors: the few helpers on top of optree that the rest of funcnet needs.

A tree is any optree pytree; a *parameter tree* is a nested dict with string keys and tensor
leaves. Functions here never change a tree, they return new ones.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor


def leaves(tree: Any) -> list[Any]:
    """The leaves of a tree, in optree's order (dict keys sorted).

    >>> leaves({"b": torch.ones(2), "a": torch.zeros(1)})
    [tensor([0.]), tensor([1., 1.])]
    """
    return optree.tree_leaves(tree)


def map(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """``function`` applied leaf by leaf; ``rest`` are trees of the same structure.

    >>> map(lambda a, b: a + b, {"w": torch.ones(1)}, {"w": torch.ones(1)})
    {'w': tensor([2.])}
    """
    return optree.tree_map(function, tree, *rest)


def path_string(path: Sequence[Any]) -> str:
    """The dotted form of a path, as in the keys of ``torch.nn.Module.state_dict()``."""
    return ".".join(str(entry) for entry in path)


def to_dotted(tree: Mapping[str, Any]) -> dict[str, Tensor]:
    """A parameter tree as a flat dict with dotted keys, those of torch's ``state_dict()``.

    >>> to_dotted({"0": {"weight": torch.ones(1), "bias": torch.zeros(1)}})
    {'0.weight': tensor([1.]), '0.bias': tensor([0.])}
    """
    flat: dict[str, Tensor] = {}
    for name, child in tree.items():
        if isinstance(child, Mapping):
            flat.update({f"{name}.{path}": leaf for path, leaf in to_dotted(child).items()})
        else:
            flat[name] = child
    return flat


def from_dotted(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inverse of `to_dotted`: a parameter tree from a ``state_dict()``.

    >>> from_dotted({"0.weight": torch.ones(1), "0.bias": torch.zeros(1)})
    {'0': {'weight': tensor([1.]), 'bias': tensor([0.])}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


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


_TENSOR = {Tensor}


class Flattener:
    """``optree.tree_flatten`` for a loop: it remembers the treedef that it saw last.

    A training loop flattens trees of one structure over and over. Matching a tree against a
    known treedef takes a tenth of the time of finding its treedef. The result is the same.
    """

    def __init__(self) -> None:
        self._treedef: optree.PyTreeSpec | None = None

    def __call__(self, tree: Any) -> tuple[list[Any], optree.PyTreeSpec]:
        treedef = self._treedef
        if treedef is not None:
            try:
                found = treedef.flatten_up_to(tree)
            except (ValueError, TypeError):
                found = None
            # A leaf of the old structure may be a subtree of the new one.
            if found is not None and {type(leaf) for leaf in found} <= _TENSOR:
                return found, treedef
        found, self._treedef = optree.tree_flatten(tree)
        return found, self._treedef

    def like(self, treedef: optree.PyTreeSpec, tree: Any, what: str) -> list[Any]:
        """The leaves of a tree that must have the structure ``treedef``."""
        try:
            return treedef.flatten_up_to(tree)
        except (ValueError, TypeError):
            example = treedef.unflatten(range(treedef.num_leaves))
            check_same_structure(example, tree, what)
            raise


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
