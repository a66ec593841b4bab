"""Sums and gathers over the ranks of one axis of a mesh, as pure functions of tensors.

torch.distributed does them. What a program knows of an axis is its key, which is the same text on
all ranks, and the rank enters as a tensor: so all ranks share one program.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from funcnet import ranks
from funcnet.ranks import (
    Collective as Collective,
    Group as Group,
    collective as collective,
    forget as forget,
    group_of as group_of,
    peer_errors as peer_errors,
    register as register,
    sum_dtype as sum_dtype,
)
from funcnet.runtime import is_batched, is_differentiated, is_tracing, is_transformed


@dataclass(frozen=True)
class Axis:
    """One axis of a mesh: the ranks that hold the parts of one thing.

    It is hashable and says nothing of this process, so it may be among the static arguments of a
    rule. Over one rank every function is the identity.
    """

    name: str
    """Such as "data"."""

    size: int
    """How many ranks."""

    key: str
    """Its name and that of its mesh, the same on all ranks."""

    @property
    def index(self) -> int:
        """This process's place on the axis, as a number; `rank` is for compiled programs."""
        return 0 if self.size == 1 else group_of(self.key).index

    def rank(self, device: torch.device | str | None = None) -> Tensor:
        """This process's place on the axis, a 0-d int64 tensor."""
        if self.size == 1:
            return torch.zeros((), dtype=torch.int64, device=device)
        if device is not None and torch.device(device).type == "meta":
            return torch.empty((), dtype=torch.int64, device=device)
        if is_transformed():
            return torch.ops.funcnet.axis_rank(self.key, device)
        return torch.full((), self.index, dtype=torch.int64, device=device)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' tensors, of one shape."""
        return self._reduced(x, "sum")

    def max(self, x: Tensor) -> Tensor:
        """The greatest of the ranks' tensors, element by element."""
        return self._reduced(x, "max")

    def mean(self, x: Tensor) -> Tensor:
        """The mean of the ranks' floating-point tensors; half precision is summed in float32."""
        if self.size == 1:
            return x
        return (self.sum(x.to(sum_dtype(x.dtype))) / self.size).to(x.dtype)

    def sum_flat(self, xs: Sequence[Tensor], factor: float = 1.0) -> Tensor:
        """The sum of the ranks' numbers of several tensors, times a factor: a vector of all.

        They are on one device, and of one `sum_dtype`, in which they are summed.
        """
        return self.start_sum_flat(xs, factor)()

    def start_sum_flat(self, xs: Sequence[Tensor], factor: float = 1.0) -> Callable[[], Tensor]:
        """`sum_flat` while other things are done; the function that waits for it and gives it.

        Under a transformation it is computed at once.
        """
        if self.size == 1 or is_differentiated(*xs) or is_batched():
            dtype = sum_dtype(xs[0].dtype)
            flat = self.sum(torch.cat([x.reshape(-1).to(dtype) for x in xs])) * factor
        elif is_tracing() or xs[0].is_meta:
            flat = torch.ops.funcnet.sum_flat([*xs], self.key, factor)
        else:
            out, finish = ranks.start_sum_flat(xs, self.key, factor)
            return lambda: (finish(), out)[1]
        return lambda: flat

    def gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """The ranks' tensors, of one shape, one after another along ``dim``."""
        if self.size == 1:
            return x
        stacked = self._run(ranks.all_gather, "all_gather", x, self.size)
        dim %= x.dim()
        return stacked.movedim(0, dim).flatten(dim, dim + 1) if dim else stacked.flatten(0, 1)

    def scatter_sum(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's part along ``dim`` of the sum of the ranks' tensors, of one shape.

        Raises: ValueError: the ranks do not divide the dimension.
        """
        if self.size == 1:
            return x
        return self._run(ranks.reduce_scatter, "reduce_scatter", self._stacked(x, dim))

    def part(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's part along ``dim`` of a tensor that all ranks have.

        Raises: ValueError: the ranks do not divide the dimension.
        """
        if self.size == 1:
            return x
        stacked = self._stacked(x, dim)
        return stacked.index_select(0, self.rank(x.device).reshape(1)).squeeze(0)

    def _stacked(self, x: Tensor, dim: int) -> Tensor:
        """Its parts along ``dim``, stacked in front."""
        dim %= x.dim()
        if x.shape[dim] % self.size:
            raise ValueError(
                f"axis {self.name!r}: {self.size} ranks do not divide dimension {dim} of "
                f"{tuple(x.shape)}"
            )
        parts = x.unflatten(dim, (self.size, x.shape[dim] // self.size))
        return parts.movedim(dim, 0)

    def _reduced(self, x: Tensor, kind: str) -> Tensor:
        return x if self.size == 1 else self._run(ranks.all_reduce, "all_reduce", x, kind)

    def _run(self, function: Callable[..., Tensor], name: str, x: Tensor, *told: Any) -> Tensor:
        if is_transformed(x) or x.is_meta:
            made: Tensor = getattr(torch.ops.funcnet, name)(x, self.key, *told)
            return made
        return function(x, self.key, *told)


@dataclass(frozen=True)
class Split:
    """How a tensor is parted over the ranks of an axis, in parts of one shape.

    Where the ranks do not divide it, zeros are added at its end: all ranks run one program.

    >>> split = Split(Axis("model", 2, "model of (model=2)"), (5, 3), dim=0)
    >>> split.part_shape
    (3, 3)

    A dimension may consist of sections, such as the queries, keys and values of one weight. Each of
    them is then parted, and a rank has its part of the first, of the second, and so on.
    """

    axis: Axis
    """The ranks."""

    shape: tuple[int, ...]
    """That of the whole tensor."""

    dim: int | None = None
    """The dimension that is parted; None: its numbers one after another, as a vector."""

    front: int = 0
    """How many dimensions are in front of the vector, for a stack of tensors that are parted each,
    as `repeat` makes it."""

    sections: tuple[int, ...] = ()
    """The sizes of the sections of the dimension, which ranks divide; default it is one."""

    reduced: str = ""
    """Whether the gradient of a part is the "mean" of the ranks' or the "sum", as the layer makes
    it; empty where the ranks' losses are one."""

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of each rank's part."""
        dim, extents = self._form()
        return (*extents[:dim], -(-extents[dim] // self.axis.size), *extents[dim + 1 :])

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor that all ranks have."""
        return self.axis.part(self.padded(whole), self._form()[0])

    def whole(self, part: Tensor) -> Tensor:
        """The whole tensor, on all ranks, from the part of each."""
        return self.trimmed(self.axis.gather(part, self._form()[0]))

    def sum(self, whole: Tensor) -> Tensor:
        """This rank's part of the sum of the ranks' tensors."""
        return self.axis.scatter_sum(self.padded(whole), self._form()[0])

    def padded(self, whole: Tensor) -> Tensor:
        """A whole tensor, as a vector if the parts are, with the zeros at its end.

        The ranks' parts lie one after another in it.
        """
        dim, extents = self._form()
        whole = whole.reshape(extents)
        if self.sections:
            sections = whole.split(self.sections, dim)
            pieces = [each.unflatten(dim, (self.axis.size, -1)) for each in sections]
            return torch.cat(pieces, dim + 1).flatten(dim, dim + 1)
        missing = self.part_shape[dim] * self.axis.size - extents[dim]
        if not missing:
            return whole
        zeros = whole.new_zeros((*extents[:dim], missing, *extents[dim + 1 :]))
        return torch.cat((whole, zeros), dim)

    def trimmed(self, padded: Tensor) -> Tensor:
        """The whole tensor without the zeros at its end."""
        dim, extents = self._form()
        if self.sections:
            parts = padded.unflatten(dim, (self.axis.size, -1))
            sizes = [each // self.axis.size for each in self.sections]
            pieces = [each.flatten(dim, dim + 1) for each in parts.split(sizes, dim + 1)]
            return torch.cat(pieces, dim)
        return padded.narrow(dim, 0, extents[dim]).reshape(self.shape)

    def stacked(self, extents: tuple[int, ...]) -> "Split":
        """The same of a stack of such tensors, with these dimensions in front.

        >>> Split(Axis("model", 2, "model of (model=2)"), (5, 3)).stacked((4,)).part_shape
        (4, 8)
        """
        dim = None if self.dim is None else self.dim + len(extents)
        front = self.front + len(extents) if self.dim is None else 0
        return Split(self.axis, (*extents, *self.shape), dim, front, self.sections, self.reduced)

    def _form(self) -> tuple[int, tuple[int, ...]]:
        """The dimension that is parted, and the extents of the whole, as a vector if it is one."""
        if self.dim is None:
            return self.front, (*self.shape[: self.front], prod(self.shape[self.front :]))
        return self.dim, self.shape
