"""The embedding: a layer whose input is an index and has no cotangent."""

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import initializers, tree
from funcnet.core import Layer, Params, Pullback, check_params, stateless
from funcnet.initializers import Initializer
from funcnet.random import fold_in


def embedding_rule(
    residuals: dict[str, Tensor],
    dy: Tensor,
    num_embeddings: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
    *,
    params: bool,
    x: bool,
) -> tuple[Params | None, None]:
    """``dweight[i] = sum of dy where x = i``."""
    if not params:
        return None, None
    indices = residuals["x"]
    dweight = torch.ops.aten.embedding_dense_backward(
        dy, indices, num_embeddings, padding_idx, scale_grad_by_freq
    )
    return {"weight": dweight}, None


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

    def check_indices(x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"embedding: expects int32 or int64 indices, got {tree.describe(x)}")

    def init(key: Tensor, x: Tensor) -> Params:
        check_indices(x)
        weight = (weight_init or initializers.normal())(
            fold_in(key, "weight"), (num_embeddings, embedding_dim), dtype, x.device
        )
        if padding_idx is not None:
            row = torch.arange(num_embeddings, device=x.device) == padding_idx
            weight = weight.masked_fill(row[:, None], 0.0)
        return {"weight": weight}

    def apply(params: Params, x: Tensor) -> Tensor:
        check_indices(x)
        check_params("embedding", params, ("weight",))
        if params["weight"].shape != (num_embeddings, embedding_dim):
            raise ValueError(
                f"embedding: expects a weight of shape {(num_embeddings, embedding_dim)}, "
                f"got {tuple(params['weight'].shape)}"
            )
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
