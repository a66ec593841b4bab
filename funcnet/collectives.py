"""Sums and gathers over the ranks of one axis of a mesh, as pure functions of tensors.

torch.distributed does them. They are operators of their own, so that `jit` records them, and the
compiled program calls them in the order in which they are written, within its loops too. What a
program knows of an axis is its key, which is the same text on all ranks, and the rank enters as a
tensor: so all ranks share one program.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from funcnet.compiler.calls import writes
from funcnet.runtime import is_transformed


@dataclass(frozen=True)
class Group:
    """The ranks of an axis that this process talks to, and its place among them."""

    process_group: Any
    """That of torch.distributed; None for one rank."""

    index: int
    """This process's place, from 0."""

    failed: Callable[[str, Exception], Exception]
    """``(what, error) -> error`` to raise where a collective failed: it names ranks at fault."""


_GROUPS: dict[str, Group] = {}


def register(key: str, group: Group) -> None:
    """Say which ranks an axis of this key has in this process."""
    _GROUPS[key] = group


def forget() -> None:
    """Forget all groups: they are closed."""
    _GROUPS.clear()


def group_of(key: str) -> Group:
    """The ranks of the axis of a key.

    Raises: RuntimeError: there is no such mesh in this process.
    """
    if key not in _GROUPS:
        raise RuntimeError(
            f"there is no mesh with the axis {key} in this process: call "
            "fn.distributed.initialize() and fn.distributed.mesh(...) first"
        )
    return _GROUPS[key]


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
        if is_transformed() or device == torch.device("meta"):
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
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (self.sum(wide) / self.size).to(x.dtype)

    def gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """The ranks' tensors, of one shape, one after another along ``dim``."""
        if self.size == 1:
            return x
        stacked = self._run(_all_gather, "all_gather", x, self.size)
        dim %= x.dim()
        return stacked.movedim(0, dim).flatten(dim, dim + 1) if dim else stacked.flatten(0, 1)

    def scatter_sum(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's part along ``dim`` of the sum of the ranks' tensors, of one shape.

        Raises: ValueError: the ranks do not divide the dimension.
        """
        if self.size == 1:
            return x
        return self._run(_reduce_scatter, "reduce_scatter", self._stacked(x, dim))

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
        return x if self.size == 1 else self._run(_all_reduce, "all_reduce", x, kind)

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
    """

    axis: Axis
    """The ranks."""

    shape: tuple[int, ...]
    """That of the whole tensor."""

    dim: int | None = None
    """The dimension that is parted; None: its numbers one after another, as a vector."""

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of each rank's part."""
        if self.dim is None:
            return (-(-prod(self.shape) // self.axis.size),)
        extent = -(-self.shape[self.dim] // self.axis.size)
        return (*self.shape[: self.dim], extent, *self.shape[self.dim + 1 :])

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor that all ranks have."""
        return self.axis.part(self.padded(whole), self.dim or 0)

    def whole(self, part: Tensor) -> Tensor:
        """The whole tensor, on all ranks, from the part of each."""
        return self.trimmed(self.axis.gather(part, self.dim or 0))

    def sum(self, whole: Tensor) -> Tensor:
        """This rank's part of the sum of the ranks' tensors."""
        return self.axis.scatter_sum(self.padded(whole), self.dim or 0)

    def padded(self, whole: Tensor) -> Tensor:
        """A whole tensor, as a vector if the parts are, with the zeros at its end."""
        dim = self.dim or 0
        whole = whole.reshape(-1) if self.dim is None else whole
        missing = self.part_shape[dim] * self.axis.size - whole.shape[dim]
        if not missing:
            return whole
        zeros = whole.new_zeros((*whole.shape[:dim], missing, *whole.shape[dim + 1 :]))
        return torch.cat((whole, zeros), dim)

    def trimmed(self, padded: Tensor) -> Tensor:
        """The whole tensor without the zeros at its end."""
        extents = (prod(self.shape),) if self.dim is None else self.shape
        dim = self.dim or 0
        return padded.narrow(dim, 0, extents[dim]).reshape(self.shape)


_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX} if dist.is_available() else {}


def _all_reduce(x: Tensor, key: str, kind: str) -> Tensor:
    return _into_all_reduce(
        torch.empty_like(x, memory_format=torch.contiguous_format), x, key, kind
    )


def _into_all_reduce(out: Tensor, x: Tensor, key: str, kind: str) -> Tensor:
    out.copy_(x)
    _wait(key, "a sum" if kind == "sum" else "a maximum", dist.all_reduce, out, _REDUCTIONS[kind])
    return out


def _all_gather(x: Tensor, key: str, size: int) -> Tensor:
    return _into_all_gather(x.new_empty((size, *x.shape)), x, key, size)


def _into_all_gather(out: Tensor, x: Tensor, key: str, size: int) -> Tensor:
    _wait(key, "a gather", dist.all_gather_into_tensor, out.flatten(), x.contiguous().flatten())
    return out


def _reduce_scatter(x: Tensor, key: str) -> Tensor:
    return _into_reduce_scatter(x.new_empty(x.shape[1:]), x, key)


def _into_reduce_scatter(out: Tensor, x: Tensor, key: str) -> Tensor:
    x = x.contiguous()
    if x.is_cpu:
        # Gloo's own takes twice as long for 25 MB: python -m tests.benchmarks.distributed
        received = torch.empty_like(x)
        _wait(key, "a sum of parts", dist.all_to_all_single, received.flatten(), x.flatten())
        return torch.sum(received, 0, out=out)
    _wait(key, "a sum of parts", dist.reduce_scatter_tensor, out.flatten(), x.flatten())
    return out


def _wait(key: str, what: str, function: Callable[..., Any], *args: Any) -> None:
    group = group_of(key)
    try:
        function(*args, group=group.process_group)
    except Exception as error:
        raise group.failed(f"{what} over {key}", error) from error


def _axis_rank(key: str, device: torch.device | None) -> Tensor:
    return torch.full((), group_of(key).index, dtype=torch.int64, device=device)


_library = torch.library.Library("funcnet", "FRAGMENT")
_NEVER_FOLDED = torch.Tag.nondeterministic_seeded
for _schema, _function in {
    "axis_rank(str axis, Device? device) -> Tensor": _axis_rank,
    "all_reduce(Tensor x, str axis, str kind) -> Tensor": _all_reduce,
    "all_gather(Tensor x, str axis, int size) -> Tensor": _all_gather,
    "reduce_scatter(Tensor x, str axis) -> Tensor": _reduce_scatter,
}.items():
    # The tag keeps make_fx from calling it at once on small constants.
    _library.define(_schema, tags=_NEVER_FOLDED)
    _library.impl(_schema.partition("(")[0], _function, "CompositeExplicitAutograd")

writes("funcnet::all_reduce")(_into_all_reduce)
writes("funcnet::all_gather")(_into_all_gather)
writes("funcnet::reduce_scatter")(_into_reduce_scatter)


@torch.library.register_fake("funcnet::axis_rank", lib=_library)
def _(axis: str, device: torch.device | None) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


@torch.library.register_fake("funcnet::all_reduce", lib=_library)
def _(x: Tensor, axis: str, kind: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("funcnet::all_gather", lib=_library)
def _(x: Tensor, axis: str, size: int) -> Tensor:
    return x.new_empty((size, *x.shape))


@torch.library.register_fake("funcnet::reduce_scatter", lib=_library)
def _(x: Tensor, axis: str) -> Tensor:
    return x.new_empty(x.shape[1:])


@torch.library.register_vmap("funcnet::all_reduce", lib=_library)
def _(info: Any, in_dims: Any, x: Tensor, axis: str, kind: str) -> Any:
    return torch.ops.funcnet.all_reduce(x.movedim(in_dims[0], 0), axis, kind), 0


@torch.library.register_vmap("funcnet::all_gather", lib=_library)
def _(info: Any, in_dims: Any, x: Tensor, axis: str, size: int) -> Any:
    return torch.ops.funcnet.all_gather(x.movedim(in_dims[0], 0), axis, size), 1


@torch.library.register_vmap("funcnet::reduce_scatter", lib=_library)
def _(info: Any, in_dims: Any, x: Tensor, axis: str) -> Any:
    return torch.ops.funcnet.reduce_scatter(x.movedim(in_dims[0], 1), axis), 0


def _setup(*names: str) -> Callable[..., None]:
    """Keeps the arguments of these names for the backward pass of autograd's or torch.func's."""

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.told = dict(zip(names, inputs, strict=True))
        shape = ctx.told.pop("x").shape
        ctx.size = shape[0] if shape else 1

    return setup


def _all_reduce_backward(ctx: Any, dy: Tensor) -> Any:
    if ctx.told["kind"] != "sum":
        raise NotImplementedError("the greatest over ranks has no derivative here")
    return torch.ops.funcnet.all_reduce(dy, **ctx.told), None, None


def _all_gather_backward(ctx: Any, dy: Tensor) -> Any:
    return torch.ops.funcnet.reduce_scatter(dy, ctx.told["axis"]), None, None


def _reduce_scatter_backward(ctx: Any, dy: Tensor) -> Any:
    return torch.ops.funcnet.all_gather(dy, ctx.told["axis"], ctx.size), None


# The derivative of the sum of what all ranks make of it, for the law's oracle, which is autograd
# through apply; the rules of layers say theirs themselves.
for _name, _backward, _arguments in (
    ("all_reduce", _all_reduce_backward, ("x", "axis", "kind")),
    ("all_gather", _all_gather_backward, ("x", "axis", "size")),
    ("reduce_scatter", _reduce_scatter_backward, ("x", "axis")),
):
    torch.library.register_autograd(
        f"funcnet::{_name}", _backward, setup_context=_setup(*_arguments), lib=_library
    )
