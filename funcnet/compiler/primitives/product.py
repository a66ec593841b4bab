"""Products of matrices, and of stacks of them: small ones inline, large ones cut for the caches."""

from collections.abc import Sequence
from typing import Any

import torch

from funcnet.compiler.errors import UnsupportedError
from funcnet.compiler.primitives import C_TYPES, Operand, Primitive, any_order, word

aten = torch.ops.aten


def _product(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    return _call("product", operands, results, options)


def _summed(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    return _call("summed_products", operands, results, options)


def _call(
    function: str, operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    *biases, a, b = operands
    (c,) = results.values()
    dtype = c.value.dtype
    if dtype not in C_TYPES or dtype == torch.bool or options.keys() - {"alpha", "beta"}:
        raise UnsupportedError(f"a product in {dtype}")
    alpha, beta = [_factor(options.get(name, 1), dtype) for name in ("alpha", "beta")]
    if beta == 0:
        # Then it is not read, whatever it holds.
        biases = []
    *stack, m, k = a.value.shape
    n = b.value.shape[-1]
    if not c.value.numel():
        return ""
    of_bias = _strides(biases[0].value.expand(c.value.shape)) if biases else (0, 0, 0)
    *of_c, by_column = _strides(c.value)
    if by_column != 1 and n > 1:
        raise UnsupportedError(f"a product with strides {c.value.stride()}")
    if function == "summed_products" and not stack[0]:
        # The sum of no products is one of no columns.
        stack, k = [1], 0
    strides = [*_strides(a.value), *_strides(b.value), *of_bias, *of_c]
    sizes = ", ".join(map(str, [*(stack or [1]), m, n, k, *strides]))
    c_type, has_bias = C_TYPES[dtype], word(biases)
    inputs = [f"(const {c_type}*)({each.address})" for each in (a, b, *biases)]
    pointers = [*inputs, "nullptr"][:3] + [f"({c_type}*)({c.address})"]
    if function != "product" or alpha != 1 or (biases and beta != 1):
        pointers += map(repr, (alpha, beta))
    return f"funcnet::{function}<{c_type}, {has_bias}, {sizes}, threads>({', '.join(pointers)});"


def _factor(given: Any, dtype: torch.dtype) -> Any:
    """A factor as it stands in C++; torch refuses numbers that are no numbers of the dtype."""
    if dtype.is_floating_point:
        number = float(given)
        return number if abs(number) < float("inf") else _refuse(given)
    limits = torch.iinfo(dtype)
    integer = isinstance(given, int) and limits.min < int(given) <= limits.max
    return int(given) if integer else _refuse(given)


def _refuse(given: Any) -> Any:
    raise UnsupportedError(f"a product with a factor {given}")


def _strides(value: torch.Tensor) -> tuple[int, ...]:
    """Of a stack, its rows and columns."""
    return (0, 0, *value.stride())[-3:]


PRIMITIVES = [
    Primitive(
        f"aten::{name}",
        getattr(aten, name).default,
        _summed if name == "addbmm" else _product,
        "product.h",
        takes=any_order,
        is_inductors=name != "addbmm",
    )
    for name in ("mm", "addmm", "bmm", "baddbmm", "addbmm")
]
