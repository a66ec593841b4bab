"""Some of the leaves of the params as a tree of their own, for an optimizer of those alone."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import optree

from funcnet import tree
from funcnet.core import Params, Tree
from funcnet.errors import located
from funcnet.optimizers.leaves import Leaves
from funcnet.optimizers.param_trees import Trees

_whole: ContextVar[tuple[str, ...] | None] = ContextVar("_whole", default=None)


@contextmanager
def some_of(paths: Sequence[str] | None) -> Iterator[None]:
    """Where optimizers choose leaves by path, they choose among these, whichever the params have.

    For a rank that has some of the params of a model: a choice must be one in the whole model, and
    may be of no leaf of this rank. None: the params are all there are.
    """
    token = _whole.set(None if paths is None else tuple(paths))
    try:
        yield
    finally:
        _whole.reset(token)


class Part:
    """Some of the leaves: their indices among all, and the structure of the tree of them alone.

    The tree is sparse: it has no empty dicts.
    """

    def __init__(self, indices: Mapping[str, Any], whole: Sequence[str] | None = None) -> None:
        """Take the index of each chosen leaf, by its dotted path.

        ``whole`` are the chosen leaves of the whole model, where a rank has some of its params.
        """
        self.whole = whole
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
        axes = trees.params.axes and [trees.params.axes[index] for index in self.indices]
        return trees.part(self.take(trees.params).tensors, self.treedef, True, axes)


class SplitState:
    """The state of an optimizer, taken apart for updates of some leaves at a time.

    Each tree in it that has the structure of the params is divided. What else there is, such as the
    number of updates, is the same in all parts, before and after.
    """

    def __init__(self, opt_state: Tree, treedef: optree.PyTreeSpec) -> None:
        """Take the state, and the structure of the params."""

        def like_params(node: Any) -> bool:
            return isinstance(node, dict) and tree.flatten(node)[1] == treedef

        nodes, self.form = optree.tree_flatten(opt_state, is_leaf=like_params)
        self.before = [tree.leaves(node) if like_params(node) else node for node in nodes]
        self.after = [[*node] if isinstance(node, list) else node for node in self.before]
        self.treedef = treedef

    def of(self, part: Part) -> Tree:
        """The state of the chosen leaves."""
        return self.form.unflatten(
            [
                part.treedef.unflatten([node[index] for index in part.indices])
                if isinstance(node, list)
                else node
                for node in self.before
            ]
        )

    def put(self, part: Part, opt_state: Tree) -> None:
        """Take what an update made of the state of the chosen leaves."""
        for place, node in enumerate(self.form.flatten_up_to(opt_state)):
            if isinstance(self.before[place], list):
                for index, leaf in zip(part.indices, tree.leaves(node), strict=True):
                    self.after[place][index] = leaf
            else:
                self.after[place] = node

    def whole(self) -> Tree:
        """The state with what was put."""
        return self.form.unflatten(
            [
                self.treedef.unflatten(node) if isinstance(node, list) else node
                for node in self.after
            ]
        )


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
        self._seen: tuple[Any, Any, dict[str, Part]] = (None, None, {})

    def __call__(self, treedef: optree.PyTreeSpec) -> dict[str, Part]:
        seen, known, parts = self._seen
        whole = _whole.get()
        if (treedef is not seen and treedef != seen) or whole != known:
            indices = tree.to_dotted(treedef.unflatten(range(treedef.num_leaves)))
            with located(f"{self.name}:"):
                found = self.find(indices if whole is None else dict.fromkeys(whole, 0))
            parts = {
                label: Part(
                    {path: indices[path] for path in paths if path in indices},
                    None if whole is None else tuple(paths),
                )
                for label, paths in found.items()
            }
            self._seen = (treedef, whole, parts)
        return parts
