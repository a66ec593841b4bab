"""The ranks that a process talks to, and what they do together as operators of PyTorch.

They are operators of their own, so that `jit` records them, and the compiled program calls them in
the order in which they are written, within its loops too. They know a group by its key.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet import messages
from funcnet.compiler.calls import writes
from funcnet.compiler.recycling import Pool
from funcnet.compiler.specs import Spec
from funcnet.runtime import flatten_dense


class Collective(NamedTuple):
    """What ranks do together; all of an axis must do the same."""

    what: str
    """Such as "a sum"."""

    key: str
    """Of the axis."""

    dtype: torch.dtype
    shape: torch.Size

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.what} of {dtype} {tuple(self.shape)} over {self.key}"


@dataclass(frozen=True)
class Group:
    """The ranks of an axis that this process talks to, and its place among them."""

    process_group: Any
    """That of torch.distributed; None for one rank."""

    index: int
    """This process's place, from 0."""

    failed: Callable[[str, Exception], Exception]
    """``(what, error) -> error`` to raise where a collective failed: it names ranks at fault."""

    ranks: tuple[int, ...] = ()
    """Their numbers in the world."""

    enters: Callable[["Group", Collective, bool], None] = lambda group, it, begins: None
    """``(group, collective, begins)``: called before a collective is started, or waited for.

    It raises where the ranks are about to do different things.
    """

    leaves: Callable[[], None] = lambda: None
    """Called when that is done, or has failed."""


_GROUPS: dict[str, Group] = {}


def register(key: str, group: Group) -> None:
    """Say which ranks an axis of this key has in this process."""
    _GROUPS[key] = group


def forget() -> None:
    """Forget all groups: they are closed."""
    _GROUPS.clear()
    _pool.cache_clear()


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


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What numbers of a dtype are summed in over ranks: half precision in float32.

    >>> sum_dtype(torch.bfloat16), sum_dtype(torch.int64)
    (torch.float32, torch.int64)
    """
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


# Tensors of so many bytes are written to a vector one by one: a call is worth less than a pass.
_LARGE = 1 << 16


def all_reduce(x: Tensor, key: str, kind: str) -> Tensor:
    """The sum, or the greatest, of the ranks' tensors."""
    return _into_all_reduce(
        torch.empty_like(x, memory_format=torch.contiguous_format), x, key, kind
    )


def _into_all_reduce(out: Tensor, x: Tensor, key: str, kind: str) -> Tensor:
    out.copy_(x)
    what = "a sum" if kind == "sum" else "a maximum"
    _start(key, what, messages.start_all_reduce, out, kind)()
    return out


def sum_flat(xs: Sequence[Tensor], key: str, factor: float) -> Tensor:
    """The sum of the ranks' numbers of several tensors, times a factor: a vector of all."""
    return _into_sum_flat(_flat_like(xs), xs, key, factor)


def _into_sum_flat(out: Tensor, xs: Sequence[Tensor], key: str, factor: float) -> Tensor:
    _start_sum(_fill(out, xs, factor), key)()
    return out


def start_sum_flat(
    xs: Sequence[Tensor], key: str, factor: float
) -> tuple[Tensor, Callable[[], Any]]:
    """Start `sum_flat`: the memory of its result, and the function that waits for it."""
    if len(xs) > 1 and _are_small(xs) and len({x.dtype for x in xs}) == 1:
        # One call for all, which is a third of the time of a view of each and `torch.cat`.
        out = flatten_dense([*xs]).to(sum_dtype(xs[0].dtype))
        out = out if factor == 1.0 else out.mul_(factor)
    else:
        out = _fill(_bucket_like(xs), xs, factor)
    return out, _start_sum(out, key)


def _start_sum(out: Tensor, key: str) -> Callable[[], Any]:
    return _start(key, "a sum", messages.start_all_reduce, out, "sum")


def _are_small(xs: Sequence[Tensor]) -> bool:
    return sum([x.nbytes for x in xs]) < _LARGE * len(xs)


def _fill(out: Tensor, xs: Sequence[Tensor], factor: float) -> Tensor:
    """Write the numbers of all tensors times a factor to a vector."""
    if factor == 1.0 or _are_small(xs) or {x.dtype for x in xs} != {out.dtype}:
        torch.cat([x.reshape(-1) for x in xs], out=out)
        return out if factor == 1.0 else out.mul_(factor)
    for x, place in zip(xs, out.split([x.numel() for x in xs]), strict=True):
        torch.mul(x.reshape(-1), factor, out=place)  # in one pass over the memory
    return out


