"""`repeat`: a layer applied many times, each time with parameters of its own, as one loop."""

from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.combinators.combine import output_on_meta
from funcnet.control_flow import scan
from funcnet.core import Forward, Grads, Key, Layer, Params, Pullback, Tree, around, pull
from funcnet.errors import locate, require
from funcnet.lift import stateful
from funcnet.random import fold_in


def repeat(layer: Layer, n: int) -> Layer:
    """``n`` copies of a layer, one after the other, as one loop over stacked parameters.

    It is ``serial`` of the copies, the same first values and noise included, but for the form of
    its params. Under `jit` the layer is compiled once, however many copies there are.

    Args:
        layer: any layer whose y has the shapes and dtypes of its x.
        n: the number of copies.

    Params, State: those of the layer, stacked: each leaf has a first dimension of size n.
    VJP: that of the layer, in a loop from the last copy to the first.
    Raises: ValueError where y is not like x.
    Source: ``jax.lax.scan`` over layers; ``flax.linen.scan``.

    >>> net = repeat(fn.residual(fn.linear(2)), 3)
    >>> params, _ = net.init(fn.key(0), torch.ones(4, 2))
    >>> params["weight"].shape, net.apply(params, torch.ones(4, 2))[0].shape
    (torch.Size([3, 2, 2]), torch.Size([4, 2]))
    """
    require(isinstance(layer, Layer), f"repeat: expects a Layer, got {layer!r}", TypeError)
    whole = isinstance(n, int) and not isinstance(n, bool) and n >= 1
    require(whole, f"repeat: n must be an int of at least 1, got {n!r}")

    def keys_of(key: Tensor) -> list[Tensor]:
        return [fold_in(key, str(index)) for index in range(n)]

    def init(key: Tensor, x: Tree) -> tuple[Params, Params]:
        try:
            made = [layer.init(each, x) for each in keys_of(key)]
            y = output_on_meta(layer, tree.to_meta(x), *made[0])
            found = f"x is {tree.describe(x)}, y {tree.describe(y)}"
            require(tree.alike(x, y), f"expects a y like x, {found}")
        except Exception as error:
            locate(error, "repeat")
            raise
        return tree.map(lambda *each: torch.stack(each), *made)

    def loop(params: Params, x: Tree, state: Params, key: Key, one: Any) -> tuple[Tree, Any]:
        """``one(params, x, state, key) -> (x, what is stacked)`` for each copy."""
        for what, found in (("params", params), ("state", state)):
            for path, leaf in tree.to_dotted(found).items():
                got = f"got {tree.describe(leaf)}"
                fits = isinstance(leaf, Tensor) and leaf.shape[:1] == (n,)
                require(fits, f"repeat: {what} {path!r} expects a first dimension of {n}, {got}")
        keys = torch.stack(keys_of(key)) if key is not None and layer.takes_key else None

        def body(x: Tree, own: Any) -> tuple[Tree, Any]:
            params, state, key = own
            try:
                return one(params, x, state, key)
            except Exception as error:
                locate(error, "repeat")
                raise

        return scan(body, x, (params, state, keys), length=n)

    def apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Any:
        def one(params: Params, x: Tree, state: Params, key: Key) -> Any:
            return layer.apply(params, x, state, key=key, train=train)

        return loop(params, x, state, key, one)

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        form: Any = None

        def one(params: Params, x: Tree, state: Params, key: Key) -> Any:
            nonlocal form
            y, pullback, state = layer.forward(params, x, state, key, train)
            saved, form = _without(tree.leaves(params), pullback)
            return y, (saved, state)

        y, (saved, new_state) = loop(params, x, state, key, one)
        residuals = {"saved": saved, "params": params or {}}
        return y, Pullback(repeat_rule, residuals, (n, *form)), new_state or {}

    return stateful(
        init,
        forward,
        apply=apply,
        name="repeat",
        **around(layer, lambda layer: repeat(layer, n)),
    )


def _without(own: list[Tensor], pullback: Pullback) -> tuple[list[Tensor], Any]:
    """A pullback's residuals that are not parameters, so that these are not stacked once more.

    Beside them its structure, and for each residual the parameter that it is, or None.
    """
    leaves, treedef = tree.flatten(pullback)
    which = {id(leaf): place for place, leaf in enumerate(own)}
    places = tuple([which.get(id(leaf)) for leaf in leaves])
    saved = [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]
    return saved, (treedef, places)


def repeat_rule(
    residuals: Any, dy: Tree, n: int, treedef: Any, places: Any, *, params: bool, x: bool
) -> Grads:
    """The pullbacks of the copies, from the last to the first."""

    def body(dy: Tree, residuals: Any) -> tuple[Tree, Any]:
        saved, own = iter(residuals["saved"]), tree.leaves(residuals["params"])
        leaves = [next(saved) if place is None else own[place] for place in places]
        dparams, dx = pull({"": treedef.unflatten(leaves)}, "", dy, params=params, x=True)
        return dx, dparams

    dx, dparams = scan(body, dy, residuals, length=n, reverse=True)
    return (dparams or {}) if params else None, dx if x else None
