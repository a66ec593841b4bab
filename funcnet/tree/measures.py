"""How much is in a tree, and how large its numbers are."""

import math
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from funcnet.tree.dotted import to_dotted
from funcnet.tree.trees import leaves


def count(tree: Any) -> int:
    """How many numbers the tensors of a tree have together.

    Under `funcnet.vmap`, those of one member.

    >>> params, _ = fn.linear(25).init(fn.key(0), torch.ones(100, 2))
    >>> count(params)
    75
    """
    return sum([math.prod(leaf.shape) for leaf in leaves(tree) if isinstance(leaf, Tensor)])


def bytes(tree: Any) -> int:
    """How many bytes the numbers of `count` take, each in its dtype.

    >>> bytes({"weight": torch.ones(2, 3), "mask": torch.ones(5, dtype=torch.bool)})
    29
    """
    tensors = [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]
    return sum([math.prod(leaf.shape) * leaf.element_size() for leaf in tensors])


def norms(tree: Any) -> dict[str, Tensor]:
    """The Euclidean norm of each floating leaf, a 0-d tensor, by path; float32 for lower precision.

    >>> norms({"0": {"weight": torch.ones(4, 4), "bias": torch.zeros(4)}})
    {'0.weight': tensor(4.), '0.bias': tensor(0.)}
    """
    flat = to_dotted(tree).items()
    return {path: _norm(leaf) for path, leaf in flat if _has_norm(leaf)}


def global_norm(tree: Any) -> Tensor:
    """The Euclidean norm of all floating leaves as one vector: ``sqrt(sum of norm^2)``, 0-d.

    It is that of ``torch.nn.utils.get_total_norm``; of a tree without such leaves, 0.

    >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([[0.0, 4.0]])})
    tensor(5.)
    """
    found = [_norm(leaf) for leaf in leaves(tree) if _has_norm(leaf)]
    if not found:
        return torch.zeros(())
    dtype = reduce(torch.promote_types, [norm.dtype for norm in found])
    return torch.linalg.vector_norm(
        torch.stack([norm.to(found[0].device, dtype) for norm in found])
    )


def _has_norm(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _norm(leaf: Tensor) -> Tensor:
    return torch.linalg.vector_norm(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))
