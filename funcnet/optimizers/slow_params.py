"""`lookahead`: slow params that follow the fast ones of another optimizer."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet.core import Optimizer, Params, Tree
from funcnet.errors import check_count
from funcnet.optimizers.checks import Number, check_options
from funcnet.optimizers.choose import choose
from funcnet.optimizers.lift import around, zero_step


class LookaheadState(NamedTuple):
    """The number of updates so far, the slow params, and the state of the optimizer inside."""

    step: Tensor
    slow: Tree
    inner: Tree

    def eval_params(self, params: Params) -> Any:
        """The slow params, which the paper evaluates."""
        return self.slow


def lookahead(optimizer: Optimizer, k: int = 5, alpha: Number = 0.5) -> Optimizer:
    """Every k updates ``slow = slow + alpha (p - slow)``, and from there the next k begin.

    Args:
        optimizer: makes the k fast updates of p; its state goes on.
        k: an integer >= 1.
        alpha: how far the slow params go, a number >= 0.

    Source: Zhang et al. 2019; ``optax.lookahead``.

    >>> optimizer = lookahead(fn.sgd(1.0), k=2, alpha=0.25)
    >>> params, grads = {"w": torch.zeros(1)}, {"w": -torch.ones(1)}
    >>> state = optimizer.init_state(params)
    >>> for _ in range(2):
    ...     updates, state = optimizer.update(grads, state, params)
    ...     params = fn.apply_updates(params, updates)
    >>> params, state.slow
    ({'w': tensor([0.5000])}, {'w': tensor([0.5000])})
    """
    check_count("lookahead", k=k)
    check_options("lookahead", alpha=alpha)

    def init(p: Any, inner: Tree) -> LookaheadState:
        return LookaheadState(zero_step(p), p.clone(), inner)

    def update(g: Any, state: LookaheadState, p: Any, inner_update: Any) -> Any:
        fast, inner = inner_update(g, state.inner)
        step = state.step + 1

        def synchronized() -> tuple[Any, Any]:
            slow: Any = torch.lerp(state.slow, p + fast, alpha)
            slow = slow.to_dtypes(p)
            return slow - p, slow

        updates, slow = choose(step % k == 0, synchronized, lambda: (fast, state.slow))
        return updates, LookaheadState(step, slow, inner)

    return around(optimizer, init, update, gives_state=True, elementwise=True)
