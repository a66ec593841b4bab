"""Backward passes through other weights than those of the forward pass."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from funcnet import tree
from funcnet.checks import check_kind
from funcnet.core import (
    Forward,
    Key,
    Layer,
    Params,
    Pullback,
    Tree,
    global_form_of,
    map_layers,
    told_by,
)
from funcnet.errors import require
from funcnet.initializers import Initializer
from funcnet.lift import stateful
from funcnet.random import fold_in

_STATE = "feedback"


def feedback_alignment(model: Layer, feedback_init: Initializer | None = None) -> Layer:
    """The model, through which cotangents go back by fixed random weights: ``dx = dy B``.

    The pullback of each layer is its own, with B wherever it would read the weight. B is drawn
    once, like the weight but from another key, and the net learns to make use of it. dparams are by
    their own formulas, of these cotangents. A weight is a parameter of two or more dimensions;
    others, such as the scale of a `layer_norm`, are read as they are.

    Args:
        model: any layer. Its weights must be among the residuals as they are, as they are in
            `linear`, `bilinear` and convolutions.
        feedback_init: an initializer of B; default that of the layer.

    Params: those of the model.
    State:
        the model's and, in that of each layer with weights, ``feedback``: a dict of the B by name.
    Raises:
        ValueError: a layer whose pullback does not read the weight itself, or which has no place
            for feedback weights, as `multihead_attention`.

    Source: Lillicrap et al. 2016.

    >>> net = feedback_alignment(fn.serial(fn.linear(3), fn.tanh(), fn.linear(1)))
    >>> params, state = net.init(fn.key(0), torch.ones(4, 2))
    >>> {path: tuple(leaf.shape) for path, leaf in fn.tree.to_dotted(state).items()}
    {'0.feedback.weight': (3, 2), '2.feedback.weight': (1, 3)}
    """
    check_kind("feedback_alignment", model, Layer)

    def drawn(layer: Layer, key: Tensor, x: Tree, params: Params) -> Params:
        if feedback_init is None:
            return _weights(layer.init(key, x)[0])
        return {
            name: feedback_init(fold_in(key, name), weight.shape, weight.dtype, weight.device)
            for name, weight in _weights(params).items()
        }

    def aligned(path: str, layer: Layer) -> Layer:
        if layer.children:
            # A child of several entries of its parent's params has no entry for state of its own.
            parts = sorted(sum([name for name in layer.children if isinstance(name, tuple)], ()))
            where = f"feedback_alignment: {layer.name} at {path!r}"
            require(not parts, f"{where} has no place for feedback weights of {parts}")
            return layer

        def init(key: Tensor, x: Tree) -> tuple[Params, Params]:
            params, state = layer.init(key, x)
            # Nothing comes back to integers, as those of an embedding.
            passes = any([leaf.is_floating_point() for leaf in tree.leaves(x)])
            own = drawn(layer, fold_in(key, _STATE), x, params) if passes else {}
            return params, {**state, _STATE: own} if own else state

        return _through("feedback_alignment", layer, init, lambda params, own: own)

    return map_layers(aligned, model)


def sign_symmetric(model: Layer) -> Layer:
    """The model, through which cotangents go back by the signs of its weights: ``dx = dy B``.

    ``B = mean(|W|) sign(W)``: of the forward pass only the signs are known, and the scale, without
    which cotangents would grow from layer to layer. See `feedback_alignment`.

    Args:
        model: any layer. Its weights must be among the residuals as they are.

    Params, State: those of the model.

    Source: Liao et al. 2016.

    >>> net = sign_symmetric(fn.linear(1, bias=False))
    >>> _, pullback, _ = net.vjp({"weight": torch.tensor([[1.0, -3.0]])}, torch.ones(2))
    >>> pullback(torch.ones(1))[1]
    tensor([ 2., -2.])
    """
    check_kind("sign_symmetric", model, Layer)

    def signed(path: str, layer: Layer) -> Layer:
        if layer.children:
            return layer
        return _through("sign_symmetric", layer, layer.init, _signs)

    return map_layers(signed, model)


def _signs(params: Params, own: Params) -> Params:
    return {name: weight.sign() * weight.abs().mean() for name, weight in _weights(params).items()}


def _weights(params: Params) -> Params:
    """The parameters of a leaf layer that have two dimensions or more."""
    leaves = params.items()
    return {name: leaf for name, leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() >= 2}


def _through(
    name: str,
    layer: Layer,
    init: Callable[..., tuple[Params, Params]],
    others: Callable[[Params, Params], Params],
) -> Layer:
    """A leaf layer whose pullback has other tensors, ``others(params, own)``, for its weights."""

    def split(state: Params) -> tuple[Params, Params]:
        return state.get(_STATE, {}), {each: state[each] for each in state if each != _STATE}

    def together(own: Params, state: Params) -> Params:
        return {**state, _STATE: own} if own else state

    def apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Any:
        own, state = split(state)
        y, state = layer.apply(params, x, state, key=key, train=train)
        return y, together(own, state)

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        own, state = split(state)
        y, pullback, state = layer.forward(params, x, state, key, train)
        if any([leaf.is_floating_point() for leaf in tree.leaves(x)]):
            pullback = _exchanged(f"{name}: {layer.name}", pullback, params, others(params, own))
        return y, pullback, together(own, state)

    told: dict[str, Any] = told_by(layer) | {"breaks": {"derivative", *layer.breaks}}
    told["global_form"] = global_form_of(layer, lambda layer: _through(name, layer, init, others))
    made = stateful(init, forward, apply=apply, name=layer.name, **told)
    made.call = layer.call
    return made


def _exchanged(where: str, pullback: Pullback, params: Params, others: Params) -> Pullback:
    """The pullback with other tensors in the places of parameters that are among its residuals."""
    leaves, treedef = tree.flatten(pullback)
    places = {id(params[name]): name for name in others}
    missing = sorted({*others} - {places.get(id(leaf)) for leaf in leaves})
    require(not missing, f"{where}: its pullback does not read {missing} as they are")

    def exchanged(leaf: Tensor) -> Tensor:
        name = places.get(id(leaf))
        return leaf if name is None else others[name].to(leaf.dtype)

    again: Pullback = treedef.unflatten([exchanged(leaf) for leaf in leaves])
    return again
