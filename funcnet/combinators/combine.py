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
    slots = {child: Slot.of(name, child) for child in children}
    for child, slot in slots.items():
        slot.check(children[child], alone=len(children) == 1)

    known = tuple(slots.values())

    def init(key: Tensor, x: Tree) -> tuple[Params, Params]:
        run = _Init(slots, children, {}, {}, key, False, None)
        try:
            run.device = tree.device_of(x) if children else torch.device("meta")
        except ValueError as error:
            locate(error, f"{name}:")
            raise
        forward(run, tree.to_meta(x), *static)
        return run.params, run.new_state

    def apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Applied:
        _check_names(name, params, state, children)
        run = Run(slots, children, params, state, key, train, None)
        return forward(run, x, *static)[0], run.new_state

    def vjp(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        _check_names(name, params, state, children)
        kept: dict[str, Any] = {}
        run = Run(slots, children, params, state, key, train, kept)
        y, residuals = forward(run, x, *static)
        if residuals:
            kept[_OWN] = residuals
        learned = frozenset([slot.child for slot in known if slot.is_in(params)])
        return y, Pullback(combine_rule, kept, (backward, known, learned, static)), run.new_state

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
    found = pull.dparams
    # In the order of params: children may be pulled in any.
    dparams = {slot.entry: found.pop(slot.entry) for slot in slots if slot.entry in found} | found
    return dparams if params else None, dx if x else None


class Slot(NamedTuple):
    """Where a child is in its parent: its entries of trees, its key, its path in errors."""

    parent: str
    child: Name
    entry: str  # the name of its entry; "" for a child that has several or all of its parent's
    pullback: str  # the name of its pullback among the residuals

    @classmethod
    def of(cls, parent: str, child: Name) -> "Slot":
        """The slot of a child."""
        if isinstance(child, str):
            return cls(parent, child, child, child)
        return cls(parent, child, "", "+".join(child))

    def check(self, layer: Any, alone: bool) -> None:
        """Raise TypeError for what is no layer, ValueError for a name that no entry can have."""
        if not isinstance(layer, Layer):
            hint = "; call its constructor" if callable(layer) else ""
            raise TypeError(f"{self.path()}: expects a Layer, got {type(layer).__name__}{hint}")
        if isinstance(self.child, str) and ("." in self.child or not (self.child or alone)):
            wrong = f"a name must not be empty or have a dot, got {self.child!r}"
            raise ValueError(f"{self.parent}: {wrong}")

    def path(self, use: int | None = None) -> str:
        """The path in an error's message: ``serial['head']``, ``shared[0]`` for a use."""
        inside = f"[{self.entry!r}]" if self.entry else ""
        return f"{self.parent}{inside}" + ("" if use is None else f"[{use}]")

    def call(self, use: int | None) -> str:
        """The name of the pullback of a use, among the residuals."""
        return self.pullback if use is None else f"{self.pullback}.{use}"

    def key(self, key: Tensor, use: int | None = None) -> Tensor:
        """The child's key, of its parent's."""
        key = fold_in(key, self.entry) if self.entry else key
        return key if use is None else fold_in(key, use)

    def own(self, whole: Params) -> Params:
        """The child's part of its parent's params or state."""
        if self.entry:
            return whole.get(self.entry, EMPTY)
        return {name: whole[name] for name in self.child if name in whole} if self.child else whole

    def is_in(self, whole: Params) -> bool:
        """Whether the child has a part of its parent's params."""
        return self.entry in whole if self.entry else bool(self.own(whole))

    def put(self, whole: dict[str, Any], own: Params) -> None:
        """Put the child's part into its parent's params or state, which are sparse."""
        if own:
            whole.update({self.entry: own} if self.entry else own)


class Run:
    """Runs the children of a combinator: ``run(child, x)`` is the output of a child.

    It applies each child or, with a dict for the pullbacks, calls its vjp.
    """

    def __init__(
        self,
        slots: Mapping[Any, Slot],
        children: Mapping[Any, Layer],
        params: Any,
        state: Params,
        key: Any,
        train: bool,
        pullbacks: dict[str, Pullback] | None,
    ) -> None:
        self.names: Any = tuple(slots)
        self.slots, self.children = slots, children
        self.params, self.state, self.key, self.train = params, state, key, train
        self.pullbacks = pullbacks
        self.new_state: dict[str, Any] = {}
        self.ran: set[Name] = set()  # the children that may run again

    def __call__(self, child: Name, x: Tree, use: int | None = None) -> Tree:
        """The output of a child; ``use`` tells several uses of one child apart."""
        slot = _slot_of(child, self.slots)
        try:
            return self._output(slot, self.children[child], x, use)
        except Exception as error:
            locate(error, slot.path(use))
            raise

    def _output(self, slot: Slot, layer: Layer, x: Tree, use: int | None) -> Tree:
        params, key = slot.own(self.params), self.key
        # A later use goes on from the state that the one before it left.
        later = use is not None and slot.child in self.ran
        state = slot.own(self.new_state if later else self.state)
        if key is not None:
            key = slot.key(key, use) if layer.takes_key else None
        if self.pullbacks is None:
            y, state = layer.apply(params, x, state, key=key, train=self.train)
        else:
            call = slot.call(use)
            if call in self.pullbacks:
                raise ValueError("runs twice: tell the uses apart by use=0, use=1, ...")
            y, self.pullbacks[call], state = layer.vjp(params, x, state, key=key, train=self.train)
        slot.put(self.new_state, state)
        if use is not None:
            self.ran.add(slot.child)
        return y


class _Init(Run):
    """Makes the params and state of each child, and finds its output on the meta device."""

    device: torch.device

    def _output(self, slot: Slot, layer: Layer, x: Tree, use: int | None) -> Tree:
        if slot.child not in self.ran:
            self.ran.add(slot.child)
            params, state = layer.init(slot.key(self.key), tree.placeholder(x, self.device))
            slot.put(self.params, params)
            slot.put(self.new_state, state)
        params, state = tree.to_meta((slot.own(self.params), slot.own(self.new_state)))
        noise = torch.empty(2, dtype=torch.int64, device="meta") if layer.takes_key else None
        return layer.apply(params, x, state, key=noise)[0]


def _slot_of(child: Name, slots: Mapping[Any, Slot]) -> Slot:
    if child not in slots:
        raise ValueError(f"no child is called {child!r}, only {list(slots)}")
    return slots[child]


class Pull:
    """Pulls cotangents back through the children: ``pull(child, dy)`` is the child's dx.

    In a training step nothing else holds the children's residuals, so they are freed as the
    backward pass consumes them.
    """

    def __init__(self, slots: Any, pullbacks: Any, learned: frozenset[Name], x: bool) -> None:
        self.slots = {slot.child: slot for slot in slots}
        self.names: Any = tuple(self.slots)
        self.pullbacks, self.learned, self.x = pullbacks, learned, x
        self.dparams: dict[str, Any] = {}

    def __call__(self, child: Name, dy: Tree, use: int | None = None, needed: bool = True) -> Tree:
        """The child's dx, None where it is not ``needed``; its dparams are kept."""
        slot, learns = _slot_of(child, self.slots), child in self.learned
        try:
            dparams, dx = core.pull(self.pullbacks, slot.call(use), dy, params=learns, x=needed)
        except Exception as error:
            locate(error, slot.path(use))
            raise
        if learns:
            before = slot.own(self.dparams)  # those of another use
            dparams = sum_cotangents(before, dparams) if before else dparams
            self.dparams.update({slot.entry: dparams} if slot.entry else dparams)
        return dx


def _check_names(parent: str, params: Params, state: Params, children: Mapping[Any, Layer]) -> None:
    for what, found in (("params", params), ("state", state)):
        if isinstance(found, dict) and found.keys() <= children.keys():
            continue
        if not isinstance(found, Mapping):
            raise TypeError(f"{parent}: expects a dict of {what}, got {tree.describe(found)}")
        groups = [(child,) if isinstance(child, str) else child for child in children]
        names = {name for group in groups for name in group}
        if "" not in names and (extra := sorted(found.keys() - names)):
            raise ValueError(f"{parent}: {what} has {extra}, but the layers are {list(children)}")
