"""`pipeline_evaluate` gives the numbers of `evaluate` in one process."""

import pytest
import torch

import funcnet as fn
from distributed.test_pipeline import MODELS, batch_of, double, metrics_of

OPTIMIZER = fn.optimizers.params_ema(fn.adam(0.05, eps=0.1), 0.9)


def batches_of(model):
    """Some, of which the last one is short."""
    *whole, last = [batch_of(model, number) for number in range(5)]
    return [*whole, fn.tree.map(lambda leaf: leaf[:3], last)]


def loss_of(model):
    return fn.cross_entropy() if model == "tied" else fn.mse()


def doubled(state):
    return state._replace(params=double(state.params), opt_state=double(state.opt_state))


def evaluated(model, averaged=False, jit=False, **options):
    """Before a step and after it, of a model of which each rank has a stage."""
    mesh = fn.distributed.mesh(data=1, pipe=torch.distributed.get_world_size())
    net, loss, batches = MODELS[model](), loss_of(model), batches_of(model)
    make, start = fn.distributed.pipeline_evaluate, fn.distributed.pipeline_state
    state = doubled(start(net, OPTIMIZER, fn.key(3), batches[0][0], mesh, **options))
    step = fn.distributed.pipeline_step(net, loss, OPTIMIZER, mesh, micro_batches=2, **options)
    told = {"averaged": averaged, "jit": jit, **options}
    evaluation = make(net, loss, metrics_of(model != "tied"), batches, mesh, **told)
    return [evaluation(state), evaluation(step(state, batches[1])[0])]


def alone(model, averaged=False):
    net, loss, batches = MODELS[model](), loss_of(model), batches_of(model)
    state = doubled(fn.init_train_state(net, OPTIMIZER, fn.key(3), batches[0][0]))
    step = fn.train_step(net, loss, OPTIMIZER, micro_batches=2)
    metrics = metrics_of(model != "tied")
    evaluation = fn.evaluate(net, loss, metrics, batches, averaged=averaged)
    return [evaluation(state), evaluation(step(state, batches[1])[0])]


def check(results, expected):
    for found in results:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("model", MODELS)
def test_an_evaluation_is_that_of_one_process(two_ranks, model):
    check(two_ranks(evaluated, model), alone(model))


@pytest.mark.parametrize("model", ["mlp", "tied"])
def test_an_evaluation_of_averaged_params_on_four_stages(four_ranks, model):
    check(four_ranks(evaluated, model, averaged=True), alone(model, averaged=True))


def test_a_stage_without_params_is_evaluated(four_ranks):
    check(four_ranks(evaluated, "mlp", boundaries=("1", "2", "3")), alone("mlp"))


def test_a_compiled_evaluation(two_ranks):
    check(two_ranks(evaluated, "mlp", jit=True), alone("mlp"))


def simple():
    return fn.serial(fn.linear(6), fn.tanh(), fn.linear(3))


def with_data():
    """Two stages, each on two ranks that have batches of their own."""
    mesh = fn.distributed.mesh(data=2, pipe=2)
    net, batches = simple(), batches_of("mlp")
    own = batches[fn.distributed.axis_of(mesh, "data").index :: 2]
    metrics = {"r2": fn.distributed.everywhere(fn.metrics.r2(), mesh)}
    loss = fn.distributed.total(fn.mse(), mesh)
    state = doubled(fn.distributed.pipeline_state(net, OPTIMIZER, fn.key(3), own[0][0], mesh))
    return fn.distributed.pipeline_evaluate(net, loss, metrics, own, mesh)(state)


def test_an_evaluation_of_batches_on_data_parallel_ranks(four_ranks):
    net, batches = simple(), batches_of("mlp")
    state = doubled(fn.init_train_state(net, OPTIMIZER, fn.key(3), batches[0][0]))
    check(
        four_ranks(with_data), fn.evaluate(net, fn.mse(), {"r2": fn.metrics.r2()}, batches)(state)
    )


def refused():
    mesh = fn.distributed.mesh(data=1, pipe=2)
    net, batches, found = simple(), batches_of("mlp"), []
    state = doubled(fn.distributed.pipeline_state(net, OPTIMIZER, fn.key(3), batches[0][0], mesh))

    def tell(state, batches, model=net):
        try:
            fn.distributed.pipeline_evaluate(model, fn.mse(), None, batches, mesh)(state)
        except Exception as error:
            found.append((type(error).__name__, str(error)))

    rank = torch.distributed.get_rank()
    tell(state, [])
    tell(state, iter(batches))
    tell(state, [(batches[0][0], batches[0][1][:, :2])])
    tell(state, batches[rank:])
    tell(state.params, batches)
    tell(state, batches, fn.serial(fn.linear(6), fn.linear(6), fn.linear(3)))
    return found


def test_what_an_evaluation_refuses_on_every_rank(two_ranks):
    expected = [
        ("ValueError", "pipeline_evaluate: expects at least one batch, got none"),
        ("TypeError", "pipeline_evaluate: expects batches that can be gone over again"),
        ("ValueError", "mse: expects"),
        ("ValueError", "expects the same batches on all stages, whose numbers are [5, 4]"),
        ("TypeError", "pipeline_evaluate: expects a TrainState"),
        ("ValueError", "pipeline_evaluate: params of stage"),
    ]
    for told in two_ranks(refused):
        assert len(told) == len(expected), told
        for found, (kind, message) in zip(told, expected, strict=True):
            assert (found[0], message in found[1]) == (kind, True), found
