"""What the named optimizers share: chaining their transforms, checks, and the learning rate."""

import math
from typing import Any

import torch
from torch import Tensor

from funcnet.core import Optimizer
from funcnet.optimizers.chains import chained
from funcnet.optimizers.checks import Number, check_options, check_rate
from funcnet.optimizers.transforms import LearningRate


def named_chain(name: str, *transforms: Optimizer | bool) -> Optimizer:
    """The transforms that are on, as one optimizer; an option that is off gives False instead.

    >>> params = {"w": torch.ones(1)}
    >>> transforms = fn.optimizers
    >>> both = named_chain("both", transforms.scale(3.0), False, transforms.negate())
    >>> both.name, both.update(params, {}, params)[0]
    ('both', {'w': tensor([-3.])})
    """
    present = [transform for transform in transforms if isinstance(transform, Optimizer)]
    return chained(name, {transform.name: transform for transform in present})


def check_named(name: str, lr: LearningRate, **options: Any) -> None:
    """Raise for what is not a learning rate, and for an option that is not a number >= 0."""
    if not callable(lr):
        check_rate(name, lr)
    check_options(name, **options)


def check_pair(name: str, option: str, pair: Any, below: float = math.inf) -> None:
    """Raise ValueError for what is not two numbers >= 0, and below ``below``."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"{name}: {option} must be two numbers, got {pair!r}")
    entries: dict[str, Any] = {f"{option}[{i}]": entry for i, entry in enumerate(pair)}
    check_options(name, below=below, **entries)


def check_betas(name: str, betas: Any) -> None:
    """Raise ValueError for what is not two decays in [0, 1)."""
    check_pair(name, "betas", betas, below=1.0)


def rate_at(name: str, lr: LearningRate, step: Tensor) -> Number:
    """The learning rate of the update that comes after ``step`` others; a tensor in float64."""
    rate = lr(step) if callable(lr) else lr
    if callable(lr):
        check_rate(name, rate)
    return rate.double() if isinstance(rate, Tensor) else rate


def filled_like(p: Any, value: Number) -> Any:
    """Leaves like those of p, filled with a number, or with a tensor that is not read."""
    filled: Any = torch.zeros_like(p) + value
    return filled.to_dtypes(p)
