"""The law of residuals: which layers compute what is of one example from others of its batch."""

from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import Tree
from funcnet.runtime import storage_id
from funcnet.testing.assertions import require
from funcnet.testing.samples import scaled


def check_residuals(case: Any) -> None:
    """A layer that keeps a statistic of the batch says so, by its ``mixes_examples``.

    Each residual is a parameter, the state or the key; or it grows with the batch; or it does not
    depend on x. One that is none of these, such as the mean of a batch, makes what is of one
    example depend on the others. The batch is the first axis of x, if all tensors of x have it.
    """
    if case.layer.mixes_examples or not (twice := _with_twice_the_batch(case)):
        return
    own = {storage_id(leaf) for leaf in tree.leaves((case.params, case.state, case.key))}
    others = case.vjp(x=scaled(case.x, 0.5))[1]
    every = tree.leaves(case.pullback), twice, tree.leaves(others)
    for path, leaf, more, other in zip(tree.paths(case.pullback), *every, strict=True):
        kept = storage_id(leaf) in own or leaf.shape != more.shape
        if not kept and not torch.equal(leaf, other):
            what = f"the residual {path} is no statistic of the batch"
            require(False, f"{what}, or the layer has mixes_examples=True")


def _with_twice_the_batch(case: Any) -> list[Tensor]:
    """The residuals for x twice over, one behind the other; none if x has no batch."""
    leaves = tree.leaves(case.x)
    if len({leaf.shape[:1] for leaf in leaves}) != 1 or not leaves[0].dim():
        return []
    x: Tree = tree.map(lambda leaf: torch.cat([leaf, leaf]), case.x)
    try:
        if not tree.alike(case.layer.init(case.key, x), (case.params, case.state)):
            return []
        return tree.leaves(case.vjp(x=x)[1])
    except (ValueError, TypeError):
        return []  # the first axis is no batch
