"""Initializers: constructors of functions ``(key, shape, dtype, device) -> tensor``.

Shapes have PyTorch's layout, ``(out, in, *kernel)``, so ``fan_in`` is ``in * prod(kernel)`` and
``fan_out`` is ``out * prod(kernel)``.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from funcnet import random, reference

__docformat__ = "google"
__doc__ = reference.described(__name__, __doc__)
__all__ = reference.names(__name__)


class Initializer(Protocol):
    """A function ``(key, shape, dtype, device) -> tensor``: what a parameter starts with."""

    def __call__(
        self, key: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, /
    ) -> Tensor:
        """The tensor."""


def zeros() -> Initializer:
    """All zeros.

    >>> zeros()(random.key(0), (2,), torch.float32, torch.device("cpu"))
    tensor([0., 0.])
    """
    return constant(0.0)


def ones() -> Initializer:
    """All ones.

    >>> ones()(random.key(0), (2,), torch.float32, torch.device("cpu"))
    tensor([1., 1.])
    """
    return constant(1.0)


def constant(value: float) -> Initializer:
    """All ``value``.

    Args:
        value: a number.

    >>> constant(0.5)(random.key(0), (2,), torch.float32, torch.device("cpu"))
    tensor([0.5000, 0.5000])
    """
    return lambda key, shape, dtype, device: torch.full(shape, value, dtype=dtype, device=device)


def uniform(low: float = 0.0, high: float = 1.0) -> Initializer:
    """U(low, high), as ``torch.nn.init.uniform_``.

    Args:
        low, high: the ends of the interval.

    >>> uniform(-1, 1)(random.key(42), (2,), torch.float32, torch.device("cpu"))
    tensor([-0.0226,  0.3596])
    """
    return _rounded(
        lambda key, shape, **kind: random.uniform(key, shape, minval=low, maxval=high, **kind)
    )


def normal(mean: float = 0.0, std: float = 1.0) -> Initializer:
    """N(mean, std^2), as ``torch.nn.init.normal_``.

    Args:
        mean, std: the mean and the standard deviation.

    >>> normal(std=0.1)(random.key(42), (2,), torch.float32, torch.device("cpu"))
    tensor([-0.0028,  0.0467])
    """
    _check_std("normal", std)
    return _rounded(
        lambda key, shape, **kind: random.normal(key, shape, **kind).mul_(std).add_(mean)
    )


def truncated_normal(
    mean: float = 0.0, std: float = 1.0, low: float = -2.0, high: float = 2.0
) -> Initializer:
    """N(mean, std^2) cut to [low, high], as ``torch.nn.init.trunc_normal_``.

    ``low`` and ``high`` are values, not numbers of standard deviations.

    Args:
        mean, std: of the normal distribution that is cut.
        low, high: the least and the greatest value, not numbers of standard deviations.

    >>> truncated_normal()(random.key(42), (2,), torch.float32, torch.device("cpu"))
    tensor([-0.0270,  0.4444])
    """
    _check_std("truncated_normal", std)
    if std == 0.0:
        return constant(min(max(mean, low), high))
    lower, upper = (low - mean) / std, (high - mean) / std

    def draw(key: Tensor, shape: tuple[int, ...], **kind: Any) -> Tensor:
        unit = random.truncated_normal(key, lower, upper, shape, **kind)
        return unit.mul_(std).add_(mean).clamp_(low, high)

    return _rounded(draw)


def variance_scaling(scale: float, mode: str, distribution: str) -> Initializer:
    """Variance ``scale / n``, where n is fan_in, fan_out or their mean.

    Args:
        scale: a positive number.
        mode: "fan_in", "fan_out" or "fan_avg".
        distribution: "uniform", "normal", or "truncated_normal" at two standard deviations.

    Source: He et al. 2015; ``jax.nn.initializers.variance_scaling``.

    >>> variance_scaling(1.0, "fan_in", "uniform")(
    ...     random.key(42), (1, 3), torch.float32, torch.device("cpu"))
    tensor([[-0.0226,  0.3596,  0.2325]])
    """
    if not scale > 0:
        raise ValueError(f"variance_scaling: scale must be positive, got {scale}")
    if mode not in ("fan_in", "fan_out", "fan_avg"):
        raise ValueError(f"variance_scaling: mode must be fan_in, fan_out or fan_avg, got {mode!r}")
    if distribution not in ("uniform", "normal", "truncated_normal"):
        raise ValueError(
            "variance_scaling: distribution must be uniform, normal or truncated_normal, "
            f"got {distribution!r}"
        )

    def initialize(
        key: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        fan_in, fan_out = fans(shape)
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]
        std = math.sqrt(scale / max(fan, 1))
        if distribution == "uniform":
            bound = math.sqrt(3.0) * std
            draw = uniform(-bound, bound)
        elif distribution == "normal":
            draw = normal(0.0, std)
        else:
            # The standard deviation of N(0, 1) cut to (-2, 2).
            std /= 0.87962566103423978
            draw = truncated_normal(0.0, std, -2 * std, 2 * std)
        return draw(key, shape, dtype, device)

    return initialize


def lecun_uniform() -> Initializer:
    """U(-b, b) with ``b = sqrt(3 / fan_in)``. Source: LeCun et al. 1998.

    >>> lecun_uniform()(random.key(42), (1, 3), torch.float32, torch.device("cpu"))
    tensor([[-0.0226,  0.3596,  0.2325]])
    """
    return variance_scaling(1.0, "fan_in", "uniform")


def lecun_normal() -> Initializer:
    """N(0, 1 / fan_in). Source: LeCun et al. 1998.

    >>> lecun_normal()(random.key(42), (1, 4), torch.float32, torch.device("cpu"))
    tensor([[-0.0142,  0.2336,  0.1479,  0.0768]])
    """
    return variance_scaling(1.0, "fan_in", "normal")


def glorot_uniform(gain: float = 1.0) -> Initializer:
    """U(-b, b) with ``b = gain sqrt(6 / (fan_in + fan_out))``; alias `xavier_uniform`.

    Args:
        gain: a factor, such as that of `gain`.

    Source: Glorot and Bengio 2010; ``torch.nn.init.xavier_uniform_``.

    >>> glorot_uniform()(random.key(42), (1, 2), torch.float32, torch.device("cpu"))
    tensor([[-0.0319,  0.5085]])
    """
    return variance_scaling(gain**2, "fan_avg", "uniform")


def glorot_normal(gain: float = 1.0) -> Initializer:
    """N(0, gain^2 2 / (fan_in + fan_out)); alias `xavier_normal`.

    Args:
        gain: a factor, such as that of `gain`.

    Source: Glorot and Bengio 2010; ``torch.nn.init.xavier_normal_``.

    >>> glorot_normal()(random.key(42), (1, 3), torch.float32, torch.device("cpu"))
    tensor([[-0.0200,  0.3303,  0.2091]])
    """
    return variance_scaling(gain**2, "fan_avg", "normal")


def he_uniform(
    negative_slope: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu"
) -> Initializer:
    """U(-b, b) with ``b = gain sqrt(3 / fan)``; alias `kaiming_uniform`.

    ``gain = sqrt(2 / (1 + negative_slope^2))``, or that of ``nonlinearity``; see `gain`.

    Args:
        negative_slope: that of the leaky_relu that follows; 0 for relu.
        mode: "fan_in" or "fan_out", which fan is.
        nonlinearity: what follows the layer, by torch's name.

    Source: He et al. 2015; ``torch.nn.init.kaiming_uniform_``.

    >>> he_uniform()(random.key(42), (1, 6), torch.float32, torch.device("cpu"))[0, :2]
    tensor([-0.0226,  0.3596])
    """
    return variance_scaling(gain(nonlinearity, negative_slope) ** 2, mode, "uniform")


def he_normal(
    negative_slope: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu"
) -> Initializer:
    """N(0, gain^2 / fan); alias `kaiming_normal`; the gain is that of `he_uniform`.

    Args:
        negative_slope: that of the leaky_relu that follows; 0 for relu.
        mode: "fan_in" or "fan_out", which fan is.
        nonlinearity: what follows the layer, by torch's name.

    Source: He et al. 2015; ``torch.nn.init.kaiming_normal_``.

    >>> he_normal()(random.key(42), (1, 8), torch.float32, torch.device("cpu"))[0, :2]
    tensor([-0.0142,  0.2336])
    """
    return variance_scaling(gain(nonlinearity, negative_slope) ** 2, mode, "normal")


xavier_uniform, xavier_normal = glorot_uniform, glorot_normal
kaiming_uniform, kaiming_normal = he_uniform, he_normal


def orthogonal(gain: float = 1.0) -> Initializer:
    """A matrix with orthonormal rows or columns, whichever are fewer, times ``gain``.

    A shape of more than two dimensions is flattened to (shape[0], prod(shape[1:])).

    Args:
        gain: the factor.

    Source: Saxe, McClelland and Ganguli 2014; ``torch.nn.init.orthogonal_``.

    >>> weight = orthogonal()(random.key(0), (2, 5), torch.float64, torch.device("cpu"))
    >>> torch.allclose(weight @ weight.T, torch.eye(2, dtype=torch.float64))
    True
    """

    def draw(key: Tensor, shape: tuple[int, ...], **kind: Any) -> Tensor:
        if len(shape) < 2:
            raise ValueError(f"orthogonal: expects at least two dimensions, got shape {shape}")
        rows, columns = shape[0], math.prod(shape[1:])
        tall = (max(rows, columns), min(rows, columns))
        q, r = torch.linalg.qr(random.normal(key, tall, **kind))
        # With the signs of r's diagonal, q is uniform over the orthogonal matrices.
        q = q * torch.sign(torch.diagonal(r))
        matrix = q if rows >= columns else q.mT
        # In rows, not in LAPACK's columns, as weights are when they come back from a file.
        rowwise = (gain * matrix).clone(memory_format=torch.contiguous_format)
        return rowwise.reshape(shape)

    return _rounded(draw)


def torch_linear() -> Initializer:
    """U(-b, b) with ``b = 1 / sqrt(fan_in)``: the weights of torch's linear and conv layers.

    Source: ``kaiming_uniform_(a=sqrt(5))`` in ``torch.nn.Linear.reset_parameters``.

    >>> torch_linear()(random.key(42), (1, 4), torch.float32, torch.device("cpu"))
    tensor([[-0.0113,  0.1798,  0.1163,  0.0610]])
    """
    return he_uniform(negative_slope=math.sqrt(5.0))


def torch_default(fan_in: int) -> Initializer:
    """U(-b, b) with ``b = 1 / sqrt(fan_in)``, for a weight and for the bias beside it.

    Args:
        fan_in: of the weight, also for the bias.

    Source: ``reset_parameters`` of ``torch.nn.Linear`` and of torch's convolutions.

    >>> torch_default(4)(random.key(42), (2,), torch.float32, torch.device("cpu"))
    tensor([-0.0113,  0.1798])
    """
    bound = fan_in**-0.5 if fan_in else 0.0
    return uniform(-bound, bound)


def gain(nonlinearity: str, param: float | None = None) -> float:
    """The factor that keeps the variance of values that pass a nonlinearity.

    It is that of ``torch.nn.init.calculate_gain``. ``param`` is leaky_relu's negative slope,
    0.01 by default.

    Args:
        nonlinearity: its name in torch.
        param: leaky_relu's negative slope; default 0.01.

    >>> gain("tanh")
    1.6666666666666667
    """
    if nonlinearity == "leaky_relu":
        return math.sqrt(2.0 / (1.0 + (0.01 if param is None else param) ** 2))
    gains = {"tanh": 5.0 / 3.0, "relu": math.sqrt(2.0), "selu": 0.75}
    linear = ("linear", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)))
    gains |= dict.fromkeys((*linear, "sigmoid"), 1.0)
    if nonlinearity not in gains:
        raise ValueError(
            f"gain: expects one of {sorted([*gains, 'leaky_relu'])}, got {nonlinearity!r}"
        )
    return gains[nonlinearity]


def fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """``(fan_in, fan_out)`` of a weight of shape ``(out, in, *kernel)``.

    Args:
        shape: of the weight.

    >>> fans((8, 3, 5, 5))
    (75, 200)
    """
    if len(shape) < 2:
        raise ValueError(f"fan_in and fan_out need at least two dimensions, got shape {shape}")
    kernel = math.prod(shape[2:])
    return shape[1] * kernel, shape[0] * kernel


def _rounded(draw: Callable[..., Tensor]) -> Initializer:
    """``draw(key, shape, dtype=, device=)`` in float32 or float64, then rounded to the dtype.

    Draws in half precision would be coarse, and LAPACK does not know it.
    """

    def initialize(
        key: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return draw(key, shape, dtype=wide, device=device).to(dtype)

    initialize.__qualname__ = draw.__qualname__
    return initialize


def _check_std(name: str, std: float) -> None:
    if std < 0:
        raise ValueError(f"{name}: std must be >= 0, got {std}")
