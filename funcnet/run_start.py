"""The state of a training run before its first step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.checks import check_key, check_kind
from funcnet.core import Layer, Optimizer, Params, TrainState, Tree
from funcnet.data import on_device
from funcnet.errors import require
from funcnet.optimizers.loss_scale import check_outermost


def init_train_state(
    model: Layer,
    optimizer: Optimizer,
    key: Tensor,
    x: Tree = None,
    *,
    params: Params | None = None,
    state: Params | None = None,
) -> TrainState:
    """The state of a run before its first step.

    Args:
        model: makes params and state, by ``init(key, x)``.
        optimizer: makes its state from the params.
        key: of the run; step t draws from ``fold_in(key, t)``.
        x: an example input, of which only shape, dtype and device matter; arrays of numpy too.
            It is not needed where ``params`` are given, which then are not checked against it.
        params, state: to start from, such as those of a module of torch's that
            `funcnet.interop.from_module` gives, in place of what init makes.

    Raises: ValueError, by its path, for a tensor of ``params`` or ``state`` that is missing, or has
    another shape or dtype than those that init makes for x.

    >>> import funcnet as fn
    >>> start = init_train_state(fn.linear(2), fn.sgd(0.1), fn.key(0), torch.ones(5, 3))
    >>> start.step, start.params["weight"].shape
    (tensor(0), torch.Size([2, 3]))
    >>> again = init_train_state(
    ...     fn.linear(2), fn.adam(), fn.key(1), torch.ones(5, 3), params=start.params)
    >>> torch.equal(again.params["weight"], start.params["weight"])
    True
    """
    check_kind("init_train_state", model, Layer, "model")
    check_kind("init_train_state", optimizer, Optimizer, "optimizer")
    check_key("init_train_state", key)
    example = None if x is None else on_device(None)(x)
    if params is not None:
        params = _given("params", params)
    if state is not None:
        state = _given("state", state)
    if example is None:
        require(
            params is not None,
            "init_train_state: needs an example input x, or params: init_train_state(model, "
            "optimizer, key, x)",
            TypeError,
        )
    elif params is None or state is None:
        made, made_state = model.init(key, example)
        params = _like("params", made, params)
        state = _like("state", made_state, state)
    else:
        made, made_state = model.init(key, tree.to_meta(example))
        params, state = _like("params", made, params), _like("state", made_state, state)
    assert params is not None
    opt_state = optimizer.init_state(params)
    check_outermost(optimizer, opt_state)
    step = torch.zeros((), dtype=torch.int64, device=key.device)
    return TrainState(params, {**(state or {})}, opt_state, key, step)


def _given(what: str, found: Any) -> Params:
    """Params or state of the user's, without the tape of autograd, if they are dicts of tensors."""
    name = f"init_train_state: {what}"
    if not isinstance(found, Mapping):
        raise TypeError(f"{name}: expects a dict of tensors, got {tree.describe(found)}")
    for path, leaf in tree.to_dotted(found).items():
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name}: expects a tensor at {path!r}, got {tree.describe(leaf)}")
    return tree.map(lambda leaf: leaf.detach() if leaf.requires_grad else leaf, found)


def _like(what: str, made: Params, given: Params | None) -> Params:
    """What is given, if it is like what init makes; else that."""
    if given is None:
        return made
    name = f"init_train_state: {what}"
    try:
        tree.check_same_structure(made, given, name)
    except ValueError as error:
        if any("." in entry for entry in given):
            raise ValueError(f"{error}; fn.tree.from_dotted makes a tree of dotted names") from None
        raise
    found = tree.to_dotted(given)
    for path, leaf in tree.to_dotted(made).items():
        if (leaf.shape, leaf.dtype) != (found[path].shape, found[path].dtype):
            expected, got = tree.describe(leaf), tree.describe(found[path])
            raise ValueError(f"{name}: expects {expected} at {path!r}, got {got}")
    return given
