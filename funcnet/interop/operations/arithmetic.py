"""Arithmetic on tensors that broadcast, and on numbers; functions of each element."""

import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from funcnet.core import Layer
from funcnet.lift import Step, accept_any, elementwise, parameterless

Call = tuple[Layer, Any]
"""A layer, and its x: one of the arguments of the call, or a tuple of some."""

cached: Any = lru_cache(maxsize=1024)
"""Keeps the layer of each set of options."""


def moved(function: Callable[..., Any], backward: Any, static: Callable[..., Any]) -> Layer:
    """A layer ``y = function(x)``, whose backward gets ``static(x)``."""

    def forward(x: Any) -> Step:
        return function(x), {}, static(x)

    return parameterless(forward, backward, declaration=accept_any, name=backward.__name__)


def add_partials(dy: Tensor, a: Tensor, b: Tensor, y: Tensor, alpha: float) -> Any:
    """``y = a + alpha b``: ``da = dy``, ``db = alpha dy``."""
    return dy, dy if alpha == 1 else dy * alpha


def sub_partials(dy: Tensor, a: Tensor, b: Tensor, y: Tensor, alpha: float) -> Any:
    """``y = a - alpha b``: ``da = dy``, ``db = -alpha dy``."""
    return dy, -dy if alpha == 1 else dy * -alpha


def mul_partials(dy: Tensor, a: Tensor, b: Tensor, y: Tensor) -> Any:
    """``y = a b``: ``da = dy b``, ``db = dy a``."""
    return dy * b, dy * a


def div_partials(dy: Tensor, a: Tensor, b: Tensor, y: Tensor) -> Any:
    """``y = a / b``: ``da = dy / b``, ``db = -dy y / b``."""
    return dy / b, -dy * y / b


def pow_partials(dy: Tensor, a: Tensor, b: Tensor, y: Tensor) -> Any:
    """``y = a^b``: ``da = dy b a^(b - 1)``, ``db = dy y log a``, both 0 where a or b is 0."""
    da = torch.where(b == 0, 0.0, dy * b * a ** (b - 1))
    return da, torch.where((a == 0) & (b >= 0), 0.0, dy * y * a.log())


def maximum_partials(dy: Tensor, a: Tensor, b: Tensor, y: Tensor) -> Any:
    """``y = max(a, b)``: dy goes to the larger one, half to each of equal ones."""
    share = torch.where(a == b, dy / 2, 0.0)
    return torch.where(a > b, dy, share), torch.where(b > a, dy, share)


def minimum_partials(dy: Tensor, a: Tensor, b: Tensor, y: Tensor) -> Any:
    """``y = min(a, b)``: dy goes to the smaller one, half to each of equal ones."""
    share = torch.where(a == b, dy / 2, 0.0)
    return torch.where(a < b, dy, share), torch.where(b < a, dy, share)


def pair_backward(dy: Tensor, partials: Any, options: Any, kinds: Any, *, given: Any) -> Any:
    """The partial derivatives, summed over the dimensions along which an operand was repeated."""
    parts = partials(dy, *given, *options)
    return tuple(
        [
            part.sum_to_size(shape).to(dtype) if dtype.is_floating_point else None
            for part, (shape, dtype) in zip(parts, kinds, strict=True)
        ]
    )


_FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Any]]] = {
    "add": (lambda a, b, alpha: a + b if alpha == 1 else a + alpha * b, add_partials),
    "sub": (lambda a, b, alpha: a - b if alpha == 1 else a - alpha * b, sub_partials),
    "mul": (operator.mul, mul_partials),
    "div": (operator.truediv, div_partials),
    "pow": (operator.pow, pow_partials),
    "maximum": (torch.maximum, maximum_partials),
    "minimum": (torch.minimum, minimum_partials),
}


