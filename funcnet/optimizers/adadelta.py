"""Steps as large as the running mean of the last steps: `adadelta`, `scale_by_adadelta`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet.core import Optimizer, Tree
from funcnet.optimizers.checks import Number, check_options, is_on, read_option
from funcnet.optimizers.lift import stateful
from funcnet.optimizers.moments import running_square, sqrt
from funcnet.optimizers.named import check_named, named_chain
from funcnet.optimizers.transforms import (
    LearningRate,
    add_decayed_weights,
    negate,
    scale_by_learning_rate,
)


class AdadeltaState(NamedTuple):
    """Running means of g^2 and of the squared updates u^2, trees like params."""

    nu: Tree
    delta: Tree


def scale_by_adadelta(rho: Number = 0.9, eps: Number = 1e-6) -> Optimizer:
    """``u = g sqrt(d + eps) / sqrt(v + eps)`` with running means v of g^2 and d of u^2.

    First ``v = rho v + (1 - rho) g^2``, and after u is known ``d = rho d + (1 - rho) u^2``.

    Args:
        rho: the decay of both means, in [0, 1].
        eps: added under both roots, a number >= 0.

    Source: Zeiler 2012; ``torch.optim.Adadelta``.

    >>> params = {"w": torch.tensor([2.0])}
    >>> scale_by_adadelta().update(params, scale_by_adadelta().init_state(params), params)[0]
    {'w': tensor([0.0032])}
    """
    check_options("scale_by_adadelta", rho=rho, eps=eps)
    if (read_option(rho) or 0.0) > 1.0:
        raise ValueError(f"scale_by_adadelta: rho must be <= 1, got {rho}")

    def init(p: Tensor) -> AdadeltaState:
        return AdadeltaState(torch.zeros_like(p), torch.zeros_like(p))

    def update(g: Any, state: AdadeltaState, p: Any) -> tuple[Any, AdadeltaState]:
        v = running_square(state.nu, g, rho)
        u = g * (sqrt(state.delta + eps) / sqrt(v + eps))
        return u, AdadeltaState(v, running_square(state.delta, u, rho))

    return stateful(init, update, elementwise=True)


def adadelta(
    lr: LearningRate = 1.0,
    rho: Number = 0.9,
    eps: Number = 1e-6,
    weight_decay: Number = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    """``p - lr u`` with ``u = g sqrt(d + eps) / sqrt(v + eps)``.

    See `funcnet.optimizers.scale_by_adadelta`.

    Args:
        lr: a number, a 0-d tensor, or a function of the number of updates so far.
        rho: the decay of the running means v of g^2 and d of u^2, in [0, 1].
        eps: added under both roots.
        weight_decay: L2 penalty: adds ``weight_decay * p`` to the gradient.
        maximize: ascends instead: negates the gradient before all else.

    Source: ``torch.optim.Adadelta``; Zeiler 2012.

    >>> optimizer = adadelta()
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.0032])}
    """
    check_named("adadelta", lr, rho=rho, eps=eps, weight_decay=weight_decay)
    return named_chain(
        "adadelta",
        maximize and negate(),
        is_on(weight_decay) and add_decayed_weights(weight_decay),
        scale_by_adadelta(rho, eps),
        scale_by_learning_rate(lr),
    )
