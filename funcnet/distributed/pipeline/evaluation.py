"""The evaluation of a pipelined model: forward passes alone, from stage to stage."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.collectives import Axis
from funcnet.core import Layer, Loss, Params, TrainState, Tree
from funcnet.data import on_device
from funcnet.distributed.pipeline.stages import (
    Boundaries,
    Kinds,
    Stage,
    kind_of,
    kinds_of,
    stages_of,
)
from funcnet.distributed.pipeline.transport import (
    Inbox,
    Outbox,
    own_device,
    sent,
    told_by_all,
    told_by_last,
)
from funcnet.distributed.processes.start import Mesh, axis_of
from funcnet.errors import require
from funcnet.evaluation import Evaluation, evaluated_params, measured_over_batches, pairs_on
from funcnet.metrics.core import Metric
from funcnet.metrics.means import examples_of
from funcnet.runtime import is_transformed
from funcnet.transforms.jit import jit as compiled

_NAME = "pipeline_evaluate"


def pipeline_evaluate(
    model: Layer,
    loss: Loss,
    metrics: Mapping[str, Metric | Loss | Callable[[Tree, Tree], Tensor]] | None,
    batches: Iterable[Any],
    mesh: Mesh,
    *,
    boundaries: Boundaries | None = None,
    averaged: bool = False,
    jit: bool = False,
) -> Evaluation:
    """`funcnet.evaluate` of a model whose layers are on several ranks, as in `pipeline_step`.

    The batches go from stage to stage one after another, so that stages work at the same time on
    different ones: have at least as many as there are stages, better several times as many.
    Nothing is kept for a backward pass. The values are those of `funcnet.evaluate` in a single
    process, on all ranks.

    Args:
        model, mesh, boundaries: as for `pipeline_step`.
        loss, metrics: as for `funcnet.evaluate`; the last stage computes them.
        batches: as for `funcnet.evaluate`, and the same on all stages, of which the first one reads
            x and the last one the target. They may have different numbers of examples.
        averaged: as for `funcnet.evaluate`.
        jit: whether to compile what a stage computes for a batch. The evaluation itself, which
            communicates, is not to be compiled.

    Returns:
        A function of the train state, of `pipeline_state` or a step, that gives a dict of tensors.
        All ranks call it.

    Raises:
        TypeError: the batches can be gone over only once.
        ValueError: there are no batches, one is no pair, or the train state is of other stages.
        PeerError: another rank failed.

    >>> import funcnet as fn
    >>> from funcnet.distributed import pipeline_state
    >>> net, mesh = fn.serial(fn.linear(8), fn.tanh(), fn.linear(2)), {"pipe": 1}
    >>> x, target = torch.ones(4, 3), torch.zeros(4, 2)
    >>> state = pipeline_state(net, fn.adam(), fn.key(0), x, mesh)
    >>> evaluation = pipeline_evaluate(net, fn.mse(), None, [(x, target)], mesh)
    >>> list(evaluation(state))
    ['loss']
    """
    measures = measured_over_batches(_NAME, model, loss, metrics, batches)
    axis = axis_of(mesh, "pipe")
    first, last = axis.index == 0, axis.index == axis.size - 1
    kinds: dict[Any, tuple[Stage, Callable[..., Tree]]] = {}

    def stage_of(x: Tree, target: Tree, given: Any) -> tuple[Stage, Callable[..., Tree]]:
        """This rank's stage for batches of a kind, and its forward pass."""
        kind = kind_of((x, target)), repr(given)
        if kind not in kinds:
            stages = stages_of(_NAME, model, x, axis.size, boundaries, given)
            loss.apply(stages.each[-1].y, tree.to_meta(target))
            own = stages.each[axis.index]

            def forward(params: Params, state: Params, x: Tree) -> Tree:
                return own.layer.apply(params, x, state, train=False)[0]

            kinds[kind] = own, compiled(forward) if jit else forward
        return kinds[kind]

    def add(accs: Any, prediction: Tree, target: Tree, examples: int) -> Any:
        return {
            name: part.update(accs[name], prediction, target, examples)
            for name, part in measures.items()
        }

    add_to: Callable[..., Any] = compiled(add, static=3) if jit else add

    def evaluation(train_state: TrainState) -> dict[str, Tensor]:
        params, state = evaluated_params(_NAME, train_state, averaged), train_state.state
        alone = "a pipeline's evaluation communicates, and cannot be in jit, vmap or scan"
        require(not is_transformed(), f"{_NAME}: {alone}; pass jit=True to it", TypeError)
        given, device = _agreed(axis, params, state, batches)
        numbers: dict[int, int] = {}
        next_stage = Outbox(axis.key, axis.index + 1, numbers)
        accs: Any = None
        for number, (x, target) in enumerate(pairs_on(_NAME, on_device(device), batches)):
            own, forward = stage_of(x, target, given)
            examples, numbers[number] = examples_of(x), number
            if not first:
                inbox = Inbox(axis.key, axis.index - 1, [number], own.x, False, device)
                x = inbox.take(number)
            y = forward(params, state, x)
            if last:
                if accs is None:
                    accs = {name: part.init(device) for name, part in measures.items()}
                accs = add_to(accs, y, target, examples)
            else:
                next_stage.send(number, sent(y, False))
                # At most two batches wait to be received.
                next_stage.forget(number - 1)
        next_stage.finish()
        require(numbers, f"{_NAME}: expects at least one batch, got none")
        values = accs and {name: part.value(accs[name]) for name, part in measures.items()}
        return told_by_last(axis, values, [])

    return evaluation


def _agreed(
    axis: Axis, params: Params, state: Params, batches: Any
) -> tuple[list[tuple[Kinds, Kinds]], torch.device]:
    """The kinds of the params and state of all stages, and this rank's device.

    A stage without params is on the same kind of device as the others.
    """
    device = next((leaf.device for leaf in tree.leaves(params)), None)
    count = len(batches) if hasattr(batches, "__len__") else None
    told = told_by_all(axis, ((kinds_of(params), kinds_of(state)), device, count))
    counts = [each for _, _, each in told]
    same = f"{_NAME}: expects the same batches on all stages, whose numbers are {counts}"
    require(len({*counts}) == 1, same)
    devices = [own_device(each) for _, each, _ in told if each is not None]
    return [kinds for kinds, _, _ in told], device or (*devices, torch.device("cpu"))[0]
