"""Schedules that go up and down: warm restarts, cycles, one cycle, and their momentum."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from funcnet.errors import check_count
from funcnet.optimizers.checks import Number
from funcnet.optimizers.schedules.lift import (
    Schedule,
    between,
    check_choice,
    check_numbers,
    cosine_between,
    half_cosine,
    look_up,
    passed,
    progress,
    schedule_of,
    table,
)


def cosine_restarts(
    lr: Number,
    T_0: int,  # noqa: N803
    T_mult: int = 1,  # noqa: N803
    eta_min: Number = 0.0,
) -> Schedule:
    """``eta_min + (lr - eta_min) (1 + cos(pi s / T)) / 2``, again and again.

    s is the number of steps since the last restart; T, the length of the period, is ``T_0`` at
    first and ``T_mult`` times the one before after each restart.

    Args:
        lr: the value at each restart.
        T_0: the number of steps of the first period, at least 1.
        T_mult: an integer, at least 1.
        eta_min: the least value, which a restart comes just before.

    Source: ``torch.optim.lr_scheduler.CosineAnnealingWarmRestarts``; Loshchilov and Hutter 2017.

    >>> cosine_restarts(1.0, 2)(torch.arange(4))
    tensor([1.0000, 0.5000, 1.0000, 0.5000], dtype=torch.float64)
    """
    check_numbers("cosine_restarts", lr=lr, eta_min=eta_min)
    check_count("cosine_restarts", 1, T_0=T_0, T_mult=T_mult)
    starts = [0]
    while T_mult > 1 and starts[-1] < 2**53:
        starts.append(T_0 + T_mult * starts[-1])
    first, length = table(starts), table([b - a for a, b in pairwise([*starts, 2**60])])

    def formula(t: Tensor) -> Tensor:
        if T_mult == 1:
            return between(eta_min, lr, half_cosine(t / T_0 - torch.floor(t / T_0)))
        period = (passed(t, first) - 1).clamp(min=0)
        return between(
            eta_min, lr, half_cosine((t - look_up(first, period)) / look_up(length, period))
        )

    return schedule_of(formula)


def cyclic(
    base_lr: Number,
    max_lr: Number,
    step_size_up: Number = 2000,
    step_size_down: Number | None = None,
    mode: str = "triangular",
    gamma: Number = 1.0,
    scale_fn: Callable[[Tensor], Tensor | float] | None = None,
    scale_mode: str = "cycle",
) -> Schedule:
    """``base_lr + (max_lr - base_lr) triangle(t) scale``: up and down on straight lines.

    The triangle goes from 0 to 1 in ``step_size_up`` steps and back in ``step_size_down``.

    Args:
        base_lr, max_lr: the least value, and the greatest before it is scaled.
        step_size_up, step_size_down: numbers of steps; None for as many down as up.
        mode: the scale: "triangular", 1; "triangular2", ``1 / 2^(cycle - 1)``; "exp_range",
            ``gamma^t``.
        gamma: see mode.
        scale_fn: instead of the mode: ``scale_fn(cycle)``, of a 0-d tensor counted from 1, or
            ``scale_fn(t)``.
        scale_mode: which of both, "cycle" or "iterations".

    Source: ``torch.optim.lr_scheduler.CyclicLR``; Smith 2017. See `cyclic_momentum`.

    >>> cyclic(0.0, 1.0, step_size_up=2, mode="triangular2")(torch.arange(7))
    tensor([0.0000, 0.5000, 1.0000, 0.5000, 0.0000, 0.2500, 0.5000], dtype=torch.float64)
    """
    check_numbers("cyclic", base_lr=base_lr, max_lr=max_lr)
    cycle = _cycle("cyclic", step_size_up, step_size_down, mode, gamma, scale_fn, scale_mode)
    return schedule_of(lambda t: base_lr + (max_lr - base_lr) * cycle(t))


def cyclic_momentum(
    base_momentum: Number = 0.8,
    max_momentum: Number = 0.9,
    step_size_up: Number = 2000,
    step_size_down: Number | None = None,
    mode: str = "triangular",
    gamma: Number = 1.0,
    scale_fn: Callable[[Tensor], Tensor | float] | None = None,
    scale_mode: str = "cycle",
) -> Schedule:
    """The momentum beside `cyclic`: ``max_momentum`` where the learning rate is least.

    ``max_momentum - (max_momentum - base_momentum) triangle(t) scale``

    Args:
        base_momentum, max_momentum: the least and the greatest value.
        step_size_up, step_size_down, mode, gamma, scale_fn, scale_mode: as for `cyclic`.

    Source: ``torch.optim.lr_scheduler.CyclicLR`` with ``cycle_momentum``.

    >>> cyclic_momentum(0.8, 0.9, step_size_up=2)(torch.arange(4))
    tensor([0.9000, 0.8500, 0.8000, 0.8500], dtype=torch.float64)
    """
    check_numbers("cyclic_momentum", base_momentum=base_momentum, max_momentum=max_momentum)
    cycle = _cycle(
        "cyclic_momentum", step_size_up, step_size_down, mode, gamma, scale_fn, scale_mode
    )
    return schedule_of(lambda t: max_momentum - (max_momentum - base_momentum) * cycle(t))


def _cycle(
    name: str,
    up: Number,
    down: Number | None,
    mode: str,
    gamma: Number,
    scale_fn: Callable[[Tensor], Tensor | float] | None,
    scale_mode: str,
) -> Callable[[Tensor], Tensor]:
    """The triangle times its scale."""
    down = up if down is None else down
    check_numbers(name, math.ulp(0.0), step_size_up=up, gamma=gamma)
    check_numbers(name, 0.0, step_size_down=down)
    check_choice(name, "scale_mode", scale_mode, ("cycle", "iterations"))
    if scale_fn is None:
        check_choice(name, "mode", mode, ("triangular", "triangular2", "exp_range"))
    elif not callable(scale_fn):
        raise TypeError(f"{name}: expects a function as scale_fn, got {scale_fn!r}")
    total = up + down

    def scale(t: Tensor, cycle: Tensor) -> Tensor | float:
        if scale_fn is not None:
            return scale_fn(cycle if scale_mode == "cycle" else t)
        if mode == "exp_range":
            return gamma**t
        return 0.5 ** (cycle - 1.0) if mode == "triangular2" else 1.0

    def formula(t: Tensor) -> Tensor:
        cycle = torch.floor(1.0 + t / total)
        x = 1.0 + t / total - cycle
        ratio = up / total
        triangle = torch.where(x <= ratio, x / ratio, (x - 1.0) / (ratio - 1.0))
        return triangle * scale(t, cycle)

    return formula


def one_cycle(
    max_lr: Number,
    total_steps: int | None = None,
    epochs: int | None = None,
    steps_per_epoch: int | None = None,
    pct_start: float = 0.3,
    anneal_strategy: str = "cos",
    *,
    div_factor: Number = 25.0,
    final_div_factor: Number = 1e4,
    three_phase: bool = False,
) -> Schedule:
    """From ``max_lr / div_factor`` up to ``max_lr``, and down to far below where it began.

    The last value, at the step ``total_steps - 1``, is
    ``max_lr / (div_factor * final_div_factor)``. It is held from there on, where PyTorch's raises.

    Args:
        max_lr: the greatest value, at the step ``pct_start * total_steps - 1``.
        total_steps: the number of steps; if None, ``epochs * steps_per_epoch``.
        epochs, steps_per_epoch: see total_steps.
        pct_start: the part of the steps that it rises, in [0, 1].
        anneal_strategy: "cos", or "linear" for straight lines.
        div_factor, final_div_factor: see above, numbers > 0.
        three_phase: whether it goes down to the first value, as fast as it came from it, and then
            to the last one.

    Source: ``torch.optim.lr_scheduler.OneCycleLR``; Smith and Topin 2017. See
    `one_cycle_momentum`.

    >>> one_cycle(1.0, 6, pct_start=0.5, anneal_strategy="linear", div_factor=5)(torch.arange(4))
    tensor([0.2000, 0.6000, 1.0000, 0.6667], dtype=torch.float64)
    """
    check_numbers("one_cycle", max_lr=max_lr)
    least = math.ulp(0.0)
    check_numbers("one_cycle", least, div_factor=div_factor, final_div_factor=final_div_factor)
    first = max_lr / div_factor
    last = first / final_div_factor
    down = (first, last) if three_phase else (last,)
    steps = (total_steps, epochs, steps_per_epoch)
    return _one_cycle("one_cycle", steps, pct_start, anneal_strategy, (first, max_lr, *down))


def one_cycle_momentum(
    total_steps: int | None = None,
    epochs: int | None = None,
    steps_per_epoch: int | None = None,
    pct_start: float = 0.3,
    anneal_strategy: str = "cos",
    *,
    base_momentum: Number = 0.85,
    max_momentum: Number = 0.95,
    three_phase: bool = False,
) -> Schedule:
    """The momentum beside `one_cycle`: ``base_momentum`` where the learning rate is greatest.

    Args:
        base_momentum, max_momentum: the least and the greatest value.
        total_steps, epochs, steps_per_epoch, pct_start, anneal_strategy, three_phase: as for
            `one_cycle`.

    Source: ``torch.optim.lr_scheduler.OneCycleLR`` with ``cycle_momentum``.

    >>> one_cycle_momentum(6, pct_start=0.5, anneal_strategy="linear")(torch.arange(4))
    tensor([0.9500, 0.9000, 0.8500, 0.8833], dtype=torch.float64)
    """
    check_numbers("one_cycle_momentum", base_momentum=base_momentum, max_momentum=max_momentum)
    values = (max_momentum, base_momentum, max_momentum, *[max_momentum] * three_phase)
    steps = (total_steps, epochs, steps_per_epoch)
    return _one_cycle("one_cycle_momentum", steps, pct_start, anneal_strategy, values)


def _one_cycle(
    name: str,
    steps: tuple[int | None, int | None, int | None],
    pct_start: float,
    anneal_strategy: str,
    values: tuple[Number, ...],
) -> Schedule:
    """Through the values, of which the second is where it turns and the last is at the end."""
    total_steps, epochs, steps_per_epoch = steps
    if total_steps is None:
        if epochs is None or steps_per_epoch is None:
            raise ValueError(f"{name}: expects total_steps, or epochs and steps_per_epoch")
        check_count(name, 1, epochs=epochs, steps_per_epoch=steps_per_epoch)
        total_steps = epochs * steps_per_epoch
    check_count(name, 1, total_steps=total_steps)
    check_numbers(name, 0.0, 1.0, pct_start=pct_start)
    check_choice(name, "anneal_strategy", anneal_strategy, ("cos", "linear"))
    anneal = cosine_between if anneal_strategy == "cos" else between
    turn = pct_start * total_steps - 1.0
    ends = [turn, 2.0 * turn, total_steps - 1.0][: len(values) - 1]
    ends[-1] = total_steps - 1.0

    def formula(t: Tensor) -> Tensor:
        t = t.clamp(max=ends[-1])
        begin = ends[-2]
        value = anneal(values[-2], values[-1], progress(t, begin, ends[-1] - begin))
        for index in range(len(ends) - 2, -1, -1):
            begin, end = ends[index - 1] if index else 0.0, ends[index]
            phase = anneal(values[index], values[index + 1], progress(t, begin, end - begin))
            value = torch.where(t <= end, phase, value)
        return value

    return schedule_of(formula)
