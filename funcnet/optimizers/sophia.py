"""Steps divided by an estimate of the Hessian's diagonal: `sophia`, and its estimators."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import Optimizer, Params, Tree
from funcnet.optimizers.chains import find_states
from funcnet.optimizers.checks import Number, check_options, is_on
from funcnet.optimizers.lift import stateful, zero_step
from funcnet.optimizers.named import check_betas, check_named, named_chain
from funcnet.optimizers.transforms import (
    LearningRate,
    add_decayed_weights,
    negate,
    scale_by_learning_rate,
)
from funcnet.random import bernoulli, fold_in

Gradient = Callable[[Params], Params]
"""The gradient of a loss, as a function of the params."""


class SophiaState(NamedTuple):
    """The updates so far, b2; and running means of g and of the Hessian's diagonal, like params."""

    step: Tensor
    b2: Tensor
    mu: Tree
    hessian: Tree


def scale_by_sophia(
    betas: tuple[Number, Number] = (0.965, 0.99),
    eps: Number = 1e-8,
    gamma: Number = 0.01,
    clip_threshold: Number | None = 1.0,
) -> Optimizer:
    """``clip(m' / max(gamma h, eps))`` with running means m of g, and h of the Hessian's diagonal.

    ``m = b1 m + (1 - b1) g``, and ``m' = m / (1 - b1^t)`` at the update number t. h is in the
    state, 0 at first; `refresh_hessian` sets it to ``b2 h + (1 - b2) estimate``.

    Args:
        betas: b1 and b2, in [0, 1).
        eps: the least divisor, a number >= 0; where h is not above it, the step is a sign.
        gamma: a number >= 0: the greater, the more elements are clipped less.
        clip_threshold: the greatest step of an element, a number >= 0; None for no limit.

    Source: Liu et al. 2023; ``optax.contrib.scale_by_sophia``.

    >>> params = {"w": torch.tensor([2.0])}
    >>> transform = scale_by_sophia()
    >>> state = refresh_hessian(transform.init_state(params), {"w": torch.tensor([4e4])})
    >>> transform.update(params, state, params)[0]
    {'w': tensor([0.5000])}
    """
    check_betas("scale_by_sophia", betas)
    check_options("scale_by_sophia", eps=eps, gamma=gamma)
    b1, b2 = betas
    if clip_threshold is not None:
        check_options("scale_by_sophia", clip_threshold=clip_threshold)

    def init(p: Any) -> SophiaState:
        step = zero_step(p)
        return SophiaState(step, step.double() + b2, torch.zeros_like(p), torch.zeros_like(p))

    def update(g: Any, state: SophiaState, p: Any) -> tuple[Any, SophiaState]:
        step = state.step + 1
        m = torch.lerp(state.mu, g, 1.0 - b1)
        ratio = m / (1.0 - b1 ** step.double()) / (gamma * state.hessian).clamp(min=eps)
        if clip_threshold is not None:
            ratio = ratio.clamp(-clip_threshold, clip_threshold)
        return ratio, SophiaState(step, state.b2 * 0.0 + b2, m, state.hessian)

    return stateful(init, update, elementwise=True)


def refresh_hessian(opt_state: Tree, estimate: Params) -> Any:
    """The optimizer's state with ``h = b2 h + (1 - b2) estimate`` in its `SophiaState`.

    Args:
        opt_state: the state of `funcnet.sophia`, or of any optimizer that `scale_by_sophia` is a
            part of.
        estimate: of the Hessian's diagonal, a tree like the params, from `hutchinson`,
            `gauss_newton_bartlett`, or one's own function.

    Raises:
        ValueError: a state that is not of Sophia, an estimate that is not like the params.

    >>> params = {"w": torch.ones(1)}
    >>> state = refresh_hessian(sophia().init_state(params), {"w": torch.tensor([100.0])})
    >>> state["scale_by_sophia"].hessian
    {'w': tensor([1.])}
    """

    def is_ours(node: Any) -> bool:
        return isinstance(node, SophiaState)

    def refresh(node: Any) -> Any:
        if not is_ours(node):
            return node
        means, treedef = tree.flatten(node.hessian)
        shapes = [mean.shape for mean in means]
        new = tree.leaves_like(shapes, treedef, estimate, "refresh_hessian: estimate")
        weight = 1.0 - node.b2
        return node._replace(
            hessian=treedef.unflatten(
                [
                    (mean + weight * (entry - mean)).to(mean.dtype)
                    for mean, entry in zip(means, new, strict=True)
                ]
            )
        )

    if not find_states(opt_state, is_ours):
        raise ValueError(f"refresh_hessian: expects Sophia's state, got {tree.describe(opt_state)}")
    return optree.tree_map(refresh, opt_state, is_leaf=is_ours)


