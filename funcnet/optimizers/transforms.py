"""Transforms of gradients, from which optimizers are chained.

Each is an `Optimizer` itself: ``update`` takes what the transform before it gave for the
gradients and returns what the next one takes; what the last one gives is added to the params.
``g`` is the incoming tree, ``p`` the params.
"""

from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from funcnet import runtime, tree
from funcnet.core import Optimizer, Params, Tree
from funcnet.optimizers import foreach
from funcnet.optimizers.foreach import Constant, Leaves

LearningRate = float | Tensor | Callable[[Tensor], float | Tensor]
"""A number, a 0-d tensor, or a function of the number of updates so far (0-d int64)."""


def chain(*transforms: Optimizer) -> Optimizer:
    """One transform after another; the state is the tuple of theirs.

    >>> import funcnet as fn
    >>> optimizer = fn.chain(fn.trace(0.9), fn.scale_by_learning_rate(0.1))
    >>> params = {"w": torch.ones(1)}
    >>> updates, state = optimizer.update(params, optimizer.init_state(params), params)
    >>> updates
    {'w': tensor([-0.1000])}
    """
    updates = _folded([transform.update for transform in transforms])

    def init_state(params: Params) -> tuple[Tree, ...]:
        return tuple([transform.init_state(params) for transform in transforms])

    def update(
        grads: Tree, opt_state: tuple[Tree, ...], params: Params
    ) -> tuple[Tree, tuple[Tree, ...]]:
        if not isinstance(opt_state, tuple) or len(opt_state) != len(transforms):
            found = len(opt_state) if isinstance(opt_state, tuple) else type(opt_state).__name__
            raise ValueError(f"chain: expects a state of {len(transforms)} transforms, got {found}")
        states = []
        for transform, state in zip(updates, opt_state, strict=True):
            if transform is not None:
                grads, state = transform(grads, state, params)
            states.append(state)
        return grads, tuple(states)

    return Optimizer(init_state, update)


Update = Callable[[Tree, Tree, Params], tuple[Tree, Tree]]


def _folded(updates: list[Update]) -> list[Update | None]:
    """The updates of a chain; None for a constant factor that the one before it takes in.

    An update that can multiply on its way has ``times(factor)``, which gives one that does; one
    that does nothing but multiply has ``factor``.
    """
    folded: list[Update | None] = []
    for update in updates:
        times = getattr(folded[-1], "times", None) if folded else None
        factor = getattr(update, "factor", None)
        if times is not None and factor is not None:
            folded[-1] = times(factor)
            folded.append(None)
        else:
            folded.append(update)
    return folded


def apply_updates(params: Params, updates: Tree) -> Any:
    """``params + updates``, leaf by leaf.

    >>> apply_updates({"w": torch.ones(1)}, {"w": torch.ones(1)})
    {'w': tensor([2.])}
    """
    leaves, treedef = _flatten(params)
    others = tree.leaves_like(leaves, treedef, updates, "updates")
    added = foreach.add(leaves, others)
    if [*map(_dtype, others)] != [*map(_dtype, leaves)]:
        added = [new.to(old.dtype) for new, old in zip(added, leaves, strict=True)]
    return treedef.unflatten(added)


_ONE = torch.ones((), dtype=torch.int64, device="cpu")
_flatten = tree.Flattener()
_dtype = attrgetter("dtype")


def _leafwise(
    name: str,
    function: Callable[..., Leaves],
    *,
    with_params: bool = False,
) -> Optimizer:
    """A transform without state: ``function(g)``, or ``function(g, p)``, of lists of leaves."""
    flatten = tree.Flattener()

    def update(grads: Tree, opt_state: tuple[()], params: Params) -> tuple[Tree, tuple[()]]:
        leaves, treedef = flatten(grads)
        rest = []
        if with_params:
            rest = [tree.leaves_like(leaves, treedef, params, f"{name}: params")]
        return treedef.unflatten(function(leaves, *rest)), ()

    return Optimizer(lambda params: (), update)


