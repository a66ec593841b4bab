"""How all of a train state is parted over ranks: params, and what an optimizer keeps of them."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import optree
from torch import Tensor

from funcnet import tree
from funcnet.checkpoint.regions import Division, Divisions
from funcnet.checkpoint.structure import parts_by_path
from funcnet.collectives import Split
from funcnet.core import Layer, TrainState, Tree
from funcnet.distributed.sharding.sharded_optimizers import ZeroState
from funcnet.errors import require
from funcnet.parted_params import Splits, placed_by_layers, placements_of, stacked


def state_placements(train_state: TrainState, model: Layer, x: Tree) -> dict[str, Splits]:
    """How each leaf of a train state is parted over ranks, by dotted path; ``()`` for a whole one.

    Params are parted as `placements` says. What the optimizer keeps of a parameter, at a path that
    ends in the parameter's, is parted as it is, and inside `zero` once more, as a vector. All else,
    such as the number of steps, is whole, and the same on all ranks.

    Args:
        train_state: this rank's, such as a new one; on meta too. It may have some of the model's
            params alone, as a stage of a pipeline.
        model: whose params they are.
        x: an example input, of which only shape, dtype and device matter; nothing is computed.

    Raises:
        ValueError: params of another model; or the optimizer keeps something of a part in a shape
            that does not tell what of it belongs to which part.

    >>> import funcnet as fn
    >>> net, x = fn.linear(2), torch.ones(5, 3)
    >>> start = fn.init_train_state(net, fn.adam(), fn.key(0), x)
    >>> placed = state_placements(start, net, x)
    >>> placed["params.weight"], placed["opt_state.scale_by_adam.mu.weight"]
    ((), ())
    """
    by_layers, own = placed_by_layers(model, x)
    placed = placements_of(by_layers, own)
    params = {path: tuple(leaf.shape) for path, leaf in tree.to_dotted(train_state.params).items()}
    for path, shape in params.items():
        require(path in placed, f"state_placements: the model has no parameter {path!r}")
        expected = placed[path][-1].part_shape if placed[path] else shape
        require(
            shape == expected,
            f"state_placements: the model has {path!r} in parts of {expected}, got {shape}",
        )
    found: dict[str, Splits] = dict.fromkeys(parts_by_path(as_single(train_state)).leaves, ())
    found |= {f"params.{path}": placed[path] for path in params}
    for path, leaf in tree.to_dotted(train_state.state).items():
        # Frozen params are in the state, at the path of their layer.
        whose = ".".join([name for name in path.split(".") if name != "frozen"])
        if "frozen" in path.split(".") and whose in by_layers:
            found[f"state.{path}"] = stacked(tuple(leaf.shape), by_layers[whose])
    for path, kept in parts_by_path(_kept(train_state.opt_state, {})).leaves.items():
        owners = [name for name in _endings(path) if name in params]
        ways = {
            name: placed[name] + ((kept.splits[name],) if kept.splits else ())
            for name in owners
            if name in kept.splits or not kept.splits
        }
        shape = tuple(getattr(kept.leaf, "shape", ()))
        fits = [
            splits
            for name, splits in ways.items()
            if shape == (splits[-1].part_shape if splits else params[name])
        ]
        parted = [name for name, splits in ways.items() if splits]
        require(
            fits or not parted,
            f"state_placements: the optimizer keeps {path!r} in the shape {shape} of a part of "
            f"{parted and parted[0]!r}: it cannot be told what of it belongs to which part",
        )
        found[f"opt_state.{path}"] = fits[0] if fits else ()
    return found


def _endings(path: str) -> list[str]:
    """What a dotted path ends in, the longest first."""
    names = path.split(".")
    return [".".join(names[first:]) for first in range(len(names))]


class _Kept:
    """A leaf of an optimizer's state, and how `zero` parts the params that it is of."""

    def __init__(self, leaf: Any, splits: Mapping[str, Split]) -> None:
        self.leaf, self.splits = leaf, splits


def _kept(state: Any, splits: Mapping[str, Split]) -> Any:
    """An optimizer's state as a single process has it, with `_Kept` in the place of each leaf."""

    def of(node: Any) -> Any:
        return _kept(node.inner, dict(node.splits)) if _is_zero(node) else _Kept(node, splits)

    return optree.tree_map(of, state, is_leaf=_is_zero)


def _is_zero(node: Any) -> bool:
    return isinstance(node, ZeroState)


def as_single(state: Any) -> Any:
    """A tree as a single process has it, without the node that says what `zero` parts."""
    return optree.tree_map(
        lambda node: node.inner if _is_zero(node) else node, state, is_leaf=_is_zero
    )


def leaves_of(tree: Any, placed: Mapping[str, Splits]) -> dict[str, Any]:
    """The leaves of a tree on this rank by path, in optree's order, each of its part's shape.

    Raises:
        ValueError: something else is parted than is there.
    """
    leaves = parts_by_path(tree).leaves
    unknown = sorted(placed.keys() - leaves.keys())
    require(
        not unknown,
        f"`placed` has {unknown[:3]}, which the tree has not; its leaves are such as "
        f"{sorted(leaves)[:3]}: state_placements(train_state, model, x) gives those of a state",
    )
    for name, splits in placed.items():
        if not splits:
            continue
        leaf = leaves[name]
        for inner, outer in pairwise(splits):
            fits = tuple(outer.shape) == inner.part_shape
            require(fits, f"{name!r} is split as {outer.shape}, of parts of {inner.part_shape}")
        expected = splits[-1].part_shape
        got = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
        require(got == expected, f"{name!r} expects a part of shape {expected}, got {got}")
    return leaves


def divisions_of(
    leaf: Tensor, splits: Splits
) -> tuple[tuple[int, ...], Divisions, tuple[int, ...]]:
    """The whole shape of a leaf, how it is parted, and this rank's place among the parts."""
    shape = tuple(splits[0].shape) if splits else tuple(leaf.shape)
    divisions = [
        Division(
            split.axis.size,
            None if split.dim is None else split.dim % len(split.shape),
            split.sections,
            split.front,
        )
        for split in splits
    ]
    return shape, tuple(divisions), tuple([split.axis.index for split in splits])
