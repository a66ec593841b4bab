"""How all of a train state is parted over ranks: params, and what an optimizer keeps of them."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import optree
from torch import Tensor

from funcnet import tree
from funcnet.checkpoint.regions import Divisions
from funcnet.checkpoint.structure import parts_by_path
from funcnet.collectives import Axis, Split
from funcnet.core import Layer, Optimizer, Tree
from funcnet.distributed.splits import Splits, placements
from funcnet.errors import require
from funcnet.random import key
from funcnet.train import init_train_state


def state_placements(model: Layer, optimizer: Optimizer, x: Tree) -> dict[str, Splits]:
    """How each leaf of a train state is parted over ranks, by dotted path; ``()`` for a whole one.

    Params are parted as `placements` says. What the optimizer keeps of a parameter, at a path that
    ends in the parameter's, is parted as it is, and inside `zero` once more, as a vector. All else,
    such as the number of steps, is whole, and the same on all ranks.

    Args:
        model: on this rank.
        optimizer: on this rank.
        x: an example input, of which only shape, dtype and device matter; nothing is computed.

    Raises:
        ValueError: the optimizer keeps something of a part in another shape, of which nothing can
            be said.

    >>> import funcnet as fn
    >>> found = state_placements(fn.linear(2), fn.adam(), torch.ones(5, 3))
    >>> found["params.weight"], found["opt_state.scale_by_adam.mu.weight"]
    ((), ())
    """
    start = init_train_state(model, optimizer, key(0), tree.to_meta(x))
    placed = placements(model, x)
    params = tree.to_dotted(start.params)
    found: dict[str, Splits] = dict.fromkeys(parts_by_path(as_single(start)).leaves, ())
    found |= {f"params.{path}": splits for path, splits in placed.items()}
    for path, leaf, over in _of_optimizer(start.opt_state, None):
        if not isinstance(leaf, Tensor):
            continue
        owners = [name for name in _endings(path) if name in params]
        for name in owners:
            splits = placed[name]
            if over is not None:
                splits = (*splits, Split(over, tuple(params[name].shape)))
            expected = splits[-1].part_shape if splits else tuple(params[name].shape)
            if tuple(leaf.shape) == expected:
                found[f"opt_state.{path}"] = splits
                break
        else:
            parted = [name for name in owners if placed[name] or over]
            require(
                not parted,
                f"state_placements: of {parted and parted[0]!r}, which is parted, the optimizer "
                f"keeps {path!r} in the shape {tuple(leaf.shape)}: it cannot be told what of it "
                "belongs to which part",
            )
    return found


def _endings(path: str) -> list[str]:
    """What a dotted path ends in, the longest first."""
    names = path.split(".")
    return [".".join(names[first:]) for first in range(len(names))]


def _of_optimizer(state: Any, over: Axis | None) -> Iterator[tuple[str, Any, Axis | None]]:
    """The leaves of an optimizer's state by path, and the axis over which `zero` parts them."""
    outside = optree.tree_map(
        lambda node: None if _is_zero(node) else node, state, is_leaf=_is_zero
    )
    yield from ((path, leaf, None) for path, leaf in parts_by_path(outside).leaves.items())
    inside = optree.tree_map(
        lambda node: node.inner if _is_zero(node) else None, state, is_leaf=_is_zero
    )
    axes = {node.axis for node in optree.tree_leaves(state, is_leaf=_is_zero) if _is_zero(node)}
    for axis in axes:
        yield from ((path, leaf, axis) for path, leaf in parts_by_path(inside).leaves.items())


def _is_zero(node: Any) -> bool:
    return type(node).__name__ == "ZeroState"


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
        f"{sorted(leaves)[:3]}: state_placements(model, optimizer, x) gives those of a train state",
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
        (split.axis.size, None if split.dim is None else split.dim % len(split.shape))
        for split in splits
    ]
    return shape, tuple(divisions), tuple([split.axis.index for split in splits])
