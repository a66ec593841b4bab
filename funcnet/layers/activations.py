"""Smooth activations that work element by element: each with its derivative.

Where PyTorch has a fused kernel of dy times the derivative, the decorator names it.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet.core import Layer
from funcnet.lift import Step, elementwise, parameterless, with_kernel

aten = torch.ops.aten

SELU_SCALE = 1.0507009873554804934193349852946
SELU_ALPHA = 1.6732632423543772848170429916717


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
    """``y = x s`` with ``s = sigmoid(x)``; ``dx = dy s (1 + x (1 - s))``.

    Source: ``torch.nn.SiLU``.

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

    Args:
        alpha: minus the value that y nears where x is far below 0.

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

    Args:
        alpha: minus the value that y nears where x is far below 0; not 0.

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

    ``dx = dy sigmoid(beta x)``, and dy where y is x.

    Args:
        beta: how sharply y bends at 0.
        threshold: above which ``beta x`` y is x, as the exponential could overflow.

    Source: ``torch.nn.Softplus``.

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


@with_kernel(aten.mish_backward.default)
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


# logsigmoid is softplus of beta -1; the backward kernel of its own name wants a second residual.
@with_kernel(lambda dy, x: aten.softplus_backward(dy, x, -1, 40))
def logsigmoid_derivative(x: Tensor) -> Tensor:
    """``sigmoid(-x)``."""
    return torch.sigmoid(-x)


def logsigmoid() -> Layer:
    """``y = log(sigmoid(x))``; ``dx = dy sigmoid(-x)``. Source: ``torch.nn.LogSigmoid``.

    >>> logsigmoid().apply({}, torch.tensor([0.0, 2.0]))[0]
    tensor([-0.6931, -0.1269])
    """
    return elementwise(F.logsigmoid, logsigmoid_derivative, name="logsigmoid")


def tanhshrink_backward(dy: Tensor, t: Tensor) -> Tensor:
    """``dx = dy t^2`` with ``t = tanh(x)``."""
    return dy * t * t


def tanhshrink() -> Layer:
    """``y = x - tanh(x)``; ``dx = dy tanh(x)^2``. Source: ``torch.nn.Tanhshrink``.

    >>> tanhshrink().apply({}, torch.tensor([0.0, 1.0]))[0]
    tensor([0.0000, 0.2384])
    """

    def forward(x: Tensor) -> Step:
        t = torch.tanh(x)
        return x - t, {"t": t}, ()

    return parameterless(forward, tanhshrink_backward)
