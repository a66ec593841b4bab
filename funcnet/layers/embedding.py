"""The embedding: a layer whose input is an index and has no cotangent."""

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import initializers, tree
from funcnet.core import Layer, Params, Pullback
from funcnet.initializers import Initializer
from funcnet.lift import fastest, stateless, with_kernel
from funcnet.params import Param, declare


@with_kernel(torch.ops.aten.embedding_dense_backward.default)
def embedding_backward(
    dy: Tensor, x: Tensor, num_embeddings: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    """``dweight[i] = sum of dy where x = i``, divided by how often that is, if by frequency."""
    indices = x.reshape(-1, 1).long()
    rows = dy.reshape(indices.shape[0], dy.shape[-1])
    kept = indices != padding_idx
    if scale_grad_by_freq:
        counts = torch.zeros_like(indices[:, 0]).new_zeros(num_embeddings)
        counts = counts.scatter_add(0, indices[:, 0], torch.ones_like(indices[:, 0]))
        rows = rows / counts[indices[:, 0]].unsqueeze(1).to(rows.dtype)
    rows = torch.where(kept, rows, 0.0)
    dweight = rows.new_zeros((num_embeddings, rows.shape[1]))
    return dweight.scatter_add(0, indices.expand_as(rows), rows)


def embedding_rule(
    residuals: dict[str, Tensor], dy: Tensor, *static: int, params: bool, x: bool
) -> tuple[Params | None, None]:
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
    if num_embeddings < 0:
        raise ValueError(f"embedding: num_embeddings must be >= 0, got {num_embeddings}")
    if embedding_dim < 0:
        raise ValueError(f"embedding: embedding_dim must be >= 0, got {embedding_dim}")
    if padding_idx is not None:
        if not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"embedding: padding_idx must be within {num_embeddings} rows, got {padding_idx}"
            )
        padding_idx %= num_embeddings
    static = (num_embeddings, -1 if padding_idx is None else padding_idx, scale_grad_by_freq)

    def start(
        key: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        weight = (weight_init or initializers.normal())(key, shape, dtype, device)
        if padding_idx is None:
            return weight
        return weight.masked_fill(
            (torch.arange(shape[0], device=device) == padding_idx)[:, None], 0.0
        )

    @declare
    def init(x: Tensor) -> dict[str, Param]:
        if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"expects int32 or int64 indices, got {tree.describe(x)}")
        return {"weight": Param((num_embeddings, embedding_dim), start, dtype)}

    def apply(params: Params, x: Tensor) -> Tensor:
        try:
            # What is passed beside the weight says how autograd treats it, as in torch.nn.
            return F.embedding(
                x, params["weight"], padding_idx, scale_grad_by_freq=scale_grad_by_freq
            )
        except IndexError:
            raise ValueError(
                f"embedding: expects indices in [0, {num_embeddings}), "
                f"got indices from {int(x.min())} to {int(x.max())}"
            ) from None

    def vjp(params: Params, x: Tensor) -> tuple[Tensor, Pullback]:
        return apply(params, x), Pullback(embedding_rule, {"x": x}, static)

    return stateless(init, apply, vjp)
