"""A matrix for each axis of a tensor: what Shampoo and SOAP know of a leaf's gradients.

The matrices of a leaf are kept in one vector, one after another, row by row, so that an entry of a
state has one tensor for each leaf. ``sizes`` says for each axis how many rows its matrix has, and 0
for an axis without.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from funcnet.optimizers.leaves import at_least_float32

Sizes = tuple[int, ...]
Matrices = list[Tensor | None]


def unpack(packed: Tensor, sizes: Sizes) -> Matrices:
    """The matrices in a vector, None for an axis without.

    >>> unpack(torch.arange(5.0), (2, 0, 1))
    [tensor([[0., 1.],
            [2., 3.]]), None, tensor([[4.]])]
    """
    parts = packed.split([size * size for size in sizes]) if sizes else ()
    return [part.view(n, n) if n else None for part, n in zip(parts, sizes, strict=True)]


def pack(matrices: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """The vector of these matrices; of no elements, and like a tensor, if there is none."""
    present = [matrix.reshape(-1) for matrix in matrices if matrix is not None]
    return torch.cat(present) if present else at_least_float32(like).new_zeros(0)


def changed(
    function: Callable[..., Tensor], packed: Tensor, sizes: Sizes, *others: Sequence[Tensor | None]
) -> Tensor:
    """``function(matrix, ...)`` of each matrix in a vector, and those of its axis in ``others``."""
    rows = zip(unpack(packed, sizes), *others, strict=True)
    return pack([None if row[0] is None else function(*row) for row in rows], packed)


def start(p: Tensor, sizes: Sizes, diagonal: float) -> Tensor:
    """The vector of the matrices ``diagonal`` times the identity, for a leaf p."""
    x = at_least_float32(p)
    eyes = [torch.eye(n, dtype=x.dtype, device=x.device) if n else None for n in sizes]
    return diagonal * pack(eyes, p)


def outer(x: Tensor, sizes: Sizes) -> Matrices:
    """For each axis the products ``X X^T``, where X has the axis as rows and the rest as columns.

    >>> outer(torch.tensor([[1.0, 2.0]]), (0, 2))
    [None, tensor([[1., 2.],
            [2., 4.]])]
    """
    columns = [
        x.movedim(axis, 0).reshape(n, x.numel() // n) if n else None for axis, n in enumerate(sizes)
    ]
    return [None if c is None else c @ c.mT for c in columns]


def rotate(x: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """x with each axis multiplied by its matrix: ``y[.., j, ..] = sum_i x[.., i, ..] M[i, j]``.

    >>> rotate(torch.tensor([[1.0, 2.0]]), [None, torch.tensor([[0.0, 1.0], [1.0, 0.0]])])
    tensor([[2., 1.]])
    """
    for matrix in matrices:  # of the first axis, which becomes the last
        x = x.movedim(0, -1)
        x = x if matrix is None else x @ matrix
    return x


def transposed(matrices: Sequence[Tensor | None]) -> Matrices:
    """Each matrix transposed."""
    return [None if matrix is None else matrix.mT for matrix in matrices]


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh``, which is NaN for a matrix that is not finite, instead of an error."""
    finite = matrix.isfinite().all()
    values, vectors = torch.linalg.eigh(torch.where(finite, matrix, 0.0))
    return torch.where(finite, values, torch.nan), torch.where(finite, vectors, torch.nan)


def inverse_root(matrix: Tensor, root: float) -> Tensor:
    """``matrix^(-1 / root)`` of a symmetric matrix without eigenvalues below 0, but for rounding.

    >>> inverse_root(torch.tensor([[16.0, 0.0], [0.0, 1.0]]), 4)
    tensor([[0.5000, 0.0000],
            [0.0000, 1.0000]])
    """
    values, vectors = eigh(matrix)
    precision = torch.finfo(matrix.dtype)
    least = (values[-1:] * precision.eps).clamp(min=precision.tiny)
    powers = torch.maximum(values, least) ** (-1.0 / root)
    return (vectors * powers) @ vectors.mT


def sizes_of(p: Tensor, most: int, least_axes: int = 0) -> Sizes:
    """How many rows the matrix of each axis has: none for an axis of 1 or of more than ``most``.

    A tensor of fewer axes than ``least_axes``, or without elements, has none at all.
    """
    if math.prod(p.shape) == 0 or p.dim() < least_axes:
        return (0,) * p.dim()
    return tuple(n if 1 < n <= most else 0 for n in p.shape)
