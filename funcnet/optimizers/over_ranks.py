"""Optimizers of params some of which are parts over ranks."""

from collections.abc import Callable, Mapping
from typing import Any

from funcnet.checks import check_kind
from funcnet.core import Layer, Optimizer
from funcnet.errors import require
from funcnet.optimizers.lift import Trees, paths, with_trees
from funcnet.parted_params import Splits, for_each_form, has_parts, placements


def knowing_parts(optimizer: Optimizer, model: Layer) -> Callable[[Any], Optimizer]:
    """``batch -> optimizer``: that of a training step, which knows what of the model is a part.

    >>> optimizer = fn.sgd(0.1)
    >>> knowing_parts(optimizer, fn.linear(2))((torch.ones(5, 3), None)) is optimizer
    True
    """
    if not has_parts(model):
        return lambda batch: optimizer
    of = for_each_form(lambda x: over_parts(optimizer, placements(model, x)))
    return lambda batch: of(batch[0])


def over_parts(optimizer: Optimizer, placements: Mapping[str, Splits]) -> Optimizer:
    """The optimizer, of params some of which are parts over ranks: its norms are of whole leaves.

    For loops of one's own around tensor-parallel and `sharded` layers; `funcnet.train_step` and
    `pipeline_step` do it themselves. Norms of all leaves, as of
    `funcnet.optimizers.clip_by_global_norm`, are then those of the whole, and `mean` leaves alone
    what a layer has reduced.

    Args:
        optimizer: an elementwise one, if there are parts; see `funcnet.Optimizer`.
        placements: what `placements` gives for the model.

    State: that of the optimizer.
    Raises:
        ValueError: an optimizer that is not elementwise, or a leaf that ``placements`` lacks.

    >>> model, x = fn.linear(2), torch.ones(5, 3)
    >>> clipped = fn.chain(fn.optimizers.clip_by_global_norm(1.0), fn.sgd(1.0))
    >>> optimizer = over_parts(clipped, fn.distributed.placements(model, x))
    >>> params = {"weight": torch.zeros(2, 3), "bias": torch.full((2,), 3.0)}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]["bias"]
    tensor([-0.7071, -0.7071])
    """
    name = "over_parts"
    check_kind(name, optimizer, Optimizer)
    axes_of = {
        path: tuple([split.axis for split in splits if split.axis.size > 1])
        for path, splits in placements.items()
    }
    parted = [path for path, axes in axes_of.items() if axes]
    require(
        optimizer.elementwise or not parted,
        f"{name}: {optimizer.name} is not elementwise, so it cannot update {parted[:1]}, which is "
        "a part; of one's own, tell so by elementwise=True",
    )
    for path, splits in placements.items():
        for split in splits:
            other = [kind for kind, axis in optimizer.reduces if axis == split.axis]
            require(
                not split.reduced or other in ([], [split.reduced]),
                f"{name}: the gradient of {path!r} is the {split.reduced} of the ranks', and "
                f"{optimizer.name} takes the {' and '.join(other)}: see `sums` of the layer",
            )

    def told(trees: Trees) -> Trees:
        axes, before = [], trees.params.axes or [()] * len(trees.shapes)
        for path, known in zip(paths(trees.params), before, strict=True):
            if path not in axes_of:
                raise ValueError(f"{name}: placements has no {path!r}, only {list(axes_of)}")
            axes.append((*known, *[axis for axis in axes_of[path] if axis not in known]))
        return trees.over(axes)

    return with_trees(name, optimizer, told)
