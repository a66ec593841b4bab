"""Walkers: what visits each leaf layer's pullback, when it is made or in a finished one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import optree

from funcnet.checks import check_function, check_kind
from funcnet.combinators.combine import OWN, combine_rule
from funcnet.core import Forward, Key, Layer, Params, Pullback, Tree, join_paths, map_layers
from funcnet.lift import with_forward
from funcnet.tree import describe

Visit = Callable[[str, Pullback], Pullback]
"""``(path, pullback) -> pullback``; the path is the dotted one of the layer's params."""


def map_pullbacks(function: Visit, pullback: Pullback) -> Pullback:
    """A finished pullback with ``function(path, pullback)`` in place of each leaf layer's.

    A leaf layer is one whose pullback has no other in it; the pullback of a loop such as `repeat`
    is one too, as its residuals are those of all copies.

    Args:
        function: gives a `Pullback`, such as one with other residuals or another rule.
        pullback: what a layer's ``vjp`` gave.

    Raises:
        TypeError: the function gives something else; by path.

    >>> import torch
    >>> import funcnet as fn
    >>> net = fn.serial(fn.linear(3), fn.residual(fn.tanh()))
    >>> params, _ = net.init(fn.key(0), torch.ones(4, 2))
    >>> _, pullback, _ = net.vjp(params, torch.ones(4, 2))
    >>> found = []
    >>> _ = map_pullbacks(lambda path, each: found.append((path, list(each.residuals))) or each,
    ...                   pullback)
    >>> found
    [('0', ['x', 'weight']), ('1', ['y'])]
    """
    check_function("map_pullbacks", function)
    if not isinstance(pullback, Pullback):
        raise TypeError(f"map_pullbacks: expects a Pullback, got {describe(pullback)}")
    return _mapped(function, pullback, "")


def _mapped(function: Visit, pullback: Pullback, path: str) -> Pullback:
    inside = {
        name: optree.tree_map(
            lambda node, name=name: _in_child(function, node, _path(pullback, path, name)),
            residual,
            is_leaf=_is_pullback,
        )
        for name, residual in pullback.residuals.items()
        if _has_pullback(residual)
    }
    if not inside:
        return _visited("map_pullbacks", function, path, pullback)
    residuals = {**pullback.residuals, **inside}
    made = type(pullback)(pullback.rule, residuals, pullback.static)
    made.expected = pullback.expected
    return made


def _in_child(function: Visit, node: Any, path: str) -> Any:
    return _mapped(function, node, path) if _is_pullback(node) else node


def _path(parent: Pullback, path: str, name: str) -> str:
    """The path of what is among the residuals of a pullback under a name."""
    if parent.rule is not combine_rule or name == OWN:
        return path
    child = name.partition("#")[0]  # of several uses each has its number behind it
    names: Any = parent.static[2]
    return join_paths(path, child if child in names else "")


def _is_pullback(node: Any) -> bool:
    return isinstance(node, Pullback)


def _has_pullback(tree: Tree) -> bool:
    return any(map(_is_pullback, optree.tree_leaves(tree, is_leaf=_is_pullback)))


def _visited(name: str, function: Visit, path: str, pullback: Pullback) -> Pullback:
    made = function(path, pullback)
    check_kind(f"{name}: what the function gives at {path!r}", made, Pullback)
    if made.expected is None:
        made.expected = pullback.expected
    return made


def with_pullbacks(model: Layer, function: Visit) -> Layer:
    """The model, of which each leaf layer's pullback is ``function(path, pullback)``.

    The function is called as the layer's ``vjp`` returns, before the next layer runs: so residuals
    that it replaces by smaller ones are never there all at once.

    Args:
        model: any layer.
        function: gives a `Pullback`.

    Raises:
        TypeError: the function gives something else; by path.

    >>> import torch
    >>> import funcnet as fn
    >>> def halved_rule(residuals, dy, *, params, x):
    ...     return fn.pull(residuals, "", dy / 2, params=params, x=x)
    >>> def halved(path, pullback):
    ...     return fn.Pullback(halved_rule, {"": pullback})
    >>> net = with_pullbacks(fn.serial(fn.tanh()), halved)
    >>> _, pullback, _ = net.vjp({}, torch.zeros(2))
    >>> pullback(torch.ones(2))
    ({}, tensor([0.5000, 0.5000]))
    """
    check_kind("with_pullbacks", model, Layer)
    check_function("with_pullbacks", function)

    def one(path: str, layer: Layer) -> Layer:
        if layer.rebuild is not None:
            return layer

        def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
            y, pullback, state = layer.forward(params, x, state, key, train)
            return y, _visited("with_pullbacks", function, path, pullback), state

        return with_forward(layer, forward, partial(one, path))

    return map_layers(one, model)
