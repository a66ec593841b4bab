"""`jit` of a layer, a loss and an optimizer: of the functions that they are made of."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from funcnet.checks import MISSING, refuse_missing
from funcnet.core import (
    EMPTY,
    Forward,
    Grads,
    Key,
    Layer,
    Loss,
    LossPullback,
    Optimizer,
    Params,
    Pullback,
    Tree,
    wrap,
)

Jit = Callable[[Callable[..., Any]], Any]


class Program:
    """A compiled function as a static argument of a rule.

    Any two are equal, as they compute the same, so that the treedef of a pullback is the same each
    time; a copy, or what is restored from a file, compiles anew.
    """

    def __init__(self, jit: Jit, function: Callable[..., Any]) -> None:
        self.jit, self.function = jit, function
        self.run = jit(function)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and other.function is self.function

    def __hash__(self) -> int:
        return hash(self.function)

    def __reduce__(self) -> Any:
        return Program, (self.jit, self.function)

    def __repr__(self) -> str:
        return f"{self.run!r}"


def pull_back(pullback: Pullback, dy: Tree, params: bool, x: bool) -> Grads:
    """A call of a layer's pullback, as a function to compile."""
    return pullback(dy, params=params, x=x)


def pull_back_loss(pullback: LossPullback, dvalue: Tensor | float) -> Tree:
    """A call of a loss's pullback, as a function to compile."""
    return pullback(dvalue)


def compiled_rule(residuals: Any, dy: Tree, program: Program, *, params: bool, x: bool) -> Grads:
    """The rule of the pullback that is among the residuals, compiled."""
    return program.run(residuals["pullback"], dy, params, x)


def compiled_loss_rule(residuals: Any, dvalue: Tensor | float, program: Program) -> Tree:
    """The rule of the loss's pullback that is among the residuals, compiled."""
    return program.run(residuals["pullback"], dvalue)


def compiled_layer(jit: Jit, layer: Layer) -> Layer:
    """A layer whose apply, vjp and pullback are compiled."""
    return wrap(layer, partial(_compiled_layer, jit))


def _compiled_layer(jit: Jit, layer: Layer) -> Layer:
    forward, backward = jit(layer.vjp), Program(jit, pull_back)

    def vjp(
        params: Params,
        x: Tree = MISSING,
        state: Params = EMPTY,
        *,
        key: Key = None,
        train: bool = True,
    ) -> Forward:
        if x is MISSING:
            refuse_missing(layer.name, "vjp", params)
        y, pullback, state = forward(params, x, state, key=key, train=train)
        kept = {"pullback": pullback}
        return y, Pullback(compiled_rule, kept, (backward,), y, layer.name), state

    return layer._replace(apply=jit(layer.apply), vjp=vjp)


def compiled_loss(jit: Jit, loss: Loss) -> Loss:
    """A loss whose apply, vjp and pullback are compiled."""
    forward, backward = jit(loss.vjp), Program(jit, pull_back_loss)

    def vjp(prediction: Tree, target: Tree) -> tuple[Tensor, LossPullback]:
        value, pullback = forward(prediction, target)
        kept = {"pullback": pullback}
        return value, LossPullback(compiled_loss_rule, kept, (backward,), value, loss.name)

    return loss._replace(apply=jit(loss.apply), vjp=vjp)


def compiled_optimizer(jit: Jit, optimizer: Optimizer) -> Optimizer:
    """An optimizer whose update is compiled."""
    return optimizer._replace(update=jit(optimizer.update))


COMPILED: dict[type, Callable[[Jit, Any], Any]] = {
    Layer: compiled_layer,
    Loss: compiled_loss,
    Optimizer: compiled_optimizer,
}
"""What `jit` makes of what is no function itself."""
