"""Formulas for functions of torch that take Python numbers where they take no tensors.

``torch.add(x, y, alpha=n)`` cannot have a tensor as alpha, and so no input of a program. Where jit
traces n, ``x + n * y`` is recorded instead.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import tree
from funcnet.compiler.numbers import is_traced


def by_formula(name: str, args: Any, kwargs: Any, expected: Any) -> Any:
    """What the function of this name gives, by its formula.

    Low precision is computed in float32 and rounded once, as PyTorch's kernels do.

    Raises:
        KeyError: there is no formula.
    """
    in_place = name.endswith("_") and not name.endswith("__")
    formula = _FORMULAS[name.removesuffix("_") if in_place else name]
    if kwargs.get("inplace") or kwargs.get("out") is not None:
        raise KeyError(name)
    if formula is _set:
        return _set(*args)
    positional, named = tree.map(_wide, (args, kwargs))
    result = formula(*positional, **{key: named[key] for key in named if key != "inplace"})
    if isinstance(expected, Tensor):
        result = result.to(expected.dtype)
    return args[0].copy_(result) if in_place else result


def _wide(leaf: Any) -> Any:
    narrow = isinstance(leaf, Tensor) and leaf.dtype in (torch.bfloat16, torch.float16)
    return leaf.float() if narrow else leaf


def _filled(number: Any, like: Tensor, shape: Any = ()) -> Tensor:
    """A tensor of this number in the dtype of another one."""
    if is_traced(number):
        made: Tensor = number._arithmetic.input(number)
        return made.to(like.device, like.dtype, copy=True).expand(shape)
    return torch.full(shape, number, dtype=like.dtype, device=like.device)


def _reduced(loss: Tensor, reduction: int) -> Tensor:
    """What a loss makes of its elements, by torch's number for none, mean and sum."""
    return (lambda: loss, loss.mean, loss.sum)[reduction]()


def _add(x: Any, other: Any, *, alpha: Any = 1) -> Tensor:
    return x + alpha * other


def _sub(x: Any, other: Any, *, alpha: Any = 1) -> Tensor:
    return x - alpha * other


def _elu(x: Tensor, alpha: Any = 1.0) -> Tensor:
    return torch.where(x > 0, x, alpha * torch.expm1(x))


def _celu(x: Tensor, alpha: Any = 1.0) -> Tensor:
    return torch.where(x > 0, x, alpha * torch.expm1(x / alpha))


def _softplus(x: Tensor, beta: Any = 1.0, threshold: Any = 20.0) -> Tensor:
    return torch.where(x * beta > threshold, x, torch.log1p(torch.exp(x * beta)) / beta)


def _softshrink(x: Tensor, lambd: Any = 0.5) -> Tensor:
    # 0 times NaN is NaN.
    return torch.where(x > lambd, x - lambd, torch.where(x < -lambd, x + lambd, x * 0))


def _pad(x: Tensor, pad: Any, mode: str = "constant", value: Any = None) -> Tensor:
    if mode != "constant":
        raise KeyError(mode)
    outside = F.pad(torch.zeros_like(x, dtype=torch.bool), pad, value=True)
    return torch.where(outside, _filled(value, x), F.pad(x, pad))


