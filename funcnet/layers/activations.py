"""Activations: a table of functions and their derivatives, and constructors of its rows.

A row's derivative gives dx from dy and from x or y, whichever it saves. ``aten.*_backward`` are
PyTorch's fused kernels for the formula in the constructor's docstring.
"""

from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import runtime, tree
from funcnet.core import (
    Layer,
    Params,
    Pullback,
    check_floating,
    check_params,
    stateless,
)

aten = torch.ops.aten


class Elementwise(NamedTuple):
    """``y = function(x, *options)``, ``dx = derivative(dy, saved, *options)``."""

    function: Callable[..., Tensor]
    derivative: Callable[..., Tensor]
    saves: Literal["x", "y"]


SELU_SCALE = 1.0507009873554804934193349852946
SELU_ALPHA = 1.6732632423543772848170429916717

_threshold_backward = aten.threshold_backward.default
_tanh_backward = aten.tanh_backward.default
_sigmoid_backward = aten.sigmoid_backward.default


def _silu_derivative(dy: Tensor, x: Tensor) -> Tensor:
    if not runtime.is_transformed(dy, x):
        return aten.silu_backward(dy, x)
    s = torch.sigmoid(x)  # torch has no derivative of the fused kernel
    return dy * s * (1 + x * (1 - s))


def _mish_derivative(dy: Tensor, x: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(x))
    return dy * (t + x * torch.sigmoid(x) * (1 - t * t))


# fmt: off
ACTIVATIONS: dict[str, Elementwise] = {
    "relu": Elementwise(
        torch.relu,    lambda dy, y: _threshold_backward(dy, y, 0), "y"),
    "leaky_relu": Elementwise(
        F.leaky_relu,  lambda dy, x, slope: aten.leaky_relu_backward(dy, x, slope, False), "x"),
    "tanh": Elementwise(
        torch.tanh,    lambda dy, y: _tanh_backward(dy, y), "y"),
    "sigmoid": Elementwise(
        torch.sigmoid, lambda dy, y: _sigmoid_backward(dy, y), "y"),
    "gelu": Elementwise(
        lambda x, approximate: F.gelu(x, approximate=approximate),
        lambda dy, x, approximate: aten.gelu_backward(dy, x, approximate=approximate), "x"),
    "silu": Elementwise(
        F.silu,        _silu_derivative, "x"),
    "elu": Elementwise(
        F.elu,         lambda dy, x, alpha: aten.elu_backward(dy, alpha, 1, 1, False, x), "x"),
    "celu": Elementwise(
        F.celu,
        lambda dy, x, alpha: aten.elu_backward(dy, alpha, 1, 1 / alpha, False, x), "x"),
    "selu": Elementwise(
        F.selu,
        lambda dy, x: aten.elu_backward(dy, SELU_ALPHA, SELU_SCALE, 1, False, x), "x"),
    "softplus": Elementwise(
        F.softplus,
        lambda dy, x, beta, threshold: aten.softplus_backward(dy, x, beta, threshold), "x"),
    "softsign": Elementwise(
        F.softsign,    lambda dy, x: dy / (1 + x.abs()).square(), "x"),
    "mish": Elementwise(
        F.mish,        _mish_derivative, "x"),
    "hardtanh": Elementwise(
        F.hardtanh,    lambda dy, x, low, high: aten.hardtanh_backward(dy, x, low, high), "x"),
    "hardsigmoid": Elementwise(
        F.hardsigmoid, lambda dy, x: aten.hardsigmoid_backward(dy, x), "x"),
    "hardswish": Elementwise(
        F.hardswish,   lambda dy, x: aten.hardswish_backward(dy, x), "x"),
    "relu6": Elementwise(
        F.relu6,       lambda dy, x: aten.hardtanh_backward(dy, x, 0.0, 6.0), "x"),
    "logsigmoid": Elementwise(
        F.logsigmoid,  lambda dy, x: dy * torch.sigmoid(-x), "x"),
    "softmax": Elementwise(
        torch.softmax, lambda dy, y, dim: aten._softmax_backward_data(dy, y, dim, y.dtype), "y"),
    "log_softmax": Elementwise(
        torch.log_softmax,
        lambda dy, y, dim: aten._log_softmax_backward_data(dy, y, dim, y.dtype), "y"),
}
# fmt: on


def elementwise_rule(
    residuals: dict[str, Tensor], dy: Tensor, name: str, *options: Any, params: bool, x: bool
) -> tuple[Params | None, Tensor | None]:
    """``dx = derivative(dy, saved, *options)`` of the row ``name``."""
    if not x:
        return ({} if params else None), None
    _, derivative, saves = ACTIVATIONS[name]
    return ({} if params else None), derivative(dy, residuals[saves], *options)


