"""Activations that work element by element: each with its derivative.

Where PyTorch has a fused kernel of dy times the derivative, the decorator names it.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet.core import Layer
from funcnet.lift import elementwise, with_kernel

aten = torch.ops.aten

SELU_SCALE = 1.0507009873554804934193349852946
SELU_ALPHA = 1.6732632423543772848170429916717


@with_kernel(lambda dy, y: aten.threshold_backward.default(dy, y, 0))
def relu_derivative(y: Tensor) -> Tensor:
    """``[y > 0]``."""
    return y > 0


def relu() -> Layer:
    """``y = max(x, 0)``; ``dx = dy [y > 0]``. Source: ``torch.nn.ReLU``.

    >>> relu().apply({}, torch.tensor([-1.0, 2.0]))[0]
    tensor([0., 2.])
    """
    return elementwise(torch.relu, relu_derivative, "y", name="relu")


@with_kernel(lambda dy, x, slope: aten.leaky_relu_backward(dy, x, slope, False))
def leaky_relu_derivative(x: Tensor, negative_slope: float) -> Tensor:
    """``1 where x > 0, else the slope``."""
    return torch.where(x > 0, 1.0, torch.full_like(x, negative_slope))


def leaky_relu(negative_slope: float = 0.01) -> Layer:
    """``y = x if x > 0 else negative_slope x``; ``dx = dy`` or ``negative_slope dy``.

    Source: ``torch.nn.LeakyReLU``.

    >>> leaky_relu(0.1).apply({}, torch.tensor([-1.0, 2.0]))[0]
    tensor([-0.1000,  2.0000])
    """
    return elementwise(
        F.leaky_relu, leaky_relu_derivative, options=(negative_slope,), name="leaky_relu"
    )


@with_kernel(aten.tanh_backward.default)
def tanh_derivative(y: Tensor) -> Tensor:
    """``1 - y^2``."""
    return 1 - y * y


def tanh() -> Layer:
    """``y = tanh(x)``; ``dx = dy (1 - y^2)``. Source: ``torch.nn.Tanh``.

    >>> tanh().apply({}, torch.tensor([0.0, 1.0]))[0]
    tensor([0.0000, 0.7616])
    """
    return elementwise(torch.tanh, tanh_derivative, "y", name="tanh")


@with_kernel(aten.sigmoid_backward.default)
def sigmoid_derivative(y: Tensor) -> Tensor:
    """``y (1 - y)``."""
    return y * (1 - y)


def sigmoid() -> Layer:
    """``y = 1 / (1 + exp(-x))``; ``dx = dy y (1 - y)``. Source: ``torch.nn.Sigmoid``.

    >>> sigmoid().apply({}, torch.tensor([0.0, 1.0]))[0]
    tensor([0.5000, 0.7311])
    """
    return elementwise(torch.sigmoid, sigmoid_derivative, "y", name="sigmoid")


def _gelu(x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


@with_kernel(lambda dy, x, approximate: aten.gelu_backward(dy, x, approximate=approximate))
def gelu_derivative(x: Tensor, approximate: str) -> Tensor:
    """``Phi(x) + x phi(x)``."""
    if approximate == "none":
        phi = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * phi
    slope = math.sqrt(2 / math.pi)
    t = torch.tanh(slope * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope * (1 + 3 * 0.044715 * x * x)


def gelu(approximate: str = "none") -> Layer:
    """``y = x Phi(x)``; ``dx = dy (Phi(x) + x phi(x))``, with N(0, 1)'s Phi and phi.

    Args:
        approximate: "none", or "tanh" for ``Phi(x) = (1 + tanh(sqrt(2/pi)(x + 0.044715 x^3)))/2``.

    Source: ``torch.nn.GELU``; Hendrycks and Gimpel 2016.

    >>> gelu().apply({}, torch.tensor([-1.0, 1.0]))[0]
    tensor([-0.1587,  0.8413])
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return elementwise(_gelu, gelu_derivative, options=(approximate,), name="gelu")


