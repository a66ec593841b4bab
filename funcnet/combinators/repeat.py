"""`repeat` and `stacked`: copies of a layer, each with parameters of its own, as one loop."""

from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.checks import check_kind
from funcnet.combinators.combine import output_on_meta
from funcnet.control_flow import scan
from funcnet.core import Forward, Grads, Key, Layer, Params, Pullback, Tree, around, pull
from funcnet.deferred import Deferred, defers, gradients
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
    VJP:
        that of the layer, in a loop from the last copy to the first.
    Raises:
        ValueError: y is not like x.

    Source: ``jax.lax.scan`` over layers; ``flax.linen.scan``.

    >>> net = repeat(fn.residual(fn.linear(2)), 3)
    >>> params, _ = net.init(fn.key(0), torch.ones(4, 2))
    >>> params["weight"].shape, net.apply(params, torch.ones(4, 2))[0].shape
    (torch.Size([3, 2, 2]), torch.Size([4, 2]))
    """
    return _copies("repeat", layer, n, in_turn=True)


def stacked(layer: Layer, n: int) -> Layer:
    """``n`` copies of a layer side by side, the i-th of the i-th slice of x, over stacked params.

    It is ``parallel`` of the copies, the same first values and noise included, but for the form
    of its params, its x and its y. Under `jit` it is one loop, whose body is compiled once.

    Args:
        layer: any layer.
        n: the number of copies.

    Inputs:
        x, a tree of tensors with a first dimension of size n.
    Returns:
        y, likewise. Params, State: those of the layer, stacked: each leaf has a first dimension of
        size n.
    VJP:
        that of the layer for each copy.

    >>> net = stacked(fn.linear(5), 3)
    >>> params, _ = net.init(fn.key(0), torch.ones(3, 4, 2))
    >>> params["weight"].shape, net.apply(params, torch.ones(3, 4, 2))[0].shape
    (torch.Size([3, 5, 2]), torch.Size([3, 4, 5]))
    """
    return _copies("stacked", layer, n, in_turn=False)


def _require_stacked(name: str, what: str, found: Tree, n: int) -> None:
    for path, leaf in tree.to_dotted(found).items():
        got = f"got {tree.describe(leaf)}"
        fits = isinstance(leaf, Tensor) and leaf.shape[:1] == (n,)
        where = f"{what} {path!r}" if path else what
        require(fits, f"{name}: {where} expects a first dimension of {n}, {got}")


def _copies(name: str, layer: Layer, n: int, in_turn: bool) -> Layer:
    """The copies one after the other, or side by side."""
    check_kind(name, layer, Layer)
    whole = isinstance(n, int) and not isinstance(n, bool) and n >= 1
    require(whole, f"{name}: n must be an int of at least 1, got {n!r}")

    def keys_of(key: Tensor) -> list[Tensor]:
        return [fold_in(key, str(index)) for index in range(n)]

    def init(key: Tensor, x: Tree) -> tuple[Params, Params]:
        if not in_turn:
            _require_stacked(name, "x", {"": x}, n)
            x = tree.map(lambda leaf: leaf[0], x)
        try:
            if key.is_meta:  # the copies differ in values only
                made = [layer.init(key, x)] * n
            else:
                made = [layer.init(each, x) for each in keys_of(key)]
            if in_turn:
                y = output_on_meta(layer, tree.to_meta(x), *made[0])
                found = f"x is {tree.describe(x)}, y {tree.describe(y)}"
                require(tree.alike(x, y), f"expects a y like x, {found}")
        except Exception as error:
            locate(error, name)
            raise
        return tree.map(lambda *each: torch.stack(each), *made)

    def loop(params: Params, x: Tree, state: Params, key: Key, one: Any) -> tuple[Tree, Any]:
        """``one(params, x, state, key) -> (y, what is stacked)`` for each copy."""
        stacks = (("params", params), ("state", state), ("x", {} if in_turn else {"": x}))
        for what, found in stacks:
            _require_stacked(name, what, found, n)
        keys = torch.stack(keys_of(key)) if key is not None and layer.takes_key else None

        def body(x: Tree, each: Any) -> tuple[Tree, Any]:
            params, state, key, piece = each
            try:
                y, kept = one(params, x if in_turn else piece, state, key)
            except Exception as error:
                locate(error, name)
                raise
            return (y, (kept, None)) if in_turn else (x, (kept, y))

        first, pieces = (x, None) if in_turn else (None, x)
        last, (kept, y) = scan(body, first, (params, state, keys, pieces), length=n)
        return last if in_turn else y, kept

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
        return y, Pullback(copies_rule, residuals, (n, in_turn, *form)), new_state or {}

    return stateful(
        init,
        forward,
        apply=apply,
        name=name,
        **around(layer, lambda layer: _copies(name, layer, n, in_turn)),
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


@defers
def copies_rule(
    residuals: Any,
    dy: Tree,
    n: int,
    in_turn: bool,
    treedef: Any,
    places: Any,
    *,
    params: bool,
    x: bool,
) -> Grads:
    """The pullbacks of the copies, from the last to the first."""

    def body(dy: Tree, each: Any) -> tuple[Tree, Any]:
        residuals, piece = each
        saved, own = iter(residuals["saved"]), tree.leaves(residuals["params"])
        leaves = [next(saved) if place is None else own[place] for place in places]
        pullbacks = {"": treedef.unflatten(leaves)}
        if in_turn:
            dparams, dx = pull(pullbacks, "", dy, params=params, x=True)
            return dx, (dparams, None)
        return dy, pull(pullbacks, "", piece, params=params, x=x)

    first, pieces = (dy, None) if in_turn else (None, dy)
    last, (dparams, dx) = scan(body, first, (residuals, pieces), length=n, reverse=True)
    dx = last if in_turn else dx
    if isinstance(dparams, Deferred):
        return Deferred(stacked_rule, {"": dparams}, (n,)), dx if x else None
    return (dparams or {}) if params else None, dx if x else None


def stacked_rule(parts: dict[str, Deferred], n: int) -> Params:
    """The gradients of each copy, stacked; the Deferred is a stack of theirs."""

    def body(carry: None, copy: Deferred) -> tuple[None, Params]:
        return carry, gradients(copy)

    return scan(body, None, parts[""], length=n)[1]