def _activation(name: str, *options: Hashable) -> Layer:
    function, _, saves = ACTIVATIONS[name]
    static = (name, *options)

    def init(key: Tensor, x: Tensor) -> Params:
        check_floating(name, x)
        return {}

    def apply(params: Params, x: Tensor) -> Tensor:
        if params:
            check_params(name, params, ())
        if type(x) is not Tensor or not x.is_floating_point():
            check_floating(name, x)
        try:
            return function(x, *options)
        except IndexError as error:
            raise ValueError(f"{name}: does not fit {tuple(x.shape)}: {error}") from None

    def vjp(params: Params, x: Tensor) -> tuple[Tensor, Pullback]:
        y = apply(params, x)
        return y, Pullback(elementwise_rule, {saves: y if saves == "y" else x}, static)

    return stateless(init, apply, vjp, name=name)


def relu() -> Layer:
    """``y = max(x, 0)``; ``dx = dy [y > 0]``. Source: ``torch.nn.ReLU``.

    >>> relu().apply({}, torch.tensor([-1.0, 2.0]))[0]
    tensor([0., 2.])
    """
    return _activation("relu")


def leaky_relu(negative_slope: float = 0.01) -> Layer:
    """``y = x if x > 0 else negative_slope x``; ``dx = dy`` or ``negative_slope dy``.

    Source: ``torch.nn.LeakyReLU``.

    >>> leaky_relu(0.1).apply({}, torch.tensor([-1.0, 2.0]))[0]
    tensor([-0.1000,  2.0000])
    """
    return _activation("leaky_relu", negative_slope)


def tanh() -> Layer:
    """``y = tanh(x)``; ``dx = dy (1 - y^2)``. Source: ``torch.nn.Tanh``.

    >>> tanh().apply({}, torch.tensor([0.0, 1.0]))[0]
    tensor([0.0000, 0.7616])
    """
    return _activation("tanh")


def sigmoid() -> Layer:
    """``y = 1 / (1 + exp(-x))``; ``dx = dy y (1 - y)``. Source: ``torch.nn.Sigmoid``.

    >>> sigmoid().apply({}, torch.tensor([0.0, 1.0]))[0]
    tensor([0.5000, 0.7311])
    """
    return _activation("sigmoid")


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
    return _activation("gelu", approximate)


def silu() -> Layer:
    """``y = x s`` with ``s = sigmoid(x)``; ``dx = dy s (1 + x (1 - s))``. ``torch.nn.SiLU``.

    >>> silu().apply({}, torch.tensor([-1.0, 1.0]))[0]
    tensor([-0.2689,  0.7311])
    """
    return _activation("silu")


def elu(alpha: float = 1.0) -> Layer:
    """``y = x if x > 0 else alpha (exp(x) - 1)``; ``dx = dy`` or ``dy alpha exp(x)``.

    Source: ``torch.nn.ELU``.

    >>> elu().apply({}, torch.tensor([-1.0, 1.0]))[0]
    tensor([-0.6321,  1.0000])
    """
    return _activation("elu", alpha)


def celu(alpha: float = 1.0) -> Layer:
    """``y = x if x > 0 else alpha (exp(x / alpha) - 1)``; ``dx = dy`` or ``dy exp(x / alpha)``.

    Source: ``torch.nn.CELU``.

    >>> celu(2.0).apply({}, torch.tensor([-1.0, 1.0]))[0]
    tensor([-0.7869,  1.0000])
    """
    if alpha == 0:
        raise ValueError("celu: alpha must not be 0")
    return _activation("celu", alpha)


def selu() -> Layer:
    """``y = scale elu(x, alpha)`` with the two constants that keep mean 0 and variance 1.

    Source: ``torch.nn.SELU``; Klambauer et al. 2017.

    >>> selu().apply({}, torch.tensor([-1.0, 1.0]))[0]
    tensor([-1.1113,  1.0507])
    """
    return _activation("selu")


def softplus(beta: float = 1.0, threshold: float = 20.0) -> Layer:
    """``y = log(1 + exp(beta x)) / beta``, and x where ``beta x > threshold``.

    ``dx = dy sigmoid(beta x)``, and dy where y is x. Source: ``torch.nn.Softplus``.

    >>> softplus().apply({}, torch.tensor([0.0, 30.0]))[0]
    tensor([ 0.6931, 30.0000])
    """
    return _activation("softplus", beta, threshold)


def softsign() -> Layer:
    """``y = x / (1 + |x|)``; ``dx = dy / (1 + |x|)^2``. Source: ``torch.nn.Softsign``.

    >>> softsign().apply({}, torch.tensor([-1.0, 3.0]))[0]
    tensor([-0.5000,  0.7500])
    """
    return _activation("softsign")


def mish() -> Layer:
    """``y = x t`` with ``t = tanh(softplus(x))``; ``dx = dy (t + x sigmoid(x) (1 - t^2))``.

    Source: ``torch.nn.Mish``; Misra 2019.

    >>> mish().apply({}, torch.tensor([-1.0, 1.0]))[0]
    tensor([-0.3034,  0.8651])
    """
    return _activation("mish")


def hardtanh(min_val: float = -1.0, max_val: float = 1.0) -> Layer:
    """``y = min(max(x, min_val), max_val)``; ``dx = dy [min_val < x < max_val]``.

    Source: ``torch.nn.Hardtanh``.

    >>> hardtanh().apply({}, torch.tensor([-2.0, 0.5]))[0]
    tensor([-1.0000,  0.5000])
    """
    if not min_val < max_val:
        raise ValueError(f"hardtanh: expects min_val < max_val, got {min_val} and {max_val}")
    return _activation("hardtanh", min_val, max_val)


