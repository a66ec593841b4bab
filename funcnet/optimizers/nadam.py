"""Adam with Nesterov's momentum: `nadam`, `scale_by_nadam`."""

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


class NadamState(NamedTuple):
    """The number of updates so far, the product of all mu(t), and running means like params."""

    step: Tensor
    mu_product: Tensor
    mu: Tree
    nu: Tree


def scale_by_nadam(
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    momentum_decay: Number = 4e-3,
) -> Optimizer:
    """``m' / (sqrt(v') + eps)``, Adam's, with Nesterov's momentum in m'.

    At the update number t, with ``mu(t) = b1 (1 - 0.96^(t momentum_decay) / 2)`` and the product
    ``c(t) = mu(1) ... mu(t)``:

        m = b1 m + (1 - b1) g        m' = mu(t+1) m / (1 - c(t+1)) + (1 - mu(t)) g / (1 - c(t))
        v = b2 v + (1 - b2) g^2      v' = v / (1 - b2^t)

    Args:
        betas: b1 and b2, the decays of the running means, in [0, 1).
        eps: added to the root, a number >= 0.
        momentum_decay: how fast mu goes from b1 / 2 to b1, a number >= 0.

    Source: Dozat 2016; ``torch.optim.NAdam``.

    >>> params = {"w": torch.tensor([2.0])}
    >>> scale_by_nadam().update(params, scale_by_nadam().init_state(params), params)[0]
    {'w': tensor([1.0565])}
    """
    check_betas("scale_by_nadam", betas)
    check_options("scale_by_nadam", eps=eps, momentum_decay=momentum_decay)
    b1, b2 = betas

    def mu_at(t: Tensor) -> Tensor:
        return b1 * (1.0 - 0.5 * 0.96 ** (t * momentum_decay))

    def init(p: Any) -> NadamState:
        step = zero_step(p)
        return NadamState(step, step.double() + 1.0, torch.zeros_like(p), torch.zeros_like(p))

    def update(g: Any, state: NadamState, p: Any) -> tuple[Any, NadamState]:
        step = state.step + 1
        t = step.double()
        mu, mu_next = mu_at(t), mu_at(t + 1.0)
        product = state.mu_product * mu
        m = torch.lerp(state.mu, g, 1.0 - b1)
        v = running_square(state.nu, g, b2)
        ahead = m * (mu_next / (1.0 - product * mu_next)) + g * ((1.0 - mu) / (1.0 - product))
        direction = ahead / (sqrt(v / (1.0 - b2**t)) + eps)
        return direction, NadamState(step, product, m, v)

    return stateful(init, update, elementwise=True)


def nadam(
    lr: LearningRate = 2e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    momentum_decay: Number = 4e-3,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """``p - lr m' / (sqrt(v') + eps)``, Adam with Nesterov's momentum.

    See `funcnet.optimizers.scale_by_nadam`.

    Args:
        lr: a number, a 0-d tensor, or a function of the number of updates so far.
        betas: the decays of the running means of g and g^2.
        eps: added to the root.
        weight_decay: L2 penalty: adds ``weight_decay * p`` to the gradient.
        momentum_decay: how fast the momentum goes from half of b1 to b1.
        decoupled_weight_decay: takes ``lr * weight_decay * p`` from the params themselves instead.
        maximize: ascends instead: negates the gradient before all else.

    Source: ``torch.optim.NAdam``; Dozat 2016.

    >>> optimizer = nadam(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.1056])}
    """
    check_named("nadam", lr, eps=eps, weight_decay=weight_decay)
    decay = is_on(weight_decay) and add_decayed_weights(weight_decay)
    return named_chain(
        "nadam",
        maximize and negate(),
        not decoupled_weight_decay and decay,
        scale_by_nadam(betas, eps, momentum_decay),
        decoupled_weight_decay and decay,
        scale_by_learning_rate(lr),
    )
