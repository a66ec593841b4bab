"""Functions of torch whose shapes are known, but that read values on the way: their formulas.

PyTorch warns of weights that sum to zero, say, and for that reads the sum. While a function is
recorded, these take the place of such functions.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _combinations(x: Tensor, r: int = 2, with_replacement: bool = False) -> Tensor:
    if x.dim() != 1:
        raise RuntimeError(f"Expect a 1D vector, but got shape {[*x.shape]}")
    if r < 0:
        raise RuntimeError(f"Expect a non-negative number, but got {r}")
    choose: Any = itertools.combinations
    if with_replacement:
        choose = itertools.combinations_with_replacement
    chosen = [*choose(range(x.shape[0]), r)]
    if not r or not chosen:
        return x.new_empty(len(chosen) if r else 0, *([r] if r else []))
    return x[torch.tensor(chosen, device=x.device)]


def _cov(
    x: Tensor,
    *,
    correction: int = 1,
    fweights: Tensor | None = None,
    aweights: Tensor | None = None,
) -> Tensor:
    if x.dim() > 2 or x.dtype == torch.bool:
        raise RuntimeError("cov(): expected input to have two or fewer dimensions, and not of bool")
    rows = x.reshape(1, -1) if x.dim() < 2 else x
    weights = fweights
    if aweights is not None:
        weights = aweights if weights is None else weights * aweights
    weighted = rows if weights is None else rows * weights
    total = torch.full((), rows.shape[1], device=x.device) if weights is None else weights.sum()
    mean = weighted.sum(1) / total
    freedom = total - correction
    if weights is not None and aweights is not None and correction:
        freedom = total - correction * (weights * aweights).sum() / total
    centred = rows - mean.unsqueeze(1)
    other = centred if weights is None else centred * weights
    return (centred @ other.mT.conj() / freedom.clamp(min=0)).squeeze()


def _corrcoef(x: Tensor) -> Tensor:
    if x.dim() > 2:
        raise RuntimeError("corrcoef(): expected input to have two or fewer dimensions")
    products = _cov(x)
    if not products.dim():
        return products / products
    deviations = products.diagonal().real.sqrt()
    found = products / deviations[:, None] / deviations
    if found.is_complex():
        return torch.view_as_complex(torch.view_as_real(found).clip(-1, 1))
    return found.clip(-1, 1)


FORMULAS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.cov, Tensor.cov), _cov),
    **dict.fromkeys((torch.corrcoef, Tensor.corrcoef), _corrcoef),
    torch.combinations: _combinations,
}
"""By the function that each takes the place of."""
