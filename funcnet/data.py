"""Data as values: what a loop over batches runs over."""

from torch import Tensor

from funcnet import tree
from funcnet.core import Tree
from funcnet.random import permutation


def epoch_batches(key: Tensor | None, data: Tree, batch_size: int) -> Tree:
    """The batches of one epoch, stacked: what `scan` runs over.

    A last batch that is not full is left out, as in JAX's examples; the next epoch's key brings
    its data in.

    Args:
        key: shuffles the data; None keeps its order.
        data: a tree of tensors of shape (n, ...), such as ``(x, target)``.
        batch_size: at most n.

    Returns:
        A tree of tensors of shape (n // batch_size, batch_size, ...).

    Raises:
        ValueError: the extents differ, or n is less than ``batch_size``.

    >>> import funcnet as fn
    >>> epoch_batches(fn.key(0), torch.arange(7), 3)
    tensor([[0, 1, 5],
            [6, 4, 3]])
    """
    leaves = tree.leaves(data)
    extents = {leaf.shape[:1] for leaf in leaves}
    if len(extents) != 1 or () in extents:
        raise ValueError(
            f"epoch_batches: expects tensors with one leading extent, got {tree.describe(data)}"
        )
    (size,) = extents.pop()
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"epoch_batches: expects an integer batch_size, got {batch_size!r}")
    if not 1 <= batch_size <= size:
        raise ValueError(
            f"epoch_batches: expects a batch_size from 1 to {size}, the number of examples, "
            f"got {batch_size}"
        )
    count = size // batch_size
    used = count * batch_size
    if key is None:
        return tree.map(lambda x: x[:used].unflatten(0, (count, batch_size)), data)
    order = permutation(key, size, device=leaves[0].device)[:used]
    return tree.map(lambda x: x[order].unflatten(0, (count, batch_size)), data)
