"""Recurrent cells: one step of `rnn`, `gru` and `lstm`, for loops of one's own."""

from typing import Any

import torch

from funcnet.core import Forward, Grads, Key, Layer, Params, Pullback, Tree
from funcnet.deferred import Defer, defers
from funcnet.errors import require
from funcnet.initializers import Initializer
from funcnet.layers.recurrence import Direction, recur, recur_backward
from funcnet.layers.recurrent_formulas import GRU, LSTM, Cell, State
from funcnet.layers.recurrent_inputs import (
    Parts,
    check_states,
    in_form_of,
    joined,
    parts_of,
    states_of,
)
from funcnet.layers.recurrent_stack import cell_params, check_sizes, plain_cell
from funcnet.lift import stateful
from funcnet.params import Param, declare

_NAMES = {name: name for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
_STATES = ("h", "c")


def _rows(parts: Parts, states: State) -> State:
    """The states as (batch, features)."""
    return tuple([each.unsqueeze(0) for each in states]) if parts.input.dim() == 1 else states


def _like_input(parts: Parts, states: State) -> State:
    """The inverse of `_rows`."""
    return tuple([each.squeeze(0) for each in states]) if parts.input.dim() == 1 else states


@defers
def cell_rule(
    residuals: dict[str, Any], dy: Any, cell: Cell, bias: bool, *, params: bool | Defer, x: bool
) -> Grads:
    """`recur_backward` of a sequence of one step."""
    if not (params or x):
        return None, None
    whole = residuals.pop("whole")
    parts = parts_of(whole)
    dlast = _rows(parts, states_of(dy))
    grads, dinput, dstart = recur_backward(
        Direction(cell), residuals, None, dlast, bias, params=params, x=x
    )
    if dinput is None:
        return grads, None
    (dinput,) = _like_input(parts, (dinput[0],))
    dhx = None if parts.hx is None else joined(_like_input(parts, dstart))
    return grads, in_form_of(whole, dinput, dhx)


def _cell(
    name: str,
    cell: Cell,
    hidden_size: int,
    bias: bool,
    inits: tuple[Initializer | None, Initializer | None],
    dtype: torch.dtype | None,
) -> Layer:
    check_sizes(name, hidden_size, bias)
    names = {role: role for role in _NAMES if bias or role.startswith("weight")}

    @declare
    def init(x: Tree) -> dict[str, Param]:
        parts = parts_of(x, ("input", "hx"))
        shape = tuple(parts.input.shape)
        right = len(shape) in (1, 2)
        require(right, f"expects an input (batch, features) or (features,), got {shape}")
        check_states(parts, dict.fromkeys(_STATES[: cell.states], (*shape[:-1], hidden_size)))
        return cell_params(cell, hidden_size, shape[-1], names, inits, dtype)

    def run(params: Params, x: Tree, keep: bool) -> tuple[Tree, dict[str, Any]]:
        parts = parts_of(x)
        (rows,) = _rows(parts, (parts.input,))
        if parts.hx is None:
            start = (rows.new_zeros(rows.shape[0], hidden_size),) * cell.states
        else:
            start = _rows(parts, states_of(parts.hx))
        _, last, residuals = recur(Direction(cell), params, rows.unsqueeze(0), start, None, keep)
        return joined(_like_input(parts, last)), {**residuals, "whole": x}

    def apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> tuple[Tree, Params]:
        return run(params, x, False)[0], state

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        y, residuals = run(params, x, True)
        return y, Pullback(cell_rule, residuals, (cell, bias)), state

    return stateful(init, forward, apply=apply, name=name)


def rnn_cell(
    hidden_size: int,
    bias: bool = True,
    nonlinearity: str = "tanh",
    *,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """``h' = tanh(weight_ih x + bias_ih + weight_hh h + bias_hh)``: one step of `rnn`.

    Args:
        hidden_size: the number of features of h.
        bias: whether biases are learned.
        nonlinearity: "tanh" or "relu".
        weight_init: default U(-b, b) with ``b = 1 / sqrt(hidden_size)``, as torch.nn.RNNCell.
        bias_init: default the same U(-b, b).
        dtype: of the parameters; default that of the input.

    Inputs:
        x, an input of shape (batch, features) or (features,), floating; or a tuple (input, hx); or
        a dict with ``input`` and, if wanted, ``hx``. ``hx`` is the state h, of shape (batch,
        hidden_size) or (hidden_size,), zeros by default.
    Returns:
        y = h', of the shape of h.
    Learned params:
        ``weight_ih`` (hidden_size, features), ``weight_hh`` (hidden_size, hidden_size), ``bias_ih``
        and ``bias_hh`` (hidden_size,).
    VJP:
        ``da = dh' (1 - h'^2)``, ``dweight_ih = sum da x^T``, ``dweight_hh = sum da h^T``,
        ``dx = weight_ih^T da``, ``dh = weight_hh^T da``.
    Raises:
        ValueError: other shapes.
        TypeError: other dtypes.

    Source: ``torch.nn.RNNCell``; Elman 1990.

    >>> import funcnet as fn
    >>> layer = fn.rnn_cell(1, bias=False, weight_init=fn.initializers.ones())
    >>> x = torch.tensor([0.5]), torch.tensor([-0.5])
    >>> params, _ = layer.init(fn.key(0), x)
    >>> h, pullback, _ = layer.vjp(params, x)
    >>> h, pullback(torch.ones(1))[1]
    (tensor([0.]), (tensor([1.]), tensor([1.])))
    """
    cell = plain_cell("rnn_cell", nonlinearity)
    return _cell("rnn_cell", cell, hidden_size, bias, (weight_init, bias_init), dtype)


def gru_cell(
    hidden_size: int,
    bias: bool = True,
    *,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """``h' = (1 - z) n + z h`` with ``n = tanh(n_x + r n_h)``: one step of `gru`.

    Args:
        hidden_size: the number of features of h.
        bias: whether biases are learned.
        weight_init: default U(-b, b) with ``b = 1 / sqrt(hidden_size)``, as torch.nn.GRUCell.
        bias_init: default the same U(-b, b).
        dtype: of the parameters; default that of the input.

    Inputs:
        see `rnn_cell`.
    Returns:
        y = h', of the shape of h.
    Learned params:
        those of `rnn_cell`, with ``3 hidden_size`` rows for r, z and n.
    VJP:
        that of a step of `gru`.
    Raises:
        ValueError: other shapes.
        TypeError: other dtypes.

    Source: ``torch.nn.GRUCell``; Cho et al. 2014.

    >>> import funcnet as fn
    >>> layer = fn.gru_cell(2, weight_init=fn.initializers.zeros(), bias=False)
    >>> x = {"input": torch.ones(1, 3), "hx": torch.ones(1, 2)}
    >>> params, _ = layer.init(fn.key(0), x)
    >>> layer.apply(params, x)[0]
    tensor([[0.5000, 0.5000]])
    """
    return _cell("gru_cell", GRU, hidden_size, bias, (weight_init, bias_init), dtype)


def lstm_cell(
    hidden_size: int,
    bias: bool = True,
    *,
    weight_init: Initializer | None = None,
    bias_init: Initializer | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """``c' = f c + i g``, ``h' = o tanh(c')``: one step of `lstm`.

    Args:
        hidden_size: the number of features of h and of c.
        bias: whether biases are learned.
        weight_init: default U(-b, b) with ``b = 1 / sqrt(hidden_size)``, as torch.nn.LSTMCell.
        bias_init: default the same U(-b, b).
        dtype: of the parameters; default that of the input.

    Inputs:
        see `rnn_cell`, but ``hx`` is a tuple (h, c).
    Returns:
        y = (h', c'), each of shape (batch, hidden_size) or (hidden_size,).
    Learned params:
        those of `rnn_cell`, with ``4 hidden_size`` rows for i, f, g and o.
    VJP:
        that of a step of `lstm`.
    Raises:
        ValueError: other shapes.
        TypeError: other dtypes.

    Source: ``torch.nn.LSTMCell``; Hochreiter and Schmidhuber 1997.

    >>> import funcnet as fn
    >>> layer = fn.lstm_cell(1, weight_init=fn.initializers.zeros(), bias=False)
    >>> x = torch.ones(2, 3), (torch.zeros(2, 1), torch.ones(2, 1))
    >>> params, _ = layer.init(fn.key(0), x)
    >>> (h, c), _ = layer.apply(params, x)
    >>> h, c
    (tensor([[0.2311],
            [0.2311]]), tensor([[0.5000],
            [0.5000]]))
    """
    return _cell("lstm_cell", LSTM, hidden_size, bias, (weight_init, bias_init), dtype)