class ScheduleState(NamedTuple):
    """The number of updates so far, a 0-d int64 tensor."""

    step: Tensor


def _step_zero(params: Params) -> Tensor:
    leaves = tree.leaves(params)
    device = leaves[0].device if leaves else torch.device("cpu")
    return torch.zeros((), dtype=torch.int64, device=device)


def _zeros(params: Params) -> Tree:
    return tree.map(torch.zeros_like, params)


def scale_by_learning_rate(lr: LearningRate) -> Optimizer:
    """``-lr g``.

    Args:
        lr: a number >= 0, a 0-d tensor, or a function of the number of updates so far.

    >>> import funcnet as fn
    >>> halving = fn.scale_by_learning_rate(lambda step: 0.5**step)
    >>> state = halving.init_state({})
    >>> _, state = halving.update({"w": torch.ones(1)}, state, {})
    >>> halving.update({"w": torch.ones(1)}, state, {})[0]
    {'w': tensor([-0.5000])}
    """
    if callable(lr):
        schedule: Any = lr
        flatten = tree.Flattener()

        def update(
            grads: Tree, opt_state: ScheduleState, params: Params
        ) -> tuple[Tree, ScheduleState]:
            leaves, treedef = flatten(grads)
            rate = schedule(opt_state.step)
            check_rate("scale_by_learning_rate", rate)
            scaled = foreach.multiply(leaves, -rate)
            return treedef.unflatten(scaled), ScheduleState(opt_state.step + 1)

        return Optimizer(lambda params: ScheduleState(_step_zero(params)), update)
    check_rate("scale_by_learning_rate", lr)
    return _times("scale_by_learning_rate", -lr)


def scale(factor: float | Tensor) -> Optimizer:
    """``factor g``.

    >>> import funcnet as fn
    >>> fn.scale(2.0).update({"w": torch.ones(1)}, (), {})[0]
    {'w': tensor([2.])}
    """
    return _times("scale", factor)


def _times(name: str, factor: float | Tensor) -> Optimizer:
    if isinstance(factor, Tensor):
        return _leafwise(name, lambda leaves: foreach.multiply(leaves, factor))
    constant = Constant(factor)
    transform = _leafwise(name, lambda leaves: foreach.multiply(leaves, constant))
    transform.update.factor = factor  # type: ignore[attr-defined]
    return transform


def negate() -> Optimizer:
    """``-g``: maximize instead of minimize.

    >>> import funcnet as fn
    >>> fn.negate().update({"w": torch.ones(1)}, (), {})[0]
    {'w': tensor([-1.])}
    """
    return _leafwise("negate", foreach.negate)


def scale_by_sign() -> Optimizer:
    """``sign(g)``. Source: Bernstein et al. 2018.

    >>> import funcnet as fn
    >>> fn.scale_by_sign().update({"w": torch.tensor([-3.0, 0.0])}, (), {})[0]
    {'w': tensor([-1., 0.])}
    """
    return _leafwise("scale_by_sign", foreach.sign)


def add_decayed_weights(weight_decay: float) -> Optimizer:
    """``g + weight_decay p``.

    >>> import funcnet as fn
    >>> fn.add_decayed_weights(0.1).update({"w": torch.zeros(1)}, (), {"w": torch.ones(1)})[0]
    {'w': tensor([0.1000])}
    """
    check_at_least("add_decayed_weights", "weight_decay", weight_decay, 0.0)
    factor = Constant(weight_decay)
    return _leafwise(
        "add_decayed_weights",
        lambda leaves, params: foreach.add_in_place(foreach.multiply(params, factor), leaves),
        with_params=True,
    )


class TraceState(NamedTuple):
    """The momentum buffer, a tree like params, and the number of updates so far."""

    trace: Tree
    step: Tensor


