"""Distances between rows: `torch.cdist` and `torch.pdist`.

Euclidean ones come of the differences. Where PyTorch computes them of a product of matrices, for
more than 25 rows, these are the more exact ones.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from funcnet.compiler.errors import UnsupportedError
from funcnet.compiler.primitives import Operand, Primitive, c_type, pointers, word

aten = torch.ops.aten
_NORMS = {0: "COUNT", 1: "SUM", 2: "EUCLIDEAN", math.inf: "MAXIMUM"}


def _between(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    shapes = [tuple(each.value.shape) for each in operands]
    norm = _norm(operands[0], options["p"])
    count = math.prod(results[0].value.shape[:-2])
    is_stack = [math.prod(shape[:-2]) == count for shape in shapes]
    for stacked, shape in zip(is_stack, shapes, strict=True):
        if not stacked and math.prod(shape[:-2]) != 1:
            raise UnsupportedError("cdist of stacks that broadcast along some axes")
    if not results[0].numel:
        return ""
    (rows, size), (others, _) = [shape[-2:] for shape in shapes]
    flags = [*map(word, is_stack)]
    return (
        f"funcnet::distances<{norm}, {rows}, {others}, {size}, threads>"
        f"({pointers(operands, results, 1)}, {count}, {', '.join(flags)}, {_number(options['p'])});"
    )


def _within(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    p = options.get("p", 2.0)
    norm = _norm(operands[0], p)
    if not results[0].numel:
        return ""
    rows, size = operands[0].value.shape
    given = pointers(operands, results, 1)
    return f"funcnet::distances_within<{norm}, {rows}, {size}>({given}, {_number(p)});"


def _norm(operand: Operand, p: float) -> str:
    if operand.value.dtype not in (torch.float32, torch.float64):
        raise UnsupportedError(f"distances in {operand.value.dtype}")
    return f"{c_type(operand.value)}, funcnet::Norm::{_NORMS.get(p, 'OTHER')}"


def _number(p: float) -> str:
    """The exponent in C++, which reads it only where it is finite."""
    return repr(float(p)) if math.isfinite(p) else "0.0"


PRIMITIVES = [
    Primitive("aten::_cdist_forward", aten._cdist_forward.default, _between, "distances.h"),
    Primitive("aten::_pdist_forward", aten._pdist_forward.default, _within, "distances.h"),
]
