"""Bisection in sorted sequences: `torch.searchsorted` and `torch.bucketize`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcnet.compiler.errors import UnsupportedError
from funcnet.compiler.primitives import C_TYPES, Operand, Primitive, c_type, word


def _searchsorted(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    number = options.get("self")
    sequence, *given = operands
    value = given.pop(0) if number is None else None
    side = options.get("side")
    right = bool(options.get("right", False))
    if side == "left" and right:
        raise UnsupportedError("searchsorted with side='left' and right=True")
    return _search(sequence, value, number, given, right or side == "right", results[0])


def _bucketize(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    *given, boundaries = operands
    number = options.get("self")
    value = None if given == [] else given[0]
    return _search(boundaries, value, number, [], bool(options.get("right", False)), results[0])


def _search(
    sequence: Operand,
    value: Operand | None,
    number: Any,
    sorters: Sequence[Operand],
    right: bool,
    found: Operand,
) -> str:
    """The call: of a value that is a tensor or a number."""
    other: Any = number if value is None else value.value
    common = torch.result_type(sequence.value, other)
    if common not in C_TYPES or common == torch.bool:
        raise UnsupportedError(f"a search for {common}")
    if not found.numel:
        return ""
    shape = tuple(sequence.value.shape)
    rows = math.prod(shape[:-1])
    numbers = (
        f"{C_TYPES[common]}, {word(right)}, {rows}, {shape[-1]}, {found.numel // rows}, threads"
    )
    given = [f"(const {c_type(sequence.value)}*)({sequence.address})"]
    given += [f"(const int64_t*)({each.address})" for each in sorters] or ["nullptr"]
    made = f"({c_type(found.value)}*)({found.address})"
    if value is not None:
        given.append(f"(const {c_type(value.value)}*)({value.address})")
        return f"funcnet::search<{numbers}>({', '.join(given)}, {made});"
    return (
        f"{{ const {'double' if isinstance(number, float) else 'int64_t'} number = "
        f"{_literal(number)}; funcnet::search<{numbers}>({', '.join(given)}, &number, {made}); }}"
    )


def _literal(number: float) -> str:
    """A number in C++."""
    if isinstance(number, float) and not math.isfinite(number):
        sign = "-" if number < 0 else ""
        name = "quiet_NaN" if math.isnan(number) else "infinity"
        return f"{sign}std::numeric_limits<double>::{name}()"
    return repr(number) if isinstance(number, float) else f"{int(number)}LL"


def _searchsorted_formula(sequence: Tensor, *given: Tensor, **options: Any) -> Tensor:
    number = options.pop("self", None)
    value, *sorter = given if number is None else (number, *given)
    if sorter:
        options["sorter"] = sorter[0]
    return torch.searchsorted(sequence, value, **options)


def _bucketize_formula(*given: Tensor, **options: Any) -> Tensor:
    number = options.pop("self", None)
    value, boundaries = given if number is None else (number, *given)
    return torch.bucketize(value, boundaries, **options)


PRIMITIVES = [
    Primitive("aten::searchsorted", _searchsorted_formula, _searchsorted, "search.h"),
    Primitive("aten::bucketize", _bucketize_formula, _bucketize, "search.h"),
]
