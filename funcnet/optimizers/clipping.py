"""Transforms that bound gradients, or bring them to a norm."""

from collections.abc import Sequence
from itertools import compress
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from funcnet.core import Optimizer
from funcnet.optimizers.checks import Number, check_options, check_positive
from funcnet.optimizers.leaves import WIDE, Axes, at_least_float32, leafwise
from funcnet.optimizers.lift import paths, stateless
from funcnet.runtime import foreach_norm, is_transformed

_dtype, _device = attrgetter("dtype"), attrgetter("device")


def global_norm(leaves: Any, norm_type: float = 2.0, p: Any = None) -> Tensor:
    """The norm of the norms of all leaves, a 0-d tensor; half precision is summed in float32.

    With the params ``p`` to which they belong it is that of the whole leaves, where some are parts
    over the ranks of an axis, or other ranks have other leaves.
    """
    axes, across = getattr(p, "axes", None), getattr(p, "across", None)
    if across is None:
        return _norm_here(leaves, norm_type, axes)
    counted = [path not in across.elsewhere for path in paths(p)]
    own = _norm_here([*compress(leaves, counted)], norm_type, axes and [*compress(axes, counted)])
    ranks = across.axis.gather(own.to(across.device, torch.float64).reshape(1))
    # In float64 on all of them, whatever leaves they have: copies of a leaf must stay the same.
    return torch.linalg.vector_norm(ranks, norm_type)


def _norm_here(leaves: Any, norm_type: float, axes: Sequence[Axes] | None) -> Tensor:
    """That of the leaves of this rank, which may be parts over these axes."""
    present = [leaf for leaf in leaves if leaf.numel()]
    if not present:
        return torch.zeros(())
    if {*map(_dtype, present)} in WIDE and not is_transformed(*present):
        norms = [*foreach_norm(present, norm_type)]
    else:
        dtypes = [torch.promote_types(leaf.dtype, torch.float32) for leaf in present]
        norms = [
            torch.linalg.vector_norm(leaf, norm_type, dtype=dtype)
            for leaf, dtype in zip(present, dtypes, strict=True)
        ]
    if len(devices := {*map(_device, norms)}) > 1:
        device = next(iter(devices))
        norms = [norm.to(device) for norm in norms]
    if axes and any(axes):
        there = [each for leaf, each in zip(leaves, axes, strict=True) if leaf.numel()]
        norms = _over_ranks(norms, there, norm_type)
    return torch.linalg.vector_norm(torch.stack(norms), norm_type)


def _over_ranks(norms: list[Tensor], axes: Sequence[Axes], norm_type: float) -> list[Tensor]:
    """Of the norms of this rank's leaves, those of the leaves of each kind on all ranks.

    Leaves are of one kind if they are parts over the same axes. Norms are gathered, not reduced:
    the maximum of gloo may lose a NaN. So all ranks compute the same number, bit for bit.
    """
    kinds: dict[Axes, list[Tensor]] = {}
    for norm, each in zip(norms, axes, strict=True):
        kinds.setdefault(each, []).append(norm)
    totals = {
        each: torch.linalg.vector_norm(torch.stack(found), norm_type)
        for each, found in kinds.items()
    }
    for axis in dict.fromkeys([axis for each in totals for axis in each]):
        parted = [each for each in totals if axis in each]
        ranks = axis.gather(torch.stack([totals[each] for each in parted]).unsqueeze(0))
        joined = torch.linalg.vector_norm(ranks, norm_type, dim=0)
        totals.update(zip(parted, joined.unbind(), strict=True))
    return [*totals.values()]


def clip(clip_value: Number) -> Optimizer:
    """Each element of g within ``[-clip_value, clip_value]``.

    Args:
        clip_value: a number >= 0.

    Source: ``torch.nn.utils.clip_grad_value_``; ``optax.clip``.

    >>> params = {"w": torch.tensor([0.5, -3.0])}
    >>> clip(1.0).update(params, {}, params)[0]
    {'w': tensor([ 0.5000, -1.0000])}
    """
    check_options("clip", clip_value=clip_value)
    least: Any = -clip_value
    most: Any = clip_value
    return stateless(lambda g, p: g.clamp(least, most), elementwise=True)


