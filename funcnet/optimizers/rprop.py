"""Steps that grow while the gradient keeps its sign: `rprop`, `scale_by_rprop`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet.core import Optimizer, Tree
from funcnet.optimizers.checks import Number, check_rate, read_option
from funcnet.optimizers.lift import stateful
from funcnet.optimizers.named import check_pair, filled_like, named_chain
from funcnet.optimizers.transforms import negate, scale


class RpropState(NamedTuple):
    """The gradients of the last update, 0 where their sign had changed, and the step sizes."""

    last: Tree
    size: Tree


def scale_by_rprop(
    lr: Number = 1e-2,
    etas: tuple[Number, Number] = (0.5, 1.2),
    step_sizes: tuple[Number, Number] = (1e-6, 50.0),
) -> Optimizer:
    """``s sign(g)`` with a step size s for each element.

    Where g has the same sign as at the last update, s is first multiplied by etas[1]. Where the
    sign has changed, s is multiplied by etas[0], and g counts as 0. ``s`` stays between the two
    step_sizes.

    Args:
        lr: the first step size, a number >= 0; no function of the step.
        etas: two numbers, the first in (0, 1), the second above 1.
        step_sizes: the least and the greatest step, two numbers >= 0.

    Source: Riedmiller and Braun 1993; ``torch.optim.Rprop``.

    >>> params = {"w": torch.tensor([2.0, -3.0])}
    >>> scale_by_rprop().update(params, scale_by_rprop().init_state(params), params)[0]
    {'w': tensor([ 0.0100, -0.0100])}
    """
    if callable(lr) and not isinstance(lr, Tensor):
        raise TypeError("scale_by_rprop: lr is the first step size, a number; got a function")
    check_rate("scale_by_rprop", lr)
    check_pair("scale_by_rprop", "etas", etas)
    check_pair("scale_by_rprop", "step_sizes", step_sizes)
    shrink, grow = etas
    least, greatest = step_sizes
    below, above = read_option(shrink), read_option(grow)
    if not (0.0 < (0.5 if below is None else below) < 1.0 < (2.0 if above is None else above)):
        raise ValueError(f"scale_by_rprop: expects 0 < etas[0] < 1 < etas[1], got {etas}")

    def init(p: Any) -> RpropState:
        return RpropState(torch.zeros_like(p), filled_like(p, lr))

    def update(g: Any, state: RpropState, p: Any) -> tuple[Any, RpropState]:
        product = g * state.last
        turned = product < 0
        size: Any = torch.where(product > 0, grow * state.size, state.size)
        size = torch.where(turned, shrink * state.size, size)
        size = size.clamp(min=least).clamp(max=greatest)
        g = torch.where(turned, torch.zeros_like(g), g)
        return size * g.sign(), RpropState(g, size)

    return stateful(init, update, elementwise=True)


def rprop(
    lr: Number = 1e-2,
    etas: tuple[Number, Number] = (0.5, 1.2),
    step_sizes: tuple[Number, Number] = (1e-6, 50.0),
    *,
    maximize: bool = False,
) -> Optimizer:
    """``p - s sign(g)`` with a step size s for each element.

    See `funcnet.optimizers.scale_by_rprop`.

    For gradients of the whole data: those of small batches change their signs by chance.

    Args:
        lr: the first step size, a number; no function of the step.
        etas: what s is multiplied by where the sign of g has changed, and where it has not.
        step_sizes: the least and the greatest s.
        maximize: ascends instead: negates the gradient before all else.

    Source: ``torch.optim.Rprop``; Riedmiller and Braun 1993.

    >>> optimizer = rprop(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.1000])}
    """
    return named_chain(
        "rprop", maximize and negate(), scale_by_rprop(lr, etas, step_sizes), scale(-1.0)
    )
