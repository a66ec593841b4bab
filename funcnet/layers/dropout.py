"""Dropout: of values, of whole channels, of whole examples; a key is needed in training."""

from collections.abc import Callable, Mapping
from math import sqrt

import torch
from torch import Tensor

from funcnet import random
from funcnet.batch_axis import BatchAxis, first_index, first_indices
from funcnet.collectives import Axis
from funcnet.core import EMPTY, Forward, Key, Layer, Params, Pullback
from funcnet.errors import require
from funcnet.layers.spatial import NAMES, spatial
from funcnet.lift import backward_rule, require_floating, stateful
from funcnet.params import Param, declare

Shape = tuple[int, ...]

# What a dropped value becomes in alpha dropout: the limit of selu towards minus infinity.
_SATURATED = -1.7580993408473766


def dropout_backward(dy: Tensor, scale: float, kept: Tensor | None = None) -> Tensor:
    """``dx = dy scale [kept]``; dy where nothing was dropped."""
    return dy if kept is None else torch.where(kept, dy * scale, 0.0)


def dropping(
    name: str,
    p: float,
    draws: Callable[[Shape], Shape],
    alpha: bool = False,
    declaration: Callable[[Tensor], Mapping[str, Param]] = require_floating,
    least: int = 1,
    parts: tuple[Axis, int, int | None] | None = None,
) -> Layer:
    """``y = scale x + shift`` where it is kept, else one number, drawn for each mask element.

    Args:
        name: of the layer.
        p: the probability to drop.
        draws: the shape of the mask for a shape of x; it is broadcast against x.
        alpha: whether a dropped value becomes that of a saturated selu, and the result is scaled
            and shifted to keep mean 0 and variance 1; else 0, and the mean is kept.
        declaration: refuses an x that does not fit.
        least: the fewest dimensions of a batch.
        parts: where x is a rank's part along another dimension than the batch: the ranks, that
            dimension, and its whole size, None for that of all parts. It is of values then.
    """
    require(0.0 <= p <= 1.0, f"{name}: p must be in [0, 1], got {p}")
    scale, shift, dropped = (1.0 / (1.0 - p) if p < 1.0 else 0.0), 0.0, 0.0
    if alpha:
        scale = 1.0 / sqrt((1.0 - p) * (1.0 + p * _SATURATED**2)) if p < 1.0 else 0.0
        shift = -scale * p * _SATURATED
        dropped = scale * _SATURATED + shift

    def forward(
        params: Params,
        x: Tensor,
        state: Params,
        key: Key,
        train: bool,
        axis: BatchAxis | None = None,
    ) -> Forward:
        residuals = {}
        if train and key is not None and p > 0.0:
            shape = draws(tuple(x.shape))
            if axis is not None and draws is not of_values:
                require_batch(name, x, least, axis)
            if parts is not None:
                start = _start_of_part(x, parts, axis)
            else:
                start = first_index(axis, name, shape, x.device) if shape else 0
            kept = random.bernoulli(key, 1.0 - p, shape, device=x.device, start=start)
            residuals["kept"] = kept
            scaled = x * scale + shift if alpha else x * scale
            x = torch.where(kept, scaled, dropped)
        return x, Pullback(backward_rule, residuals, (dropout_backward, scale)), state

    return stateful(declare(declaration), forward, keyed=p > 0.0, name=name, takes_axis=True)


def _start_of_part(
    x: Tensor, parts: tuple[Axis, int, int | None], axis: BatchAxis | None
) -> int | Tensor:
    """Where a part of the mask starts that is one along two dimensions."""
    ranks, dim, size = parts
    places: dict[int, tuple[Axis, int | None]] = {dim % x.dim(): (ranks, size)}
    if axis is not None:
        places[axis.dim] = axis, None
    return first_indices(x.shape, places, x.device)


def require_batch(name: str, x: Tensor, least: int, axis: BatchAxis) -> None:
    """Raise ValueError for a part of a batch that has fewer dimensions, or the batch elsewhere."""
    what = f"expects a part of a batch, of at least {least} dimensions"
    require(x.dim() >= least, f"{name}: {what}, got one of shape {tuple(x.shape)}")
    require(axis.dim == 0, f"{name}: expects the batch in dimension 0, got dim={axis.dim}")


def of_values(shape: Shape) -> Shape:
    """Draws for each value one."""
    return shape


def _of_channels(shape: Shape) -> Shape:
    """Of a batch: (batch, channels, 1, ...)."""
    return (*shape[:2], *[1] * (len(shape) - 2))


def _of_examples(shape: Shape) -> Shape:
    return (shape[0], *[1] * (len(shape) - 1))


def _of_the_batch(shape: Shape) -> Shape:
    return ()


def dropout(p: float = 0.5) -> Layer:
    """Each value 0 with probability ``p``, else scaled: ``y = x [kept] / (1 - p)``.

    With ``train=False`` it is the identity.

    Args:
        p: the probability that a value is dropped, as in torch, not that it is kept.

    Inputs:
        x of any shape, floating; a key when ``train=True``.
    VJP:
        ``dx = dy [kept] / (1 - p)``; the residual is the mask.
    Raises:
        ValueError: without a key.

    Source: ``torch.nn.Dropout``; Srivastava et al. 2014.

    >>> import funcnet as fn
    >>> fn.dropout(0.5).apply({}, torch.ones(6), key=fn.key(0), train=True)[0]
    tensor([0., 0., 2., 2., 0., 2.])
    """
    return dropping("dropout", p, of_values)


