"""Checks of the options of optimizers, which are numbers or 0-d tensors."""

import math
from numbers import Real
from typing import Any

from torch import Tensor

from funcnet import runtime

Number = float | Tensor
"""A number, or a 0-d tensor, whose value may change without compiling again."""


def check_options(
    name: str, least: float = 0.0, below: float = math.inf, **options: Number
) -> None:
    """Raise ValueError for an option that is NaN, less than ``least``, or not below ``below``.

    TypeError for what is no number and no 0-d tensor. A tensor whose value cannot be read for
    free, as on a GPU or under jit, is not checked.

    >>> check_options("adam", below=1.0, beta=torch.tensor(2.0))
    Traceback (most recent call last):
    ...
    ValueError: adam: beta must be below 1, got 2.0
    """
    for option, given in options.items():
        _check_kind(name, option, given, "a number or a 0-d tensor")
        value = read_option(given)
        if value is None:
            continue
        if not value >= least:
            raise ValueError(f"{name}: {option} must be >= {least:g}, got {value}")
        if below != math.inf and value >= below:
            raise ValueError(f"{name}: {option} must be below {below:g}, got {value}")


def check_positive(name: str, **options: Number) -> None:
    """`check_options`, and ValueError for 0."""
    for option, given in options.items():
        check_options(name, 0.0, math.inf, **{option: given})
        if read_option(given) == 0:
            raise ValueError(f"{name}: {option} must be > 0, got {read_option(given)}")


def check_rate(name: str, lr: Any) -> None:
    """Raise ValueError for a rate that is negative or not 0-d, TypeError for what is no rate."""
    if isinstance(lr, Tensor) and not lr.dim() and (runtime.read(lr) or 0.0) >= 0.0:
        return  # at each update, where it is of a schedule
    _check_kind(name, "lr", lr, "a number, a 0-d tensor or a function of the step", bool)
    check_options(name, lr=lr)


def _check_kind(name: str, option: str, given: Any, expected: str, *no: type) -> None:
    if isinstance(given, Tensor):
        if given.dim() != 0:
            raise ValueError(f"{name}: {option} must be a 0-d tensor, got {tuple(given.shape)}")
    elif not isinstance(given, Real) or isinstance(given, no):
        raise TypeError(f"{name}: {option} must be {expected}, got {given!r}")


def read_option(value: Number) -> Any:
    """The value of a number or a 0-d tensor; None for a tensor that cannot be read for free."""
    return runtime.read(value) if isinstance(value, Tensor) else value


def is_on(value: Number) -> bool:
    """Whether an option that 0 switches off is on; a tensor is, as its value may change.

    >>> is_on(0.0), is_on(0.1), is_on(torch.tensor(0.0))
    (False, True, True)
    """
    return isinstance(value, Tensor) or bool(value)
