"""`replicated` around layers that are in parts, and inside those of which few params learn."""

import pytest
import torch

import funcnet as fn
from funcnet.distributed import mean, part, placements, replicated, sharded
from funcnet.parted_params import whole_params

F64 = torch.float64
ABSTRACT = {"data": 2}


def batch():
    x = fn.random.normal(fn.key(1), (8, 3), F64)
    return x, x.sin() @ torch.ones(3, 2, dtype=F64)


def replicated_parts(mode):
    mesh = fn.distributed.mesh()
    x, target = batch()
    inside = fn.serial(sharded(fn.linear(4), mesh), fn.tanh(), fn.linear(2))
    nets = {"plain": fn.serial(fn.linear(4), fn.tanh(), fn.linear(2)), "mean": inside}
    chains = {"plain": fn.adam(0.1), "mean": fn.chain(mean(mesh), fn.adam(0.1))}
    nets["replicated"], chains["replicated"] = replicated(inside, mesh), fn.adam(0.1)
    found = {}
    for name, net in nets.items():
        state = fn.init_train_state(net, chains[name], fn.key(0), x)
        step = fn.train_step(net, fn.mse(), chains[name])
        step = fn.jit(step) if mode == "jit" else step
        for _ in range(5):
            state, _ = step(state, (x, target) if name == "plain" else part((x, target), mesh))
        found[name] = whole_params(state.params, placements(net, x))
    return found


@pytest.mark.parametrize("mode", ["eager", "jit"])
def test_parts_in_replicated_are_reduced_once(two_ranks, mode):
    for found in two_ranks(replicated_parts, mode):
        for name in ("mean", "replicated"):
            for path, leaf in fn.tree.to_dotted(found[name]).items():
                expected = fn.tree.to_dotted(found["plain"])[path]
                torch.testing.assert_close(leaf, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        (lambda: sharded(fn.linear(4), ABSTRACT, sums=True), {}, "is the sum of the ranks', and"),
        (
            lambda: sharded(fn.linear(4), {"data": 2, "pipe": 2}),
            {"axis": ("data", "pipe")},
            r"'weight' is a part over 'data' alone.*: use mean in",
        ),
    ],
)
def test_replicated_refuses_parts_that_are_reduced_otherwise(net, options, message):
    mesh = {"data": 2, "pipe": 2} if options else ABSTRACT
    layer, x = replicated(net(), mesh, **options), torch.ones(2, 3, device="meta")
    params, _ = layer.init(fn.key(0), x)
    with pytest.raises(ValueError, match=message):
        layer.vjp(params, x)


FEW = {
    "a layer": lambda net: fn.freeze(net, "0"),
    "a leaf": lambda net: fn.freeze(net, "0.weight"),
    "lora": lambda net: fn.lora(net, 2),
}


def learns_few(which):
    mesh, data = fn.distributed.mesh(), batch()
    net = fn.serial(fn.linear(4), fn.tanh(), fn.linear(2))
    found = []
    for model, rows in (
        (FEW[which](replicated(net, mesh)), part(data, mesh)),
        (replicated(FEW[which](net), mesh), part(data, mesh)),
        (FEW[which](net), data),
    ):
        optimizer = fn.adam(0.1)
        state = fn.init_train_state(model, optimizer, fn.key(0), data[0])
        step = fn.train_step(model, fn.mse(), optimizer)
        for _ in range(3):
            state, _ = step(state, rows)
        found.append(fn.tree.to_dotted(state.params))
    return found


@pytest.mark.parametrize("which", FEW)
def test_replicated_may_be_inside_what_learns_few_params(two_ranks, which):
    for inside, outside, expected in two_ranks(learns_few, which):
        torch.testing.assert_close(inside, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(outside, expected, rtol=1e-10, atol=1e-12)
