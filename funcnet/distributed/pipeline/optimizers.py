"""The optimizer of one stage, which knows that other stages have other params."""

import torch

from funcnet import tree
from funcnet.collectives import Axis
from funcnet.core import Optimizer, Params, Tree
from funcnet.distributed.pipeline.stages import Stages
from funcnet.optimizers.leaves import Across, Leaves
from funcnet.optimizers.lift import Trees, leaves_update, lifted, with_loss_scale, with_trees
from funcnet.optimizers.parts import some_of


def over_stages(
    optimizer: Optimizer, axis: Axis, stages: Stages, device: torch.device
) -> Optimizer:
    """The optimizer, whose norms of all leaves are those of all stages; see `choosing_of_all`.

    Args:
        optimizer: of the params of one stage.
        axis: the stages.
        stages: of leaves that several of them have, the first of these counts it.
        device: for what stages tell each other.
    """
    if axis.size == 1:
        return optimizer
    tied = stages.tied.items()
    elsewhere = frozenset([path for path, having in tied if having[0] != axis.index])
    across = Across(axis, elsewhere, device)
    knowing = choosing_of_all(optimizer, stages)
    return with_trees(optimizer.name, knowing, lambda trees: trees.across(across))


def choosing_of_all(optimizer: Optimizer, stages: Stages) -> Optimizer:
    """The optimizer, which chooses leaves by path among those of all stages.

    What `funcnet.optimizers.masked` chooses may all be on other stages, and a choice of no leaf of
    the model is the same error on all of them.
    """
    all_paths = [path for stage in stages.each for path in tree.to_dotted(stage.params)]
    paths = tuple(dict.fromkeys(all_paths))
    inside = leaves_update(optimizer)

    def init_state(params: Params) -> Tree:
        with some_of(paths):
            return optimizer.init_state(params)

    def update_leaves(g: Leaves, opt_state: Tree, trees: Trees) -> tuple[Leaves, Tree]:
        with some_of(paths):
            return inside(g, opt_state, trees)

    made = lifted(optimizer.name, init_state, update_leaves, **optimizer.metadata)
    return with_loss_scale(made, optimizer.loss_scale)