@with_kernel(aten.silu_backward.default)
def silu_derivative(x: Tensor) -> Tensor:
    """``s (1 + x (1 - s)) with s = sigmoid(x)``."""
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def silu() -> Layer:
    """``y = x s`` with ``s = sigmoid(x)``; ``dx = dy s (1 + x (1 - s))``. ``torch.nn.SiLU``.

    >>> silu().apply({}, torch.tensor([-1.0, 1.0]))[0]
    tensor([-0.2689,  0.7311])
    """
    return elementwise(F.silu, silu_derivative, name="silu")


@with_kernel(lambda dy, x, alpha: aten.elu_backward(dy, alpha, 1, 1, False, x))
def elu_derivative(x: Tensor, alpha: float) -> Tensor:
    """``1 where x > 0, else alpha exp(x)``."""
    return torch.where(x > 0, 1.0, alpha * x.clamp(max=0).exp())


def elu(alpha: float = 1.0) -> Layer:
    """``y = x if x > 0 else alpha (exp(x) - 1)``; ``dx = dy`` or ``dy alpha exp(x)``.

    Source: ``torch.nn.ELU``.

    >>> elu().apply({}, torch.tensor([-1.0, 1.0]))[0]
    tensor([-0.6321,  1.0000])
    """
    return elementwise(F.elu, elu_derivative, options=(alpha,), name="elu")


@with_kernel(lambda dy, x, alpha: aten.elu_backward(dy, alpha, 1, 1 / alpha, False, x))
def celu_derivative(x: Tensor, alpha: float) -> Tensor:
    """``1 where x > 0, else exp(x / alpha)``."""
    return torch.where(x > 0, 1.0, (x.clamp(max=0) / alpha).exp())


def celu(alpha: float = 1.0) -> Layer:
    """``y = x if x > 0 else alpha (exp(x / alpha) - 1)``; ``dx = dy`` or ``dy exp(x / alpha)``.

    Source: ``torch.nn.CELU``.

    >>> celu(2.0).apply({}, torch.tensor([-1.0, 1.0]))[0]
    tensor([-0.7869,  1.0000])
    """
    if alpha == 0:
        raise ValueError("celu: alpha must not be 0")
    return elementwise(F.celu, celu_derivative, options=(alpha,), name="celu")


@with_kernel(lambda dy, x: aten.elu_backward(dy, SELU_ALPHA, SELU_SCALE, 1, False, x))
def selu_derivative(x: Tensor) -> Tensor:
    """``that of elu, scaled``."""
    return SELU_SCALE * elu_derivative(x, SELU_ALPHA)


def selu() -> Layer:
    """``y = scale elu(x, alpha)`` with the two constants that keep mean 0 and variance 1.

    Source: ``torch.nn.SELU``; Klambauer et al. 2017.

    >>> selu().apply({}, torch.tensor([-1.0, 1.0]))[0]
    tensor([-1.1113,  1.0507])
    """
    return elementwise(F.selu, selu_derivative, name="selu")


@with_kernel(aten.softplus_backward.default)
def softplus_derivative(x: Tensor, beta: float, threshold: float) -> Tensor:
    """``sigmoid(beta x), and 1 where y is x``."""
    return torch.where(beta * x > threshold, 1.0, torch.sigmoid(beta * x))


def softplus(beta: float = 1.0, threshold: float = 20.0) -> Layer:
    """``y = log(1 + exp(beta x)) / beta``, and x where ``beta x > threshold``.

    ``dx = dy sigmoid(beta x)``, and dy where y is x. Source: ``torch.nn.Softplus``.

    >>> softplus().apply({}, torch.tensor([0.0, 30.0]))[0]
    tensor([ 0.6931, 30.0000])
    """
    return elementwise(F.softplus, softplus_derivative, options=(beta, threshold), name="softplus")


def softsign_derivative(x: Tensor) -> Tensor:
    """``1 / (1 + |x|)^2``."""
    return (1 + x.abs()).square().reciprocal()


def softsign() -> Layer:
    """``y = x / (1 + |x|)``; ``dx = dy / (1 + |x|)^2``. Source: ``torch.nn.Softsign``.

    >>> softsign().apply({}, torch.tensor([-1.0, 3.0]))[0]
    tensor([-0.5000,  0.7500])
    """
    return elementwise(F.softsign, softsign_derivative, name="softsign")


