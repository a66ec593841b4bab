"""Dropout: a layer that needs a key when it trains."""

import torch
from torch import Tensor

from funcnet import random
from funcnet.core import Forward, Key, Layer, Params, Pullback
from funcnet.errors import require
from funcnet.lift import backward_rule, require_floating, stateful
from funcnet.params import declare


def dropout_backward(dy: Tensor, scale: float, kept: Tensor | None = None) -> Tensor:
    """``dx = dy scale [kept]``; dy where nothing was dropped."""
    return dy if kept is None else torch.where(kept, dy * scale, 0.0)


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
    require(0.0 <= p <= 1.0, f"dropout: p must be in [0, 1], got {p}")
    scale = 1.0 / (1.0 - p) if p < 1.0 else 0.0

    def forward(params: Params, x: Tensor, state: Params, key: Key, train: bool) -> Forward:
        residuals = {}
        if train and key is not None and p > 0.0:
            kept = random.bernoulli(key, 1.0 - p, x.shape, device=x.device)
            residuals["kept"] = kept
            x = torch.where(kept, x * scale, 0.0)
        return x, Pullback(backward_rule, residuals, (dropout_backward, scale)), state

    return stateful(declare(require_floating), forward, keyed=p > 0.0)
