"""A stable sort along an axis: by radix, where Inductor would compare the elements one by one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcnet.compiler.primitives import Operand, Primitive, c_type, lines, pointers, word


def _formula(
    x: Tensor, *, dim: int = -1, descending: bool = False, stable: bool | None = None
) -> Any:
    """Stable in any case, so that a program gives the same as the staged path."""
    return torch.sort(x, stable=True, dim=dim, descending=descending)


def _call(operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]) -> str:
    (x,) = operands
    extents = lines(x.value, options.get("dim", -1))
    given = f"{pointers(operands, results, 2)}, {extents}, {word(options.get('descending'))}"
    return f"funcnet::sort<{c_type(x.value)}>({given});"


PRIMITIVES = [Primitive("aten::sort", _formula, _call, "sort.h")]
