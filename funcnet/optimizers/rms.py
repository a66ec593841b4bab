"""Steps divided by the root mean square of the gradients: `rmsprop`, `scale_by_rms`."""

from typing import Any, NamedTuple

import torch

from funcnet.core import Optimizer, Tree
from funcnet.optimizers.checks import Number, check_options, is_on
from funcnet.optimizers.lift import stateful, zero_step
from funcnet.optimizers.moments import running_square, sqrt
from funcnet.optimizers.named import check_named, named_chain
from funcnet.optimizers.transforms import (
    LearningRate,
    add_decayed_weights,
    negate,
    scale_by_learning_rate,
    trace,
)


class RmsState(NamedTuple):
    """Running means of g^2 and, if centered, of g; with bias_correction the number of updates."""

    nu: Tree
    mu: Tree
    step: Any = ()


def scale_by_rms(
    alpha: Number = 0.99,
    eps: Number = 1e-8,
    centered: bool = False,
    *,
    bias_correction: bool = False,
) -> Optimizer:
    """``g / (sqrt(v) + eps)`` with ``v = alpha v + (1 - alpha) g^2``.

    With ``centered`` it divides by the root of the variance of g, ``v - m^2``, with the running
    mean ``m = alpha m + (1 - alpha) g``.

    Args:
        alpha: the decay of the running means, a number >= 0.
        eps: added to the root, a number >= 0.
        centered: whether to divide by the standard deviation.
        bias_correction: whether means are divided by ``1 - alpha^t`` at the update number t, as
            in Adam: with ``alpha`` for b2, this is Adam with b1 = 0.

    Source: Hinton's lecture 6e; Graves 2013; ``torch.optim.RMSprop``.

    >>> params = {"w": torch.tensor([2.0])}
    >>> scale_by_rms().update(params, scale_by_rms().init_state(params), params)[0]
    {'w': tensor([10.0000])}
    """
    check_options("scale_by_rms", alpha=alpha, eps=eps)

    def init(p: Any) -> RmsState:
        mean = torch.zeros_like(p) if centered else ()
        return RmsState(torch.zeros_like(p), mean, zero_step(p) if bias_correction else ())

    def update(g: Any, state: RmsState, p: Any) -> tuple[Any, RmsState]:
        v = running_square(state.nu, g, alpha)
        m = torch.lerp(state.mu, g, 1.0 - alpha) if centered else ()
        step: Any = state.step + 1 if bias_correction else ()
        known: Any = 1.0 - alpha ** step.double() if bias_correction else 1.0
        spread: Any = v / known if bias_correction else v
        if centered:
            mean: Any = m / known if bias_correction else m
            spread = spread - mean * mean
        return g / (sqrt(spread) + eps), RmsState(v, m, step)

    return stateful(init, update, elementwise=True)


def rmsprop(
    lr: LearningRate = 1e-2,
    alpha: Number = 0.99,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    momentum: Number = 0.0,
    centered: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """``p - lr g / (sqrt(v) + eps)`` with the running mean v of g^2.

    See `funcnet.optimizers.scale_by_rms`.

    Args:
        lr: a number, a 0-d tensor, or a function of the number of updates so far.
        alpha: the decay of the running mean of g^2.
        eps: added to the root.
        weight_decay: L2 penalty: adds ``weight_decay * p`` to the gradient.
        momentum: replaces the direction by ``b = momentum * b + g / (sqrt(v) + eps)``.
        centered: divides by the standard deviation of g instead of its root mean square.
        maximize: ascends instead: negates the gradient before all else.

    Source: ``torch.optim.RMSprop``; Hinton's lecture 6e; Graves 2013.

    >>> optimizer = rmsprop(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-1.0000])}
    """
    check_named("rmsprop", lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum)
    return named_chain(
        "rmsprop",
        maximize and negate(),
        is_on(weight_decay) and add_decayed_weights(weight_decay),
        scale_by_rms(alpha, eps, centered),
        is_on(momentum) and trace(momentum),
        scale_by_learning_rate(lr),
    )
