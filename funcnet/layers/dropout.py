"""Dropout: a layer that needs a key when it trains."""

import torch
from torch import Tensor

from funcnet import random
from funcnet.core import (
    EMPTY,
    Anatomy,
    Layer,
    Params,
    Pullback,
    check_floating,
    check_params,
    refuse_state,
    with_anatomy,
)
from funcnet.layers.shape import moves_rule


def dropout_rule(
    residuals: dict[str, Tensor], dy: Tensor, scale: float, *, params: bool, x: bool
) -> tuple[Params | None, Tensor | None]:
    """``dx = dy scale [kept]``."""
    if not x:
        return ({} if params else None), None
    return ({} if params else None), torch.where(residuals["kept"], dy * scale, 0.0)


def dropout(p: float = 0.5) -> Layer:
    """Each value 0 with probability ``p``, else scaled: ``y = x [kept] / (1 - p)``.

    With ``train=False`` it is the identity.

    Args:
        p: the probability that a value is dropped, as in torch, not that it is kept.

    Inputs: x of any shape, floating; a key when ``train=True``.
    VJP: ``dx = dy [kept] / (1 - p)``; the residual is the mask.
    Raises: ValueError without a key.
    Source: ``torch.nn.Dropout``; Srivastava et al. 2014.

    >>> import funcnet as fn
    >>> fn.dropout(0.5).apply({}, torch.ones(6), key=fn.key(0), train=True)[0]
    tensor([0., 0., 2., 2., 0., 2.])
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout: p must be in [0, 1], got {p}")
    scale = 1.0 / (1.0 - p) if p < 1.0 else 0.0

    def mask(
        params: Params, x: Tensor, state: Params, key: Tensor | None, train: bool
    ) -> Tensor | None:
        """What is kept; None for all."""
        check_floating("dropout", x)
        check_params("dropout", params, ())
        if state:
            refuse_state("dropout", state)
        if not train or p == 0.0:
            return None
        if key is None:
            raise ValueError("dropout: needs a key when train=True, got None; pass key=fn.key(...)")
        return random.bernoulli(key, 1.0 - p, x.shape, device=x.device)

    def init(key: Tensor, x: Tensor) -> tuple[Params, Params]:
        check_floating("dropout", x)
        return {}, {}

    def apply(
        params: Params,
        x: Tensor,
        state: Params = EMPTY,
        *,
        key: Tensor | None = None,
        train: bool = False,
    ) -> tuple[Tensor, Params]:
        kept = mask(params, x, state, key, train)
        return (x if kept is None else torch.where(kept, x * scale, 0.0)), {}

    def vjp(
        params: Params,
        x: Tensor,
        state: Params = EMPTY,
        *,
        key: Tensor | None = None,
        train: bool = True,
    ) -> tuple[Tensor, Pullback, Params]:
        kept = mask(params, x, state, key, train)
        if kept is None:
            return x, Pullback(moves_rule, {}, ("dropout", "same"), x), {}
        y = torch.where(kept, x * scale, 0.0)
        return y, Pullback(dropout_rule, {"kept": kept}, (scale,), y), {}

    return with_anatomy(Layer(init, apply, vjp), Anatomy("dropout"))
