"""Averages of the params over a run, which are often better than the last ones: EMA and SWA.

The average is in the optimizer's state, so that it is saved, donated and mapped over with it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet import runtime, tree
from funcnet.core import Optimizer, Params, Tree
from funcnet.errors import require
from funcnet.optimizers.checks import check_options
from funcnet.optimizers.leaves import Applied, Leaves, leafwise
from funcnet.optimizers.lift import Trees, leaves_update, lifted, zero_step

_ONE = torch.ones((), dtype=torch.int64, device="cpu")


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

    Returns: a tree like params.
    Raises: ValueError if two such states are in ``opt_state``.

    >>> optimizer = params_ema(fn.sgd(1.0), decay=0.5)
    >>> params, grads = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    >>> opt_state = optimizer.init_state(params)
    >>> for _ in range(2):
    ...     updates, opt_state = optimizer.update(grads, opt_state, params)
    ...     params = fn.apply_updates(params, updates)
    >>> params, eval_params(opt_state, params)
    ({'w': tensor([-2.])}, {'w': tensor([-1.5000])})
    """
    found = list(_averaging(opt_state))
    require(len(found) < 2, "eval_params: two optimizers of one chain keep params for evaluation")
    return found[0].eval_params(params) if found else params


def _averaging(opt_state: Tree) -> Iterator[Any]:
    """The states in a tree that keep other params for evaluation."""
    if hasattr(opt_state, "eval_params"):
        yield opt_state
    elif isinstance(opt_state, (Mapping, tuple, list)):
        children = opt_state.values() if isinstance(opt_state, Mapping) else opt_state
        for child in children:
            yield from _averaging(child)


def params_ema(
    optimizer: Optimizer, decay: float | Tensor = 0.999, *, debias: bool = False
) -> Optimizer:
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

    State: `AveragedParamsState`. `eval_params` gives the average; a model's own state, such as
    running statistics, is not averaged, as in PyTorch with ``use_buffers=False``.
    Source: ``torch.optim.swa_utils.AveragedModel`` with ``get_ema_multi_avg_fn(decay)``.

    >>> optimizer = params_ema(fn.sgd(1.0), decay=0.5)
    >>> params = {"w": torch.zeros(1)}
    >>> _, state = optimizer.update({"w": torch.ones(1)}, optimizer.init_state(params), params)
    >>> state
    AveragedParamsState(step=tensor(1), average={'w': tensor([-1.])}, inner={})
    """
    _check_decay(decay, debias)
    rate = 1.0 - decay

    def weight(step: Tensor) -> Tensor:
        if debias:
            return rate / (1.0 - decay ** step.double())
        return torch.where(step == 1, 1.0, rate * torch.ones_like(step, dtype=torch.float64))

    return _averaged("params_ema", optimizer, weight)


def params_average(optimizer: Optimizer, start: int = 0, every: int = 1) -> Optimizer:
    """An optimizer that keeps the mean of the params it gives: stochastic weight averaging.

    The params count after the updates number ``start + every``, ``start + 2 every``, ..., each
    for the same. Up to the first of them the average is the params themselves.

    Args:
        optimizer: a whole optimizer: what it gives is added to the params.
        start: an integer >= 0, such as three quarters of the run.
        every: an integer >= 1, such as the steps of an epoch.

    State: `AveragedParamsState`. After the run, `eval_params` gives the mean; the running
    statistics of a model with batch norm are then to be found anew, with a pass over the data.
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
    for option, value, least in (("start", start, 0), ("every", every, 1)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"params_average: {option} must be an integer, got {value!r}")
        check_options("params_average", least, **{option: value})

    def weight(step: Tensor) -> Tensor:
        past = step - start
        count = torch.div(past, every, rounding_mode="floor")
        due = torch.where(past == count * every, 1.0 / count.clamp(min=1).double(), 0.0)
        return torch.where(count < 1, 1.0, due)

    return _averaged("params_average", optimizer, weight)


def _check_decay(decay: float | Tensor, debias: bool) -> None:
    name, value = "params_ema", runtime.read(decay) if isinstance(decay, Tensor) else decay
    if isinstance(decay, Tensor):
        require(not decay.dim(), f"{name}: decay must be 0-d, got {tuple(decay.shape)}")
    if value is not None:
        check_options(name, decay=value)
        interval = "[0, 1)" if debias else "[0, 1]"
        fits = value < 1 if debias else value <= 1
        require(fits, f"{name}: decay must be in {interval}, got {value}")


def _averaged(name: str, optimizer: Optimizer, weight: Callable[[Tensor], Tensor]) -> Optimizer:
    """The optimizer and, in its state, ``a = a + weight(t) (p - a)`` over the params p it gives."""
    if not isinstance(optimizer, Optimizer):
        hint = "; call its constructor" if callable(optimizer) else ""
        raise TypeError(f"{name}: expects an optimizer, got {type(optimizer).__name__}{hint}")
    inner_update = leaves_update(optimizer)

    def init_state(params: Params) -> AveragedParamsState:
        leaves: Any = tree.leaves(params)
        average = tree.map(lambda p: p.to(_wide(p), copy=True), params)
        return AveragedParamsState(zero_step(leaves), average, optimizer.init_state(params))

    def update_leaves(
        g: Leaves, opt_state: Any, trees: Trees
    ) -> tuple[Leaves, AveragedParamsState]:
        if not isinstance(opt_state, AveragedParamsState):
            got = tree.describe(opt_state)
            raise TypeError(f"{name}: expects the state AveragedParamsState, got {got}")
        average = trees.split(opt_state.average, f"{name}: state.average")
        updates, inner = inner_update(g, opt_state.inner, trees)
        step = opt_state.step + _ONE
        if isinstance(updates, Applied):
            average = leafwise(_toward, average, updates, weight(step))
        else:
            average = leafwise(_toward_sum, average, trees.params, updates, weight(step))
        return updates, AveragedParamsState(step, trees.join(average), inner)

    return lifted(name, init_state, update_leaves)


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _toward(average: Tensor, p: Tensor, weight: Tensor) -> Tensor:
    return torch.lerp(average, p.to(average.dtype), weight)


def _toward_sum(average: Tensor, p: Tensor, update: Tensor, weight: Tensor) -> Tensor:
    """Leaf by leaf, so that the new params are in memory one at a time."""
    return _toward(average, p + update, weight)