@cached
def _pair(name: str, *options: float) -> Layer:
    function, partials = _FUNCTIONS[name]

    def forward(x: tuple[Tensor, Tensor]) -> Step:
        a, b = x
        y = function(a, b, *options)
        given = (a, b, y if name in ("div", "pow") else a)
        if name in ("add", "sub"):
            given = (dy_only := y.new_zeros(()), dy_only, dy_only)
        kinds = tuple([(tuple(each.shape), each.dtype) for each in x])
        return y, {"given": given}, (partials, options, kinds)

    return parameterless(forward, pair_backward, declaration=accept_any, name=name)


def identity_of(x: Tensor, *options: float) -> Tensor:
    """1, the derivative of ``x + n``."""
    return torch.ones_like(x)


def _scaled(x: Tensor, n: float) -> Tensor:
    return x * n


def scale(x: Tensor, n: float) -> Tensor:
    """n, the derivative of ``n x``."""
    return torch.full_like(x, n)


def _shifted(x: Tensor, n: float) -> Tensor:
    return x + n


def _reversed(x: Tensor, n: float) -> Tensor:
    return n - x


def minus_one(x: Tensor, n: float) -> Tensor:
    """-1, the derivative of ``n - x``."""
    return torch.full_like(x, -1)


def _over(x: Tensor, n: float) -> Tensor:
    return x / n


def one_over(x: Tensor, n: float) -> Tensor:
    """``1 / n``, the derivative of ``x / n``."""
    return torch.full_like(x, 1 / n)


def _under(x: Tensor, n: float) -> Tensor:
    return n / x


def under_derivative(x: Tensor, n: float) -> Tensor:
    """``-n / x^2``, the derivative of ``n / x``."""
    return -n / (x * x)


def _power(x: Tensor, n: float) -> Tensor:
    return x**n


def power_derivative(x: Tensor, n: float) -> Tensor:
    """``n x^(n - 1)``, the derivative of ``x^n``."""
    return torch.zeros_like(x) if n == 0 else n * x ** (n - 1)


def _exponential(x: Tensor, n: float) -> Tensor:
    return torch.pow(n, x)


def exponential_derivative(x: Tensor, n: float) -> Tensor:
    """``n^x log n``, the derivative of ``n^x``."""
    return torch.pow(n, x) * torch.log(torch.as_tensor(n, dtype=x.dtype, device=x.device))


_ON_THE_RIGHT: dict[str, Any] = {
    "add": (_shifted, identity_of),
    "sub": (_shifted, identity_of),
    "mul": (_scaled, scale),
    "div": (_over, one_over),
    "pow": (_power, power_derivative),
}
_ON_THE_LEFT: dict[str, Any] = {
    "add": (_shifted, identity_of),
    "sub": (_reversed, minus_one),
    "mul": (_scaled, scale),
    "div": (_under, under_derivative),
    "pow": (_exponential, exponential_derivative),
}


@cached
def _with_number(name: str, number: float, left: bool) -> Layer:
    function, derivative = (_ON_THE_LEFT if left else _ON_THE_RIGHT)[name]
    return elementwise(function, derivative, options=(number,), name=name)


def _operation(name: str) -> Callable[..., Call]:
    def call(a: Any, b: Any, *, alpha: float = 1, rounding_mode: None = None) -> Call:
        if rounding_mode is not None:
            raise ValueError(f"{name}: expects rounding_mode=None, got {rounding_mode!r}")
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return _pair(name, *([alpha] if name in ("add", "sub") else [])), (a, b)
        left = not isinstance(a, Tensor)
        number, x = (a, b) if left else (b, a)
        if left and alpha != 1:
            raise ValueError(f"{name}: expects two tensors with alpha, got a number")
        number = -number * alpha if name == "sub" and not left else number * alpha
        return _with_number(name, number, left), x

    return call


def _backwards(call: Callable[..., Call]) -> Callable[..., Call]:
    return lambda a, b, **options: call(b, a, **options)


def _of_element(function: Callable[..., Tensor], derivative: Any, saves: Any = "x") -> Any:
    layer = elementwise(function, derivative, saves, name=function.__name__)
    return lambda x: (layer, x)


def negative_sine(x: Tensor) -> Tensor:
    """The derivative of the cosine."""
    return -x.sin()


