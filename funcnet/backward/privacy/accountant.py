"""The accountant of private training: which epsilon a number of noisy steps has.

A step that adds noise to a sum of clipped gradients of a Poisson sample is a *subsampled Gaussian
mechanism*. Its Renyi divergence of order a is at most ``log A(a) / (a - 1)``, with

    A(a) = E_{z ~ N(0, s^2)} [(1 - q + q exp((2 z - 1) / (2 s^2)))^a]

for noise s and rate q. Divergences of steps add up; what they say of (epsilon, delta) is the best
of all orders.

Source: Mironov, Talwar and Zhang 2019, "Renyi differential privacy of the sampled Gaussian
mechanism"; Canonne, Kamath and Steinke 2020, "The discrete Gaussian for differential privacy",
proposition 12, for epsilon.
"""

import math
from collections.abc import Sequence

from funcnet.errors import check_count

ORDERS = (
    *[1 + tenth / 10 for tenth in range(1, 100)],
    *[float(order) for order in (*range(11, 64), 80, 96, 128, 192, 256, 384, 512, 768, 1024)],
)
"""The orders of which the best is taken."""


def private_epsilon(
    noise: float, rate: float, steps: int, delta: float, *, orders: Sequence[float] = ORDERS
) -> float:
    """The epsilon of private training: it is (epsilon, delta)-differentially private.

    Neighbours are data sets of which one has an example more. The batches must be Poisson samples,
    as of `poisson_batch`; of a shuffled epoch it does not hold.

    Args:
        noise: the noise multiplier, as of `private_value_and_grad`.
        rate: the probability with which an example is in a batch.
        steps: the number of steps.
        delta: the probability with which the guarantee may fail; less than 1 / examples.
        orders: of the divergences, all above 1.

    Raises: ValueError for numbers outside of their ranges.

    >>> round(private_epsilon(1.1, 256 / 60_000, 60 * 235, 1e-5), 2)
    2.6
    """
    _check("private_epsilon", noise, rate, delta)
    check_count("private_epsilon", steps=steps)
    if not orders or not min(orders) > 1:
        raise ValueError(f"private_epsilon: expects orders above 1, got {orders}")
    return min([_epsilon(renyi(noise, rate, each) * steps, each, delta) for each in orders])


def private_noise(
    epsilon: float, rate: float, steps: int, delta: float, *, tolerance: float = 1e-3
) -> float:
    """The least noise with which private training has an epsilon, or less.

    Args:
        epsilon: the most that it may be.
        rate, steps, delta: see `private_epsilon`.
        tolerance: by how much the noise may be more than the least one.

    Raises: ValueError for numbers outside of their ranges, and an epsilon that no noise below 10^6
    gives.

    >>> noise = private_noise(3.0, 256 / 60_000, 14_100, 1e-5)
    >>> round(noise, 2), private_epsilon(noise, 256 / 60_000, 14_100, 1e-5) <= 3.0
    (1.02, True)
    """
    _check("private_noise", 1.0, rate, delta)
    if not epsilon > 0 or not tolerance > 0:
        raise ValueError(
            f"private_noise: epsilon and tolerance must be > 0, got {epsilon}, {tolerance}"
        )
    low, high = 0.0, 1.0
    while private_epsilon(high, rate, steps, delta) > epsilon:
        low, high = high, 2 * high
        if high > 1e6:
            raise ValueError(f"private_noise: no noise gives epsilon {epsilon} with delta {delta}")
    while high - low > tolerance:
        middle = (low + high) / 2
        if private_epsilon(middle, rate, steps, delta) > epsilon:
            low = middle
        else:
            high = middle
    return high


def _check(name: str, noise: float, rate: float, delta: float) -> None:
    for what, right, found in (
        ("noise must be >= 0", noise >= 0, noise),
        ("rate must be from 0 to 1", 0 <= rate <= 1, rate),
        ("delta must be above 0 and below 1", 0 < delta < 1, delta),
    ):
        if not right:
            raise ValueError(f"{name}: {what}, got {found}")


def renyi(noise: float, rate: float, order: float) -> float:
    """The Renyi divergence of one step.

    >>> renyi(2.0, 1.0, 8.0) == 8.0 / (2 * 2.0**2)
    True
    """
    if rate == 0:
        return 0.0
    if noise == 0:
        return math.inf
    if rate == 1:
        return order / (2 * noise**2)
    moment = _whole_moment if order == int(order) else _fractional_moment
    return max(0.0, moment(noise, rate, order) / (order - 1))


def _epsilon(divergence: float, order: float, delta: float) -> float:
    """``epsilon = divergence + log((a - 1) / a) - (log delta + log a) / (a - 1)``."""
    constant = math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
    return max(0.0, divergence + constant)


def _whole_moment(noise: float, rate: float, order: float) -> float:
    """``log sum_k C(a, k) (1 - q)^(a - k) q^k exp((k^2 - k) / (2 s^2))``."""
    terms = [
        _log_choose(order, k)
        + (order - k) * math.log1p(-rate)
        + k * math.log(rate)
        + (k * k - k) / (2 * noise**2)
        for k in range(int(order) + 1)
    ]
    most = max(terms)
    return most + math.log(math.fsum([math.exp(each - most) for each in terms]))


def _fractional_moment(noise: float, rate: float, order: float) -> float:
    """The binomial series on both sides of the z where its terms are equal.

    With ``z0 = s^2 log(1 / q - 1) + 1/2``, below z0 it is a series in ``q / (1 - q)``, above in its
    inverse; each of its terms is a moment of a part of a normal distribution.
    """
    middle = noise**2 * math.log(1 / rate - 1) + 0.5
    log_rate, log_rest = math.log(rate), math.log1p(-rate)
    spread = math.sqrt(2) * noise
    plus: list[float] = []
    minus: list[float] = []
    most = -math.inf
    for k in range(10_000):
        sign, choose = _log_binomial(order, k)
        other = order - k
        below = choose + k * log_rate + other * log_rest + (k * k - k) / (2 * noise**2)
        below += math.log(0.5) + _log_erfc((k - middle) / spread)
        above = choose + other * log_rate + k * log_rest
        above += (other * other - other) / (2 * noise**2)
        above += math.log(0.5) + _log_erfc((middle - other) / spread)
        (plus if sign > 0 else minus).extend([below, above])
        most = max(most, below, above)
        if k > order and max(below, above) < most - 40:
            break
    total = math.fsum(
        [math.exp(each - most) for each in plus] + [-math.exp(each - most) for each in minus]
    )
    return most + math.log(total)


def _log_choose(n: float, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _log_binomial(order: float, k: int) -> tuple[int, float]:
    """The sign and the logarithm of ``order (order - 1) ... (order - k + 1) / k!``."""
    # The gamma function of what is below 0 has the sign of its interval.
    last = order - k + 1
    sign = 1 if last > 0 or math.floor(last) % 2 == 0 else -1
    return sign, math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(last)


def _log_erfc(x: float) -> float:
    """``log erfc x``; by its asymptotic series where erfc is less than the least number."""
    if x < 25:
        return math.log(math.erfc(x))
    inverse = 1 / (2 * x * x)
    series = 1 - inverse * (1 - 3 * inverse * (1 - 5 * inverse))
    return -x * x - math.log(x * math.sqrt(math.pi)) + math.log(series)
