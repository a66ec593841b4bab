"""The embedding: a layer whose input is an index and has no cotangent."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import initializers, tree
from funcnet.core import Grads, Layer, Params, Pullback
from funcnet.errors import require
from funcnet.initializers import Initializer
from funcnet.lift import fastest, stateless, with_kernel
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


def embedding_rule(
    residuals: dict[str, Tensor], dy: Tensor, *static: int, params: bool, x: bool
) -> Grads:
    """``dweight[i] = sum of dy where x = i``."""
    if not params:
        return None, None
    return {"weight": fastest(embedding_backward, dy)(dy, residuals["x"], *static)}, None


def embedding(
    num_embeddings: int,
    embedding_dim: int,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    *,
    weight_init: Initializer | None = None,
    dtype: torch.dtype = torch.float32,
) -> Layer:
    """``y = weight[x]``.

    Args:
        num_embeddings: the number of rows; x lies in [0, num_embeddings).
        embedding_dim: the size of a row.
        padding_idx: a row that starts as zeros and gets no gradient.
        scale_grad_by_freq: divide a row's gradient by how often the row occurs in x.
        weight_init: default N(0, 1).
        dtype: of the weight, since x has none to give.

    Inputs: x of shape (*), int32 or int64.
    Returns: y of shape (*, embedding_dim).
    Params: ``weight`` (num_embeddings, embedding_dim).
    VJP: ``dweight[i] = sum dy[x = i]``; dx is None.
    Raises: TypeError for x that is not an integer, ValueError for an index out of range.
    Source: ``torch.nn.Embedding``, without ``max_norm`` (it changes the weight in the forward
    pass) and ``sparse``.

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
    rows = num_embeddings
    require(rows >= 0, f"embedding: num_embeddings must be >= 0, got {rows}")
    require(embedding_dim >= 0, f"embedding: embedding_dim must be >= 0, got {embedding_dim}")
    inside = padding_idx is None or -rows <= padding_idx < rows
    require(inside, f"embedding: padding_idx must be within {rows} rows, got {padding_idx}")
    padding = -1 if padding_idx is None else padding_idx % rows
    static = (rows, padding, scale_grad_by_freq)

    def start(key: Tensor, shape: tuple[int, ...], *kind: Any) -> Tensor:
        weight = (weight_init or initializers.normal())(key, shape, *kind)
        is_padding = torch.arange(rows, device=weight.device) == padding
        return weight.masked_fill(is_padding[:, None], 0.0) if padding >= 0 else weight

    @declare
    def init(x: Tensor) -> dict[str, Param]:
        indices = isinstance(x, Tensor) and x.dtype in (torch.int32, torch.int64)
        require(indices, f"expects int32 or int64 indices, got {tree.describe(x)}", TypeError)
        return {"weight": Param((rows, embedding_dim), start, dtype)}

    def apply(params: Params, x: Tensor) -> Tensor:
        try:
            # What is passed beside the weight says how autograd treats it, as in torch.nn.
            by_freq = scale_grad_by_freq
            return F.embedding(x, params["weight"], padding_idx, scale_grad_by_freq=by_freq)
        except IndexError:
            got = f"got indices from {int(x.min())} to {int(x.max())}"
            raise ValueError(f"embedding: expects indices in [0, {rows}), {got}") from None

    def vjp(params: Params, x: Tensor) -> tuple[Tensor, Pullback]:
        return apply(params, x), Pullback(embedding_rule, {"x": x}, static)

    return stateless(init, apply, vjp)
