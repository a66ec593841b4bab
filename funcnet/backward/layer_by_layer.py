"""Updates with one layer's gradients in memory at a time, clipped by the norm of all."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.checks import check_kind
from funcnet.core import Box, Layer, Loss, Optimizer, Params, TrainState, Tree, barrier, join_paths
from funcnet.deferred import DEFER, Deferred, gradients, is_term, shapes_of
from funcnet.errors import require
from funcnet.layers.linear import linear_rule
from funcnet.metrics.core import Metric
from funcnet.optimizers.checks import Number, check_options
from funcnet.optimizers.clipping import global_norm
from funcnet.optimizers.lift import step_params
from funcnet.optimizers.parts import Part, SplitState
from funcnet.parted_params import refuse_parts
from funcnet.random import fold_in
from funcnet.train import Batch, Measure, forward_backward, measures


def gradient_norm(deferred: Deferred) -> Tensor:
    """The norm of all gradients of a `Deferred` as one vector; they are made place by place.

    Those of a linear layer with few rows are not made at all: with rows X and cotangents D,
    ``|D^T X|^2 = sum((X X^T) * (D D^T))``. With T rows that takes ``T^2 (in + out)`` products in
    place of ``T in out``, so it is chosen where ``T (in + out) < in out``.

    Returns:
        a 0-d tensor; half precision is summed in float32.

    Source: Goodfellow 2015, "Efficient per-example gradient computations", for the products.

    >>> import funcnet as fn
    >>> _, pullback, _ = fn.linear(1).vjp({"weight": torch.ones(1, 2), "bias": torch.zeros(1)},
    ...                                   torch.tensor([[3.0, 4.0]]))
    >>> deferred, _ = fn.defer(pullback)(torch.ones(1, 1))
    >>> torch.testing.assert_close(gradient_norm(deferred), torch.tensor(26.0).sqrt())
    """
    check_kind("gradient_norm", deferred, Deferred)
    return global_norm([_norm(place) for _, place in deferred.places()])


def _norm(place: Deferred) -> Tensor:
    if is_term(place) and place.parts["pullback"].rule is linear_rule:
        pullback, dy = place.parts["pullback"], place.parts["dy"]
        made, now = shapes_of(place)
        if made != now:
            gradients(place)  # raises: it is of the members of a vmap
        x, d = (torch.atleast_2d(each).flatten(0, -2) for each in (pullback.residuals["x"], dy))
        rows, sizes = len(x), (x.shape[-1], d.shape[-1])
        if rows * sum(sizes) < sizes[0] * sizes[1]:
            return _norm_by_products(x, d, *pullback.static)
    return global_norm(tree.leaves(gradients(place)))


def _norm_by_products(x: Tensor, d: Tensor, bias: bool) -> Tensor:
    """That of a linear layer's gradients, from the products of its rows with each other."""
    # In double precision: where rows cancel, little is left of terms that are much larger.
    wide, x, d = torch.promote_types(d.dtype, torch.float32), x.double(), d.double()
    square = ((x @ x.mT) * (d @ d.mT)).sum()
    if bias:
        square = square + d.sum(0).square().sum()
    return square.clamp(min=0.0).sqrt().to(wide)


def clipped_update(
    optimizer: Optimizer,
    deferred: Deferred,
    opt_state: Tree,
    params: Params,
    max_norm: Number,
    *,
    donate: bool = False,
) -> tuple[Params, Tree, Tensor]:
    """``chain(optimizers.clip_by_global_norm(max_norm), optimizer)``, one layer at a time.

    First the norm of all gradients is computed, by `gradient_norm`; then place by place of the
    `Deferred` the gradients, scaled by ``min(1, max_norm / (norm + 1e-6))``, and the update of
    those params. So there is one layer's gradient in memory at a time. Gradients of which the norm
    cannot be had otherwise are computed twice.

    Args:
        optimizer: one that can update some leaves alone; so one that has a
            `funcnet.optimizers.clip_by_global_norm` or a partition in it is refused.
        deferred: the gradients of the params, of `defer`.
        opt_state: of the optimizer, ``optimizer.init_state(params)`` at first.
        params: what is updated.
        max_norm: a number >= 0; infinite for no bound.
        donate: whether the memory of params and opt_state may be written to.

    Returns:
        ``(params, opt_state, norm)``, the new ones, and the norm before it is bounded.
    Raises:
        ValueError: an optimizer that needs all leaves at once; gradients of other params.

    >>> import funcnet as fn
    >>> net, optimizer = fn.linear(1), fn.sgd(1.0)
    >>> params = {"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}
    >>> _, pullback, _ = net.vjp(params, torch.tensor([[2.0, 2.0]]))
    >>> deferred, _ = fn.defer(pullback)(torch.ones(1, 1))
    >>> clipped_update(optimizer, deferred, optimizer.init_state(params), params, 1.5)
    ({'weight': tensor([[-1.0000, -1.0000]]), 'bias': tensor([-0.5000])}, {}, tensor(3.))
    """
    check_kind("clipped_update", optimizer, Optimizer)
    check_kind("clipped_update", deferred, Deferred)
    check_options("clipped_update", max_norm=max_norm)
    _check_alone("clipped_update", optimizer)
    box = Box([deferred])
    del deferred
    return _by_layer(optimizer, box, opt_state, params, max_norm, donate)


