"""Pipelines on several ranks: each schedule gives the numbers of a single process."""

from functools import partial

import pytest
import torch

import funcnet as fn
from funcnet.distributed import Action, gpipe, one_f_one_b, zero_bubble

STEPS, ROWS = 5, 8


def mixed(stages, micro_batches):
    """One's own schedule: 1F1B, where the backward passes of odd micro-batches are split."""

    def split(action):
        if action.kind == "BW" and action.micro_batch % 2:
            return [Action("B", action.micro_batch), Action("W", action.micro_batch)]
        return [action]

    return [
        [each for action in row for each in split(action)]
        for row in one_f_one_b(stages, micro_batches)
    ]


SCHEDULES = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "zb-h1": zero_bubble,
    "zb-h2": partial(zero_bubble, held=7),
    "mixed": mixed,
}


def mlp():
    return fn.serial(
        fn.linear(6),
        fn.batch_norm(),
        fn.tanh(),
        fn.linear(5),
        fn.dropout(0.3),
        fn.tanh(),
        fn.linear(4),
        fn.linear(3),
    )


def tied():
    net = fn.serial(
        embed=fn.embedding(7, 4),
        hidden=fn.residual(fn.serial(fn.linear(4), fn.tanh())),
        other=fn.linear(4),
        head=fn.linear(7, bias=False),
    )
    return fn.tie(net, {"head.weight": "embed.weight"})


def pair_of():
    """Values between the layers are a dict with a tensor of integers."""

    def split(x):
        return {"value": x, "index": (x[:, 0] > 0).long()}

    def chosen(x):
        return x["value"] * (1.0 + x["index"].double()).unsqueeze(1)

    def both(name, function, backward):
        return fn.core.Layer(
            lambda key, x: ({}, {}),
            lambda params, x, state={}, *, key=None, train=False: (function(x), {}),
            lambda params, x, state={}, *, key=None, train=True: (
                function(x),
                fn.core.Pullback(backward, {"x": x}),
                {},
            ),
            name=name,
            takes_key=False,
        )

    return fn.serial(
        fn.linear(4),
        both("split", split, split_rule),
        both("chosen", chosen, chosen_rule),
        fn.linear(3),
    )


def split_rule(residuals, dy, *, params, x):
    return {} if params else None, dy["value"] if x else None


def chosen_rule(residuals, dy, *, params, x):
    scale = 1.0 + residuals["x"]["index"].double()
    return {} if params else None, {"value": dy * scale.unsqueeze(1), "index": None} if x else None


MODELS = {"mlp": mlp, "tied": tied, "pair": pair_of}


def batch_of(model, step):
    key = fn.random.fold_in(fn.key(7), step)
    if model == "tied":
        x = fn.random.randint(key, (ROWS,), 0, 7)
        return x, fn.random.randint(fn.random.fold_in(key, 1), (ROWS,), 0, 7)
    x = fn.random.normal(key, (ROWS, 5), torch.float64)
    return x, fn.random.normal(fn.random.fold_in(key, 1), (ROWS, 3), torch.float64)


def parts(model, clip=False):
    # So large an eps that the noise of a gradient that is zero, of a bias before a batch norm,
    # is not made large, and that the scale of gradients shows, which clipping changes.
    optimizer = fn.adam(0.05, eps=0.1)
    if clip:
        optimizer = fn.chain(fn.optimizers.clip_by_global_norm(0.1), optimizer)
    loss = fn.cross_entropy() if model == "tied" else fn.mse()
    return MODELS[model](), loss, optimizer


def double(params):
    return fn.tree.map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, params)


def started(model, make, net, optimizer, *mesh, **options):
    x, _ = batch_of(model, 0)
    start = make(net, optimizer, fn.key(3), x, *mesh, **options)
    params = double(start.params)
    return start._replace(params=params, opt_state=optimizer.init_state(params))


def absolute(prediction, target):
    return (prediction - target).abs().mean()


def metrics_of(wanted):
    return {"absolute": absolute, "r2": fn.metrics.r2()} if wanted else None


def alone(model, micro_batches, clip=False, metrics=False):
    net, loss, optimizer = parts(model, clip)
    state = started(model, fn.init_train_state, net, optimizer)
    step = fn.train_step(
        net, loss, optimizer, micro_batches=micro_batches, metrics=metrics_of(metrics)
    )
    found = []
    for index in range(STEPS):
        state, measured = step(state, batch_of(model, index))
        found.append(measured)
    return state, found