def hutchinson(
    key: Tensor,
    gradient: Gradient,
    params: Params,
    *,
    hvp: Callable[[Params, Params], Params] | None = None,
    distance: float | None = None,
) -> Params:
    """Hutchinson's estimate ``z * (H z)`` of the diagonal of the Hessian H, for Sophia-H.

    z has random signs. ``H z`` is the difference ``(gradient(p + d z) - gradient(p - d z)) / 2 d``,
    two gradients, or what ``hvp`` gives. The estimate's expectation is the diagonal.

    Args:
        key: of the signs.
        gradient: ``params -> grads`` of a batch's loss, as ``fn.value_and_grad`` gives.
        params: where the Hessian is estimated.
        hvp: ``(params, z) -> H z``, exactly, for instance
            ``lambda p, z: fn.hvp(net, loss)(p, batch, z)[1]``.
        distance: d; by default the cube root of the dtype's rounding error, 0.005 for float32.

    Returns:
        a tree like params, for `refresh_hessian`.

    Source: Hutchinson 1989; Liu et al. 2023, algorithm 1.

    >>> params = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    >>> def gradient(params):
    ...     return {"w": torch.tensor([3.0, 5.0]).double() * params["w"]}
    >>> hutchinson(fn.key(0), gradient, params)
    {'w': tensor([3.0000, 5.0000], dtype=torch.float64)}
    """
    leaves, treedef = tree.flatten(params)
    signs = treedef.unflatten(
        [
            2 * bernoulli(fold_in(key, i), 0.5, leaf.shape, device=leaf.device).to(leaf.dtype) - 1
            for i, leaf in enumerate(leaves)
        ]
    )
    if hvp is not None:
        return tree.map(torch.mul, signs, hvp(params, signs))
    if distance is None:
        distance = max([torch.finfo(leaf.dtype).eps for leaf in leaves], default=1.0) ** (1 / 3)
    elif not distance > 0:
        raise ValueError(f"hutchinson: distance must be above 0, got {distance}")
    d: float = distance
    after = gradient(tree.map(lambda p, z: p + d * z, params, signs))
    before = gradient(tree.map(lambda p, z: p - d * z, params, signs))
    return tree.map(lambda z, a, b: z * ((a - b) / (2.0 * d)), signs, after, before)


def gauss_newton_bartlett(grads: Params, batch_size: int) -> Params:
    """``batch_size * grads^2``: an estimate of the Gauss-Newton diagonal, for Sophia-G.

    Args:
        grads: of the batch's mean cross entropy with targets that are drawn from the model's own
            prediction, such as ``fn.random.categorical(key, logits)``, in place of the data's.
        batch_size: how many targets the mean is of.

    Returns:
        a tree like params, for `refresh_hessian`.

    Source: Liu et al. 2023, algorithm 2.

    >>> gauss_newton_bartlett({"w": torch.tensor([0.5])}, 8)
    {'w': tensor([2.])}
    """
    return tree.map(lambda g: batch_size * g * g, grads)


def sophia(
    lr: LearningRate = 1e-4,
    betas: tuple[Number, Number] = (0.965, 0.99),
    eps: Number = 1e-8,
    weight_decay: Number = 1e-4,
    gamma: Number = 0.01,
    clip_threshold: Number | None = 1.0,
    *,
    maximize: bool = False,
) -> Optimizer:
    """``p - lr (clip(m' / max(gamma h, eps)) + weight_decay p)``.

    See `funcnet.optimizers.scale_by_sophia`.

    h is a running mean of estimates of the Hessian's diagonal. An estimate is expensive, and made
    once in about ten steps, so it is no part of ``update``: a function of its own,
    `funcnet.optimizers.refresh_hessian`, puts it into the state; without one, every step is a sign.
    A step of a loop is then, with an estimate from `funcnet.optimizers.hutchinson` or
    `funcnet.optimizers.gauss_newton_bartlett`:

        updates, after = optimizer.update(gradient(params), opt_state, params)
        if step % 10 == 0:  # an int of the Python loop
            estimate = fn.optimizers.hutchinson(key, gradient, params)
            after = fn.optimizers.refresh_hessian(after, estimate)
        params, opt_state = fn.apply_updates(params, updates), after

    Args:
        lr: a number, a 0-d tensor, or a function of the number of updates so far.
        betas: the decays of the running mean m of g, and of h.
        eps: the least divisor.
        weight_decay: decoupled, as in the formula.
        gamma: what h is multiplied by.
        clip_threshold: the greatest step of an element, times lr; None for no limit.
        maximize: ascends instead: negates the gradient before all else.

    Source: Liu et al. 2023, *Sophia: a scalable stochastic second-order optimizer*;
    ``optax.contrib.sophia``.

    >>> optimizer = sophia(0.1, weight_decay=0.0)
    >>> params = {"w": torch.ones(1)}
    >>> optimizer.update(params, optimizer.init_state(params), params)[0]
    {'w': tensor([-0.1000])}
    """
    check_named("sophia", lr, weight_decay=weight_decay)
    return named_chain(
        "sophia",
        maximize and negate(),
        scale_by_sophia(betas, eps, gamma, clip_threshold),
        is_on(weight_decay) and add_decayed_weights(weight_decay),
        scale_by_learning_rate(lr),
    )
