"""The training step of a pipeline: micro-batches through the stages, in the order of a schedule."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.checks import check_kind
from funcnet.collectives import Axis
from funcnet.core import Layer, Loss, Optimizer, Params, TrainState, Tree
from funcnet.data import leading_extent, on_device, pair
from funcnet.distributed.pipeline.actions import Schedule, check_schedule
from funcnet.distributed.pipeline.optimizers import choosing_of_all, over_stages
from funcnet.distributed.pipeline.programs import Programs, Pullbacks, programs_of
from funcnet.distributed.pipeline.schedules import one_f_one_b
from funcnet.distributed.pipeline.stages import (
    Boundaries,
    Stages,
    init_of,
    kind_of,
    kinds_of,
    own_params,
    stages_of,
)
from funcnet.distributed.pipeline.transport import (
    Inbox,
    Outbox,
    backwards,
    sent,
    summed,
    told_by_all,
    told_by_last,
)
from funcnet.distributed.processes.start import Mesh, axis_of
from funcnet.errors import check_count, require
from funcnet.metrics.core import Metric
from funcnet.optimizers.over_ranks import knowing_parts
from funcnet.random import fold_in
from funcnet.run_start import init_train_state
from funcnet.runtime import is_transformed
from funcnet.train import Batch, Measure, Measured, measures

_NAME = "pipeline_step"


def pipeline_state(
    model: Layer,
    optimizer: Optimizer,
    key: Tensor,
    x: Tree,
    mesh: Mesh,
    *,
    boundaries: Boundaries | None = None,
    params: Params | None = None,
    state: Params | None = None,
) -> TrainState:
    """`funcnet.init_train_state` of a stage: on each rank that of its layers alone.

    Params have the dotted paths, and the numbers, that they have in a single process. No rank makes
    those of another stage, but for leaves to which some of its own are tied. The train state
    is for `pipeline_step` and `pipeline_evaluate`.

    Args:
        model, optimizer, key: see `pipeline_step`.
        x: an example input of the whole model.
        mesh: whose ranks along "pipe" are the stages.
        boundaries: as for `pipeline_step`.
        params, state: to start from: of the whole model, or of the stage.

    >>> import funcnet as fn
    >>> net = fn.serial(fn.linear(8), fn.relu(), fn.linear(2))
    >>> start = pipeline_state(net, fn.adam(), fn.key(0), torch.ones(4, 3), {"pipe": 1})
    >>> list(fn.tree.to_dotted(start.params))
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    axis = axis_of(mesh, "pipe")
    example = on_device(None)(x)
    check_kind("pipeline_state", optimizer, Optimizer, "optimizer")
    stages = stages_of("pipeline_state", model, example, axis.size, boundaries)
    stage = stages.each[axis.index]
    if params is not None:
        params = own_params(stage, params)
    if state is not None:
        state = {child: each for child, each in state.items() if child in stage.names}
    made = init_of(model, stage)
    known = choosing_of_all(optimizer, stages)
    return init_train_state(made, known, key, example, params=params, state=state)


