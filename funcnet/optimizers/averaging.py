"""Averages of the params over a run, which are often better than the last ones: EMA and SWA.

The average is in the optimizer's state, so that it is saved, donated and mapped over with it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import Optimizer, Params, Tree
from funcnet.errors import check_count, require
from funcnet.optimizers.chains import find_states
from funcnet.optimizers.checks import Number, check_options, read_option
from funcnet.optimizers.leaves import at_least_float32, leafwise
from funcnet.optimizers.lift import around, zero_step


class AveragedParamsState(NamedTuple):
    """The number of updates so far, an average like params, and the wrapped optimizer's state.

    The average of params of half precision is in float32, in which small changes do not get lost.
    """

    step: Tensor
    average: Tree
    inner: Tree

    def eval_params(self, params: Params) -> Params:
        """The average, in the dtypes of the params."""
        tree.check_same_structure(params, self.average, "eval_params: the average")
        return tree.map(lambda mean, p: mean.to(p.dtype), self.average, params)


def eval_params(opt_state: Tree, params: Params) -> Params:
    """The params to evaluate with: the average that the optimizer keeps, else the params.

    It looks through ``opt_state`` for the state of `params_ema`, `params_average` or a
    schedule-free optimizer: for a NamedTuple with a method ``eval_params(params) -> params``.

    Args:
        opt_state: the state of any optimizer.
        params: those of the same train state.

    Returns:
        a tree like params.
    Raises:
        ValueError: two such states are in ``opt_state``.

    >>> optimizer = params_ema(fn.sgd(1.0), decay=0.5)
    >>> params, grads = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    >>> opt_state = optimizer.init_state(params)
    >>> for _ in range(2):
    ...     updates, opt_state = optimizer.update(grads, opt_state, params)
    ...     params = fn.apply_updates(params, updates)
    >>> params, eval_params(opt_state, params)
    ({'w': tensor([-2.])}, {'w': tensor([-1.5000])})
    """
    found = find_states(opt_state, lambda state: hasattr(state, "eval_params"))
    require(len(found) < 2, "eval_params: two optimizers of one chain keep params for evaluation")
    return found[0].eval_params(params) if found else params


def params_ema(optimizer: Optimizer, decay: Number = 0.999, *, debias: bool = False) -> Optimizer:
    """An optimizer that keeps an exponential moving average of the params that it gives.

    After the update number t, with the params ``p_t``, the average is ``a_1 = p_1`` and
    ``a_t = decay a_{t-1} + (1 - decay) p_t``. With ``debias`` it is the mean of the params so far
    with weights that fall by ``decay`` an update,

        ``a_t = a_{t-1} + (1 - decay) / (1 - decay^t) (p_t - a_{t-1})``,

    in which the first params do not count for more than the others; early on it is a plain mean.

    Args:
        optimizer: a whole optimizer: what it gives is added to the params.
        decay: in [0, 1], with ``debias`` in [0, 1); a number or a 0-d tensor.
        debias: whether the average is the weighted mean.

    State:
        `AveragedParamsState`. `eval_params` gives the average; a model's own state, such as running
        statistics, is not averaged, as in PyTorch with ``use_buffers=False``.

    Source: ``torch.optim.swa_utils.AveragedModel`` with ``get_ema_multi_avg_fn(decay)``.

    >>> optimizer = params_ema(fn.sgd(1.0), decay=0.5)
    >>> params = {"w": torch.zeros(1)}
    >>> _, state = optimizer.update({"w": torch.ones(1)}, optimizer.init_state(params), params)
    >>> state
    AveragedParamsState(step=tensor(1), average={'w': tensor([-1.])}, inner={})
    """
    check_options("params_ema", below=1.0 if debias else math.inf, decay=decay)
    value = read_option(decay)
    require(value is None or value <= 1, f"params_ema: decay must be at most 1, got {value}")
    rate = 1.0 - decay

    def weight(step: Tensor) -> Tensor:
        if debias:
            return rate / (1.0 - decay ** step.double())
        return torch.where(step == 1, 1.0, rate * torch.ones_like(step, dtype=torch.float64))

    return _averaged("params_ema", optimizer, weight)


def params_average(optimizer: Optimizer, start: int = 0, every: int = 1) -> Optimizer:
    """An optimizer that keeps the mean of the params it gives: stochastic weight averaging.

    It is the mean of the params after the updates number ``start + every``, ``start + 2 every``,
    ..., with equal weights. Up to the first of these updates it is the params themselves.

    Args:
        optimizer: a whole optimizer: what it gives is added to the params.
        start: an integer >= 0, such as three quarters of the run.
        every: an integer >= 1, such as the steps of an epoch.

    State:
        `AveragedParamsState`. After the run, `eval_params` gives the mean; the running statistics
        of a model with batch norm must then be computed again, by a pass over the data.

    Source: Izmailov et al. 2018; ``torch.optim.swa_utils.AveragedModel``.

    >>> optimizer = params_average(fn.sgd(1.0))
    >>> params, grads = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    >>> opt_state = optimizer.init_state(params)
    >>> for _ in range(4):
    ...     updates, opt_state = optimizer.update(grads, opt_state, params)
    ...     params = fn.apply_updates(params, updates)
    >>> params, eval_params(opt_state, params)
    ({'w': tensor([-4.])}, {'w': tensor([-2.5000])})
    """
    check_count("params_average", least=0, start=start)
    check_count("params_average", every=every)

    def weight(step: Tensor) -> Tensor:
        past = step - start
        count = torch.div(past, every, rounding_mode="floor")
        due = torch.where(past == count * every, 1.0 / count.clamp(min=1).double(), 0.0)
        return torch.where(count < 1, 1.0, due)

    return _averaged("params_average", optimizer, weight)


def _averaged(name: str, optimizer: Optimizer, weight: Callable[[Tensor], Tensor]) -> Optimizer:
    """The optimizer and, in its state, ``a = a + weight(t) (p - a)`` over the params p it gives."""

    def init(p: Any, inner: Tree) -> AveragedParamsState:
        return AveragedParamsState(zero_step(p), at_least_float32(p).clone(), inner)

    def update(g: Any, state: AveragedParamsState, p: Any, inner_update: Any) -> Any:
        updates, inner = inner_update(g, state.inner)
        step = state.step + 1
        # Leaf by leaf, so that the new params are in memory one at a time.
        average: Any = leafwise(_toward, state.average, p, updates, weight(step))
        return updates, AveragedParamsState(step, average, inner)

    told: Any = {"gives_state": True, "elementwise": True}
    return around(optimizer, init, update, name=name, **told)


def _toward(average: Tensor, p: Tensor, update: Tensor, weight: Tensor) -> Tensor:
    return torch.lerp(average, (p + update).to(average.dtype), weight)