def _flat_like(xs: Sequence[Tensor]) -> Tensor:
    """Memory for the numbers of all tensors, one after another, in float32 at least."""
    return xs[0].new_empty(sum([x.numel() for x in xs]), dtype=sum_dtype(xs[0].dtype))


def _bucket_like(xs: Sequence[Tensor]) -> Tensor:
    """`_flat_like` in the memory of an earlier one that nobody has any more.

    New memory from the operating system is a third of the processor's time of a data-parallel step
    with 25 MB of params: python -m tests.benchmarks.distributed.
    """
    numel = sum([x.numel() for x in xs])
    pool = _pool(Spec((numel,), sum_dtype(xs[0].dtype), xs[0].device))
    return _flat_like(xs) if pool is None else pool.new()


@lru_cache(maxsize=16)
def _pool(spec: Spec) -> Pool | None:
    return Pool.of(spec)


def all_gather(x: Tensor, key: str, size: int) -> Tensor:
    """The ranks' tensors, stacked."""
    return _into_all_gather(x.new_empty((size, *x.shape)), x, key, size)


def _into_all_gather(out: Tensor, x: Tensor, key: str, size: int) -> Tensor:
    _start(key, "a gather", messages.start_all_gather, x.contiguous(), out)()
    return out


def reduce_scatter(x: Tensor, key: str) -> Tensor:
    """This rank's entry of the sum of the ranks' tensors."""
    return _into_reduce_scatter(x.new_empty(x.shape[1:]), x, key)


def _into_reduce_scatter(out: Tensor, x: Tensor, key: str) -> Tensor:
    _start(key, "a sum of parts", messages.start_reduce_scatter, x.contiguous(), out)()
    return out


@contextmanager
def peer_errors(group: Group, what: str) -> Iterator[None]:
    """What fails within is raised as an error that names the ranks at fault."""
    try:
        yield
    except Exception as error:
        raised = group.failed(what, error)
        if raised is error:
            raise
        raise raised from error


@contextmanager
def collective(it: Collective, begins: bool = True) -> Iterator[Group]:
    """The group of its axis, to communicate within; what fails there is a `PeerError`.

    All ranks of the axis enter it with the same, in the same order, and once more, with ``begins``
    False, to wait for what they only started.
    """
    group = group_of(it.key)
    try:
        with peer_errors(group, f"{it.what} over {it.key}"):
            group.enters(group, it, begins)
            yield group
    finally:
        group.leaves()


def _start(
    key: str, what: str, start: Callable[..., Any], given: Tensor, *args: Any
) -> Callable[[], Any]:
    """Start an exchange of what is given; the function that waits for it."""
    it = Collective(what, key, given.dtype, given.shape)
    with collective(it) as group:
        wait = start(given, *args, group.process_group)

    def finish() -> None:
        with collective(it, begins=False):
            wait()

    return finish


def axis_rank(key: str, device: torch.device | None) -> Tensor:
    """This process's place on an axis."""
    return torch.full((), group_of(key).index, dtype=torch.int64, device=device)


_library = torch.library.Library("funcnet", "FRAGMENT")
_NEVER_FOLDED = torch.Tag.nondeterministic_seeded
for _schema, _function in {
    "axis_rank(str axis, Device? device) -> Tensor": axis_rank,
    "all_reduce(Tensor x, str axis, str kind) -> Tensor": all_reduce,
    "sum_flat(Tensor[] xs, str axis, float factor) -> Tensor": sum_flat,
    "all_gather(Tensor x, str axis, int size) -> Tensor": all_gather,
    "reduce_scatter(Tensor x, str axis) -> Tensor": reduce_scatter,
}.items():
    # The tag keeps make_fx from calling it at once on small constants.
    _library.define(_schema, tags=_NEVER_FOLDED)
    _library.impl(_schema.partition("(")[0], _function, "CompositeExplicitAutograd")

writes("funcnet::all_reduce")(_into_all_reduce)
writes("funcnet::sum_flat")(_into_sum_flat)
writes("funcnet::all_gather")(_into_all_gather)
writes("funcnet::reduce_scatter")(_into_reduce_scatter)


@torch.library.register_fake("funcnet::axis_rank", lib=_library)
def _(axis: str, device: torch.device | None) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


@torch.library.register_fake("funcnet::all_reduce", lib=_library)
def _(x: Tensor, axis: str, kind: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("funcnet::sum_flat", lib=_library)
def _(xs: Sequence[Tensor], axis: str, factor: float) -> Tensor:
    return _flat_like(xs)


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
