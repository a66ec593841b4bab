"""One of two formulas, as a condition says that may not be readable."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcnet import runtime, tree
from funcnet.compiler.loops import is_recording
from funcnet.control_flow import cond
from funcnet.core import Tree
from funcnet.optimizers.leaves import Leaves


def choose(
    condition: Tensor, yes: Callable[[], Tree], no: Callable[[], Tree], *, branches: bool = False
) -> Tree:
    """``yes()`` where a 0-d condition holds, else ``no()``; both are of one structure.

    A condition that can be read for free is, and one of the two is computed; otherwise, as on a
    GPU or under jit and vmap, both are, and neither waits for a device. With ``branches`` a
    compiled function runs one of the two, by `cond`: what is cheap is faster computed in one kernel
    with all around it.

    >>> choose(torch.tensor(True), lambda: {"w": torch.ones(1)}, lambda: {"w": torch.zeros(1)})
    {'w': tensor([1.])}
    """
    value = runtime.read(condition)
    if value is not None:
        return yes() if value else no()
    if branches and is_recording():
        return _branch(condition, yes, no)
    return tree.map(
        lambda one, other: one if one is other else torch.where(condition, one, other),
        yes(),
        no(),
    )


def _branch(condition: Tensor, yes: Callable[[], Tree], no: Callable[[], Tree]) -> Tree:
    """`cond`, of trees with `Leaves`; the second branch gives the dtypes of the first."""
    found: list[Any] = []

    def opened(branch: Callable[[], Tree]) -> list[Any]:
        leaves, treedef = tree.flatten(branch())
        found.append((leaves, treedef))
        return [each.tensors if isinstance(each, Leaves) else [each] for each in leaves]

    def second() -> list[Any]:
        return tree.map(lambda a, b: b.to(a.dtype), first, opened(no))

    def kept() -> list[Any]:
        first.extend(opened(yes))
        return first

    first: list[Any] = []
    chosen = cond(condition, kept, second)
    (leaves, treedef), _ = found
    pairs = zip(leaves, chosen, strict=True)
    return treedef.unflatten(
        [Leaves(each) if isinstance(leaf, Leaves) else each[0] for leaf, each in pairs]
    )
