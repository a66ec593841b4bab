"""Where the params of a model lie: which of them are parts, of what, over which ranks."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import count
from typing import Any, TypeVar

import optree
import torch

from funcnet import tree
from funcnet.collectives import Split
from funcnet.core import (
    Key,
    Layer,
    Params,
    Tree,
    join_paths,
    layers_of,
    map_layers,
    place_of,
)
from funcnet.errors import require
from funcnet.random import key
from funcnet.runtime import untraced

Found = TypeVar("Found")

Splits = tuple[Split, ...]
"""How a tensor came to be a part: parted by the first, that part by the second, and so on."""


class PartedState:
    """A node of a tree that holds this rank's parts of tensors, such as the state of `zero`."""

    __slots__ = ()

    splits: tuple[tuple[str, Split], ...]
    """Dotted paths, and how the tensors there are parted."""


def refuse_parted_state(tree: Tree) -> None:
    """Raise ValueError for a tree that holds this rank's parts of what several ranks have.

    >>> refuse_parted_state({"w": torch.ones(2)})
    """
    for node in optree.tree_leaves(tree, is_leaf=lambda node: isinstance(node, PartedState)):
        sizes = [s.axis.size for _, s in node.splits] if isinstance(node, PartedState) else []
        ranks = max(sizes, default=1)
        require(
            ranks == 1,
            f"a {type(node).__name__} has this rank's parts alone, of {ranks} ranks; use "
            "fn.distributed.save or save_step, with placed=state_placements(train_state, net, x)",
        )


def placements(model: Layer, x: Tree) -> dict[str, Splits]:
    """How each parameter of a model is parted over ranks, by dotted path; ``()`` for a whole one.

    Args:
        model: any layer; nothing is computed or communicated.
        x: an example input, of which only shape, dtype and device matter.

    >>> import funcnet as fn
    >>> placements(fn.linear(2), torch.ones(5, 3))
    {'weight': (), 'bias': ()}
    """
    return placements_of(*placed_by_layers(model, x))


def placements_of(found: Mapping[str, list[Split]], params: Params) -> dict[str, Splits]:
    """`placements` from what `placed_by_layers` finds."""
    return {
        path: stacked(tuple(leaf.shape), found.get(path, []))
        for path, leaf in tree.to_dotted(params).items()
    }


def for_each_form(function: Callable[[Tree], Found]) -> Callable[[Tree], Found]:
    """A function of the shapes and dtypes of x, called once for each of the last ones.

    It gets tensors on meta, and no operator of it is recorded.

    >>> width = for_each_form(lambda x: x.shape[-1])
    >>> width(torch.ones(5, 3)), width(torch.zeros(5, 2))
    (3, 2)
    """

    @lru_cache(maxsize=16)
    def found(treedef: Any, kinds: Any) -> Found:
        examples = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in kinds]
        return function(treedef.unflatten(examples))

    def of(x: Tree) -> Found:
        leaves, treedef = tree.flatten(x)
        kinds = tuple([(leaf.shape, leaf.dtype) for leaf in leaves])
        with untraced():
            return found(treedef, kinds)

    return of


def has_parts(layer: Layer) -> bool:
    """Whether some params of a model are parts over ranks."""
    return any([each.placed is not None for _, each in layers_of(layer)])


def refuse_parts(name: str, model: Layer) -> None:
    """Raise ValueError for a model of parts: norms and curvature would be of this rank's alone.

    >>> import funcnet as fn
    >>> refuse_parts("kfac_train_step", fn.linear(2))
    """
    for path, layer in layers_of(model):
        where = place_of(layer, path)
        require(layer.placed is None, f"{name}: the params of {where} are parts over ranks")


def placed_by_layers(model: Layer, x: Tree) -> tuple[dict[str, list[Split]], Params]:
    """What the layers of a model tell of their params, also of frozen ones; and the params."""
    # By the number of the layer, as an init may run several times.
    found: dict[str, dict[int, Split]] = {}
    numbers = count()

    def watched(path: str, layer: Layer) -> Layer:
        placed, number = layer.placed, next(numbers)
        if placed is None:
            return layer

        def init(key: Key, x: Tree) -> tuple[Params, Params]:
            made = layer.init(key, x)
            for name, split in placed(x).items():
                found.setdefault(join_paths(path, name), {})[number] = split
            return made

        return layer._replace(init=init)

    example: Any = tree.to_meta(x)
    params, _ = map_layers(watched, model).init(key(0), example)
    in_order = {path: [split for _, split in sorted(each.items())] for path, each in found.items()}
    return in_order, params


def stacked(shape: tuple[int, ...], splits: list[Split]) -> Splits:
    """How a leaf of this shape is parted, where it may be a stack of what the layers told of."""
    placed: list[Split] = []
    for split in reversed(splits):
        extents = shape[: len(shape) - len(split.part_shape)]
        placed.insert(0, split.stacked(extents) if extents else split)
        shape = placed[0].shape
    return tuple(placed)


def whole(part: Any, splits: Splits) -> Any:
    """The whole tensor, on all ranks, from the part of each."""
    for split in reversed(splits):
        part = split.whole(part)
    return part


def own_part(tensor: Any, splits: Splits) -> Any:
    """This rank's part of a tensor that all ranks have."""
    for split in splits:
        tensor = split.part(tensor)
    return tensor


def whole_params(params: Params, placed: Mapping[str, Splits]) -> Params:
    """Params on all ranks as a single process has them."""
    dotted = tree.to_dotted(params)
    return tree.from_dotted({path: whole(leaf, placed[path]) for path, leaf in dotted.items()})
