"""The embedding: a layer whose input is an index and has no cotangent."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import initializers, tree
from funcnet.batch_axis import BatchAxis
from funcnet.core import Forward, Grads, Key, Layer, Params, Pullback, Tree, pull
from funcnet.deferred import defers, mapped
from funcnet.errors import require
from funcnet.initializers import Initializer
from funcnet.lift import fastest, stateless, with_forward, with_kernel
from funcnet.params import Param, declare


@with_kernel(torch.ops.aten.embedding_dense_backward.default)
def embedding_backward(
    dy: Tensor, x: Tensor, num_embeddings: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    """``dweight[i] = sum of dy where x = i``, divided by how often that is, if by frequency."""
    x = x.flatten().long()
    rows = torch.where((x != padding_idx)[:, None], dy.reshape(x.shape[0], dy.shape[-1]), 0.0)
    if scale_grad_by_freq:
        counts = x.new_zeros(num_embeddings).scatter_add(0, x, torch.ones_like(x))
        rows = rows / counts[x][:, None].to(rows.dtype)
    return rows.new_zeros((num_embeddings, rows.shape[1])).index_add(0, x, rows)


def renormalized(rows: Tensor, max_norm: float | None, norm_type: float) -> Tensor:
    """Rows longer than ``max_norm`` scaled to that length, by the formula that torch has."""
    if max_norm is None:
        return rows
    norm = torch.linalg.vector_norm(rows, norm_type, -1, keepdim=True)
    return torch.where(norm > max_norm, rows * (max_norm / (norm + 1e-7)), rows)


def embedding_rule(
    residuals: dict[str, Tensor], dy: Tensor, *static: int, params: bool, x: bool
) -> Grads:
    """``dweight[i] = sum of dy where x = i``."""
    if not params:
        return None, None
    return {"weight": fastest(embedding_backward, dy)(dy, residuals["x"], *static)}, None


def by_all_frequencies(layer: Layer, indices_of: Callable[[Any], Tensor]) -> Layer:
    """The layer, whose gradient is divided by how often rows occur, with a global form."""

    def global_form(axis: BatchAxis) -> Layer:
        def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
            y, pullback, state = layer.forward(params, x, state, key, train)
            residuals = {"": pullback, "indices": indices_of(x)}
            return y, Pullback(all_frequencies_rule, residuals, (axis,)), state

        return with_forward(layer, forward)

    layer.global_form = global_form
    return layer


@defers
def all_frequencies_rule(
    residuals: Any, dy: Tensor, axis: BatchAxis, *, params: Any, x: bool
) -> Grads:
    """The rule of the layer, with how often a row occurs on all ranks."""
    indices = residuals.pop("indices")
    dparams, dx = pull(residuals, "", dy, params=params, x=x)
    return mapped(by_frequency_of_all, dparams, indices, axis) if params else None, dx


def by_frequency_of_all(dparams: Params, indices: Tensor, axis: BatchAxis) -> Params:
    """A gradient that is divided by how often a row occurs here, by how often on all ranks."""
    dweight = dparams["weight"]
    wide = torch.promote_types(dweight.dtype, torch.float32)
    flat = indices.reshape(-1).long()
    own = dweight.new_zeros(len(dweight), dtype=wide)
    own = own.scatter_add(0, flat, own.new_ones(len(flat)))
    share = own / axis.sum(own).clamp(min=1)
    return {"weight": dweight * share.unsqueeze(1).to(dweight.dtype)}


class Rows(NamedTuple):
    """The table that indices point into, as `embedding` and `embedding_bag` declare it."""

    number: int
    size: int
    padding: int

    @classmethod
    def of(cls, name: str, number: int, size: int, padding_idx: int | None, sparse: bool) -> "Rows":
        """From the arguments of a constructor; ValueError for wrong ones. No padding is -1."""
        require(number >= 0, f"{name}: num_embeddings must be >= 0, got {number}")
        require(size >= 0, f"{name}: embedding_dim must be >= 0, got {size}")
        inside = padding_idx is None or -number <= padding_idx < number
        require(inside, f"{name}: padding_idx must be within {number} rows, got {padding_idx}")
        dense = "gradients have the structure of the params, so they are dense"
        require(not sparse, f"{name}: sparse must be False, got {sparse}; {dense}")
        return cls(number, size, -1 if padding_idx is None else padding_idx % number)

    def declared(
        self, weight_init: Initializer | None, dtype: torch.dtype | None
    ) -> dict[str, Param]:
        """The weight: N(0, 1) by default, with zeros in the row of the padding."""

        def start(key: Tensor, shape: tuple[int, ...], *kind: Any) -> Tensor:
            weight = (weight_init or initializers.normal())(key, shape, *kind)
            is_padding = torch.arange(self.number, device=weight.device) == self.padding
            return weight.masked_fill(is_padding[:, None], 0.0) if self.padding >= 0 else weight

        return {"weight": Param((self.number, self.size), start, dtype)}


def is_index(x: Any) -> bool:
    """Whether x is a tensor of indices."""
    return isinstance(x, Tensor) and x.dtype in (torch.int32, torch.int64)


def embedding(
    num_embeddings: int,
    embedding_dim: int,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    weight_init: Initializer | None = None,
    dtype: torch.dtype = torch.float32,
) -> Layer:
    """``y = weight[x]``.

    Args:
        num_embeddings: the number of rows; x lies in [0, num_embeddings).
        embedding_dim: the size of a row.
        padding_idx: a row that starts as zeros and gets no gradient.
        max_norm: rows longer than this are scaled to this length in y. In torch that changes the
            weight itself; here the weight stays, and its gradient is what torch's would be: as
            if the scaled row had been the parameter.
        norm_type: the p of the p-norm that ``max_norm`` limits.
        scale_grad_by_freq: divide a row's gradient by how often the row occurs in x.
        sparse: only False: gradients have the structure of the params.
        weight_init: default N(0, 1).
        dtype: of the weight, since x has none to give.

    Inputs:
        x of shape ``(*)``, int32 or int64.
    Returns:
        y of shape ``(*, embedding_dim)``.
    Learned params:
        ``weight`` (num_embeddings, embedding_dim).
    VJP:
        ``dweight[i] = sum dy[x = i]``; dx is None.
    Raises:
        TypeError: x that is not an integer.
        ValueError: an index out of range.

    Source: ``torch.nn.Embedding``.

    >>> import funcnet as fn
    >>> layer = fn.embedding(3, 2)
    >>> params = {"weight": torch.arange(6.0).reshape(3, 2)}
    >>> y, pullback, _ = layer.vjp(params, torch.tensor([2, 2, 0]))
    >>> y
    tensor([[4., 5.],
            [4., 5.],
            [0., 1.]])
    >>> pullback(torch.ones(3, 2))
    ({'weight': tensor([[1., 1.],
            [0., 0.],
            [2., 2.]])}, None)
    """
    rows = Rows.of("embedding", num_embeddings, embedding_dim, padding_idx, sparse)
    static = (rows.number, rows.padding, scale_grad_by_freq)

    @declare
    def init(x: Tensor) -> dict[str, Param]:
        wrong = f"expects int32 or int64 indices, got {tree.describe(x)}"
        require(is_index(x), wrong, TypeError)
        return rows.declared(weight_init, dtype)

    def apply(params: Params, x: Tensor) -> Tensor:
        try:
            # What is passed beside the weight says how autograd treats it, as in torch.nn.
            by_freq = scale_grad_by_freq
            y = F.embedding(x, params["weight"], padding_idx, scale_grad_by_freq=by_freq)
        except IndexError:
            got = f"got indices from {int(x.min())} to {int(x.max())}"
            raise ValueError(f"embedding: expects indices in [0, {rows.number}), {got}") from None
        return renormalized(y, max_norm, norm_type)

    def vjp(params: Params, x: Tensor) -> tuple[Tensor, Pullback]:
        return apply(params, x), Pullback(embedding_rule, {"x": x}, static)

    # What torch calls the gradient then is not the derivative.
    other = padding_idx is not None or max_norm is not None or scale_grad_by_freq
    told: Any = {"mixes_examples": scale_grad_by_freq, "breaks": ("derivative",) if other else ()}
    made = stateless(init, apply, vjp, **told)
    return by_all_frequencies(made, lambda x: x) if scale_grad_by_freq else made
