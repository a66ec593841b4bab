"""Optimizers around another one that decide when it updates: `accumulate`, `apply_if_finite`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet.core import Optimizer, Tree
from funcnet.errors import check_count
from funcnet.optimizers.choose import choose
from funcnet.optimizers.clipping import global_norm
from funcnet.optimizers.leaves import at_least_float32, sum_into
from funcnet.optimizers.lift import around, zero_step


class AccumulateState(NamedTuple):
    """The micro-batches since the last update, counted; the sum of their gradients; inner state."""

    step: Tensor
    total: Tree
    inner: Tree


def accumulate(optimizer: Optimizer, k: int) -> Optimizer:
    """Updates once in k times, by the mean of k gradients; in between by 0.

    Args:
        optimizer: sees the means alone: its state is that of one update for k.
        k: the micro-batches of an update, at least 1.

    Half precision is summed in float32. Where the number of micro-batches cannot be read for
    free, as on a GPU and under jit, the update is computed each time and used once in k;
    ``train_step(..., micro_batches=k)`` computes it once.

    Source: ``optax.MultiSteps``.

    >>> mean_of_two = accumulate(fn.sgd(0.5), 2)
    >>> params = {"w": torch.ones(1)}
    >>> state = mean_of_two.init_state(params)
    >>> first, state = mean_of_two.update({"w": torch.ones(1)}, state, params)
    >>> second, state = mean_of_two.update({"w": torch.tensor([3.0])}, state, params)
    >>> first, second
    ({'w': tensor([0.])}, {'w': tensor([-1.])})
    """
    check_count("accumulate", k=k)

    def init(p: Any, inner: Tree) -> AccumulateState:
        return AccumulateState(zero_step(p), torch.zeros_like(at_least_float32(p)), inner)

    def update(g: Any, state: AccumulateState, p: Any, inner_update: Any) -> Any:
        step, total = state.step + 1, sum_into(state.total, g)

        def updated() -> tuple[Any, AccumulateState]:
            updates, inner = inner_update((total / k).to_dtypes(p), state.inner)
            zeros = torch.zeros_like(total)
            return updates, AccumulateState(torch.zeros_like(step), zeros, inner)

        def waiting() -> tuple[Any, AccumulateState]:
            return torch.zeros_like(p), AccumulateState(step, total, state.inner)

        return choose(step == k, updated, waiting)

    return around(optimizer, init, update, elementwise=True)


class ApplyIfFiniteState(NamedTuple):
    """How many gradients in a row were not finite, whether the last was, how many in all; inner."""

    notfinite_count: Tensor
    last_finite: Tensor
    total_notfinite: Tensor
    inner: Tree


def apply_if_finite(optimizer: Optimizer, max_consecutive_errors: int) -> Optimizer:
    """Skips an update whose gradients have a NaN or an infinity.

    It gives updates of 0 then, and leaves the optimizer's state as it was. After
    ``max_consecutive_errors`` in a row it gives up, and lets them through.

    Args:
        optimizer: the one whose updates are skipped.
        max_consecutive_errors: an integer >= 0.

    Source: ``optax.apply_if_finite``.

    >>> careful = apply_if_finite(fn.sgd(0.1), 5)
    >>> params = {"w": torch.ones(1)}
    >>> state = careful.init_state(params)
    >>> updates, state = careful.update({"w": torch.tensor([torch.nan])}, state, params)
    >>> updates, state.notfinite_count, state.last_finite
    ({'w': tensor([0.])}, tensor(1), tensor(False))
    """
    check_count("apply_if_finite", least=0, max_consecutive_errors=max_consecutive_errors)

    def init(p: Any, inner: Tree) -> ApplyIfFiniteState:
        finite = torch.ones_like(zero_step(p), dtype=torch.bool)
        return ApplyIfFiniteState(zero_step(p), finite, zero_step(p), inner)

    def update(g: Any, state: ApplyIfFiniteState, p: Any, inner_update: Any) -> Any:
        finite = on_all_ranks(global_norm(g, torch.inf, p).isfinite(), optimizer)
        finite = finite.to(state.last_finite.device)
        count = torch.where(finite, 0, state.notfinite_count + 1)
        updates, inner = choose(
            finite | (count > max_consecutive_errors),
            lambda: inner_update(g, state.inner),
            lambda: (torch.zeros_like(p), state.inner),
        )
        total = state.total_notfinite + ~finite
        return updates, ApplyIfFiniteState(count, finite, total, inner)

    return around(optimizer, init, update, needs_all_leaves=True, elementwise=True)


def on_all_ranks(holds: Tensor, optimizer: Optimizer) -> Tensor:
    """Whether it holds on all ranks over which an optimizer reduces the gradients it is given.

    So all ranks call it, or none.
    """
    for _, axis in optimizer.reduces:
        holds = axis.max((~holds).to(torch.int32)) == 0
    return holds
