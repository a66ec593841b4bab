"""Layers that give other cotangents than the derivative's: reversed, stopped, clipped, noised."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from funcnet import random, tree
from funcnet.backward.rules.other_rules import cotangent, with_rule
from funcnet.checks import check_function
from funcnet.core import Grads, Layer, Tree
from funcnet.errors import require
from funcnet.lift import elementwise


def reverse_gradient(scale: float = 1.0) -> Layer:
    """``y = x``; ``dx = -scale dy``.

    What is before it learns the opposite of what is after it: features that tell a classifier of
    domains nothing.

    Args:
        scale: of the reversed gradient.

    Source: Ganin and Lempitsky 2015.

    >>> y, pullback, _ = reverse_gradient(0.5).vjp({}, torch.ones(2))
    >>> y, pullback(torch.tensor([1.0, -2.0]))[1]
    (tensor([1., 1.]), tensor([-0.5000,  1.0000]))
    """
    require(isinstance(scale, (int, float)), f"reverse_gradient: expects a number, got {scale!r}")
    return cotangent(reversed_cotangent, scale, name="reverse_gradient")


def reversed_cotangent(dy: Tree, scale: float) -> Tree:
    """``-scale dy``."""
    return tree.map(lambda leaf: -scale * leaf, dy)


def stop_gradient() -> Layer:
    """``y = x``; ``dx = 0``: what is before it learns nothing from what is after it.

    The layers before it are still pulled back through, and their gradients are zeros, which an
    optimizer with momentum or weight decay may still turn into an update. `freeze` takes parameters
    from the optimizer, and the backward pass.

    Source: ``jax.lax.stop_gradient``; ``torch.Tensor.detach``.

    >>> y, pullback, _ = stop_gradient().vjp({}, torch.ones(2))
    >>> y, pullback(torch.ones(2))[1]
    (tensor([1., 1.]), tensor([0., 0.]))
    """
    return cotangent(no_cotangent, name="stop_gradient")


def no_cotangent(dy: Tree) -> Tree:
    """0."""
    return tree.map(torch.zeros_like, dy)


def clip_cotangent(max_norm: float) -> Layer:
    """``y = x``; ``dx = dy min(1, max_norm / |dy|)``, with the norm of all of dy as one vector.

    The mean over a batch, which most losses have, makes the cotangent of each example smaller:
    ``max_norm`` is of the whole batch.

    Args:
        max_norm: the greatest norm that passes, a number > 0.

    Source: Pascanu et al. 2013, of gradients; `funcnet.optimizers.clip_by_global_norm`.

    >>> _, pullback, _ = clip_cotangent(1.0).vjp({}, torch.ones(2))
    >>> pullback(torch.tensor([3.0, 4.0]))[1], pullback(torch.tensor([0.3, 0.4]))[1]
    (tensor([0.6000, 0.8000]), tensor([0.3000, 0.4000]))
    """
    positive = isinstance(max_norm, (int, float)) and max_norm > 0
    require(positive, f"clip_cotangent: max_norm must be a number > 0, got {max_norm!r}")
    options: Any = {"breaks": ("derivative", "linear"), "mixes_examples": True}
    return cotangent(clipped_cotangent, max_norm, name="clip_cotangent", **options)


def clipped_cotangent(dy: Tree, max_norm: float) -> Tree:
    """``dy min(1, max_norm / |dy|)``, and 0 for 0."""
    scale = (max_norm / tree.global_norm(dy)).clamp(max=1.0)
    return tree.map(lambda leaf: leaf * scale.to(leaf.dtype), dy)


def noise_cotangent(std: float) -> Layer:
    """``y = x``; ``dx = dy + std n`` with n of N(0, 1), drawn from the key, in training alone.

    Args:
        std: the standard deviation of the noise, a number >= 0.

    Source: Neelakantan et al. 2015, of gradients.

    >>> layer = noise_cotangent(0.1)
    >>> _, pullback, _ = layer.vjp({}, torch.ones(2), key=fn.key(0))
    >>> pullback(torch.ones(2))[1]
    tensor([..., ...])
    >>> _, pullback, _ = layer.vjp({}, torch.ones(2), train=False)
    >>> pullback(torch.ones(2))[1]
    tensor([1., 1.])
    """
    enough = isinstance(std, (int, float)) and std >= 0
    require(enough, f"noise_cotangent: std must be a number >= 0, got {std!r}")
    laws = ("derivative", "linear")
    options: Any = {"reads": ("key",), "breaks": laws, "name": "noise_cotangent"}
    return cotangent(noised_cotangent, std, **options)


def noised_cotangent(dy: Tree, std: float, *, key: Tensor | None) -> Tree:
    """``dy + std n``, with other noise for each leaf; dy where there is no key."""
    if key is None:
        return dy
    leaves, treedef = tree.flatten(dy)
    noised = [
        leaf
        + std * random.normal(random.fold_in(key, i), leaf.shape, leaf.dtype, device=leaf.device)
        for i, leaf in enumerate(leaves)
    ]
    return treedef.unflatten(noised)


def straight_through(
    function: Callable[..., Tensor],
    derivative: Callable[..., Tensor] | None = None,
    *,
    options: tuple[Hashable, ...] = (),
) -> Layer:
    """``y = function(x)``, element by element; ``dx = dy``, or ``dy derivative(x)``.

    For a function whose derivative is zero almost everywhere, such as ``torch.round`` or
    ``torch.sign``: a quantized net, or one of spikes, learns by the derivative of another one.

    Args:
        function: of x; a module-level function, as is
        derivative: of x, that of a surrogate; default 1.
        options: passed to both after it, such as a number of levels.

    Inputs:
        x, a floating-point tensor.
    Returns:
        y of the shape and dtype of x.

    Source: Bengio et al. 2013; with the derivative of a surrogate, Neftci et al. 2019.

    >>> y, pullback, _ = straight_through(torch.round).vjp({}, torch.tensor([0.4, 1.6]))
    >>> y, pullback(torch.ones(2))[1]
    (tensor([0., 2.]), tensor([1., 1.]))
    >>> def inside(x):
    ...     return (x.abs() <= 1).to(x.dtype)
    >>> _, pullback, _ = straight_through(torch.sign, inside).vjp({}, torch.tensor([0.4, 1.6]))
    >>> pullback(torch.ones(2))[1]
    tensor([1., 0.])
    """
    check_function("straight_through: function", function)
    if derivative is not None:
        check_function("straight_through: derivative", derivative)
    return with_rule(
        elementwise(function, torch.zeros_like, options=options, name="straight_through"),
        straight_through_rule,
        derivative,
        *options,
        reads=() if derivative is None else ("x",),
        name="straight_through",
    )


def straight_through_rule(
    residuals: Any, dy: Tensor, derivative: Any, *options: Any, params: bool, x: bool
) -> Grads:
    """``dx = dy``, or ``dy derivative(x)``."""
    if derivative is None or not x:
        return None, dy
    return None, dy * derivative(residuals["x"], *options)
