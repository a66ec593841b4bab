"""Trees of tensors to check the laws on: random, cast, perturbed, laid out otherwise, stacked."""

from collections.abc import Callable

import optree
import torch
from torch import Tensor

from funcnet import random, tree
from funcnet.core import Tree


def map_floating(function: Callable[..., Tensor], node: Tree, *rest: Tree) -> Tree:
    """``function`` of each floating-point leaf; other leaves as they are."""
    return tree.map(
        lambda leaf, *others: function(leaf, *others) if leaf.is_floating_point() else leaf,
        node,
        *rest,
    )


def cast(node: Tree, dtype: torch.dtype) -> Tree:
    """The tree with its floating-point leaves in ``dtype``."""
    return map_floating(lambda leaf: leaf.to(dtype), node)


def scaled(node: Tree, factor: float) -> Tree:
    """The tree with its floating-point leaves times ``factor``."""
    return map_floating(lambda leaf: leaf * factor, node)


def noise(key: Tensor, node: Tree) -> Tree:
    """Draws from N(0, 1) like the leaves; zeros for integers."""
    leaves, treedef = optree.tree_flatten(node)
    drawn = [
        random.normal(random.fold_in(key, index), leaf.shape, torch.float64, device=leaf.device).to(
            leaf.dtype
        )
        if leaf.is_floating_point()
        else torch.zeros_like(leaf)
        for index, leaf in enumerate(leaves)
    ]
    return optree.tree_unflatten(treedef, drawn)


def perturbed(key: Tensor, node: Tree) -> Tree:
    """The leaves, each made smaller by up to 5 %, so that what was in [0, 1] stays there."""
    return map_floating(
        lambda leaf, drawn: leaf * (0.975 + 0.025 * torch.tanh(drawn)), node, noise(key, node)
    )


def cotangent(key: Tensor, y: Tree) -> Tree:
    """A random cotangent of y; None for an integer."""
    return optree.tree_map(
        lambda leaf, drawn: drawn if leaf.is_floating_point() else None, y, noise(key, y)
    )


def non_contiguous(leaf: Tensor) -> Tensor:
    """The same values with twice the strides."""
    return torch.stack((leaf, leaf), -1)[..., 0]


def stack(members: list[Tree]) -> Tree:
    """Trees of one structure as one tree whose leaves have a first dimension more."""
    return optree.tree_map(lambda *leaves: torch.stack(leaves), *members)
