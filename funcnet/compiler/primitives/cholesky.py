"""Small matrices by Cholesky factors; larger ones are LAPACK's, called."""

from collections.abc import Sequence
from typing import Any

import torch

from funcnet.compiler.errors import UnsupportedError
from funcnet.compiler.primitives import Operand, Primitive, any_order
from funcnet.compiler.primitives.lu import c_type_of, columns_of, for_each, stack_of

aten = torch.ops.aten


def _factor(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    if options.get("check_errors"):
        raise UnsupportedError("a factorization that raises")
    (a,) = operands
    c_type, turned = c_type_of(a), not options.get("upper", False)
    matrix, factor = stack_of(a, 2, turned), stack_of(results.get(0), 2, turned)
    given = matrix.strided(matrix.batch, f"const {c_type}")
    made = factor.strided(matrix.batch, c_type)
    info = stack_of(results.get(1), 0).pointer(matrix.batch, "int32_t")
    function = f"funcnet::cholesky<{c_type}, {matrix.shape[0]}>"
    return for_each(matrix.batch, f"{function}({given}, {made}, {info});")


def _solve(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    b, factor = operands
    c_type = c_type_of(factor)
    upper = stack_of(factor, 2, not options.get("upper", False))
    given, found = stack_of(b), stack_of(results[0])
    arguments = [
        *(upper.strided(found.batch, f"const {c_type}"),),
        *(given.strided(found.batch, f"const {c_type}"), found.strided(found.batch, c_type)),
    ]
    function = f"funcnet::cholesky_solve<{c_type}, {upper.shape[0]}, {columns_of(given)}>"
    return for_each(found.batch, f"{function}({', '.join(arguments)});")


PRIMITIVES = [
    Primitive(f"aten::{name}", getattr(aten, name).default, call, "cholesky.h", takes=any_order)
    for name, call in (("linalg_cholesky_ex", _factor), ("cholesky_solve", _solve))
]
