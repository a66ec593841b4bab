"""`freeze`: a layer some of whose parameters are not learned."""

from typing import Any

from torch import Tensor

from funcnet import tree
from funcnet.combinators.reparametrize import (
    learn_only,
    reparametrize,
)
from funcnet.core import Layer, Params
from funcnet.errors import require
from funcnet.tree import Where, chosen_leaves, selector


def freeze(layer: Layer, predicate: Where) -> Layer:
    """The same layer, whose chosen parameters are state: no gradient of them is computed.

    What is not learned is not among the params, so no optimizer sees it: it has no moments, and no
    weight decay. The frozen leaves are in ``state["frozen"]``, under their paths, and stay there.

    Args:
        layer: any layer.
        predicate: which parameters: a function of the dotted path, or a path of a leaf or of a
            layer, or several of them. A leaf to which others are tied is frozen at all places.

    Learned params:
        those of the layer that are left.
    State:
        the layer's, and ``frozen``, a parameter tree.
    VJP:
        that of the layer, without the gradients of the frozen leaves; where all leaves of a layer
        are frozen, that half of its pullback does not run.
    Raises:
        ValueError: a path that no leaf has.

    Source: ``torch.Tensor.requires_grad_(False)``; ``optax.set_to_zero``.

    To freeze params that were learned, divide them with `funcnet.tree.partition`:

    >>> net = fn.serial(fn.linear(3), fn.tanh(), fn.linear(1))
    >>> params, _ = net.init(fn.key(0), torch.ones(4, 2))
    >>> tuned = freeze(net, "0")
    >>> frozen, learned = fn.tree.partition(lambda path: path.startswith("0."), params)
    >>> y, pullback, _ = tuned.vjp(learned, torch.ones(4, 2), {"frozen": frozen})
    >>> list(fn.tree.to_dotted(pullback(y)[0]))
    ['2.weight', '2.bias']
    """
    is_frozen = selector(predicate)

    def start(key: Tensor, params: Params, state: Params) -> tuple[Params, Params]:
        paths = frozenset(chosen_leaves(predicate, params))
        frozen, learned = tree.partition(paths.__contains__, params)
        return learned, with_frozen(state, frozen)

    def inside(params: Params, state: Params, train: bool) -> Any:
        frozen, rest = split_frozen(state)
        wrong = [path for path in tree.to_dotted(params) if is_frozen(path)]
        hint = "frozen leaves belong into state['frozen']; see fn.tree.partition"
        require(not wrong, f"params has {wrong}, which do not learn: {hint}")
        return tree.merge(params, frozen), rest, {}, {"frozen": frozen}

    inner = learn_only(layer, lambda path: not is_frozen(path))
    return reparametrize(
        "freeze",
        inner,
        start,
        inside,
        sparse,
        rebuild=lambda layer: freeze(layer, predicate),
        of_parts=True,
    )


def with_frozen(state: Params, frozen: Params) -> Params:
    """The state of a layer, and beside it the params that are not learned."""
    require("frozen" not in state, "the layer has state of its own called 'frozen'")
    return {**state, "frozen": frozen}


def split_frozen(state: Params) -> tuple[Params, Params]:
    """The params that are not learned, and the layer's own state."""
    return state["frozen"], {name: child for name, child in state.items() if name != "frozen"}


def sparse(dparams: Params, residuals: Any) -> Params:
    """The gradients without the empty dicts of layers that learn nothing."""
    return tree.from_dotted(tree.to_dotted(dparams))
