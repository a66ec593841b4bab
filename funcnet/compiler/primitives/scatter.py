"""Reductions at indices that Inductor has no kernels for, and `torch.masked_scatter`.

Sums by ``scatter_add``, ``index_add`` and ``index_put`` are Inductor's, which fuses them.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcnet.compiler.errors import UnsupportedError
from funcnet.compiler.primitives import Operand, Primitive, c_type, word

aten = torch.ops.aten
_REDUCTIONS = {
    "sum": "SUM",
    "add": "SUM",
    "prod": "PRODUCT",
    "multiply": "PRODUCT",
    "mean": "MEAN",
    "amax": "MAXIMUM",
    "amin": "MINIMUM",
}
Axis = tuple[int, int, int, int]
"""Of an axis: how many elements are scattered, and the strides of index, source and result."""


def _of_elements(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    """Each element of the source has an index of its own."""
    x, index, source = operands
    shape = tuple(index.value.shape) or (1,)
    strides = [each.value.stride() or (1,) for each in (index, source, x)]
    return _reduction(operands, results[0], options, [*zip(shape, *strides, strict=True)])


def _of_slices(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    """Each slice of the source along an axis has an index."""
    x, index, source = operands
    shape = tuple(source.value.shape) or (1,)
    of_index = [0] * len(shape)
    of_index[options["dim"] % len(shape)] = 1
    strides = [each.value.stride() or (1,) for each in (source, x)]
    if index.numel != shape[options["dim"] % len(shape)]:
        raise UnsupportedError("index_reduce with another number of indices than slices")
    return _reduction(operands, results[0], options, [*zip(shape, of_index, *strides, strict=True)])


def _reduction(
    operands: Sequence[Operand], result: Operand, options: dict[str, Any], axes: list[Axis]
) -> str:
    x, index, source = operands
    reduction = _REDUCTIONS[options["reduce"]]
    if reduction == "MEAN" and x.value.dtype == torch.bool:
        raise UnsupportedError("a mean of torch.bool")
    if source.value.dtype != x.value.dtype:
        raise UnsupportedError(f"{source.value.dtype} scattered into {x.value.dtype}")
    if not x.numel:
        return ""
    dim = options["dim"] % len(axes)
    places = (tuple(x.value.shape) or (1,))[dim]
    # Axes that lie one in the other are one.
    merged: list[Axis] = []
    for axis, found in enumerate(axes):
        last = merged[-1] if merged else None
        if last is not None and dim not in (axis, axis - 1):
            inside = [found[0] * step for step in found[1:]]
            if [*last[1:]] == inside:
                merged[-1] = (last[0] * found[0], *found[1:])
                continue
        if axis == dim:
            position = len(merged)
        merged.append(found)
    numbers = ", ".join(["{" + ", ".join(map(str, row)) + "}" for row in zip(*merged, strict=True)])
    if 0 in [axis[0] for axis in merged]:
        numbers = ", ".join(["{" + ", ".join("0" * len(merged)) + "}"] * 4)
    number, of_index = c_type(x.value), c_type(index.value)
    includes = word(options.get("include_self", True))
    arguments = f"{number}, funcnet::Reduction::{reduction}, {includes}, {x.numel}, {len(merged)}"
    given = [f"(const {number}*)({x.address})", f"(const {of_index}*)({index.address})"]
    given += [f"(const {number}*)({source.address})", f"({number}*)({result.address})"]
    sizes = f"{{{numbers}, {places}, {dim}}}"
    function = f"scatter_reduce<{arguments}, {position}, {of_index}>"
    return f"funcnet::{function}({', '.join(given)}, {sizes});"


def _masked_scatter(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    x, mask, source = operands
    result = results[0]
    if not x.value.shape == mask.value.shape == result.value.shape:
        raise UnsupportedError("masked_scatter of tensors that broadcast")
    number = c_type(x.value)
    given = [f"(const {number}*)({x.address})", f"(const bool*)({mask.address})"]
    given += [f"(const {number}*)({source.address})", f"({number}*)({result.address})"]
    return f"funcnet::masked_scatter({', '.join(given)}, {result.numel}, {source.numel});"


def _scatter_formula(x: Tensor, *given: Any, function: Any, **options: Any) -> Tensor:
    """With the arguments in the order of the schema, in which an axis comes before the index."""
    return function(x, options.pop("dim"), *given, **options)


PRIMITIVES = [
    Primitive(
        "aten::scatter_reduce",
        functools.partial(_scatter_formula, function=torch.scatter_reduce),
        _of_elements,
        "scatter.h",
    ),
    Primitive(
        "aten::scatter.reduce",
        functools.partial(_scatter_formula, function=torch.scatter),
        _of_elements,
        "scatter.h",
    ),
    Primitive(
        "aten::index_reduce",
        functools.partial(_scatter_formula, function=torch.index_reduce),
        _of_slices,
        "scatter.h",
    ),
    Primitive("aten::masked_scatter", torch.masked_scatter, _masked_scatter, "scatter.h"),
]
