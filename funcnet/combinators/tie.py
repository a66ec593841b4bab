"""`tie`: parameters of a layer that are one."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from funcnet import tree
from funcnet.combinators.reparametrize import reparametrize
from funcnet.core import Layer, Params
from funcnet.errors import require
from funcnet.tree import leaf_at


def tie(layer: Layer, paths: Mapping[str, str]) -> Layer:
    """The same layer, some of whose parameters are others of its parameters.

    Args:
        layer: any layer.
        paths: from the dotted path of a leaf to that of the leaf which it is to be.

    Learned params:
        those of the layer without the leaves that are tied to another.
    VJP:
        the gradients of leaves that are one are summed.
    Raises:
        ValueError: a path that no leaf has, a leaf tied to one that is tied itself, or leaves
            of different shapes or dtypes.

    Source: Press and Wolf 2017, for the embedding and the output of a language model.

    >>> net = fn.serial(embed=fn.embedding(5, 3), head=fn.linear(5, bias=False))
    >>> tied = tie(net, {"head.weight": "embed.weight"})
    >>> params, _ = tied.init(fn.key(0), torch.tensor([1, 2]))
    >>> list(fn.tree.to_dotted(params))
    ['embed.weight']
    """
    pairs = tuple(paths.items())
    chained = [source for source in paths.values() if source in paths]
    require(not chained, f"tie: {chained} are tied to others themselves")

    def start(key: Tensor, params: Params, state: Params) -> tuple[Params, Params]:
        for target, source in pairs:
            one, other = [leaf_at(path, params) for path in (target, source)]
            found = f"{target!r} is {tree.describe(one)}, {source!r} {tree.describe(other)}"
            require(tree.alike(one, other), f"expects leaves of one shape and dtype, {found}")
        return tree.partition(paths.__contains__, params)[1], state

    def inside(params: Params, state: Params, train: bool) -> Any:
        flat = tree.to_dotted(params)
        again = tree.from_dotted({target: flat[source] for target, source in pairs})
        return tree.merge(params, again), state, {}, {}

    return reparametrize(
        "tie",
        layer,
        start,
        inside,
        tie_backward,
        pairs,
        rebuild=lambda layer: tie(layer, paths),
        of_parts=True,
    )


def tie_backward(dparams: Params, residuals: Any, pairs: tuple[tuple[str, str], ...]) -> Params:
    """``dleaf = sum of the gradients of all that are that leaf``; none of a frozen one."""
    flat = tree.to_dotted(dparams)
    for target, source in pairs:
        if target in flat:
            flat[source] = flat[source] + flat.pop(target)
    return tree.from_dotted(flat)
