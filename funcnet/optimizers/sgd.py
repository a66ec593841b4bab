"""Gradient descent with momentum: `sgd`."""

import math

from funcnet.core import Optimizer
from funcnet.optimizers.checks import Number, check_options, is_on
from funcnet.optimizers.named import check_named, named_chain
from funcnet.optimizers.transforms import (
    LearningRate,
    add_decayed_weights,
    negate,
    scale_by_learning_rate,
    trace,
)


def sgd(
    lr: LearningRate = 1e-3,
    momentum: Number = 0.0,
    dampening: Number = 0.0,
    weight_decay: Number = 0.0,
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
    check_named("sgd", lr, momentum=momentum, weight_decay=weight_decay)
    check_options("sgd", least=-math.inf, dampening=dampening)
    return named_chain(
        "sgd",
        maximize and negate(),
        is_on(weight_decay) and add_decayed_weights(weight_decay),
        (is_on(momentum) or nesterov) and trace(momentum, dampening, nesterov),
        scale_by_learning_rate(lr),
    )