def hardsigmoid() -> Layer:
    """``y = min(max(x / 6 + 1/2, 0), 1)``; ``dx = dy [-3 < x < 3] / 6``. ``torch.nn.Hardsigmoid``.

    >>> hardsigmoid().apply({}, torch.tensor([-4.0, 1.5]))[0]
    tensor([0.0000, 0.7500])
    """
    return _activation("hardsigmoid")


def hardswish() -> Layer:
    """``y = x hardsigmoid(x)``; ``dx = dy (x / 3 + 1/2)`` where -3 < x < 3.

    Source: ``torch.nn.Hardswish``.

    >>> hardswish().apply({}, torch.tensor([-4.0, 1.5]))[0]
    tensor([-0.0000, 1.1250])
    """
    return _activation("hardswish")


def relu6() -> Layer:
    """``y = min(max(x, 0), 6)``; ``dx = dy [0 < x < 6]``. Source: ``torch.nn.ReLU6``.

    >>> relu6().apply({}, torch.tensor([-1.0, 8.0]))[0]
    tensor([0., 6.])
    """
    return _activation("relu6")


def logsigmoid() -> Layer:
    """``y = log(sigmoid(x))``; ``dx = dy sigmoid(-x)``. Source: ``torch.nn.LogSigmoid``.

    >>> logsigmoid().apply({}, torch.tensor([0.0, 2.0]))[0]
    tensor([-0.6931, -0.1269])
    """
    return _activation("logsigmoid")


def softmax(dim: int = -1) -> Layer:
    """``y = exp(x) / sum exp(x)`` over ``dim``; ``dx = y (dy - sum y dy)``. ``torch.nn.Softmax``.

    >>> softmax().apply({}, torch.tensor([0.0, 0.0]))[0]
    tensor([0.5000, 0.5000])
    """
    return _activation("softmax", dim)


def log_softmax(dim: int = -1) -> Layer:
    """``y = x - log sum exp(x)`` over ``dim``; ``dx = dy - exp(y) sum dy``.

    Source: ``torch.nn.LogSoftmax``.

    >>> log_softmax().apply({}, torch.tensor([0.0, 0.0]))[0]
    tensor([-0.6931, -0.6931])
    """
    return _activation("log_softmax", dim)


def glu_rule(
    residuals: dict[str, Tensor], dy: Tensor, dim: int, *, params: bool, x: bool
) -> tuple[Params | None, Tensor | None]:
    """``da = dy s``, ``db = dy a s (1 - s)`` with ``s = sigmoid(b)``."""
    return ({} if params else None), aten.glu_backward(dy, residuals["x"], dim) if x else None


def glu(dim: int = -1) -> Layer:
    """``y = a sigmoid(b)``, where a and b are the halves of x along ``dim``.

    Inputs: x with an even size along ``dim``. Source: ``torch.nn.GLU``; Dauphin et al. 2016.

    >>> glu().apply({}, torch.tensor([3.0, 0.0]))[0]
    tensor([1.5000])
    """

    def init(key: Tensor, x: Tensor) -> Params:
        check_floating("glu", x)
        return {}

    def apply(params: Params, x: Tensor) -> Tensor:
        check_floating("glu", x)
        check_params("glu", params, ())
        if not -x.dim() <= dim < x.dim() or x.shape[dim] % 2:
            raise ValueError(f"glu: expects an even size along dim {dim}, got {tuple(x.shape)}")
        return F.glu(x, dim)

    def vjp(params: Params, x: Tensor) -> tuple[Tensor, Pullback]:
        return apply(params, x), Pullback(glu_rule, {"x": x}, (dim,))

    return stateless(init, apply, vjp)


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

    def start(key: Tensor, x: Tensor) -> Params:
        check_floating("prelu", x)
        kind: Any = {"dtype": dtype or x.dtype, "device": x.device}
        return {"weight": torch.full((num_parameters,), init, **kind)}

    def apply(params: Params, x: Tensor) -> Tensor:
        check_floating("prelu", x)
        check_params("prelu", params, ("weight",))
        weight = params["weight"]
        if weight.shape != (num_parameters,):
            raise ValueError(
                f"prelu: expects a weight of shape {(num_parameters,)}, got {tuple(weight.shape)}"
            )
        if weight.shape[0] > 1 and (x.dim() < 2 or x.shape[1] != weight.shape[0]):
            raise ValueError(
                f"prelu: weight expects {weight.shape[0]} channels in dimension 1, "
                f"got {tree.describe(x)}"
            )
        if x.dtype != weight.dtype:
            raise TypeError(f"prelu: weight is {weight.dtype}, x is {x.dtype}")
        return F.prelu(x, weight)

    def vjp(params: Params, x: Tensor) -> tuple[Tensor, Pullback]:
        return apply(params, x), Pullback(prelu_rule, {"x": x, "weight": params["weight"]})

    return stateless(start, apply, vjp)
