"""The axis of a mesh over which a batch is parted, and where a rank's rows are in the whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from funcnet.collectives import Axis
from funcnet.runtime import is_transformed


@dataclass(frozen=True)
class BatchAxis(Axis):
    """The axis of the ranks that hold the parts of a batch, as a layer is told of it.

    >>> axis = BatchAxis("data", 4, "data of (data=4)")
    >>> axis.total(3), axis.before(3, torch.device("meta")).shape
    (12, torch.Size([]))
    """

    equal: bool = True
    """Whether all ranks have as many examples, so that none need ask the others."""

    dim: int = 0
    """The dimension of x that is the batch."""

    def at(self, dim: int) -> "BatchAxis":
        """The same for layers whose x has the batch in another dimension."""
        return replace(self, dim=dim)

    def before(self, rows: int, device: torch.device | None = None) -> Tensor:
        """How many rows the ranks before this one have, if it has ``rows``: a 0-d int64 tensor."""
        if self.equal or self.size == 1:
            return _rank(self, device) * rows
        rank = self.rank(device)
        ranks = torch.arange(self.size, device=device)
        return torch.where(ranks < rank, self._counts(rows, device), 0).sum()

    def total(self, rows: int, device: torch.device | None = None) -> int | Tensor:
        """How many rows all ranks have, if this one has ``rows``; a tensor if they may differ."""
        if self.equal or self.size == 1:
            return self.size * rows
        return self._counts(rows, device).sum()

    def _counts(self, rows: int, device: torch.device | None) -> Tensor:
        return self.gather(torch.full((1,), rows, dtype=torch.int64, device=device))


def _rank(axis: Axis, device: torch.device | None) -> Tensor:
    """The rank; in eager mode a number that can be read without waiting for a device."""
    there = is_transformed() or (device is not None and device.type == "meta")
    return axis.rank(device if there else None)


def first_index(
    axis: BatchAxis | None, name: str, shape: Sequence[int], device: torch.device
) -> int | Tensor:
    """Where this rank's part of a draw for the whole batch starts in it.

    Args:
        axis: that of the batch; None for the whole of it.
        name: of the layer that draws, for an error.
        shape: of the part that is drawn.

    Returns:
        the ``start`` of a draw of `funcnet.random`.

    Raises:
        ValueError: the shape has no dimension of a batch.
    """
    if axis is None:
        return 0
    shape, dim = tuple(shape), axis.dim
    if len(shape) < dim + 1 + (dim > 0):
        form = "(batch, *)" if dim == 0 else "(tokens, batch, *)"
        raise ValueError(f"{name}: expects a part of a batch, {form}, got one of shape {shape}")
    return first_indices(shape, {dim: (axis, None)}, device)


def first_indices(
    shape: Sequence[int], places: Mapping[int, tuple[Axis, int | None]], device: torch.device
) -> int | Tensor:
    """Where parts of a draw start, of which several dimensions are parted over ranks.

    Args:
        shape: of this rank's part.
        places: for each parted dimension its axis, and its whole size; None for that of all parts.

    Returns:
        the ``start`` of a draw of `funcnet.random`: an index for each slice along the dimensions
        before the last one that is parted.
    """
    if not places:
        return 0
    last, width = max(places), 1
    start: int | Tensor = 0
    for dim in reversed(range(len(shape))):
        (axis, size), extent = places.get(dim, (None, None)), shape[dim]
        before: Any = 0
        total: Any = extent
        if isinstance(axis, BatchAxis):
            before, total = axis.before(extent, device), axis.total(extent, device)
        elif axis is not None:
            total = axis.size * extent if size is None else size
            before = _rank(axis, device) * extent
        if dim < last:
            steps = torch.arange(extent, device=device) + before
            start = start + (steps * width).reshape(-1, *[1] * (last - 1 - dim))
        elif dim == last:
            start = before * width
        width = width * total
    return start
