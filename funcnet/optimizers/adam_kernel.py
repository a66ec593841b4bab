"""PyTorch's fused kernel for Adam's update, on leaves in the CPU's memory."""

from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from funcnet.optimizers.leaves import Applied, Leaves, sum_into
from funcnet.runtime import FOREACH, fused_adamw_, is_transformed


def kernel_takes(*trees: Any) -> bool:
    """Whether PyTorch's kernel may run: it checks no strides and has no derivative."""
    leaves = [*chain.from_iterable(trees)]
    # First, as a function that jit compiles must not ask for strides.
    if is_transformed(*leaves) or len({*map(attrgetter("dtype"), leaves)}) != 1:
        return False
    return all(map(attrgetter("is_cpu"), leaves)) and all(map(Tensor.is_contiguous, leaves))


def adam_kernel(
    g: Leaves, means: list[Leaves], p: Leaves, step: Tensor, *, lr: float, **options: Any
) -> tuple[Leaves, list[Leaves]]:
    """The updates, and the new running means, of the update number ``step``.

    ``means`` are those of g and g^2, and with amsgrad the greatest so far of that of g^2. Where
    params or means are fresh, their memory is written to.
    """
    new: list[list[Tensor]] = [[] for _ in means]
    updates: list[Tensor] = []
    # The gradients are read here for the last time, and go part by part.
    left, g.tensors = [*g.tensors], []
    for part in _parts(left):
        grads = [left.pop(0) for _ in part]
        copies = [_writable(mean, slice(part.start, part.stop)) for mean in means]
        # From params of 0 the kernel steps to the update.
        start = p.tensors[part.start : part.stop]
        start = start if p.fresh else [torch.zeros_like(leaf) for leaf in start]
        lists = [start, grads, *copies] + [[]] * (3 - len(copies))
        fused_adamw_(*lists, [step] * len(part), lr=lr, **options)
        updates += start
        for mean, copy in zip(new, copies, strict=True):
            mean += copy
    if p.fresh:
        return Applied(updates), [*map(Leaves, new)]
    decay = -lr * options["weight_decay"]
    stepped = Leaves(updates, fresh=True)
    return sum_into(stepped, p, decay) if decay else stepped, [*map(Leaves, new)]


def _writable(leaves: Leaves, part: slice) -> list[Tensor]:
    """Some of the leaves, or copies of them where others have their memory too."""
    chosen = leaves.tensors[part]
    return chosen if leaves.fresh else FOREACH["clone"](chosen)


def _parts(leaves: list[Tensor]) -> list[range]:
    """The leaves in runs of 8 MiB or more, so that not much beside them is there at a time."""
    parts, begin, size = [], 0, 0
    for index, leaf in enumerate(leaves):
        size += leaf.nbytes
        if size >= 2**23 or index == len(leaves) - 1:
            parts.append(range(begin, index + 1))
            begin, size = index + 1, 0
    return parts
