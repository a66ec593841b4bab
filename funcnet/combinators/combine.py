"""`combine`: the one function of which every combinator is made.

A combinator is a data flow through its children, ``forward``, and the way of the cotangents back
through them, ``backward``. All else is here: each child's own params, state and key, the pullbacks,
the gradients, and the paths of errors.

Parameters, state and pullbacks of the children are dicts by child name, sparse: a child without
them has no entry. A child's key is folded from the combinator's by the child's name, so adding a
layer changes no other layer's noise.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet import core, tree
from funcnet.core import (
    EMPTY,
    Applied,
    Forward,
    Grads,
    Key,
    Layer,
    Params,
    Pullback,
    Tree,
    locate,
    sum_cotangents,
)
from funcnet.lift import stateful
from funcnet.random import fold_in

Name = str | tuple[str, ...]
"""What a child is called: a string, whose entry of the params it has; "" for a child that has all
of the params; or several strings, for a child that has their entries, such as a `serial` of some
children of another."""

_OWN = ".residuals"
"""Where a combinator's own residuals are among the pullbacks: no child has a dot in its name."""


def combine(
    name: str,
    children: Mapping[Any, Layer],
    forward: Callable[..., tuple[Tree, Mapping[str, Tree]]],
    backward: Callable[..., Tree],
    *static: Hashable,
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

    ``run.names`` and ``pull.names`` are the names of the children. A child may run several times:
    ``run(child, x, use=i)`` and ``pull(child, dy, use=i)`` tell the uses apart. State goes from one
    to the next, and gradients are summed. ``pull(child, dy, needed=False)`` does not compute the
    child's dx; ``pull.x`` tells whether the combinator's own dx is asked for.

    Raises: the children's errors, with their path in front.

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
    slots = {child: Slot(name, child) for child in children}
    for child, slot in slots.items():
        slot.check(children[child], alone=len(children) == 1)

    def init(key: Tensor, x: Tree) -> tuple[Params, Params]:
        run = _Init(children, slots, key)
        try:
            run.device = tree.device_of(x) if children else None
        except ValueError as error:
            locate(error, f"{name}:")
            raise
        forward(run, tree.to_meta(x), *static)
        return run.params, run.new_state

    def apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Applied:
        run = _Call(children, slots, key, params, state, train)
        return forward(run, x, *static)[0], run.new_state

    def vjp(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        run = _Call(children, slots, key, params, state, train, pullbacks={})
        y, residuals = forward(run, x, *static)
        kept = {**run.pullbacks, _OWN: residuals} if residuals else run.pullbacks
        learned = frozenset([child for child, slot in slots.items() if slot.is_in(params)])
        known = (backward, tuple(slots.values()), learned, static)
        return y, Pullback(combine_rule, kept, known), run.new_state

    return stateful(
        init,
        vjp,
        apply=apply,
        name=name,
        children=children,
        rebuild=lambda children: combine(name, children, forward, backward, *static),
        takes_key=any([layer.takes_key for layer in children.values()]),
    )


def combine_rule(
    residuals: Any,
    dy: Tree,
    backward: Any,
    slots: Any,
    learned: Any,
    static: Any,
    *,
    params: bool,
    x: bool,
) -> Grads:
    """The combinator's ``backward``, with the children's pullbacks among the residuals."""
    own = residuals.pop(_OWN, EMPTY)
    pull = Pull(slots, residuals, learned if params else frozenset(), x)
    dx = backward(pull, dy, own, *static)
    if left := [call for call in residuals if call.partition(".")[0] in pull.learned]:
        raise ValueError(f"{slots[0].parent}: backward pulls no cotangent through {left}")
    return pull.dparams if params else None, dx if x else None


class Slot(NamedTuple):
    """Where a child is in its parent: its entries of trees, its key, its path in errors."""

    parent: str
    child: Name

    def check(self, layer: Any, alone: bool) -> None:
        """Raise TypeError for what is no layer, ValueError for a name that no entry can have."""
        if not isinstance(layer, Layer):
            hint = "; call its constructor" if callable(layer) else ""
            raise TypeError(f"{self.path()}: expects a Layer, got {type(layer).__name__}{hint}")
        if isinstance(self.child, str) and ("." in self.child or not (self.child or alone)):
            wrong = f"a name must not be empty or have a dot, got {self.child!r}"
            raise ValueError(f"{self.parent}: {wrong}")

    @property
    def entry(self) -> str:
        """The name of its entry, "" for a child that has several or all of its parent's."""
        return self.child if isinstance(self.child, str) else ""

    def path(self, use: int | None = None) -> str:
        """The path in an error's message: ``serial['head']``, ``shared[0]`` for a use."""
        inside = f"[{self.entry!r}]" if self.entry else ""
        return f"{self.parent}{inside}" + ("" if use is None else f"[{use}]")

    def call(self, use: int | None) -> str:
        """The name of the pullback among the residuals."""
        name = self.child if isinstance(self.child, str) else "+".join(self.child)
        return name if use is None else f"{name}.{use}"

    def key(self, key: Tensor, use: int | None = None) -> Tensor:
        """The child's key, of its parent's."""
        key = fold_in(key, self.entry) if self.entry else key
        return key if use is None else fold_in(key, use)

    def own(self, whole: Params) -> Params:
        """The child's part of its parent's params or state."""
        if isinstance(self.child, str):
            return whole.get(self.child, EMPTY) if self.child else whole
        return {name: whole[name] for name in self.child if name in whole}

    def is_in(self, whole: Params) -> bool:
        """Whether the child has a part of its parent's params."""
        return self.entry in whole if self.entry else bool(self.own(whole))

    def put(self, whole: dict[str, Any], own: Params) -> None:
        """Put the child's part into its parent's params or state, which are sparse."""
        if own:
            whole.update({self.entry: own} if self.entry else own)


class Run:
    """Runs the children of a combinator: ``run(child, x)`` is the output of a child."""

    def __init__(self, children: Mapping[Any, Layer], slots: Mapping[Name, Slot], key: Any) -> None:
        self.names: Any = tuple(slots)
        self.children, self.slots, self.key = children, slots, key
        self.new_state: dict[str, Any] = {}
        self.ran: set[Name] = set()

    def __call__(self, child: Name, x: Tree, use: int | None = None) -> Tree:
        """The output of a child; ``use`` tells several uses of one child apart."""
        slot = self.slots[child]
        again = child in self.ran
        self.ran.add(child)
        try:
            if again and use is None:
                raise ValueError("runs twice: tell the uses of a child apart by use=0, use=1, ...")
            return self.output(slot, self.children[child], x, use, again)
        except Exception as error:
            locate(error, slot.path(use))
            raise

    def output(self, slot: Slot, layer: Layer, x: Tree, use: int | None, again: bool) -> Tree:
        raise NotImplementedError


class _Init(Run):
    """Makes the params and state of each child, and finds its output on the meta device."""

    def __init__(self, *known: Any) -> None:
        super().__init__(*known)
        self.device: Any = None
        self.params: dict[str, Any] = {}

    def output(self, slot: Slot, layer: Layer, x: Tree, use: int | None, again: bool) -> Tree:
        if not again:
            params, state = layer.init(slot.key(self.key), tree.placeholder(x, self.device))
            slot.put(self.params, params)
            slot.put(self.new_state, state)
        params, state = tree.to_meta((slot.own(self.params), slot.own(self.new_state)))
        noise = torch.empty(2, dtype=torch.int64, device="meta") if layer.takes_key else None
        return layer.apply(params, x, state, key=noise)[0]


class _Call(Run):
    """Applies each child, or, with a dict for the pullbacks, calls its vjp."""

    def __init__(
        self,
        children: Any,
        slots: Any,
        key: Key,
        params: Params,
        state: Params,
        train: bool,
        pullbacks: Any = None,
    ) -> None:
        super().__init__(children, slots, key)
        self.params, self.state, self.train, self.pullbacks = params, state, train, pullbacks
        _check_names("params", params, slots)
        _check_names("state", state, slots)

    def output(self, slot: Slot, layer: Layer, x: Tree, use: int | None, again: bool) -> Tree:
        params = slot.own(self.params)
        # A later use goes on from the state that the one before it left.
        state = slot.own(self.new_state if again else self.state)
        key = None if self.key is None or not layer.takes_key else slot.key(self.key, use)
        if self.pullbacks is None:
            y, state = layer.apply(params, x, state, key=key, train=self.train)
        else:
            y, pullback, state = layer.vjp(params, x, state, key=key, train=self.train)
            self.pullbacks[slot.call(use)] = pullback
        slot.put(self.new_state, state)
        return y


class Pull:
    """Pulls cotangents back through the children: ``pull(child, dy)`` is the child's dx.

    In a training step nothing else holds the children's residuals, so they are freed as the
    backward pass consumes them.
    """

    def __init__(self, slots: Any, pullbacks: Any, learned: frozenset[Name], x: bool) -> None:
        self.slots = {slot.child: slot for slot in slots}
        self.names: Any = tuple(self.slots)
        self.pullbacks, self.learned, self.x = pullbacks, learned, x
        # In the order of params.
        self.dparams: Any = {s.entry: {} for s in slots if s.entry and s.child in learned}

    def __call__(self, child: Name, dy: Tree, use: int | None = None, needed: bool = True) -> Tree:
        """The child's dx, None where it is not ``needed``; its dparams are kept."""
        slot, learns = self.slots[child], child in self.learned
        try:
            dparams, dx = core.pull(self.pullbacks, slot.call(use), dy, params=learns, x=needed)
        except Exception as error:
            locate(error, slot.path(use))
            raise
        if learns:
            before = slot.own(self.dparams) if use is not None else EMPTY
            slot.put(self.dparams, sum_cotangents(before, dparams) if before else dparams)
        return dx


def _check_names(what: str, found: Params, slots: Mapping[Name, Slot]) -> None:
    if isinstance(found, dict) and found.keys() <= slots.keys():
        return
    parent = next(iter(slots.values()))[0] if slots else "a combinator"
    if not isinstance(found, Mapping):
        raise TypeError(f"{parent}: expects a dict of {what}, got {tree.describe(found)}")
    names = {name for child in slots for name in ((child,) if isinstance(child, str) else child)}
    if "" not in names and (extra := sorted(found.keys() - names)):
        raise ValueError(f"{parent}: {what} has {extra}, but the layers are {list(slots)}")
