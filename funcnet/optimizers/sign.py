"""Steps of one size for all elements, by the sign of a mean of gradients: `signsgd`, `lion`."""

from typing import NamedTuple

import torch
from torch import Tensor

from funcnet.core import Optimizer, Tree
from funcnet.optimizers.checks import Number, check_options, is_on
from funcnet.optimizers.lift import stateful
from funcnet.optimizers.named import check_betas, check_named, named_chain
from funcnet.optimizers.transforms import (
    LearningRate,
    add_decayed_weights,
    negate,
    scale_by_learning_rate,
    scale_by_sign,
    trace,
)


def signsgd(
    lr: LearningRate = 1e-3,
    momentum: Number = 0.0,
    weight_decay: Number = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    """``p - lr sign(b)``, where ``b = momentum b + (1 - momentum) g``.

    Args:
        lr: a number, a 0-d tensor, or a function of the number of updates so far.
        momentum: below 1; 0 for the sign of the gradient itself.
        weight_decay: decoupled: ``p - lr (sign(b) + weight_decay p)``.
        maximize: ascends instead: negates the gradient before all else.

    Source: signSGD and Signum, Bernstein et al. 2018.

    >>> optimizer = signsgd(0.1)
    >>> params = {"w": torch.tensor([3.0, -2.0])}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.1000,  0.1000])}
    """
    check_named("signsgd", lr, weight_decay=weight_decay)
    check_options("signsgd", below=1.0, momentum=momentum)
    return named_chain(
        "signsgd",
        maximize and negate(),
        # The factor 1 - momentum does not change the sign.
        is_on(momentum) and trace(momentum),
        scale_by_sign(),
        is_on(weight_decay) and add_decayed_weights(weight_decay),
        scale_by_learning_rate(lr),
    )


class LionState(NamedTuple):
    """The running mean of g, a tree like params."""

    mu: Tree


def scale_by_lion(betas: tuple[Number, Number] = (0.9, 0.99)) -> Optimizer:
    """``sign(b1 m + (1 - b1) g)``, and after that ``m = b2 m + (1 - b2) g``.

    Args:
        betas: b1, the weight of the mean against the gradient, and b2, the decay of the mean, in
            [0, 1).

    Source: Chen et al. 2023; ``optax.scale_by_lion``.

    >>> params = {"w": torch.tensor([2.0, -3.0])}
    >>> scale_by_lion().update(params, scale_by_lion().init_state(params), params)
    ({'w': tensor([ 1., -1.])}, LionState(mu={'w': tensor([ 0.0200, -0.0300])}))
    """
    check_betas("scale_by_lion", betas)
    b1, b2 = betas

    def update(g: Tensor, state: LionState, p: Tensor) -> tuple[Tensor, LionState]:
        direction = torch.sign(torch.lerp(state.mu, g, 1.0 - b1))
        return direction, LionState(torch.lerp(state.mu, g, 1.0 - b2))

    return stateful(lambda p: LionState(torch.zeros_like(p)), update, elementwise=True)


def lion(
    lr: LearningRate = 1e-4,
    betas: tuple[Number, Number] = (0.9, 0.99),
    weight_decay: Number = 1e-3,
    *,
    maximize: bool = False,
) -> Optimizer:
    """``p - lr (sign(b1 m + (1 - b1) g) + weight_decay p)``, then ``m = b2 m + (1 - b2) g``.

    A good rate is 3 to 10 times smaller than Adam's, and a good weight decay as much greater.

    Args:
        lr: a number, a 0-d tensor, or a function of the number of updates so far.
        betas: b1 and b2, in [0, 1); see `funcnet.optimizers.scale_by_lion`.
        weight_decay: decoupled, as in the formula.
        maximize: ascends instead: negates the gradient before all else.

    Source: Chen et al. 2023, *Symbolic discovery of optimization algorithms*; ``optax.lion``.

    >>> optimizer = lion(0.1, weight_decay=0.0)
    >>> params = {"w": torch.tensor([3.0, -2.0])}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.1000,  0.1000])}
    """
    check_named("lion", lr, weight_decay=weight_decay)
    return named_chain(
        "lion",
        maximize and negate(),
        scale_by_lion(betas),
        is_on(weight_decay) and add_decayed_weights(weight_decay),
        scale_by_learning_rate(lr),
    )
