"""A loss scale for float16, whose gradients are 0 below 6e-8 and infinite above 65504."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet.checks import check_kind
from funcnet.core import Optimizer, Tree
from funcnet.errors import check_count, require
from funcnet.optimizers.chains import find_states
from funcnet.optimizers.checks import check_options, check_positive
from funcnet.optimizers.choose import choose
from funcnet.optimizers.clipping import global_norm
from funcnet.optimizers.control import on_all_ranks
from funcnet.optimizers.lift import around, paths, with_loss_scale, zero_step


class LossScaleState(NamedTuple):
    """The scale, 0-d float32; how many steps in a row were finite; and the inner state."""

    scale: Tensor
    good_steps: Tensor
    inner: Tree


def dynamic_loss_scale(
    optimizer: Optimizer,
    initial: float = 2.0**16,
    growth: float = 2.0,
    backoff: float = 0.5,
    interval: int = 2000,
) -> Optimizer:
    """An optimizer for the gradients of ``scale * loss``, as float16 needs them.

    `funcnet.train_step` takes the scale from its state and multiplies the loss's cotangent by it.
    The optimizer divides the gradients by it again. If one of them is infinite or NaN, the step is
    skipped: the params and the inner state stay as they are, bit for bit, and the scale becomes
    ``backoff * scale``. After ``interval`` finite steps in a row it becomes ``growth * scale``.
    Nothing waits for a device.

    Args:
        optimizer: the optimizer. The loss scale must be the outermost, as in
            ``dynamic_loss_scale(params_ema(adam()))``: one around it would not see that a step was
            skipped.
        initial: the first scale, a number > 0.
        growth: a number > 1.
        backoff: a number in (0, 1).
        interval: an integer >= 1.

    State:
        `LossScaleState`; ``train_state.opt_state.scale`` is the scale.
    Raises:
        ValueError: params in float16: keep them in float32, and compute in float16 by
            ``fn.cast(model, torch.float16)``.

    Source: Micikevicius et al. 2018; ``torch.amp.GradScaler``.

    >>> optimizer = dynamic_loss_scale(fn.sgd(0.5), initial=8.0)
    >>> params = {"w": torch.ones(2)}
    >>> opt_state = optimizer.init_state(params)
    >>> optimizer.update({"w": torch.tensor([8.0, 16.0])}, opt_state, params)[0]
    {'w': tensor([-0.5000, -1.0000])}
    >>> optimizer.update({"w": torch.tensor([8.0, torch.inf])}, opt_state, params)
    ({'w': tensor([-0., -0.])},
     LossScaleState(scale=tensor(4.), good_steps=tensor(0), inner={}))
    """
    name = "dynamic_loss_scale"
    check_kind(name, optimizer, Optimizer)
    require(optimizer.loss_scale is None, f"{name}: {optimizer.name} has a loss scale already")
    check_positive(name, initial=initial, growth=growth, backoff=backoff)
    check_options(name, below=1.0, backoff=backoff)
    require(growth > 1, f"{name}: growth must be > 1, got {growth}")
    check_count(name, interval=interval)

    def init(p: Any, inner: Tree) -> LossScaleState:
        for index, leaf in enumerate(p):
            if leaf.dtype == torch.float16:
                raise ValueError(
                    f"{name}: expects params in float32, got float16 at {paths(p)[index]!r}; "
                    "compute in float16 by fn.cast(model, torch.float16)"
                )
        good_steps = zero_step(p)
        scale = torch.full((), initial, dtype=torch.float32, device=good_steps.device)
        return LossScaleState(scale, good_steps, inner)

    def update(g: Any, state: LossScaleState, p: Any, inner_update: Any) -> Any:
        scale, good_steps, before = state
        finite = on_all_ranks(global_norm(g, torch.inf, p).isfinite(), optimizer)
        finite = finite.to(scale.device)
        updates, inner = choose(
            finite,
            lambda: inner_update(g * scale.reciprocal(), before),
            # p + -0 is p, also for p = -0, which p + 0 is not.
            lambda: (-torch.zeros_like(p), before),
        )
        return updates, LossScaleState(*next_scale(finite, scale, good_steps), inner)

    def next_scale(finite: Tensor, scale: Tensor, good_steps: Tensor) -> tuple[Tensor, Tensor]:
        """A scale that would be infinite does not grow, as in PyTorch."""
        count = torch.where(finite, good_steps + 1, 0)
        grown = growth * scale
        grows = (count == interval) & grown.isfinite()
        scale = torch.where(finite, torch.where(grows, grown, scale), backoff * scale)
        return scale, torch.where(count == interval, 0, count)

    made = around(optimizer, init, update, name=name, needs_all_leaves=True, elementwise=True)
    return with_loss_scale(made, lambda opt_state: opt_state.scale)


def check_outermost(optimizer: Optimizer, opt_state: Tree) -> None:
    """Raise ValueError if a loss scale is inside of another optimizer, where nobody asks for it."""
    scales = find_states(opt_state, lambda state: isinstance(state, LossScaleState))
    if optimizer.loss_scale is None and scales:
        message = "dynamic_loss_scale must be around all other optimizers, not inside of"
        raise ValueError(f"{message} {optimizer.name}")
