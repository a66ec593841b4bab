"""When to stop, and the best so far: pure functions of a value, such as a validation loss."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import Tree
from funcnet.errors import check_count, require
from funcnet.optimizers.checks import check_options


class EarlyStoppingState(NamedTuple):
    """The best value, how many values came since then, and whether to stop; 0-d tensors."""

    best: Tensor
    wait: Tensor
    stop: Tensor


class EarlyStopping(NamedTuple):
    """Two pure functions, ``(init, update)``; see `early_stopping`.

    ``init(device=None) -> state`` and ``update(state, value) -> state``.
    """

    init: Callable[..., EarlyStoppingState]
    update: Callable[[EarlyStoppingState, Tensor], EarlyStoppingState]


def early_stopping(patience: int = 3, min_delta: float = 0.0, mode: str = "min") -> EarlyStopping:
    """Says to stop when a value, such as a validation loss, has not become better for a while.

    A value is better if it is below ``best - min_delta``, with ``mode="max"`` above
    ``best + min_delta``; NaN never is. ``state.stop`` becomes true when ``patience`` values in a
    row were not better, and stays so. Nothing waits for a device: it works under `jit`,
    `vmap` and `scan`, and `funcnet.fit` takes it.

    Args:
        patience: an integer >= 1.
        min_delta: a number >= 0.
        mode: "min" or "max".

    State:
        ``EarlyStoppingState``.

    Source: ``keras.callbacks.EarlyStopping``, Lightning's ``EarlyStopping``; Prechelt 1998.

    >>> stopping = early_stopping(patience=2)
    >>> state = stopping.init()
    >>> for value in (0.9, 0.5, 0.6, 0.5):
    ...     state = stopping.update(state, torch.tensor(value))
    >>> state.best, state.wait, state.stop
    (tensor(0.5000, dtype=torch.float64), tensor(2), tensor(True))
    """
    check_count("early_stopping", patience=patience)
    check_options("early_stopping", min_delta=min_delta)
    worst = _worst("early_stopping", mode)

    def init(device: torch.device | str | None = None) -> EarlyStoppingState:
        best = torch.full((), worst, dtype=torch.float64, device=device)
        zero = torch.zeros((), dtype=torch.int64, device=device)
        return EarlyStoppingState(best, zero, torch.zeros_like(zero, dtype=torch.bool))

    def update(state: EarlyStoppingState, value: Tensor) -> EarlyStoppingState:
        value = torch.as_tensor(value).to(state.best.device, torch.float64)
        better = _better(mode, value, state.best, min_delta)
        best, wait = torch.where(better, value, state.best), state.wait + 1
        wait = torch.where(better, 0, wait)
        return EarlyStoppingState(best, wait, state.stop | (wait >= patience))

    return EarlyStopping(init, update)


class Best(NamedTuple):
    """The best value so far, 0-d float64, and the tree that had it."""

    value: Tensor
    tree: Tree


class BestSoFar(NamedTuple):
    """Two pure functions, ``(init, update)``; see `best_so_far`.

    ``init(tree) -> best`` and ``update(best, value, tree) -> best``.
    """

    init: Callable[[Tree], Best]
    update: Callable[[Best, Tensor, Tree], Best]


def best_so_far(mode: str = "min") -> BestSoFar:
    """Keeps the tree, such as the params, with the best value so far.

    Nothing waits for a device: it works under `jit`, `vmap` and `scan`.

    Args:
        mode: "min" or "max"; NaN is never better.

    State:
        ``Best``, whose tree is the first one until a value comes.

    >>> keeping = best_so_far()
    >>> best = keeping.init({"w": torch.zeros(1)})
    >>> for value in (3.0, 1.0, 2.0):
    ...     best = keeping.update(best, torch.tensor(value), {"w": torch.full((1,), value)})
    >>> best
    Best(value=tensor(1., dtype=torch.float64), tree={'w': tensor([1.])})
    """
    worst = _worst("best_so_far", mode)

    def init(first: Tree) -> Best:
        device = tree.device_of(first)
        return Best(torch.full((), worst, dtype=torch.float64, device=device), first)

    def update(best: Best, value: Tensor, new: Tree) -> Best:
        value = torch.as_tensor(value).to(best.value.device, torch.float64)
        better = _better(mode, value, best.value, 0.0)
        kept = tree.map(lambda a, b: torch.where(better, a, b), new, best.tree)
        return Best(torch.where(better, value, best.value), kept)

    return BestSoFar(init, update)


def _worst(name: str, mode: str) -> float:
    require(mode in ("min", "max"), f"{name}: mode must be 'min' or 'max', got {mode!r}")
    return float("inf") if mode == "min" else -float("inf")


def _better(mode: str, value: Tensor, best: Tensor, min_delta: float) -> Tensor:
    return value < best - min_delta if mode == "min" else value > best + min_delta