def half_over(y: Tensor) -> Tensor:
    """``1 / (2 y)``, the derivative of the square root."""
    return 0.5 / y


def rsqrt_derivative(y: Tensor) -> Tensor:
    """``-y^3 / 2``, the derivative of ``y = x^(-1/2)``."""
    return -0.5 * y**3


def minus_square(y: Tensor) -> Tensor:
    """``-y^2``, the derivative of ``y = 1 / x``."""
    return -y * y


def twice(x: Tensor) -> Tensor:
    """``2 x``, the derivative of the square."""
    return 2 * x


def erf_derivative(x: Tensor) -> Tensor:
    """``2 / sqrt(pi) exp(-x^2)``."""
    return 1.1283791670955126 * torch.exp(-x * x)


def log1p_derivative(x: Tensor) -> Tensor:
    """``1 / (1 + x)``."""
    return 1 / (1 + x)


def plus_one(y: Tensor) -> Tensor:
    """``y + 1``, the derivative of ``y = exp(x) - 1``."""
    return y + 1


def itself(y: Tensor) -> Tensor:
    """The derivative of the exponential function."""
    return y


def minus(x: Tensor) -> Tensor:
    """-1, the derivative of ``-x``."""
    return torch.full_like(x, -1)


def log2_derivative(x: Tensor) -> Tensor:
    """``1 / (x log 2)``."""
    return 1.4426950408889634 / x


def _clamp(x: Tensor, low: float | None, high: float | None) -> Tensor:
    return x.clamp(low, high)


def clamp_derivative(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """1 within the limits, which are inside, else 0."""
    inside = torch.ones_like(x, dtype=torch.bool)
    inside = inside if low is None else inside & (x >= low)
    return (inside if high is None else inside & (x <= high)).to(x.dtype)


def clamp(x: Tensor, min: Any = None, max: Any = None) -> Call:
    """``torch.clamp`` to numbers."""
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        raise ValueError("clamp: expects numbers as limits, got a tensor")
    return _clamped(min, max), x


@cached
def _clamped(low: Any, high: Any) -> Layer:
    return elementwise(_clamp, clamp_derivative, options=(low, high), name="clamp")


def _maximum(name: str) -> Callable[..., Call]:
    return lambda a, b: (_pair(name), (a, b))


_subtract = _operation("sub")

ARITHMETIC: dict[str, Callable[..., Call]] = {
    **dict.fromkeys(["add", "__add__", "__radd__"], _operation("add")),
    **dict.fromkeys(["sub", "subtract"], _subtract),
    "rsub": _backwards(_subtract),
    **dict.fromkeys(["mul", "multiply"], _operation("mul")),
    **dict.fromkeys(["div", "truediv", "true_divide", "divide"], _operation("div")),
    "pow": _operation("pow"),
    "maximum": _maximum("maximum"),
    "minimum": _maximum("minimum"),
    "neg": _of_element(torch.neg, minus),
    "negative": _of_element(torch.neg, minus),
    "exp": _of_element(torch.exp, itself, "y"),
    "log": _of_element(torch.log, torch.reciprocal),
    "log2": _of_element(torch.log2, log2_derivative),
    "log1p": _of_element(torch.log1p, log1p_derivative),
    "expm1": _of_element(torch.expm1, plus_one, "y"),
    "sqrt": _of_element(torch.sqrt, half_over, "y"),
    "rsqrt": _of_element(torch.rsqrt, rsqrt_derivative, "y"),
    "reciprocal": _of_element(torch.reciprocal, minus_square, "y"),
    "square": _of_element(torch.square, twice),
    "abs": _of_element(torch.abs, torch.sign),
    "sin": _of_element(torch.sin, torch.cos),
    "cos": _of_element(torch.cos, negative_sine),
    "erf": _of_element(torch.erf, erf_derivative),
    "clamp": clamp,
    "clip": clamp,
    "clamp_min": lambda x, min: clamp(x, min),
    "clamp_max": lambda x, max: clamp(x, None, max),
}
"""From the name of a function or method of torch to its layer and what that is applied to."""
