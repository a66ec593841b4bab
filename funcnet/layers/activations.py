"""Activations: each with its derivative, and PyTorch's fused kernel for it where there is one."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import runtime, tree
from funcnet.core import EMPTY, Layer, Params, Pullback
from funcnet.initializers import constant
from funcnet.lift import elementwise, parameterless, require_floating, stateless, with_kernel
from funcnet.params import Param, declare

aten = torch.ops.aten

Step = tuple[Tensor, dict[str, Tensor], tuple[Any, ...]]

SELU_SCALE = 1.0507009873554804934193349852946
SELU_ALPHA = 1.6732632423543772848170429916717


@with_kernel(lambda dy, y: aten.threshold_backward(dy, y, 0))
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
    return torch.where(x > 0, 1.0, negative_slope).to(x.dtype)


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
    return torch.where((x > -3) & (x < 3), 1 / 6, 0.0).to(x.dtype)


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


@with_kernel(lambda dy, dim, y: runtime.softmax_backward(dy, y, dim, y.dtype))
def softmax_backward(dy: Tensor, dim: int, y: Tensor) -> Tensor:
    """``dx = y (dy - sum y dy)``."""
    return y * (dy - (y * dy).sum(dim, keepdim=True))


def softmax(dim: int = -1) -> Layer:
    """``y = exp(x) / sum exp(x)`` over ``dim``; ``dx = y (dy - sum y dy)``. ``torch.nn.Softmax``.

    >>> softmax().apply({}, torch.tensor([0.0, 0.0]))[0]
    tensor([0.5000, 0.5000])
    """

    def forward(x: Tensor) -> Step:
        y = torch.softmax(x, dim)
        return y, {"y": y}, (dim,)

    return parameterless(forward, softmax_backward)


@with_kernel(lambda dy, dim, y: runtime.log_softmax_backward(dy, y, dim, y.dtype))
def log_softmax_backward(dy: Tensor, dim: int, y: Tensor) -> Tensor:
    """``dx = dy - exp(y) sum dy``."""
    return dy - y.exp() * dy.sum(dim, keepdim=True)


def log_softmax(dim: int = -1) -> Layer:
    """``y = x - log sum exp(x)`` over ``dim``; ``dx = dy - exp(y) sum dy``.

    Source: ``torch.nn.LogSoftmax``.

    >>> log_softmax().apply({}, torch.tensor([0.0, 0.0]))[0]
    tensor([-0.6931, -0.6931])
    """

    def forward(x: Tensor) -> Step:
        y = torch.log_softmax(x, dim)
        return y, {"y": y}, (dim,)

    return parameterless(forward, log_softmax_backward)


@with_kernel(lambda dy, dim, x: aten.glu_backward(dy, x, dim))
def glu_backward(dy: Tensor, dim: int, x: Tensor) -> Tensor:
    """``da = dy s``, ``db = dy a s (1 - s)`` with ``s = sigmoid(b)``."""
    a, b = x.chunk(2, dim)
    s = torch.sigmoid(b)
    return torch.cat([dy * s, dy * a * s * (1 - s)], dim)


def glu(dim: int = -1) -> Layer:
    """``y = a sigmoid(b)``, where a and b are the halves of x along ``dim``.

    Inputs: x with an even size along ``dim``. Source: ``torch.nn.GLU``; Dauphin et al. 2016.

    >>> glu().apply({}, torch.tensor([3.0, 0.0]))[0]
    tensor([1.5000])
    """

    def declaration(x: Tensor) -> Params:
        require_floating(x)
        if not -x.dim() <= dim < x.dim() or x.shape[dim] % 2:
            raise ValueError(f"expects an even size along dim {dim}, got {tuple(x.shape)}")
        return EMPTY

    def forward(x: Tensor) -> Step:
        return F.glu(x, dim), {"x": x}, (dim,)

    return parameterless(forward, glu_backward, declaration=declaration)


def prelu_rule(
    residuals: dict[str, Tensor], dy: Tensor, *, params: bool, x: bool
) -> tuple[Params | None, Tensor | None]:
    """``dx = dy [x > 0] + weight dy [x <= 0]``, ``dweight = sum dy x [x <= 0]`` by channel."""
    inputs, weight = residuals["x"], residuals["weight"]
    positive = inputs > 0
    dparams = None
    if params:
        by_slope = torch.where(positive, 0.0, dy * inputs)
        channelwise = weight.shape[0] > 1
        dims = [dim for dim in range(inputs.dim()) if not (channelwise and dim == 1)]
        dweight = by_slope.sum(dims) if dims else by_slope
        dparams = {"weight": dweight.reshape(weight.shape)}
    dx = torch.where(positive, dy, dy * _along_channels(weight, inputs)) if x else None
    return dparams, dx


def _along_channels(weight: Tensor, x: Tensor) -> Tensor:
    """A weight by channel, dimension 1, in a shape that broadcasts against x."""
    if weight.shape[0] > 1:
        return weight.reshape(-1, *[1] * (x.dim() - 2))
    return weight.reshape([1] * x.dim())


def prelu(
    num_parameters: int = 1, init: float = 0.25, *, dtype: torch.dtype | None = None
) -> Layer:
    """``y = x if x > 0 else weight x``, with a learned slope.

    Args:
        num_parameters: 1, or the size of x's dimension 1 for a slope of each channel.
        init: the first value of the slopes.
        dtype: of the slopes; default that of x.

    Params: ``weight`` (num_parameters,).
    VJP: ``dx = dy`` or ``weight dy``; ``dweight = sum dy x [x <= 0]``.
    Source: ``torch.nn.PReLU``; He et al. 2015.

    >>> prelu().apply({"weight": torch.tensor([0.1])}, torch.tensor([-1.0, 2.0]))[0]
    tensor([-0.1000,  2.0000])
    """
    if num_parameters < 1:
        raise ValueError(f"prelu: num_parameters must be at least 1, got {num_parameters}")

    @declare
    def start(x: Tensor) -> dict[str, Param]:
        require_floating(x)
        if num_parameters > 1 and (x.dim() < 2 or x.shape[1] != num_parameters):
            raise ValueError(
                f"weight expects {num_parameters} channels in dimension 1, got {tree.describe(x)}"
            )
        return {"weight": Param((num_parameters,), constant(init), dtype)}

    def apply(params: Params, x: Tensor) -> Tensor:
        return F.prelu(x, params["weight"])

    def vjp(params: Params, x: Tensor) -> tuple[Tensor, Pullback]:
        return apply(params, x), Pullback(prelu_rule, {"x": x, "weight": params["weight"]})

    return stateless(start, apply, vjp)
