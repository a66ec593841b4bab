"""What a layout takes of memory, network and time, found on the meta device before it is run."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from funcnet import tree
from funcnet.checks import check_kind
from funcnet.core import Box, Layer, Loss, Optimizer, Tree
from funcnet.distributed.planning.networks import Device, Network
from funcnet.distributed.planning.passes import Passes, meta_key, of_copies, passes_of
from funcnet.distributed.planning.tables import plan_table
from funcnet.distributed.planning.traffic import Traffic, merged, recorded, seconds
from funcnet.distributed.processes.start import Mesh, axis_of
from funcnet.errors import check_count, located, require
from funcnet.optimizers.lift import step_params
from funcnet.optimizers.over_ranks import knowing_parts


class Waits(NamedTuple):
    """What a schedule of a pipeline costs.

    With p stages, m micro-batches, stage s, and per micro-batch the seconds f of a forward pass
    and b of a backward pass, of which w are those of the gradients of params.
    """

    held: Callable[[int, int, int], int]
    """``(p, m, s)``: how many micro-batches a stage holds the residuals of, at most."""

    bubble: Callable[[int, float, float, float], float]
    """``(p, f, b, w)``: the seconds in which a stage waits for others."""


SCHEDULES = {
    "gpipe": Waits(lambda p, m, s: m, lambda p, f, b, w: (p - 1) * (f + b)),
    "one_f_one_b": Waits(lambda p, m, s: min(m, p - s), lambda p, f, b, w: (p - 1) * (f + b)),
    "zero_bubble": Waits(
        lambda p, m, s: min(m, p), lambda p, f, b, w: (p - 1) * max(0.0, f + b - 2 * w)
    ),
}
"""GPipe, Huang et al. 2019; 1F1B, Narayanan et al. 2019; ZB-H1, Qi et al. 2023, Table 1, where the
backward pass without w is called b."""


class Memory(NamedTuple):
    """The bytes that a rank holds."""

    params: int
    gradients: int
    optimizer: int
    state: int
    """Of layers, such as running statistics."""

    residuals: int
    """Of all micro-batches in flight, those of the loss included."""

    buffers: int
    """What the largest collective reads and makes."""

    @property
    def peak(self) -> int:
        """Their sum: at most so much, but for the temporaries of single operators.

        It is that of a step that updates params in place, as a compiled one with donated state
        does. In a step of a single micro-batch gradients come while residuals go.
        """
        return sum(self)


class Stage(NamedTuple):
    """What a rank of a stage of the pipeline has, computes and communicates in a step."""

    memory: Memory
    forward_flops: int
    """Of one micro-batch."""

    backward_flops: int
    """Of one micro-batch."""

    weight_flops: int
    """Those of the backward pass that are for the gradients of params."""

    forward: tuple[Traffic, ...]
    """Of one micro-batch."""

    backward: tuple[Traffic, ...]
    """Of one micro-batch."""

    update: tuple[Traffic, ...]
    """Of the optimizer, once a step."""


class Plan(NamedTuple):
    """What a layout takes; it prints as a table."""

    mesh: Mapping[str, int]
    schedule: str
    micro_batches: int
    stages: tuple[Stage, ...]
    """One for each rank of the axis "pipe"."""

    times: Mapping[str, float]
    """The seconds of a step's parts on the slowest stage: "compute", the names of axes for their
    communication, "update" and "bubble"."""

    utilization: float
    """The FLOPs of a step over those that all devices could do in its time."""

    @property
    def ranks(self) -> int:
        """How many."""
        total = 1
        for size in self.mesh.values():
            total *= size
        return total

    @property
    def memory(self) -> Memory:
        """That of the stage with the most."""
        return max([stage.memory for stage in self.stages], key=lambda memory: memory.peak)

    @property
    def traffic(self) -> tuple[Traffic, ...]:
        """The collectives of a step, of the rank that sends the most."""
        return max([self.traffic_of(stage) for stage in self.stages], key=_sent)

    def traffic_of(self, stage: Stage) -> tuple[Traffic, ...]:
        """The collectives of a step of a stage."""
        return merged(*[stage.forward, stage.backward] * self.micro_batches, stage.update)

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.times.values())

    @property
    def bubble(self) -> float:
        """The part of a step in which a rank waits for other stages."""
        return self.times["bubble"] / self.seconds if self.seconds else 0.0

    def __repr__(self) -> str:
        return plan_table(self)


def plan(
    model: Layer | Sequence[Layer],
    x: Tree,
    mesh: Mesh,
    *,
    loss: Loss | None = None,
    target: Tree = None,
    optimizer: Optimizer | None = None,
    micro_batches: int = 1,
    schedule: str = "one_f_one_b",
    overlap: Collection[str] = (),
    network: Network | None = None,
    device: Device | None = None,
) -> Plan:
    """The memory of a rank, what it communicates, and the time of a step, without running it.

    The layers, the loss and the optimizer are run on meta tensors. Sizes are those of their params,
    gradients, state and residuals, as in `funcnet.summary`; the collectives are those that they
    call, so a plan does not disagree with them. The time is a model of it::

        micro_batches * (compute + communication) + bubble + update
        compute        FLOPs / (device.flops * device.utilization)
        communication  rounds * alpha + bytes sent * beta, by collective and axis
        update         bytes of params, gradients and optimizer, read and written, / bandwidth

    where a collective goes round a ring of n ranks: a sum of B bytes sends 2 (n - 1) / n B in
    2 (n - 1) rounds, a gather, and a sum of parts, half of it.

    Args:
        model: what a rank runs, of layers made for the mesh; for a mesh with the axis "pipe", a
            sequence of its stages, in which equal ones may be the same object.
        x: an example of the whole batch of a step, of which only shapes and dtypes matter. A rank
            has its part over "data", in so many micro-batches.
        mesh: a mesh, or the sizes of its axes in the order of ranks, the slowest first.
        loss, target: of the prediction; without a loss the backward pass begins with the output.
        optimizer: with its transforms that communicate.
        micro_batches: into how many parts a rank's batch is cut.
        schedule: of the pipeline: "gpipe", "one_f_one_b" or "zero_bubble".
        overlap: names of axes whose collectives in layers go on beside computation, so that only
            what takes longer than it counts.
        network, device: what it would run on; default `Network.h100` and `Device.h100`.

    Returns:
        A `Plan`.
    Raises:
        ValueError: ranks do not divide the batch; another number of stages than ranks of "pipe".

    Source: Narayanan et al. 2021, Efficient large-scale language model training on GPU clusters.

    >>> import funcnet as fn
    >>> net = fn.serial(fn.linear(4096), fn.relu(), fn.linear(4096))
    >>> plan(net, torch.ones(64, 1024), {"data": 8}, optimizer=fn.adam())
    data=8, 1 micro-batch
    <BLANKLINE>
    stage   params  gradients  optimizer  state  residuals  buffers    peak
    -----  -------  ---------  ---------  -----  ---------  -------  ------
    0      83.9 MB    83.9 MB     168 MB      0     164 kB        0  336 MB
    <BLANKLINE>
    a step     time   part
    -------  ------  -----
    compute  1.9 us   1.1%
    update   175 us  98.9%
    bubble        0   0.0%
    all      177 us
    <BLANKLINE>
    0.5% of the FLOPs of 8 devices
    """
    network, device = network or Network.h100(), device or Device.h100()
    sizes = _sizes(mesh)
    check_count("plan", micro_batches=micro_batches)
    require(
        schedule in SCHEDULES,
        f"plan: schedule must be one of {sorted(SCHEDULES)}, got {schedule!r}",
    )
    for axis in overlap:
        require(axis in sizes, f"plan: overlap: there is no axis {axis!r} in {sizes}")
    stages = _stages(model, sizes.get("pipe", 1))
    examples = _micro_batch(x, sizes.get("data", 1), micro_batches, "x")
    targets = _micro_batch(target, sizes.get("data", 1), micro_batches, "target")
    found: list[Stage] = []
    known: dict[tuple[int, int, str], tuple[Stage, Any]] = {}
    for number, layer in enumerate(stages):
        is_last = number == len(stages) - 1
        held = SCHEDULES[schedule].held(len(stages), micro_batches, number)
        name = id(layer), (number == 0) + 2 * is_last, str(tree.describe(examples))
        if name not in known:
            with located(f"plan: stage {number}:" if len(stages) > 1 else "plan:"):
                known[name] = _figures(
                    layer,
                    examples,
                    (loss, targets) if is_last else (None, None),
                    optimizer,
                    sizes,
                    is_first=number == 0,
                    splits=schedule == "zero_bubble",
                )
        stage, y = known[name]
        sends = len(stages) > 1
        memory = stage.memory._replace(residuals=held * stage.memory.residuals)
        forward = _sent_on(y, sizes) if sends and not is_last else ()
        backward = _sent_on(examples, sizes) if sends and number else ()
        found.append(
            stage._replace(
                memory=memory, forward=stage.forward + forward, backward=stage.backward + backward
            )
        )
        examples = y
    made = Plan(sizes, schedule, micro_batches, tuple(found), {}, 0.0)
    times = _times(made, overlap, network, device)
    work = sum([each.forward_flops + each.backward_flops for each in found]) * micro_batches
    possible = made.ranks // len(found) and device.flops * sum(times.values()) * len(found)
    return made._replace(times=times, utilization=work / possible if possible else 0.0)


def _sizes(mesh: Mesh) -> dict[str, int]:
    """The sizes of a mesh's axes, by name."""
    axis_of(mesh, "data")  # its error for what is no mesh
    if isinstance(mesh, DeviceMesh):
        return {name: mesh[name].size() for name in mesh.mesh_dim_names or ()}
    check_count("plan", **mesh)
    return {**mesh}


