"""Cumulative sums, products, logarithms of sums of exponentials, maxima and minima along an axis.

They accumulate as PyTorch does on the CPU: float32 in double, 16 bits in float32, integers in
int64.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from funcnet.compiler.errors import UnsupportedError
from funcnet.compiler.primitives import Operand, Primitive, c_type, lines, pointers

aten = torch.ops.aten


def _cumulative(
    operation: str,
    operands: Sequence[Operand],
    results: dict[int, Operand],
    options: dict[str, Any],
) -> str:
    (x,), y = operands, results[0]
    dtype = y.value.dtype
    if dtype == torch.bool or (operation == "LogSumExp" and not dtype.is_floating_point):
        raise UnsupportedError(f"{operation.lower()} so far in {dtype}")
    source, made = c_type(x.value), c_type(y.value)
    given = f"(const {source}*)({x.address}), ({made}*)({y.address})"
    if not x.value.dim():  # as it is: -0 stays -0
        return f"*({made}*)({y.address}) = funcnet::cast<{made}>(*(const {source}*)({x.address}));"
    if not x.numel:
        return ""
    numbers = f"{lines(x.value, options['dim'])}, threads"
    return f"funcnet::cumulative<funcnet::{operation}, {source}, {made}, {numbers}>({given});"


def _extremes(
    greatest: str, operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    (x,) = operands
    if not x.numel:
        return ""
    number = c_type(x.value)
    function = (
        f"cumulative_extremes<{number}, {greatest}, {lines(x.value, options['dim'])}, threads>"
    )
    return f"funcnet::{function}({pointers(operands, results, 2)});"


_SUMS = {"cumsum": "Sum", "cumprod": "Product", "logcumsumexp": "LogSumExp"}
PRIMITIVES = [
    Primitive(
        f"aten::{name}",
        getattr(aten, name).default,
        functools.partial(_cumulative, operation),
        "cumulative.h",
    )
    for name, operation in _SUMS.items()
] + [
    Primitive(
        f"aten::{name}",
        getattr(aten, name).default,
        functools.partial(_extremes, greatest),
        "cumulative.h",
    )
    for name, greatest in (("cummax", "true"), ("cummin", "false"))
]
