"""Checks of the options of optimizers."""

from numbers import Real
from typing import Any, cast

from torch import Tensor

from funcnet import runtime


def check_options(name: str, least: float = 0.0, **options: Any) -> None:
    """Raise ValueError for an option below ``least`` or NaN, TypeError for what is no number."""
    for option, value in options.items():
        if not isinstance(value, Real):
            raise TypeError(f"{name}: {option} must be a number, got {type(value).__name__}")
        if not cast(float, value) >= least:
            raise ValueError(f"{name}: {option} must be >= {least:g}, got {value}")


def check_rate(name: str, lr: Any) -> None:
    """Raise ValueError for a rate that is negative or not 0-d, TypeError for what is no rate."""
    if isinstance(lr, Tensor):
        if lr.dim() != 0:
            raise ValueError(f"{name}: lr must be a 0-d tensor, got {tuple(lr.shape)}")
        lr = runtime.read(lr)
        if lr is None:
            return
    if isinstance(lr, bool) or not isinstance(lr, Real):
        raise TypeError(
            f"{name}: lr must be a number, a 0-d tensor or a function of the step, got {lr!r}"
        )
    check_options(name, lr=lr)
