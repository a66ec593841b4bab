"""`combine`: the one function of which every combinator is made.

A combinator is a data flow through its children, ``forward``, and the way of the cotangents back
through them, ``backward``. All else is here: each child's own params, state and key, the pullbacks,
the gradients, and the paths of errors.

Parameters, state and pullbacks of the children are dicts by child name, sparse: a child without
them has no entry. A child's key is folded from the combinator's by the child's name, so adding a
layer changes no other layer's noise.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from funcnet import core, tree
from funcnet.core import EMPTY, Layer, Params, Pullback, Tree, locate, sum_cotangents
from funcnet.lift import lift
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
    _check_children(name, children)
    takes_key = any([layer.takes_key for layer in children.values()])

    def init(key: Tensor, x: Tree) -> tuple[Params, Params]:
        run = _Init(name, children, key, x)
        forward(run, tree.to_meta(x), *static)
        return run.params, run.state

    def apply(
        params: Params, x: Tree, state: Params, key: Tensor | None, train: bool
    ) -> tuple[Tree, Params]:
        run = _Call(name, children, params, state, key, train, differentiated=False)
        y, _ = forward(run, x, *static)
        return y, run.new_state

    def vjp(
        params: Params, x: Tree, state: Params, key: Tensor | None, train: bool
    ) -> tuple[Tree, Pullback, Params]:
        run = _Call(name, children, params, state, key, train, differentiated=True)
        y, residuals = forward(run, x, *static)
        kept = {**run.pullbacks, _OWN: dict(residuals)} if residuals else run.pullbacks
        known = (name, backward, tuple(children), run.learned(), static)
        return y, Pullback(combine_rule, kept, known), run.new_state

    return lift(
        name,
        init,
        apply,
        vjp,
        children=children,
        rebuild=lambda children: combine(name, children, forward, backward, *static),
        takes_key=takes_key,
    )


def combine_rule(
    residuals: dict[str, Any],
    dy: Tree,
    name: str,
    backward: Callable[..., Tree],
    names: tuple[Name, ...],
    learned: frozenset[Name],
    static: tuple[Hashable, ...],
    *,
    params: bool,
    x: bool,
) -> tuple[Params | None, Tree]:
    """The combinator's ``backward``, with the children's pullbacks among the residuals."""
    own = residuals.pop(_OWN, EMPTY)
    pull = Pull(name, names, residuals, learned if params else frozenset(), x)
    dx = backward(pull, dy, own, *static)
    pull.check_all_pulled()
    return pull.dparams if params else None, dx if x else None


def _check_children(parent: str, children: Mapping[Any, Layer]) -> None:
    for name, layer in children.items():
        if not isinstance(layer, Layer):
            hint = "; call its constructor" if callable(layer) else ""
            raise TypeError(
                f"{parent}{_brackets(name)}: expects a Layer, got {type(layer).__name__}{hint}"
            )
        if isinstance(name, str) and ("." in name or (not name and len(children) > 1)):
            raise ValueError(f"{parent}: a name must not be empty or have a dot, got {name!r}")


def _brackets(child: Name, use: int | None = None) -> str:
    """What the path of an error has for a child: ``['head']``, ``[0]`` for a use, or nothing."""
    inside = f"[{child!r}]" if child and isinstance(child, str) else ""
    return inside if use is None else f"{inside}[{use}]"


def _own(whole: Params, child: Name) -> Params:
    """The child's part of a combinator's params or state."""
    if child == "":
        return whole
    if isinstance(child, str):
        return whole.get(child, EMPTY)
    return {name: whole[name] for name in child if name in whole}


def _has(whole: Params, child: Name) -> bool:
    """Whether a child has an entry in a combinator's params."""
    return child in whole if child and isinstance(child, str) else bool(_own(whole, child))


def _put(whole: dict[str, Any], child: Name, own: Params) -> None:
    """Put a child's part into a combinator's params or state, which are sparse."""
    if child == "" or not isinstance(child, str):
        whole.update(own)
    elif own:
        whole[child] = own


class Run:
    """Runs the children of a combinator: ``run(child, x)`` is the output of a child."""

    def __init__(self, parent: str, children: Mapping[Any, Layer], key: Tensor | None) -> None:
        self.parent = parent
        self.children = children
        self.key = key

    @property
    def names(self) -> tuple[Any, ...]:
        """The names of the children."""
        return tuple(self.children)

    def __call__(self, child: Name, x: Tree, use: int | None = None) -> Tree:
        """The output of a child; ``use`` tells several uses of one child apart."""
        try:
            return self.run(self.children[child], child, x, use)
        except Exception as error:
            locate(error, self.parent + _brackets(child, use))
            raise

    def run(self, layer: Layer, child: Name, x: Tree, use: int | None) -> Tree:
        raise NotImplementedError

    def key_of(self, layer: Layer, child: Name, use: int | None) -> Tensor | None:
        """The child's key."""
        key = self.key
        if key is None or not layer.takes_key:
            return None
        if child and isinstance(child, str):
            key = fold_in(key, child)
        return key if use is None else fold_in(key, use)


