"""What optree does with trees, and trees of the same shapes with other tensors."""

from collections.abc import Callable, Mapping
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
    """The tree with each tensor replaced by one of the same shape and dtype without data.

    >>> to_meta({"weight": torch.ones(2, 3)})["weight"]
    tensor(..., device='meta', size=(2, 3))
    """
    return optree.tree_map(
        lambda leaf: torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf,
        tree,
    )


def placeholder(tree: Any, device: torch.device) -> Any:
    """Tensors of the shapes and dtypes of ``tree`` on ``device`` that own a single element.

    For code that reads the shape, dtype and device of an example, never its values.

    >>> x = placeholder(torch.ones(1000, 1000), torch.device("cpu"))
    >>> x.shape, x.untyped_storage().nbytes()
    (torch.Size([1000, 1000]), 4)
    """
    return optree.tree_map(
        lambda leaf: torch.empty((), dtype=leaf.dtype, device=device).expand(leaf.shape), tree
    )


def device_of(tree: Any) -> torch.device:
    """The device of the first tensor of a tree.

    >>> device_of({"weight": torch.ones(1), "bias": None})
    device(type='cpu')
    """
    for leaf in optree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            return leaf.device
    got = describe(tree) if optree.tree_leaves(tree) else "none"
    raise ValueError(f"expected at least one tensor in the tree, got {got}")


def describe(tree: Any) -> str:
    """The shapes and dtypes in a tree, for error messages.

    >>> describe((torch.ones(2, 3), {"a": torch.tensor(1)}))
    "(float32 (2, 3), {'a': int64 ()})"
    """
    found = shapes(tree)
    return f"{found}; make a tensor of it by torch.from_numpy" if _NUMPY in found else found


_NUMPY = "a numpy array of "


def shapes(tree: Any) -> str:
    """The shapes and dtypes in a tree, where arrays of numpy are as good as tensors.

    >>> shapes({"a": torch.ones(2, 3).numpy()})
    "{'a': a numpy array of float32 (2, 3)}"
    """
    if isinstance(tree, Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')} {tuple(tree.shape)}"
    if type(tree).__module__ == "numpy" and hasattr(tree, "dtype"):
        return f"{_NUMPY}{tree.dtype} {tuple(tree.shape)}"
    if isinstance(tree, tuple):
        return f"({', '.join([shapes(child) for child in tree])})"
    if isinstance(tree, Mapping):
        inside = ", ".join([f"{name!r}: {shapes(child)}" for name, child in tree.items()])
        return f"{{{inside}}}"
    return type(tree).__name__
