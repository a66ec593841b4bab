"""Schedules of one formula: constant, linear, polynomial, exponential, steps, cosine."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from funcnet.errors import check_count
from funcnet.optimizers.checks import Number
from funcnet.optimizers.schedules.lift import (
    Schedule,
    between,
    check_numbers,
    half_cosine,
    look_up,
    passed,
    progress,
    raised,
    schedule_of,
    table,
)


def constant(lr: Number, factor: Number = 1.0, total_iters: Number = 5) -> Schedule:
    """``lr``, or ``factor lr`` for the first steps: ``t < total_iters``.

    Args:
        lr: the value.
        factor: in [0, 1]; torch's default is 1/3.
        total_iters: how many steps have the factor.

    Source: ``torch.optim.lr_scheduler.ConstantLR``.

    >>> constant(1.0, factor=0.5, total_iters=2)(torch.arange(4))
    tensor([0.5000, 0.5000, 1.0000, 1.0000], dtype=torch.float64)
    """
    check_numbers("constant", lr=lr)
    check_numbers("constant", 0.0, 1.0, factor=factor)
    check_numbers("constant", 0.0, total_iters=total_iters)
    return schedule_of(lambda t: lr * between(factor, 1.0, (t >= total_iters).double()))


def linear(
    lr: Number,
    start_factor: Number = 1.0 / 3,
    end_factor: Number = 1.0,
    total_iters: Number = 5,
) -> Schedule:
    """From ``start_factor lr`` to ``end_factor lr`` on a straight line, and then held.

    ``lr (start_factor + (end_factor - start_factor) min(t / total_iters, 1))``

    Args:
        lr: the value at a factor of 1.
        start_factor, end_factor: numbers >= 0; torch takes none above 1, and no start at 0.
        total_iters: the number of steps from one to the other, at least 1.

    Source: ``torch.optim.lr_scheduler.LinearLR``; ``optax.linear_schedule`` is
    ``polynomial(init_value, total_iters=transition_steps, end_value=end_value)``.

    >>> linear(1.0, start_factor=0.5, total_iters=2)(torch.arange(4))
    tensor([0.5000, 0.7500, 1.0000, 1.0000], dtype=torch.float64)
    """
    check_numbers("linear", lr=lr)
    check_numbers("linear", 0.0, start_factor=start_factor, end_factor=end_factor)
    check_numbers("linear", 1.0, total_iters=total_iters)
    return schedule_of(
        lambda t: lr * between(start_factor, end_factor, progress(t, 0, total_iters))
    )


def polynomial(
    lr: Number,
    total_iters: Number = 5,
    power: Number = 1.0,
    *,
    end_value: Number = 0.0,
    transition_begin: Number = 0,
) -> Schedule:
    """From ``lr`` to ``end_value`` as a power of the steps that are left, and then held.

    ``end_value + (lr - end_value) (1 - s)^power`` with
    ``s = (t - transition_begin) / total_iters``, in [0, 1].

    Args:
        lr: the value until ``transition_begin``.
        total_iters: the number of steps that it changes, at least 1.
        power: a number >= 0.
        end_value: the value from then on, greater than ``lr`` for a rise.
        transition_begin: the step at which the change begins.

    Source: ``torch.optim.lr_scheduler.PolynomialLR``, ``optax.polynomial_schedule``.

    >>> polynomial(1.0, total_iters=2, power=2)(torch.arange(4))
    tensor([1.0000, 0.2500, 0.0000, 0.0000], dtype=torch.float64)
    """
    check_numbers("polynomial", lr=lr, end_value=end_value)
    check_numbers("polynomial", 1.0, total_iters=total_iters)
    check_numbers("polynomial", 0.0, power=power, transition_begin=transition_begin)
    return schedule_of(
        lambda t: between(
            end_value, lr, raised(1.0 - progress(t, transition_begin, total_iters), power)
        )
    )


def exponential(
    lr: Number,
    gamma: Number,
    *,
    transition_steps: Number = 1,
    transition_begin: Number = 0,
    staircase: bool = False,
    end_value: Number | None = None,
) -> Schedule:
    """``lr gamma^s`` with ``s = max(t - transition_begin, 0) / transition_steps``.

    Args:
        lr: the value until ``transition_begin``.
        gamma: the factor every ``transition_steps`` steps, a number > 0.
        transition_steps: at least 1.
        transition_begin: the step at which the change begins.
        staircase: whether s is rounded down, so that the value changes by jumps.
        end_value: the least value, or the greatest if gamma is at least 1.

    Source: ``torch.optim.lr_scheduler.ExponentialLR``, ``optax.exponential_decay``.

    >>> exponential(1.0, 0.5)(torch.arange(3))
    tensor([1.0000, 0.5000, 0.2500], dtype=torch.float64)
    """
    check_numbers("exponential", lr=lr)
    check_numbers("exponential", math.ulp(0.0), gamma=gamma)
    check_numbers("exponential", 1.0, transition_steps=transition_steps)
    check_numbers("exponential", 0.0, transition_begin=transition_begin)
    if end_value is not None:
        check_numbers("exponential", end_value=end_value)

    def formula(t: Tensor) -> Tensor:
        s = (t - transition_begin).clamp(min=0.0) / transition_steps
        decayed = lr * gamma ** (s.floor() if staircase else s)
        if end_value is None:
            return decayed
        falls = 0.0 * t + gamma < 1.0
        end = 0.0 * t + end_value
        return torch.where(falls, torch.maximum(decayed, end), torch.minimum(decayed, end))

    return schedule_of(formula)


def step(lr: Number, step_size: Number, gamma: Number = 0.1) -> Schedule:
    """``lr gamma^floor(t / step_size)``: a factor of gamma every ``step_size`` steps.

    Args:
        lr: the first value.
        step_size: a number of steps, at least 1.
        gamma: the factor, a number >= 0.

    Source: ``torch.optim.lr_scheduler.StepLR``.

    >>> step(1.0, 2, gamma=0.5)(torch.arange(5))
    tensor([1.0000, 1.0000, 0.5000, 0.5000, 0.2500], dtype=torch.float64)
    """
    check_numbers("step", lr=lr)
    check_numbers("step", 1.0, step_size=step_size)
    check_numbers("step", 0.0, gamma=gamma)
    return schedule_of(lambda t: lr * gamma ** torch.floor(t / step_size))


def multistep(lr: Number, milestones: Iterable[int], gamma: Number = 0.1) -> Schedule:
    """``lr gamma^n``, where n is the number of milestones at or before t.

    Args:
        lr: the first value.
        milestones: numbers of steps, in any order; one that is there twice counts twice.
        gamma: the factor, a number >= 0.

    Source: ``torch.optim.lr_scheduler.MultiStepLR``.

    >>> multistep(1.0, [1, 3], gamma=0.5)(torch.arange(4))
    tensor([1.0000, 0.5000, 0.5000, 0.2500], dtype=torch.float64)
    """
    check_numbers("multistep", lr=lr)
    check_numbers("multistep", 0.0, gamma=gamma)
    milestones = [*milestones]
    for milestone in milestones:
        check_count("multistep", 0, milestones=milestone)
    boundaries = table(milestones)
    return schedule_of(lambda t: lr * gamma ** passed(t, boundaries).double())


def multiplicative(lr: Number, lr_lambda: Callable[[int], float], total_steps: int) -> Schedule:
    """``lr f(1) f(2) ... f(t)`` with f the ``lr_lambda``; from ``total_steps`` on, held.

    The products are computed here, once: 8 bytes a step.

    Args:
        lr: the first value.
        lr_lambda: ``f(step) -> factor`` of an int; any Python function.
        total_steps: the last step that changes the value, at least 0.

    Source: ``torch.optim.lr_scheduler.MultiplicativeLR``.

    >>> multiplicative(1.0, lambda step: 1 - 0.5 * (step % 2), 3)(torch.arange(5))
    tensor([1.0000, 0.5000, 0.5000, 0.2500, 0.2500], dtype=torch.float64)
    """
    check_numbers("multiplicative", lr=lr)
    check_count("multiplicative", 0, total_steps=total_steps)
    if not callable(lr_lambda):
        raise TypeError(f"multiplicative: expects a function as lr_lambda, got {lr_lambda!r}")
    factors = [float(lr_lambda(step)) for step in range(1, total_steps + 1)]
    products = table([1.0, *factors]).cumprod(0)
    return schedule_of(lambda t: lr * look_up(products, t.clamp(0.0, float(total_steps)).long()))


def cosine(lr: Number, T_max: Number, eta_min: Number = 0.0) -> Schedule:  # noqa: N803
    """``eta_min + (lr - eta_min) (1 + cos(pi t / T_max)) / 2``.

    After ``T_max`` steps it rises again, as PyTorch's does; `cosine_decay` stays at its end.

    Args:
        lr: the first value.
        T_max: the number of steps to the least value, at least 1.
        eta_min: the least value.

    Source: ``torch.optim.lr_scheduler.CosineAnnealingLR``; Loshchilov and Hutter 2017.

    >>> cosine(1.0, 2)(torch.arange(5))
    tensor([1.0000, 0.5000, 0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    check_numbers("cosine", lr=lr, eta_min=eta_min)
    check_numbers("cosine", 1.0, T_max=T_max)
    return schedule_of(lambda t: between(eta_min, lr, half_cosine(t / T_max)))


def cosine_decay(
    init_value: Number, decay_steps: Number, alpha: Number = 0.0, exponent: Number = 1.0
) -> Schedule:
    """``init_value ((1 - alpha) c^exponent + alpha)``, and after ``decay_steps`` steps held.

    c is ``(1 + cos(pi t / decay_steps)) / 2``.

    Args:
        init_value: the first value.
        decay_steps: the number of steps to the last value, at least 1.
        alpha: the last value as a part of the first one.
        exponent: a number >= 0.

    Source: ``optax.cosine_decay_schedule``.

    >>> cosine_decay(1.0, 2, alpha=0.1)(torch.arange(4))
    tensor([1.0000, 0.5500, 0.1000, 0.1000], dtype=torch.float64)
    """
    check_numbers("cosine_decay", init_value=init_value, alpha=alpha)
    check_numbers("cosine_decay", 1.0, decay_steps=decay_steps)
    check_numbers("cosine_decay", 0.0, exponent=exponent)

    def formula(t: Tensor) -> Tensor:
        part = raised(half_cosine(progress(t, 0, decay_steps)), exponent)
        return init_value * between(alpha, 1.0, part)

    return schedule_of(formula)
