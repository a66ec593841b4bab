"""Finding the first layer that makes a NaN or an infinity."""

from typing import Any

import optree
import torch
from torch import Tensor

from funcnet.core import Grads, Layer, Params, Pullback, Tree, map_layers, pull, wrap
from funcnet.deferred import defers, mapped


def detect_nonfinite(model: Layer) -> Layer:
    """The model with every layer's output, and every cotangent it passes back, checked.

    The first value that is NaN or infinite raises ValueError with the layer's path. The values
    are read, so this is for eager mode and for debugging: it waits for the device.

    Source: ``torch.autograd.detect_anomaly``, for the forward pass as well.

    >>> import funcnet as fn
    >>> net = detect_nonfinite(fn.serial(fn.identity(), fn.softplus()))
    >>> net.apply({}, torch.tensor([1.0, float("inf")]))
    Traceback (most recent call last):
    ...
    ValueError: serial['0'] identity: x is not finite: 1 of 2 values
    """
    return map_layers(lambda path, layer: wrap(layer, _guarded), model)


def require_finite(name: str, what: str, values: Tree) -> None:
    """Raise ValueError if a floating-point tensor of a tree is not finite.

    >>> require_finite("loss", "value", torch.tensor(float("nan")))
    Traceback (most recent call last):
    ...
    ValueError: loss: value is not finite: 1 of 1 values
    """
    for leaf in optree.tree_leaves(values):
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            continue
        if leaf.is_meta:
            continue
        wrong = ~torch.isfinite(leaf)
        try:
            count = int(wrong.sum())
        except RuntimeError:
            raise TypeError(
                "detect_nonfinite reads values, which tensors do not have under jit and vmap; "
                "use it in eager mode"
            ) from None
        if count:
            raise ValueError(f"{name}: {what} is not finite: {count} of {leaf.numel()} values")


@defers
def finite_rule(
    residuals: dict[str, Any], dy: Tree, name: str, leaf: bool, *, params: bool, x: bool
) -> Grads:
    """The layer's own pullback, with what goes in and what comes out checked."""
    if leaf:  # the children of a combinator check what reaches them
        require_finite(name, "dy", dy)
    dparams, dx = pull(residuals, "layer", dy, params=params, x=x)
    require_finite(name, "dx", dx)
    return mapped(_finite_dparams, dparams, None, name), dx


def _finite_dparams(dparams: Params | None, residuals: None, name: str) -> Params | None:
    require_finite(name, "dparams", dparams)
    return dparams


def _guarded(layer: Layer) -> Layer:
    name, leaf = layer.name, not layer.children

    def check_input(params: Params, x: Tree) -> None:
        if leaf:
            require_finite(name, "x", x)
            require_finite(name, "params", params)

    def apply(params: Params, x: Tree, *state: Params, **options: Any) -> tuple[Tree, Params]:
        check_input(params, x)
        y, new_state = layer.apply(params, x, *state, **options)
        require_finite(name, "output", y)
        return y, new_state

    def vjp(
        params: Params, x: Tree, *state: Params, **options: Any
    ) -> tuple[Tree, Pullback, Params]:
        check_input(params, x)
        y, pullback, new_state = layer.vjp(params, x, *state, **options)
        require_finite(name, "output", y)
        return y, Pullback(finite_rule, {"layer": pullback}, (name, leaf), y), new_state

    return layer._replace(apply=apply, vjp=vjp)