def _dropout(dims: int, p: float = 0.5) -> Layer:
    """Each channel of each example 0 with probability ``p``, else scaled by ``1 / (1 - p)``.

    With ``train=False`` it is the identity.

    Args:
        p: the probability that a channel is dropped.

    Inputs:
        x of shape (batch, channels, height, width), floating; a key when ``train=True``.
        `dropout1d` and `dropout3d` take one without the batch too. In torch, and here, `dropout2d`
        takes three dimensions for (batch, channels, length).
    VJP:
        ``dx = dy [kept] / (1 - p)``; the residual is the mask, (batch, channels, 1, 1).
    Raises:
        ValueError: without a key, or for an x of another number of dimensions.

    Source: ``torch.nn.Dropout2d``; Tompson et al. 2015.

    >>> import funcnet as fn
    >>> x = torch.ones(1, 3, 1, 2)
    >>> fn.dropout2d(0.5).apply({}, x, key=fn.key(1), train=True)[0].flatten(1)
    tensor([[2., 2., 0., 0., 2., 2.]])
    """
    other = f"(batch, channels, {NAMES[1]})" if dims == 2 else f"(channels, {NAMES[dims]})"

    def declaration(x: Tensor) -> Mapping[str, Param]:
        require_floating(x)
        forms = f"(batch, channels, {NAMES[dims]}) or {other}"
        require(x.dim() in (dims + 1, dims + 2), f"expects {forms}, got {tuple(x.shape)}")
        return EMPTY

    def draws(shape: Shape) -> Shape:
        single = len(shape) == dims + 1 and dims != 2
        return _of_channels((1, *shape))[1:] if single else _of_channels(shape)

    least = 3 if dims == 2 else dims + 2
    return dropping(f"dropout{dims}d", p, draws, declaration=declaration, least=least)


dropout1d, dropout2d, dropout3d = (spatial(_dropout, dims) for dims in (1, 2, 3))


def alpha_dropout(p: float = 0.5) -> Layer:
    """Dropout for nets of `selu`: it keeps mean 0 and variance 1.

    ``y = a (x [kept] + s [dropped]) + b`` with ``s = -1.7581``, selu's limit at minus infinity,
    ``a = 1 / sqrt((1 - p) (1 + p s^2))`` and ``b = -a p s``. With ``train=False`` it is the
    identity.

    Args:
        p: the probability that a value is dropped; with 1 all values are 0.

    Inputs:
        x of any shape, floating; a key when ``train=True``.
    VJP:
        ``dx = a dy [kept]``; the residual is the mask.
    Raises:
        ValueError: without a key.

    Source: ``torch.nn.AlphaDropout``; Klambauer et al. 2017.

    >>> import funcnet as fn
    >>> fn.alpha_dropout(0.5).apply({}, torch.zeros(6), key=fn.key(0), train=True)[0]
    tensor([-0.7792, -0.7792,  0.7792,  0.7792, -0.7792,  0.7792])
    """
    return dropping("alpha_dropout", p, of_values, alpha=True)


def feature_alpha_dropout(p: float = 0.5) -> Layer:
    """`alpha_dropout` of whole channels: of all values of an example's channel, or of none.

    With ``train=False`` it is the identity.

    Args:
        p: the probability that a channel is dropped; with 1 all values are 0.

    Inputs:
        x of shape ``(batch, channels, *)``, floating; a key when ``train=True``.
    VJP:
        ``dx = a dy [kept]``, with the a of `alpha_dropout`; the residual is the mask, (batch,
        channels, 1, ...).
    Raises:
        ValueError: without a key, or for fewer than two dimensions.

    Source: ``torch.nn.FeatureAlphaDropout``; Klambauer et al. 2017.

    >>> import funcnet as fn
    >>> x = torch.zeros(1, 3, 2)
    >>> fn.feature_alpha_dropout(0.5).apply({}, x, key=fn.key(1), train=True)[0].flatten(1)
    tensor([[ 0.7792,  0.7792, -0.7792, -0.7792,  0.7792,  0.7792]])
    """

    def declaration(x: Tensor) -> Mapping[str, Param]:
        require_floating(x)
        require(x.dim() >= 2, f"expects (batch, channels, *), got {tuple(x.shape)}")
        return EMPTY

    return dropping("feature_alpha_dropout", p, _of_channels, alpha=True, declaration=declaration)


def drop_path(p: float = 0.1, mode: str = "row") -> Layer:
    """Stochastic depth: each example 0 with probability ``p``, else scaled by ``1 / (1 - p)``.

    At the end of the body of a `residual` it skips the body. With ``train=False`` it is the
    identity.

    Args:
        p: the probability that an example is dropped.
        mode: "row" draws for each example, "batch" once for all of them.

    Inputs:
        x of shape ``(batch, *)``, floating; a key when ``train=True``.
    VJP:
        ``dx = dy [kept] / (1 - p)``; the residual is the mask.
    Raises:
        ValueError: without a key.

    Source: ``torchvision.ops.StochasticDepth``, ``timm.layers.DropPath``; Huang et al. 2016.

    >>> import funcnet as fn
    >>> fn.drop_path(0.5).apply({}, torch.ones(3, 2), key=fn.key(1), train=True)[0]
    tensor([[2., 2.],
            [0., 0.],
            [2., 2.]])
    """
    require(mode in ("row", "batch"), f"drop_path: mode must be 'row' or 'batch', got {mode!r}")

    def declaration(x: Tensor) -> Mapping[str, Param]:
        require_floating(x)
        require(x.dim() >= 1, "expects (batch, *), got ()")
        return EMPTY

    draws = _of_examples if mode == "row" else _of_the_batch
    return dropping("drop_path", p, draws, declaration=declaration)
