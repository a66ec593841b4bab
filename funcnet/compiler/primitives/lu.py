"""Small matrices by LU factors: solve, inverse, determinant; larger ones are LAPACK's, called."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from funcnet.compiler.errors import UnsupportedError
from funcnet.compiler.primitives import C_TYPES, Operand, Primitive, any_order, word

aten = torch.ops.aten
LARGEST = 32
"""The most rows of a matrix: from there on LAPACK, in blocks for the caches, is faster."""
_MOST_COLUMNS = 128


class Stack(NamedTuple):
    """A stack of matrices in memory; vectors are matrices of one column, numbers of one row too.

    Attributes:
        address: the C++ expression for its start; none for what is not given.
        batch: the shape of the stack.
        steps: its strides.
        shape: the shape of one matrix.
        strides: the strides of its rows and columns.
    """

    address: str | None
    batch: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    shape: tuple[int, ...] = (0, 0)
    strides: tuple[int, ...] = (0, 0)

    def pointer(self, batch: Sequence[int], c_type: str) -> str:
        """One of them, in loops over a stack of this shape, to which this one is expanded."""
        if self.address is None:
            return f"({c_type}*)nullptr"
        first = len(batch) - len(self.batch)
        steps = zip(self.batch, self.steps, strict=True)
        terms = [f" + s{i} * {step}" for i, (size, step) in enumerate(steps, first) if size != 1]
        return f"({c_type}*)({self.address}){''.join(terms)}"

    def strided(self, batch: Sequence[int], c_type: str) -> str:
        """The same, with its strides."""
        return f"{{{self.pointer(batch, c_type)}, {self.strides[0]}, {self.strides[1]}}}"


def stack_of(operand: Operand | None, rank: int = 2, turned: bool = False) -> Stack:
    """A tensor as a stack of matrices (of rank 2), vectors (1) or numbers (0).

    Args:
        operand: the tensor, or None.
        rank: the axes of one of them.
        turned: whether matrices are transposed.
    """
    if operand is None:
        return Stack(None)
    value = operand.value
    first = value.dim() - rank
    shape, strides = (*value.shape[first:], 1, 1)[:2], (*value.stride()[first:], 0, 0)[:2]
    if turned and rank == 2:
        shape, strides = shape[::-1], strides[::-1]
    steps = value.stride()[:first]
    return Stack(operand.address, tuple(value.shape[:first]), tuple(steps), shape, strides)


def for_each(batch: Sequence[int], statement: str) -> str:
    """A C++ statement for each matrix of a stack."""
    heads = [f"for (int64_t s{i} = 0; s{i} < {n}; ++s{i}) " for i, n in enumerate(batch)]
    return f"{''.join(heads)}{{ {statement} }}"


def c_type_of(operand: Operand) -> str:
    """The C++ type of a matrix's numbers, if there are kernels for such a matrix."""
    dtype, shape = operand.value.dtype, operand.value.shape
    if dtype not in (torch.float32, torch.float64):
        raise UnsupportedError(f"a matrix of {dtype}")
    if max(shape[-2:]) > LARGEST:
        raise UnsupportedError(f"a matrix of more than {LARGEST} rows or columns")
    return C_TYPES[dtype]


def columns_of(stack: Stack) -> int:
    """How many right-hand sides there are, if there are kernels for so many."""
    if stack.shape[1] > _MOST_COLUMNS:
        raise UnsupportedError(f"more than {_MOST_COLUMNS} right-hand sides")
    return stack.shape[1]


def _check(options: dict[str, Any]) -> None:
    if options.get("check_errors") or not options.get("pivot", True):
        raise UnsupportedError("a factorization that raises, or has no pivots")


