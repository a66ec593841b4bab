"""Optimizers: chains of transforms, with the arguments of torch.optim's of the same name."""

import math

from funcnet.core import Optimizer
from funcnet.optimizers.transforms import (
    LearningRate,
    add_decayed_weights,
    chain,
    check_at_least,
    check_rate,
    negate,
    optional,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_rms,
    scale_by_sign,
    trace,
)


def _check(name: str, lr: LearningRate, **options: float) -> None:
    if not callable(lr):
        check_rate(name, lr)
    for option, value in options.items():
        check_at_least(name, option, value, 0.0)


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
        momentum: m in ``b = m b + (1 - dampening) g``, which then stands for g.
        dampening: see momentum; not for the first update, where b is g.
        weight_decay: w in ``g + w p``, which stands for g before all else.
        nesterov: whether ``g + m b`` stands for g.
        maximize: whether to ascend.

    Source: ``torch.optim.SGD``; Sutskever et al. 2013.

    >>> optimizer = sgd(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.1000])}
    """
    _check("sgd", lr, momentum=momentum, weight_decay=weight_decay)
    if math.isnan(dampening):
        raise ValueError("sgd: dampening must be a number, got nan")
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError("sgd: nesterov needs momentum > 0 and dampening = 0")
    return chain(
        *optional(maximize, negate),
        *optional(weight_decay, lambda: add_decayed_weights(weight_decay)),
        *optional(momentum, lambda: trace(momentum, dampening, nesterov)),
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
    """``p - lr m' / (sqrt(v') + eps)``; see `scale_by_adam`.

    Args:
        lr: a number, a 0-d tensor, or a function of the number of updates so far.
        betas: the decays of the running means of g and g^2.
        eps: added to the root.
        weight_decay: w in ``g + w p``, which stands for g; see `adamw` for the decoupled one.
        amsgrad: whether the greatest v so far stands for v.
        maximize: whether to ascend.

    Source: ``torch.optim.Adam``; Kingma and Ba 2014; Reddi et al. 2018.

    >>> optimizer = adam(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.1000])}
    """
    _check("adam", lr, eps=eps, weight_decay=weight_decay)
    return chain(
        *optional(maximize, negate),
        *optional(weight_decay, lambda: add_decayed_weights(weight_decay)),
        scale_by_adam(betas, eps, amsgrad),
        scale_by_learning_rate(lr),
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

    Source: ``torch.optim.AdamW``; Loshchilov and Hutter 2019.

    >>> optimizer = adamw(0.1, weight_decay=0.5)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.1500])}
    """
    _check("adamw", lr, eps=eps, weight_decay=weight_decay)
    return chain(
        *optional(maximize, negate),
        scale_by_adam(betas, eps, amsgrad),
        *optional(weight_decay, lambda: add_decayed_weights(weight_decay)),
        scale_by_learning_rate(lr),
    )


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
    """``p - lr g / (sqrt(v) + eps)``; see `scale_by_rms`.

    Args:
        lr: a number, a 0-d tensor, or a function of the number of updates so far.
        alpha: the decay of the running mean of g^2.
        eps: added to the root.
        weight_decay: w in ``g + w p``, which stands for g.
        momentum: m in ``b = m b + g / (sqrt(v) + eps)``, which is then the direction.
        centered: whether v is the variance instead of the mean square.
        maximize: whether to ascend.

    Source: ``torch.optim.RMSprop``; Hinton's lecture 6e; Graves 2013.

    >>> optimizer = rmsprop(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-1.0000])}
    """
    _check("rmsprop", lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum)
    return chain(
        *optional(maximize, negate),
        *optional(weight_decay, lambda: add_decayed_weights(weight_decay)),
        scale_by_rms(alpha, eps, centered),
        *optional(momentum, lambda: trace(momentum)),
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
        momentum: 0 for the sign of the gradient itself.
        weight_decay: w in ``p - lr (sign(b) + w p)``.
        maximize: whether to ascend.

    Source: signSGD and Signum, Bernstein et al. 2018.

    >>> optimizer = signsgd(0.1)
    >>> params = {"w": torch.tensor([3.0, -2.0])}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.1000,  0.1000])}
    """
    _check("signsgd", lr, momentum=momentum, weight_decay=weight_decay)
    if momentum >= 1.0:
        raise ValueError(f"signsgd: momentum must be below 1, got {momentum}")
    return chain(
        *optional(maximize, negate),
        # The sign does not see the factor 1 - momentum.
        *optional(momentum, lambda: trace(momentum)),
        scale_by_sign(),
        *optional(weight_decay, lambda: add_decayed_weights(weight_decay)),
        scale_by_learning_rate(lr),
    )
