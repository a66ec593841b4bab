"""Adafactor: the running mean of g^2 as an outer product of row means and column means."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from funcnet.core import Optimizer, Tree
from funcnet.optimizers.checks import Number, check_options, check_rate, read_option
from funcnet.optimizers.each import each
from funcnet.optimizers.leaves import at_least_float32
from funcnet.optimizers.lift import stateful, zero_step
from funcnet.optimizers.named import check_named, named_chain
from funcnet.optimizers.transforms import LearningRate, ScheduleState, negate


class FactoredState(NamedTuple):
    """The number of updates so far, and running means of g^2: trees like the params in names.

    A leaf of two axes or more, (..., n, m), has the means of its rows, (..., n, 1), and of its
    columns, (..., 1, m), and nothing in ``nu``; any other leaf has ``nu`` alone, of its shape.
    """

    step: Tensor
    rows: Tree
    columns: Tree
    nu: Tree


def scale_by_factored_rms(beta2_decay: Number = -0.8, eps: Number | None = None) -> Optimizer:
    """``g / sqrt(v)``, where v of a matrix is estimated from means over its rows and its columns.

    At the update number t, with ``w = t^beta2_decay``:

        r = (1 - w) r + w mean of g^2 over each row
        c = (1 - w) c + w mean of g^2 over each column
        v = max(r c / max(mean(r), eps), eps^2)

    A vector or scalar has ``v = (1 - w) v + w g^2`` itself. The axes before the last two are
    those of a batch of matrices.

    Args:
        beta2_decay: the exponent of w, a number <= 0.
        eps: the least mean of r and root of v; None for the machine epsilon of the leaf's dtype.

    Half precision is computed in float32, and the state rounded.

    Source: Shazeer and Stern 2018; ``torch.optim.Adafactor``.

    >>> params = {"w": torch.ones(2, 3)}
    >>> transform = scale_by_factored_rms()
    >>> updates, state = transform.update(params, transform.init_state(params), params)
    >>> updates["w"], state.rows["w"].shape, state.columns["w"].shape, state.nu["w"].shape
    (tensor([[1.0000, 1.0000, 1.0000],
             [1.0000, 1.0000, 1.0000]]), torch.Size([2, 1]), torch.Size([1, 3]), torch.Size([0]))
    """
    check_options("scale_by_factored_rms", -math.inf, beta2_decay=beta2_decay)
    if (read_option(beta2_decay) or 0.0) > 0.0:
        raise ValueError(f"scale_by_factored_rms: beta2_decay must be <= 0, got {beta2_decay}")
    if eps is not None:
        check_options("scale_by_factored_rms", eps=eps)

    def start(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if p.dim() < 2:
            return p.new_zeros(0), p.new_zeros(0), torch.zeros_like(p)
        *batch, rows, columns = p.shape
        return p.new_zeros(*batch, rows, 1), p.new_zeros(*batch, 1, columns), p.new_zeros(0)

    def init(p: Tensor) -> FactoredState:
        return FactoredState(zero_step(p), *each(start, p, outputs=3))

    def scaled(
        g: Tensor, rows: Tensor, columns: Tensor, nu: Tensor, w: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        least = torch.finfo(g.dtype).eps if eps is None else eps
        g, rows, columns, nu = map(at_least_float32, (g, rows, columns, nu))
        w = w.to(g.dtype)
        if g.dim() < 2:
            nu = torch.lerp(nu, g * g, w)
            return g * nu.clamp(min=least * least).rsqrt(), rows, columns, nu
        rows = torch.lerp(rows, _mean_of_squares(g, -1), w)
        columns = torch.lerp(columns, _mean_of_squares(g, -2), w)
        v = rows @ columns / _mean(rows, -2).clamp(min=least)
        return g * v.clamp(min=least * least).rsqrt(), rows, columns, nu

    def update(g: Tensor, state: FactoredState, p: Tensor) -> tuple[Tensor, FactoredState]:
        step = state.step + 1
        direction, *means = each(scaled, g, *state[1:], step.double() ** beta2_decay, outputs=4)
        return direction, FactoredState(step, *means)

    return stateful(init, update)


# Those of no elements are 0, as is every sum of none: the state stays finite.
def _mean_of_squares(x: Tensor, axis: int) -> Tensor:
    # The norm's square needs no tensor of the size of x.
    return x.norm(dim=axis, keepdim=True).square() / max(x.shape[axis], 1)


def _mean(x: Tensor, axis: int) -> Tensor:
    return x.sum(axis, keepdim=True) / max(x.shape[axis], 1)


def _rms(x: Tensor) -> Tensor:
    """The root mean square of all elements."""
    return x.norm() / math.sqrt(max(x.numel(), 1))


def adafactor(
    lr: LearningRate = 1e-2,
    beta2_decay: Number = -0.8,
    eps: tuple[Number | None, Number] = (None, 1e-3),
    d: Number = 1.0,
    weight_decay: Number = 0.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    """``p - rate u / max(1, rms(u) / d)`` with ``u = g / sqrt(v)``, v factored.

    See `funcnet.optimizers.scale_by_factored_rms` for v, which takes the memory of a row and a
    column of a matrix. At the update number t ``rate = max(eps[1], rms(p)) min(lr, 1 / sqrt(t))``:
    steps are relative to the params' size; rms is the root mean square of a leaf.

    Args:
        lr: the greatest relative step: a number, a 0-d tensor, or a function of the number of
            updates so far.
        beta2_decay: the exponent of the weight ``t^beta2_decay`` of the new g^2, a number <= 0.
        eps: the least mean and root of v, by default the machine epsilon of the leaf's dtype;
            and the least size of params that steps are relative to.
        d: the greatest root mean square of u, a number >= 1.
        weight_decay: decoupled: shrinks the params by ``lr * weight_decay`` of their size.
        maximize: ascends instead: negates the gradient before all else.

    Source: Shazeer and Stern 2018; ``torch.optim.Adafactor``.

    >>> params = {"w": torch.ones(2, 3)}
    >>> optimizer = adafactor(0.1)
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([[-0.1000, -0.1000, -0.1000],
            [-0.1000, -0.1000, -0.1000]])}
    """
    if not isinstance(eps, (tuple, list)) or len(eps) != 2:
        raise ValueError(f"adafactor: eps must be two numbers, got {eps!r}")
    floor, least = eps
    check_named("adafactor", lr, weight_decay=weight_decay, **{"eps[1]": least})
    check_options("adafactor", least=1.0, d=d)
    return named_chain(
        "adafactor",
        maximize and negate(),
        scale_by_factored_rms(beta2_decay, floor),
        _relative_step(lr, least, d, weight_decay),
    )


def _relative_step(lr: LearningRate, least: Number, d: Number, weight_decay: Number) -> Optimizer:
    """Adafactor's step along u, of a size that is relative to that of the params."""

    def step_of(u: Tensor, p: Tensor, relative: Tensor, decay: Number) -> Tensor:
        u, p = at_least_float32(u), at_least_float32(p)
        rate = relative * _rms(p).clamp(min=least) / (_rms(u) / d).clamp(min=1.0)
        return -(rate * u + decay * p)

    def update(u: Tensor, state: ScheduleState, p: Tensor) -> tuple[Tensor, ScheduleState]:
        rate = lr(state.step) if callable(lr) else lr
        check_rate("adafactor", rate)
        step = state.step + 1
        relative = step.double().rsqrt().clamp(max=rate)
        return each(step_of, u, p, relative, rate * weight_decay), ScheduleState(step)

    return stateful(lambda p: ScheduleState(zero_step(p)), update, name="relative_step")