def piped(model, micro_batches, clip=False, schedule="1f1b", jit=False, metrics=False, **options):
    net, loss, optimizer = parts(model, clip)
    mesh = fn.distributed.mesh(data=1, pipe=torch.distributed.get_world_size())
    state = started(model, fn.distributed.pipeline_state, net, optimizer, mesh, **options)
    step = fn.distributed.pipeline_step(
        net,
        loss,
        optimizer,
        mesh,
        schedule=SCHEDULES[schedule],
        micro_batches=micro_batches,
        metrics=metrics_of(metrics),
        jit=jit,
        **options,
    )
    found = []
    for index in range(STEPS):
        state, measured = step(state, batch_of(model, index))
        found.append(measured)
    return state, found


def check(results, expected):
    """Each rank has a part of the single process's state, all of them have all, and the metrics."""
    state, metrics = expected
    for what in ("params", "state", "opt_state"):
        flat = fn.tree.to_dotted(getattr(state, what))
        seen = set()
        for own, _ in results:
            for path, leaf in fn.tree.to_dotted(getattr(own, what)).items():
                torch.testing.assert_close(leaf, flat[path], rtol=1e-12, atol=1e-14)
                seen.add(path)
        assert seen == set(flat)
    for own, found in results:
        torch.testing.assert_close(found, metrics, rtol=1e-12, atol=1e-14)
        assert own.step == state.step


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "zb-h2"])
def test_a_schedule_gives_the_numbers_of_one_process(ranks, schedule):
    check(ranks(piped, "mlp", 4, schedule=schedule), alone("mlp", 4))


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("model", ["tied", "pair"])
def test_tied_weights_and_trees_between_stages_with_the_norm_of_all(two_ranks, model, schedule):
    results = two_ranks(piped, model, 2, clip=True, schedule=schedule)
    check(results, alone(model, 2, clip=True))


def test_tied_weights_of_the_first_and_last_of_four_stages(four_ranks):
    results = four_ranks(piped, "tied", 4, clip=True, schedule="zb-h2")
    check(results, alone("tied", 4, clip=True))
    owners = ["embed.weight" in fn.tree.to_dotted(state.params) for state, _ in results]
    assert owners == [True, False, False, True]


def test_a_stage_without_params_and_one_micro_batch(four_ranks):
    results = four_ranks(piped, "mlp", 1, clip=True, boundaries=("1", "2", "3"))
    assert not results[2][0].params
    check(results, alone("mlp", 1, clip=True))


def test_metrics_are_on_all_ranks(two_ranks):
    check(two_ranks(piped, "mlp", 4, metrics=True), alone("mlp", 4, metrics=True))


def test_compiled(two_ranks):
    check(two_ranks(piped, "mlp", 4, schedule="mixed", jit=True), alone("mlp", 4))


def simple():
    return fn.serial(fn.linear(6), fn.tanh(), fn.linear(5), fn.tanh(), fn.linear(3))


def with_data():
    """Two stages, each on two ranks that have half of each batch and half of adam's state."""
    mesh = fn.distributed.mesh(data=2, pipe=2)
    clipped = fn.chain(fn.optimizers.clip_by_global_norm(0.1), fn.adam(0.05, eps=0.1))
    optimizer, net = fn.distributed.zero(clipped, mesh), simple()
    state = started("mlp", fn.distributed.pipeline_state, net, optimizer, mesh)
    step = fn.distributed.pipeline_step(
        net, fn.mse(), optimizer, mesh, micro_batches=2, schedule=zero_bubble
    )
    place = fn.distributed.axis_of(mesh, "data").index
    for index in range(STEPS):
        own = fn.tree.map(lambda leaf: leaf.chunk(2)[place], batch_of("mlp", index))
        state, _ = step(state, own)
    return state.params


def test_with_data_parallel_ranks(four_ranks):
    net, optimizer = simple(), fn.adam(0.05, eps=0.1)
    optimizer = fn.chain(fn.optimizers.clip_by_global_norm(0.1), optimizer)
    state = started("mlp", fn.init_train_state, net, optimizer)
    step = fn.train_step(net, fn.mse(), optimizer, micro_batches=2)
    for index in range(STEPS):
        state, _ = step(state, batch_of("mlp", index))
    whole, seen = fn.tree.to_dotted(state.params), set()
    for params in four_ranks(with_data):
        for path, leaf in fn.tree.to_dotted(params).items():
            torch.testing.assert_close(leaf, whole[path], rtol=1e-12, atol=1e-14)
            seen.add(path)
    assert seen == set(whole)