class _Init(Run):
    """Makes the params and state of each child, and finds its output on the meta device."""

    def __init__(self, parent: str, children: Mapping[Any, Layer], key: Tensor, x: Tree) -> None:
        super().__init__(parent, children, key)
        self.init_key = key
        try:
            self.device = tree.device_of(x) if children else torch.device("meta")
        except ValueError as error:
            locate(error, f"{parent}:")
            raise
        self.params: dict[str, Any] = {}
        self.state: dict[str, Any] = {}
        self.made: dict[Name, tuple[Params, Params]] = {}

    def run(self, layer: Layer, child: Name, x: Tree, use: int | None) -> Tree:
        if child not in self.made:
            key = self.init_key
            if child and isinstance(child, str):
                key = fold_in(key, child)
            params, state = layer.init(key, tree.placeholder(x, self.device))
            _put(self.params, child, params)
            _put(self.state, child, state)
            self.made[child] = tree.to_meta((params, state))
        params, state = self.made[child]
        noise = torch.empty(2, dtype=torch.int64, device="meta") if layer.takes_key else None
        return layer.apply(params, x, state, key=noise)[0]


class _Call(Run):
    """Applies each child; with ``differentiated``, by its vjp, whose pullback is kept."""

    def __init__(
        self,
        parent: str,
        children: Mapping[Any, Layer],
        params: Params,
        state: Params,
        key: Tensor | None,
        train: bool,
        differentiated: bool,
    ) -> None:
        super().__init__(parent, children, key)
        _check_names(parent, "params", params, children)
        _check_names(parent, "state", state, children)
        self.params = params
        self.state = state
        self.train = train
        self.differentiated = differentiated
        self.new_state: dict[str, Any] = {}
        self.pullbacks: dict[str, Pullback] = {}
        self.ran: set[Name] = set()

    def run(self, layer: Layer, child: Name, x: Tree, use: int | None) -> Tree:
        params = _own(self.params, child)
        # A later use goes on from the state that the one before it left.
        state = _own(self.new_state if child in self.ran else self.state, child)
        self.ran.add(child)
        key = self.key_of(layer, child, use)
        if self.differentiated:
            call = _call_name(child, use)
            if call in self.pullbacks:
                raise ValueError("runs twice: tell the uses of a child apart by use=0, use=1, ...")
            y, self.pullbacks[call], state = layer.vjp(params, x, state, key=key, train=self.train)
        else:
            y, state = layer.apply(params, x, state, key=key, train=self.train)
        _put(self.new_state, child, state)
        return y

    def learned(self) -> frozenset[Name]:
        """The children that have params."""
        return frozenset([child for child in self.children if _has(self.params, child)])


def _call_name(child: Name, use: int | None) -> str:
    """The name of a child's pullback among the residuals."""
    name = child if isinstance(child, str) else "+".join(child)
    return name if use is None else f"{name}.{use}"


class Pull:
    """Pulls cotangents back through the children: ``pull(child, dy)`` is the child's dx.

    Nothing else holds the children's residuals in a training step, so they are freed as the
    backward pass consumes them.
    """

    def __init__(
        self,
        parent: str,
        names: tuple[Name, ...],
        pullbacks: dict[str, Any],
        learned: frozenset[Name],
        x: bool,
    ) -> None:
        self.parent = parent
        self.names: Any = names
        self.pullbacks = pullbacks
        self.x = x
        self.learned = learned
        self.dparams: dict[str, Any] = {}
        for name in names:
            if isinstance(name, str) and name and name in learned:
                self.dparams[name] = {}

    def __call__(self, child: Name, dy: Tree, use: int | None = None, needed: bool = True) -> Tree:
        """The child's dx, None where it is not ``needed``; its dparams are kept."""
        learns = child in self.learned
        try:
            dparams, dx = core.pull(
                self.pullbacks, _call_name(child, use), dy, params=learns, x=needed
            )
        except Exception as error:
            locate(error, self.parent + _brackets(child, use))
            raise
        if learns:
            if use is not None and (before := _own(self.dparams, child)):
                dparams = sum_cotangents(before, dparams)
            _put(self.dparams, child, dparams)
        return dx

    def check_all_pulled(self) -> None:
        """Raise ValueError if a child with params has not got its cotangent."""
        calls = {_call_name(child, None) for child in self.learned}
        if left := [call for call in self.pullbacks if call.partition(".")[0] in calls]:
            raise ValueError(f"{self.parent}: backward pulls no cotangent through {left}")


def _check_names(parent: str, what: str, found: Params, children: Mapping[Any, Layer]) -> None:
    if type(found) is not dict and not isinstance(found, Mapping):
        raise TypeError(f"{parent}: expects a dict of {what}, got {tree.describe(found)}")
    if found and not found.keys() <= children.keys():
        groups = [(child,) if isinstance(child, str) else child for child in children]
        names = {name for group in groups for name in group}
        if "" not in names and not found.keys() <= names:
            extra = sorted(found.keys() - names)
            raise ValueError(f"{parent}: {what} has {extra}, but the layers are {list(children)}")
