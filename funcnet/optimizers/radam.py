"""Rectified Adam, momentum alone for the first updates: `radam`, `scale_by_radam`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet.core import Optimizer, Tree
from funcnet.optimizers.checks import Number, check_options, is_on
from funcnet.optimizers.lift import stateful, zero_step
from funcnet.optimizers.moments import running_square, sqrt
from funcnet.optimizers.named import check_betas, check_named, named_chain
from funcnet.optimizers.transforms import (
    LearningRate,
    add_decayed_weights,
    negate,
    scale_by_learning_rate,
)


class RadamState(NamedTuple):
    """The number of updates so far, and running means like params."""

    step: Tensor
    mu: Tree
    nu: Tree


def scale_by_radam(betas: tuple[Number, Number] = (0.9, 0.999), eps: Number = 1e-8) -> Optimizer:
    """``m' r sqrt(1 - b2^t) / (sqrt(v) + eps)`` where ``rho > 5``, and before ``m'`` itself.

    The running means are Adam's, ``m' = m / (1 - b1^t)`` at the update number t. rho is about how
    many gradients v is a mean of, and r corrects the variance of the step:

        rho = rho_inf - 2 t b2^t / (1 - b2^t)                  rho_inf = 2 / (1 - b2) - 1
        r^2 = (rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho)

    Args:
        betas: b1 and b2, the decays of the running means, in [0, 1).
        eps: added to the root, a number >= 0.

    Source: Liu et al. 2020; ``torch.optim.RAdam``.

    >>> params = {"w": torch.tensor([2.0])}
    >>> scale_by_radam().update(params, scale_by_radam().init_state(params), params)[0]
    {'w': tensor([2.])}
    """
    check_betas("scale_by_radam", betas)
    check_options("scale_by_radam", eps=eps)
    b1, b2 = betas

    def init(p: Tensor) -> RadamState:
        return RadamState(zero_step(p), torch.zeros_like(p), torch.zeros_like(p))

    def update(g: Any, state: RadamState, p: Any) -> tuple[Any, RadamState]:
        step = state.step + 1
        m = torch.lerp(state.mu, g, 1.0 - b1)
        v = running_square(state.nu, g, b2)
        t = step.double()
        unbiased = 1.0 - b2**t
        longest = 2.0 / (1.0 - b2) - 1.0
        length = longest - 2.0 * t * b2**t / unbiased
        is_long = length > 5.0
        r2 = (length - 4.0) * (length - 2.0) * longest
        r2 = r2 / ((longest - 4.0) * (longest - 2.0) * length)
        r = torch.where(is_long, r2, 1.0).sqrt()  # before that r2 may be negative
        mean = m / (1.0 - b1**t)
        adapted = mean * (r * unbiased.sqrt()) / (sqrt(v) + eps)
        return torch.where(is_long, adapted, mean), RadamState(step, m, v)

    return stateful(init, update, elementwise=True)


def radam(
    lr: LearningRate = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Rectified Adam: momentum alone until v has seen enough gradients, then Adam.

    ``p - lr m' r sqrt(1 - b2^t) / (sqrt(v) + eps)``, or ``p - lr m'``; see
    `funcnet.optimizers.scale_by_radam`.

    Args:
        lr: a number, a 0-d tensor, or a function of the number of updates so far.
        betas: the decays of the running means of g and g^2.
        eps: added to the root.
        weight_decay: L2 penalty: adds ``weight_decay * p`` to the gradient.
        decoupled_weight_decay: takes ``lr * weight_decay * p`` from the params themselves instead.
        maximize: ascends instead: negates the gradient before all else.

    Source: ``torch.optim.RAdam``; Liu et al. 2020.

    >>> optimizer = radam(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.1000])}
    """
    check_named("radam", lr, eps=eps, weight_decay=weight_decay)
    decay = is_on(weight_decay) and add_decayed_weights(weight_decay)
    return named_chain(
        "radam",
        maximize and negate(),
        not decoupled_weight_decay and decay,
        scale_by_radam(betas, eps),
        decoupled_weight_decay and decay,
        scale_by_learning_rate(lr),
    )