def error_of(function, *args, **options):
    try:
        function(*args, **options)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def refused():
    mesh = fn.distributed.mesh(data=1, pipe=2)
    net, optimizer = simple(), fn.adam()
    make = partial(fn.distributed.pipeline_step, net, fn.mse(), optimizer, mesh)
    state = partial(fn.distributed.pipeline_state, key=fn.key(0), x=torch.ones(4, 5), mesh=mesh)
    start, step = state(net, optimizer), make(micro_batches=2)
    batch = torch.ones(4, 5), torch.ones(4, 3)
    other = state(net, optimizer, boundaries=[4])
    unreduced = fn.distributed.pipeline_step(net, fn.mse("none"), optimizer, mesh, micro_batches=2)
    return [
        error_of(state, fn.serial(fn.linear(3)), optimizer),
        error_of(make, micro_batches=2, schedule=gpipe(4, 2)),
        error_of(make, micro_batches=2, schedule=gpipe(2, 4)),
        error_of(make, micro_batches=0),
        error_of(step, start, fn.tree.map(lambda leaf: leaf[:3], batch)),
        error_of(step, other, batch),
        error_of(step, start, (batch[0], torch.ones(4, 2))),
        error_of(unreduced, start, batch),
        error_of(fn.jit(step), start, batch),
        error_of(step, batch, start),
    ]


def test_what_is_refused_on_every_rank_and_the_ranks_go_on(two_ranks):
    first, second = two_ranks(refused)
    assert [found and found[0] for found in first] == [found and found[0] for found in second]
    expected = [
        ("ValueError", "2 stages are more than the 1 layers ['0']"),
        ("ValueError", "a schedule of 2 stages and 2 micro-batches, got one of 4 and 2"),
        ("ValueError", "a schedule of 2 stages and 2 micro-batches, got one of 2 and 4"),
        ("ValueError", "micro_batches must be an integer >= 1, got 0"),
        ("ValueError", "expects a batch of a multiple of 2 micro-batches, got 3"),
        ("ValueError", "params of stage 0, make the train state by fn.distributed.pipeline_state"),
        ("ValueError", "mse: expects"),
        ("ValueError", "loss: expects a scalar value to train on, got (2, 3)"),
        ("TypeError", "cannot be in jit, vmap or scan; pass jit=True to it"),
        ("TypeError", "expects a TrainState as the train state"),
    ]
    for found, (kind, message) in zip(first, expected, strict=True):
        assert found is not None, message
        assert (found[0], message in found[1]) == (kind, True), found
    check(two_ranks(piped, "mlp", 2), alone("mlp", 2))


def with_a_dead_peer():
    mesh = fn.distributed.mesh(data=1, pipe=2)
    net, optimizer = simple(), fn.adam()
    start = fn.distributed.pipeline_state(net, optimizer, fn.key(0), torch.ones(4, 5), mesh)
    step = fn.distributed.pipeline_step(net, fn.mse(), optimizer, mesh, micro_batches=2)

    def closed(*args, **options):
        raise RuntimeError("Connection closed by peer")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "irecv", closed)
        return error_of(step, start, (torch.ones(4, 5), torch.ones(4, 3)))


def test_a_dead_peer_is_an_error_that_names_the_stage(two_ranks):
    for other, (kind, message) in zip((1, 0), two_ranks(with_a_dead_peer), strict=True):
        assert kind == "PeerError"
        assert f"received from stage {other} over pipe of (" in message


@pytest.mark.parametrize(
    ("around", "options"),
    [(fn.cast, (torch.bfloat16,)), (fn.freeze, ("0",)), (fn.lora, (2,)), (fn.remat, ())],
)
def test_a_pipeline_says_where_what_is_around_a_serial_belongs(around, options):
    net = around(fn.serial(fn.linear(3), fn.linear(2)), *options)
    inside = f"put {around.__name__} around the layers in the serial, as in serial"
    with pytest.raises(TypeError, match=inside):
        fn.distributed.pipeline_state(net, fn.adam(), fn.key(0), torch.ones(4, 3), {"pipe": 1})
    with pytest.raises(TypeError, match=r"or a tie of one, got linear\(2\)$"):
        fn.distributed.pipeline_state(
            fn.linear(2), fn.adam(), fn.key(0), torch.ones(4, 3), {"pipe": 1}
        )
