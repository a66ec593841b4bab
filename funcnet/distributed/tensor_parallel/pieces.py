"""Layers between the parallel ones: dropout of a part, and what is done to each token alone."""

from typing import Any

from funcnet import tree
from funcnet.checks import check_kind
from funcnet.collectives import Axis
from funcnet.core import Forward, Grads, Key, Layer, Params, Pullback, Tree, around, pull
from funcnet.deferred import defers, mapped
from funcnet.distributed.data.buckets import all_summed
from funcnet.distributed.processes.start import Mesh
from funcnet.distributed.tensor_parallel.parting import axis_for
from funcnet.errors import require
from funcnet.layers.dropout import dropout, dropping, of_values
from funcnet.lift import stateful


def parted_dropout(p: float, parts: Axis, dim: int, size: int | None = None) -> Layer:
    """`dropout` of a rank's part of x along a dimension: its part of what all of x draws.

    Args:
        p: the probability to drop.
        parts: the ranks.
        dim: the dimension that is parted.
        size: that of the whole; default that of all parts.
    """
    if parts.size == 1:
        return dropout(p)
    return dropping("dropout", p, of_values, parts=(parts, dim, size))


@defers
def own_tokens_rule(residuals: Any, dy: Tree, axis: Axis, *, params: bool, x: bool) -> Grads:
    """The layer's pullback; its gradients are summed over ranks."""
    dparams, dx = pull(residuals, "", dy, params=params, x=x)
    return mapped(summed, dparams, None, axis) if params else None, dx


def summed(dparams: Params, residuals: None, axis: Axis) -> Params:
    """The sum of the ranks' gradients, of one layer at a time in one message."""
    leaves, treedef = tree.flatten(dparams)
    return treedef.unflatten(all_summed(axis, leaves))


def own_tokens(layer: Layer, mesh: Mesh, *, axis: str = "model") -> Layer:
    """The layer, of a rank's tokens: its gradients are summed over ranks.

    For a norm, or another layer that works on each token alone, between parallel layers with
    ``sequence``. Its params are whole on all ranks, and stay the same.

    Args:
        layer: any layer that neither draws numbers nor mixes tokens.
        mesh: the ranks; see `mesh` and `axis_of`.
        axis: the axis of the mesh over which tokens are parted.

    Params, state: those of the layer.
    VJP:
        that of the layer; ``dparams = sum over ranks dparams_r``.
    Raises:
        ValueError: a layer that draws numbers.

    Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
    Models".

    >>> import funcnet as fn
    >>> own_tokens(fn.layer_norm(None), {"model": 2})
    own_tokens(layer_norm(), {'model': 2})
    """
    name = "own_tokens"
    check_kind(name, layer, Layer)
    drawn = f"{name}: expects a layer that draws no numbers, got {layer.name}"
    require(not layer.takes_key, drawn)
    return _own_tokens(layer, axis_for(name, mesh, axis))


def _own_tokens(layer: Layer, axis: Axis) -> Layer:
    def apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Any:
        return layer.apply(params, x, state, key=key, train=train)

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        y, pullback, state = layer.forward(params, x, state, key, train)
        return y, Pullback(own_tokens_rule, {"": pullback}, (axis,)), state

    return stateful(
        layer.init,
        forward,
        apply=apply,
        name="own_tokens",
        **around(layer, lambda layer: _own_tokens(layer, axis)),
    )
