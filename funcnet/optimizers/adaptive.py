"""Transforms that divide by the root of a running mean of g^2."""

from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet.core import Optimizer, Tree
from funcnet.optimizers.checks import check_options
from funcnet.optimizers.leaves import Applied, Leaves, sum_into
from funcnet.optimizers.lift import stateful, zero_step
from funcnet.runtime import FOREACH, fused_adamw_, is_differentiated, is_transformed


def _sqrt(v: Any) -> Any:
    """``sqrt(v)``, whose derivative at 0 is taken as 0."""
    if not is_differentiated(*v):
        return torch.sqrt(v)
    root = torch.where(v > 0, v, 1.0).sqrt()
    return torch.where(v > 0, root, v.detach())


class RmsState(NamedTuple):
    """The running means of g^2 and, if centered, of g; trees like params."""

    nu: Tree
    mu: Tree


def scale_by_rms(alpha: float = 0.99, eps: float = 1e-8, centered: bool = False) -> Optimizer:
    """``g / (sqrt(v) + eps)`` with ``v = alpha v + (1 - alpha) g^2``.

    With ``centered``, v is less the square of the running mean of g, ``m = alpha m +
    (1 - alpha) g``: the variance of g.

    Args:
        alpha: the decay of the running means, a number >= 0.
        eps: added to the root, a number >= 0.
        centered: whether to divide by the standard deviation.

    Source: Hinton's lecture 6e; Graves 2013; ``torch.optim.RMSprop``.

    >>> params = {"w": torch.tensor([2.0])}
    >>> scale_by_rms().update(params, scale_by_rms().init_state(params), params)[0]
    {'w': tensor([10.0000])}
    """
    check_options("scale_by_rms", alpha=alpha, eps=eps)

    def init(p: Tensor) -> RmsState:
        return RmsState(torch.zeros_like(p), torch.zeros_like(p) if centered else ())

    def update(g: Tensor, state: RmsState, p: Tensor) -> tuple[Tensor, RmsState]:
        v = torch.addcmul(alpha * state.nu, g, g, value=1.0 - alpha)
        if not centered:
            return g / (_sqrt(v) + eps), RmsState(v, ())
        m = torch.lerp(state.mu, g, 1.0 - alpha)  # alpha m + (1 - alpha) g
        return g / (_sqrt(v - m * m) + eps), RmsState(v, m)

    return stateful(init, update)


# A tensor: counted with a number, the update is fused by jit in a way that is 5 % slower.
_ONE = torch.ones((), dtype=torch.int64, device="cpu")


class AdamState(NamedTuple):
    """The number of updates so far, and running means like params; ``nu_max`` for amsgrad."""

    step: Tensor
    mu: Tree
    nu: Tree
    nu_max: Tree = ()


