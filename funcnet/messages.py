"""How ranks exchange tensors: by those calls of torch.distributed that are fast.

On GPUs those are NCCL's own. On the CPU, gloo sends a message in the time that the loopback device
takes, and some of its collectives take several times as long: of 2 processes, a sum of 1000
numbers takes 0.35 ms, and an exchange of all with all 0.16; a gather of 13 MB on each rank 14 ms
and more, and the same as single messages 6. `python -m tests.benchmarks.distributed` measures them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Finish = Callable[[], Any]
"""Waits for an exchange that was started."""

SMALL = 1 << 19
"""So many bytes are received at most where each rank gets all tensors, and adds them up itself."""

_PIECE = 1 << 22
"""About so many bytes are received at once of the parts that a rank adds up."""

_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX} if dist.is_available() else {}


def start_all_reduce(x: Tensor, kind: str, group: Any) -> Finish:
    """Start the sum, or the greatest, of the ranks' contiguous tensors, in the memory of x."""
    if not _is_small(x, group):
        return dist.all_reduce(x, _REDUCTIONS[kind], group=group, async_op=True).wait
    received, finish = _start_all_to_all(x, group)

    def add() -> None:
        finish()
        if kind == "max":
            torch.amax(received, 0, out=x)
        else:  # in the same order on all ranks, so that all have the same bits
            torch.sum(received, 0, dtype=x.dtype, out=x)

    return add


def start_all_gather(x: Tensor, out: Tensor, group: Any) -> Finish:
    """Start to bring the ranks' contiguous tensors, stacked, to ``out`` on all of them."""
    if not x.is_cpu:
        return dist.all_gather_into_tensor(
            out.flatten(), x.flatten(), group=group, async_op=True
        ).wait
    if _is_small(x, group):
        received, finish = _start_all_to_all(x, group)
        return _then(finish, lambda: out.copy_(received))
    own = group.rank()
    others = [rank for rank in range(group.size()) if rank != own]
    works = [dist.irecv(out[rank], group=group, group_src=rank) for rank in others]
    works += [dist.isend(x, group=group, group_dst=rank) for rank in others]
    out[own].copy_(x)
    return _all_of(works)


def start_reduce_scatter(x: Tensor, out: Tensor, group: Any) -> Finish:
    """Start the sum of the ranks' contiguous tensors, of which each gets its part in front."""
    if not x.is_cpu:
        return dist.reduce_scatter_tensor(
            out.flatten(), x.flatten(), group=group, async_op=True
        ).wait
    parts, sums = x.flatten(1), out.flatten()
    size = max(_PIECE // (len(parts) * x.element_size()), 1)
    # A piece is on its way while the one before is added up.
    started = (
        (sums[first : first + size], *_start_exchange(parts[:, first : first + size], group))
        for first in range(0, sums.numel(), size)
    )
    coming = next(started, None)

    def add() -> None:
        nonlocal coming
        while coming is not None:
            own, received, finish = coming
            finish()
            coming = next(started, None)
            torch.sum(received, 0, dtype=x.dtype, out=own)

    return add


def _is_small(x: Tensor, group: Any) -> bool:
    return x.is_cpu and x.nbytes * (group.size() - 1) <= SMALL and x.dtype != torch.bool


def _start_all_to_all(x: Tensor, group: Any) -> tuple[Tensor, Finish]:
    """Start to bring the ranks' tensors to all of them, stacked."""
    return _start_exchange(x.expand(group.size(), *x.shape), group)


def _start_exchange(parts: Tensor, group: Any) -> tuple[Tensor, Finish]:
    """Start to bring each rank its part of the ranks' tensors, stacked."""
    sent = parts.contiguous()
    received = torch.empty_like(sent)
    work = dist.all_to_all_single(received.flatten(), sent.flatten(), group=group, async_op=True)
    return received, work.wait


def _then(finish: Finish, more: Callable[[], Any]) -> Finish:
    def both() -> None:
        finish()
        more()

    return both


def _all_of(works: Sequence[Any]) -> Finish:
    def wait() -> None:
        for work in works:
            work.wait()

    return wait
