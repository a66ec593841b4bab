"""A row of the tables of optimizers, `CASES` in cases_*.py, that the laws run over."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import funcnet as fn


class Case(NamedTuple):
    """One optimizer or transform, with its options."""

    make: Callable[[float | Tensor], fn.Optimizer]
    """Of a learning rate, which a transform may ignore or take for its factor."""
    reference: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None
    """torch.optim's, at `rate`, if it has this one."""
    rate: float = 0.01
    converges: float | None = None
    """The rate at which it finds the minimum of a quadratic and of Rosenbrock's function, if it is
    a whole optimizer."""
