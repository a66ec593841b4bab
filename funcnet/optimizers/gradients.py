"""Transforms that centralize gradients, add noise to them, or replace NaN and all by 0."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet import random
from funcnet.core import Optimizer
from funcnet.optimizers.checks import Number, check_options
from funcnet.optimizers.leaves import Leaves, leafwise
from funcnet.optimizers.lift import paths, stateful, stateless, zero_step


def centralize() -> Optimizer:
    """``g - mean(g)``, the mean over all dimensions but the first, if there are others.

    Source: gradient centralization, Yong et al. 2020; ``optax.centralize``.

    >>> params = {"w": torch.tensor([[1.0, 3.0]]), "b": torch.tensor([5.0])}
    >>> centralize().update(params, {}, params)[0]
    {'w': tensor([[-1.,  1.]]), 'b': tensor([5.])}
    """

    def centered(g: Tensor) -> Tensor:
        others = tuple(range(1, g.dim()))
        return g - g.mean(others, keepdim=True) if others else g

    formula: Any = partial(leafwise, centered)
    return stateless(lambda g, p: formula(g), name="centralize")


def zero_nans() -> Optimizer:
    """g with 0 where it is NaN. Source: ``optax.zero_nans``.

    >>> params = {"w": torch.tensor([1.0, float("nan")])}
    >>> zero_nans().update(params, {}, params)[0]
    {'w': tensor([1., 0.])}
    """
    return stateless(lambda g, p: torch.where(g.isnan(), 0.0, g), elementwise=True)


def set_to_zero() -> Optimizer:
    """0: what it updates stays as it is, as a part of a `partition`. Source: ``optax.set_to_zero``.

    >>> params = {"w": torch.ones(1)}
    >>> set_to_zero().update(params, {}, params)[0]
    {'w': tensor([0.])}
    """
    return stateless(lambda g, p: torch.zeros_like(p), elementwise=True)


class NoiseState(NamedTuple):
    """The number of updates so far, and the key that all noise is drawn with."""

    step: Tensor
    key: Tensor


def add_noise(eta: Number, gamma: Number, key: Tensor) -> Optimizer:
    """``g + N(0, eta / t^gamma)`` at the update number t, from 1.

    Args:
        eta: the variance at the first update, a number >= 0.
        gamma: how fast it decreases, a number >= 0; the paper has 0.55.
        key: the noise of a leaf is drawn with ``fold_in(fold_in(key, t - 1), path)``.

    Source: Neelakantan et al. 2015; ``optax.add_noise``.

    >>> noisy = add_noise(0.01, 0.55, fn.key(0))
    >>> params = {"w": torch.zeros(2)}
    >>> noisy.update(params, noisy.init_state(params), params)
    ({'w': tensor([...])}, NoiseState(step=tensor(1), key=tensor([0, 0])))
    """
    check_options("add_noise", eta=eta, gamma=gamma)
    random.fold_in(key, 0)  # which refuses what is no key

    def init(p: Tensor) -> NoiseState:
        step = zero_step(p)
        return NoiseState(step, key.to(step.device, copy=True))

    def update(g: Tensor, state: NoiseState, p: Tensor) -> tuple[Tensor, NoiseState]:
        step, drawn_with = state.step + 1, random.fold_in(state.key, state.step)
        noise: Any = Leaves(
            [
                random.normal(
                    random.fold_in(drawn_with, path), leaf.shape, leaf.dtype, device=leaf.device
                )
                for path, leaf in zip(paths(p), p, strict=True)
            ]
        )
        deviation = (eta / step.double() ** gamma).sqrt()
        return g + deviation * noise, NoiseState(step, state.key)

    return stateful(init, update)
