"""Poisson sampling: a batch in which each example is with the same probability."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from funcnet.checks import check_key
from funcnet.errors import check_count
from funcnet.random import bernoulli


class PoissonBatch(NamedTuple):
    """The examples of a batch, padded to a capacity.

    >>> import funcnet as fn
    >>> fn.poisson_batch(fn.key(1), 100, 0.05, capacity=8).examples
    tensor([17, 24, 55, 60, 79, 82,  0,  0])
    """

    examples: Tensor
    """(capacity,), int64: the numbers of the examples, in order; 0 in what pads the batch."""

    mask: Tensor
    """(capacity,), bool: False in what pads the batch."""

    drawn: Tensor
    """0-d, int64: how many there are. More than the capacity: the last ones are left out,
    so that the batch is no Poisson sample, and the accountant's epsilon does not hold for it."""


def poisson_batch(key: Tensor, n: int, rate: float, capacity: int | None = None) -> PoissonBatch:
    """Draw each of n examples with probability ``rate``, independently of the others.

    It is what the accountants of private training assume: not a shuffled epoch. Such batches have
    different sizes; a compiled step takes one shape, so they are padded.

    Args:
        key: of the draw; another one for each step.
        n: the number of examples that there are.
        rate: the probability of each, in [0, 1].
        capacity: the size of the padded batch; default `poisson_capacity`, which the draw exceeds
            less than once in 10^9 steps.

    Raises: ValueError for a rate outside of [0, 1], or a capacity that is not from 1 to n.

    >>> import funcnet as fn
    >>> examples, mask, drawn = poisson_batch(fn.key(1), 1000, 0.01)
    >>> examples.shape, torch.equal(mask.sum(), drawn)
    (torch.Size([39]), True)
    """
    check_key("poisson_batch", key)
    check_count("poisson_batch", n=n)
    _check_rate("poisson_batch", rate)
    capacity = poisson_capacity(n, rate) if capacity is None else capacity
    check_count("poisson_batch", capacity=capacity)
    if capacity > n:
        raise ValueError(f"poisson_batch: capacity must be from 1 to n = {n}, got {capacity}")
    chosen = bernoulli(key, rate, (n,), device=key.device)
    drawn = chosen.sum()
    # Each chosen example goes to its place; all others to one more place, which is cut off.
    place = torch.where(chosen, chosen.cumsum(0) - 1, capacity).clamp(max=capacity)
    places = torch.arange(n, device=key.device)
    examples = places.new_zeros(capacity + 1).scatter(0, place, places)[:capacity]
    mask = torch.arange(capacity, device=key.device) < drawn
    return PoissonBatch(torch.where(mask, examples, 0), mask, drawn)


def poisson_capacity(n: int, rate: float) -> int:
    """A size that Poisson batches exceed less than once in 10^9 draws, by Bernstein's inequality.

    Args:
        n: the number of examples that there are.
        rate: the probability of each.

    >>> poisson_capacity(60_000, 256 / 60_000)
    366
    """
    check_count("poisson_capacity", n=n)
    _check_rate("poisson_capacity", rate)
    # P(count - mean >= t) <= exp(-t^2 / (2 variance + 2 t / 3)).
    log, variance = math.log(1e9), n * rate * (1.0 - rate)
    above = log / 3 + math.sqrt((log / 3) ** 2 + 2 * log * variance)
    return max(1, min(n, math.ceil(n * rate + above)))


def _check_rate(name: str, rate: float) -> None:
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"{name}: rate must be from 0 to 1, got {rate}")