def mish_derivative(x: Tensor) -> Tensor:
    """``t + x sigmoid(x) (1 - t^2) with t = tanh(softplus(x))``."""
    t = torch.tanh(F.softplus(x))
    return t + x * torch.sigmoid(x) * (1 - t * t)


def mish() -> Layer:
    """``y = x t`` with ``t = tanh(softplus(x))``; ``dx = dy (t + x sigmoid(x) (1 - t^2))``.

    Source: ``torch.nn.Mish``; Misra 2019.

    >>> mish().apply({}, torch.tensor([-1.0, 1.0]))[0]
    tensor([-0.3034,  0.8651])
    """
    return elementwise(F.mish, mish_derivative, name="mish")


@with_kernel(aten.hardtanh_backward.default)
def hardtanh_derivative(x: Tensor, min_val: float, max_val: float) -> Tensor:
    """``[min_val < x < max_val]``."""
    return (x > min_val) & (x < max_val)


def hardtanh(min_val: float = -1.0, max_val: float = 1.0) -> Layer:
    """``y = min(max(x, min_val), max_val)``; ``dx = dy [min_val < x < max_val]``.

    Source: ``torch.nn.Hardtanh``.

    >>> hardtanh().apply({}, torch.tensor([-2.0, 0.5]))[0]
    tensor([-1.0000,  0.5000])
    """
    if not min_val < max_val:
        raise ValueError(f"hardtanh: expects min_val < max_val, got {min_val} and {max_val}")
    return elementwise(F.hardtanh, hardtanh_derivative, options=(min_val, max_val), name="hardtanh")


@with_kernel(aten.hardsigmoid_backward.default)
def hardsigmoid_derivative(x: Tensor) -> Tensor:
    """``[-3 < x < 3] / 6``."""
    return torch.where((x > -3) & (x < 3), torch.full_like(x, 1 / 6), 0.0)


def hardsigmoid() -> Layer:
    """``y = min(max(x / 6 + 1/2, 0), 1)``; ``dx = dy [-3 < x < 3] / 6``. ``torch.nn.Hardsigmoid``.

    >>> hardsigmoid().apply({}, torch.tensor([-4.0, 1.5]))[0]
    tensor([0.0000, 0.7500])
    """
    return elementwise(F.hardsigmoid, hardsigmoid_derivative, name="hardsigmoid")


@with_kernel(aten.hardswish_backward.default)
def hardswish_derivative(x: Tensor) -> Tensor:
    """``x / 3 + 1/2 where -3 <= x <= 3, else 0 or 1``."""
    return torch.where(x < -3, 0.0, torch.where(x <= 3, x / 3 + 0.5, 1.0))


def hardswish() -> Layer:
    """``y = x hardsigmoid(x)``; ``dx = dy (x / 3 + 1/2)`` where -3 < x < 3.

    Source: ``torch.nn.Hardswish``.

    >>> hardswish().apply({}, torch.tensor([-4.0, 1.5]))[0]
    tensor([-0.0000, 1.1250])
    """
    return elementwise(F.hardswish, hardswish_derivative, name="hardswish")


@with_kernel(lambda dy, x: aten.hardtanh_backward(dy, x, 0.0, 6.0))
def relu6_derivative(x: Tensor) -> Tensor:
    """``[0 < x < 6]``."""
    return (x > 0) & (x < 6)


def relu6() -> Layer:
    """``y = min(max(x, 0), 6)``; ``dx = dy [0 < x < 6]``. Source: ``torch.nn.ReLU6``.

    >>> relu6().apply({}, torch.tensor([-1.0, 8.0]))[0]
    tensor([0., 6.])
    """
    return elementwise(F.relu6, relu6_derivative, name="relu6")


def logsigmoid_derivative(x: Tensor) -> Tensor:
    """``sigmoid(-x)``."""
    return torch.sigmoid(-x)


def logsigmoid() -> Layer:
    """``y = log(sigmoid(x))``; ``dx = dy sigmoid(-x)``. Source: ``torch.nn.LogSigmoid``.

    >>> logsigmoid().apply({}, torch.tensor([0.0, 2.0]))[0]
    tensor([-0.6931, -0.1269])
    """
    return elementwise(F.logsigmoid, logsigmoid_derivative, name="logsigmoid")
