"""Where Inductor's kernels for the CPU are not as PyTorch's, or are not used without need."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

aten = torch.ops.aten


def _var_mean_of_nothing(
    x: Tensor, dim: list[int] | None = None, *, correction: Any = None, keepdim: bool = False
) -> Any:
    """NaN, where Inductor's kernel gives 0 for the mean; other tensors are left to Inductor."""
    if x.numel():
        return NotImplemented
    mean = x.mean(dim, keepdim)
    return mean, mean.clone()


def _argmin(x: Tensor, *options: Any, **named: Any) -> Any:
    """Of equal elements the first, which Inductor's kernel for bytes does not find."""
    if x.dtype not in _BYTES:
        return NotImplemented
    return aten.argmin.default(x.to(torch.int32), *options, **named)


def _min(x: Tensor, *options: Any, **named: Any) -> Any:
    """As `_argmin`."""
    if x.dtype not in _BYTES:
        return NotImplemented
    values, indices = aten.min.dim(x.to(torch.int32), *options, **named)
    return values.to(x.dtype), indices


_BYTES = (torch.bool, torch.uint8, torch.int8)
CORRECTED = {
    aten.var_mean.correction: _var_mean_of_nothing,
    aten.argmin.default: _argmin,
    aten.min.dim: _min,
}
"""Decompositions of operators whose kernels do not give what PyTorch gives for some tensors."""


@contextlib.contextmanager
def sums_of_int64() -> Iterator[None]:
    """Have kernels add int64 at indices, which Inductor leaves to PyTorch as some GPUs cannot."""
    from torch._inductor import lowering

    with contextlib.ExitStack() as stack:
        for name in ("use_scatter_fallback", "needs_fallback_due_to_atomic_add_limitations"):
            refuses = getattr(lowering, name, None)
            if refuses is not None:
                stack.enter_context(patch.object(lowering, name, _as_of_int32(refuses)))
        yield


def _as_of_int32(function: Any) -> Any:
    """A function of dtypes that gives for int64 what it gives for int32."""
    return lambda *given: function(
        *[torch.int32 if each is torch.int64 else each for each in given]
    )
