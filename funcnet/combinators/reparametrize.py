"""`reparametrize`: a layer whose params are a function of others.

`tie`, `freeze`, `lora`, `weight_norm` and `spectral_norm` are made with it.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from funcnet import tree
from funcnet.checks import check_kind
from funcnet.core import (
    Forward,
    Grads,
    Key,
    Layer,
    Params,
    Pullback,
    Tree,
    around,
    join_paths,
    layers_of,
    map_layers,
    pull,
)
from funcnet.deferred import defers, mapped
from funcnet.errors import locate, require
from funcnet.lift import stateful, with_forward
from funcnet.parted_params import has_parts

_OWN = ".residuals"


def reparametrize(
    name: str,
    layer: Layer,
    start: Callable[[Tensor, Params, Params], tuple[Params, Params]],
    inside: Callable[[Params, Params, bool], tuple[Params, Params, Mapping[str, Tree], Params]],
    backward: Callable[..., Params],
    *static: Hashable,
    rebuild: Callable[[Layer], Layer],
    breaks: Iterable[str] = (),
    of_parts: bool = False,
) -> Layer:
    """A layer whose params are made of other params at each call.

    Args:
        name: of the combinator, for errors and summaries.
        layer: the layer inside.
        start: ``(key, params, state) -> (params, state)``: the first own params and state, of those
            that the layer's init made.
        inside: ``(params, state, train) -> (params, state, residuals, kept)``: the layer's params
            and state, a dict of what ``backward`` needs, and the own part of the new state, beside
            the layer's.
        backward: ``(dparams, residuals, *static) -> dparams``: the pullback of ``inside``, from the
            layer's gradients to the own. A module-level function.
        static: hashable arguments of ``backward``.
        rebuild: the same of another layer.
        breaks: see `Layer`.
        of_parts: whether the params that are made of a rank's parts are the parts of those that are
            made of the whole.

    Raises:
        ValueError: unless ``of_parts``, a layer of whose params each rank has a part.

    >>> def start(key, params, state):
    ...     return {"log_weight": params["weight"].abs().log()}, state
    >>> def inside(params, state, train):
    ...     weight = params["log_weight"].exp()
    ...     return {"weight": weight}, state, {"weight": weight}, {}
    >>> def backward(dparams, residuals):
    ...     return {"log_weight": dparams["weight"] * residuals["weight"]}
    >>> def positive(layer):
    ...     return reparametrize("positive", layer, start, inside, backward, rebuild=positive)
    >>> fn.testing.check_layer(positive(fn.linear(3, bias=False)), torch.ones(4, 2))
    """
    check_kind(name, layer, Layer)

    hint = f"put the layer around it, as in sharded({name}(...), mesh)"
    require(of_parts or not has_parts(layer), f"{name}: each rank has a part of the params; {hint}")

    def init(key: Tensor, x: Tree) -> tuple[Params, Params]:
        params, state = layer.init(key, x)
        try:
            return start(key, params, state)
        except (ValueError, TypeError) as error:
            locate(error, f"{name}:")
            raise

    def made(params: Params, state: Params, train: bool) -> Any:
        try:
            return inside(params, state, train)
        except KeyError as error:
            found = f"has no {error}, only {list(tree.to_dotted((params, state)))}"
            raise ValueError(f"{name}: expects params and state as of init, {found}") from None
        except (ValueError, TypeError) as error:
            locate(error, f"{name}:")
            raise

    def apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Any:
        own, own_state, _, kept = made(params, state, train)
        y, new_state = layer.apply(own, x, own_state, key=key, train=train)
        return y, tree.merge(new_state, kept)

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        own, own_state, residuals, kept = made(params, state, train)
        y, pullback, new_state = layer.forward(own, x, own_state, key, train)
        saved = {"": pullback, _OWN: residuals}
        told = Pullback(reparametrize_rule, saved, (backward, *static))
        return y, told, tree.merge(new_state, kept)

    return stateful(
        init,
        forward,
        apply=apply,
        name=name,
        breaks=breaks,
        **around(layer, rebuild),
    )


@defers
def reparametrize_rule(
    residuals: Any, dy: Tree, backward: Any, *static: Any, params: bool, x: bool
) -> Grads:
    """The layer's pullback, then that of its params."""
    own = residuals.pop(_OWN)
    dparams, dx = pull(residuals, "", dy, params=params, x=x)
    return mapped(backward, dparams, own, *static) if params else None, dx


def ties_of(layer: Layer) -> Mapping[str, str]:
    """Of a `tie`, which leaves are others; nothing for any other layer."""
    return layer.call.values["paths"] if layer.name == "tie" and layer.call is not None else {}


def learn_only(layer: Layer, learns: Callable[[str], bool]) -> Layer:
    """The layer, whose pullback computes the gradients of some of its leaves alone.

    Of a layer none of whose leaves learns, the half of the pullback that makes dparams does not
    run at all. A leaf that is tied to another learns where that one does.
    """
    ties = {
        join_paths(path, one): join_paths(path, other)
        for path, each in layers_of(layer)
        for one, other in ties_of(each).items()
    }

    def learned_at(path: str) -> bool:
        while path in ties:
            path = ties[path]
        return learns(path)

    def only(path: str, layer: Layer) -> Layer:
        if layer.children:
            return layer

        def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
            y, pullback, state = layer.forward(params, x, state, key, train)
            names = tuple(tree.to_dotted(params))
            learned = tuple([name for name in names if learned_at(join_paths(path, name))])
            if learned != names:
                pullback = Pullback(learn_only_rule, {"": pullback}, (learned,))
            return y, pullback, state

        return with_forward(layer, forward, partial(only, path))

    return map_layers(only, layer)


@defers
def learn_only_rule(
    residuals: Any, dy: Tree, learned: tuple[str, ...], *, params: bool, x: bool
) -> Grads:
    """The pullback of a leaf layer, less the gradients of what does not learn."""
    dparams, dx = pull(residuals, "", dy, params=params if learned else False, x=x)
    return mapped(select_learned, dparams or {}, None, learned) if params else None, dx


def select_learned(dparams: Params, residuals: None, learned: tuple[str, ...]) -> Params:
    """The gradients of what learns."""
    found = tree.to_dotted(dparams)
    return tree.from_dotted({name: found[name] for name in learned})
