"""Ways to part a training on one mesh, together: five steps of Adam equal those of one process."""

import pytest
import torch

import funcnet as fn
from funcnet.distributed import data_parallel, mean, part, placements, sharded, zero
from funcnet.parted_params import whole_params

F64 = torch.float64
LOSS = fn.mse()


def batch():
    x = fn.random.normal(fn.key(1), (8, 3), F64)
    return x, x.sin() @ torch.ones(3, 2, dtype=F64)


def net(wrap=lambda layer: layer):
    # A bias has no gradient before a batch norm, and Adam takes full steps by its rounding.
    block = fn.serial(fn.linear(5, bias=False), fn.batch_norm(), fn.dropout(0.2), fn.tanh())
    return fn.serial(fn.linear(5), wrap(fn.residual(block)), wrap(fn.linear(5)), fn.linear(2))


def rule(*before):
    named = {f"mean{number}": each for number, each in enumerate(before)}
    return fn.chain(**named, clip=fn.optimizers.clip_by_global_norm(0.1), adam=fn.adam(0.01))


def train(model, optimizer, of=lambda batch: batch, transform=lambda step: step):
    x, target = of(batch())
    state = fn.init_train_state(model, optimizer, fn.key(0), x)
    step = transform(fn.train_step(model, LOSS, optimizer))
    for _ in range(5):
        state, _ = step(state, (x, target))
    return state, x


def by_groups():
    """Params in parts over one axis, copies of these parts over another; the batch over both."""
    mesh = fn.distributed.mesh(data=2, model=2)
    model = net(lambda layer: sharded(layer, mesh, axis="model"))
    model = data_parallel(model, mesh, axis=("data", "model"))
    state, x = train(
        model,
        rule(mean(mesh, axis=("data", "model"))),
        lambda whole: part(whole, mesh, axis=("data", "model")),
    )
    return whole_params(state.params, placements(model, x)), state.state


def by_parts_of_the_batch(make, transform="eager"):
    """Blocks in parts beside plain layers, or an optimizer in parts; the batch over one axis."""
    mesh = fn.distributed.mesh()
    model = data_parallel(net(make(mesh)), mesh)
    state, x = train(
        model,
        rule(mean(mesh)) if make is blocks else zero(rule(), mesh),
        lambda whole: part(whole, mesh),
        {"eager": lambda step: step, "jit": fn.jit}[transform],
    )
    return whole_params(state.params, placements(model, x)), state.state


def blocks(mesh):
    return lambda layer: sharded(layer, mesh)


def whole(mesh):
    return lambda layer: layer


def check(found):
    expected, _ = train(net(), rule())
    for params, state in found:
        for given, wanted in ((params, expected.params), (state, expected.state)):
            for path, leaf in fn.tree.to_dotted(wanted).items():
                got = fn.tree.to_dotted(given)[path]
                torch.testing.assert_close(got, leaf, rtol=1e-10, atol=1e-12, msg=path)


def test_parts_of_params_within_groups_of_ranks(four_ranks):
    check(four_ranks(by_groups))


@pytest.mark.parametrize("make", [blocks, whole])
def test_blocks_in_parts_beside_whole_ones(ranks, make):
    check(ranks(by_parts_of_the_batch, make))


def test_blocks_in_parts_beside_whole_ones_under_jit(two_ranks):
    check(two_ranks(by_parts_of_the_batch, blocks, "jit"))
