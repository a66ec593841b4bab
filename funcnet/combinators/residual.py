"""`residual`: a layer beside a connection that skips it."""

from collections.abc import Mapping

import torch

from funcnet import tree
from funcnet.combinators.combine import Pull, Run, combine
from funcnet.core import Layer, Tree, sum_cotangents


def residual_forward(run: Run, x: Tree) -> tuple[Tree, Mapping[str, Tree]]:
    """``y = x + f(x)``."""
    y = run("", x)
    if not tree.alike(x, y):
        raise ValueError(
            f"residual: the layer must keep the shape and dtype {tree.describe(x)}, "
            f"got {tree.describe(y)}"
        )
    return tree.map(torch.add, x, y), {}


def residual_backward(pull: Pull, dy: Tree, residuals: Mapping[str, Tree]) -> Tree:
    """``dx = dy + df(dy)``."""
    return sum_cotangents(dy, pull("", dy, needed=pull.x))


def residual(layer: Layer) -> Layer:
    """``y = x + f(x)``, for a layer that keeps the shape.

    Args:
        layer: f.

    Params, state and key: those of the layer, with nothing in between.
    VJP:
        ``dx = dy + df(dy)``.

    Source: He et al. 2016.

    >>> import funcnet as fn
    >>> fn.residual(fn.relu()).apply({}, torch.tensor([-1.0, 2.0]))[0]
    tensor([-1.,  4.])
    """
    return combine("residual", {"": layer}, residual_forward, residual_backward)
