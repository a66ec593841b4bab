"""Schedules made of others, `join` and `product`, and curves through points."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor

from funcnet.optimizers.checks import Number
from funcnet.optimizers.schedules.lift import (
    Schedule,
    between,
    check_boundaries,
    check_choice,
    check_functions,
    check_numbers,
    cosine_between,
    look_up,
    passed,
    schedule_of,
    steps_of,
    table,
    value_at,
)


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """One schedule after another; each counts its steps from where it begins.

    Args:
        schedules: functions of the step.
        boundaries: the step at which each of them but the first begins, in rising order.

    Source: ``optax.join_schedules``, ``torch.optim.lr_scheduler.SequentialLR``.

    >>> first, last = fn.schedules.constant(0.1), fn.schedules.linear(1.0, 1.0, 0.0, 2)
    >>> join([first, last], [2])(torch.arange(5))
    tensor([0.1000, 0.1000, 1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    schedules, boundaries = [*schedules], [*boundaries]
    check_functions("join", schedules)
    check_boundaries("join", "boundaries", boundaries)
    if len(boundaries) != len(schedules) - 1:
        raise ValueError(
            f"join: expects a boundary between each two of {len(schedules)} schedules, "
            f"got {len(boundaries)}"
        )

    def schedule(step: Any) -> Tensor:
        t = steps_of(step)
        value = value_at(schedules[0], t)
        for begin, following in zip(boundaries, schedules[1:], strict=True):
            later = value_at(following, (t - begin).clamp(min=0))
            value = torch.where(t < begin, value, later)
        return value

    return schedule


def product(*schedules: Schedule) -> Schedule:
    """The product of schedules, of which all but one are factors.

    Source: ``torch.optim.lr_scheduler.ChainedScheduler``.

    >>> linear, exponential = fn.schedules.linear, fn.schedules.exponential
    >>> warm = product(linear(1.0, 0.5, 1.0, 2), exponential(0.1, 0.5))
    >>> warm(torch.arange(3))
    tensor([0.0500, 0.0375, 0.0250], dtype=torch.float64)
    """
    check_functions("product", schedules)

    def schedule(step: Any) -> Tensor:
        t = steps_of(step)
        value = value_at(schedules[0], t)
        for factor in schedules[1:]:
            value = value * factor(t)
        return value

    return schedule


def piecewise(points: Mapping[int, float], interpolation: str = "linear") -> Schedule:
    """A curve through points; before the first and after the last it is held.

    Args:
        points: ``{step: value}``.
        interpolation: between two points, "linear", "cosine", or "constant": the value of the
            last point.

    >>> piecewise({0: 0.0, 2: 1.0, 6: 0.0})(torch.arange(7))
    tensor([0.0000, 0.5000, 1.0000, 0.7500, 0.5000, 0.2500, 0.0000], dtype=torch.float64)
    """
    _check_mapping("piecewise", "points", points)
    if not points:
        raise ValueError("piecewise: expects at least one point, got none")
    check_choice("piecewise", "interpolation", interpolation, ("linear", "cosine", "constant"))
    check_boundaries("piecewise", "points", sorted(points))
    for value in points.values():
        check_numbers("piecewise", value=value)
    steps = sorted(points)
    return _curve(steps, [points[step] for step in steps], interpolation)


def piecewise_constant(
    init_value: Number, boundaries_and_scales: Mapping[int, float] | None = None
) -> Schedule:
    """``init_value`` times the scales of all boundaries at or before t.

    Args:
        init_value: the first value.
        boundaries_and_scales: ``{step: scale}``, numbers >= 0.

    Source: ``optax.piecewise_constant_schedule``.

    >>> piecewise_constant(1.0, {1: 0.5, 3: 0.1})(torch.arange(4))
    tensor([1.0000, 0.5000, 0.5000, 0.0500], dtype=torch.float64)
    """
    factor = _scaled("piecewise_constant", init_value, boundaries_and_scales, "constant")
    return schedule_of(lambda t: init_value * factor(t))


def piecewise_interpolate(
    interpolate_type: str,
    init_value: Number,
    boundaries_and_scales: Mapping[int, float] | None = None,
) -> Schedule:
    """From one value to the next, which is ``scale`` times it, at each boundary.

    Args:
        interpolate_type: "linear" or "cosine".
        init_value: the first value.
        boundaries_and_scales: ``{step: scale}``, numbers >= 0.

    Source: ``optax.schedules.piecewise_interpolate_schedule``.

    >>> piecewise_interpolate("linear", 1.0, {2: 0.5, 4: 0.0})(torch.arange(5))
    tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000], dtype=torch.float64)
    """
    name = "piecewise_interpolate"
    check_choice(name, "interpolate_type", interpolate_type, ("linear", "cosine"))
    factor = _scaled(name, init_value, boundaries_and_scales, interpolate_type)
    return schedule_of(lambda t: init_value * factor(t))


def _scaled(name: str, init_value: Number, scales: Any, interpolation: str) -> Schedule:
    """The curve through the products of the scales."""
    scales = {} if scales is None else scales
    check_numbers(name, init_value=init_value)
    _check_mapping(name, "boundaries_and_scales", scales)
    boundaries = sorted(scales)
    check_boundaries(name, "boundaries_and_scales", boundaries)
    for scale in scales.values():
        check_numbers(name, 0.0, scale=scale)
    factors = [*accumulate([1.0, *[scales[boundary] for boundary in boundaries]], mul)]
    return _curve((0, *boundaries), factors, interpolation)


def _check_mapping(name: str, what: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expects a dict of steps as {what}, got {type(value).__name__}")


def _curve(steps: Sequence[int], values: Sequence[Number], interpolation: str) -> Schedule:
    xs, last = table(steps), len(steps) - 1
    known = not any(isinstance(value, Tensor) for value in values)
    heights = table([float(value) for value in values]) if known else None

    def formula(t: Tensor) -> Tensor:
        zero = 0.0 * t.flatten()[:1].sum()
        ys = torch.stack([zero + value for value in values]) if heights is None else heights
        here = (passed(t, xs) - 1).clamp(min=0)
        y = look_up(ys, here)
        if interpolation == "constant":
            return y
        after = (here + 1).clamp(max=last)
        begin = look_up(xs, here)
        part = ((t - begin) / (look_up(xs, after) - begin).clamp(min=1.0)).clamp(0.0, 1.0)
        return _INTERPOLATIONS[interpolation](y, look_up(ys, after), part)

    return schedule_of(formula)


_INTERPOLATIONS = {"linear": between, "cosine": cosine_between}
