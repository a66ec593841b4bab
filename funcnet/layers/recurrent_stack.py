"""Recurrent layers of any cell: several on top of each other, each in one or both directions."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet.batch_axis import BatchAxis
from funcnet.core import EMPTY, Forward, Grads, Key, Layer, Params, Pullback, Tree, sum_cotangents
from funcnet.deferred import DEFER, Defer, Deferred, defers, gradients, mapped
from funcnet.errors import require
from funcnet.global_forms import in_global_form
from funcnet.initializers import Initializer, torch_default
from funcnet.layers.dropout import dropout
from funcnet.layers.recurrence import Direction, recur, recur_backward
from funcnet.layers.recurrent_formulas import RELU, TANH, Cell, State
from funcnet.layers.recurrent_inputs import (
    Parts,
    check_lengths,
    check_states,
    check_values,
    in_form_of,
    joined,
    parts_of,
    states_of,
)
from funcnet.lift import stateful
from funcnet.params import Param, declare
from funcnet.random import fold_in

NONLINEARITIES = {"tanh": TANH, "relu": RELU}
STATE_NAMES = ("h_0", "c_0")


class Stack(NamedTuple):
    """What the passes of a recurrent layer are told: its cells, and the layout of its input."""

    name: str
    cell: Cell
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int

    def ways(self) -> list[Direction]:
        """The directions of each layer."""
        both = (False, True)[: 1 + self.bidirectional]
        return [Direction(self.cell, reverse) for reverse in both]

    def sizes(self) -> list[int]:
        """The number of features of each state."""
        return [self.proj_size or self.hidden_size, self.hidden_size][: self.cell.states]


def _names(stack: Stack, layer: int, way: Direction) -> dict[str, str]:
    """The name of each parameter of one direction, by its role."""
    suffix = f"_l{layer}" + ("_reverse" if way.reverse else "")
    roles = ["weight_ih", "weight_hh", *["bias_ih", "bias_hh"][: 2 * stack.bias]]
    roles += ["weight_hr"] if stack.proj_size else []
    return {role: role + suffix for role in roles}


def cell_params(
    cell: Cell,
    hidden_size: int,
    features: int,
    names: Mapping[str, str],
    inits: tuple[Initializer | None, Initializer | None],
    dtype: torch.dtype | None,
    proj_size: int = 0,
) -> dict[str, Param]:
    """Declares the parameters of one direction: U(-b, b) with ``b = 1 / sqrt(hidden_size)``."""
    default, rows = torch_default(hidden_size), cell.gates * hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "weight_ih": (rows, features),
        "weight_hh": (rows, proj_size or hidden_size),
        "bias_ih": (rows,),
        "bias_hh": (rows,),
        "weight_hr": (proj_size, hidden_size),
    }
    declared = {}
    for role, name in names.items():
        init = inits[role.startswith("bias")] or default
        of_x = (1, "{} features of the input") if role == "weight_ih" else None
        declared[name] = Param(shapes[role], init, dtype, of_x=of_x)
    return declared


def _sequence(stack: Stack, parts: Parts) -> tuple[Tensor, list[State], Tensor | None]:
    """The input as (steps, batch, features), the first states by direction, where steps are."""
    x = parts.input
    if x.dim() == 2:
        x = x.unsqueeze(1)
    elif stack.batch_first:
        x = x.transpose(0, 1)
    steps, batch, _ = x.shape
    count = stack.num_layers * len(stack.ways())
    if parts.hx is None:
        starts = [tuple([x.new_zeros(batch, size) for size in stack.sizes()])] * count
    else:
        states = states_of(parts.hx)
        if parts.input.dim() == 2:
            states = tuple([each.unsqueeze(1) for each in states])
        starts = [*zip(*[each.unbind(0) for each in states], strict=True)]
    if parts.lengths is None:
        return x, starts, None
    check_values(stack.name, parts.lengths, steps)
    at = torch.arange(steps, device=x.device).unsqueeze(1)
    valid = (at < parts.lengths).unsqueeze(2)
    # Behind a length there may be anything, and 0 times NaN is not 0.
    return torch.where(valid, x, 0.0), starts, valid


def _shaped(stack: Stack, parts: Parts, sequence: Tensor) -> Tensor:
    """A sequence (steps, batch, features) in the layout of the input."""
    if parts.input.dim() == 2:
        return sequence.squeeze(1)
    return sequence.transpose(0, 1) if stack.batch_first else sequence


def _stacked(parts: Parts, states: list[State]) -> State:
    """The states by direction as one tensor for each kind, in the layout of hx."""
    whole = [torch.stack(each) for each in zip(*states, strict=True)]
    return tuple([each.squeeze(1) for each in whole] if parts.input.dim() == 2 else whole)


def _forward(
    stack: Stack,
    params: Params,
    whole: Tree,
    key: Key,
    train: bool,
    keep: bool,
    axis: BatchAxis | None = None,
) -> tuple[Tree, dict[str, Any]]:
    parts = parts_of(whole)
    x, starts, valid = _sequence(stack, parts)
    residuals: dict[str, Any] = {"x": whole}
    ends: list[State] = []
    between = dropout(stack.dropout)
    if axis is not None and stack.dropout:
        what = f"{stack.name}: expects a part of a batch, got one sequence"
        require(parts.input.dim() == 3, f"{what}, {tuple(parts.input.shape)}")
        between = in_global_form(between, axis.at(1))
    for layer in range(stack.num_layers):
        if layer and stack.dropout:
            noise = None if key is None else fold_in(key, layer - 1)
            x, pullback, _ = between.forward(EMPTY, x, {}, noise, train)
            if keep:
                residuals[f"dropout_{layer - 1}"] = pullback
        outputs = []
        for way in stack.ways():
            names = _names(stack, layer, way)
            weights = {role: params[name] for role, name in names.items()}
            start = starts[len(ends)]
            output, end, kept = recur(way, weights, x, start, valid, keep)
            if keep:
                residuals[f"{layer}.{int(way.reverse)}"] = kept
            outputs.append(output if valid is None else torch.where(valid, output, 0.0))
            ends.append(end)
        x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
    return (_shaped(stack, parts, x), joined(_stacked(parts, ends))), residuals


@defers
def recurrent_rule(
    residuals: dict[str, Any], dy: Any, stack: Stack, *, params: bool | Defer, x: bool
) -> Grads:
    """`recur_backward` of each layer and direction, the last first; the halves share its loop."""
    if not (params or x):
        return None, None
    whole = residuals.pop("x")
    parts, ways = parts_of(whole), stack.ways()
    flat = parts.input.dim() == 2
    sequence, dstates = dy[0], [*states_of(dy[1])]
    if flat:
        sequence, *dstates = [each.unsqueeze(1) for each in (sequence, *dstates)]
    elif stack.batch_first:
        sequence = sequence.transpose(0, 1)
    dends = [*zip(*[each.unbind(0) for each in dstates], strict=True)]
    grads: dict[str, Tensor] = {}
    deferred: dict[str, Deferred] = {}
    dstarts: list[State] = []
    for layer in reversed(range(stack.num_layers)):
        pieces, dinputs = sequence.chunk(len(ways), -1), []
        for way, piece in reversed([*zip(ways, pieces, strict=True)]):
            kept = residuals.pop(f"{layer}.{int(way.reverse)}")
            dend, needed = dends[len(ways) * layer + way.reverse], x or layer > 0
            found, dinput, dstart = recur_backward(
                way, kept, piece, dend, stack.bias, params=params, x=needed
            )
            names = _names(stack, layer, way)
            if isinstance(found, Deferred):
                deferred[f"{layer}.{int(way.reverse)}"] = mapped(
                    under_names, found, None, *names.items()
                )
            elif found is not None:
                grads.update(under_names(found, None, *names.items()))
            dinputs.append(dinput)
            dstarts.append(dstart)
        sequence = sum_cotangents(*dinputs)
        if f"dropout_{layer - 1}" in residuals:
            _, sequence = residuals.pop(f"dropout_{layer - 1}")(sequence, params=False)
    dparams: Any = grads if params else None
    if params is DEFER:
        dparams = Deferred(directions_rule, deferred, tuple(deferred))
    if not x:
        return dparams, None
    dhx = None if parts.hx is None else joined(_stacked(parts, dstarts[::-1]))
    return dparams, in_form_of(whole, _shaped(stack, parts, sequence), dhx)


def under_names(grads: Params, residuals: None, *names: tuple[str, str]) -> dict[str, Any]:
    """The gradients of one direction under the names of the params."""
    return {name: grads[role] for role, name in names}


def directions_rule(parts: dict[str, Deferred], *names: str) -> Params:
    """The gradients of all layers and directions."""
    return {param: grad for each in names for param, grad in gradients(parts[each]).items()}


def recurrent(
    stack: Stack,
    inits: tuple[Initializer | None, Initializer | None],
    dtype: torch.dtype | None,
) -> Layer:
    """The layer of a stack; ``inits`` are those of weights and of biases."""
    name = stack.name
    check_sizes(name, stack.hidden_size, stack.bias)
    count, p, proj_size = stack.num_layers, stack.dropout, stack.proj_size
    require(_is_integer(count) and count > 0, f"{name}: num_layers must be > 0, got {count!r}")
    for option in ("batch_first", "bidirectional"):
        value = getattr(stack, option)
        wrong = f"{name}: {option} must be True or False, got {value!r}"
        require(isinstance(value, bool), wrong, TypeError)
    number = isinstance(p, (int, float)) and not isinstance(p, bool)
    require(number and 0 <= p <= 1, f"{name}: dropout must be in [0, 1], got {p!r}")
    require(
        _is_integer(proj_size) and 0 <= proj_size < stack.hidden_size,
        f"{name}: proj_size must be in [0, hidden_size = {stack.hidden_size}), got {proj_size!r}",
    )
    ways = stack.ways()

    @declare
    def init(x: Tree) -> dict[str, Param]:
        parts = parts_of(x)
        shape = tuple(parts.input.shape)
        forms = "(batch, steps, features)" if stack.batch_first else "(steps, batch, features)"
        right = len(shape) in (2, 3)
        require(right, f"expects an input {forms} or (steps, features), got {shape}")
        steps, batch = (shape[0], None) if len(shape) == 2 else shape[:2]
        if batch is not None and stack.batch_first:
            steps, batch = batch, steps
        require(steps > 0, f"expects at least one step, got {shape}")
        rows = () if batch is None else (batch,)
        shapes = [(count * len(ways), *rows, size) for size in stack.sizes()]
        check_states(parts, dict(zip(STATE_NAMES, shapes, strict=False)))
        check_lengths(parts, batch)
        declared: dict[str, Param] = {}
        features = shape[-1]
        for layer in range(count):
            for way in ways:
                names = _names(stack, layer, way)
                declared |= cell_params(
                    stack.cell, stack.hidden_size, features, names, inits, dtype, proj_size
                )
            features = len(ways) * stack.sizes()[0]
        return declared

    def apply(
        params: Params, x: Tree, state: Params, key: Key, train: bool, axis: BatchAxis | None = None
    ) -> tuple[Tree, Params]:
        return _forward(stack, params, x, key, train, False, axis)[0], state

    def forward(
        params: Params, x: Tree, state: Params, key: Key, train: bool, axis: BatchAxis | None = None
    ) -> Forward:
        y, residuals = _forward(stack, params, x, key, train, True, axis)
        return y, Pullback(recurrent_rule, residuals, (stack,)), state

    keyed = p > 0 and count > 1
    return stateful(init, forward, apply=apply, keyed=keyed, name=name, takes_axis=True)


def check_sizes(name: str, hidden_size: Any, bias: Any) -> None:
    """Raise unless the options that all recurrent layers have are right."""
    hint = "the size of the input is found by init, give that of the output alone"
    enough = _is_integer(hidden_size) and hidden_size > 0
    require(enough, f"{name}: hidden_size must be > 0, got {hidden_size!r}; {hint}")
    wrong = f"{name}: bias must be True or False, got {bias!r}; {hint}"
    require(isinstance(bias, bool), wrong, TypeError)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def plain_cell(name: str, nonlinearity: str) -> Cell:
    """The cell of an RNN with this nonlinearity."""
    known = " or ".join(map(repr, NONLINEARITIES))
    wrong = f"{name}: nonlinearity must be {known}, got {nonlinearity!r}"
    require(nonlinearity in NONLINEARITIES, wrong)
    return NONLINEARITIES[nonlinearity]
