"""A stable sort along an axis: by radix, where Inductor would compare the elements one by one."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from funcnet.compiler.errors import UnsupportedError
from funcnet.compiler.primitives import C_TYPES, Operand, Primitive


def _formula(
    x: Tensor, *, dim: int = -1, descending: bool = False, stable: bool | None = None
) -> Any:
    """Stable in any case, so that a program gives the same as the staged path."""
    return torch.sort(x, stable=True, dim=dim, descending=descending)


def _call(operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]) -> str:
    x, value = operands[0]
    c_type = C_TYPES.get(value.dtype)
    if c_type is None:
        raise UnsupportedError(f"a sort of {value.dtype}")
    out = [results[each].address if each in results else "0" for each in (0, 1)]
    shape = tuple(value.shape) or (1,)
    axis = options.get("dim", -1) % len(shape)
    extents = f"{prod(shape[:axis])}, {shape[axis]}, {prod(shape[axis + 1 :])}"
    descending = "true" if options.get("descending", False) else "false"
    return (
        f"funcnet::sort<{c_type}>((const {c_type}*)({x}), ({c_type}*)({out[0]}), "
        f"(int64_t*)({out[1]}), {extents}, {descending});"
    )


PRIMITIVES = [Primitive("aten::sort", _formula, _call, "sort.h")]
