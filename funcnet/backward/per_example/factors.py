"""Gradients of single examples as factors: their norms need no gradient.

The gradient of a linear layer's weight, of one example with T positions, is a sum of T outer
products. Its squared norm is the sum of the elementwise product of two T x T Gram matrices, so it
can be had without the gradient; of one position it is the product of two norms.

Each kind of factors here has

- ``formed()``: the gradients themselves, of shape (examples, *shape of the leaf);
- ``squares()``: their squared norms, (examples,);
- ``+``: those of a leaf that is used twice;
- ``copies(n)``: of n copies of a layer, that were counted as examples, the stacked gradient.

Source: Goodfellow 2015, "Efficient per-example gradient computations"; Li et al. 2022, "Large
language models can be strong differentially private learners", for several positions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Factors:
    """The gradients of a leaf, one for each example."""

    def formed(self) -> Tensor:
        """The gradients, of shape (examples, *shape of the leaf)."""
        raise NotImplementedError

    def squares(self) -> Tensor:
        """The squared norms of the gradients."""
        return _squares(self.formed())

    def copies(self, n: int) -> "Factors":
        """Each n examples as the copies of one layer, for one example."""
        return Formed(self.formed().unflatten(0, (-1, n)))

    def clone(self) -> "Factors":
        """The same, for rules that give two leaves of one gradient each its own memory."""
        return self

    def __add__(self, other: "Factors") -> "Factors":
        return Formed(self.formed() + other.formed())


def _wide(tensor: Tensor) -> Tensor:
    """Half precision as float32: squares of small numbers are 0 in float16."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _squares(tensor: Tensor) -> Tensor:
    """The sum of squares over all dimensions but the first; the norm takes no copy of them."""
    if tensor.dim() < 2:
        return _wide(tensor).square()
    return torch.linalg.vector_norm(_wide(tensor).flatten(1), dim=1).square()


@dataclass(frozen=True, eq=False)
class Formed(Factors):
    """Gradients that are there, as of a bias: they are no larger than what they are made of."""

    gradients: Tensor

    def formed(self) -> Tensor:
        return self.gradients


@dataclass(frozen=True, eq=False)
class Products(Factors):
    """``sum_p rows[p] columns[p]^T``, in the shape of the leaf.

    Attributes:
        rows: (examples, *groups, positions, out); the groups are those of a convolution, say.
        columns: (examples, *groups, positions, in).
        shape: of the leaf.
    """

    rows: Tensor
    columns: Tensor
    shape: tuple[int, ...]

    def formed(self) -> Tensor:
        return (self.rows.mT @ self.columns).reshape(len(self.rows), *self.shape)

    def squares(self) -> Tensor:
        rows, columns = _wide(self.rows), _wide(self.columns)
        if rows.shape[-2] == 1:
            norms = [torch.linalg.vector_norm(each, dim=(-2, -1)) for each in (rows, columns)]
            return _sums((norms[0] * norms[1]).square())
        if not self.is_formed():
            grams = (rows @ rows.mT) * (columns @ columns.mT)
            terms = grams.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
            return _above_rounding(_sums(grams), _sums(terms.sum(-1, keepdim=True).square()))
        return _squares(rows.mT @ columns)

    def is_formed(self) -> bool:
        """Whether forming the gradients takes no more multiplications than Gram matrices.

        Where it takes more, the Gram matrices are smaller than the gradients too.
        """
        (*_, positions, out), wide = self.rows.shape, self.columns.shape[-1]
        return positions > 1 and positions * (out + wide) >= out * wide

    def copies(self, n: int) -> Factors:
        rows, columns = (each.unflatten(0, (-1, n)) for each in (self.rows, self.columns))
        return Products(rows, columns, (n, *self.shape))

    def __add__(self, other: Factors) -> Factors:
        if isinstance(other, Products) and other.rows.shape[:-2] == self.rows.shape[:-2]:
            rows = torch.cat([self.rows, other.rows], -2)
            columns = torch.cat([self.columns, other.columns], -2)
            return Products(rows, columns, self.shape)
        if isinstance(other, Rows) and self.rows.dim() == 3:
            return Tied(self, other)
        return super().__add__(other)


