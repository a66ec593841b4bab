"""K-FAC: steps of a quadratic model of the loss, whose curvature is that of Kronecker factors."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet import tree
from funcnet.backward.curvature.kronecker import KroneckerFactors, Rows, factors_of, linear_rows
from funcnet.checks import check_function, check_kind
from funcnet.core import (
    EMPTY,
    Layer,
    Loss,
    Optimizer,
    Params,
    TrainState,
    Tree,
    defer,
    join_paths,
)
from funcnet.data import pair
from funcnet.deferred import Deferred, gradients
from funcnet.errors import check_count, require
from funcnet.metrics.core import Metric
from funcnet.optimizers.checks import check_options, check_positive
from funcnet.optimizers.choose import choose
from funcnet.optimizers.lift import apply_updates
from funcnet.parted_params import refuse_parts
from funcnet.random import fold_in
from funcnet.train import Batch, Measure, measures

Matrices = dict[str, Tensor]
"""The weight of each layer, with its bias as the last column."""


class KfacGradients(NamedTuple):
    """What the update of `kfac` takes for gradients."""

    grads: Params
    """Those of the loss."""
    sampled: Deferred
    """Those of the loss with targets drawn from the model's prediction, deferred."""


class KfacState(NamedTuple):
    """What `kfac` keeps; by the paths of the linear layers."""

    step: Tensor
    """How many updates there were."""
    damping: Tensor
    """The damping now."""
    least: Tensor
    """The least that it may become."""
    decrease: Tensor
    """By how much the last update lowers the loss, if the quadratic model is right."""
    factors: Mapping[str, KroneckerFactors]
    """Running means of the factors A and G."""
    inverses: Mapping[str, KroneckerFactors]
    """The inverses of the damped factors."""
    previous: Mapping[str, Tensor]
    """The last update."""
    others: Tree
    """The state of the optimizer of the other params."""


