"""Which keys a query of attention sees: masks that are given, causality, windows, padding."""

import torch
from torch import Tensor

from funcnet.errors import require

Shape = tuple[int, ...]


def visible(queries: Tensor, keys: Tensor, window: int | None, is_causal: bool) -> Tensor:
    """Which keys a query sees, by the positions of both: bool, of shape (queries, keys).

    Causal: those that do not come after it. With a window: those less than ``window`` away.

    >>> visible(torch.arange(3), torch.arange(3), 2, True).int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [0, 1, 1]], dtype=torch.int32)
    """
    distance = queries[:, None] - keys
    seen = torch.ones_like(distance, dtype=torch.bool)
    if is_causal:
        seen = distance >= 0
    if window is not None:
        seen = seen & (distance.abs() < window)
    return seen


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added to scores: minus infinity where one of bool is False."""
    if mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=dtype, device=mask.device)
        return zero.where(mask, -torch.inf)
    return mask.to(dtype)


def both(a: Tensor | None, b: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask that hides what one of two hides; of bool where both are."""
    if a is None or b is None:
        return b if a is None else a
    if a.dtype == b.dtype == torch.bool:
        return a & b
    return additive(a, dtype) + additive(b, dtype)


def require_mask(name: str, mask: Tensor, shapes: list[Shape], dtype: torch.dtype) -> None:
    """Raise ValueError or TypeError unless a mask has a right dtype and one of these shapes."""
    right = mask.dtype == torch.bool or mask.dtype == dtype
    wrong = f"expects {name} of bool, or of {dtype} to add to the scores, got {mask.dtype}"
    require(right, wrong, TypeError)
    forms = " or ".join(map(str, shapes))
    require(
        tuple(mask.shape) in shapes, f"expects {name} of shape {forms}, got {tuple(mask.shape)}"
    )


def require_broadcast(name: str, mask: Tensor, shape: Shape, dtype: torch.dtype) -> None:
    """Raise ValueError or TypeError unless a mask has a right dtype and broadcasts to a shape."""
    pairs = zip(reversed(mask.shape), reversed(shape), strict=False)
    fits = mask.dim() <= len(shape) and all([size in (1, full) for size, full in pairs])
    require(fits, f"expects {name} that broadcasts to {shape}, got {tuple(mask.shape)}")
    require_mask(name, mask, [tuple(mask.shape)], dtype)
