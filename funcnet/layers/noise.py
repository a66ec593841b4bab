"""Noise that is added in training."""

import torch
from torch import Tensor

from funcnet import random
from funcnet.batch_axis import BatchAxis, first_index
from funcnet.core import Forward, Key, Layer, Params, Pullback
from funcnet.errors import require
from funcnet.lift import backward_rule, require_floating, stateful
from funcnet.params import declare


def gaussian_noise_backward(dy: Tensor, factor: Tensor | None = None) -> Tensor:
    """``dx = dy``, times the factor of x where there is one."""
    return dy if factor is None else dy * factor


def gaussian_noise(std: float = 0.1, relative: bool = False) -> Layer:
    """``y = x + std n`` with n drawn from N(0, 1) for each value.

    With ``train=False`` it is the identity.

    Args:
        std: the standard deviation of what is added.
        relative: whether std is relative to x: ``y = x (1 + std n)``, Gaussian dropout.

    Inputs:
        x of any shape, floating; a key when ``train=True``.
    VJP:
        ``dx = dy``; relative, ``dx = dy (1 + std n)``, and the residual is that factor.
    Raises:
        ValueError: without a key.

    Source: ``keras.layers.GaussianNoise``, ``keras.layers.GaussianDropout``; Srivastava et al.
    2014.

    >>> import funcnet as fn
    >>> fn.gaussian_noise(0.5).apply({}, torch.ones(3), key=fn.key(42), train=True)[0]
    tensor([0.9858, 1.2336, 1.1479])
    """
    require(0.0 <= std < torch.inf, f"gaussian_noise: std must be >= 0, got {std}")

    def forward(
        params: Params,
        x: Tensor,
        state: Params,
        key: Key,
        train: bool,
        axis: BatchAxis | None = None,
    ) -> Forward:
        residuals = {}
        if train and key is not None and std > 0.0:
            start = first_index(axis, "gaussian_noise", x.shape, x.device)
            noise = random.normal(key, x.shape, x.dtype, device=x.device, start=start) * std
            if relative:
                residuals["factor"] = noise + 1.0
                x = x * residuals["factor"]
            else:
                x = x + noise
        return x, Pullback(backward_rule, residuals, (gaussian_noise_backward,)), state

    return stateful(declare(require_floating), forward, keyed=std > 0.0, takes_axis=True)