def kfac(
    damping: float = 1.0,
    *,
    least_damping: float | None = None,
    decay: float = 0.95,
    inverse_every: int = 5,
    others: Optimizer | None = None,
) -> Optimizer:
    """K-FAC: each step is the minimum of a quadratic model of the loss, without a learning rate.

    A linear layer's block of the Fisher matrix is about ``A (x) G``, see `kronecker_factors`, of
    which running means are kept. The direction is ``u = G_d^-1 grad A_d^-1``, with damped factors
    ``A_d = A + pi sqrt(damping)`` and ``G_d = G + sqrt(damping) / pi``, where ``pi^2`` is the ratio
    of their mean eigenvalues. The update is ``a u + b previous``, with a and b that minimize

        grad^T v + v^T (F + damping) v / 2        over v = a u + b previous,

    where ``v^T F v`` is the mean of ``<g, v>^2`` over the sampled gradients g of single examples,
    which are not made. So b is a momentum, and neither it nor a rate has to be chosen.
    `kfac_train_step` adapts the damping as in the Levenberg-Marquardt method.

    Args:
        damping: the first one, in units of the loss's second derivatives, a number > 0.
        least_damping: below which it does not fall, a number >= 0; default a thousandth of the
            first. How well a step does on its own batch says too much good of long ones, so without
            a bound the damping of small batches would go to 0.
        decay: of the running means, in [0, 1); the first means are plain ones.
        inverse_every: every how many updates the inverses are computed anew.
        others: updates the params that are no linear layer's weight or bias; default: there are
            none.

    Update: takes `KfacGradients` for the gradients; `kfac_train_step` makes them.
    State: `KfacState`.
    Raises:
        ValueError: params of other layers without ``others``.
        TypeError: plain gradients, as of `train_step`.

    A 2-d ``weight``, and the ``bias`` beside it, count as a linear layer's; where they are
    another's, as of an embedding, the update says so by its path. Of a weight that `tie` shares the
    curvature is that of its use at its own path alone.

    Source: Martens and Grosse 2015, without the exact adaption of the factors' damping.

    >>> import funcnet as fn
    >>> net, optimizer = fn.serial(fn.linear(3), fn.tanh(), fn.linear(1)), kfac()
    >>> params, _ = net.init(fn.key(0), torch.ones(4, 2))
    >>> state = optimizer.init_state(params)
    >>> {path: (len(a), len(g)) for path, (a, g) in state.factors.items()}
    {'0': (3, 3), '2': (4, 1)}
    """
    check_positive("kfac", damping=damping)
    least = damping / 1000 if least_damping is None else least_damping
    check_options("kfac", least_damping=least)
    check_options("kfac", below=1.0, decay=decay)
    check_count("kfac", inverse_every=inverse_every)
    if others is not None:
        check_kind("kfac", others, Optimizer, "others")

    def init_state(params: Params) -> KfacState:
        matrices, rest = _divided(params)
        left = sorted(tree.to_dotted(rest))
        require(
            others is not None or not left,
            f"kfac: expects params of linear layers alone, got {left}; others=fn.adam() is for "
            "the rest",
        )
        require(matrices, "kfac: expects params of linear layers, got none")
        factors = {
            path: KroneckerFactors(_eye(matrix, matrix.shape[1]), _eye(matrix, matrix.shape[0]))
            for path, matrix in matrices.items()
        }
        number = torch.zeros((), device=tree.device_of(params))
        return KfacState(
            number.long(),
            number + damping,
            number + least,
            number.clone(),
            factors,
            tree.map(torch.clone, factors),
            tree.map(torch.zeros_like, matrices),
            EMPTY if others is None else others.init_state(rest),
        )

    def update(grads: Tree, opt_state: Tree, params: Params) -> tuple[Params, KfacState]:
        check_kind("kfac: state", opt_state, KfacState)
        if not isinstance(grads, KfacGradients):
            got = tree.describe(grads)
            hint = "fn.kfac_train_step takes the place of fn.train_step"
            raise TypeError(f"kfac: expects KfacGradients, got {got}; {hint}")
        state: KfacState = opt_state
        rows = linear_rows(grads.sampled, state.factors.keys(), "kfac")
        for path, old in state.factors.items():
            alike = {each.x.shape[-1] for each in rows[path]} == {len(old.inputs)}
            what = "expects the weight and bias of a linear layer among the params, or neither"
            require(alike, f"kfac: {path!r} {what}; one of them is frozen, or tied")
        weight = torch.maximum(1.0 / (state.step + 1), torch.full_like(state.damping, 1.0 - decay))
        factors = {
            path: tree.map(lambda old, new: old + weight * (new - old), old, factors_of(rows[path]))
            for path, old in state.factors.items()
        }
        inverses = choose(
            state.step % inverse_every == 0,
            lambda: {path: _inverses(each, state.damping) for path, each in factors.items()},
            lambda: state.inverses,
            branches=True,
        )
        slope, rest = _divided(grads.grads)
        direction = {
            path: g_inverse @ slope[path] @ a_inverse
            for path, (a_inverse, g_inverse) in inverses.items()
        }
        a, b, decrease = _minimum(rows, slope, direction, state.previous, state.damping)
        step = {path: a * direction[path] + b * state.previous[path] for path in direction}
        others_updates, others_state = rest, state.others
        if others is not None:
            own = _divided(params)[1]
            others_updates, others_state = others.update(rest, state.others, own)
        number = state.step + 1, state.damping, state.least, decrease
        new = KfacState(*number, factors, inverses, step, others_state)
        return _joined(params, step, others_updates), new

    return Optimizer(init_state, update, "kfac", needs_all_leaves=True)


def _divided(params: Params) -> tuple[Matrices, Params]:
    """The matrices of linear layers by path, and the tree of all other params."""
    rest, matrices = tree.to_dotted(params), {}
    for path, weight in [*rest.items()]:
        layer, _, name = path.rpartition(".")
        if name == "weight" and weight.dim() == 2:
            parts = [rest.pop(path)]
            if (bias := join_paths(layer, "bias")) in rest:
                parts.append(rest.pop(bias)[:, None])
            matrix = torch.cat(parts, 1)
            matrices[layer] = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    return matrices, tree.from_dotted(rest)


def _joined(params: Params, matrices: Matrices, rest: Params) -> Params:
    """A tree like the params, of what `_divided` gave."""
    flat = tree.to_dotted(rest)
    for path, leaf in tree.to_dotted(params).items():
        layer, _, name = path.rpartition(".")
        if path not in flat:
            matrix = matrices[layer].to(leaf.dtype)
            flat[path] = matrix[:, -1] if name == "bias" else matrix[:, : leaf.shape[1]]
    return tree.flatten(params)[1].unflatten([flat[path] for path in tree.paths(params)])


