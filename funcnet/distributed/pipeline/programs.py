"""What a stage computes: pure functions, each of which may be compiled."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from funcnet.core import Box, Key, Layer, Loss, Optimizer, Params, Sums, Tree, pull
from funcnet.deferred import DEFER, gradients
from funcnet.distributed.pipeline.stages import Stage
from funcnet.optimizers.lift import step_params
from funcnet.random import fold_in
from funcnet.train import Measure, Measured
from funcnet.transforms.jit import jit as compiled

Pullbacks = dict[str, Any]
"""Of the stage's layers and, in the last stage, of the loss."""


class Programs(NamedTuple):
    """The functions of one stage."""

    forward: Callable[..., tuple[Tree, Pullbacks, Params, Measured]]
    """``(params, x, target, state, key, index) -> (y, pullbacks, state, measured)`` of a part of
    the batch; ``index`` is None if there is only one. The last stage has no y, but the loss."""

    backward: Callable[..., tuple[Params, Tree]]
    """``(pullbacks, dy, dvalue, grads) -> (grads, dx)``: the gradients are added to others."""

    backward_input: Callable[..., tuple[Any, Tree]]
    """``(pullbacks, dy, dvalue) -> (deferred, dx)``: the first half."""

    backward_params: Callable[..., Params]
    """``(deferred, grads) -> grads``: the second half."""

    update: Callable[..., tuple[Params, Tree]]
    """``(grads, opt_state, params) -> (params, opt_state)``."""


def programs_of(
    stage: Stage,
    loss: Loss | None,
    measure: Measure,
    optimizer: Optimizer,
    *,
    jit: bool,
    donate: bool,
) -> Programs:
    """The functions of a stage; ``loss`` is None for all but the last."""
    layer: Layer = stage.layer
    learns, sends_dx = bool(stage.params), stage.sends_dx

    def forward(
        params: Params, x: Tree, target: Tree, state: Params, key: Key, index: Tensor | None
    ) -> tuple[Tree, Pullbacks, Params, Measured]:
        if key is not None and index is not None:
            key = fold_in(key, index)
        y, pullback, state = layer.forward(params, x, state, key, True)
        if loss is None:
            return y, {"model": pullback}, state, {}
        value, loss_pullback = loss.vjp(y, target)
        measured = {"loss": value, **measure(y, target)}
        return None, {"model": pullback, "loss": loss_pullback}, state, measured

    def pulled(pullbacks: Pullbacks, dy: Tree, dvalue: Any, params: Any) -> tuple[Any, Tree]:
        left = dict(pullbacks)
        pullbacks.clear()
        if loss is not None:
            dy = left.pop("loss")(dvalue)
        box = Box([dy])
        del dy
        return pull(left, "model", box, params=params, x=sends_dx)

    def backward(pullbacks: Pullbacks, dy: Tree, dvalue: Any, grads: Params) -> tuple[Params, Tree]:
        made, dx = pulled(pullbacks, dy, dvalue, Sums(grads) if learns else False)
        return made if learns else grads, dx

    def backward_input(pullbacks: Pullbacks, dy: Tree, dvalue: Any) -> tuple[Any, Tree]:
        return pulled(pullbacks, dy, dvalue, DEFER if learns else False)

    def backward_params(deferred: Any, grads: Params) -> Params:
        return Sums(grads).plus(gradients(deferred)) if learns else grads

    def update(grads: Params, opt_state: Tree, params: Params) -> tuple[Params, Tree]:
        box = Box([grads])
        del grads
        return step_params(optimizer, box, opt_state, params, donate and not jit)

    if not jit:
        return Programs(forward, backward, backward_input, backward_params, update)
    return Programs(
        compiled(forward),
        compiled(backward, donate=3),
        compiled(backward_input),
        compiled(backward_params, donate=1),
        compiled(update, donate=(0, 1, 2) if donate else 0),
    )
