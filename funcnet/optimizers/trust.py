"""Steps in proportion to the size of the params: `lars`, `lamb`, `scale_by_trust_ratio`."""

from typing import Any

import torch

from funcnet.core import Optimizer
from funcnet.optimizers.adam import scale_by_adam
from funcnet.optimizers.checks import Number, check_options, is_on
from funcnet.optimizers.lift import stateless
from funcnet.optimizers.named import check_named, named_chain
from funcnet.optimizers.transforms import (
    LearningRate,
    add_decayed_weights,
    negate,
    scale_by_learning_rate,
    trace,
)


def scale_by_trust_ratio(
    min_norm: Number = 0.0, trust_coefficient: Number = 1.0, eps: Number = 0.0
) -> Optimizer:
    """``trust_coefficient |p| / (|g| + eps) g`` with the norms of each leaf.

    A leaf of which a norm is 0 is left as it is.

    Args:
        min_norm: norms below it are taken for it, a number >= 0.
        trust_coefficient: a number >= 0.
        eps: added to ``|g|``, a number >= 0.

    Source: You et al. 2017; ``optax.scale_by_trust_ratio``.

    >>> params, grads = {"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([0.0, 0.1])}
    >>> scale_by_trust_ratio().update(grads, {}, params)[0]
    {'w': tensor([0., 5.])}
    """
    name = "scale_by_trust_ratio"
    check_options(name, min_norm=min_norm, trust_coefficient=trust_coefficient, eps=eps)

    def update(g: Any, p: Any) -> Any:
        size, length = (torch.linalg.vector_norm(leaves) for leaves in (p, g))
        if is_on(min_norm):
            size, length = size.clamp(min=min_norm), length.clamp(min=min_norm)
        known = (size > 0) & (length > 0)
        # Divided by no 0, so that derivatives of what is not chosen are numbers too.
        ratio = trust_coefficient * size / (torch.where(known, length, 1.0) + eps)
        return torch.where(known, ratio, 1.0) * g

    return stateless(update, name=name)


def lamb(
    lr: LearningRate = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-6,
    weight_decay: Number = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    """``p - lr |p| / |u| u`` with ``u = m' / (sqrt(v') + eps) + weight_decay p``, for each leaf.

    Adam's direction, with steps in proportion to the norm of each leaf: for large batches.

    Args:
        lr: a number, a 0-d tensor, or a function of the number of updates so far.
        betas: the decays of the running means of g and g^2; see `funcnet.optimizers.scale_by_adam`.
        eps: added to the root.
        weight_decay: as in the formula.
        maximize: ascends instead: negates the gradient before all else.

    Source: You et al. 2020, *Large batch optimization for deep learning*; ``optax.lamb``.

    >>> optimizer = lamb(0.1)
    >>> params = {"w": torch.tensor([3.0])}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.3000])}
    """
    check_named("lamb", lr, eps=eps, weight_decay=weight_decay)
    return named_chain(
        "lamb",
        maximize and negate(),
        scale_by_adam(betas, eps),
        is_on(weight_decay) and add_decayed_weights(weight_decay),
        scale_by_trust_ratio(),
        scale_by_learning_rate(lr),
    )


def lars(
    lr: LearningRate = 0.1,
    weight_decay: Number = 0.0,
    trust_coefficient: Number = 1e-3,
    eps: Number = 0.0,
    momentum: Number = 0.9,
    nesterov: bool = False,
    *,
    maximize: bool = False,
) -> Optimizer:
    """``p - b`` with ``b = momentum b + lr trust_coefficient |p| / |u| u``, for each leaf.

    ``u = g + weight_decay p``: gradient descent with steps in proportion to the norm of each
    leaf, for large batches.

    Args:
        lr: a number, a 0-d tensor, or a function of the number of updates so far.
        weight_decay: L2 penalty, as in the formula.
        trust_coefficient: as in the formula.
        eps: added to the norm of u.
        momentum: as in the formula; 0 for none.
        nesterov: takes ``momentum b`` beside the new step instead of b.
        maximize: ascends instead: negates the gradient before all else.

    Source: You et al. 2017, *Large batch training of convolutional networks*; ``optax.lars``.

    >>> optimizer = lars(1.0)
    >>> params = {"w": torch.tensor([3.0])}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.0030])}
    """
    check_named("lars", lr, weight_decay=weight_decay, momentum=momentum)
    return named_chain(
        "lars",
        maximize and negate(),
        is_on(weight_decay) and add_decayed_weights(weight_decay),
        scale_by_trust_ratio(trust_coefficient=trust_coefficient, eps=eps),
        scale_by_learning_rate(lr),
        (is_on(momentum) or nesterov) and trace(momentum, nesterov=nesterov),
    )
