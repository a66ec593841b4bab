"""How the losses of the elements become the value of a loss, and what gradients are scaled by."""

import torch
from torch import Tensor

from funcnet.collectives import Axis

REDUCTIONS = ("none", "mean", "sum")


def check_reduction(name: str, reduction: str, allowed: tuple[str, ...] = REDUCTIONS) -> None:
    """Raise ValueError unless the reduction is one of those that the loss has."""
    if reduction not in allowed:
        raise ValueError(f"{name}: reduction must be one of {allowed}, got {reduction!r}")


def reduced(
    elements: Tensor, reduction: str, total: Tensor | float | None = None
) -> tuple[Tensor, Tensor | float]:
    """The value of a loss, and n, what the sum over the elements was divided by.

    Args:
        elements: their losses.
        reduction: "none" leaves them as they are, "sum" adds them up. "mean" divides their sum by
            their number, "batchmean" by the size of the first dimension, and "half_mean" by twice
            that.
        total: what "mean" divides by, where that is not the number of elements.
    """
    if reduction == "none":
        return elements, 1
    if reduction == "sum":
        return elements.sum(), 1
    if reduction == "mean" and total is None:
        return elements.mean(), elements.numel()
    numerator, n = summed(elements, reduction, total)
    assert n is not None
    return (numerator / n).to(elements.dtype), n


def summed(
    elements: Tensor, reduction: str, total: Tensor | float | None = None
) -> tuple[Tensor, Tensor | float | None]:
    """The sum over the elements, in float32 at least, and what the value divides it by, if it does.

    Args:
        elements, total: see `reduced`.
        reduction: any but "none".
    """
    batch = elements.shape[0] if elements.dim() else 1
    mean = elements.numel() if total is None else total
    n = {"sum": None, "mean": mean, "batchmean": batch, "half_mean": 2 * batch}[reduction]
    return wide_sum(elements), n


def of_all_ranks(
    ranks: Axis, numerator: Tensor, n: Tensor | float | None
) -> tuple[Tensor, Tensor | None]:
    """The value of the whole batch and what its sum was divided by, from those of a rank's part.

    Args:
        ranks: those that have the parts.
        numerator: the sum over this rank's elements.
        n: what its mean would divide that by; None for a value that is the sum.
    """
    if n is None:
        return ranks.sum(numerator), None
    count = torch.as_tensor(n, dtype=torch.float64, device=numerator.device)
    both = ranks.sum(torch.stack((numerator.double(), count)))
    return (both[0] / both[1]).to(numerator.dtype), both[1].to(numerator.dtype)


def wide_sum(values: Tensor) -> Tensor:
    """The sum in float32 at least: half precision cannot count far."""
    return values.sum(dtype=torch.promote_types(values.dtype, torch.float32))


def divided(dvalue: Tensor | float, n: Tensor | float) -> Tensor | float:
    """``dvalue / n``, and 0 where n is 0: a sum over nothing has no gradient."""
    if isinstance(n, (int, float)):
        return dvalue if n == 1 else dvalue / n if n else 0.0
    return torch.where(n == 0, 0.0, dvalue / n)