def pipeline_step(
    model: Layer,
    loss: Loss,
    optimizer: Optimizer,
    mesh: Mesh,
    *,
    micro_batches: int,
    schedule: Callable[[int, int], Schedule] | Schedule = one_f_one_b,
    boundaries: Boundaries | None = None,
    metrics: Mapping[str, Metric | Measure | Loss] | None = None,
    jit: bool = False,
    donate: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Tensor]]]:
    """`funcnet.train_step` with ``micro_batches``, of a model whose layers are on several ranks.

    Each rank of the axis "pipe" has some of the layers one after another, a stage. The parts of the
    batch go from stage to stage, their cotangents back, so that stages work at the same time on
    different parts, in the order that the schedule says. The numbers are those of
    ``train_step(model, loss, optimizer, micro_batches=k)`` in a single process, keys and state
    included.

    Args:
        model: a `funcnet.serial`, or `funcnet.tie` of one: leaves may be tied across stages, of
            which each has them then, and their gradients are summed.
            A layer in `funcnet.cast` holds a copy of its params in the other dtype for each
            micro-batch whose backward pass is still to come; ``remat(cast(layer, dtype))`` holds
            none, and computes the layer twice.
        loss, metrics: as for `funcnet.train_step`; the last stage computes them.
        optimizer: the same on all ranks. Norms of all gradients, as of
            `funcnet.optimizers.clip_by_global_norm`, are those of all stages, and
            `funcnet.optimizers.masked` and `funcnet.optimizers.partition` choose among the leaves
            of the whole model. Otherwise it sees the leaves of its stage alone.
        mesh: whose ranks along "pipe" are the stages. Along "data" and "model" it is as with
            `funcnet.train_step`: all ranks of a stage do the same.
        micro_batches: k, into how many parts the batch is cut.
        schedule: `gpipe`, `one_f_one_b`, `zero_bubble`, or any function
            ``(stages, micro_batches) -> schedule``, or a schedule itself. Where it has actions "B"
            and "W", backward passes are split by `funcnet.defer`.
        boundaries: the children of the model at which stages after the first begin, by name or
            index; see `pipeline_stages` for the default.
        jit: whether to compile what a stage computes: its forward pass, backward pass, or halves
            of it, and the update. The step itself, which communicates, is not to be compiled.
        donate: whether a step may write to the memory of the train state that it is given.

    Returns:
        ``step(train_state, batch) -> (train_state, metrics)``. The train state is of
        `pipeline_state`; each rank gets the whole batch, of which the first stage reads x and the
        last one the target. Metrics are on all ranks.
    Raises:
        ValueError: more stages than layers; a schedule of other stages or micro-batches; a batch
            that cannot be cut.
        PeerError: another rank failed.

    Source: Huang et al. 2019, "GPipe"; Qi et al. 2023, "Zero Bubble Pipeline Parallelism".

    >>> import funcnet as fn
    >>> net, mesh = fn.serial(fn.linear(8), fn.tanh(), fn.linear(2)), {"pipe": 1}
    >>> x = torch.ones(4, 3)
    >>> state = pipeline_state(net, fn.adam(), fn.key(0), x, mesh)
    >>> step = pipeline_step(net, fn.mse(), fn.adam(), mesh, micro_batches=2)
    >>> state, metrics = step(state, (x, torch.zeros(4, 2)))
    >>> state.step, list(metrics)
    (tensor(1), ['loss'])
    """
    check_kind(_NAME, model, Layer, "model")
    check_kind(_NAME, loss, Loss, "loss")
    check_kind(_NAME, optimizer, Optimizer, "optimizer")
    check_count(_NAME, micro_batches=micro_batches)
    axis = axis_of(mesh, "pipe")
    orders = schedule(axis.size, micro_batches) if callable(schedule) else schedule
    found = len(orders), check_schedule(orders)
    wanted = f"{axis.size} stages and {micro_batches} micro-batches"
    fits = found == (axis.size, micro_batches)
    require(fits, f"{_NAME}: expects a schedule of {wanted}, got one of {found[0]} and {found[1]}")
    measure, finish = measures(metrics)
    keys = axis.key, backwards(mesh, axis)
    plans: dict[Any, _Plan] = {}

    def plan(x: Tree, target: Tree, params: Params, state: Params) -> _Plan:
        parts = f"{micro_batches} micro-batches, each {tree.describe((x, target))}"
        told = told_by_all(axis, ((kinds_of(params), kinds_of(state)), (parts, repr(orders))))
        for number, (_, (others, order)) in enumerate(told):
            alike = f"{_NAME}: expects the same on all stages, and stage {number} has"
            first = told[0][1]
            require(others == first[0], f"{alike} {others}; stage 0 has {first[0]}")
            require(order == first[1], f"{alike} another schedule than stage 0")
        given = [kinds for kinds, _ in told]
        stages = stages_of(_NAME, model, x, axis.size, boundaries, given)
        prediction = stages.each[-1].y
        value = loss.apply(prediction, tree.to_meta(target))
        scalar = "pass reduction='mean' or reduction='sum' to the loss"
        require(
            not value.dim(),
            f"loss: expects a scalar value to train on, got {tuple(value.shape)}; {scalar}",
        )
        own, last = stages.each[axis.index], axis.index == axis.size - 1
        known = knowing_parts(optimizer, model)((x, target))
        updated_by = over_stages(known, axis, stages, tree.device_of((x, target)))
        programs = programs_of(
            own, loss if last else None, measure, updated_by, jit=jit, donate=donate
        )
        return _Plan(axis, keys, orders, stages, programs)

    def step(train_state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        check_kind(_NAME, train_state, TrainState, "the train state")
        transformed = "a pipeline's step communicates, and cannot be in jit, vmap or scan"
        require(not is_transformed(), f"{_NAME}: {transformed}; pass jit=True to it", TypeError)
        params, state, opt_state, key, count = train_state
        x, target = pair(_NAME, batch)
        parts = _parts((x, target), micro_batches)
        kind = kind_of((parts[0], params, state))
        if kind not in plans:
            plans[kind] = plan(*parts[0], params, state)
        own = plans[kind]
        scale = 1.0 if optimizer.loss_scale is None else optimizer.loss_scale(opt_state)
        step_key = fold_in(key, count) if model.takes_key else None
        grads, state, measured = own.run(params, parts, state, step_key, scale / micro_batches)
        params, opt_state = own.programs.update(grads, opt_state, params)
        values = finish(_stacked(measured), micro_batches > 1) if measured else None
        values = told_by_last(axis, values, own.known)
        return TrainState(params, state, opt_state, key, count + 1), values

    return step


def _parts(batch: Batch, count: int) -> list[Batch]:
    size = leading_extent(_NAME, batch, "a batch of tensors")
    wanted = f"{_NAME}: expects a batch of a multiple of {count} micro-batches"
    require(size and size % count == 0, f"{wanted}, got {size}")
    leaves, treedef = tree.flatten(batch)
    rows = [leaf.unflatten(0, (count, size // count)).unbind() for leaf in leaves]
    return [treedef.unflatten(each) for each in zip(*rows, strict=True)]


def _stacked(measured: list[Measured]) -> Measured:
    if len(measured) == 1:
        return measured[0]
    return tree.map(lambda *parts: torch.stack(parts), *measured)


class _Plan:
    """What this rank does in a step, for batches of one kind."""

    def __init__(
        self,
        axis: Axis,
        keys: tuple[str, str],
        schedule: Schedule,
        stages: Stages,
        programs: Programs,
    ) -> None:
        self.axis, self.index, self.keys = axis, axis.index, keys
        self.schedule, self.stages, self.programs = schedule, stages, programs
        self.own = stages.each[self.index]
        self.known: list[Any] = []

    def run(
        self, params: Params, parts: list[Batch], state: Params, key: Any, dvalue: Any
    ) -> tuple[Params, Params, list[Measured]]:
        """The gradients of all parts together, the new state, and what the last stage measured."""
        own, programs = self.own, self.programs
        first, last = self.index == 0, self.index == self.axis.size - 1
        device = tree.device_of(parts[0])
        inputs, cotangents = self._inboxes(device)
        before, after = self._places(self.index - 1), self._places(self.index + 1)
        next_stage = Outbox(self.keys[0], self.index + 1, after["F"])
        stage_before = Outbox(self.keys[1], self.index - 1, before["B"])
        indices = torch.arange(len(parts), device=device).unbind()
        grads: Params = tree.map(torch.zeros_like, params)
        pullbacks: dict[int, Pullbacks] = {}
        deferred: dict[int, Any] = {}
        # A stage before which nothing learns, and which has nothing to learn, needs no cotangents.
        goes_back = bool(own.params) or own.sends_dx
        measured: list[Measured] = []
        for kind, part in self.schedule[self.index]:
            if kind == "F":
                x, target = parts[part]
                if not first:
                    x = inputs.take(part)
                    stage_before.forget(before["F"][part])
                target = target if last else None
                index = indices[part] if len(parts) > 1 else None
                y, pullbacks[part], state, found = programs.forward(
                    params, x, target, state, key, index
                )
                if last:
                    measured.append(found)
                else:
                    next_stage.send(part, sent(y, False))
                del x, y
            elif not goes_back:
                pullbacks.pop(part, None)
            elif kind == "W":
                grads = programs.backward_params(deferred.pop(part), grads)
            else:
                dy = None
                if not last:
                    dy = cotangents.take(part)
                    next_stage.forget(after["B"][part])
                if kind == "BW":
                    grads, dx = programs.backward(pullbacks.pop(part), dy, dvalue, grads)
                else:
                    deferred[part], dx = programs.backward_input(pullbacks.pop(part), dy, dvalue)
                if own.sends_dx:
                    stage_before.send(part, sent(dx, False))
                del dy, dx
        grads = self._with_tied(grads)
        next_stage.finish()
        stage_before.finish()
        return grads, state, measured

    def _sends_dx(self, stage: int) -> bool:
        return self.stages.each[stage].sends_dx

    def _inboxes(self, device: torch.device) -> tuple[Any, Any]:
        """For the inputs and the cotangents of this stage, where there are any to come."""
        index, own, inputs, cotangents = self.index, self.own, None, None
        if index:
            order = self._places(index - 1)["F"]
            inputs = Inbox(self.keys[0], index - 1, order, own.x, False, device)
        if index + 1 < self.axis.size and self._sends_dx(index + 1):
            order = self._places(index + 1)["B"]
            cotangents = Inbox(self.keys[1], index + 1, order, own.y, True, device)
        return inputs, cotangents

    def _places(self, stage: int) -> dict[str, dict[int, int]]:
        """Where among a stage's actions each micro-batch's passes are, in their order."""
        places: dict[str, dict[int, int]] = {"F": {}, "B": {}, "W": {}}
        if 0 <= stage < self.axis.size:
            for place, (kind, part) in enumerate(self.schedule[stage]):
                places[kind[0]][part] = place
        return places

    def _with_tied(self, grads: Params) -> Params:
        """The gradients, where those of leaves that other stages have too are summed."""
        flat = tree.to_dotted(grads)
        for stages in dict.fromkeys(self.stages.tied.values()):
            if self.index in stages:
                paths = [path for path, where in self.stages.tied.items() if where == stages]
                totals = summed(self.keys, self.index, stages, [flat[path] for path in paths])
                flat |= dict(zip(paths, totals, strict=True))
        return tree.from_dotted(flat)
