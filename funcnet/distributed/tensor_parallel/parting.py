"""How a rank makes its part of a parameter, and what is beyond the whole one stays zero."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from funcnet.collectives import Axis, Split
from funcnet.distributed.start import Mesh, axis_of
from funcnet.errors import located, require
from funcnet.initializers import Initializer
from funcnet.params import Param


def axis_for(name: str, mesh: Mesh, axis: str) -> Axis:
    """The axis of a mesh over which a layer of this name is parted."""
    with located(f"{name}:"):
        require(isinstance(axis, str), f"expects the name of an axis, got {axis!r}", TypeError)
        return axis_of(mesh, axis)


def part_of(split: Split, whole: Param) -> Param:
    """The parameter of a rank, which starts as its part of what the whole one starts as."""
    return whole._replace(shape=split.part_shape, init=_part_of(split, whole.init))


def _part_of(split: Split, start: Initializer) -> Initializer:
    def init(key: Tensor, shape: tuple[int, ...], *kind: Any) -> Tensor:
        return split.part(start(key, split.shape, *kind))

    return init


def parted(declared: Mapping[str, Param], placed: Mapping[str, Split]) -> dict[str, Param]:
    """The parameters of a rank, from those of a single process."""
    return {
        name: part_of(placed[name], param) if name in placed else param
        for name, param in declared.items()
    }


def without_padding(split: Split, part: Tensor) -> Tensor:
    """A part, such as a gradient, with zeros where it is beyond the whole tensor.

    So padding, which starts as zeros, stays zero whatever the optimizer is.
    """
    dim = split.dim or 0
    inside = is_inside(split, part.device)
    if inside is None:
        return part
    return torch.where(inside.reshape(-1, *[1] * (part.dim() - 1 - dim)), part, 0.0)


def is_inside(split: Split, device: torch.device) -> Tensor | None:
    """Which rows of a part, along the parted dimension, are of the whole; None where all are."""
    dim = split.dim or 0
    extent, whole = split.part_shape[dim], split.shape[dim]
    if extent * split.axis.size == whole:
        return None
    return first_row(split, device) + torch.arange(extent, device=device) < whole


def first_row(split: Split, device: torch.device) -> Tensor:
    """The index, in the whole, of the first row of this rank's part, a 0-d tensor."""
    return split.axis.rank(device) * split.part_shape[split.dim or 0]


def own_rows(x: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    """Indices into this rank's rows, 0 for one of another rank; and which are of this rank."""
    index = x.long() - first_row(split, x.device)
    is_own = (index >= 0) & (index < split.part_shape[0])
    return torch.where(is_own, index, 0), is_own
