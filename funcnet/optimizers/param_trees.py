"""The params of an update, flattened, and the trees that are like them."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from funcnet import runtime, tree
from funcnet.core import Params, Tree
from funcnet.optimizers.leaves import Across, Axes, Leaves

_flatten = tree.Flattener()
_shape = attrgetter("shape")


def _places(leaves: list[Tensor]) -> list[int]:
    """Where each leaf is in memory, or which tensor it is, if that has no memory of its own."""
    if runtime.is_transformed(*leaves):
        return [*map(id, leaves)]
    return [leaf.data_ptr() or id(leaf) for leaf in leaves]


class Trees:
    """The params of an update, flattened; takes trees like them apart and puts them together.

    Where params and state are ``donated``, their leaves count as fresh: their memory may be
    written to; `Applied` updates are then those of the last transform of a chain alone.
    """

    def __init__(self, params: Params, donated: bool = False) -> None:
        leaves, treedef = _flatten(params)
        # Two leaves that are one tensor, or views of one, would be written to twice.
        self.donated = donated and len({*_places(leaves)}) == len(leaves)
        self._set(leaves, treedef, self.donated)

    def _set(
        self,
        leaves: list[Tensor],
        treedef: Any,
        fresh: bool,
        axes: Sequence[Axes] | None = None,
        across: Across | None = None,
    ) -> None:
        self.treedef = treedef
        self.params = Leaves(leaves, fresh)
        self.params.treedef, self.params.axes, self.params.across = treedef, axes, across
        self.shapes = [*map(_shape, leaves)]

    def part(
        self, leaves: list[Tensor], treedef: Any, donated: bool, axes: Sequence[Axes] | None
    ) -> "Trees":
        """Of other leaves of the params, in a tree of their own; only state is donated.

        ``axes`` are those over which each of them is a part.
        """
        trees = object.__new__(Trees)
        trees.donated = donated and self.donated
        trees._set(leaves, treedef, False, axes, self.params.across)
        return trees

    def over(self, axes: Sequence[Axes]) -> "Trees":
        """The same, of params that are parts over these axes."""
        return self._told(axes, self.params.across)

    def across(self, across: Across) -> "Trees":
        """The same, of params of which these ranks have the others."""
        return self._told(self.params.axes, across)

    def _told(self, axes: Sequence[Axes] | None, across: Across | None) -> "Trees":
        trees = object.__new__(Trees)
        trees.donated = self.donated
        trees._set(self.params.tensors, self.treedef, self.params.fresh, axes, across)
        return trees

    def within(self, donated: bool) -> "Trees":
        """For an optimizer inside another: it leaves the params, and unless donated the state."""
        if not self.donated:
            return self
        return self.part(self.params.tensors, self.treedef, donated, self.params.axes)

    def split(
        self, found: Tree, what: str, fresh: bool = False, shapes: list[torch.Size] | None = None
    ) -> Leaves:
        """The leaves of a tree; ValueError with ``what`` unless it is like the params.

        With ``shapes`` it is like them in names, and has these shapes.
        """
        shapes = self.shapes if shapes is None else shapes
        return Leaves(tree.leaves_like(shapes, self.treedef, found, what), fresh)

    def join(self, leaves: Leaves) -> Any:
        """The tree of these leaves."""
        return self.treedef.unflatten(leaves)
