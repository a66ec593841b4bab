"""A plan of abstract meshes beside what processes count and hold in a step."""

from collections import Counter

import pytest
import torch

import funcnet as fn
from funcnet import messages, tree
from funcnet.collectives import Split
from funcnet.core import Pullback
from funcnet.distributed import Device, Link, Network, plan, plans
from funcnet.distributed.planning.planned import SCHEDULES
from funcnet.lift import stateless as layer
from funcnet.optimizers.leaves import leafwise

BATCH, WIDTH = 16, 12


def summed_backward(axis):
    """The identity, whose cotangent is summed: what is before it is on all ranks."""
    return layer(
        lambda key, x: {},
        lambda params, x: x,
        lambda params, x: (x, Pullback(_sum_cotangent, {}, (axis,))),
        name="summed_backward",
    )


def _sum_cotangent(residuals, dy, axis, *, params, x):
    return {} if params else None, axis.sum(dy) if x else None


def summed_forward(axis):
    """The sum of ranks, whose cotangent all ranks have."""
    return layer(
        lambda key, x: {},
        lambda params, x: axis.sum(x),
        lambda params, x: (axis.sum(x), Pullback(_same_cotangent, {})),
        name="summed_forward",
    )


def _same_cotangent(residuals, dy, *, params, x):
    return {} if params else None, dy if x else None