def clip_by_global_norm(max_norm: Number, norm_type: float = 2.0) -> Optimizer:
    """``g min(1, max_norm / (n + 1e-6))``, where n is the norm of all leaves as one vector.

    Args:
        max_norm: a number >= 0.
        norm_type: of the p-norm; may be infinite.

    Source: ``torch.nn.utils.clip_grad_norm_``; Pascanu et al. 2013.

    >>> params = {"w": torch.tensor([3.0]), "v": torch.tensor([4.0])}
    >>> clip_by_global_norm(1.0).update(params, {}, params)[0]
    {'w': tensor([0.6000]), 'v': tensor([0.8000])}
    """
    check_options("clip_by_global_norm", max_norm=max_norm)
    try:
        order = float(norm_type)
    except ValueError:
        raise ValueError(
            f"clip_by_global_norm: norm_type must be a number, got {norm_type!r}"
        ) from None

    def update(g: Tensor, p: Tensor) -> Tensor:
        factor = max_norm / (global_norm(g, order, p) + 1e-6)
        return g * factor.clamp(max=1.0)

    return stateless(update, needs_all_leaves=True, elementwise=True)


def clip_by_block_rms(threshold: Number) -> Optimizer:
    """``g / max(1, r / threshold)``, where r is the root of the mean of g^2 in each leaf.

    Args:
        threshold: the greatest r that is left, a number > 0.

    Source: ``optax.clip_by_block_rms``; Adafactor, Shazeer and Stern 2018.

    >>> params = {"w": torch.tensor([3.0, 4.0]), "v": torch.tensor([0.1])}
    >>> clip_by_block_rms(1.0).update(params, {}, params)[0]
    {'w': tensor([0.8485, 1.1314]), 'v': tensor([0.1000])}
    """
    check_positive("clip_by_block_rms", threshold=threshold)

    def update(g: Tensor, p: Tensor) -> Tensor:
        g = at_least_float32(g)
        rms = g.square().mean().sqrt()
        return g / (rms / threshold).clamp(min=1.0)

    return stateless(update)


def adaptive_grad_clip(clipping: Number, eps: Number = 1e-3) -> Optimizer:
    """``g min(1, clipping max(|p|, eps) / |g|)``, with norms of each unit of a leaf.

    A unit is a row of a matrix, a filter of a convolution, or a whole vector: all that a leaf has
    for one index of its first dimension, if it has more than one.

    Args:
        clipping: the greatest ratio of the norms that is left, a number >= 0.
        eps: the least norm of params that counts, a number >= 0.

    Source: Brock et al. 2021; ``optax.adaptive_grad_clip``.

    >>> params = {"w": torch.tensor([[3.0, 4.0], [0.0, 1.0]])}
    >>> grads = {"w": torch.tensor([[0.1, 0.0], [0.1, 0.0]])}
    >>> adaptive_grad_clip(0.05).update(grads, {}, params)[0]
    {'w': tensor([[0.1000, 0.0000], [0.0500, 0.0000]])}
    """
    check_options("adaptive_grad_clip", clipping=clipping, eps=eps)

    def update(g: Tensor, p: Tensor) -> Tensor:
        norm, size = _unit_norm(g), _unit_norm(p)
        limit: Any = clipping * size.clamp(min=eps)
        return torch.where(norm > limit, g * (limit / norm.clamp(min=1e-6)), g)

    return stateless(update)


def normalize(eps: Number = 1e-6) -> Optimizer:
    """``g / (n + eps)``, where n is the norm of all leaves as one vector.

    Args:
        eps: a number >= 0.

    Source: normalized gradient descent; ``optax.normalize_by_update_norm``.

    >>> params = {"w": torch.tensor([3.0]), "v": torch.tensor([4.0])}
    >>> normalize().update(params, {}, params)[0]
    {'w': tensor([0.6000]), 'v': tensor([0.8000])}
    """
    check_options("normalize", eps=eps)

    def update(g: Tensor, p: Tensor) -> Tensor:
        return g / (global_norm(g, p=p) + eps)

    return stateless(update, needs_all_leaves=True, elementwise=True)


def _unit_norm(leaves: Any) -> Any:
    def norm(leaf: Tensor) -> Tensor:
        units = tuple(range(1, leaf.dim())) if leaf.dim() > 1 else None
        return torch.linalg.vector_norm(leaf, dim=units, keepdim=True)

    return leafwise(norm, at_least_float32(leaves))
