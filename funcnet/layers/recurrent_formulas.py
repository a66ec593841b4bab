"""Recurrent cells: one step of each, and its derivative beside it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet.layers.activations import sigmoid_derivative, tanh_derivative
from funcnet.layers.piecewise import relu_derivative
from funcnet.lift import times_derivative

State = tuple[Tensor, ...]
"""What a cell hands to its next step: ``(h,)``, or ``(h, c)`` of an LSTM."""


class Cell(NamedTuple):
    """The formulas of a recurrent cell.

    Attributes:
        gates: how many blocks of ``hidden_size`` rows the weights have.
        states: how many tensors are handed on.
        is_split: whether the step needs the products with x and with h apart, not their sum.
        step: ``(gates, before) -> (after, saved)``, where gates are the sum of the two products
            and of the biases, or the pair of them.
        derivative: ``(saved, before, after, dafter) -> (dgates, dbefore)``, where dgates is a tuple
            of the gates' cotangents, one or a pair, and dbefore has None for an h that the
            step does not use but for its product.
    """

    gates: int
    states: int
    is_split: bool
    step: Callable[[Any, State], tuple[State, State]]
    derivative: Callable[[State, State, State, State], tuple[State, tuple[Any, ...]]]


def tanh_step(gates: Tensor, before: State) -> tuple[State, State]:
    """``h' = tanh(gates)``."""
    return (gates.tanh(),), ()


def tanh_step_derivative(saved: State, before: State, after: State, dafter: State) -> Any:
    """``dgates = dh' (1 - h'^2)``."""
    return (times_derivative(dafter[0], tanh_derivative, after[0]),), (None,)


def relu_step(gates: Tensor, before: State) -> tuple[State, State]:
    """``h' = max(gates, 0)``."""
    return (gates.relu(),), ()


def relu_step_derivative(saved: State, before: State, after: State, dafter: State) -> Any:
    """``dgates = dh' [h' > 0]``."""
    return (times_derivative(dafter[0], relu_derivative, after[0]),), (None,)


def gru_step(gates: tuple[Tensor, Tensor], before: State) -> tuple[State, State]:
    """``h' = n + z (h - n)`` with ``n = tanh(n_x + r n_h)``."""
    (r_x, z_x, n_x), (r_h, z_h, n_h) = [part.chunk(3, -1) for part in gates]
    r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
    n = torch.addcmul(n_x, r, n_h).tanh()
    return (torch.addcmul(n, z, before[0] - n),), (r, z, n, n_h)


def gru_derivative(saved: State, before: State, after: State, dafter: State) -> Any:
    """``dn = dh' (1 - z) (1 - n^2)``, ``dr = dn n_h r (1 - r)``, ``dz = dh' (h - n) z (1 - z)``.

    The product with h has ``r dn`` in the place of ``dn``; ``dh = dh' z`` and what comes by it.
    """
    (r, z, n, n_h), (h,), (dh,) = saved, before, dafter
    direct = dh * z
    dn = times_derivative(dh - direct, tanh_derivative, n)
    dr = times_derivative(dn * n_h, sigmoid_derivative, r)
    dz = times_derivative(dh * (h - n), sigmoid_derivative, z)
    return (torch.cat([dr, dz, dn], -1), torch.cat([dr, dz, dn * r], -1)), (direct,)


def lstm_step(gates: Tensor, before: State) -> tuple[State, State]:
    """``c' = f c + i g``, ``h' = o tanh(c')``; i, f, o are sigmoids and g the tanh of the gates."""
    i, f, g, o = gates.chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = torch.addcmul(f * before[1], i, g)
    tanh_c = c.tanh()
    return (o * tanh_c, c), (i, f, g, o, tanh_c)


def lstm_derivative(saved: State, before: State, after: State, dafter: State) -> Any:
    """``do = dh' tanh(c')``, ``dc = dc' + dh' o (1 - tanh(c')^2)``, ``di = dc g``, ``dg = dc i``.

    ``df = dc c``, each times the derivative of its sigmoid or tanh; ``dc f`` goes on to c.
    """
    (i, f, g, o, tanh_c), (_, c), (dh, dc) = saved, before, dafter
    dc = dc + times_derivative(dh * o, tanh_derivative, tanh_c)
    dgates = [
        times_derivative(dc * g, sigmoid_derivative, i),
        times_derivative(dc * c, sigmoid_derivative, f),
        times_derivative(dc * i, tanh_derivative, g),
        times_derivative(dh * tanh_c, sigmoid_derivative, o),
    ]
    return (torch.cat(dgates, -1),), (None, dc * f)


TANH = Cell(1, 1, False, tanh_step, tanh_step_derivative)
RELU = Cell(1, 1, False, relu_step, relu_step_derivative)
GRU = Cell(3, 1, True, gru_step, gru_derivative)
LSTM = Cell(4, 2, False, lstm_step, lstm_derivative)
