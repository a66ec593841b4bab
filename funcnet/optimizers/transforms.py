"""Transforms of gradients, from which optimizers are chained.

Each is an `Optimizer`. In the formulas ``g`` is what the transform before it in the chain gives,
or the gradients, and ``p`` the params. What the last transform gives is added to the params.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from funcnet.core import Optimizer, Tree
from funcnet.optimizers.checks import Number, check_options, check_rate, is_on, read_option
from funcnet.optimizers.leaves import at_least_float32, sum_into
from funcnet.optimizers.lift import stateful, stateless, zero_step
from funcnet.optimizers.parted import masked
from funcnet.tree import Where

LearningRate = Number | Callable[[Tensor], Number]
"""A number, a 0-d tensor, or a function of the number of updates so far (0-d int64)."""


def scale(factor: Number) -> Optimizer:
    """``factor g``.

    Args:
        factor: a number or a 0-d tensor.

    >>> params = {"w": torch.ones(1)}
    >>> scale(2.0).update(params, {}, params)[0]
    {'w': tensor([2.])}
    """
    return stateless(lambda g, p: g * factor, elementwise=True)


def negate() -> Optimizer:
    """``-g``: with it before the others, an optimizer maximizes.

    >>> params = {"w": torch.ones(1)}
    >>> negate().update(params, {}, params)[0]
    {'w': tensor([-1.])}
    """
    return stateless(lambda g, p: -g, elementwise=True)


def scale_by_sign() -> Optimizer:
    """``sign(g)``. Source: signSGD, Bernstein et al. 2018.

    >>> params = {"w": torch.tensor([-3.0, 0.0])}
    >>> scale_by_sign().update(params, {}, params)[0]
    {'w': tensor([-1., 0.])}
    """
    return stateless(lambda g, p: g.sign(), elementwise=True)


def add_decayed_weights(weight_decay: Number, mask: Where | None = None) -> Optimizer:
    """``g + weight_decay p``: the gradient of an L2 penalty, or decoupled weight decay.

    Args:
        weight_decay: a number >= 0.
        mask: the leaves that decay, by path as for `masked`; by default all.

    >>> params = {"w": torch.ones(1)}
    >>> add_decayed_weights(0.1).update({"w": torch.zeros(1)}, {}, params)[0]
    {'w': tensor([0.1000])}
    """
    check_options("add_decayed_weights", weight_decay=weight_decay)
    name = "add_decayed_weights"
    decay = stateless(lambda g, p: sum_into(g, p, weight_decay), name=name, elementwise=True)
    return decay if mask is None else masked(decay, mask, name=name)


class ScheduleState(NamedTuple):
    """The number of updates so far, a 0-d int64 tensor."""

    step: Tensor


def scale_by_learning_rate(lr: LearningRate) -> Optimizer:
    """``-lr g``.

    Args:
        lr: a number >= 0, a 0-d tensor, or a function of the number of updates so far.

    State:
        `ScheduleState` if ``lr`` is a function, else none.

    >>> halving = scale_by_learning_rate(lambda step: 0.5**step)
    >>> params = {"w": torch.ones(1)}
    >>> _, state = halving.update(params, halving.init_state(params), params)
    >>> halving.update(params, state, params)
    ({'w': tensor([-0.5000])}, ScheduleState(step=tensor(2)))
    """
    if not callable(lr):
        check_rate("scale_by_learning_rate", lr)
        factor = -lr
        return stateless(lambda g, p: g * factor, elementwise=True)
    schedule = lr

    def update(g: Tensor, state: ScheduleState, p: Tensor) -> tuple[Tensor, ScheduleState]:
        rate = schedule(state.step)
        check_rate("scale_by_learning_rate", rate)
        # Leaves times a tensor take half the time of a tensor times leaves.
        return g * -rate, ScheduleState(state.step + 1)

    return stateful(lambda p: ScheduleState(zero_step(p)), update, elementwise=True)


class TraceState(NamedTuple):
    """The momentum buffer, a tree like params, and the number of updates so far."""

    trace: Tree
    step: Tensor


def trace(momentum: Number, dampening: Number = 0.0, nesterov: bool = False) -> Optimizer:
    """Momentum: ``b = momentum b + (1 - dampening) g``, starting from ``b = g``; gives b.

    With ``nesterov`` it gives ``g + momentum b``.

    Args:
        momentum: a number >= 0.
        dampening: a number; 0 for nesterov.
        nesterov: whether to look ahead.

    Source: ``torch.optim.SGD``; Sutskever et al. 2013.

    >>> momentum = trace(0.9)
    >>> params = {"w": torch.ones(1)}
    >>> _, state = momentum.update(params, momentum.init_state(params), params)
    >>> momentum.update(params, state, params)[0]
    {'w': tensor([1.9000])}
    """
    check_options("trace", momentum=momentum)
    check_options("trace", least=-math.inf, dampening=dampening)
    if nesterov and (read_option(momentum) == 0 or read_option(dampening) not in (0, None)):
        raise ValueError("trace: nesterov needs momentum > 0 and dampening = 0")

    def init(p: Tensor) -> TraceState:
        return TraceState(torch.zeros_like(p), zero_step(p))

    def update(g: Tensor, state: TraceState, p: Tensor) -> tuple[Tensor, TraceState]:
        fresh = g
        if is_on(dampening):  # but not of the first gradient
            fresh = (1.0 - dampening * (state.step > 0).double()) * g
        b = momentum * state.trace + fresh
        return g + momentum * b if nesterov else b, TraceState(b, state.step + 1)

    return stateful(init, update, elementwise=True)


class EmaState(NamedTuple):
    """The number of updates so far, and the moving average of what came in."""

    step: Tensor
    ema: Tree


def ema(decay: Number, debias: bool = True) -> Optimizer:
    """The exponential moving average of g: ``m = decay m + (1 - decay) g``.

    With ``debias`` it gives ``m / (1 - decay^t)`` at the update number t, from 1.

    Args:
        decay: a number in [0, 1).
        debias: whether to correct for the start at 0.

    Half precision is computed in float32, and the state rounded.

    Source: ``optax.ema``.

    >>> params = {"w": torch.ones(1)}
    >>> ema(0.9).update(params, ema(0.9).init_state(params), params)
    ({'w': tensor([1.0000])}, EmaState(step=tensor(1), ema={'w': tensor([0.1000])}))
    """
    check_options("ema", below=1.0, decay=decay)

    def init(p: Tensor) -> EmaState:
        return EmaState(zero_step(p), torch.zeros_like(p))

    def update(g: Tensor, state: EmaState, p: Tensor) -> tuple[Tensor, EmaState]:
        m = torch.lerp(at_least_float32(g), at_least_float32(state.ema), decay)
        step = state.step + 1
        return m / (1.0 - decay ** step.double()) if debias else m, EmaState(step, m)

    return stateful(init, update, elementwise=True)
