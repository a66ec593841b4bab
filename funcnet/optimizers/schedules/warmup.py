"""Schedules that rise to a peak first."""

import math
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from funcnet.optimizers.checks import Number
from funcnet.optimizers.schedules.annealing import exponential
from funcnet.optimizers.schedules.compositions import join
from funcnet.optimizers.schedules.lift import (
    Schedule,
    between,
    check_choice,
    check_numbers,
    cosine_between,
    half_cosine,
    progress,
    raised,
    schedule_of,
)


def warmup_constant(init_value: Number, peak_value: Number, warmup_steps: Number) -> Schedule:
    """From ``init_value`` to ``peak_value`` on a straight line, and then held.

    Args:
        init_value, peak_value: the first and the last value.
        warmup_steps: the number of steps between them; 0 for none.

    Source: ``optax.warmup_constant_schedule``.

    >>> warmup_constant(0.0, 1.0, 2)(torch.arange(4))
    tensor([0.0000, 0.5000, 1.0000, 1.0000], dtype=torch.float64)
    """
    _check("warmup_constant", init_value, peak_value, warmup_steps)
    return schedule_of(lambda t: between(init_value, peak_value, progress(t, 0, warmup_steps)))


def warmup_cosine(
    init_value: Number,
    peak_value: Number,
    warmup_steps: Number,
    decay_steps: Number,
    end_value: Number = 0.0,
    exponent: Number = 1.0,
) -> Schedule:
    """From ``init_value`` to ``peak_value`` on a straight line, and down as half a cosine.

    After the warm-up ``end_value + (peak_value - end_value) c^exponent``, where c goes from 1 to
    0 as `cosine_decay`'s; from ``decay_steps`` on, ``end_value``.

    Args:
        init_value, peak_value, end_value: the first, the greatest and the last value.
        warmup_steps: the number of steps of the rise; 0 for none.
        decay_steps: the number of all steps, those of the rise among them.
        exponent: a number >= 0.

    Source: ``optax.warmup_cosine_decay_schedule``; Loshchilov and Hutter 2017.

    >>> warmup_cosine(0.0, 1.0, 2, 4)(torch.arange(6))
    tensor([0.0000, 0.5000, 1.0000, 0.5000, 0.0000, 0.0000], dtype=torch.float64)
    """
    _check("warmup_cosine", init_value, peak_value, warmup_steps)
    check_numbers("warmup_cosine", end_value=end_value)
    check_numbers("warmup_cosine", 0.0, exponent=exponent)
    check_numbers("warmup_cosine", decay_steps=decay_steps)
    falling = decay_steps - warmup_steps
    if not isinstance(falling, Tensor) and falling <= 0:
        raise ValueError(
            f"warmup_cosine: expects decay_steps above warmup_steps, got {decay_steps} and "
            f"{warmup_steps}; decay_steps count the warm-up too"
        )

    def formula(t: Tensor) -> Tensor:
        rise = between(init_value, peak_value, progress(t, 0, warmup_steps))
        part = raised(half_cosine(progress(t, warmup_steps, falling)), exponent)
        fall = between(end_value, peak_value, part)
        return torch.where(t < warmup_steps, rise, fall)

    return schedule_of(formula)


def warmup_exponential(
    init_value: Number,
    peak_value: Number,
    warmup_steps: Number,
    transition_steps: Number,
    decay_rate: Number,
    transition_begin: Number = 0,
    staircase: bool = False,
    end_value: Number | None = None,
) -> Schedule:
    """From ``init_value`` to ``peak_value`` on a straight line, and on as `exponential`.

    Args:
        init_value, peak_value: the first value, and that after the warm-up.
        warmup_steps: the number of steps of the rise; 0 for none.
        transition_steps, transition_begin, staircase, end_value: as for `exponential`, whose
            steps are counted from the end of the warm-up.
        decay_rate: its gamma.

    Source: ``optax.warmup_exponential_decay_schedule``.

    >>> warmup_exponential(0.0, 1.0, 2, 1, 0.5)(torch.arange(5))
    tensor([0.0000, 0.5000, 1.0000, 0.5000, 0.2500], dtype=torch.float64)
    """
    _check("warmup_exponential", init_value, peak_value, warmup_steps)
    falls = exponential(
        peak_value,
        decay_rate,
        transition_steps=transition_steps,
        transition_begin=transition_begin,
        staircase=staircase,
        end_value=end_value,
    )

    def formula(t: Tensor) -> Tensor:
        rise = between(init_value, peak_value, progress(t, 0, warmup_steps))
        return torch.where(t < warmup_steps, rise, falls(t - warmup_steps))

    return schedule_of(formula)