def _solve(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    _check(options)
    a, b = operands
    left = options.get("left", True)
    is_vector = b.value.dim() == 1 or b.value.shape == a.value.shape[:-1]
    rank = 1 if is_vector else 2
    given, found = [stack_of(each, rank, not left) for each in (b, results.get(0))]
    others = [results.get(index) for index in (1, 2, 3)]
    return _solved(a, given, found, others, left or is_vector)


def _inverse(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    _check(options)
    (a,) = operands
    return _solved(a, Stack(None), stack_of(results.get(0)), [None, None, results.get(1)], True)


def _solved(a: Operand, b: Stack, x: Stack, others: Sequence[Operand | None], left: bool) -> str:
    """X = A^-1 B, or its transpose; the others are the factors, pivots and failures."""
    c_type, matrix, lu = c_type_of(a), stack_of(a), stack_of(others[0])
    pivots, info = stack_of(others[1], 1), stack_of(others[2], 0)
    n = matrix.shape[0]
    right = n if b.address is None else columns_of(b)
    batch = matrix.batch
    if b.address is not None and torch.broadcast_shapes(batch, b.batch) != batch:
        raise UnsupportedError("a matrix with several stacks of right-hand sides")
    arguments = [
        *(matrix.strided(batch, f"const {c_type}"), b.strided(batch, f"const {c_type}")),
        *(x.strided(batch, c_type), lu.strided(batch, c_type)),
        *(pivots.pointer(batch, "int32_t"), info.pointer(batch, "int32_t")),
    ]
    function = f"funcnet::solve<{c_type}, {n}, {right}, {word(not left)}>"
    return for_each(batch, f"{function}({', '.join(arguments)});")


def _factor(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    _check(options)
    (a,) = operands
    c_type, matrix = c_type_of(a), stack_of(a)
    lu = stack_of(results.get(0)).strided(matrix.batch, c_type)
    pivots = stack_of(results.get(1), 1).pointer(matrix.batch, "int32_t")
    info = stack_of(results.get(2), 0).pointer(matrix.batch, "int32_t")
    given = matrix.strided(matrix.batch, f"const {c_type}")
    function = f"funcnet::lu_factor<{c_type}, {matrix.shape[0]}, {matrix.shape[1]}>"
    return for_each(matrix.batch, f"{function}({given}, {lu}, {pivots}, {info});")


def _lu(operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]) -> str:
    _check(options)
    (a,) = operands
    c_type, matrix = c_type_of(a), stack_of(a)
    made = [stack_of(results.get(index)).strided(matrix.batch, c_type) for index in range(3)]
    given = matrix.strided(matrix.batch, f"const {c_type}")
    function = f"funcnet::lu<{c_type}, {matrix.shape[0]}, {matrix.shape[1]}>"
    return for_each(matrix.batch, f"{function}({', '.join([given, *made])});")


def _lu_solve(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    factors, order, b = operands
    left, adjoint = options.get("left", True), options.get("adjoint", False)
    c_type, lu, pivots = c_type_of(factors), stack_of(factors), stack_of(order, 1)
    given, found = stack_of(b, 2, not left), stack_of(results[0], 2, not left)
    batch = found.batch
    arguments = [
        *(lu.strided(batch, f"const {c_type}"), pivots.pointer(batch, "const int32_t")),
        *(given.strided(batch, f"const {c_type}"), found.strided(batch, c_type)),
    ]
    sizes = f"{c_type}, {lu.shape[0]}, {columns_of(given)}, {word(adjoint == left)}"
    return for_each(batch, f"funcnet::lu_solve<{sizes}>({', '.join(arguments)});")


def _determinant(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    return _determined(operands[0], results.get(0), None, None, results.get(1), results.get(2))


def _logarithm(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    return _determined(operands[0], None, *[results.get(index) for index in range(4)])


def _determined(a: Operand, *made: Operand | None) -> str:
    # As torch does: to LAPACK, contiguous rows are columns.
    c_type, matrix = c_type_of(a), stack_of(a, 2, a.value.is_contiguous())
    batch = matrix.batch
    numbers = [stack_of(each, 0).pointer(batch, c_type) for each in made[:3]]
    lu = stack_of(made[3]).strided(batch, c_type)
    pivots = stack_of(made[4], 1).pointer(batch, "int32_t")
    given = matrix.strided(batch, f"const {c_type}")
    arguments = ", ".join([given, *numbers, lu, pivots])
    function = f"funcnet::determinant<{c_type}, {matrix.shape[0]}>"
    return for_each(batch, f"{function}({arguments});")


PRIMITIVES = [
    Primitive(f"aten::{name}", getattr(aten, name).default, call, "lu.h", takes=any_order)
    for name, call in (
        ("_linalg_solve_ex", _solve),
        ("linalg_inv_ex", _inverse),
        ("linalg_lu_factor_ex", _factor),
        ("linalg_lu", _lu),
        ("linalg_lu_solve", _lu_solve),
        ("_linalg_det", _determinant),
        ("_linalg_slogdet", _logarithm),
    )
]
