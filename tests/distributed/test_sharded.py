"""Sharded optimizers and layers: five steps are those of a single process on the whole batch."""

import pytest
import torch

import funcnet as fn
from funcnet import distributed as d
from funcnet.distributed.splits import whole_params

F64 = torch.float64
opt = fn.optimizers


def numbers(*shape, seed=0, dtype=F64):
    return fn.random.normal(fn.key(seed), shape, F64).to(dtype)


def unused(size):
    """A layer with a parameter that nothing depends on."""

    def init(key, x):
        return {"scale": torch.ones((), dtype=x.dtype), "unused": torch.ones(size, dtype=x.dtype)}

    def apply(params, x):
        return x * params["scale"]

    def vjp(params, x):
        return apply(params, x), fn.Pullback(unused_rule, {"x": x, **params})

    return fn.stateless(init, apply, vjp)


def unused_rule(residuals, dy, *, params, x):
    dparams = None
    if params:
        dparams = {
            "scale": (dy * residuals["x"]).sum(),
            "unused": torch.zeros_like(residuals["unused"]),
        }
    return dparams, dy * residuals["scale"] if x else None


def block(width=5):
    return fn.residual(fn.serial(fn.layer_norm(), fn.linear(7), fn.tanh(), fn.linear(width)))


def nets(over):
    """The nets by name; ``over(layer)`` is what is made of a block."""
    first, last = over(fn.linear(5)), fn.linear(3)
    wide = fn.cast(fn.linear(5), torch.float64)
    return {
        "blocks": fn.serial(first, over(block()), over(block()), last),
        "repeat": fn.serial(first, fn.repeat(over(block()), 3), last),
        "of a repeat": fn.serial(first, over(fn.repeat(block(), 2)), last),
        "remat": fn.serial(first, fn.remat(over(block())), over(fn.remat(block())), last),
        "attention": fn.serial(first, over(fn.multihead_attention(5, batch_first=True)), last),
        "unused": fn.serial(first, over(unused(5)), last),
        "mixed dtypes": fn.serial(first, over(fn.serial(fn.cast(wide, F64), block())), last),
        "frozen": fn.serial(
            first, fn.freeze(over(block()), "1"), over(fn.freeze(block(), "0")), last
        ),
    }


def batches():
    return [(numbers(8, 4, 6, seed=i), numbers(8, 4, 3, seed=10 + i)) for i in range(5)]


OPTIMIZERS = {
    "adam": lambda: fn.adam(0.1),
    "clipped": lambda: fn.chain(opt.clip_by_global_norm(0.3), fn.adamw(0.1)),
    "clipped after": lambda: fn.chain(
        opt.scale_by_adam(),
        opt.clip_by_global_norm(0.3, torch.inf),
        opt.scale_by_learning_rate(0.1),
    ),
    "normalized": lambda: fn.chain(opt.normalize(), fn.sgd(0.1, momentum=0.9)),
    "averaged": lambda: opt.params_ema(fn.adam(0.1), 0.5),
    "if finite": lambda: opt.apply_if_finite(fn.adam(0.1), 2),
}


def five_steps(net, optimizer, part=lambda batch: batch, transform=lambda step: step, **options):
    """The params and the losses of five steps, and the last state."""
    start = batches()
    state = fn.init_train_state(net, optimizer, fn.key(0), start[0][0])
    step = transform(fn.train_step(net, fn.mse(), optimizer, **options))
    losses = []
    for batch in start:
        state, metrics = step(state, part(batch))
        losses.append(metrics["loss"])
    return state, torch.stack(losses)


def alone(name, optimizer):
    state, losses = five_steps(nets(lambda layer: layer)[name], OPTIMIZERS[optimizer]())
    return state.params, losses


def transform_of(transform):
    donated = {"jit": lambda step: fn.jit(step, donate=0), "eager": lambda step: step}
    return donated[transform]


def rows_of(axis):
    return lambda batch: fn.tree.map(axis.part, batch)


def by_zero(name, optimizer, transform="eager", **options):
    mesh = d.mesh()
    axis = d.axis_of(mesh, "data")
    zero = d.zero(OPTIMIZERS[optimizer](), mesh)
    net = nets(lambda layer: layer)[name]
    state, losses = five_steps(net, zero, rows_of(axis), transform_of(transform), **options)
    kept = fn.tree.bytes(state.opt_state)
    averages = opt.eval_params(state.opt_state, state.params)
    return state.params, axis.mean(losses), kept, averages


def by_layers(name, optimizer, transform="eager", keep=False, **options):
    mesh = d.mesh()
    axis = d.axis_of(mesh, "data")
    net = nets(lambda layer: d.sharded(layer, mesh, keep))[name]
    placed = d.placements(net, batches()[0][0])
    chained = fn.chain(mean_of_whole(axis), OPTIMIZERS[optimizer]())
    over = d.over_parts(chained, placed)
    state, losses = five_steps(net, over, rows_of(axis), transform_of(transform), **options)
    kept = fn.tree.bytes(state.params)
    return whole_params(state.params, placed), axis.mean(losses), kept, state.params


def mean_of_whole(axis):
    """The mean of the gradients of leaves that are not parts over the axis."""

    def update(g, p):
        pairs = zip(g, p.axes, strict=True)
        return opt.leaves.Leaves(
            [leaf if axis in axes else axis.mean(leaf) for leaf, axes in pairs]
        )

    return opt.stateless(update, elementwise=True)


def check(found, expected, rtol=1e-11):
    params, losses = expected
    for got, got_losses, *_ in found:
        torch.testing.assert_close(got_losses, losses, rtol=rtol, atol=1e-13)
        assert list(fn.tree.to_dotted(got)) == list(fn.tree.to_dotted(params))
        for one, other in zip(fn.tree.leaves(got), fn.tree.leaves(params), strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, rtol=rtol, atol=1e-12)
    first = fn.tree.leaves(found[0][0])
    for got, *_ in found:  # bit for bit the same on all ranks
        assert all(map(torch.equal, fn.tree.leaves(got), first))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zero_is_a_single_process(ranks, optimizer):
    check(ranks(by_zero, "blocks", optimizer), alone("blocks", optimizer))


@pytest.mark.parametrize(
    "name",
    ["blocks", "repeat", "of a repeat", "remat", "attention", "unused", "mixed dtypes", "frozen"],
)
def test_sharded_layers_are_a_single_process(ranks, name):
    check(ranks(by_layers, name, "adam"), alone(name, "adam"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_of_sharded_layers(two_ranks, optimizer):
    check(two_ranks(by_layers, "blocks", optimizer), alone("blocks", optimizer))
