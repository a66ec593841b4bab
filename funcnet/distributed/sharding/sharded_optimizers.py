"""Optimizers of params that are parts over ranks: `zero`, `over_parts`."""

from functools import lru_cache
from typing import Any

import torch

from funcnet import tree
from funcnet.checks import check_kind
from funcnet.collectives import Axis, Split
from funcnet.compiler.signature import register_node
from funcnet.core import Optimizer, Params, Tree
from funcnet.distributed.processes.start import Mesh, axis_of
from funcnet.distributed.sharding.flat_messages import gathered, own_piece, reduced
from funcnet.errors import located, require
from funcnet.optimizers.averaging import eval_params
from funcnet.optimizers.leaves import Leaves
from funcnet.optimizers.lift import leaves_update, lifted, paths, with_loss_scale
from funcnet.optimizers.param_trees import Trees
from funcnet.parted_params import PartedState, Splits

_MESSAGE = 2**22
"""The bytes of a message of `zero`, which are there a few times beside the gradients."""


class ZeroState(PartedState):
    """The state of an optimizer of this rank's pieces; as a pytree, a node around that state.

    In ``inner``, what is like the params has a piece, a vector, in the place of each leaf.
    ``splits`` are the dotted path of each leaf and how it is parted.

    >>> params = {"w": torch.ones(5)}
    >>> zero(fn.sgd(0.1, momentum=0.9), {"data": 1}).init_state(params)
    ZeroState(inner={'trace': TraceState(trace={'w': tensor([0., 0., 0., 0., 0.])},
                                         step=tensor(0))})
    """

    __slots__ = ("inner", "splits")

    def __init__(self, inner: Tree, splits: tuple[tuple[str, Split], ...]) -> None:
        self.inner, self.splits = inner, splits

    def placements(self) -> dict[str, Splits]:
        """How each tensor of the state is parted, by its path in this node; () for a whole one.

        >>> state = zero(fn.adam(), {"data": 1}).init_state({"w": torch.ones(5)})
        >>> [(path, len(splits)) for path, splits in state.placements().items()]
        [('inner.scale_by_adam.step', 0), ('inner.scale_by_adam.mu.w', 1),
         ('inner.scale_by_adam.nu.w', 1)]
        """
        found: dict[str, Splits] = {}
        for path, leaf in tree.to_dotted({"inner": self.inner}).items():
            of_it = [
                split
                for name, split in self.splits
                if f".{path}".endswith(f".{name}") and tuple(leaf.shape) == split.part_shape
            ]
            # The longest name that fits comes last among the sorted lengths of paths.
            found[path] = (max(of_it, key=lambda split: len(split.shape)),) if of_it else ()
        return found

    def eval_params(self, params: Params) -> Any:
        """Those that `funcnet.optimizers.eval_params` gives for the optimizer inside, whole."""
        leaves, treedef = tree.flatten(params)
        splits = [split for _, split in self.splits]
        pieces = treedef.unflatten([*map(own_piece, splits, leaves)])
        found = eval_params(self.inner, pieces)
        if found is pieces:
            return params
        return treedef.unflatten(gathered(tree.leaves(found), splits, _MESSAGE))

    def __repr__(self) -> str:
        return f"ZeroState(inner={self.inner!r})"


def _flatten(state: Any) -> tuple[Any, Any, Any]:
    return (state.inner,), state.splits, ("inner",)


def _unflatten(splits: Any, children: Any) -> Any:
    return ZeroState(children[0], splits)


register_node(ZeroState, _flatten, _unflatten, ("inner",), ("splits",))