def scale_by_adam(
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, amsgrad: bool = False
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
    return scaled_adam(betas, eps, amsgrad, 1.0)


def scaled_adam(
    betas: tuple[float, float], eps: float, amsgrad: bool, factor: float, decay: float = 0.0
) -> Optimizer:
    """`scale_by_adam` plus ``decay p``, times a factor such as a learning rate.

    PyTorch's kernel takes these too. Without passes of their own over the leaves, an eager step
    of Adam on a small net takes a tenth less time (tests/benchmarks/step.py); where it writes to
    the params themselves, that of a small GPT 2 % less (compare.py).
    """
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"scale_by_adam: betas must be two numbers, got {betas!r}")
    b1, b2 = betas
    check_options("scale_by_adam", **{"betas[0]": b1, "betas[1]": b2, "eps": eps})
    for index, beta in enumerate(betas):
        if beta >= 1.0:
            raise ValueError(f"scale_by_adam: betas[{index}] must be below 1, got {beta}")

    options: Any = {"beta1": b1, "beta2": b2, "eps": eps, "amsgrad": amsgrad}

    def init(p: Any) -> AdamState:
        zeros = torch.zeros_like
        return AdamState(zero_step(p), zeros(p), zeros(p), zeros(p) if amsgrad else ())

    def update(g: Any, state: AdamState, p: Any) -> tuple[Any, AdamState]:
        state = AdamState(state.step + _ONE, *state[1:])
        if _kernel_takes(g, p, *state[1:]):
            return by_kernel(g, state, p)
        direction, state = by_formula(g, state)
        return sum_into(direction, p, factor * decay) if decay else direction, state

    def by_formula(g: Any, state: AdamState) -> tuple[Any, AdamState]:
        g, m, v, v_max = map(_at_least_float32, (g, *state[1:]))
        m = torch.lerp(m, g, 1.0 - b1)  # b1 m + (1 - b1) g
        v = torch.addcmul(b2 * v, g, g, value=1.0 - b2)
        v_max = torch.maximum(v_max, v) if amsgrad else v_max
        # m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps), with one division an element
        t = state.step.double()
        correction = 1.0 - b1**t
        spread = correction / (1.0 - b2**t).sqrt()
        direction = m / (_sqrt(v_max if amsgrad else v) * spread + correction * eps)
        # Times a 1 would be another operation on every leaf.
        scaled = direction if factor == 1.0 else factor * direction
        return scaled, AdamState(state.step, m, v, v_max)

    def by_kernel(g: Any, state: AdamState, p: Any) -> tuple[Any, AdamState]:
        before: Any = state[1 : 4 if amsgrad else 3]
        means: list[list[Tensor]] = [[] for _ in before]
        direction: list[Tensor] = []
        step = state.step.float()
        # The gradients are read here for the last time, and go part by part.
        left, g.tensors = [*g.tensors], []
        for part in _parts(left):
            grads = [left.pop(0) for _ in part]
            copies = [_writable(mean, slice(part.start, part.stop)) for mean in before]
            # From params of 0 and a learning rate of -factor the kernel steps to the direction.
            start = p.tensors[part.start : part.stop]
            start = start if p.fresh else [torch.zeros_like(leaf) for leaf in start]
            lists = [start, grads, *copies] + [[]] * (not amsgrad)
            fused_adamw_(*lists, [step] * len(part), lr=-factor, weight_decay=decay, **options)
            direction += start
            for mean, copy in zip(means, copies, strict=True):
                mean += copy
        state = AdamState(state.step, *map(Leaves, means))
        if p.fresh:
            return Applied(direction), state
        updates = Leaves(direction, fresh=True)
        return sum_into(updates, p, factor * decay) if decay else updates, state

    return stateful(init, update, name="scale_by_adam")


def _at_least_float32(leaves: Any) -> Any:
    half = (torch.float16, torch.bfloat16)
    if not isinstance(leaves, Leaves):
        return leaves
    return Leaves([leaf.float() if leaf.dtype in half else leaf for leaf in leaves])


def _writable(leaves: Leaves, part: slice) -> list[Tensor]:
    """Some of the leaves, or copies of them where others have their memory too."""
    chosen = leaves.tensors[part]
    return chosen if leaves.fresh else FOREACH["clone"](chosen)


def _parts(leaves: list[Tensor]) -> list[range]:
    """The leaves in runs of 8 MiB or more, so that not much beside them is there at a time."""
    parts, begin, size = [], 0, 0
    for index, leaf in enumerate(leaves):
        size += leaf.nbytes
        if size >= 2**23 or index == len(leaves) - 1:
            parts.append(range(begin, index + 1))
            begin, size = index + 1, 0
    return parts


def _kernel_takes(*trees: Any) -> bool:
    """Whether PyTorch's kernel may run: it checks no strides and has no derivative."""
    leaves = [*chain.from_iterable(trees)]
    # First, as a function that jit compiles must not ask for strides.
    if is_transformed(*leaves) or len({*map(attrgetter("dtype"), leaves)}) != 1:
        return False
    return all(map(attrgetter("is_cpu"), leaves)) and all(map(Tensor.is_contiguous, leaves))
