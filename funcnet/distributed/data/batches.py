"""`part`: a rank's rows of a batch that all ranks have."""

from typing import Any

from torch import Tensor

from funcnet import tree
from funcnet.core import Tree
from funcnet.data import leading_extent, on_device
from funcnet.distributed.processes.start import AxisName, Mesh, axis_of
from funcnet.errors import check_count, require
from funcnet.runtime import is_transformed


def part(
    batch: Tree,
    mesh: Mesh,
    *,
    axis: AxisName = "data",
    equal: bool = True,
    micro_batches: int = 1,
) -> Any:
    """This rank's rows of a batch that all ranks have: rows one after another, of every leaf.

    All ranks go through the same global batches, such as those of `funcnet.batches` with one key.
    So what is trained does not depend on the number of ranks.

    Args:
        batch: a tree of tensors or numpy arrays, of shape (n, ...).
        mesh: that of all ranks, or a dict of the sizes of its axes.
        axis: the ranks that share the batch.
        equal: whether all parts must have as many rows. Where they need not, the first parts may
            have a row more; then `mean` is not exact, and `sum` with a `total` loss is, and
            `data_parallel` is to be told so too.
        micro_batches: those of the training step. The rank then has its rows of each micro-batch
            that a single process would make of the batch, which matters where they are not alike:
            with dropout, batch norm, and losses that divide by what they count.

    Returns:
        the rows of the first rank first, of each micro-batch.

    Raises:
        ValueError: fewer rows than ranks; leaves of different lengths; a number of rows that the
            ranks do not divide, unless ``equal`` is False, and under `funcnet.jit`, or in several
            micro-batches, in any case.

    >>> import torch
    >>> part((torch.ones(4, 2), torch.zeros(4)), {"data": 1})[0].shape
    torch.Size([4, 2])
    """
    ranks = axis_of(mesh, axis)
    batch = on_device(None)(batch)
    rows = leading_extent("part", batch, "a batch of tensors")
    check_count("part", micro_batches=micro_batches)
    require(rows >= ranks.size, f"part: expects a row for each of {ranks.size} ranks, got {rows}")
    if ranks.size == 1:
        return batch
    require(
        rows % ranks.size == 0 or not equal,
        f"part: expects a number of rows that {ranks.size} ranks divide, got {rows}; equal=False "
        "gives the first ranks a row more",
    )
    if micro_batches > 1:
        require(
            rows % (micro_batches * ranks.size) == 0,
            f"part: expects a number of rows that {micro_batches} micro-batches of {ranks.size} "
            f"ranks divide, got {rows}",
        )
        return tree.map(
            lambda leaf: ranks.part(leaf.unflatten(0, (micro_batches, -1)), 1).flatten(0, 1), batch
        )
    if is_transformed() or any([leaf.is_meta for leaf in tree.leaves(batch)]):
        require(
            rows % ranks.size == 0,
            f"part: under jit, expects a number of rows that {ranks.size} ranks divide, got {rows}",
        )
        return tree.map(ranks.part, batch)
    each, more = divmod(rows, ranks.size)
    begin = ranks.index * each + min(ranks.index, more)
    end = begin + each + (ranks.index < more)

    def own(leaf: Tensor) -> Tensor:
        return leaf[begin:end]

    return tree.map(own, batch)