def zero(optimizer: Optimizer, mesh: Mesh, *, axis: str = "data", sums: bool = False) -> Optimizer:
    """The optimizer, whose state is parted over the ranks of an axis: ZeRO-1.

    Each rank gives the gradients of its own part of the batch. Of their mean each gets a piece of
    each leaf, updates that, and the updates are gathered:

        ``g_piece = piece of mean(g)``, ``u_piece = update(g_piece, state, p_piece)``, ``u = all``

    It communicates as much as the mean of the gradients would, and a rank has the state of its
    pieces alone. A piece is a part of the leaf as a vector.

    Args:
        optimizer: an elementwise one; see `funcnet.Optimizer`. Norms of all leaves, as in
            `funcnet.optimizers.clip_by_global_norm`, are those of the whole gradients.
        mesh: a DeviceMesh, or a dict of the sizes of its axes.
        axis: the name of the axis.
        sums: whether gradients are summed, not averaged: for a loss that `total` makes of parts.

    Gradients are reduced in flat messages, half precision in float32.

    State:
        `ZeroState`, also over one rank.
    Raises:
        ValueError: an optimizer that is not elementwise; params that are parts over the axis
            already, as those of `sharded`; state of other params, or of another mesh.

    Source: Rajbhandari et al. 2020, "ZeRO: memory optimizations toward training trillion parameter
    models"; ``torch.distributed.optim.ZeroRedundancyOptimizer``.

    >>> optimizer = zero(fn.adam(0.1), {"data": 4})
    >>> params = {"w": torch.ones(6, 3, device="meta")}
    >>> state = optimizer.init_state(params)
    >>> state.inner["scale_by_adam"].mu["w"].shape
    torch.Size([5])
    >>> updates, state = optimizer.update(params, state, params)
    >>> updates["w"].shape
    torch.Size([6, 3])
    """
    check_kind("zero", optimizer, Optimizer)
    require(
        optimizer.elementwise,
        f"zero: {optimizer.name} is not elementwise: its update of a part of a leaf depends on "
        "the rest; of one's own, tell so by elementwise=True",
    )
    over, inside = axis_of(mesh, axis), leaves_update(optimizer)

    def init_state(params: Params) -> Tree:
        trees = Trees(params)
        splits = _splits(over, trees.treedef, tuple(trees.shapes))
        # Copies, as a state has memory of its own.
        pairs = zip(splits, trees.params, strict=True)
        pieces = [own_piece(split, leaf).clone() for (_, split), leaf in pairs]
        return ZeroState(optimizer.init_state(trees.treedef.unflatten(pieces)), splits)

    def update_leaves(g: Leaves, opt_state: Tree, trees: Trees) -> tuple[Leaves, Tree]:
        named = _checked(over, opt_state, trees)
        splits = [split for _, split in named]
        # They are read here for the last time, and go message by message.
        left, g.tensors = [*g.tensors], []
        given = Leaves(reduced(left, splits, not sums, _MESSAGE), fresh=True)
        pieces = [*map(own_piece, splits, trees.params)]
        axes = [(*each, over) for each in trees.params.axes or [()] * len(pieces)]
        inner_trees = trees.part(pieces, trees.treedef, True, axes)
        with located("zero:"):
            updates, inner = inside(given, opt_state.inner, inner_trees)
        left, updates.tensors = [*updates.tensors], []
        return Leaves(gathered(left, splits, _MESSAGE), True), ZeroState(inner, opt_state.splits)

    reduces = (("sum" if sums else "mean", over),) if over.size > 1 else ()
    made = lifted("zero", init_state, update_leaves, True, True, reduces)
    scale = optimizer.loss_scale
    return with_loss_scale(made, scale and (lambda opt_state: scale(opt_state.inner)))


@lru_cache(maxsize=16)
def _splits(
    axis: Axis, treedef: Any, shapes: tuple[torch.Size, ...]
) -> tuple[tuple[str, Split], ...]:
    """The dotted path of each leaf, and how it is parted."""
    names = [tree.path_string(path) for path in treedef.paths()]
    splits = [Split(axis, tuple(shape)) for shape in shapes]
    return tuple(zip(names, splits, strict=True))


def _checked(axis: Axis, opt_state: Tree, trees: Trees) -> tuple[tuple[str, Split], ...]:
    """How the leaves are parted; an error unless the state is of these."""
    if not isinstance(opt_state, ZeroState):
        got = tree.describe(opt_state)
        raise TypeError(f"zero: expects the state ZeroState(inner), got {got}")
    splits = _splits(axis, trees.treedef, tuple(trees.shapes))
    if opt_state.splits is not splits and opt_state.splits != splits:
        expected, got = (
            f"{len(each)} leaves over {[*{split.axis.key or 'one rank' for _, split in each}]}: "
            f"{[(path, split.shape) for path, split in each[:3]]}"
            for each in (splits, opt_state.splits)
        )
        raise ValueError(f"zero: expects the state of {expected}; got that of {got}")
    for path, each in zip(paths(trees.params), trees.params.axes or (), strict=False):
        require(
            axis.size == 1 or axis not in each,
            f"zero: {path!r} is a part over {axis.name!r} already, as those of sharded layers "
            "are; a partition of the leaves can update them without zero",
        )
    return splits
