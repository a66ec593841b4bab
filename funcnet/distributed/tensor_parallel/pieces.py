"""Layers between the parallel ones: dropout of a part, and what is done to each token alone."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from funcnet import tree
from funcnet.checks import check_kind
from funcnet.collectives import Axis
from funcnet.core import (
    EMPTY,
    Forward,
    Grads,
    Key,
    Layer,
    Params,
    Pullback,
    Tree,
    around,
    layers_of,
    place_of,
    pull,
)
from funcnet.deferred import defers, mapped
from funcnet.distributed.data.buckets import all_summed
from funcnet.distributed.processes.start import Mesh
from funcnet.distributed.tensor_parallel.parting import axis_for
from funcnet.errors import check_count, require
from funcnet.layers.dropout import dropping, of_values
from funcnet.lift import require_floating, stateful
from funcnet.params import Param

_POSITIONS = ("learned_positions", "sinusoidal_positions", "rotary")
_OF_SEQUENCES = (*_POSITIONS, "scaled_dot_product_attention")
"""Layers whose y for a token depends on its position, or on other tokens."""


def parted_dropout(
    p: float, mesh: Mesh, *, dim: int = -1, size: int | None = None, axis: str = "model"
) -> Layer:
    """`funcnet.dropout` of a rank's part of x: its part of the mask that the whole x would draw.

    ``y_r = x_r [kept_r] / (1 - p)``. Ranks draw from one key, so `funcnet.dropout` would give each
    part the same mask. With this layer, and the same key on all ranks, the numbers are those of a
    single process. With ``train=False`` it is the identity.

    It stands between a `column_linear` and a `row_linear`, of which each rank has some of the
    features; and, with ``dim`` the dimension of tokens, where ``sequence`` gives each rank some of
    them.

    Args:
        p: the probability that a value is dropped.
        mesh: the ranks; see `mesh` and `axis_of`.
        dim: the dimension of x that is parted.
        size: the size of this dimension in the whole x, as in ``column_linear(25, mesh)``,
            ``parted_dropout(0.5, mesh, size=25)``. Default: that of all parts together, which is
            more where ranks do not divide it.
        axis: the axis of the mesh over which x is parted.

    Inputs:
        x of any shape, floating, a rank's part; a key, the same on all ranks, when ``train=True``.
    VJP:
        ``dx_r = dy_r [kept_r] / (1 - p)``; the residual is the mask.
    Raises:
        ValueError: without a key; an x without this dimension, or with another size of it.

    Source: `funcnet.dropout`; Shoeybi et al. 2019, "Megatron-LM", which draws other numbers.

    >>> import funcnet as fn
    >>> layer = parted_dropout(0.5, {"model": 1})
    >>> layer.apply({}, torch.ones(6), key=fn.key(0), train=True)[0]
    tensor([0., 0., 2., 2., 0., 2.])
    """
    name = "parted_dropout"
    number = isinstance(dim, int) and not isinstance(dim, bool)
    require(number, f"{name}: dim must be an integer, got {dim!r}", TypeError)
    if size is not None:
        check_count(name, 0, size=size)
    ranks = axis_for(name, mesh, axis)

    def declaration(x: Tensor) -> Mapping[str, Param]:
        require_floating(x)
        got = tuple(x.shape)
        require(-x.dim() <= dim < x.dim(), f"expects a dimension {dim}, got {got}")
        own = x.shape[dim] if size is None else -(-size // ranks.size)
        require(x.shape[dim] == own, f"expects {own} of {size} in dimension {dim}, got {got}")
        return EMPTY

    parts = None if ranks.size == 1 else (ranks, dim, size)
    return dropping(name, p, of_values, declaration=declaration, parts=parts)


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
    ``sequence``. Its params are whole on all ranks, and stay the same. It serves as well between
    `column_linear` and `row_linear`, where features are in parts, for a layer of each number alone
    whose params are for all features alike, such as `funcnet.prelu` with one slope.

    Args:
        layer: any layer of each token alone: it draws no numbers (for dropout see
            `parted_dropout`), mixes no tokens, and does not depend on a token's position, which it
            would count from this rank's first token. For learned positions see
            `vocabulary_embedding`.
        mesh: the ranks; see `mesh` and `axis_of`.
        axis: the axis of the mesh over which tokens are parted.

    Params, state: those of the layer.
    VJP:
        that of the layer; ``dparams = sum over ranks dparams_r``.
    Raises:
        ValueError: a layer that draws numbers; positions or attention, also inside the layer.
            Other layers that mix tokens are not detected.

    Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
    Models".

    >>> import funcnet as fn
    >>> own_tokens(fn.layer_norm(None), {"model": 2})
    own_tokens(layer_norm(), {'model': 2})
    """
    name = "own_tokens"
    check_kind(name, layer, Layer)
    words = f"{name}: expects a layer that draws no numbers, got {layer.name}"
    told = "for dropout of tokens use parted_dropout(p, mesh, dim=the dimension of tokens)"
    require(not layer.takes_key, f"{words}; {told}")
    told = (
        "which would see this rank's tokens alone; use parallel_attention(sequence=True), with "
        "rotary= or alibi=, or vocabulary_embedding(sequence=) of position numbers"
    )
    for path, each in layers_of(layer):
        words = f"{name}: expects a layer of each token alone, got {place_of(each, path)}"
        require(each.name not in _OF_SEQUENCES, f"{words}, {told}")
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
