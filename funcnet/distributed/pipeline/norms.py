"""Norms of the gradients of all stages, for the optimizer of one."""

from collections.abc import Mapping, Sequence

import torch

from funcnet.collectives import Axis
from funcnet.core import Optimizer
from funcnet.optimizers.leaves import Across
from funcnet.optimizers.lift import with_trees


def over_stages(
    optimizer: Optimizer, axis: Axis, tied: Mapping[str, Sequence[int]], device: torch.device
) -> Optimizer:
    """The optimizer, whose norms of all leaves are those of all stages.

    Args:
        optimizer: of the params of one stage.
        axis: the stages.
        tied: which stages have each leaf that several have; the first of them counts it.
        device: for what stages tell each other.

    >>> over_stages(fn.sgd(0.1), Axis("pipe", 1, ""), {}, torch.device("cpu")).name
    'sgd'
    """
    if axis.size == 1:
        return optimizer
    elsewhere = frozenset([path for path, stages in tied.items() if stages[0] != axis.index])
    across = Across(axis, elsewhere, device)
    return with_trees(optimizer.name, optimizer, lambda trees: trees.across(across))
