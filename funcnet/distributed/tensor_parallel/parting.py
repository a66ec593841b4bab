"""How a rank makes its part of a parameter, and what is beyond the whole one stays zero."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet.collectives import Axis, Split
from funcnet.distributed.processes.start import Mesh, axis_of
from funcnet.errors import located, require
from funcnet.initializers import Initializer
from funcnet.params import Param


class Region(NamedTuple):
    """Where each rank computes its part of a layer: what is communicated at its ends.

    Outside of it all ranks have the same tensors, or, with ``sequence``, each has some of the
    tokens. The functions f at its entry and g at its exit are those of Megatron-LM.
    """

    axis: Axis
    """The ranks."""

    sequence: int | None = None
    """The dimension of tokens of which each rank has a part outside; None: it has all of them."""

    def enter(self, x: Tensor) -> Tensor:
        """f: x as it is; the tokens of all ranks."""
        return x if self.sequence is None else self.axis.gather(x, self.sequence)

    def enter_backward(self, dx: Tensor) -> Tensor:
        """The sum over ranks; of own tokens."""
        return self._summed(dx)

    def leave(self, y: Tensor) -> Tensor:
        """g: the sum over ranks; of own tokens."""
        return self._summed(y)

    def leave_backward(self, dy: Tensor) -> Tensor:
        """dy as it is; that of the tokens of all ranks."""
        return dy if self.sequence is None else self.axis.gather(dy, self.sequence)

    def _summed(self, x: Tensor) -> Tensor:
        if self.sequence is None:
            return self.axis.sum(x)
        return self.axis.scatter_sum(x, self.sequence)

    def check(self, x: Tensor, *, whole: bool) -> None:
        """ValueError unless x has a dimension of tokens, which ranks divide if they are whole."""
        if self.sequence is None:
            return
        got, ranks = tuple(x.shape), self.axis.size
        inside = -x.dim() <= self.sequence < x.dim() and self.sequence % x.dim() != x.dim() - 1
        words = f"dimension {self.sequence} of tokens, before the features"
        require(inside, f"expects {words}, got {got}")
        words = f"tokens that {ranks} ranks divide in dimension {self.sequence}"
        require(not whole or x.shape[self.sequence] % ranks == 0, f"expects {words}, got {got}")


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
