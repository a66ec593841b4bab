"""`reduce_on_plateau`: a learning rate that falls when a metric no longer improves, as a value."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from funcnet.errors import check_count
from funcnet.optimizers.checks import Number
from funcnet.optimizers.schedules.lift import (
    check_choice,
    check_numbers,
)


class PlateauState(NamedTuple):
    """The learning rate, and what decides on the next one; 0-d tensors."""

    lr: Tensor
    """The rate to train with, float64."""
    best: Tensor
    """The best metric so far, float64."""
    bad: Tensor
    """How many metrics in a row were no improvement, int64."""
    cooldown: Tensor
    """How many updates of the cooldown are left, int64."""


class Plateau(NamedTuple):
    """Two pure functions, ``(init, update)``; see `reduce_on_plateau`."""

    init: Callable[..., PlateauState]
    update: Callable[[PlateauState, Tensor | float], PlateauState]


def reduce_on_plateau(
    lr: Number,
    mode: str = "min",
    factor: Number = 0.1,
    patience: int = 10,
    threshold: Number = 1e-4,
    threshold_mode: str = "rel",
    cooldown: int = 0,
    min_lr: Number = 0.0,
    eps: Number = 1e-8,
) -> Plateau:
    """A learning rate that falls when a metric has stopped to improve.

    After more than ``patience`` updates in a row without an improvement ``lr`` becomes
    ``max(factor lr, min_lr)``. It is no schedule, as it is not a function of the step alone, but a
    pure function of its state and the metric, that reads neither: it works under `funcnet.jit`,
    `funcnet.scan` and `funcnet.vmap`.

    Args:
        lr: the first rate; with 1.0, ``state.lr`` is a factor for a rate that is scheduled.
        mode: "min" if a less metric is better, "max" if a greater one is.
        factor: a number >= 0 and below 1.
        patience: how many updates without an improvement change nothing.
        threshold: an improvement is more than this.
        threshold_mode: "rel", ``metric < best (1 - threshold)``, or "abs",
            ``metric < best - threshold``; for "max" greater, and plus.
        cooldown: how many updates after a fall count nothing.
        min_lr: the least rate.
        eps: a fall by no more than this is left out.

    Returns:
        ``Plateau(init, update)``: ``init(device=None) -> PlateauState`` and
        ``update(state, metric) -> PlateauState``, with a number or a 0-d tensor as the metric.

    Source: ``torch.optim.lr_scheduler.ReduceLROnPlateau``.

    The rate goes to the optimizer as a tensor, so that another one compiles nothing anew: by
    ``inject_hyperparams``, in whose state it is replaced after each epoch,

    >>> optimizer = fn.optimizers.inject_hyperparams(fn.sgd)(lr=0.1)
    >>> params = {"w": torch.ones(1)}
    >>> opt_state = optimizer.init_state(params)
    >>> init, update = reduce_on_plateau(0.1, patience=1)
    >>> plateau = init()
    >>> for loss in (3.0, 2.0, 2.0, 2.0):
    ...     plateau = update(plateau, loss)
    >>> opt_state = opt_state._replace(hyperparams={"lr": plateau.lr})
    >>> optimizer.update(params, opt_state, params)[0]
    {'w': tensor([-0.0100])}

    or as an argument of a step that makes its optimizer of it, or multiplies the updates with it:

    >>> @fn.jit
    ... def step(train_state, plateau, batch):
    ...     optimizer = fn.adam(plateau.lr)
    ...     return fn.train_step(fn.linear(1), fn.mse(), optimizer)(train_state, batch)
    """
    name = "reduce_on_plateau"
    check_choice(name, "mode", mode, ("min", "max"))
    check_choice(name, "threshold_mode", threshold_mode, ("rel", "abs"))
    check_numbers(name, 0.0, lr=lr, threshold=threshold, min_lr=min_lr, eps=eps)
    check_numbers(name, 0.0, math.nextafter(1.0, 0.0), factor=factor)
    check_count(name, 0, patience=patience, cooldown=cooldown)
    sign = 1.0 if mode == "min" else -1.0

    def init(device: torch.device | str | None = None) -> PlateauState:
        zero = torch.zeros((), dtype=torch.float64, device=device)
        none = torch.zeros((), dtype=torch.int64, device=device)
        return PlateauState(zero + lr, zero + sign * math.inf, none, none)

    def is_better(metric: Tensor, best: Tensor) -> Tensor:
        if threshold_mode == "abs":
            bound = best - sign * threshold
        else:
            bound = best * (1.0 - sign * threshold)
        return metric < bound if mode == "min" else metric > bound

    def update(state: PlateauState, metric: Tensor | float) -> PlateauState:
        rate, best, bad, left = state
        if isinstance(metric, Tensor) and metric.dim():
            raise ValueError(
                f"{name}: expects a number or a 0-d tensor as metric, got {tuple(metric.shape)}"
            )
        value = torch.zeros_like(best) + metric
        better = is_better(value, best)
        bad = torch.where(better | (left > 0), 0, bad + 1)
        falls = bad > patience
        less = torch.clamp(factor * rate, min=min_lr)
        return PlateauState(
            torch.where(falls & (rate - less > eps), less, rate),
            torch.where(better, value, best),
            torch.where(falls, 0, bad),
            torch.where(falls, cooldown, (left - 1).clamp(min=0)),
        )

    return Plateau(init, update)
