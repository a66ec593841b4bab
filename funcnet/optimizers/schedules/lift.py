"""From a formula of the step to a schedule, what the formulas share, and checks of options."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcnet.errors import check_count
from funcnet.optimizers.checks import Number, check_options, read_option

Schedule = Callable[[Any], Tensor]
"""A function of the number of steps so far, an int or a 0-d tensor, that gives a 0-d tensor."""

_ZERO = torch.zeros((), dtype=torch.float64, device="cpu")
_NO_STEP = torch.zeros((), dtype=torch.int64, device="cpu")


def schedule_of(formula: Callable[[Tensor], Tensor]) -> Schedule:
    """A schedule, from a formula of the step t, a float64 tensor.

    >>> schedule_of(lambda t: 0.5**t)(2)
    tensor(0.2500, dtype=torch.float64)
    """

    def schedule(step: Any) -> Tensor:
        return formula(steps_of(step).double())

    schedule.__qualname__ = formula.__qualname__
    return schedule


def steps_of(step: Any) -> Tensor:
    """The step as a tensor."""
    # A sum, as under jit an int is no int: it has no value to make a tensor of.
    return step if isinstance(step, Tensor) else _NO_STEP + step


def value_at(schedule: Callable[[Tensor], Any], t: Tensor) -> Tensor:
    """The value of any function of the step, in float64."""
    return _ZERO + schedule(t)


def progress(t: Tensor, begin: Number, length: Number) -> Tensor:
    """How much of a phase is over: from 0 at ``begin`` to 1 after ``length`` steps, and on.

    >>> progress(torch.tensor([1.0, 3.0, 9.0]), 2, 4)
    tensor([0.0000, 0.2500, 1.0000])
    """
    since = t if isinstance(begin, int) and begin == 0 else t - begin
    if isinstance(length, Tensor):
        part = since / torch.where(length > 0, length, 1.0)
        return torch.where(length > 0, part, (since >= 0).double()).clamp(0.0, 1.0)
    return (since / length).clamp(0.0, 1.0) if length > 0 else (since >= 0).double()


def between(start: Number, end: Number, part: Tensor) -> Tensor:
    """From ``start`` at 0 to ``end`` at 1 on a straight line."""
    return start + (end - start) * part


def cosine_between(start: Number, end: Number, part: Tensor) -> Tensor:
    """From ``start`` at 0 to ``end`` at 1, as half a period of a cosine."""
    return end + (start - end) * half_cosine(part)


def half_cosine(part: Tensor) -> Tensor:
    """From 1 at 0 to 0 at 1: ``(1 + cos(pi part)) / 2``."""
    return (1.0 + torch.cos(math.pi * part)) / 2.0


def raised(part: Tensor, exponent: Number) -> Tensor:
    """``part ** exponent``, and the part itself for the usual exponent of 1."""
    usual = not isinstance(exponent, Tensor) and exponent == 1
    return part if usual else part**exponent


def table(numbers: Sequence[float]) -> Tensor:
    """Numbers as a float64 tensor."""
    return torch.tensor([*numbers], dtype=torch.float64, device="cpu")


def passed(t: Tensor, boundaries: Tensor) -> Tensor:
    """How many of the boundaries are at or before t, int64.

    >>> passed(torch.tensor([0.0, 2.0, 5.0]), table([2, 4]))
    tensor([0, 1, 2])
    """
    return (t.unsqueeze(-1) >= on_device_of(t, boundaries)).sum(-1)


def look_up(values: Tensor, index: Tensor) -> Tensor:
    """The values at an index of any shape; indexing itself would read a 0-d one."""
    values = on_device_of(index, values)
    return values.index_select(0, index.reshape(-1)).reshape(index.shape)


def on_device_of(t: Tensor, values: Tensor) -> Tensor:
    """A table on the device of t; the copy does not wait for it."""
    return values.to(t.device, non_blocking=True)


def check_numbers(
    name: str, low: float = -math.inf, high: float = math.inf, **options: Any
) -> None:
    """`check_options`, and ValueError for an option above ``high``."""
    check_options(name, low, **options)
    for option, given in options.items():
        value = read_option(given)
        if value is not None and value > high:
            raise ValueError(f"{name}: {option} must be in [{low:g}, {high:g}], got {value}")


def check_boundaries(name: str, what: str, boundaries: Sequence[Any]) -> None:
    """Raise unless the boundaries are integers that do not fall, none below 0."""
    for boundary in boundaries:
        check_count(name, 0, **{what: boundary})
    if [*boundaries] != sorted(boundaries):
        raise ValueError(f"{name}: expects {what} in rising order, got {[*boundaries]}")


def check_choice(name: str, option: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ValueError unless a value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expects {option} to be one of {[*choices]}, got {value!r}")


def check_functions(name: str, functions: Sequence[Any]) -> None:
    """Raise unless there is a function at least, and all are functions."""
    if not functions:
        raise ValueError(f"{name}: expects at least one schedule, got none")
    for function in functions:
        if not callable(function):
            raise TypeError(f"{name}: expects functions of the step, got {function!r}")
