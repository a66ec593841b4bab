"""A recurrent cell over a sequence in one direction: the loop forward, and the loop backward.

The product with x is one for all steps, before the loop; the gradients of the weights are products
over all steps, behind it. A loop has the product with h alone.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet.control_flow import scan
from funcnet.core import Grads, Params, Pullback, pull
from funcnet.deferred import DEFER, Defer, Deferred, gradients
from funcnet.layers.linear import linear_rule
from funcnet.layers.loop_products import product_with
from funcnet.layers.recurrent_formulas import Cell, State


class Direction(NamedTuple):
    """A cell and the way that it takes through the sequence."""

    cell: Cell
    reverse: bool = False


def _choose(valid: Tensor | None, after: State, before: State) -> State:
    """The state after a step where the sequence has one, else the one before it."""
    if valid is None:
        return after
    return tuple([torch.where(valid, *pair) for pair in zip(after, before, strict=True)])


def recur(
    way: Direction, weights: Params, x: Tensor, start: State, valid: Tensor | None, keep: bool
) -> tuple[Tensor, State, dict[str, Any]]:
    """``after = step(weight_ih x + weight_hh h + biases, before)`` for each x of a sequence.

    Args:
        way: the cell and the direction.
        weights: ``weight_ih``, ``weight_hh``, ``bias_ih``, ``bias_hh``, and ``weight_hr`` if
            h is to be projected.
        x: of shape (steps, batch, features).
        start: the first state, tensors of shape (batch, features).
        valid: (steps, batch, 1), where the sequences have a step; None for all.
        keep: whether to return the residuals.

    Returns:
        h after each step, the last state, the residuals.
    """
    cell, steps, batch, features = way.cell, *x.shape
    bias, hidden_bias = weights.get("bias_ih"), weights.get("bias_hh")
    of_hidden = product_with(weights["weight_hh"].t(), batch)
    project = product_with(weights["weight_hr"].t(), batch) if "weight_hr" in weights else None
    if bias is not None and hidden_bias is not None and not cell.is_split:
        bias = bias + hidden_bias
    given = F.linear(x.reshape(steps * batch, features), weights["weight_ih"], bias)

    def step(before: State, inputs: tuple[Tensor, Tensor | None]) -> tuple[State, Any]:
        given, valid = inputs
        gates: Any = given
        if cell.is_split:
            gates = given, of_hidden(before[0], hidden_bias)
        else:
            gates = of_hidden(before[0], given)
        after, saved = cell.step(gates, before)
        unprojected = None
        if project is not None:
            unprojected = after[0]
            after = (project(unprojected), *after[1:])
        after = _choose(valid, after, before)
        return after, (after, saved, unprojected) if keep else (after[:1],)

    xs = given.view(steps, batch, given.shape[-1]), valid
    last, (states, *kept) = scan(step, start, xs, reverse=way.reverse)
    residuals = {"states": states, "kept": kept, "x": x, "start": start, "valid": valid}
    residuals["weights"] = {name: weights[name] for name in weights if name.startswith("weight")}
    return states[0], last, residuals


def _before(states: State, start: State, reverse: bool) -> State:
    """The state before each step, from those after each step."""
    shifted = []
    for state, first in zip(states, start, strict=True):
        one = first.unsqueeze(0)
        shifted.append(torch.cat([state[1:], one] if reverse else [one, state[:-1]]))
    return tuple(shifted)


def recur_backward(
    way: Direction,
    residuals: dict[str, Any],
    dy: Tensor | None,
    dlast: State,
    bias: bool,
    *,
    params: bool | Defer,
    x: bool,
) -> tuple[Any, Tensor | None, State]:
    """The gradients of the weights, and the cotangents of x and of the first state.

    Args:
        way: the cell and the direction of the forward pass.
        residuals: what `recur` kept.
        dy: the cotangent of h after each step, if it has one.
        dlast: those of the last state.
        bias: whether there are biases.
        params, x: whether the gradients, which may be deferred, and the cotangent of x, are
            wanted; else they are None.
    """
    cell, weights, valid = way.cell, residuals["weights"], residuals["valid"]
    states, (saved, unprojected) = residuals["states"], residuals["kept"]
    before = _before(states, residuals["start"], way.reverse)
    hidden_weight, projection = weights["weight_hh"], weights.get("weight_hr")
    batch = len(dlast[0])
    through = product_with(hidden_weight, batch)
    through_projection = None if projection is None else product_with(projection, batch)
    if dy is not None and valid is not None:
        dy = torch.where(valid, dy, 0.0)

    def step(dafter: State, inputs: Any) -> tuple[State, Any]:
        dy, valid, saved, before, after = inputs
        if dy is not None:
            dafter = (dafter[0] + dy, *dafter[1:])
        dh = dafter[0] if through_projection is None else through_projection(dafter[0])
        dgates, (direct, *others) = cell.derivative(saved, before, after, (dh, *dafter[1:]))
        if valid is not None:
            dgates = tuple([torch.where(valid, each, 0.0) for each in dgates])
        dbefore = _choose(valid, (through(dgates[-1], direct), *others), dafter)
        return dbefore, (dgates, None if projection is None else dafter[0])

    xs = dy, valid, saved, before, states
    dstart, (dgates, dprojected) = scan(step, dlast, xs, reverse=not way.reverse)
    inputs = {"x": residuals["x"], "weight": weights["weight_ih"]}
    of_input, dx = _defer_linear(inputs, dgates[0], bias, params=bool(params), x=x)
    if not params:
        return None, dx, dstart
    hidden = {"x": before[0], "weight": hidden_weight}
    of_hidden, _ = _defer_linear(hidden, dgates[-1], bias and cell.is_split)
    parts = {"input": of_input, "hidden": of_hidden}
    if projection is not None:
        if valid is not None:
            dprojected = torch.where(valid, dprojected, 0.0)
        unprojected = {"x": unprojected, "weight": projection}
        parts["projected"], _ = _defer_linear(unprojected, dprojected, False)
    deferred = Deferred(direction_rule, parts, (bias, cell.is_split))
    return deferred if params is DEFER else gradients(deferred), dx, dstart


def _defer_linear(
    residuals: dict[str, Any], dy: Tensor, bias: bool, *, params: bool = True, x: bool = False
) -> Grads:
    """`linear_rule` with its gradients deferred."""
    pullback = Pullback(linear_rule, residuals, (bias,))
    return pull({"": pullback}, "", dy, params=DEFER if params else False, x=x)


def direction_rule(parts: dict[str, Deferred], bias: bool, is_split: bool) -> Params:
    """The gradients of one direction: of linear layers of its input and of its hidden state."""
    of_input, of_hidden = gradients(parts["input"]), gradients(parts["hidden"])
    grads = {"weight_ih": of_input["weight"], "weight_hh": of_hidden["weight"]}
    if bias:
        grads["bias_ih"] = of_input["bias"]
        # The gradients of two biases that are added are equal, but each has its own memory.
        grads["bias_hh"] = of_hidden["bias"] if is_split else of_input["bias"].clone()
    if "projected" in parts:
        grads["weight_hr"] = gradients(parts["projected"])["weight"]
    return grads