def mlp(mesh, copies=2):
    axis = fn.distributed.axis_of(mesh, "model")
    block = fn.serial(
        summed_backward(axis),
        fn.linear(4 * WIDTH // axis.size),
        fn.gelu(),
        fn.linear(WIDTH),
        summed_forward(axis),
    )
    return fn.serial(fn.linear(WIDTH), *[fn.residual(block)] * copies, fn.linear(3))


def mean(mesh):
    axis = fn.distributed.axis_of(mesh, "data")
    return fn.optimizers.stateless(
        lambda g, p: leafwise(axis.mean, g), name="mean", elementwise=True
    )


def in_pieces(mesh):
    """Adam on a rank's piece of each leaf, as plain functions."""
    axis, inner = fn.distributed.axis_of(mesh, "data"), fn.adam()

    def pieces(params, function):
        return tree.map(lambda p: function(Split(axis, tuple(p.shape)), p), params)

    def init_state(params):
        return inner.init_state(pieces(params, lambda split, p: split.part(p)))

    def update(grads, opt_state, params):
        own = pieces(params, lambda split, p: split.part(p))
        grads = pieces(grads, lambda split, g: split.sum(g) / axis.size)
        updates, opt_state = inner.update(grads, opt_state, own)
        whole = tree.map(lambda p, u: Split(axis, tuple(p.shape)).whole(u), params, updates)
        return whole, opt_state

    return fn.Optimizer(init_state, update, name="in_pieces")


def of_parts(mesh):
    """Layers of the library whose params are parts over one axis or the other."""
    d = fn.distributed
    parted = fn.serial(d.column_linear(4 * WIDTH, mesh), fn.gelu(), d.row_linear(WIDTH, mesh))
    return fn.serial(d.sharded(fn.linear(WIDTH), mesh), fn.residual(parted), fn.linear(3))


def clipped(mesh):
    clip = fn.optimizers.clip_by_global_norm(1.0)
    return fn.chain(fn.distributed.mean(mesh), clip, fn.adam())


def zero(mesh):
    return fn.distributed.zero(fn.adam(), mesh)


# Each with the model that it is for.
OPTIMIZERS = {
    "mean": (mlp, lambda mesh: fn.chain(mean(mesh), fn.adam())),
    "pieces": (mlp, in_pieces),
    "zero": (mlp, zero),
    "parts": (of_parts, clipped),
}

COUNTED = {
    "start_all_reduce": ("all_reduce", 0),
    "start_all_gather": ("all_gather", 1),
    "start_reduce_scatter": ("reduce_scatter", 0),
}


def counting(counts):
    """The exchanges that ranks start, each of which adds its bytes."""

    def counted(name, kind, place, function):
        def call(*args, **options):
            counts[kind, "calls"] += 1
            counts[kind, "bytes"] += tree.bytes(args[place])
            return function(*args, **options)

        return call

    return {
        name: counted(name, kind, place, getattr(messages, name))
        for name, (kind, place) in COUNTED.items()
    }


def own_bytes(kept, others):
    known = {leaf.untyped_storage().data_ptr() for leaf in tree.leaves(others)}
    found = {leaf.untyped_storage().data_ptr(): leaf for leaf in tree.leaves(kept)}
    return sum(leaf.untyped_storage().nbytes() for each, leaf in found.items() if each not in known)


def measured(sizes, optimizer_name, micro_batches):
    """What a rank sends in a step and holds, counted where it is sent."""
    mesh = fn.distributed.mesh(**sizes)
    model, optimizer = [make(mesh) for make in OPTIMIZERS[optimizer_name]]
    loss, part = fn.mse(), BATCH // sizes["data"]
    x, target = torch.ones(part, WIDTH), torch.ones(part, 3)
    start = fn.init_train_state(model, optimizer, fn.key(0), x)
    step = fn.train_step(model, loss, optimizer, micro_batches=micro_batches)
    counts = Counter()
    replaced = counting(counts)
    kept = {name: getattr(messages, name) for name in replaced}
    for name, function in replaced.items():
        setattr(messages, name, function)
    try:
        state, _ = step(start, (x, target))
    finally:
        for name, function in kept.items():
            setattr(messages, name, function)
    micro = slice(part // micro_batches)  # copied, or they would have the storage of all
    one, wanted = x[micro].clone(), target[micro].clone()
    y, pullback, _ = model.vjp(start.params, one)
    _, loss_pullback = loss.vjp(y, wanted)
    grads, _ = pullback(loss_pullback(), x=False)
    residuals = own_bytes(pullback, start.params) + own_bytes(
        loss_pullback, (start.params, pullback, wanted)
    )
    held = {
        "params": own_bytes(state.params, ()),
        "gradients": own_bytes(grads, ()),
        "optimizer": own_bytes(state.opt_state, ()),
        "residuals": residuals,
    }
    return dict(counts), held


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_bytes_and_memory_are_those_of_processes(ranks, optimizer, micro_batches):
    layouts = [(ranks.size, 1), (1, ranks.size), *([(2, 2)] if ranks.size == 4 else [])]
    for data, model in layouts:
        sizes = {"pipe": 1, "data": data, "model": model}
        planned, planned_optimizer = [make(sizes) for make in OPTIMIZERS[optimizer]]
        found = plan(
            planned,
            torch.ones(BATCH, WIDTH),
            sizes,
            loss=fn.mse(),
            target=torch.ones(BATCH, 3),
            optimizer=planned_optimizer,
            micro_batches=micro_batches,
        )
        counts = Counter()
        for each in found.traffic:
            counts[each.kind, "calls"] += each.calls
            counts[each.kind, "bytes"] += each.bytes
        memory = {name: getattr(found.memory, name) for name in found.memory._fields}
        for counted, held in ranks(measured, sizes, optimizer, micro_batches):
            assert counted == dict(counts), sizes
            # Params that were gathered have zeros at their end.
            planned_memory = {name: memory[name] for name in held}
            assert held == pytest.approx(planned_memory, rel=1e-3), sizes


def line(stages, **options):
    return plan(
        [fn.linear(WIDTH)] * stages,
        torch.ones(BATCH, WIDTH),
        {"pipe": stages},
        micro_batches=8,
        device=Device(memory=1e9, flops=1e6, utilization=1.0),
        network=Network(8, Link(0.0, 0.0), Link(0.0, 0.0)),
        **options,
    )


@pytest.mark.parametrize(
    ("schedule", "bubble", "held"),
    [
        ("gpipe", 3 * 3, [8, 8, 8, 8]),
        ("one_f_one_b", 3 * 3, [4, 3, 2, 1]),
        ("zero_bubble", 3 * 1, [4, 4, 4, 4]),
    ],
)
def test_a_pipeline_waits_and_holds_by_its_schedule(schedule, bubble, held):
    found = line(4, schedule=schedule)
    forward = found.stages[1].forward_flops / 1e6
    assert found.times["bubble"] == pytest.approx(bubble * forward)
    assert found.times["compute"] == pytest.approx(8 * 3 * forward)
    residuals = [stage.memory.residuals for stage in found.stages]
    one = BATCH // 8 * WIDTH * 4
    assert residuals == [count * one for count in held]


def test_stages_send_activations_on_and_gradients_back():
    found = line(3)
    one = BATCH * WIDTH * 4
    sent = [sum(each.sent for each in found.traffic_of(stage)) for stage in found.stages]
    assert sent == [one, 2 * one, one]


def test_the_slowest_link_counts_and_cards_are_shared():
    network = Network(8, Link(1e-6, 1e-11), Link(1e-5, 1e-9))
    mesh = {"pipe": 2, "data": 4, "model": 4}
    assert network.link(mesh, "model") == network.inside
    assert network.link(mesh, "data") == Link(1e-5, 1e-9 / 2)
    assert network.link(mesh, "pipe") == network.between
    assert network.link({"data": 64}, "data") == Link(1e-5, 1e-9 / 8)


def test_time_is_rounds_times_alpha_and_bytes_times_beta():
    found = plan(
        mlp({"data": 4}),
        torch.ones(BATCH, WIDTH),
        {"data": 4},
        optimizer=fn.chain(mean({"data": 4}), fn.adam()),
        network=Network(8, Link(1.0, 0.5), Link(0.0, 0.0)),
    )
    leaves = 12
    assert found.traffic[0].calls == leaves
    expected = leaves * 6 * 1.0 + 0.5 * found.memory.params * 6 / 4
    assert found.times["data"] == pytest.approx(expected)


def test_layouts_are_all_there_and_those_that_fit_come_first():
    x = torch.ones(64, WIDTH, device="meta")

    def make(mesh, sharding):
        if mesh["pipe"] > 2:
            raise ValueError("it has two stages")
        _, optimizer = OPTIMIZERS["pieces" if sharding == "zero" else "mean"]
        optimizer = optimizer(mesh)
        return {"model": [mlp(mesh, 1)] * mesh["pipe"], "optimizer": optimizer}

    def peaks(found):
        return [each.plan.memory.peak for each in found.layouts]

    def make_one(mesh, sharding):
        return {**make(mesh, sharding), "model": mlp(mesh, 2)}

    found = plans(make_one, x, 4, sharding=["none", "zero"], device=Device(memory=3e4, flops=1e9))
    meshes = [(each.plan.mesh["data"], each.plan.mesh["model"]) for each in found.layouts]
    assert sorted(meshes) == [(1, 4), (2, 2), (2, 2), (4, 1), (4, 1)]
    assert [each.fits for each in found.layouts] == sorted(
        [peak <= 3e4 for peak in peaks(found)], reverse=True
    )
    assert any("expects 2 stages" in line for line in found.left_out)
    with pytest.raises(ValueError, match="plans: there is no layout"):
        plans(make, x[:0], 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(15, WIDTH)}, "x: 4 ranks of 'data' times 2 micro-batches do not divide"),
        ({"model": [fn.linear(3)] * 2}, "expects 1 stages, one for each rank of 'pipe', got 2"),
        ({"schedule": "interleaved"}, "schedule must be one of"),
        ({"micro_batches": 0}, "micro_batches must be an integer >= 1"),
        ({"mesh": {"data": 0}}, "data must be an integer >= 1"),
        ({"overlap": ["model"], "mesh": {"data": 4}}, "overlap: there is no axis 'model'"),
    ],
)
def test_what_cannot_be_planned_is_an_error(change, message):
    given = {
        "model": fn.linear(3),
        "x": torch.ones(16, WIDTH),
        "mesh": {"data": 4},
        "micro_batches": 2,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        plan(given.pop("model"), given.pop("x"), given.pop("mesh"), **given)


def test_copies_of_a_repeat_are_counted_without_being_run():
    mesh = {"data": 2, "model": 2}
    x = torch.ones(BATCH, WIDTH, device="meta")

    def found(*blocks):
        net = fn.serial(fn.linear(WIDTH), *blocks, fn.linear(3))
        made = plan(net, x, mesh, optimizer=fn.adam(), schedule="zero_bubble")
        (stage,) = made.stages
        return stage.memory, *stage[1:4], {each[:2]: each[2:] for each in made.traffic}

    block = mlp(mesh, 1).children["1"]
    assert found(fn.repeat(block, 5), fn.repeat(block, 2)) == found(*[block] * 7)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stages", [2, 4])
def test_a_schedule_costs_what_its_simulation_does(schedule, stages):
    made = getattr(fn.distributed, schedule)(stages, 8)
    found, costs = fn.distributed.simulate(made), SCHEDULES[schedule]
    assert max(found.idle) == costs.bubble(stages, 1.0, 2.0, 1.0)
    assert found.held == tuple([costs.held(stages, 8, stage) for stage in range(stages)])
