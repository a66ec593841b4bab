"""`combine`: the one function of which every combinator is made.

A combinator is a data flow through its children, ``forward``, and the way of the cotangents back
through them, ``backward``. All else is here: each child's own params, state and key, the pullbacks,
the gradients, and the paths of errors.

Parameters, state and pullbacks of the children are dicts by child name, sparse: a child without
them has no entry. A child's key is folded from the combinator's by the child's name, so adding a
layer changes no other layer's noise.
"""

from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from funcnet import core, tree
from funcnet.batch_axis import BatchAxis
from funcnet.checks import check_kind
from funcnet.combinators.entries import Name, has_entry, parts_of, whole_of
from funcnet.core import (
    EMPTY,
    Applied,
    Box,
    Forward,
    Grads,
    Key,
    Layer,
    Params,
    Pullback,
    Sums,
    Tree,
    sum_cotangents,
    takes_box,
    takes_sums,
)
from funcnet.deferred import DEFER, Defer, Deferred, defers, gradients, of_children
from funcnet.errors import locate
from funcnet.lift import stateful
from funcnet.random import fold_in

OWN = ".residuals"
"""Where a combinator's own residuals are among the pullbacks: no child has a dot in its name."""


def combine(
    name: str,
    children: Mapping[Any, Layer],
    forward: Callable[..., tuple[Tree, Mapping[str, Tree]]],
    backward: Callable[..., Tree],
    *static: Hashable,
    dotted: bool = False,
    mixes_examples: bool = False,
    global_form: Callable[[Mapping[Any, Layer], BatchAxis], Layer] | None = None,
) -> Layer:
    """A layer made of layers.

    Args:
        name: of the combinator, for errors and summaries.
        children: the layers, by name. One child named "" shares its parent's params and state.
        forward: ``(run, x, *static) -> (y, residuals)``, where ``run(child, x)`` is the output of
            a child and ``residuals`` a dict of what ``backward`` needs, often empty.
        backward: ``(pull, dy, residuals, *static) -> dx``, where ``pull(child, dy)`` is the dx of
            a child. Every child that ran must be pulled once. A module-level function.
        static: hashable arguments of both.
        dotted: whether names may be dotted paths, such as "blocks.0" for a child whose params are
            ``params["blocks"]["0"]``.
        mixes_examples: whether the data flow itself does, beside the children; see `Layer`.
        global_form: ``(children, axis) -> Layer``, the same for a part of a batch, where it is more
            than of the children in their global forms; see `Layer`.

    ``run.names`` and ``pull.names`` are the names of the children. A child may run several times:
    ``run(child, x, use=i)`` and ``pull(child, dy, use=i)`` tell the uses apart. State goes from one
    to the next, and gradients are summed. ``pull(child, dy, needed=False)`` does not compute the
    child's dx; ``pull.x`` tells whether the combinator's own dx is asked for.

    Raises:
        the children's errors, with their path in front.

    >>> import funcnet as fn
    >>> def gated_forward(run, x):
    ...     gate, value = run("gate", x), run("value", x)
    ...     return gate * value, {"gate": gate, "value": value}
    >>> def gated_backward(pull, dy, residuals):
    ...     dgate = pull("gate", dy * residuals["value"], needed=pull.x)
    ...     dvalue = pull("value", dy * residuals["gate"], needed=pull.x)
    ...     return fn.sum_cotangents(dgate, dvalue)
    >>> def gated(gate, value):
    ...     return combine("gated", {"gate": gate, "value": value}, gated_forward, gated_backward)
    >>> net = gated(fn.serial(fn.linear(3), fn.sigmoid()), fn.linear(3))
    >>> fn.testing.check_layer(net, torch.ones(4, 2))
    """
    for child, layer in children.items():
        _check_child(name, child, layer, len(children) == 1, dotted)
    told: Any = {"dotted": dotted, "mixes_examples": mixes_examples, "global_form": global_form}
    names = tuple(children)
    entries = frozenset([child for child in names if has_entry(child) and "." not in child])

    def parts(what: str, found: Params) -> Mapping[Any, Params]:
        if isinstance(found, dict) and found.keys() <= entries:
            return found
        return parts_of(name, names, what, found)

    def init(key: Tensor, x: Tree) -> tuple[Params, Params]:
        try:
            device = tree.device_of(x) if children else torch.device("meta")
        except ValueError as error:
            locate(error, f"{name}:")
            raise
        run = _Init(name, children, key, device)
        try:
            forward(run, tree.to_meta(x), *static)
        except RuntimeError as error:
            _explain(run, x, run.outputs, error)
            raise
        # In the order of the children, as in a `state_dict()`, whichever runs first.
        made = [
            {child: part[child] for child in names if child in part}
            for part in (run.params, run.state)
        ]
        return whole_of(made[0]), whole_of(made[1])

    def flow(run: "Run", x: Tree) -> tuple[Tree, Mapping[str, Tree]]:
        try:
            return forward(run, x, *static)
        except RuntimeError as error:
            again = _Outputs(name, children, run.params, run.state, run.key, run.train, None)
            with suppress(Exception):
                forward(again, x, *static)
            _explain(run, x, again.outputs, error)
            raise

    def apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Applied:
        own = parts("params", params), parts("state", state)
        run = Run(name, children, *own, key, train, None)
        return flow(run, x)[0], whole_of(run.new_state)

    def vjp(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        own = parts("params", params), parts("state", state)
        kept: dict[str, Any] = {}
        run = Run(name, children, *own, key, train, kept)
        y, residuals = flow(run, x)
        if residuals:
            kept[OWN] = residuals
        told = (backward, name, names, tuple(run.params), *static)
        return y, Pullback(combine_rule, kept, told), whole_of(run.new_state)

    return stateful(
        init,
        vjp,
        apply=apply,
        name=name,
        children=children,
        rebuild=lambda children: combine(name, children, forward, backward, *static, **told),
        takes_key=any([layer.takes_key for layer in children.values()]),
        mixes_examples=mixes_examples,
        global_form=None if global_form is None else partial(global_form, children),
    )


@takes_box
@takes_sums
@defers
def combine_rule(
    residuals: Any,
    dy: Tree | Box,
    backward: Any,
    name: str,
    names: tuple[Name, ...],
    learned: tuple[Name, ...],
    *static: Any,
    params: bool | Sums | Defer,
    x: bool,
) -> Grads:
    """The combinator's ``backward``, with the children's pullbacks among the residuals."""
    own = residuals.pop(OWN, EMPTY)
    pull = Pull(name, names, residuals, learned if params else (), x)
    if isinstance(params, Sums):
        pull.learned.update(parts_of(name, names, "grads", params.total))
        pull.sums = params
    pull.deferred = params is DEFER
    box = dy if isinstance(dy, Box) else Box([dy])
    # A call without a star hands its arguments over.
    dx = backward(pull, box.pop(), own, *static) if static else backward(pull, box.pop(), own)
    if left := [call for call in residuals if call.partition("#")[0] in pull.learned]:
        raise ValueError(f"{name}: backward pulls no cotangent through {left}")
    if params is DEFER:
        parts = {_part(child): each for child, each in pull.learned.items()}
        return Deferred(children_rule, parts, (name, tuple(pull.learned))), dx if x else None
    return whole_of(pull.learned) if params else None, dx if x else None


@of_children
def children_rule(parts: Mapping[str, Deferred], name: str, learned: tuple[Name, ...]) -> Params:
    """The gradients of each child, as the combinator's."""
    made: dict[Any, Params] = {}
    for child in learned:
        try:
            part = parts[_part(child)]
            made[child] = gradients(part) if isinstance(part, Deferred) else part
        except Exception as error:
            locate(error, _path(name, child))
            raise
    return whole_of(made)


class Run:
    """Runs the children of a combinator: ``run(child, x)`` is the output of a child.

    It applies each child or, with a dict for the pullbacks, calls its forward. Params and state are
    by child, and sparse.
    """

    def __init__(
        self,
        parent: str,
        children: Mapping[Any, Layer],
        params: Any,
        state: Mapping[Any, Params],
        key: Any,
        train: bool,
        pullbacks: dict[str, Pullback] | None,
    ) -> None:
        self.names: Any = tuple(children)
        self.parent, self.children = parent, children
        self.params, self.state, self.key, self.train = params, state, key, train
        self.pullbacks = pullbacks
        self.new_state: dict[Any, Params] = {}
        self.failed = False  # whether a child raised

    def __call__(self, child: Name, x: Tree, use: int | None = None) -> Tree:
        """The output of a child; ``use`` tells several uses of one child apart."""
        if child not in self.children:
            raise _unknown(self.parent, child, self.names)
        layer, params, state = self.children[child], self.params.get(child, EMPTY), EMPTY
        key, pullbacks = self.key if layer.takes_key else None, self.pullbacks
        try:
            if key is not None:
                key = _key(key, child, use)
            if self.state:
                # A later use goes on from the state that the one before it left.
                before = self.state if use is None else {**self.state, **self.new_state}
                state = before.get(child, EMPTY)
            if pullbacks is None:
                y, state = layer.apply(params, x, state, key=key, train=self.train)
            else:
                call = child if use is None and type(child) is str else _call(child, use)
                if call in pullbacks:
                    raise ValueError("runs twice: tell the uses apart by use=0, use=1, ...")
                y, pullbacks[call], state = layer.forward(params, x, state, key, self.train)
        except Exception as error:
            self.failed = True
            locate(error, _path(self.parent, child, use))
            raise
        if state:
            self.new_state[child] = state
        return y


class _Outputs(Run):
    """Remembers what the children give, for an error."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.outputs: dict[str, Tree] = {}

    def __call__(self, child: Name, x: Tree, use: int | None = None) -> Tree:
        y = self.outputs[_call(child, use)] = super().__call__(child, x, use)
        return y


def _explain(run: Any, x: Tree, outputs: Mapping[str, Tree], error: RuntimeError) -> None:
    """Raise ValueError, with what the children give, if these do not go together."""
    if run.failed or type(error) is not RuntimeError:
        return
    given = ", ".join([f"{child!r} gives {tree.describe(y)}" for child, y in outputs.items()])
    what = f"what its layers give does not go together, for x {tree.describe(x)}: {given}"
    raise ValueError(f"{run.parent}: {what}: {error}") from error


class _Init:
    """Makes the params and state of each child, and finds its output on the meta device."""

    def __init__(self, parent: str, children: Any, key: Tensor, device: torch.device) -> None:
        self.names: Any = tuple(children)
        self.parent, self.children, self.key, self.device = parent, children, key, device
        self.params: dict[Any, Any] = {}
        self.state: dict[Any, Any] = {}
        self.outputs: dict[str, Tree] = {}
        self.failed = False  # whether a child raised

    def __call__(self, child: Name, x: Tree, use: int | None = None) -> Tree:
        if child not in self.children:
            raise _unknown(self.parent, child, self.names)
        layer = self.children[child]
        try:
            if child not in self.params and child not in self.state:
                example = tree.placeholder(x, self.device)
                params, state = layer.init(_key(self.key, child), example)
                self.params.update({child: params} if params else {})
                self.state.update({child: state} if state else {})
            y = self.outputs[_call(child, use)] = output_on_meta(
                layer, x, self.params.get(child, EMPTY), self.state.get(child, EMPTY)
            )
            return y
        except Exception as error:
            self.failed = True
            locate(error, _path(self.parent, child, use))
            raise


def output_on_meta(layer: Layer, x: Tree, params: Params, state: Params) -> Tree:
    """The output of a layer for an x on the meta device, wherever params and state are."""
    params, state = tree.to_meta((params, state))
    noise = torch.empty(2, dtype=torch.int64, device="meta") if layer.takes_key else None
    return layer.apply(params, x, state, key=noise)[0]


class Pull:
    """Pulls cotangents back through the children: ``pull(child, dy)`` is the child's dx.

    In a training step nothing else holds the children's residuals, so they are freed as the
    backward pass consumes them.
    """

    def __init__(
        self, parent: str, names: Any, pullbacks: Any, learned: tuple[Name, ...], x: bool
    ) -> None:
        self.parent, self.names, self.pullbacks, self.x = parent, names, pullbacks, x
        self.learned: dict[Any, Any] = dict.fromkeys(learned)  # the gradients, in this order
        self.sums: Sums | None = None  # where they are those of other batches, to be added to
        self.deferred = False  # whether they are for later

    def __call__(
        self, child: Name, dy: Tree | Box, use: int | None = None, needed: bool = True
    ) -> Tree:
        """The child's dx, None where it is not ``needed``; its dparams are kept.

        A dy in a `Box` is freed when the child has read it.
        """
        call = child if use is None and type(child) is str else _call(child, use)
        if call not in self.pullbacks:
            raise _unknown(self.parent, child, self.names)
        learns = child in self.learned
        params: Any = learns
        if learns and self.sums is not None:
            params = self.sums.of(self.learned[child])
        elif learns and self.deferred:
            params = DEFER
        try:
            dparams, dx = core.pull(self.pullbacks, call, dy, params=params, x=needed)
        except Exception as error:
            locate(error, _path(self.parent, child, use))
            raise
        if learns:
            before = None if self.sums is not None else self.learned[child]  # of another use
            self.learned[child] = sum_cotangents(before, dparams) if before else dparams
        return dx


def _check_child(parent: str, child: Name, layer: Any, alone: bool, dotted: bool) -> None:
    check_kind(_path(parent, child), layer, Layer)
    if isinstance(child, str) and (("." in child and not dotted) or not (child or alone)):
        raise ValueError(f"{parent}: a name must not be empty or have a dot, got {child!r}")


def _unknown(parent: str, child: Name, names: tuple[Name, ...]) -> ValueError:
    if child in names:
        return ValueError(f"{_path(parent, child)} did not run, or is pulled twice")
    return ValueError(f"{parent}: no child is called {child!r}, only {list(names)}")


def _path(parent: str, child: Name, use: int | None = None) -> str:
    """The path in an error's message: ``serial['head']``, ``shared[0]`` for a use."""
    inside = f"[{child!r}]" if has_entry(child) else ""
    return f"{parent}{inside}" + ("" if use is None else f"[{use}]")


def _part(child: Name) -> str:
    """The name of a child's part in a Deferred."""
    return child if isinstance(child, str) else f".{_call(child)}"


def _call(child: Name, use: int | None = None) -> str:
    """The name of the pullback of a use of a child, among the residuals."""
    name = child if isinstance(child, str) else "+".join(child)
    return name if use is None else f"{name}#{use}"


def _key(key: Tensor, child: Name, use: int | None = None) -> Tensor:
    """The key of a child, of its parent's."""
    key = fold_in(key, str(child)) if has_entry(child) else key
    return key if use is None else fold_in(key, use)
