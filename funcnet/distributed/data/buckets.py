"""Many tensors summed over ranks in few collectives: as the parts of flat vectors."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from funcnet.collectives import Axis, sum_dtype
from funcnet.runtime import is_transformed, unflatten_dense

BUCKET_BYTES = 25 * 2**20
"""How many bytes are summed at once, as in PyTorch's DistributedDataParallel."""

Kind = tuple[int, torch.dtype, torch.device]
"""Of a tensor: how many numbers it has, of which dtype, and where."""


@lru_cache(maxsize=64)
def _buckets(kinds: tuple[Kind, ...], bucket_bytes: int) -> tuple[tuple[int, ...], ...]:
    """Which tensors go together: those of one `sum_dtype` and device, in their order.

    A bucket is full when it has so many bytes. Empty tensors are in none.
    """
    full: list[list[int]] = []
    filling: dict[Any, tuple[list[int], int]] = {}
    for index, (numel, dtype, device) in enumerate(kinds):
        wide = sum_dtype(dtype)
        bucket, size = filling.pop((wide, device), ([], 0))
        if not numel:
            filling.update({(wide, device): (bucket, size)} if bucket else {})
            continue
        bucket.append(index)
        size += numel * wide.itemsize
        if size >= bucket_bytes:
            full.append(bucket)
        else:
            filling[wide, device] = bucket, size
    return tuple([tuple(bucket) for bucket in (*full, *[left for left, _ in filling.values()])])


class Summed:
    """Tensors whose sum over ranks was started; ``tensors()`` waits, and gives their sums.

    The sums are views of one vector, in the tensors' own dtypes.
    """

    def __init__(self, axis: Axis, tensors: Sequence[Tensor], factor: float) -> None:
        self._shapes = tuple([each.shape for each in tensors])
        self._dtypes = [each.dtype for each in tensors]
        self._finish: Callable[[], Tensor] = axis.start_sum_flat(tensors, factor)

    def tensors(self) -> Sequence[Tensor]:
        """The sums, in the shapes and dtypes of what they are of."""
        flat, shapes = self._finish(), self._shapes
        views: Sequence[Tensor]
        if is_transformed(flat) or flat.is_meta:
            parts = flat.split([shape.numel() for shape in shapes])
            views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        else:
            views = unflatten_dense(flat, _examples(shapes))
        if {*self._dtypes} == {flat.dtype}:
            return views
        return [view.to(dtype) for view, dtype in zip(views, self._dtypes, strict=True)]


@lru_cache(maxsize=64)
def _examples(shapes: tuple[torch.Size, ...]) -> list[Tensor]:
    """Tensors of these shapes, without memory."""
    return [torch.empty(shape, device="meta") for shape in shapes]


def all_summed(
    axis: Axis, tensors: list[Tensor], factor: float = 1.0, bucket_bytes: int = BUCKET_BYTES
) -> list[Tensor]:
    """The sums over ranks of many tensors, times a factor, in few collectives.

    The list is emptied, so that what nobody else has goes as soon as it was copied.
    """
    kinds = tuple([(each.numel(), each.dtype, each.device) for each in tensors])
    found: list[Any] = [*tensors]
    tensors.clear()
    started = []
    for bucket in _buckets(kinds, bucket_bytes):
        started.append((bucket, Summed(axis, [found[index] for index in bucket], factor)))
        for index in bucket:
            found[index] = None
    for bucket, summed in started:
        for index, each in zip(bucket, summed.tensors(), strict=True):
            found[index] = each
    return found
