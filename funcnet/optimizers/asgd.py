"""Averaged gradient descent: `asgd`, and the mean of the params that it keeps."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet.core import Optimizer, Params, Tree
from funcnet.optimizers.checks import Number, check_options, is_on
from funcnet.optimizers.lift import stateful, zero_step
from funcnet.optimizers.named import check_named, named_chain, rate_at
from funcnet.optimizers.transforms import (
    LearningRate,
    add_decayed_weights,
    negate,
    scale_by_learning_rate,
)


class AsgdState(NamedTuple):
    """The number of updates so far, and ax, the mean of the params, a tree like them."""

    step: Tensor
    ax: Tree

    def eval_params(self, params: Params) -> Params:
        """The mean, to evaluate a model with."""
        return self.ax


def average_asgd(t0: Number = 1e6) -> Optimizer:
    """Leaves the updates g as they are, and keeps the mean ``ax`` of the params ``p + g``.

    At the update number t, ``ax = ax + (p + g - ax) / max(1, t - 1 - t0)``: until t is above
    ``t0 + 2`` the mean is the params themselves. It comes last in a chain.

    Args:
        t0: a number >= 0.

    State:
        `AsgdState`; ``fn.optimizers.eval_params`` gives the mean.

    Source: Polyak and Juditsky 1992; ``torch.optim.ASGD``.

    >>> optimizer = fn.chain(fn.sgd(1.0), average_asgd(0))
    >>> params, grads = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    >>> state = optimizer.init_state(params)
    >>> for _ in range(4):
    ...     updates, state = optimizer.update(grads, state, params)
    ...     params = fn.apply_updates(params, updates)
    >>> params, state["average_asgd"].ax
    ({'w': tensor([-4.])}, {'w': tensor([-3.])})
    """
    check_options("average_asgd", t0=t0)

    def init(p: Any) -> AsgdState:
        return AsgdState(zero_step(p), p.clone())

    def update(g: Tensor, state: AsgdState, p: Tensor) -> tuple[Tensor, AsgdState]:
        weight = 1.0 / (state.step.double() - t0).clamp(min=1.0)
        return g, AsgdState(state.step + 1, torch.lerp(state.ax, p + g, weight))

    return stateful(init, update, elementwise=True)


def asgd(
    lr: LearningRate = 1e-2,
    lambd: Number = 1e-4,
    alpha: Number = 0.75,
    t0: Number = 1e6,
    weight_decay: Number = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Averaged gradient descent: ``p - eta (g + lambd p)``, with the mean of the params kept.

    At the update number t, ``eta = lr / (1 + lambd lr (t - 1))^alpha``. The mean, which
    ``fn.optimizers.eval_params`` gives, is that of the params after the update ``t0 + 1``; before,
    it is the params themselves; see `funcnet.optimizers.average_asgd`.

    Args:
        lr: a number, a 0-d tensor, or a function of the number of updates so far. As in PyTorch,
            the value of a function takes effect one update later, but for its first.
        lambd: weight decay, and how fast the rate falls.
        alpha: the power with which the rate falls.
        t0: the number of updates before the mean is one of several.
        weight_decay: L2 penalty: adds ``weight_decay * p`` to the gradient.
        maximize: ascends instead: negates the gradient before all else.

    Source: ``torch.optim.ASGD``; Polyak and Juditsky 1992; Bottou's SGD project.

    >>> optimizer = asgd(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.1000])}
    """
    check_named("asgd", lr, lambd=lambd, alpha=alpha, t0=t0, weight_decay=weight_decay)

    def eta(step: Tensor) -> Number:
        rate = rate_at("asgd", lr, (step - 1).clamp(min=0))
        return rate / (1.0 + lambd * rate * step.double()) ** alpha

    return named_chain(
        "asgd",
        maximize and negate(),
        (is_on(lambd) or is_on(weight_decay)) and add_decayed_weights(lambd + weight_decay),
        scale_by_learning_rate(eta),
        average_asgd(t0),
    )
