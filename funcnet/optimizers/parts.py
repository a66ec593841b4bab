"""Some of the leaves of the params as a tree of their own, for an optimizer of those alone."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import optree

from funcnet import tree
from funcnet.core import Params, Tree
from funcnet.errors import located
from funcnet.optimizers.leaves import Leaves
from funcnet.optimizers.lift import Trees


class Part:
    """Some of the leaves: their indices among all, and the structure of the tree of them alone.

    The tree is sparse: it has no empty dicts.
    """

    def __init__(self, indices: Mapping[str, Any]) -> None:
        """Take the index of each chosen leaf, by its dotted path."""
        nested: Any = tree.from_dotted({**indices})
        self.indices: list[int]
        self.indices, self.treedef = tree.flatten(nested)

    def of(self, params: Params) -> Tree:
        """The tree of the chosen leaves."""
        leaves = tree.leaves(params)
        return self.treedef.unflatten([leaves[index] for index in self.indices])

    def take(self, g: Leaves) -> Leaves:
        """The chosen leaves."""
        return Leaves([g.tensors[index] for index in self.indices], g.fresh)

    def put(self, updates: Leaves, result: Leaves) -> Leaves:
        """All leaves of ``result``, with ``updates`` for the chosen ones."""
        tensors = [*result]
        for index, update in zip(self.indices, updates, strict=True):
            tensors[index] = update
        return Leaves(tensors, result.fresh and updates.fresh)

    def trees(self, trees: Trees) -> Trees:
        """The chosen params, as an update of them alone takes them."""
        return trees.part(self.take(trees.params).tensors, self.treedef, donated=True)


class Parts:
    """The parts into which rules divide params, by label; found once for each structure."""

    def __init__(
        self, name: str, find: Callable[[Mapping[str, Any]], Mapping[str, Collection[str]]]
    ) -> None:
        """Take what finds the dotted paths of each part, of those of all leaves.

        Args:
            name: whose errors they are.
            find: ``paths -> {label: paths}``; may raise ValueError.
        """
        self.name, self.find = name, find
        self._seen: tuple[optree.PyTreeSpec | None, dict[str, Part]] = (None, {})

    def __call__(self, treedef: optree.PyTreeSpec) -> dict[str, Part]:
        seen, parts = self._seen
        if treedef is not seen and treedef != seen:
            indices = tree.to_dotted(treedef.unflatten(range(treedef.num_leaves)))
            with located(f"{self.name}:"):
                found = self.find(indices)
            parts = {
                label: Part({path: indices[path] for path in paths})
                for label, paths in found.items()
            }
            self._seen = (treedef, parts)
        return parts
