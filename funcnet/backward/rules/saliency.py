"""Rewrites of a model whose gradient of the input shows what an output depends on."""

from typing import Any

from torch import Tensor

from funcnet.backward.rules.other_rules import with_rule
from funcnet.checks import check_kind
from funcnet.core import Grads, Layer, map_layers, pull
from funcnet.errors import require


def guided_backprop(model: Layer) -> Layer:
    """The model, each relu of which passes back only what is positive, where it was active.

    ``dx = dy (x > 0) (dy > 0)`` at each relu. The gradient of an output with respect to an image
    then shows the image's parts that excite it. Params and state are those of the model.

    Args:
        model: any layer with relus among its layers.

    Source: Springenberg et al. 2015.

    >>> net = guided_backprop(fn.serial(fn.linear(3), fn.relu(), fn.linear(1)))
    >>> net
    serial(linear(3), guided_relu(relu()), linear(1))
    >>> _, pullback, _ = guided_backprop(fn.relu()).vjp({}, torch.tensor([1.0, 2.0, -3.0]))
    >>> pullback(torch.tensor([5.0, -6.0, 7.0]))[1]
    tensor([5., 0., 0.])
    """
    return _with_relus("guided_backprop", model, guided_relu)


def deconvnet(model: Layer) -> Layer:
    """The model, each relu of which passes back what is positive, wherever it was active.

    ``dx = dy (dy > 0)`` at each relu, as the net would be run backwards. Params and state are those
    of the model.

    Args:
        model: any layer with relus among its layers.

    Source: Zeiler and Fergus 2014.

    >>> _, pullback, _ = deconvnet(fn.relu()).vjp({}, torch.tensor([1.0, 2.0, -3.0]))
    >>> pullback(torch.tensor([5.0, -6.0, 7.0]))[1]
    tensor([5., 0., 7.])
    """
    return _with_relus("deconvnet", model, deconvnet_relu)


def _with_relus(name: str, model: Layer, other: Any) -> Layer:
    """The model with another layer in place of each relu, of which there must be some."""
    check_kind(name, model, Layer)
    found: list[str] = []

    def replaced(path: str, layer: Layer) -> Layer:
        if layer.name != "relu":
            return layer
        found.append(path)
        made: Layer = other(layer)
        return made

    rewritten = map_layers(replaced, model)
    require(found, f"{name}: expects a model with relus, got {model!r}")
    return rewritten


def guided_relu(layer: Layer) -> Layer:
    """A relu that passes back only what is positive, where x is."""
    laws = ("derivative", "linear")
    return with_rule(layer, guided_rule, breaks=laws, name="guided_relu")


def guided_rule(residuals: Any, dy: Tensor, *, params: bool, x: bool) -> Grads:
    """The pullback of the relu, of the positive part of dy."""
    return pull(residuals, "pullback", dy.clamp(min=0), params=params, x=x)


def deconvnet_relu(layer: Layer) -> Layer:
    """A relu that passes back only what is positive."""
    laws = ("derivative", "linear")
    return with_rule(layer, deconvnet_rule, reads=(), breaks=laws, name="deconvnet_relu")


def deconvnet_rule(residuals: Any, dy: Tensor, *, params: bool, x: bool) -> Grads:
    """``dx = dy (dy > 0)``."""
    return None, dy.clamp(min=0)
