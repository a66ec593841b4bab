"""Steps divided by the root of all squared gradients so far: `adagrad`, `scale_by_adagrad`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet.core import Optimizer, Tree
from funcnet.optimizers.checks import Number, check_options, is_on
from funcnet.optimizers.lift import stateful
from funcnet.optimizers.moments import sqrt
from funcnet.optimizers.named import check_named, filled_like, named_chain, rate_at
from funcnet.optimizers.transforms import (
    LearningRate,
    add_decayed_weights,
    negate,
    scale_by_learning_rate,
)


class AdagradState(NamedTuple):
    """The sum of all g^2, a tree like params."""

    sum: Tree


def scale_by_adagrad(initial_accumulator_value: Number = 0.0, eps: Number = 1e-10) -> Optimizer:
    """``g / (sqrt(s) + eps)`` with the sum ``s = s + g^2``.

    Args:
        initial_accumulator_value: what s is before the first update, a number >= 0.
        eps: added to the root, a number >= 0.

    Source: Duchi, Hazan and Singer 2011; ``torch.optim.Adagrad``.

    >>> params = {"w": torch.tensor([2.0])}
    >>> scale_by_adagrad().update(params, scale_by_adagrad().init_state(params), params)[0]
    {'w': tensor([1.])}
    """
    start = initial_accumulator_value
    check_options("scale_by_adagrad", initial_accumulator_value=start, eps=eps)

    def init(p: Any) -> AdagradState:
        return AdagradState(filled_like(p, start))

    def update(g: Any, state: AdagradState, p: Any) -> tuple[Any, AdagradState]:
        s = torch.addcmul(state.sum, g, g)
        return g / (sqrt(s) + eps), AdagradState(s)

    return stateful(init, update, elementwise=True)


def adagrad(
    lr: LearningRate = 1e-2,
    lr_decay: Number = 0.0,
    weight_decay: Number = 0.0,
    initial_accumulator_value: Number = 0.0,
    eps: Number = 1e-10,
    *,
    maximize: bool = False,
) -> Optimizer:
    """``p - lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps)`` with the sum ``s = s + g^2``.

    t is the number of the update, from 1.

    Args:
        lr: a number, a 0-d tensor, or a function of the number of updates so far.
        lr_decay: how fast the rate falls.
        weight_decay: L2 penalty: adds ``weight_decay * p`` to the gradient.
        initial_accumulator_value: what s is before the first update.
        eps: added to the root.
        maximize: ascends instead: negates the gradient before all else.

    Source: ``torch.optim.Adagrad``; Duchi, Hazan and Singer 2011.

    >>> optimizer = adagrad(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.1000])}
    """
    check_named("adagrad", lr, lr_decay=lr_decay, weight_decay=weight_decay, eps=eps)

    def decayed(step: Tensor) -> Number:
        return rate_at("adagrad", lr, step) / (1.0 + lr_decay * step.double())

    return named_chain(
        "adagrad",
        maximize and negate(),
        is_on(weight_decay) and add_decayed_weights(weight_decay),
        scale_by_adagrad(initial_accumulator_value, eps),
        scale_by_learning_rate(decayed if is_on(lr_decay) else lr),
    )