def _linspace(start: Any, end: Any, steps: int, **options: Any) -> Tensor:
    """From both ends to the middle, as PyTorch's kernels go."""
    where = torch.arange(steps, device=options.get("device"))
    dtype = options.get("dtype") or torch.get_default_dtype()
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    index = where.to(exact)
    step = (end - start) / max(steps - 1, 1)
    upwards, downwards = step * index + start, step * (index - (steps - 1)) + end
    return torch.where(where < (steps + 1) // 2, upwards, downwards).to(dtype)


def _logspace(start: Any, end: Any, steps: int, base: Any = 10.0, **options: Any) -> Tensor:
    return base ** _linspace(start, end, steps, **options)


def _nan_to_num(x: Tensor, nan: Any = None, posinf: Any = None, neginf: Any = None) -> Tensor:
    limits = torch.finfo(x.dtype)
    y = torch.where(x == math.inf, limits.max if posinf is None else posinf, x)
    y = torch.where(x == -math.inf, limits.min if neginf is None else neginf, y)
    return torch.where(x.isnan(), 0.0 if nan is None else nan, y)


def _isclose(
    x: Tensor, other: Tensor, rtol: Any = 1e-5, atol: Any = 1e-8, equal_nan: bool = False
) -> Tensor:
    apart = (x - other).abs()
    close = (x == other) | (apart.isfinite() & (apart <= atol + (rtol * other).abs()))
    return close | (x.isnan() & other.isnan()) if equal_nan else close


def _of_product(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def formula(x: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
        y = alpha * product(a, b)
        # With a beta of 0, x counts as 0 even where it is NaN.
        return y if beta == 0 else beta * x + y

    return formula


def _huber_loss(x: Tensor, target: Tensor, reduction: int = 1, delta: Any = 1.0) -> Tensor:
    z = (x - target).abs()
    loss = torch.where(z < delta, 0.5 * z * z, delta * (z - 0.5 * delta))
    return _reduced(loss, reduction)


def _smooth_l1_loss(x: Tensor, target: Tensor, reduction: int = 1, beta: Any = 1.0) -> Tensor:
    z = (x - target).abs()
    loss = torch.where(z < beta, 0.5 * z * z / beta, z - 0.5 * beta) if beta > 0 else z
    return _reduced(loss, reduction)


def _set(x: Tensor, index: Any, value: Any) -> None:
    x[index] = _filled(value, x)


def _floor_divide(x: Any, other: Any) -> Tensor:
    return torch.div(x, other, rounding_mode="floor")


_FORMULAS: dict[str, Callable[..., Any]] = {
    "add": _add,
    "sub": _sub,
    "subtract": _sub,
    "rsub": lambda x, other, alpha=1: other - alpha * x,
    "addcmul": lambda x, a, b, *, value=1: x + value * a * b,
    "addcdiv": lambda x, a, b, *, value=1: x + value * a / b,
    "leaky_relu": lambda x, negative_slope=0.01: torch.where(x > 0, x, x * negative_slope),
    "elu": _elu,
    "celu": _celu,
    "softplus": _softplus,
    "hardtanh": lambda x, min_val=-1.0, max_val=1.0: x.clamp_min(min_val).clamp_max(max_val),
    "hardshrink": lambda x, lambd=0.5: torch.where((x >= -lambd) & (x <= lambd), 0.0, x),
    "softshrink": _softshrink,
    "threshold": lambda x, threshold, value: torch.where(x <= threshold, value, x),
    "pad": _pad,
    "linspace": _linspace,
    "logspace": _logspace,
    "nan_to_num": _nan_to_num,
    "isclose": _isclose,
    "quantile": lambda x, q, *rest, **options: torch.quantile(x, _filled(q, x), *rest, **options),
    "nanquantile": lambda x, q, *rest, **options: torch.nanquantile(
        x, _filled(q, x), *rest, **options
    ),
    "logit": lambda x, eps: torch.logit(x.clamp_min(eps).clamp_max(1 - eps)),
    "addmm": _of_product(torch.mm),
    "addmv": _of_product(torch.mv),
    "addr": _of_product(torch.outer),
    "baddbmm": _of_product(torch.bmm),
    "addbmm": _of_product(lambda a, b: torch.bmm(a, b).sum(0)),
    "index_add": lambda x, dim, index, source, *, alpha=1: x.index_add(dim, index, alpha * source),
    "index_fill": lambda x, dim, index, value: x.index_fill(dim, index, _filled(value, x)),
    "scatter": lambda x, dim, index, value, **options: x.scatter(
        dim, index, _filled(value, x, index.shape), **options
    ),
    "__setitem__": _set,
    "floor_divide": _floor_divide,
    "__floordiv__": _floor_divide,
    "__rfloordiv__": lambda x, other: (
        _floor_divide(_filled(other, x), x)
        if x.is_floating_point() or isinstance(other, int)
        else _floor_divide(other, x)
    ),
    "huber_loss": _huber_loss,
    "smooth_l1_loss": _smooth_l1_loss,
}
"""By the name of torch's function; their parameters are that function's."""
