"""Formulas that are computed leaf by leaf, because they depend on each leaf's shape."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcnet.optimizers.leaves import Leaves, column


class Shaped(Leaves):
    """Leaves with shapes of their own, as what `each` gives: a tree like the params in names alone.

    Entries of a state that start as these are checked against the shapes they start with.
    """

    __slots__ = ()


def each(function: Callable[..., Any], *args: Any, outputs: int = 1) -> Any:
    """`leafwise`, for a function of one leaf with tests of its shape, and results of any shapes.

    Args:
        function: gives a tensor, or a tuple of as many as there are outputs.
        args: as for `leafwise`.
        outputs: how many Leaves this gives; a tuple of them if it is more than one.

    >>> rows, total = each(lambda x: (x.sum(1), x.sum()), Leaves([torch.ones(2, 3)]), outputs=2)
    >>> list(rows), list(total)
    ([tensor([3., 3.])], [tensor(6.)])
    """
    first = next(arg.tensors for arg in args if isinstance(arg, Leaves))
    found = [function(*row) for row in zip(*[column(arg, first) for arg in args], strict=False)]
    if outputs == 1:
        return Shaped(found)
    return tuple(Shaped([row[index] for row in found]) for index in range(outputs))


def by_shape(function: Callable[[Tensor], Tensor], leaves: Leaves, most: int = 2**24) -> Leaves:
    """``function`` of stacks: leaves of one shape and dtype are computed in one call.

    Args:
        function: of a tensor with an axis for the leaves in front, which its result has too.
        leaves: the leaves.
        most: a stack of more than one leaf has at most so many elements.

    >>> [leaf.shape for leaf in by_shape(lambda x: x @ x.mT, Leaves([torch.ones(2, 3)] * 4))]
    [torch.Size([2, 2]), torch.Size([2, 2]), torch.Size([2, 2]), torch.Size([2, 2])]
    """
    groups: dict[Any, list[int]] = {}
    for index, leaf in enumerate(leaves):
        groups.setdefault((leaf.shape, leaf.dtype, leaf.device), []).append(index)
    found: dict[int, Tensor] = {}
    for (shape, *_), alike in groups.items():
        count = max(1, most // max(1, shape.numel()))
        for part in (alike[start : start + count] for start in range(0, len(alike), count)):
            chosen = [leaves.tensors[index] for index in part]
            stack = torch.stack(chosen) if len(chosen) > 1 else chosen[0].unsqueeze(0)
            found.update(zip(part, function(stack).unbind(), strict=True))
    return Leaves([found[index] for index in range(len(found))])