def sgdr(cosine_kwargs: Iterable[Mapping[str, Any]]) -> Schedule:
    """One `warmup_cosine` after another.

    Args:
        cosine_kwargs: the arguments of each; it takes its ``decay_steps``.

    Source: ``optax.sgdr_schedule``; Loshchilov and Hutter 2017.

    >>> cycle = dict(init_value=0.0, peak_value=1.0, warmup_steps=1, decay_steps=2)
    >>> sgdr([cycle, {**cycle, "peak_value": 0.5}])(torch.arange(5))
    tensor([0.0000, 1.0000, 0.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    cycles = [*cosine_kwargs]
    ends = [*accumulate([cycle["decay_steps"] for cycle in cycles])]
    return join([warmup_cosine(**cycle) for cycle in cycles], ends[:-1])


def inverse_sqrt(
    peak_value: Number,
    warmup_steps: Number,
    timescale: Number | None = None,
    init_value: Number = 0.0,
) -> Schedule:
    """Up on a straight line, and down as ``peak_value / sqrt(1 + (t - warmup_steps) / timescale)``.

    Args:
        peak_value: the value at the end of the warm-up.
        warmup_steps: the number of steps of the rise; 0 for none.
        timescale: ``warmup_steps`` if None, and 10000 if that is 0.
        init_value: the first value.

    Source: Vaswani et al. 2017: ``inverse_sqrt((d * w) ** -0.5, w)`` for a model of d features
    with w steps of warm-up; ``transformers.get_inverse_sqrt_schedule``.

    >>> inverse_sqrt(1.0, 4)(torch.tensor([0, 2, 4, 16]))
    tensor([0.0000, 0.5000, 1.0000, 0.5000], dtype=torch.float64)
    """
    _check("inverse_sqrt", init_value, peak_value, warmup_steps)
    if timescale is None:
        zero = not isinstance(warmup_steps, Tensor) and warmup_steps == 0
        scale: Number = 10_000 if zero else warmup_steps
    else:
        scale = timescale
    check_numbers("inverse_sqrt", math.ulp(0.0), timescale=scale)

    def formula(t: Tensor) -> Tensor:
        rise = between(init_value, peak_value, progress(t, 0, warmup_steps))
        later = 1.0 + (t - warmup_steps).clamp(min=0.0) / scale
        return torch.where(t < warmup_steps, rise, peak_value / later.sqrt())

    return schedule_of(formula)


_DECAYS = {
    "linear": between,
    "cosine": cosine_between,
    "1-sqrt": lambda start, end, part: between(start, end, part.sqrt()),
}


def warmup_stable_decay(
    peak_value: Number,
    warmup_steps: Number,
    stable_steps: Number,
    decay_steps: Number,
    init_value: Number = 0.0,
    end_value: Number = 0.0,
    decay: str = "1-sqrt",
) -> Schedule:
    """Up on a straight line, held at ``peak_value``, and down at the end.

    In the last phase, of which the part s is over, ``peak_value - (peak_value - end_value) f(s)``
    with f(s) = s, ``(1 - cos(pi s)) / 2`` or ``sqrt(s)``; then ``end_value``.

    Args:
        peak_value: the value in the middle.
        warmup_steps, stable_steps, decay_steps: the lengths of the phases, numbers >= 0.
        init_value, end_value: the first and the last value.
        decay: "linear", "cosine" or "1-sqrt": f, as above.

    Source: Hu et al. 2024 (MiniCPM); Hägele et al. 2024 for the forms of the decay;
    ``transformers.get_wsd_schedule``.

    >>> warmup_stable_decay(1.0, 2, 2, 2, decay="linear")(torch.arange(8))
    tensor([0.0000, 0.5000, 1.0000, 1.0000, 1.0000, 0.5000, 0.0000, 0.0000],
           dtype=torch.float64)
    """
    name = "warmup_stable_decay"
    _check(name, init_value, peak_value, warmup_steps)
    check_numbers(name, end_value=end_value)
    check_numbers(name, 0.0, stable_steps=stable_steps, decay_steps=decay_steps)
    check_choice(name, "decay", decay, [*_DECAYS])
    begin, anneal = warmup_steps + stable_steps, _DECAYS[decay]

    def formula(t: Tensor) -> Tensor:
        rise = between(init_value, peak_value, progress(t, 0, warmup_steps))
        fall = anneal(peak_value, end_value, progress(t, begin, decay_steps))
        return torch.where(t < warmup_steps, rise, fall)

    return schedule_of(formula)


def _check(name: str, init_value: Number, peak_value: Number, warmup_steps: Number) -> None:
    check_numbers(name, init_value=init_value, peak_value=peak_value)
    check_numbers(name, 0.0, warmup_steps=warmup_steps)