def trace(momentum: float, dampening: float = 0.0, nesterov: bool = False) -> Optimizer:
    """Momentum: ``b = momentum b + (1 - dampening) g``, starting from b = g; gives b.

    With ``nesterov`` it gives ``g + momentum b``. Source: ``torch.optim.SGD``; Sutskever et al.
    2013.

    >>> import funcnet as fn
    >>> momentum = fn.trace(0.9)
    >>> g = {"w": torch.ones(1)}
    >>> _, state = momentum.update(g, momentum.init_state(g), g)
    >>> momentum.update(g, state, g)[0]
    {'w': tensor([1.9000])}
    """
    check_at_least("trace", "momentum", momentum, 0.0)
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError("trace: nesterov needs momentum > 0 and dampening = 0")
    flatten = tree.Flattener()
    decay = Constant(momentum)

    def init_state(params: Params) -> TraceState:
        return TraceState(_zeros(params), _step_zero(params))

    def update(grads: Tree, opt_state: TraceState, params: Params) -> tuple[Tree, TraceState]:
        _check_state("trace", opt_state, TraceState)
        g, treedef = flatten(grads)
        old = tree.leaves_like(g, treedef, opt_state.trace, "trace: state")
        step = opt_state.step
        fresh = g
        if dampening:
            first = (step == 0).to(torch.float64)
            fresh = foreach.multiply(g, 1.0 - dampening * (1.0 - first))
        b = foreach.add_in_place(foreach.multiply(old, decay), fresh)
        new = g if nesterov else b
        if nesterov:
            new = foreach.add_in_place(foreach.multiply(b, decay), g)
        return treedef.unflatten(new), TraceState(treedef.unflatten(b), step + 1)

    return Optimizer(init_state, update)


class AdamState(NamedTuple):
    """The number of updates so far, and running means like params; ``nu_max`` for amsgrad."""

    step: Tensor
    mu: Tree
    nu: Tree
    nu_max: Tree


def scale_by_adam(
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, amsgrad: bool = False
) -> Optimizer:
    """``m' / (sqrt(v') + eps)`` with running means of g and g^2.

    ``m = b1 m + (1 - b1) g``, ``v = b2 v + (1 - b2) g^2``, ``m' = m / (1 - b1^t)``,
    ``v' = v / (1 - b2^t)``; with ``amsgrad`` the greatest v so far stands for v in v'.

    Source: Kingma and Ba 2014; Reddi et al. 2018; ``torch.optim.Adam``.

    >>> import funcnet as fn
    >>> adam = fn.scale_by_adam()
    >>> g = {"w": torch.tensor([2.0])}
    >>> adam.update(g, adam.init_state(g), g)[0]
    {'w': tensor([1.0000])}
    """
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"scale_by_adam: betas must be two numbers, got {betas!r}")
    for position, beta in enumerate(betas):
        check_at_least("scale_by_adam", f"betas[{position}]", beta, 0.0)
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"scale_by_adam: betas[{position}] must be in [0, 1), got {beta}")
    check_at_least("scale_by_adam", "eps", eps, 0.0)
    flatten = tree.Flattener()

    def init_state(params: Params) -> AdamState:
        return AdamState(
            _step_zero(params),
            _zeros(params),
            _zeros(params),
            _zeros(params) if amsgrad else (),
        )

    def update(
        grads: Tree, opt_state: AdamState, params: Params, factor: float = 1.0
    ) -> tuple[Tree, AdamState]:
        _check_state("scale_by_adam", opt_state, AdamState)
        g, treedef = flatten(grads)
        mu = tree.leaves_like(g, treedef, opt_state.mu, "scale_by_adam: mu")
        nu = tree.leaves_like(g, treedef, opt_state.nu, "scale_by_adam: nu")
        nu_max = (
            tree.leaves_like(g, treedef, opt_state.nu_max, "scale_by_adam: nu_max")
            if amsgrad
            else []
        )
        step = opt_state.step + _ONE
        direction, mu, nu, nu_max = foreach.adam(g, mu, nu, nu_max, step, betas, eps, factor)
        state = AdamState(
            step,
            treedef.unflatten(mu),
            treedef.unflatten(nu),
            treedef.unflatten(nu_max) if amsgrad else (),
        )
        return treedef.unflatten(direction), state

    update.times = lambda factor: partial(update, factor=factor)  # type: ignore[attr-defined]
    return Optimizer(init_state, update)