def _eye(like: Tensor, size: int) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _inverses(factors: KroneckerFactors, damping: Tensor) -> KroneckerFactors:
    """Of the factors with a damping in the ratio of their mean eigenvalues, by Cholesky."""
    a, g = factors
    tiny = torch.finfo(a.dtype).tiny
    ratio = (a.diagonal().mean().clamp(min=tiny) / g.diagonal().mean().clamp(min=tiny)).sqrt()
    return KroneckerFactors(
        _inverse(a, damping.sqrt() * ratio), _inverse(g, damping.sqrt() / ratio)
    )


def _inverse(matrix: Tensor, damping: Tensor) -> Tensor:
    factor, _ = torch.linalg.cholesky_ex(matrix + damping * _eye(matrix, len(matrix)))
    return torch.cholesky_inverse(factor)


def _minimum(
    rows: Mapping[str, list[Rows]], grad: Matrices, u: Matrices, v: Any, damping: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """a and b of the least ``grad^T w + w^T (F + damping) w / 2``, ``w = a u + b v``; its size."""

    def along(direction: Matrices) -> Tensor:
        """``<g, direction>`` for the sampled gradient g of each example."""
        found = [each.slopes(direction[path]) for path, uses in rows.items() for each in uses]
        return torch.stack(found).sum(0).double()

    def inner(one: Matrices, other: Matrices) -> Tensor:
        return torch.stack([(one[path] * other[path]).sum() for path in one]).sum().double()

    slope_u, slope_v = along(u), along(v)
    uu = (slope_u * slope_u).mean() + damping * inner(u, u)
    uv = (slope_u * slope_v).mean() + damping * inner(u, v)
    vv = (slope_v * slope_v).mean() + damping * inner(v, v)
    gu, gv = inner(grad, u), inner(grad, v)
    # Of zeros, as v is at first, the share is 0; of parallel ones any is right.
    uu, vv = torch.where(uu > 0, uu, 1.0), torch.where(vv > 0, vv, 1.0)
    determinant = uu * vv * (1 + 1e-6) - uv * uv
    a = (uv * gv - vv * gu) / determinant
    b = (uv * gu - uu * gv) / determinant
    dtype = damping.dtype
    return a.to(dtype), b.to(dtype), (-(a * gu + b * gv) / 2).to(dtype)


def adapt_damping(
    opt_state: KfacState, before: Tensor, after: Tensor, shrink: float = 0.95**5
) -> KfacState:
    """The state with a damping for how well the last update's decrease of the loss was foretold.

    It is multiplied by ``shrink`` where the loss fell by more than 3/4 of what the quadratic model
    said, down to the least damping, and divided by it where it fell by less than 1/4.

    Args:
        opt_state: of `kfac`, after an update.
        before, after: the loss of its batch before and after it.

    Source: the Levenberg-Marquardt rule of Martens and Grosse 2015, section 6.5.

    >>> import funcnet as fn
    >>> state = fn.kfac().init_state({"weight": torch.ones(1, 1)})
    >>> state = state._replace(decrease=torch.tensor(1.0))
    >>> worse = adapt_damping(state, torch.tensor(2.0), torch.tensor(2.5), shrink=0.5)
    >>> state.damping, worse.damping
    (tensor(1.), tensor(2.))
    """
    fell = before - after
    better, worse = fell > 0.75 * opt_state.decrease, fell < 0.25 * opt_state.decrease
    factor = torch.where(better, shrink, torch.where(worse, 1.0 / shrink, 1.0))
    # A loss that is not a number counts as worse.
    factor = torch.where(after.isfinite(), factor, 1.0 / shrink)
    damping = torch.maximum(opt_state.damping * factor, opt_state.least)
    return opt_state._replace(damping=damping.to(opt_state.damping.dtype))


def kfac_train_step(
    model: Layer,
    loss: Loss,
    optimizer: Optimizer,
    sample: Callable[[Tensor, Tree], Tree] | None,
    *,
    outputs: int = 1,
    metrics: Mapping[str, Metric | Measure | Loss] | None = None,
    adapt_every: int = 5,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Tensor]]]:
    """A training step with `kfac`: ``step(train_state, batch) -> (train_state, metrics)``.

    The curvature is that of targets that the model itself predicts: so the pullback of the model is
    called twice, for the data's targets and for drawn ones, the second time for the half that
    makes cotangents alone.

    Args:
        model: any layer; the batch is the first dimension of its inputs.
        loss: the negative log-likelihood of the targets, a mean over the examples.
        optimizer: of `kfac`.
        sample: ``(key, prediction) -> target``, drawn from the distribution of which the loss is
            the negative log-likelihood: ``fn.random.categorical`` for `cross_entropy`,
            ``lambda key, z: fn.random.bernoulli(key, z.sigmoid(), z.shape).to(z.dtype)`` for
            `bce_with_logits`, ``lambda key, y: y + 0.5**0.5 * fn.random.normal(key, y.shape)`` for
            `mse`. None for the data's own targets: the empirical Fisher matrix, which saves the
            second call, and is a worse curvature.
        outputs: over how many numbers of one example the loss is a mean as well: those of the
            prediction for the means of `mse` and `bce_with_logits`.
        metrics: as for `train_step`.
        adapt_every: every how many steps the damping is adapted, by `adapt_damping`, for which the
            loss is computed once more; 0 for never.

    Returns:
        a step; its metrics have ``"damping"`` beside the loss.

    Linear layers whose x has not the examples in its first dimension are refused, and those whose
    params are parts over ranks. Layers that mix the examples of a batch, such as `batch_norm`, make
    the quadratic model less exact.

    Source: Martens and Grosse 2015.

    >>> import funcnet as fn
    >>> net, optimizer = fn.serial(fn.linear(3), fn.tanh(), fn.linear(2)), kfac()
    >>> step = kfac_train_step(net, fn.cross_entropy(), optimizer, fn.random.categorical)
    >>> batch = torch.eye(4), torch.tensor([0, 1, 0, 1])
    >>> state = fn.init_train_state(net, optimizer, fn.key(0), batch[0])
    >>> for _ in range(20):
    ...     state, metrics = step(state, batch)
    >>> bool(metrics["loss"] < 0.1)
    True
    """
    name = "kfac_train_step"
    check_kind(name, model, Layer, "model")
    refuse_parts(name, model)
    check_kind(name, loss, Loss, "loss")
    check_kind(name, optimizer, Optimizer, "optimizer")
    require(optimizer.name == "kfac", f"{name}: expects the optimizer kfac, got {optimizer.name}")
    if sample is not None:
        check_function(name, sample)
    check_count(name, least=0, adapt_every=adapt_every)
    check_count(name, outputs=outputs)
    measure, finish = measures(metrics)

    def step(train_state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        check_kind(name, train_state, TrainState)
        params, state, opt_state, key, count = train_state
        x, target = pair(name, batch)
        step_key = fold_in(key, count)
        prediction, pullback, new_state = model.forward(params, x, state, step_key, True)
        value, loss_pullback = loss.vjp(prediction, target)
        deferred, _ = defer(pullback)(loss_pullback(), x=False)
        sampled = deferred
        if sample is not None:
            drawn = sample(fold_in(step_key, "kfac"), prediction)
            _, loss_pullback = loss.vjp(prediction, drawn)
            sampled, _ = defer(pullback)(loss_pullback(), x=False)
        # The curvature of a likelihood's k-th part is a k-th, and of the squares of its gradients
        # the square of that.
        sampled = sampled * outputs**0.5
        found = KfacGradients(gradients(deferred), sampled)
        updates, opt_state = optimizer.update(found, opt_state, params)
        new = apply_updates(params, updates)

        def adapted() -> Tensor:
            again, _ = model.apply(new, x, state, key=step_key, train=True)
            return adapt_damping(opt_state, value, loss.apply(again, target)).damping

        if adapt_every:
            due = count % adapt_every == adapt_every - 1
            damping = choose(due, adapted, lambda: opt_state.damping, branches=True)
            opt_state = opt_state._replace(damping=damping)
        measured = {"loss": value, **measure(prediction, target)}
        found_metrics = {**finish(measured, False), "damping": opt_state.damping}
        return TrainState(new, new_state, opt_state, key, count + 1), found_metrics

    return step
