"""Activations that are made of pieces, most of them linear: each with its derivative.

Where a function bends, the derivative is the one that PyTorch has there.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import runtime
from funcnet.core import Layer
from funcnet.errors import require
from funcnet.lift import elementwise, with_kernel

aten = torch.ops.aten


@with_kernel(lambda dy, y: aten.threshold_backward.default(dy, y, 0))
def relu_derivative(y: Tensor) -> Tensor:
    """``[y > 0]``, and 1 for NaN."""
    return ~(y <= 0)


def relu() -> Layer:
    """``y = max(x, 0)``; ``dx = dy [y > 0]``. Source: ``torch.nn.ReLU``.

    >>> relu().apply({}, torch.tensor([-1.0, 2.0]))[0]
    tensor([0., 2.])
    """
    return elementwise(torch.relu, relu_derivative, "y", name="relu")


@with_kernel(lambda dy, x, slope: aten.leaky_relu_backward(dy, x, slope, False))
def leaky_relu_derivative(x: Tensor, negative_slope: float) -> Tensor:
    """``1 where x > 0, else the slope``."""
    return torch.where(x > 0, 1.0, torch.full_like(x, negative_slope))


def leaky_relu(negative_slope: float = 0.01) -> Layer:
    """``y = x if x > 0 else negative_slope x``; ``dx = dy`` or ``negative_slope dy``.

    Args:
        negative_slope: the slope below 0.

    Source: ``torch.nn.LeakyReLU``.

    >>> leaky_relu(0.1).apply({}, torch.tensor([-1.0, 2.0]))[0]
    tensor([-0.1000,  2.0000])
    """
    return elementwise(
        F.leaky_relu, leaky_relu_derivative, options=(negative_slope,), name="leaky_relu"
    )


@with_kernel(aten.hardtanh_backward.default)
def hardtanh_derivative(x: Tensor, min_val: float, max_val: float) -> Tensor:
    """``[min_val < x < max_val]``."""
    return (x > min_val) & (x < max_val)


def hardtanh(min_val: float = -1.0, max_val: float = 1.0) -> Layer:
    """``y = min(max(x, min_val), max_val)``; ``dx = dy [min_val < x < max_val]``.

    Args:
        min_val, max_val: the least and the greatest y.

    Source: ``torch.nn.Hardtanh``.

    >>> hardtanh().apply({}, torch.tensor([-2.0, 0.5]))[0]
    tensor([-1.0000,  0.5000])
    """
    right = min_val < max_val
    require(right, f"hardtanh: expects min_val < max_val, got {min_val} and {max_val}")
    return elementwise(F.hardtanh, hardtanh_derivative, options=(min_val, max_val), name="hardtanh")


@with_kernel(aten.hardsigmoid_backward.default)
def hardsigmoid_derivative(x: Tensor) -> Tensor:
    """``[-3 < x < 3] / 6``."""
    return torch.where((x > -3) & (x < 3), torch.full_like(x, 1 / 6), 0.0)


def hardsigmoid() -> Layer:
    """``y = min(max(x / 6 + 1/2, 0), 1)``; ``dx = dy [-3 < x < 3] / 6``.

    Source: ``torch.nn.Hardsigmoid``.

    >>> hardsigmoid().apply({}, torch.tensor([-4.0, 1.5]))[0]
    tensor([0.0000, 0.7500])
    """
    return elementwise(F.hardsigmoid, hardsigmoid_derivative, name="hardsigmoid")


@with_kernel(aten.hardswish_backward.default)
def hardswish_derivative(x: Tensor) -> Tensor:
    """``x / 3 + 1/2 where -3 < x < 3, else 0 or 1``."""
    return torch.where(x <= -3, 0.0, torch.where(x >= 3, 1.0, x / 3 + 0.5))


def hardswish() -> Layer:
    """``y = x hardsigmoid(x)``; ``dx = dy (x / 3 + 1/2)`` where -3 < x < 3.

    Source: ``torch.nn.Hardswish``.

    >>> hardswish().apply({}, torch.tensor([-4.0, 1.5]))[0]
    tensor([-0.0000, 1.1250])
    """
    return elementwise(F.hardswish, hardswish_derivative, name="hardswish")


@with_kernel(lambda dy, x: aten.hardtanh_backward(dy, x, 0.0, 6.0))
def relu6_derivative(x: Tensor) -> Tensor:
    """``[0 < x < 6]``."""
    return (x > 0) & (x < 6)


def relu6() -> Layer:
    """``y = min(max(x, 0), 6)``; ``dx = dy [0 < x < 6]``. Source: ``torch.nn.ReLU6``.

    >>> relu6().apply({}, torch.tensor([-1.0, 8.0]))[0]
    tensor([0., 6.])
    """
    return elementwise(F.relu6, relu6_derivative, name="relu6")


@with_kernel(lambda dy, x, threshold, value: aten.threshold_backward(dy, x, threshold))
def threshold_derivative(x: Tensor, threshold: float, value: float) -> Tensor:
    """``[x > threshold]``, and 1 for NaN."""
    return ~(x <= threshold)


def threshold(threshold: float, value: float) -> Layer:
    """``y = x if x > threshold else value``; ``dx = dy [x > threshold]``.

    Args:
        threshold: x up to it is replaced.
        value: what it is replaced by.

    Source: ``torch.nn.Threshold``.

    >>> threshold(0.5, -1.0).apply({}, torch.tensor([0.0, 2.0]))[0]
    tensor([-1.,  2.])
    """
    options = (threshold, value)
    return elementwise(F.threshold, threshold_derivative, options=options, name="threshold")


def _shrink_kernel(dy: Tensor, x: Tensor, lambd: float) -> Tensor:
    # Inductor has no code for the operator, neither of this name nor of hardshrink's.
    if runtime.is_tracing():
        return dy * shrink_derivative(x, lambd)
    return aten.softshrink_backward(dy, x, lambd)


@with_kernel(_shrink_kernel)
def shrink_derivative(x: Tensor, lambd: float) -> Tensor:
    """``[|x| > lambd]``."""
    return x.abs() > lambd


def hardshrink(lambd: float = 0.5) -> Layer:
    """``y = x if |x| > lambd else 0``; ``dx = dy [|x| > lambd]``.

    Args:
        lambd: the greatest ``|x|`` for which y is 0.

    Source: ``torch.nn.Hardshrink``.

    >>> hardshrink().apply({}, torch.tensor([-0.5, 2.0]))[0]
    tensor([0., 2.])
    """
    return elementwise(F.hardshrink, shrink_derivative, options=(lambd,), name="hardshrink")


def softshrink(lambd: float = 0.5) -> Layer:
    """``y = sign(x) max(|x| - lambd, 0)``; ``dx = dy [|x| > lambd]``.

    Args:
        lambd: the greatest ``|x|`` for which y is 0, at least 0.

    Source: ``torch.nn.Softshrink``.

    >>> softshrink().apply({}, torch.tensor([0.5, 2.0]))[0]
    tensor([0.0000, 1.5000])
    """
    require(lambd >= 0, f"softshrink: lambd must be >= 0, got {lambd}")
    return elementwise(F.softshrink, shrink_derivative, options=(lambd,), name="softshrink")
