"""Layers from and to tuples: what `branch` and `parallel` are joined with."""

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import EMPTY, Layer, Params, Tree, kinds_of, sum_cotangents
from funcnet.errors import require
from funcnet.lift import Step, accept_any, parameterless


def floating_pair(x: Any) -> tuple[Tensor, Tensor]:
    """The two inputs; ValueError or TypeError unless they are floating and of one dtype."""
    pair = type(x) is tuple and len(x) == 2 and all([isinstance(part, Tensor) for part in x])
    require(pair, f"expects a tuple (x1, x2) of tensors, got {tree.describe(x)}")
    x1, x2 = x
    alike = x1.is_floating_point() and x1.dtype == x2.dtype
    wrong = f"expects floating-point tensors of one dtype, got {tree.describe(x)}"
    require(alike, wrong, TypeError)
    return x1, x2


def _require_alike(x: tuple[Tensor, ...]) -> Params:
    if type(x) is not tuple or not x or len({tree.describe(part) for part in x}) != 1:
        raise ValueError(
            f"expects a tuple of tensors of one shape and dtype, got {tree.describe(x)}"
        )
    return EMPTY


def fan_out_backward(dy: tuple[Tree, ...]) -> Tree:
    """``dx = dy_1 + ... + dy_n``."""
    return sum_cotangents(*dy)


def fan_out(n: int) -> Layer:
    """``y = (x, ..., x)``, n times; dx is the sum of the dy.

    Args:
        n: how many times x is handed on.

    >>> fan_out(2).apply({}, torch.ones(1))[0]
    (tensor([1.]), tensor([1.]))
    """
    if n < 1:
        raise ValueError(f"fan_out: n must be at least 1, got {n}")

    def forward(x: Tree) -> Step:
        return (x,) * n, {}, ()

    return parameterless(forward, fan_out_backward, declaration=accept_any)


def item_backward(dy: Tree, index: Any, treedef: Any, kinds: tuple[Any, ...]) -> Tree:
    """dy at the index, and zeros elsewhere; None for integers."""
    like = next(leaf for leaf in tree.leaves(dy) if leaf is not None)
    zeros = [
        like.new_zeros(shape, dtype=dtype) if dtype.is_floating_point else None
        for shape, dtype in kinds
    ]
    dx = treedef.unflatten(zeros)
    if isinstance(dx, dict):
        return {name: dy if name == index else each for name, each in dx.items()}
    return tuple([dy if i == index else each for i, each in enumerate(dx)])


def item(index: int | str) -> Layer:
    """``y = x[index]``, of a tuple by position or of a dict by name; dx is 0 for the others.

    It takes the output of a recurrent layer, say, and leaves the last state.

    Args:
        index: a position, or a name.

    >>> item(0).apply({}, (torch.ones(2), torch.zeros(1)))[0]
    tensor([1., 1.])
    """

    def declaration(x: Any) -> Params:
        names = range(len(x)) if type(x) is tuple else x if isinstance(x, dict) else ()
        form = "a tuple with" if isinstance(index, int) else "a dict with"
        require(index in names, f"expects {form} {index!r}, got {tree.describe(x)}")
        return EMPTY

    def forward(x: Any) -> Step:
        return x[index], {}, (index, *kinds_of(x))

    return parameterless(forward, item_backward, declaration=declaration)


def add_backward(dy: Tensor, n: int) -> tuple[Tensor, ...]:
    """``dx_i = dy``."""
    return (dy,) * n


def add() -> Layer:
    """``y = x_1 + ... + x_n`` of a tuple of tensors of one shape; each gets dy.

    >>> add().apply({}, (torch.ones(2), torch.ones(2)))[0]
    tensor([2., 2.])
    """

    def forward(x: tuple[Tensor, ...]) -> Step:
        return reduce(torch.add, x), {}, (len(x),)

    return parameterless(forward, add_backward, declaration=_require_alike)


def multiply_backward(dy: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``dx_i = dy`` times the other factors, which is right at zeros too."""
    return tuple([reduce(torch.mul, x[:i] + x[i + 1 :], dy) for i in range(len(x))])


def multiply() -> Layer:
    """``y = x_1 ... x_n`` of a tuple of tensors of one shape; each gets dy times the others.

    >>> multiply().apply({}, (torch.full((2,), 2.0), torch.full((2,), 3.0)))[0]
    tensor([6., 6.])
    """

    def forward(x: tuple[Tensor, ...]) -> Step:
        return reduce(torch.mul, x), {"x": x}, ()

    return parameterless(forward, multiply_backward, declaration=_require_alike)
