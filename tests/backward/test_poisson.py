"""Poisson batches: independent draws, padded to one shape."""

import pytest
import torch

import funcnet as fn

KEYS = fn.random.split(fn.key(3), 2000)


def test_each_example_is_drawn_with_the_same_probability():
    n, rate = 30, 0.2
    found = fn.vmap(lambda key: fn.poisson_batch(key, n, rate, capacity=n))(KEYS)
    drawn = torch.zeros(n).index_add(0, found.examples.flatten(), found.mask.flatten().float())
    deviation = (rate * (1 - rate) * len(KEYS)) ** 0.5
    assert (drawn - rate * len(KEYS)).abs().max() < 4.5 * deviation
    # The number that is drawn is binomial.
    assert found.drawn.float().var().item() == pytest.approx(n * rate * (1 - rate), rel=0.15)


def test_a_batch_has_each_example_once_and_then_padding():
    examples, mask, drawn = fn.poisson_batch(fn.key(1), 100, 0.1)
    chosen = examples[mask]
    assert len(chosen) == drawn
    assert not examples[~mask].any()
    assert torch.equal(chosen, chosen.unique())


def test_a_capacity_that_is_exceeded_is_told():
    examples, mask, drawn = fn.poisson_batch(fn.key(1), 100, 0.5, capacity=10)
    assert drawn > 10
    assert bool(mask.all())
    assert torch.equal(examples, examples.unique())
    drawn = fn.vmap(lambda key: fn.poisson_batch(key, 400, 0.05).drawn)(KEYS)
    assert drawn.max() <= fn.poisson_capacity(400, 0.05)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_nobody_or_everybody_is_drawn(rate):
    _, mask, drawn = fn.poisson_batch(fn.key(1), 7, rate)
    assert drawn == 7 * rate
    assert bool(mask.all() if rate else ~mask.any())


@pytest.mark.cpu_only
def test_it_is_the_same_under_jit():
    def draw(key):
        return fn.poisson_batch(key, 50, 0.3, capacity=12)

    for one, other in zip(draw(fn.key(8)), fn.jit(draw)(fn.key(8)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 1.1), "rate must be from 0 to 1, got 1.1"),
        ((10, 0.5, 5.0), "capacity must be an integer >= 1, got 5.0"),
        ((10, 0.5, 11), "capacity must be from 1 to n = 10, got 11"),
        ((0, 0.5), "n must be an integer >= 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"poisson_batch: {message}"):
        fn.poisson_batch(fn.key(0), *arguments)
