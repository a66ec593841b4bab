"""The deep ensemble: unsure where it has seen nothing, and better than one of its members."""

import deep_ensemble as example
import pytest
import torch

import funcnet as fn
from funcnet.testing import check_loss

pytestmark = pytest.mark.cpu_only


def test_the_loss_keeps_the_laws():
    prediction = fn.random.normal(fn.key(0), (6, 2), torch.float64)
    check_loss(example.gaussian_nll(), prediction, torch.zeros(6, dtype=torch.float64))


def test_the_band_is_wider_where_there_are_no_data():
    data = example.draw(fn.key(0), example.EXAMPLES)
    train = fn.jit(fn.vmap(example.train, in_axes=(0, None, None)), static=2)
    population = train(fn.random.split(fn.key(1), 8), data, 300)
    x = torch.linspace(-6, 6, 241)[:, None]
    members = example.predict(population, x)
    width = example.widths(x, example.mixture(members))
    assert width["in the gap"] > 1.5 * width["on the data"]
    assert width["outside"] > 2 * width["on the data"]

    test_x, target = example.draw(fn.key(2), 500)
    members = example.predict(population, test_x)
    ensemble = example.mixture(members)
    errors = (members.mean - target).square().mean(1)
    assert (ensemble.mean - target).square().mean() < errors.mean()