def _stages(model: Any, count: int) -> tuple[Layer, ...]:
    stages = (model,) if isinstance(model, Layer) else tuple(model)
    for each in stages:
        check_kind("plan", each, Layer, "model")
    require(
        len(stages) == count,
        f"plan: expects {count} stages, one for each rank of 'pipe', got {len(stages)}",
    )
    return stages


def _micro_batch(batch: Tree, ranks: int, parts: int, what: str) -> Tree:
    """A micro-batch of a rank, on the meta device."""

    def cut(leaf: torch.Tensor) -> torch.Tensor:
        extent = leaf.shape[0] if leaf.dim() else 0
        require(
            extent and extent % (ranks * parts) == 0,
            f"plan: {what}: {ranks} ranks of 'data' times {parts} micro-batches do not divide "
            f"{tree.describe(leaf)}",
        )
        return leaf.new_empty((extent // (ranks * parts), *leaf.shape[1:]), device="meta")

    return tree.map(cut, batch)


def _sent_on(x: Tree, sizes: Mapping[str, int]) -> tuple[Traffic, ...]:
    """What goes to the next stage, or its gradient back."""
    moved = [leaf for leaf in tree.leaves(x) if leaf.is_floating_point()]
    return (Traffic("send", "pipe", sizes["pipe"], len(moved), tree.bytes(moved)),)


def _figures(
    layer: Layer,
    x: Tree,
    judged: tuple[Loss | None, Tree],
    optimizer: Optimizer | None,
    sizes: Mapping[str, int],
    *,
    is_first: bool,
    splits: bool,
) -> tuple[Stage, Tree]:
    """What one micro-batch takes of a stage, by running it on the meta device; and its output."""
    params, state = layer.init(meta_key(), x)

    def run(layer: Layer) -> Passes:
        return passes_of(layer, x, judged, sizes, is_first=is_first, splits=splits)

    found, held = of_copies(run, layer), 0
    if optimizer is not None:
        optimizer = knowing_parts(optimizer, layer)((x, None))
    with recorded(sizes) as update:
        if optimizer is not None:
            opt_state = optimizer.init_state(params)
            held = tree.bytes(opt_state)
            step_params(optimizer, Box([tree.map(torch.empty_like, params)]), opt_state, params)
    memory = Memory(
        params=tree.bytes(params),
        gradients=tree.bytes(params),
        optimizer=held,
        state=tree.bytes(state),
        residuals=found.residuals,
        buffers=max(found.largest, update.largest),
    )
    flops = found.forward_flops, found.backward_flops, found.weight_flops
    return Stage(memory, *flops, found.forward, found.backward, update.traffic()), found.y


def _sent(traffic: tuple[Traffic, ...]) -> int:
    return sum([each.sent for each in traffic])


def _times(
    plan: Plan, overlap: Collection[str], network: Network, device: Device
) -> dict[str, float]:
    """The seconds of a step's parts, by the slowest stage."""
    rate = device.flops * device.utilization

    def passed(flops: int, traffic: tuple[Traffic, ...]) -> dict[str, float]:
        """Of one pass: what is computed, and what is communicated beyond that."""
        parts = {"compute": flops / rate}
        for axis, time in seconds(traffic, plan.mesh, network).items():
            parts[axis] = max(0.0, time - parts["compute"]) if axis in overlap else time
        return parts

    slowest: dict[str, float] = {}
    for stage in plan.stages:
        forward = passed(stage.forward_flops, stage.forward)
        backward = passed(stage.backward_flops, stage.backward)
        after = seconds(stage.update, plan.mesh, network)
        held = stage.memory
        moved = 2 * (held.params + held.optimizer) + held.gradients
        names = dict.fromkeys([*forward, *backward, *after])
        times = {
            name: plan.micro_batches * (forward.get(name, 0.0) + backward.get(name, 0.0))
            + after.get(name, 0.0)
            for name in names
        }
        times["update"] = moved / device.bandwidth if held.optimizer or stage.update else 0.0
        times["bubble"] = SCHEDULES[plan.schedule].bubble(
            len(plan.stages),
            sum(forward.values()),
            sum(backward.values()),
            stage.weight_flops / rate,
        )
        if sum(times.values()) > sum(slowest.values()):
            slowest = times
    return slowest
