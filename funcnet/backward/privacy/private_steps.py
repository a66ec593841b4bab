"""Differentially private gradients: those of each example clipped, summed, and noise added."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from funcnet import tree
from funcnet.backward.per_example.examples_of import (
    formed_where_small,
    squares_by_layer,
    total_of,
    weighted,
)
from funcnet.backward.per_example.forward_examples import axes_of, count_of, defer_examples
from funcnet.core import EMPTY, Layer, Loss, Params, Tree
from funcnet.data import pair
from funcnet.deferred import gradients
from funcnet.errors import require
from funcnet.optimizers.checks import check_options, check_positive
from funcnet.random import fold_in, normal
from funcnet.transforms.vmap import Axes

_NAME = "private_value_and_grad"
CLIPPINGS = ("flat", "layer", "normalized")

_GAMMA = 0.01
"""What is added to the norms where all are made alike: small gradients stay smaller (Bu et al.)."""


def private_value_and_grad(
    model: Layer,
    loss: Loss,
    bound: float | Tensor,
    noise: float | Tensor,
    *,
    batch_size: float | None = None,
    clipping: str = "flat",
    in_axes: Axes = 0,
) -> Callable[..., tuple[Tensor, Params, Params]]:
    """The private half of a training step: what `value_and_grad` is to a plain one.

    ``grads = (sum_i min(1, bound / |g_i|) g_i + noise * bound * N(0, 1)) / batch_size``, with the
    gradient g_i of example i. One backward pass does it: cotangents first, then the norms, of which
    most need no gradients, then the weighted sum at the cost of an ordinary gradient.

    Args:
        model: a layer that mixes no examples; see `defer_examples`, which says what an example is.
        loss: its value of a batch of one is the loss of an example.
        bound: the most that the norm of an example's gradient may be. What is computed in half
            precision, in a `cast` too, is rounded after that, by which it may be 1 % more.
        noise: the standard deviation of the noise, as a multiple of the bound. `private_noise`
            finds it for an epsilon. 0 for none: then nothing is private.
        batch_size: by what the sum is divided: under Poisson sampling the expected size, rate times
            the number of examples that there are. Default the size of the batch.
        clipping: "flat" for the norm of all of an example's gradients; "layer" for that of each
            layer by itself (as `example_norms` has them), with bound / sqrt(layers), so that all
            together keep the bound;
            "normalized" for ``bound / (|g_i| + 0.01)``, where the bound is only a scale.
        in_axes: the axis of the examples; see `defer_examples`.

    Returns:
        ``(params, batch, state={}, *, key=None, train=True, mask=None) -> (value, grads, state)``.
        ``mask``, (examples,), is False for what only pads a batch, as `poisson_batch` gives it: any
        values may be there. An example that counts must have a finite gradient, or no sum is. The
        value is the mean over the other examples; it is not private, and should not be published.
        The key is needed for noise and by layers that draw; no two steps may have the same one.
    Raises:
        ValueError: a layer that mixes examples, by path; a bound that is not above 0, noise below
            0; a mask of another shape; no key where there is noise.

    Source: Abadi et al. 2016, "Deep learning with differential privacy"; Bu et al. 2022,
    "Differentially private optimization on large model at small cost", for one backward pass;
    Bu et al. 2023, "Automatic clipping", for normalized gradients.

    >>> import funcnet as fn
    >>> f = private_value_and_grad(fn.linear(1, bias=False), fn.mse(), bound=3.0, noise=0.0)
    >>> x, target = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]])
    >>> value, grads, _ = f({"weight": torch.ones(1, 1)}, (x, target))  # gradients 2 and 12
    >>> value, grads
    (tensor(2.5000), {'weight': tensor([[2.5000]])})
    """
    if clipping not in CLIPPINGS:
        raise ValueError(f"{_NAME}: clipping must be one of {CLIPPINGS}, got {clipping!r}")
    check_positive(_NAME, bound=bound)
    check_options(_NAME, noise=noise)
    if batch_size is not None:
        check_positive(_NAME, batch_size=batch_size)
    noiseless = not isinstance(noise, Tensor) and noise == 0
    bounded = noiseless or isinstance(bound, Tensor) or math.isfinite(bound)
    require(bounded, f"{_NAME}: bound must be finite where there is noise, got {bound}")
    run = defer_examples(model, loss, in_axes, name=_NAME)

    def value_and_grads(
        params: Params,
        batch: tuple[Tree, Tree],
        state: Params = EMPTY,
        *,
        key: Tensor | None = None,
        train: bool = True,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Params, Params]:
        if key is None and not noiseless:
            raise ValueError(f"{_NAME}: noise needs a key, of which each step has another: key=...")
        draw = None if key is None else fold_in(key, "noise")
        key = fold_in(key, "examples") if key is not None and model.takes_key else None
        if mask is not None:
            batch = _without_padding(batch, mask, in_axes)
        values, deferred, state = run(params, batch, state, key=key, train=train)
        count = len(values)
        if not tree.leaves(params):
            return _mean(values, mask), tree.map(torch.clone, params), state
        size = count if batch_size is None else batch_size
        deferred = formed_where_small(deferred)
        weights = _weights(squares_by_layer(deferred), count, bound, clipping, mask)
        weights = tree.map(lambda each: each / size, weights)
        grads = gradients(weighted(deferred, weights))
        if draw is not None and not noiseless:
            grads = _noised(grads, noise * bound / size, draw)
        return _mean(values, mask), grads, state

    return value_and_grads


def _without_padding(batch: tuple[Tree, Tree], mask: Tensor, in_axes: Axes) -> tuple[Tree, Tree]:
    """The batch with its first example that counts in the places of those that do not.

    So what is there need not be finite: 0 times a gradient that is not is nothing to add.
    """
    inputs = pair(_NAME, batch)
    axes = axes_of(_NAME, in_axes, inputs)
    count = count_of(_NAME, inputs, axes)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (count,):
        got = tree.describe(mask)
        raise ValueError(f"{_NAME}: expects a mask of ({count},), of booleans, got {got}")
    first = mask.int().argmax()
    rows = torch.where(mask, torch.arange(count, device=mask.device), first)

    def one(leaf: Tensor, axis: object) -> Tensor:
        # One of another length stays as it is, and vmap refuses it.
        if isinstance(axis, int) and leaf.shape[axis] == count:
            return leaf.index_select(axis, rows)
        return leaf

    replaced: tuple[Tree, Tree] = tree.map(one, inputs, axes)
    return replaced


def _weights(
    squares: dict[str, Tensor],
    count: int,
    bound: float | Tensor,
    clipping: str,
    mask: Tensor | None,
) -> Tensor | dict[str, Tensor]:
    """By what the gradients of each example are multiplied; 0 for those that only pad the batch."""

    def clipped(square: Tensor, bound: float | Tensor) -> Tensor:
        norm = square.sqrt()
        if clipping == "normalized":
            factor = bound / (norm + _GAMMA)
        else:
            # The quotient may be infinite, where a gradient is 0.
            factor = (bound / norm).clamp(max=1.0)
        return factor if mask is None else torch.where(mask, factor, 0.0)

    if clipping == "layer":
        part = bound / len(squares) ** 0.5
        return {path: clipped(square, part) for path, square in squares.items()}
    return clipped(total_of(squares, count), bound)


def _noised(grads: Params, deviation: float | Tensor, key: Tensor) -> Params:
    """The gradients with normal noise, of which each leaf draws by its path."""
    leaves, treedef = tree.flatten(grads)
    found = [
        leaf + deviation * normal(fold_in(key, path), leaf.shape, leaf.dtype, device=leaf.device)
        for path, leaf in zip(tree.paths(grads), leaves, strict=True)
    ]
    return treedef.unflatten(found)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp_min(1)
