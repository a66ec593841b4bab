"""`cast`: a layer that computes in another dtype than that of its parameters and its input."""

from typing import Any

import optree
import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import Forward, Grads, Key, Layer, Params, Pullback, Tree, around, pull
from funcnet.deferred import defers, mapped
from funcnet.errors import require
from funcnet.lift import stateful


def cast(layer: Layer, dtype: torch.dtype) -> Layer:
    """The same layer, computed in another dtype: mixed precision.

    Floating-point x and params are cast on the way in, and y, dx and dparams on the way out, to
    what they are without the cast: the layer can stand wherever it stood. So the optimizer sees
    parameters and gradients of full precision. State, such as running statistics, is never
    computed in a lower precision than its own.

    Args:
        layer: any layer; the larger, the fewer casts.
        dtype: what to compute in, such as ``torch.bfloat16``.

    Params, State: those of the layer.
    VJP:
        that of the layer in ``dtype``.

    Source: Micikevicius et al. 2018; ``torch.autocast``, which chooses by operator.

    >>> layer = cast(fn.linear(3), torch.bfloat16)
    >>> params, _ = layer.init(fn.key(0), torch.ones(4, 2))
    >>> y, pullback, _ = layer.vjp(params, torch.ones(4, 2))
    >>> y.dtype, pullback(y)[0]["weight"].dtype
    (torch.float32, torch.float32)
    """
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    require(floating, f"cast: expects a floating-point dtype, got {dtype}", TypeError)

    def apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Any:
        inside = _to(dtype, (params, x))
        y, new_state = layer.apply(*inside, _wide(dtype, state), key=key, train=train)
        return _to(_outer(params, x), y), _alike(new_state, state)

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        inside = _to(dtype, (params, x))
        y, pullback, new_state = layer.forward(*inside, _wide(dtype, state), key, train)
        static = tuple([_kinds(each) for each in (y, params, x)])
        pullback = Pullback(cast_rule, {"": pullback}, static)
        return _to(_outer(params, x), y), pullback, _alike(new_state, state)

    return stateful(
        layer.init,
        forward,
        apply=apply,
        name="cast",
        **around(layer, lambda layer: cast(layer, dtype)),
    )


@defers
def cast_rule(
    residuals: Any, dy: Tree, of_y: Any, of_params: Any, of_x: Any, *, params: bool, x: bool
) -> Grads:
    """dy in the dtype of the layer's y, then dparams and dx in those of params and x."""
    dparams, dx = pull(residuals, "", _like(of_y, dy), params=params, x=x)
    dx = _like(of_x, dx) if x else None
    return mapped(_cast_back, dparams, None, of_params) if params else None, dx


def _cast_back(dparams: Params, residuals: None, of_params: Any) -> Params:
    return _like(of_params, dparams)


def _outer(params: Params, x: Tree) -> torch.dtype:
    """What the layer would compute in: the dtype of x or, where x is integers, of the params."""
    kinds = [leaf.dtype for leaf in tree.leaves((x, params)) if leaf.is_floating_point()]
    return kinds[0] if kinds else torch.get_default_dtype()


def _to(dtype: torch.dtype, whole: Tree) -> Tree:
    return tree.map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, whole)


def _wide(dtype: torch.dtype, state: Params) -> Params:
    """State in its own dtype, or in that of the computation, if that is wider."""

    def one(leaf: Tensor) -> Tensor:
        kind = torch.promote_types(leaf.dtype, dtype)
        return leaf.to(kind) if leaf.is_floating_point() else leaf

    return tree.map(one, state)


def _alike(new: Params, old: Params) -> Params:
    return tree.map(lambda each, before: each.to(before.dtype), new, old)


def _kinds(whole: Tree) -> tuple[torch.dtype | None, ...]:
    leaves = optree.tree_leaves(whole, none_is_leaf=True)
    return tuple([None if leaf is None else leaf.dtype for leaf in leaves])


def _like(kinds: tuple[torch.dtype | None, ...], cotangents: Tree) -> Tree:
    """Cotangents in the dtypes of what they are of; None for integers."""
    leaves, treedef = optree.tree_flatten(cotangents, none_is_leaf=True)
    pairs = zip(leaves, kinds, strict=True)
    return treedef.unflatten([leaf if leaf is None else leaf.to(kind) for leaf, kind in pairs])
