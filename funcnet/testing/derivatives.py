"""Derivatives to compare a pullback with: by torch's autograd, and by finite differences."""

import math
from collections.abc import Callable, Iterator

import optree
import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import Tree
from funcnet.testing.assertions import by_path, magnitude, require
from funcnet.testing.samples import map_floating, noise


def autograd(function: Callable[[Tree], Tree], inputs: Tree, dy: Tree) -> Tree:
    """The pullback of a function by torch's autograd; None for integers."""
    leaves, treedef = optree.tree_flatten(inputs)
    with torch.enable_grad():
        fresh = [leaf.detach().clone().requires_grad_(leaf.is_floating_point()) for leaf in leaves]
        outputs = function(optree.tree_unflatten(treedef, fresh))
        pairs = [
            (y, cotangent)
            for y, cotangent in zip(by_path(outputs).values(), by_path(dy).values(), strict=True)
            if cotangent is not None and y.requires_grad
        ]
        wanted = [leaf for leaf in fresh if leaf.requires_grad]
        found: Iterator[Tensor] = iter(())
        if pairs and wanted:
            outputs, cotangents = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(outputs, wanted, cotangents, materialize_grads=True))
    grads = [
        next(found, torch.zeros_like(leaf)).detach() if leaf.requires_grad else None
        for leaf in fresh
    ]
    return optree.tree_unflatten(treedef, grads)


def require_finite_differences(
    key: Tensor, function: Callable[[Tree], Tree], inputs: Tree, dy: Tree, grads: Tree
) -> None:
    """The inner product of ``grads`` and a random direction is the change of ``function``."""
    # Steps are relative to the size of what they change.
    direction = map_floating(
        lambda drawn, leaf: drawn * (magnitude(leaf) or 1.0), noise(key, inputs), inputs
    )
    step = 1e-6

    def moved(by: float) -> float:
        return _inner(dy, function(map_floating(lambda a, d: a + by * d, inputs, direction)))

    numeric = (moved(step) - moved(-step)) / (2 * step)
    grads = _with_zeros(inputs, grads)
    analytic = _inner(grads, direction)
    size = _inner(
        tree.map(lambda leaf: leaf.double().abs(), grads),
        tree.map(lambda leaf: leaf.double().abs(), direction),
    )
    scale = max(abs(analytic), 1e-3 * size, 1e-6)
    require(
        abs(numeric - analytic) <= 1e-5 * scale,
        f"the pullback agrees with finite differences, got {analytic:.9g}, expected {numeric:.9g}",
    )


def _with_zeros(inputs: Tree, cotangents: Tree) -> Tree:
    """Cotangents with zeros where an integer has None."""
    found = by_path(cotangents)
    filled = [
        torch.zeros_like(leaf) if found.get(path) is None else found[path]
        for path, leaf in by_path(inputs).items()
        if leaf is not None
    ]
    return optree.tree_unflatten(optree.tree_structure(inputs), filled)


def _inner(a: Tree, b: Tree) -> float:
    """The sum of products; a leaf that is None counts nothing."""
    pairs = zip(by_path(a).values(), by_path(b).values(), strict=True)
    return math.fsum(
        float((left * right).sum())
        for left, right in pairs
        if left is not None and right is not None
    )
