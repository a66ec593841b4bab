"""Adam with a decaying maximum of ``|g|`` for its root mean square: `adamax`, `scale_by_adamax`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet.core import Optimizer, Tree
from funcnet.optimizers.checks import Number, check_options, is_on
from funcnet.optimizers.lift import stateful, zero_step
from funcnet.optimizers.named import check_betas, check_named, named_chain
from funcnet.optimizers.transforms import (
    LearningRate,
    add_decayed_weights,
    negate,
    scale_by_learning_rate,
)


class AdamaxState(NamedTuple):
    """The number of updates so far; the running mean of g, and the maximum u, trees like params."""

    step: Tensor
    mu: Tree
    u: Tree


def scale_by_adamax(betas: tuple[Number, Number] = (0.9, 0.999), eps: Number = 1e-8) -> Optimizer:
    """``m' / u`` with ``m = b1 m + (1 - b1) g`` and ``u = max(b2 u, |g| + eps)``.

    ``m' = m / (1 - b1^t)`` at the update number t.

    Args:
        betas: b1 and b2, in [0, 1).
        eps: added to ``|g|``, a number >= 0.

    Source: Kingma and Ba 2014, section 7.1; ``torch.optim.Adamax``.

    >>> params = {"w": torch.tensor([2.0])}
    >>> scale_by_adamax().update(params, scale_by_adamax().init_state(params), params)[0]
    {'w': tensor([1.])}
    """
    check_betas("scale_by_adamax", betas)
    check_options("scale_by_adamax", eps=eps)
    b1, b2 = betas

    def init(p: Tensor) -> AdamaxState:
        return AdamaxState(zero_step(p), torch.zeros_like(p), torch.zeros_like(p))

    def update(g: Any, state: AdamaxState, p: Any) -> tuple[Any, AdamaxState]:
        step = state.step + 1
        m = torch.lerp(state.mu, g, 1.0 - b1)
        u = torch.maximum(b2 * state.u, g.abs() + eps)
        direction = m / (u * (1.0 - b1 ** step.double()))
        return direction, AdamaxState(step, m, u)

    return stateful(init, update, elementwise=True)


def adamax(
    lr: LearningRate = 2e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    """``p - lr m' / u`` with ``u = max(b2 u, |g| + eps)``.

    See `funcnet.optimizers.scale_by_adamax`.

    Args:
        lr: a number, a 0-d tensor, or a function of the number of updates so far.
        betas: the decays of the running mean m of g, and of u.
        eps: added to ``|g|``.
        weight_decay: L2 penalty: adds ``weight_decay * p`` to the gradient.
        maximize: ascends instead: negates the gradient before all else.

    Source: ``torch.optim.Adamax``; Kingma and Ba 2014.

    >>> optimizer = adamax(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.1000])}
    """
    check_named("adamax", lr, eps=eps, weight_decay=weight_decay)
    return named_chain(
        "adamax",
        maximize and negate(),
        is_on(weight_decay) and add_decayed_weights(weight_decay),
        scale_by_adamax(betas, eps),
        scale_by_learning_rate(lr),
    )
