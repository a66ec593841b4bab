"""The training step: a pure function of a train state and a batch."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import (
    EMPTY,
    Box,
    Layer,
    Loss,
    Optimizer,
    Params,
    TrainState,
    Tree,
    pull,
)
from funcnet.finite import detect_nonfinite, require_finite
from funcnet.metrics.core import Metric, batch_function
from funcnet.optimizers.lift import step_params
from funcnet.random import fold_in

_ONE = torch.ones((), dtype=torch.int64, device="cpu")

Measure = Callable[[Tree, Tree], Tensor]
Batch = tuple[Tree, Tree]


def init_train_state(model: Layer, optimizer: Optimizer, key: Tensor, x: Tree) -> TrainState:
    """The state of a run before its first step.

    Args:
        model: makes params and state, by ``init(key, x)``.
        optimizer: makes its state from the params.
        key: of the run; step t draws from ``fold_in(key, t)``.
        x: an example input, of which only shape, dtype and device matter.

    >>> import funcnet as fn
    >>> start = init_train_state(fn.linear(2), fn.sgd(0.1), fn.key(0), torch.ones(5, 3))
    >>> start.step, start.params["weight"].shape
    (tensor(0), torch.Size([2, 3]))
    """
    _check_kind("init_train_state", "model", model, Layer)
    _check_kind("init_train_state", "optimizer", optimizer, Optimizer)
    params, state = model.init(key, x)
    step = torch.zeros((), dtype=torch.int64, device=key.device)
    return TrainState(params, state, optimizer.init_state(params), key, step)


def _check_kind(where: str, what: str, found: Any, kind: type) -> None:
    if not isinstance(found, kind):
        hint = "; call its constructor" if callable(found) else ""
        got = type(found).__name__
        raise TypeError(f"{where}: expects a {kind.__name__} as {what}, got {got}{hint}")


def _forward_backward(
    model: Layer, loss: Loss, metrics: Mapping[str, Measure], check_finite: bool
) -> Callable[..., tuple[Tensor, Params, Params, dict[str, Tensor]]]:
    """``(params, batch, state, key, train) -> (value, grads, state, metrics)``."""
    _check_kind("train_step", "model", model, Layer)
    _check_kind("train_step", "loss", loss, Loss)
    if check_finite:
        model = detect_nonfinite(model)

    def run(
        params: Params, batch: Batch, state: Params, key: Tensor | None, train: bool
    ) -> tuple[Tensor, Params, Params, dict[str, Tensor]]:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(f"expects a batch (x, target), got {tree.describe(batch)}")
        x, target = batch
        prediction, pullback, state = model.forward(params, x, state, key, train)
        value, loss_pullback = loss.vjp(prediction, target)
        if value.dim():
            raise ValueError(
                f"loss: expects a scalar value to train on, got {tuple(value.shape)}; "
                "pass reduction='mean' or reduction='sum' to the loss"
            )
        measured = {"loss": value}
        for name, metric in metrics.items():
            measured[name] = metric(prediction, target)
        if check_finite:
            require_finite("loss", "value", value)
        # From here on the backward pass alone holds the residuals, and drops them as it goes.
        pullbacks = {"model": pullback}
        del prediction, pullback
        dprediction = loss_pullback()
        del loss_pullback
        if check_finite:
            require_finite("loss", "dprediction", dprediction)
        box = Box([dprediction])
        del dprediction
        grads, _ = pull(pullbacks, "model", box, params=True, x=False)
        return value, grads, state, measured

    return run


def value_and_grad(
    model: Layer, loss: Loss, *, check_finite: bool = False
) -> Callable[..., tuple[Tensor, Params, Params]]:
    """The forward and backward half of a training step, for loops of one's own.

    Returns:
        ``(params, batch, state={}, *, key=None, train=True) -> (value, grads, state)``, where
        ``batch`` is ``(x, target)``, ``value`` the loss and ``grads`` a tree like ``params``.

    >>> import funcnet as fn
    >>> f = value_and_grad(fn.linear(1, bias=False), fn.mse())
    >>> value, grads, _ = f({"weight": torch.ones(1, 1)}, (torch.ones(4, 1), torch.zeros(4, 1)))
    >>> value, grads
    (tensor(1.), {'weight': tensor([[2.]])})
    """
    run = _forward_backward(model, loss, {}, check_finite)

    def value_and_grads(
        params: Params,
        batch: Batch,
        state: Params = EMPTY,
        *,
        key: Tensor | None = None,
        train: bool = True,
    ) -> tuple[Tensor, Params, Params]:
        value, grads, state, _ = run(params, batch, {**state}, key, train)
        return value, grads, state

    return value_and_grads


def train_step(
    model: Layer,
    loss: Loss,
    optimizer: Optimizer,
    *,
    metrics: Mapping[str, Metric | Measure | Loss] | None = None,
    check_finite: bool = False,
    donate: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Tensor]]]:
    """The pure training step ``step(train_state, batch) -> (train_state, metrics)``.

    Args:
        model, loss, optimizer: what the step is made of. The loss's value is a scalar.
        metrics: metrics of `fn.metrics`, losses, or functions ``(prediction, target) -> tensor``,
            by name: their values for the batch; beside the "loss", which is that of the params
            before the update.
        check_finite: raise ValueError with the path of the first layer whose output or cotangent
            is NaN or infinite. Eager mode only.
        donate: whether an eager step may write to the memory of the params and the optimizer's
            state that it is given, which then must not be used again, as with ``jit(step,
            donate=0)``. It takes less memory, and less time where the optimizer can use it; Adam
            then rounds otherwise.

    The key of the step is ``fold_in(train_state.key, train_state.step)``.

    >>> import funcnet as fn
    >>> step = train_step(fn.linear(1), fn.mse(), fn.sgd(0.1))
    >>> x, target = torch.ones(4, 1), torch.zeros(4, 1)
    >>> state = fn.init_train_state(fn.linear(1), fn.sgd(0.1), fn.key(0), x)
    >>> state, metrics = step(state, (x, target))
    >>> state.step, list(metrics)
    (tensor(1), ['loss'])
    """
    _check_kind("train_step", "optimizer", optimizer, Optimizer)
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(f"train_step: expects a dict of metrics, got {type(metrics).__name__}")
    measures = {name: batch_function(metric) for name, metric in (metrics or {}).items()}
    if "loss" in measures:
        raise ValueError("train_step: the metric 'loss' is there already, pick another name")
    run = _forward_backward(model, loss, measures, check_finite)
    takes_key = model.takes_key

    def step(train_state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        params, state, opt_state, key, count = train_state
        step_key = fold_in(key, count) if takes_key else None
        _, gradients, state, measured = run(params, batch, state, step_key, True)
        grads = Box([gradients])
        del gradients
        params, opt_state = step_params(optimizer, grads, opt_state, params, donate)
        new_state = TrainState(params, state, opt_state, key, count + _ONE)
        return new_state, measured

    return step
