"""How the values of elements become the value of a loss, and what their gradients are scaled by."""

import torch
from torch import Tensor


def check_reduction(name: str, reduction: str, allowed: tuple[str, ...] = ("mean", "sum")) -> None:
    """Raise ValueError unless the reduction is one of those that the loss has."""
    if reduction not in allowed:
        raise ValueError(f"{name}: reduction must be one of {allowed}, got {reduction!r}")


def divisor(elements: Tensor, reduction: str) -> float:
    """What the sum over the elements is divided by."""
    if reduction == "mean":
        return elements.numel()
    batch = elements.shape[0] if elements.dim() else 1
    return {"sum": 1, "batchmean": batch, "half_mean": 2 * batch}[reduction]


def reduced(elements: Tensor, reduction: str) -> Tensor:
    """``elements.sum() / divisor(elements, reduction)``."""
    if reduction == "mean":
        return elements.mean()
    total = elements.sum()
    return total if reduction == "sum" else total / divisor(elements, reduction)


def divided(dvalue: Tensor | float, n: Tensor | float) -> Tensor | float:
    """``dvalue / n``, and 0 where n is 0: a sum over nothing has no gradient."""
    if isinstance(n, Tensor):
        return torch.where(n == 0, 0.0, dvalue / n)
    return dvalue / n if n else 0.0
