"""Checks of the options of optimizers."""

from numbers import Real
from typing import Any, cast

from torch import Tensor

from funcnet import runtime


def check_at_least(name: str, option: str, value: float, least: float) -> None:
    """Raise ValueError for a number below ``least`` or NaN, TypeError for what is no number."""
    if not isinstance(value, Real):
        raise TypeError(f"{name}: {option} must be a number, got {type(value).__name__}")
    if not value >= least:
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
    check_at_least(name, "lr", cast(float, lr), 0.0)
