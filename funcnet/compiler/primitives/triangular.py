"""Small triangular systems; larger ones are LAPACK's, called."""

from collections.abc import Sequence
from typing import Any

import torch

from funcnet.compiler.primitives import Operand, Primitive, any_order, word
from funcnet.compiler.primitives.lu import c_type_of, columns_of, for_each, stack_of

aten = torch.ops.aten


def _solve(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    t, b = operands
    right = not options.get("left", True)
    upper, unit = options["upper"], options.get("unitriangular", False)
    return _solved(t, b, results[0], right, upper != right, unit, right)


def _solve_old(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    b, t = operands
    turned, upper = options.get("transpose", False), options.get("upper", True)
    unit = options.get("unitriangular", False)
    statements = [_copied(t, results[1])] if 1 in results else []
    if 0 in results:
        statements.append(_solved(t, b, results[0], turned, upper != turned, unit, False))
    return " ".join(statements)


def _copied(t: Operand, copy: Operand) -> str:
    c_type, given, made = c_type_of(t), stack_of(t), stack_of(copy)
    arguments = [given.strided(made.batch, f"const {c_type}"), made.strided(made.batch, c_type)]
    function = f"funcnet::copy_matrix<{c_type}, {given.shape[0]}>"
    return for_each(made.batch, f"{function}({', '.join(arguments)});")


def _solved(
    t: Operand, b: Operand, x: Operand, turned: bool, upper: bool, unit: bool, right: bool
) -> str:
    """X = T^-1 B where T is upper or lower when it has been turned; the transposes if ``right``."""
    c_type, matrix = c_type_of(t), stack_of(t, 2, turned)
    given, found = stack_of(b, 2, right), stack_of(x, 2, right)
    sizes = f"{word(upper)}, {word(unit)}, {c_type}, {matrix.shape[0]}, {columns_of(given)}"
    arguments = [each.strided(found.batch, f"const {c_type}") for each in (matrix, given)]
    arguments.append(found.strided(found.batch, c_type))
    return for_each(found.batch, f"funcnet::solve_triangular<{sizes}>({', '.join(arguments)});")


PRIMITIVES = [
    Primitive(f"aten::{name}", getattr(aten, name).default, call, "triangular.h", takes=any_order)
    for name, call in (("linalg_solve_triangular", _solve), ("triangular_solve", _solve_old))
]