def _sums(tensor: Tensor) -> Tensor:
    """The sum over all dimensions but the first, if there are any."""
    return tensor.flatten(1).sum(1) if tensor.dim() > 1 else tensor


def _above_rounding(squares: Tensor, terms: Tensor) -> Tensor:
    """Squared norms, no less than what rounding leaves of terms of this size that cancel.

    A norm that is too small would let a private step take more of an example than its bound.
    """
    return torch.maximum(squares, 4 * torch.finfo(squares.dtype).eps * terms)


@dataclass(frozen=True, eq=False)
class Rows(Factors):
    """``gradient[r] = sum of rows[p] where index[p] = r``, as of an embedding.

    Attributes:
        index: (examples, positions).
        rows: (examples, positions, features).
        shape: of the leaf: (number of rows, features), with copies before it.
    """

    index: Tensor
    rows: Tensor
    shape: tuple[int, ...]

    def formed(self) -> Tensor:
        number = torch.Size(self.shape[:-1]).numel()
        return _added(self.index, self.rows, number).reshape(len(self.index), *self.shape)

    def squares(self) -> Tensor:
        positions, number = self.index.shape[1], torch.Size(self.shape[:-1]).numel()
        if not positions or number <= positions:
            return super().squares()
        # Equal indices are summed where the first of them stands: that takes no whole table.
        equal = self.index.unsqueeze(2) == self.index.unsqueeze(1)
        places = torch.arange(positions, device=self.index.device)
        first = torch.where(equal, places, positions).amin(2)
        return _squares(_added(first, _wide(self.rows), positions))

    def copies(self, n: int) -> Factors:
        number = torch.Size(self.shape[:-1]).numel()
        copy = torch.arange(n, device=self.index.device).repeat(len(self.index) // n)
        index = (self.index + number * copy[:, None]).unflatten(0, (-1, n)).flatten(1)
        return Rows(index, self.rows.unflatten(0, (-1, n)).flatten(1, 2), (n, *self.shape))

    def __add__(self, other: Factors) -> Factors:
        if isinstance(other, Rows):
            index = torch.cat([self.index, other.index], 1)
            return Rows(index, torch.cat([self.rows, other.rows], 1), self.shape)
        return other + self if isinstance(other, (Products, Tied)) else super().__add__(other)


def _added(index: Tensor, rows: Tensor, number: int) -> Tensor:
    """``(examples, number, features)``, with each row added where its index says."""
    examples = len(index)
    offset = number * torch.arange(examples, device=index.device)[:, None]
    table = rows.new_zeros((examples * number, rows.shape[-1]))
    return table.index_add(0, (index + offset).flatten(), rows.flatten(0, 1)).unflatten(
        0, (examples, number)
    )


@dataclass(frozen=True, eq=False)
class Tied(Factors):
    """An embedding that is the output layer of the same net too.

    The inner product of both gradients is ``sum_{p, t} dy[t, index[p]] <x[t], rows[p]>``.
    """

    products: Products
    rows: Rows

    def formed(self) -> Tensor:
        return self.products.formed() + self.rows.formed()

    def squares(self) -> Tensor:
        dy, x = _wide(self.products.rows), _wide(self.products.columns)
        index = self.rows.index.unsqueeze(1).expand(-1, dy.shape[1], -1)
        both = dy.gather(2, index) * (x @ _wide(self.rows.rows).mT)
        apart = self.products.squares() + self.rows.squares()
        return _above_rounding(apart + 2 * _sums(both), apart)

    def __add__(self, other: Factors) -> Factors:
        if isinstance(other, Rows):
            return _tied(self.products, self.rows + other)
        if isinstance(other, Products):
            return _tied(self.products + other, self.rows)
        return super().__add__(other)


def _tied(products: Factors, rows: Factors) -> Factors:
    if isinstance(products, Products) and isinstance(rows, Rows):
        return Tied(products, rows)
    return Formed(products.formed() + rows.formed())


@dataclass(frozen=True, eq=False)
class Joined(Factors):
    """Those of the parts of a leaf along its first dimension."""

    parts: tuple[Factors, ...]

    def formed(self) -> Tensor:
        return torch.cat([each.formed() for each in self.parts], 1)

    def squares(self) -> Tensor:
        total: Any = sum([each.squares() for each in self.parts])
        return total
