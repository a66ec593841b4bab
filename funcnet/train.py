"""The training step: a pure function of a train state and a batch."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from funcnet import tree
from funcnet.checks import MISSING, check_kind
from funcnet.control_flow import scan
from funcnet.core import (
    EMPTY,
    Box,
    Layer,
    Loss,
    Optimizer,
    Params,
    Sums,
    TrainState,
    Tree,
    pull,
)
from funcnet.data import leading_extent, pair
from funcnet.deferred import Defer
from funcnet.errors import check_count, require
from funcnet.finite import detect_nonfinite, require_finite
from funcnet.metrics.core import Metric, batch_function
from funcnet.observing import FIGURES, with_figures
from funcnet.optimizers.lift import step_params
from funcnet.optimizers.over_ranks import knowing_parts
from funcnet.random import fold_in

_ONE = torch.ones((), dtype=torch.int64, device="cpu")

Measure = Callable[[Tree, Tree], Any]
Batch = tuple[Tree, Tree]


Measured = dict[str, Any]
"""The loss and the metrics of one batch, or what they are to be computed from."""

ForwardBackward = Callable[..., tuple[Params, Params, Measured]]
"""``(params, batch, state, key, train, dvalue=1.0, sums=True) -> (grads, state, measured)``."""


def forward_backward(
    model: Layer, loss: Loss, measure: Measure, check_finite: bool
) -> ForwardBackward:
    """The forward and backward pass of one batch.

    ``dvalue`` is the cotangent of the loss. With `Sums` for ``sums``, the gradients are added up;
    with ``DEFER`` they are a `Deferred`.
    """
    check_kind("train_step", model, Layer, "model")
    check_kind("train_step", loss, Loss, "loss")
    if check_finite:
        model = detect_nonfinite(model)

    def run(
        params: Params,
        batch: Batch,
        state: Params,
        key: Tensor | None,
        train: bool,
        dvalue: float | Tensor = 1.0,
        sums: bool | Sums | Defer = True,
    ) -> tuple[Params, Params, Measured]:
        x, target = pair("train_step", batch)
        prediction, pullback, state = model.forward(params, x, state, key, train)
        value, loss_pullback = loss.vjp(prediction, target)
        if value.dim():
            raise ValueError(
                f"loss: expects a scalar value to train on, got {tuple(value.shape)}; "
                "pass reduction='mean' or reduction='sum' to the loss"
            )
        measured = {"loss": value, **measure(prediction, target)}
        if check_finite:
            require_finite("loss", "value", value)
        # From here on the backward pass alone holds the residuals, and drops them as it goes.
        pullbacks = {"model": pullback}
        del prediction, pullback
        dprediction = loss_pullback(dvalue)
        del loss_pullback
        if check_finite:
            require_finite("loss", "dprediction", dprediction)
        box = Box([dprediction])
        del dprediction
        grads, _ = pull(pullbacks, "model", box, params=sums, x=False)
        return grads, state, measured

    return run


def _in_micro_batches(run: ForwardBackward, count: int) -> ForwardBackward:
    """The same of a batch in ``count`` parts: the mean of their gradients, one after another."""

    def accumulated(
        params: Params,
        batch: Batch,
        state: Params,
        key: Tensor | None,
        train: bool,
        dvalue: float | Tensor = 1.0,
    ) -> tuple[Params, Params, Measured]:
        parts = tree.map(_split(batch, count), pair("train_step", batch))
        keys = None if key is None else torch.arange(count, device=key.device)

        def body(carry: Tree, each: Tree) -> tuple[Tree, Measured]:
            (grads, state), (index, part) = carry, each
            part_key = None if key is None else fold_in(key, index)
            grads, state, measured = run(
                params, part, state, part_key, train, dvalue / count, Sums(grads)
            )
            return (grads, state), measured

        # Memory of our own, to which each part's gradients are added layer by layer.
        zeros = tree.map(torch.zeros_like, params)
        (grads, state), measured = scan(body, (zeros, state), (keys, parts))
        return grads, state, measured

    return accumulated


def _split(batch: Batch, count: int) -> Callable[[Tensor], Tensor]:
    size = leading_extent("micro_batches", batch, "a batch of tensors")
    if size % count or not size:
        raise ValueError(f"micro_batches: expects a batch of a multiple of {count}, got {size}")
    return lambda leaf: leaf.unflatten(0, (count, size // count))


def value_and_grad(
    model: Layer, loss: Loss, *, check_finite: bool = False
) -> Callable[..., tuple[Tensor, Params, Params]]:
    """The forward and backward half of a training step, for loops of one's own.

    Returns:
        ``(params, batch, state={}, *, key=None, train=True, dvalue=1.0) -> (value, grads,
        state)``, where ``batch`` is ``(x, target)``, ``value`` the loss and ``grads`` a tree like
        ``params``: ``dvalue``, such as a loss scale, times the gradient of the loss.

    >>> import funcnet as fn
    >>> f = value_and_grad(fn.linear(1, bias=False), fn.mse())
    >>> value, grads, _ = f({"weight": torch.ones(1, 1)}, (torch.ones(4, 1), torch.zeros(4, 1)))
    >>> value, grads
    (tensor(1.), {'weight': tensor([[2.]])})
    """
    run = forward_backward(model, loss, lambda prediction, target: {}, check_finite)

    def value_and_grads(
        params: Params,
        batch: Batch,
        state: Params = EMPTY,
        *,
        key: Tensor | None = None,
        train: bool = True,
        dvalue: float | Tensor = 1.0,
    ) -> tuple[Tensor, Params, Params]:
        grads, state, measured = run(params, batch, {**state}, key, train, dvalue)
        return measured["loss"], grads, state

    return value_and_grads


def train_step(
    model: Layer,
    loss: Loss,
    optimizer: Optimizer,
    *,
    metrics: Mapping[str, Metric | Measure | Loss] | None = None,
    micro_batches: int = 1,
    check_finite: bool = False,
    donate: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Tensor]]]:
    """The pure training step ``step(train_state, batch) -> (train_state, metrics)``.

    Args:
        model, loss, optimizer: what the step is made of. The loss's value is a scalar.
        metrics: metrics of `funcnet.metrics`, losses, or functions
            ``(prediction, target) -> tensor``, by name: their values for the batch; beside the
            "loss", which is that of the params before the update.
        micro_batches: k, to compute the batch in k equal parts of its leading extent, one after
            another, with the memory of one part and one tree of gradients. Their mean is taken,
            of the gradients, the loss and metrics that are functions: for a loss that is a mean
            over the examples, those of the whole batch; for one that is a sum, 1/k of those. State
            goes from part to part, so that a batch norm sees the parts. Part i draws from
            ``fold_in(step's key, i)``.
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
    check_kind("train_step", optimizer, Optimizer, "optimizer")
    check_count("train_step", micro_batches=micro_batches)
    loss_scale = optimizer.loss_scale
    require(
        not (check_finite and loss_scale),
        "train_step: check_finite does not go with a loss scale, which skips such steps itself",
    )
    measure, finish = measures(metrics)
    run = forward_backward(model, loss, measure, check_finite)
    if micro_batches > 1:
        run = _in_micro_batches(run, micro_batches)
    run = with_figures(run, model)
    takes_key, optimizer_for = model.takes_key, knowing_parts(optimizer, model)

    def step(
        train_state: TrainState, batch: Batch = MISSING, *more: Any
    ) -> tuple[TrainState, dict[str, Any]]:
        if not isinstance(train_state, TrainState) or batch is MISSING or more:
            _refuse(train_state, batch, more)
        params, state, opt_state, key, count = train_state
        step_key = fold_in(key, count) if takes_key else None
        dvalue = 1.0 if loss_scale is None else loss_scale(opt_state)
        gradients, state, measured = run(params, batch, state, step_key, True, dvalue)
        grads = Box([gradients])
        del gradients
        params, opt_state = step_params(optimizer_for(batch), grads, opt_state, params, donate)
        new_state = TrainState(params, state, opt_state, key, count + _ONE)
        return new_state, finish(measured, micro_batches > 1)

    return step


def _refuse(train_state: Any, batch: Any, more: tuple[Any, ...]) -> NoReturn:
    """Raise TypeError: a step is called with other things than a train state and a batch."""
    expected = "train_step: a step expects a TrainState and a batch, step(train_state, (x, target))"
    if isinstance(batch, TrainState):
        raise TypeError(f"{expected}; got the batch first")
    if not isinstance(train_state, TrainState):
        hint = "; make it by fn.init_train_state(model, optimizer, key, x)"
        got = tree.describe(train_state)
        if isinstance(train_state, Mapping):
            got = f"a dict with {list(train_state)}"
            hint += ", where params=... are those that are there"
        elif isinstance(train_state, tuple) and isinstance((*train_state, 0)[0], TrainState):
            got = "what a step returns"
            hint = "; it is a pair: train_state, metrics = step(train_state, (x, target))"
        raise TypeError(f"{expected}; got {got} as the train state{hint}")
    if batch is MISSING:
        raise TypeError(f"{expected}; got no batch")
    raise TypeError(f"{expected}; got {1 + len(more)} arguments for it: write them as one, a tuple")


def measures(
    metrics: Mapping[str, Metric | Measure | Loss] | None,
) -> tuple[Measure, Callable[..., dict[str, Any]]]:
    """``(prediction, target) -> measured``, and ``(measured, in_parts) -> values``.

    What is measured of a `Metric` is its accumulator, of which those of several parts, stacked,
    are added up; of a function, its value, of which the mean is taken.
    """
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(f"train_step: expects a dict of metrics, got {type(metrics).__name__}")
    given = dict(metrics or {})
    if "loss" in given:
        raise ValueError("train_step: the metric 'loss' is there already, pick another name")
    sums = {name: metric for name, metric in given.items() if isinstance(metric, Metric)}
    functions = {
        name: _accumulated(metric)
        if isinstance(metric, Metric)
        else batch_function(metric, f"train_step: metric {name!r}:")
        for name, metric in given.items()
    }

    def measure(prediction: Tree, target: Tree) -> Measured:
        return {name: function(prediction, target) for name, function in functions.items()}

    def finish(measured: Measured, in_parts: bool) -> dict[str, Any]:
        figures = measured.pop(FIGURES, {})
        if in_parts:
            measured = {
                name: tree.map(_sum if name in sums else _mean, found)
                for name, found in measured.items()
            }
        values = {
            name: sums[name].value(found) if name in sums else found
            for name, found in measured.items()
        }
        return {**figures, **values}

    return measure, finish


def _accumulated(metric: Metric) -> Measure:
    def accumulate(prediction: Tree, target: Tree) -> Tree:
        return metric.update(metric.init(tree.device_of(prediction)), prediction, target)

    return accumulate


def _sum(parts: Tensor) -> Tensor:
    return parts.sum(0)


def _mean(parts: Tensor) -> Tensor:
    return parts.mean(0) if parts.is_floating_point() else parts.double().mean(0)
