"""Layers of tensors that a module's forward reads itself, or leaves alone."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from funcnet import tree
from funcnet.combinators.combine import Pull, Run, combine
from funcnet.core import Applied, Forward, Grads, Key, Layer, Params, Pullback, Tree
from funcnet.lift import stateful


def _started(leaves: Tree, x: Tree) -> Tree:
    """Copies on the device of x, as first values."""
    device = tree.device_of(x)
    return tree.map(lambda leaf: leaf.detach().to(device, copy=True), leaves)


def leaves_rule(residuals: Any, dy: Any, names: tuple[str, ...], *, params: bool, x: bool) -> Grads:
    """The cotangents of the parameters; x was not read."""
    return {name: dy[name] for name in names} if params else None, None


def leaves(params: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Layer:
    """A layer whose y is a dict of its params and its state, which start as they are given.

    Inputs:
        x, whose device alone is read.
    """

    def init(key: Tensor, x: Tree) -> tuple[Params, Params]:
        return _started(dict(params), x), _started(dict(state), x)

    def apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Applied:
        return {**params, **state}, state

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        pullback = Pullback(leaves_rule, {}, (tuple(params),))
        return {**params, **state}, pullback, state

    return stateful(init, forward, apply=apply, name="leaves")


def constants_rule(residuals: Any, dy: Any, *, params: bool, x: bool) -> Grads:
    """Nothing is learned, and x was not read."""
    return {} if params else None, None


def constants(tensors: tuple[Tensor, ...]) -> Layer:
    """A layer whose y is a tuple of tensors that never change, on the device of x."""

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        device = tree.device_of(x)
        return tuple([each.to(device) for each in tensors]), Pullback(constants_rule, {}), state

    return stateful(lambda key, x: ({}, {}), forward, name="constants")


def kept_rule(residuals: Any, dy: Any, *, params: bool, x: bool) -> Grads:
    """Zeros: nothing was computed with the params."""
    return tree.map(torch.zeros_like, residuals["params"]) if params else None, None


def kept_forward(run: Run, x: Tree) -> tuple[Tree, Mapping[str, Tree]]:
    """All children keep what they have; y is ()."""
    for child in run.names:
        run(child, x)
    return (), {}


def kept_backward(pull: Pull, dy: Tree, residuals: Mapping[str, Tree]) -> Tree:
    """Zeros for all params; x was not read."""
    for child in pull.names:
        pull(child, (), needed=False)


def kept_module(module: nn.Module, own: Callable[[nn.Module], tuple[Params, Params]]) -> Layer:
    """A layer with the params and state of a module, and of all below it, that computes nothing.

    Args:
        module: any module.
        own: the params and state of a module itself, by name.
    """
    children: dict[Any, Layer] = {}
    params, state = own(module)
    if params or state:
        children[(*params, *state)] = kept(params, state)
    for name, child in module._modules.items():
        if child is not None:
            children[name] = kept_module(child, own)
    return combine("kept", children, kept_forward, kept_backward)


def kept(params: Params, state: Params) -> Layer:
    """A layer that has params and state, and computes nothing: y is ()."""

    def init(key: Tensor, x: Tree) -> tuple[Params, Params]:
        return _started(params, x), _started(state, x)

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        return (), Pullback(kept_rule, {"params": params}), state

    return stateful(init, forward, name="kept")
