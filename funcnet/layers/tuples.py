"""Layers from and to tuples: what `branch` and `parallel` are joined with."""

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import (
    Layer,
    Params,
    Pullback,
    Tree,
    check_params,
    stateless,
    sum_cotangents,
)


def fan_out_rule(
    residuals: dict[str, Any], dy: tuple[Tree, ...], *, params: bool, x: bool
) -> tuple[Params | None, Tree]:
    """dx is the sum of the dy."""
    return ({} if params else None), sum_cotangents(list(dy)) if x else None


def fan_out(n: int) -> Layer:
    """``y = (x, ..., x)``, n times; dx is the sum of the dy.

    >>> fan_out(2).apply({}, torch.ones(1))[0]
    (tensor([1.]), tensor([1.]))
    """
    if n < 1:
        raise ValueError(f"fan_out: n must be at least 1, got {n}")

    def apply(params: Params, x: Tree) -> tuple[Tree, ...]:
        check_params("fan_out", params, ())
        return (x,) * n

    def vjp(params: Params, x: Tree) -> tuple[tuple[Tree, ...], Pullback]:
        return apply(params, x), Pullback(fan_out_rule, {})

    return stateless(lambda key, x: {}, apply, vjp, name="fan_out")


def _check_alike(name: str, x: tuple[Tensor, ...]) -> None:
    if type(x) is not tuple or not x or len({tree.describe(part) for part in x}) != 1:
        raise ValueError(
            f"{name}: expects a tuple of tensors of one shape and dtype, got {tree.describe(x)}"
        )


def add_rule(
    residuals: dict[str, Any], dy: Tensor, n: int, *, params: bool, x: bool
) -> tuple[Params | None, tuple[Tensor, ...] | None]:
    """Each dx is dy."""
    return ({} if params else None), (dy,) * n if x else None


def add() -> Layer:
    """The sum of a tuple of tensors of one shape; each gets dy.

    >>> add().apply({}, (torch.ones(2), torch.ones(2)))[0]
    tensor([2., 2.])
    """

    def apply(params: Params, x: tuple[Tensor, ...]) -> Tensor:
        check_params("add", params, ())
        _check_alike("add", x)
        return reduce(torch.add, x)

    def vjp(params: Params, x: tuple[Tensor, ...]) -> tuple[Tensor, Pullback]:
        return apply(params, x), Pullback(add_rule, {}, (len(x),))

    return stateless(lambda key, x: {}, apply, vjp, name="add")


def multiply_rule(
    residuals: dict[str, Any], dy: Tensor, *, params: bool, x: bool
) -> tuple[Params | None, tuple[Tensor, ...] | None]:
    """Each dx is dy times the other factors, which is right at zeros too."""
    if not x:
        return ({} if params else None), None
    factors = residuals["x"]
    dx = [
        reduce(torch.mul, factors[:place] + factors[place + 1 :], dy)
        for place in range(len(factors))
    ]
    return ({} if params else None), tuple(dx)


def multiply() -> Layer:
    """The product of a tuple of tensors of one shape; each gets dy times the other factors.

    >>> multiply().apply({}, (torch.full((2,), 2.0), torch.full((2,), 3.0)))[0]
    tensor([6., 6.])
    """

    def apply(params: Params, x: tuple[Tensor, ...]) -> Tensor:
        check_params("multiply", params, ())
        _check_alike("multiply", x)
        return reduce(torch.mul, x)

    def vjp(params: Params, x: tuple[Tensor, ...]) -> tuple[Tensor, Pullback]:
        return apply(params, x), Pullback(multiply_rule, {"x": x})

    return stateless(lambda key, x: {}, apply, vjp, name="multiply")