class RmsState(NamedTuple):
    """The running means of g^2 and, if centered, of g; trees like params."""

    nu: Tree
    mu: Tree


def scale_by_rms(alpha: float = 0.99, eps: float = 1e-8, centered: bool = False) -> Optimizer:
    """``g / (sqrt(v) + eps)`` with ``v = alpha v + (1 - alpha) g^2``.

    With ``centered``, v is less the square of the running mean of g. Source: Hinton's lecture
    6e; Graves 2013; ``torch.optim.RMSprop``.

    >>> import funcnet as fn
    >>> rms = fn.scale_by_rms()
    >>> g = {"w": torch.tensor([2.0])}
    >>> rms.update(g, rms.init_state(g), g)[0]
    {'w': tensor([10.0000])}
    """
    check_at_least("scale_by_rms", "alpha", alpha, 0.0)
    check_at_least("scale_by_rms", "eps", eps, 0.0)
    flatten = tree.Flattener()
    decay = Constant(alpha)

    def init_state(params: Params) -> RmsState:
        return RmsState(_zeros(params), _zeros(params) if centered else ())

    def update(grads: Tree, opt_state: RmsState, params: Params) -> tuple[Tree, RmsState]:
        _check_state("scale_by_rms", opt_state, RmsState)
        g, treedef = flatten(grads)
        nu = tree.leaves_like(g, treedef, opt_state.nu, "scale_by_rms: nu")
        nu = foreach.add_square_in_place(foreach.multiply(nu, decay), g, 1.0 - alpha)
        mu: Tree = ()
        power = nu
        if centered:
            mean = tree.leaves_like(g, treedef, opt_state.mu, "scale_by_rms: mu")
            mean = foreach.lerp(mean, g, 1.0 - alpha)
            mu = treedef.unflatten(mean)
            power = foreach.subtract(nu, foreach.square(mean))
        root = foreach.add_scalar(foreach.sqrt(power), eps)
        new = foreach.divide(g, root)
        return treedef.unflatten(new), RmsState(treedef.unflatten(nu), mu)

    return Optimizer(init_state, update)


def _check_state(name: str, opt_state: Any, kind: type) -> None:
    if not isinstance(opt_state, kind):
        raise TypeError(f"{name}: expects a {kind.__name__}, got {type(opt_state).__name__}")


def check_at_least(name: str, option: str, value: float, least: float) -> None:
    """Raise ValueError for a number below ``least`` or NaN, TypeError for what is no number."""
    if not isinstance(value, Real):
        raise TypeError(f"{name}: {option} must be a number, got {type(value).__name__}")
    if not value >= least:
        raise ValueError(f"{name}: {option} must be >= {least:g}, got {value}")


def check_rate(name: str, lr: Any) -> None:
    """Raise ValueError for a rate that is negative or not 0-d, TypeError for what is no rate."""
    if isinstance(lr, Tensor):
        if lr.dim() != 0:
            raise ValueError(f"{name}: lr must be a 0-d tensor, got {tuple(lr.shape)}")
        lr = runtime.read(lr)
        if lr is None:
            return
    if isinstance(lr, bool) or not isinstance(lr, Real):
        raise TypeError(
            f"{name}: lr must be a number, a 0-d tensor or a function of the step, got {lr!r}"
        )
    check_at_least(name, "lr", cast(float, lr), 0.0)


def optional(condition: object, transform: Callable[[], Optimizer]) -> Sequence[Optimizer]:
    """The transform if the condition holds, for building a chain."""
    return (transform(),) if condition else ()
