"""Epsilons of private training against published ones and those of two other accountants."""

import math

import pytest

import funcnet as fn
from funcnet.backward.privacy.accountant import ORDERS, renyi

DELTA = 1e-5

# github.com/tensorflow/privacy, tutorials/README.md, now (the first three) and at first, of MNIST
# with batches of 256 of 60 000: noise, epochs, epsilon. They are by the conversion of Mironov 2017,
# which gives more.
PUBLISHED = [(1.12, 60, 2.92), (0.6, 30, 9.74), (1.2, 10, 1.20), (1.3, 15, 1.19), (0.7, 45, 7.10)]


@pytest.mark.parametrize(("noise", "epochs", "epsilon"), PUBLISHED)
def test_epsilons_are_as_published(noise, epochs, epsilon):
    rate, steps = 256 / 60_000, epochs * 60_000 // 256
    bounds = [renyi(noise, rate, a) * steps - math.log(DELTA) / (a - 1) for a in ORDERS]
    assert min(bounds) == pytest.approx(epsilon, abs=0.013)
    assert fn.private_epsilon(noise, rate, steps, DELTA) < epsilon


# noise, rate, steps, delta; epsilon by opacus 1.6.0, opacus.accountants.analysis.rdp, of the same
# orders. By dp-accounting's rdp.RdpAccountant they are the same to 0.04 %.
BY_OPACUS = [
    (1.1, 256 / 60_000, 14_100, 1e-5, 2.6003429386103023),
    (1.3, 250 / 60_000, 3_600, 1e-5, 0.9422002181627518),
    (1.0, 0.01, 10_000, 1e-5, 6.712738297403128),
    (4.0, 0.01, 10_000, 1e-5, 1.0354900660362476),
    (0.5, 0.001, 1_000, 1e-6, 5.329067567391664),
    (2.0, 1.0, 10, 1e-5, 8.079406222420491),
    (0.7, 512 / 50_000, 2_000, 1e-5, 7.227788799458852),
]


@pytest.mark.parametrize(("noise", "rate", "steps", "delta", "epsilon"), BY_OPACUS)
def test_epsilons_are_those_of_opacus(noise, rate, steps, delta, epsilon):
    assert fn.private_epsilon(noise, rate, steps, delta) == pytest.approx(epsilon, rel=1e-9)


@pytest.mark.parametrize(
    ("noise", "rate", "order", "divergence"),
    [
        (1.1, 0.01, 1.5, 9.554528557684942e-05),
        (1.1, 0.01, 8.0, 0.0005840703355202467),
        (4.0, 0.2, 2.3, 0.0029721953826228726),
        (0.6, 0.004, 10.9, 9.059704646302583),
        (2.0, 0.5, 32.0, 3.2849386205373294),
    ],
)
def test_divergences_of_whole_and_fractional_orders_are_those_of_opacus(
    noise, rate, order, divergence
):
    assert renyi(noise, rate, order) == pytest.approx(divergence, rel=1e-8)


def test_a_fractional_order_lies_between_its_neighbours():
    found = [renyi(0.8, 0.02, order) for order in (2.0, 2.4, 2.999, 3.0, 3.5, 4.0)]
    assert found == sorted(found)
    assert found[2] == pytest.approx(found[3], rel=5e-3)


def test_no_noise_is_not_private_and_no_data_are():
    assert fn.private_epsilon(0.0, 0.1, 1, DELTA) == math.inf
    assert fn.private_epsilon(1.0, 0.0, 100, DELTA) < 0.05
    few, many = (fn.private_epsilon(1.0, 0.01, steps, DELTA) for steps in (10, 1000))
    assert few < many


def test_the_noise_for_an_epsilon_is_the_least():
    rate, steps = 0.01, 1000
    noise = fn.private_noise(2.0, rate, steps, DELTA)
    assert fn.private_epsilon(noise, rate, steps, DELTA) <= 2.0
    assert fn.private_epsilon(noise - 2e-3, rate, steps, DELTA) > 2.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fn.private_epsilon(-1.0, 0.1, 1, DELTA), "private_epsilon: noise must be >= 0"),
        (lambda: fn.private_epsilon(1.0, 1.5, 1, DELTA), "rate must be from 0 to 1, got 1.5"),
        (lambda: fn.private_epsilon(1.0, 0.1, 0, DELTA), "steps must be an integer >= 1"),
        (lambda: fn.private_epsilon(1.0, 0.1, 1, 0.0), "delta must be above 0 and below 1"),
        (lambda: fn.private_epsilon(1.0, 0.1, 1, DELTA, orders=[1.0]), "orders above 1"),
        (lambda: fn.private_noise(0.0, 0.1, 1, DELTA), "private_noise: epsilon and tolerance"),
        (lambda: fn.private_noise(1e-9, 0.1, 1, 1e-300), "no noise gives epsilon"),
    ],
)
def test_numbers_outside_of_their_ranges_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
