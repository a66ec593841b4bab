"""Products of matrices, and of stacks of them: small ones inline, large ones cut for the caches."""

from collections.abc import Sequence
from typing import Any

import torch

from funcnet.compiler.errors import UnsupportedError
from funcnet.compiler.primitives import C_TYPES, Operand, Primitive

aten = torch.ops.aten
_DTYPES = (torch.float32, torch.float64)


def _call(operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]) -> str:
    *biases, a, b = operands
    (c,) = results.values()
    dtype = c.value.dtype
    if dtype not in _DTYPES:
        raise UnsupportedError(f"a product in {dtype}")
    if any([factor != 1 for factor in options.values()]):
        raise UnsupportedError("a product with alpha or beta")
    *stack, m, k = a.value.shape
    n = b.value.shape[-1]
    if not c.value.numel():
        return ""
    of_bias = _strides(biases[0].value.expand(c.value.shape)) if biases else (0, 0, 0)
    *of_c, by_column = _strides(c.value)
    if by_column != 1 and n > 1:
        raise UnsupportedError(f"a product with strides {c.value.stride()}")
    strides = [*_strides(a.value), *_strides(b.value), *of_bias, *of_c]
    sizes = ", ".join(map(str, [*(stack or [1]), m, n, k, *strides]))
    c_type, has_bias = C_TYPES[dtype], "true" if biases else "false"
    inputs = [f"(const {c_type}*)({each.address})" for each in (a, b, *biases)]
    pointers = ", ".join([*inputs, "nullptr"][:3])
    function = f"funcnet::product<{c_type}, {has_bias}, {sizes}, threads>"
    return f"{function}({pointers}, ({c_type}*)({c.address}));"


def _strides(value: torch.Tensor) -> tuple[int, ...]:
    """Of a stack, its rows and columns."""
    return (0, 0, *value.stride())[-3:]


PRIMITIVES = [
    Primitive(
        f"aten::{name}",
        getattr(aten, name).default,
        _call,
        "product.h",
        takes=lambda operand: True,
        is_inductors=True,
    )
    for name in ("mm", "addmm", "bmm", "baddbmm")
]