def _check_alone(name: str, optimizer: Optimizer) -> None:
    require(
        not optimizer.needs_all_leaves,
        f"{name}: expects an optimizer that can update one layer at a time; {optimizer.name} has "
        "a part that needs the gradients of all, such as clip_by_global_norm or partition",
    )
    require(
        not optimizer.reduces,
        f"{name}: takes the norm of this rank's gradients, and {optimizer.name} reduces them over "
        "ranks; use chain(mean(mesh), clip_by_global_norm(...), ...)",
    )


def _by_layer(
    optimizer: Optimizer,
    deferred: Box,
    opt_state: Tree,
    params: Params,
    max_norm: Number,
    donate: bool,
) -> tuple[Params, Tree, Tensor]:
    places = [*deferred.pop().places()]
    norm = global_norm([_norm(place) for _, place in places])
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    leaves, treedef = tree.flatten(params)
    index_of = tree.to_dotted(treedef.unflatten(range(len(leaves))))
    new, states = dict(enumerate(leaves)), SplitState(opt_state, treedef)
    left = {*index_of}
    while places:
        # The last first: what the backward pass began with. After the norm, by the barrier, or the
        # compiler would keep the gradients that the norm is of.
        path, place = places.pop()
        place, factor = barrier((place, factor))
        grads = tree.to_dotted(gradients(place * factor))
        del place
        grads = {join_paths(path, name): grads.pop(name) for name in [*grads]}
        unknown = sorted(grads.keys() - left)
        require(not unknown, f"clipped_update: the params have no {unknown}")
        left -= grads.keys()
        part = Part({name: index_of[name] for name in grads})
        box = Box([tree.from_dotted(grads)])
        del grads
        updated, state = step_params(optimizer, box, states.of(part), part.of(params), donate)
        new.update(zip(part.indices, tree.leaves(updated), strict=True))
        states.put(part, state)
    require(not left, f"clipped_update: the deferred has no gradients of {sorted(left)}")
    return treedef.unflatten([*new.values()]), states.whole(), norm


def clipped_train_step(
    model: Layer,
    loss: Loss,
    optimizer: Optimizer,
    max_norm: Number,
    *,
    metrics: Mapping[str, Metric | Measure | Loss] | None = None,
    donate: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Tensor]]]:
    """`train_step` with ``chain(clip_by_global_norm(max_norm), optimizer)``, layer by layer.

    There is one layer's gradient in memory at a time, see `clipped_update`; in place of the others
    there are the inputs of the layers and the cotangents of their outputs, which are smaller where
    layers have more weights than the batch has activations.

    Args:
        model, loss, metrics, donate: as for `train_step`.
        optimizer: without the bound. The train state is of it: the one that `init_train_state`
            makes with it.
        max_norm: a number >= 0; infinite for no bound.

    Returns:
        a step; its metrics have ``"grad_norm"`` beside the loss.

    >>> import funcnet as fn
    >>> net, optimizer = fn.linear(1), fn.adam(0.1)
    >>> step = clipped_train_step(net, fn.mse(), optimizer, 1.0)
    >>> x, target = torch.ones(4, 2), torch.zeros(4, 1)
    >>> state = fn.init_train_state(net, optimizer, fn.key(0), x)
    >>> state, metrics = step(state, (x, target))
    >>> list(metrics)
    ['loss', 'grad_norm']
    """
    name = "clipped_train_step"
    check_kind(name, optimizer, Optimizer)
    check_options(name, max_norm=max_norm)
    _check_alone(name, optimizer)
    refuse_parts(name, model)
    measure, finish = measures(metrics)
    taken = "grad_norm" in (metrics or {})
    require(not taken, f"{name}: the metric 'grad_norm' is there already, pick another name")
    run = forward_backward(model, loss, measure, check_finite=False)

    def step(train_state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        check_kind(name, train_state, TrainState)
        params, state, opt_state, key, count = train_state
        step_key = fold_in(key, count) if model.takes_key else None
        deferred, state, measured = run(params, batch, state, step_key, True, sums=DEFER)
        box = Box([deferred])
        del deferred
        params, opt_state, norm = _by_layer(optimizer, box, opt_state, params, max_norm, donate)
        metrics = {**finish(measured, False), "grad_norm": norm}
        return TrainState(params, state, opt_state, key, count + 1), metrics

    return step
