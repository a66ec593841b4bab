"""Averaging in place of a schedule: `schedule_free`, `schedule_free_sgd`, `schedule_free_adamw`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet import tree
from funcnet.checks import check_kind
from funcnet.core import Optimizer, Params, Tree
from funcnet.errors import check_count
from funcnet.optimizers.chains import chained
from funcnet.optimizers.checks import Number, check_options, is_on, read_option
from funcnet.optimizers.lift import stateful, zero_step
from funcnet.optimizers.named import check_betas, check_named, named_chain, rate_at
from funcnet.optimizers.rms import scale_by_rms
from funcnet.optimizers.transforms import (
    LearningRate,
    add_decayed_weights,
    negate,
    scale_by_learning_rate,
)


class ScheduleFreeState(NamedTuple):
    """The updates so far, the greatest rate, the sum of the weights, b1; and z, like params."""

    step: Tensor
    max_lr: Tensor
    weight_sum: Tensor
    b1: Tensor
    z: Tree

    def eval_params(self, params: Params) -> Params:
        """``x = (y - (1 - b1) z) / b1`` of the params y, to evaluate a model with."""

        def average(y: Tensor, z: Tensor) -> Tensor:
            return (y + (1.0 / self.b1 - 1.0) * (y - z)).to(y.dtype)

        return tree.map(average, params, self.z)


def average_schedule_free(
    lr: LearningRate, b1: Number = 0.9, weight_lr_power: Number = 2.0
) -> Optimizer:
    """The second half of `funcnet.schedule_free`: turns an update of z into one of the params y.

    Args:
        lr, b1, weight_lr_power: as for `funcnet.schedule_free`.

    State:
        `ScheduleFreeState`; `funcnet.optimizers.eval_params` gives x.

    >>> optimizer = fn.chain(fn.sgd(1.0), average_schedule_free(1.0))
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-1.])}
    """
    check_named("average_schedule_free", lr, weight_lr_power=weight_lr_power)
    check_options("average_schedule_free", b1=b1)
    known = read_option(b1)
    if known is not None and not 0.0 < known <= 1.0:  # x cannot be found of y = z
        raise ValueError(f"average_schedule_free: b1 must be in (0, 1], got {known}")

    def init(p: Any) -> ScheduleFreeState:
        step = zero_step(p)
        zero = step.double()
        return ScheduleFreeState(step, zero, zero.clone(), zero + b1, p.clone())

    def update(g: Any, state: ScheduleFreeState, p: Any) -> tuple[Any, ScheduleFreeState]:
        step = state.step + 1
        rate = rate_at("average_schedule_free", lr, step)
        max_lr = torch.maximum(state.max_lr, torch.zeros_like(state.max_lr) + rate)
        weight = max_lr**weight_lr_power
        total = state.weight_sum + weight
        c = torch.where(total > 0, weight / torch.where(total > 0, total, 1.0), 0.0)
        # y' - y, where y = b1 x + (1 - b1) z, x' = x + c (z' - x) and z' = z + g.
        updates = (state.z + g * b1 - p) * c + g * (1.0 - b1)
        after = ScheduleFreeState(step, max_lr, total, state.b1 * 0.0 + b1, state.z + g)
        return updates, after

    return stateful(init, update, elementwise=True)


def schedule_free(
    optimizer: Optimizer,
    lr: LearningRate,
    b1: Number = 0.9,
    weight_lr_power: Number = 2.0,
) -> Optimizer:
    """Any optimizer without momentum, with averaging in place of a schedule that falls.

    There are three sequences of params: z, which the optimizer updates; x, a weighted mean of all
    z so far, to evaluate with; and y between the two, which are the params of the train state,
    where gradients are taken. With the optimizer's update u:

        z = z + u            y = (1 - b1) z + b1 x
        x = (1 - c) x + c z  c = w / (the sum of all w so far)    w = (greatest lr)^weight_lr_power

    Args:
        optimizer: with no momentum of its own, at the rate ``lr``.
        lr: the rate that it has, a number, a 0-d tensor, or a function of the number of updates
            so far, which may rise, as in a warm-up, but need not fall. For the weight w it is
            asked for the rate of the next update, as in optax.
        b1: how near y is to x, a number in (0, 1].
        weight_lr_power: makes the first updates weigh less, where the rate is low.

    State:
        the optimizer's, and a `funcnet.optimizers.ScheduleFreeState`. Evaluate with
        ``fn.optimizers.eval_params(opt_state, params)``.

    Source: Defazio et al. 2024, *The road less scheduled*; ``optax.contrib.schedule_free``.

    >>> optimizer = schedule_free(fn.sgd(0.5), 0.5)
    >>> params = {"w": torch.ones(1)}
    >>> state = optimizer.init_state(params)
    >>> for _ in range(20):
    ...     updates, state = optimizer.update(params, state, params)
    ...     params = fn.apply_updates(params, updates)
    >>> state["average_schedule_free"].eval_params(params)
    {'w': tensor([-0.0343])}
    """
    check_kind("schedule_free", optimizer, Optimizer)
    average = average_schedule_free(lr, b1, weight_lr_power)
    return chained("schedule_free", {optimizer.name: optimizer, average.name: average})


def _warmed_up(name: str, lr: LearningRate, warmup_steps: int) -> LearningRate:
    """A rate that rises from 0 in a straight line over the first updates."""
    if warmup_steps == 0:
        return lr
    check_count(name, warmup_steps=warmup_steps)

    def warmed_up(step: Tensor) -> Number:
        return rate_at(name, lr, step) * (step.double() / warmup_steps).clamp(max=1.0)

    return warmed_up


def schedule_free_sgd(
    lr: LearningRate = 1.0,
    warmup_steps: int = 0,
    b1: Number = 0.9,
    weight_decay: Number = 0.0,
    weight_lr_power: Number = 2.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    """`schedule_free` gradient descent: ``z = z - lr (g + weight_decay y)``.

    Args:
        lr: a number, a 0-d tensor, or a function of the number of updates so far.
        warmup_steps: over how many updates the rate rises from 0 to ``lr``; 0 for none.
        b1, weight_lr_power: as for `schedule_free`.
        weight_decay: L2 penalty: adds ``weight_decay * p`` to the gradient.
        maximize: ascends instead: negates the gradient before all else.

    Source: Defazio et al. 2024; ``optax.contrib.schedule_free_sgd``.

    >>> optimizer = schedule_free_sgd(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.1000])}
    """
    check_named("schedule_free_sgd", lr, weight_decay=weight_decay)
    rate = _warmed_up("schedule_free_sgd", lr, warmup_steps)
    return named_chain(
        "schedule_free_sgd",
        maximize and negate(),
        is_on(weight_decay) and add_decayed_weights(weight_decay),
        scale_by_learning_rate(rate),
        average_schedule_free(rate, b1, weight_lr_power),
    )


def schedule_free_adamw(
    lr: LearningRate = 2.5e-3,
    warmup_steps: int = 0,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    weight_lr_power: Number = 2.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    """`schedule_free` AdamW: ``z = z - lr (g / (sqrt(v') + eps) + weight_decay y)``.

    ``v = b2 v + (1 - b2) g^2`` and ``v' = v / (1 - b2^t)`` at the update number t: in place of
    Adam's momentum there is the mean.

    Args:
        lr: a number, a 0-d tensor, or a function of the number of updates so far.
        warmup_steps: over how many updates the rate rises from 0 to ``lr``; 0 for none.
        betas: how near y is to x, see `schedule_free`, and the decay of v.
        eps: added to the root.
        weight_decay: decoupled, as in the formula.
        weight_lr_power: as for `schedule_free`.
        maximize: ascends instead: negates the gradient before all else.

    Source: Defazio et al. 2024; ``optax.contrib.schedule_free_adamw``.

    >>> optimizer = schedule_free_adamw(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.1000])}
    """
    check_named("schedule_free_adamw", lr, weight_decay=weight_decay, eps=eps)
    check_betas("schedule_free_adamw", betas)
    rate = _warmed_up("schedule_free_adamw", lr, warmup_steps)
    return named_chain(
        "schedule_free_adamw",
        maximize and negate(),
        scale_by_rms(betas[1], eps, bias_correction=True),
        is_on(weight_decay) and add_decayed_weights(weight_decay),
        scale_by_learning_rate(rate),
        average_schedule_free(rate, betas[0], weight_lr_power),
    )
