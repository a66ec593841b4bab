"""Adam: `adam`, `adamw`, and the transform that they are made of, `scale_by_adam`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet.core import Optimizer, Tree
from funcnet.optimizers.adam_kernel import adam_kernel, kernel_takes
from funcnet.optimizers.checks import Number, check_options, is_on
from funcnet.optimizers.leaves import as_number, at_least_float32, sum_into
from funcnet.optimizers.lift import stateful, zero_step
from funcnet.optimizers.moments import running_square, sqrt
from funcnet.optimizers.named import check_betas, check_named, named_chain, rate_at
from funcnet.optimizers.transforms import LearningRate, add_decayed_weights, negate

# A tensor: counted with a number, the update is fused by jit in a way that is 5 % slower.
_ONE = torch.ones((), dtype=torch.int64, device="cpu")


class AdamState(NamedTuple):
    """The number of updates so far, and running means like params; ``nu_max`` for amsgrad."""

    step: Tensor
    mu: Tree
    nu: Tree
    nu_max: Tree = ()


def scale_by_adam(
    betas: tuple[Number, Number] = (0.9, 0.999), eps: Number = 1e-8, amsgrad: bool = False
) -> Optimizer:
    """``m' / (sqrt(v') + eps)`` with running means of g and g^2.

    At the update number t, ``m = b1 m + (1 - b1) g`` and ``v = b2 v + (1 - b2) g^2``; without
    their bias towards 0 they are ``m' = m / (1 - b1^t)`` and ``v' = v / (1 - b2^t)``.

    Args:
        betas: b1 and b2, the decays of the running means, in [0, 1).
        eps: added to the root, a number >= 0.
        amsgrad: whether v' is of the greatest v so far.

    Half precision is computed in float32, and the state rounded.

    Source: Kingma and Ba 2014; Reddi et al. 2018; ``torch.optim.Adam``.

    >>> params = {"w": torch.tensor([2.0])}
    >>> scale_by_adam().update(params, scale_by_adam().init_state(params), params)[0]
    {'w': tensor([1.0000])}
    """
    return _adam(betas, eps, amsgrad)


def _adam(
    betas: tuple[Number, Number],
    eps: Number,
    amsgrad: bool,
    lr: LearningRate | None = None,
    decay: Number = 0.0,
) -> Optimizer:
    """`scale_by_adam`, or with a learning rate ``-lr`` times what it gives and ``decay p``.

    PyTorch's kernel takes these too. Without passes of their own over the leaves, an eager step
    of Adam on a small net takes a tenth less time (tests/benchmarks/step.py); where it writes to
    the params themselves, that of a small GPT 2 % less (compare.py).
    """
    check_betas("scale_by_adam", betas)
    check_options("scale_by_adam", eps=eps)
    b1, b2 = betas

    def init(p: Any) -> AdamState:
        zeros = torch.zeros_like
        return AdamState(zero_step(p), zeros(p), zeros(p), zeros(p) if amsgrad else ())

    def update(g: Any, state: AdamState, p: Any) -> tuple[Any, AdamState]:
        rate = -1.0 if lr is None else rate_at("scale_by_adam", lr, state.step)
        state = AdamState(state.step + _ONE, *state[1:])
        if kernel_takes(g, p, *state[1:]):
            options = [as_number(option) for option in (rate, b1, b2, eps, decay)]
            if Tensor not in map(type, options):
                return by_kernel(g, state, p, *options)
        direction, state = by_formula(g, state)
        if lr is None:
            return direction, state
        step = direction * -rate
        return sum_into(step, p, -rate * decay) if is_on(decay) else step, state

    def by_formula(g: Any, state: AdamState) -> tuple[Any, AdamState]:
        g, m, v, v_max = map(at_least_float32, (g, *state[1:]))
        m = torch.lerp(m, g, 1.0 - b1)  # b1 m + (1 - b1) g
        v = running_square(v, g, b2)
        v_max = torch.maximum(v_max, v) if amsgrad else v_max
        # m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps), with one division an element
        t = state.step.double()
        correction = 1.0 - b1**t
        spread = correction / (1.0 - b2**t).sqrt()
        direction = m / (sqrt(v_max if amsgrad else v) * spread + correction * eps)
        return direction, AdamState(state.step, m, v, v_max)

    def by_kernel(
        g: Any, state: AdamState, p: Any, rate: Any, b1: Any, b2: Any, eps: Any, decay: Any
    ) -> tuple[Any, AdamState]:
        means: Any = state[1 : 4 if amsgrad else 3]
        updates, means = adam_kernel(
            g, means, p, state.step.float(),
            lr=rate, beta1=b1, beta2=b2, eps=eps, weight_decay=decay, amsgrad=amsgrad,
        )  # fmt: skip
        return updates, AdamState(state.step, *means)

    return stateful(init, update, name="scale_by_adam", elementwise=True)


def adam(
    lr: LearningRate = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> Optimizer:
    """``p - lr m' / (sqrt(v') + eps)`` with running means of g and g^2.

    See `funcnet.optimizers.scale_by_adam`.

    Args:
        lr: a number, a 0-d tensor, or a function of the number of updates so far.
        betas: the decays of the running means of g and g^2.
        eps: added to the root.
        weight_decay: L2 penalty: adds ``weight_decay * p`` to the gradient.
        amsgrad: divides by the root of the greatest v so far instead of the present one.
        maximize: ascends instead: negates the gradient before all else.
        decoupled_weight_decay: whether weight_decay is that of `adamw` instead.

    Source: ``torch.optim.Adam``; Kingma and Ba 2014; Reddi et al. 2018.

    >>> optimizer = adam(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.1000])}
    """
    check_named("adam", lr, eps=eps, weight_decay=weight_decay)
    penalty, decay = (0.0, weight_decay) if decoupled_weight_decay else (weight_decay, 0.0)
    return named_chain(
        "adam",
        maximize and negate(),
        is_on(penalty) and add_decayed_weights(penalty),
        _adam(betas, eps, amsgrad, lr, decay),
    )


def adamw(
    lr: LearningRate = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 1e-2,
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
    check_named("adamw", lr, eps=eps, weight_decay=weight_decay)
    return named_chain("adamw", maximize and negate(), _adam(betas, eps, amsgrad, lr, weight_decay))
