"""Optimizers: chains of transforms, with the arguments of torch.optim's of the same name."""

import math

from funcnet.core import Optimizer
from funcnet.optimizers.adaptive import scale_by_adam, scale_by_rms, scaled_adam
from funcnet.optimizers.chains import chained
from funcnet.optimizers.checks import check_options, check_rate
from funcnet.optimizers.transforms import (
    LearningRate,
    add_decayed_weights,
    negate,
    scale_by_learning_rate,
    scale_by_sign,
    trace,
)


def _check(name: str, lr: LearningRate, **options: float) -> None:
    if not callable(lr):
        check_rate(name, lr)
    check_options(name, **options)


def _chain(name: str, *transforms: Optimizer | float) -> Optimizer:
    """The transforms that are switched on; an option that is off gives False or 0 instead."""
    present = [transform for transform in transforms if isinstance(transform, Optimizer)]
    return chained(name, {transform.name: transform for transform in present})


def sgd(
    lr: LearningRate = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """Gradient descent, ``p - lr g``, with momentum.

    Args:
        lr: a number, a 0-d tensor, or a function of the number of updates so far.
        momentum: replaces the gradient by the momentum buffer
            ``b = momentum * b + (1 - dampening) * g``, which starts as ``b = g``.
        dampening: see momentum.
        weight_decay: L2 penalty: adds ``weight_decay * p`` to the gradient before momentum.
        nesterov: uses ``g + momentum * b`` instead of ``b``; needs momentum without dampening.
        maximize: ascends instead: negates the gradient before all else.

    Source: ``torch.optim.SGD``; Sutskever et al. 2013.

    >>> optimizer = sgd(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.1000])}
    """
    _check("sgd", lr, momentum=momentum, weight_decay=weight_decay)
    check_options("sgd", least=-math.inf, dampening=dampening)
    return _chain(
        "sgd",
        maximize and negate(),
        weight_decay and add_decayed_weights(weight_decay),
        (momentum or nesterov) and trace(momentum, dampening, nesterov),
        scale_by_learning_rate(lr),
    )


def adam(
    lr: LearningRate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """``p - lr m' / (sqrt(v') + eps)`` with running means of g and g^2; see `scale_by_adam`.

    Args:
        lr: a number, a 0-d tensor, or a function of the number of updates so far.
        betas: the decays of the running means of g and g^2.
        eps: added to the root.
        weight_decay: L2 penalty: adds ``weight_decay * p`` to the gradient; `adamw` has the
            decoupled one.
        amsgrad: divides by the root of the greatest v so far instead of the present one.
        maximize: ascends instead: negates the gradient before all else.

    Source: ``torch.optim.Adam``; Kingma and Ba 2014; Reddi et al. 2018.

    >>> optimizer = adam(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.1000])}
    """
    _check("adam", lr, eps=eps, weight_decay=weight_decay)
    return _chain(
        "adam",
        maximize and negate(),
        weight_decay and add_decayed_weights(weight_decay),
        *_adapted(lr, betas, eps, amsgrad),
    )


def adamw(
    lr: LearningRate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """`adam` with decoupled weight decay: ``p - lr (m' / (sqrt(v') + eps) + weight_decay p)``.

    Args:
        lr, betas, eps, amsgrad, maximize: as for `adam`.
        weight_decay: shrinks the params themselves by ``lr * weight_decay`` of their size.

    Source: ``torch.optim.AdamW``; Loshchilov and Hutter 2019.

    >>> optimizer = adamw(0.1, weight_decay=0.5)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.1500])}
    """
    _check("adamw", lr, eps=eps, weight_decay=weight_decay)
    steps = _adapted(lr, betas, eps, amsgrad, weight_decay)
    return _chain("adamw", maximize and negate(), *steps)


def _adapted(
    lr: LearningRate, betas: tuple[float, float], eps: float, amsgrad: bool, decay: float = 0.0
) -> list[Optimizer | float]:
    """Adam's transforms, with decoupled weight decay; its kernel takes a rate that is a number."""
    if isinstance(lr, (int, float)):
        return [scaled_adam(betas, eps, amsgrad, -lr, decay)]
    adam, decayed_too = scale_by_adam(betas, eps, amsgrad), decay and add_decayed_weights(decay)
    return [adam, decayed_too, scale_by_learning_rate(lr)]


def rmsprop(
    lr: LearningRate = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """``p - lr g / (sqrt(v) + eps)`` with the running mean v of g^2; see `scale_by_rms`.

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
    _check("rmsprop", lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum)
    return _chain(
        "rmsprop",
        maximize and negate(),
        weight_decay and add_decayed_weights(weight_decay),
        scale_by_rms(alpha, eps, centered),
        momentum and trace(momentum),
        scale_by_learning_rate(lr),
    )


def signsgd(
    lr: LearningRate = 1e-3,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
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
    _check("signsgd", lr, momentum=momentum, weight_decay=weight_decay)
    if momentum >= 1.0:
        raise ValueError(f"signsgd: momentum must be below 1, got {momentum}")
    return _chain(
        "signsgd",
        maximize and negate(),
        # The factor 1 - momentum does not change the sign.
        momentum and trace(momentum),
        scale_by_sign(),
        weight_decay and add_decayed_weights(weight_decay),
        scale_by_learning_rate(lr),
    )
