"""Sharded optimizers and layers: five steps are those of a single process on the whole batch."""

import pytest
import torch

import funcnet as fn
from funcnet import distributed as d
from funcnet.parted_params import whole_params

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
    attention = fn.multihead_attention(5, bias=False, batch_first=True)
    narrow = fn.cast(fn.linear(5, dtype=torch.float32), F64)
    return {
        "blocks": fn.serial(first, over(block()), over(block()), last),
        "repeat": fn.serial(first, fn.repeat(over(block()), 3), last),
        "of a repeat": fn.serial(first, over(fn.repeat(block(), 2)), last),
        "remat": fn.serial(first, fn.remat(over(block())), over(fn.remat(block())), last),
        "attention": fn.serial(first, over(attention), last),
        "unused": fn.serial(first, over(unused(5)), last),
        "mixed dtypes": fn.serial(first, over(fn.serial(narrow, block())), last),
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
    ["blocks", "repeat", "of a repeat", "remat", "attention", "unused", "frozen"],
)
def test_sharded_layers_are_a_single_process(ranks, name):
    check(ranks(by_layers, name, "adam"), alone(name, "adam"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_of_sharded_layers(two_ranks, optimizer):
    check(two_ranks(by_layers, "blocks", optimizer), alone("blocks", optimizer))


OPTIONS = {
    "kept": {"keep": True},
    "in micro-batches": {"micro_batches": 2},
    "donated": {"donate": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_change_no_number(two_ranks, options):
    expected = alone("blocks", "clipped")
    check(two_ranks(by_layers, "blocks", "clipped", **options), expected)
    if "keep" not in options:
        check(two_ranks(by_zero, "blocks", "clipped", **options), expected)


def test_a_model_of_several_dtypes(two_ranks):
    expected = alone("mixed dtypes", "normalized")
    for by in (by_zero, by_layers):
        found = two_ranks(by, "mixed dtypes", "normalized")
        check(found, expected, rtol=1e-4)
        assert {leaf.dtype for leaf in fn.tree.leaves(found[0][0])} == {F64, torch.float32}


@pytest.mark.parametrize(("by", "name"), [(by_zero, "blocks"), (by_layers, "repeat")])
def test_compiled_with_donated_memory(two_ranks, by, name):
    check(two_ranks(by, name, "clipped", transform="jit"), alone(name, "clipped"))


def test_a_rank_has_its_part_alone(four_ranks):
    params, _ = alone("blocks", "adam")
    whole = fn.tree.bytes(params)
    # A few numbers of padding, and of the head, which is whole.
    assert all(kept < 0.30 * 2 * whole for *_, kept, _ in four_ranks(by_zero, "blocks", "adam"))
    head = fn.tree.bytes(params["3"])
    assert all(
        kept - head < 0.30 * (whole - head)
        for *_, kept, _ in four_ranks(by_layers, "blocks", "adam")
    )


def test_eval_params_of_zero_are_whole(two_ranks):
    net = nets(lambda layer: layer)["blocks"]
    state, losses = five_steps(net, OPTIMIZERS["averaged"]())
    found = two_ranks(by_zero, "blocks", "averaged")
    check([(each[3], each[1]) for each in found], (state.opt_state.average, losses))


def over_two_axes(of_layers):
    mesh = d.mesh(data=2, model=2)
    data = d.axis_of(mesh, "data")
    net = nets(lambda layer: d.sharded(layer, mesh, axis="model"))["blocks"]
    optimizer = OPTIMIZERS["clipped"]()
    if of_layers:
        net = nets(lambda layer: d.sharded(d.sharded(layer, mesh, axis="model"), mesh))["blocks"]
        optimizer = fn.chain(mean_of_whole(data), optimizer)
    else:
        optimizer = d.zero(optimizer, mesh)
    placed = d.placements(net, batches()[0][0])
    state, losses = five_steps(net, d.over_parts(optimizer, placed), rows_of(data))
    return whole_params(state.params, placed), data.mean(losses)


@pytest.mark.parametrize("of_layers", [False, True])
def test_parts_of_parts(four_ranks, of_layers):
    check(four_ranks(over_two_axes, of_layers), alone("blocks", "clipped"))


def halves():
    """The halves of the pullback of a block, eager and deferred, beside those of the whole one."""
    mesh = d.mesh()
    axis = d.axis_of(mesh, "data")
    x, dy = axis.part(numbers(8, 5)), axis.part(numbers(8, 5, seed=1))
    whole, net = block(), d.sharded(block(), mesh)
    params, _ = net.init(fn.key(0), x)
    inside, _ = whole.init(fn.key(0), x)
    _, pullback, _ = net.vjp(params, x)
    dparams, dx = whole.vjp(inside, x)[1](dy)
    placed = d.placements(net, x)
    parts = fn.tree.to_dotted(fn.tree.map(axis.mean, dparams))
    expected = {path: placed[path][0].part(leaf) for path, leaf in parts.items()}
    deferred, later = fn.defer(pullback)(dy)
    found = {
        "params": (pullback(dy, x=False), (expected, None)),
        "x": (pullback(dy, params=False), (None, dx)),
        "both": (pullback(dy), (expected, dx)),
        "deferred": ((fn.gradients(deferred), later), (expected, dx)),
    }
    for (got, got_dx), (gradients, wanted_dx) in found.values():
        got = got if got is None else fn.tree.to_dotted(got)
        for one, other in ((got, gradients), (got_dx, wanted_dx)):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other)
    again, _, _ = net.vjp(params, x)
    assert torch.equal(again, whole.apply(inside, x)[0])
    largest = max(leaf.numel() for leaf in fn.tree.leaves(params))
    return [leaf.numel() for leaf in fn.tree.leaves(pullback)], largest, x.numel()


def test_both_halves_of_the_pullback(two_ranks):
    for sizes, part, x in two_ranks(halves):
        assert max(sizes) <= max(part, 2 * x)


def mapped():
    """A population: members of the batch, and of the params."""
    mesh = d.mesh()
    axis = d.axis_of(mesh, "data")
    net = d.sharded(block(), mesh)
    x, dy = axis.part(numbers(8, 5)), axis.part(numbers(8, 5, seed=1))
    made = [net.init(fn.key(seed), x)[0] for seed in range(3)]

    def gradients(params):
        y, pullback, _ = net.vjp(params, x)
        return y, pullback(dy)

    together = fn.vmap(gradients)(fn.tree.map(lambda *leaves: torch.stack(leaves), *made))
    alone = [gradients(params) for params in made]
    alone = fn.tree.map(lambda *leaves: torch.stack(leaves), *alone)
    for one, other in zip(fn.tree.leaves(together), fn.tree.leaves(alone), strict=True):
        torch.testing.assert_close(one, other)


def test_under_vmap(two_ranks):
    two_ranks(mapped)


def views():
    """A layer that keeps a view of a parameter; and what it keeps beside the parts."""
    mesh = d.mesh()

    def apply(params, x):
        return x @ params["weight"][:, 1:]

    def vjp(params, x):
        residuals = {"x": x, "slice": params["weight"][:, 1:]}
        return apply(params, x), fn.Pullback(slice_rule, residuals)

    def init(key, x):
        return {"weight": fn.random.normal(key, (5, 6), x.dtype)}

    layer = fn.stateless(init, apply, vjp, name="slice")
    x, dy = numbers(2, 5), numbers(2, 5, seed=1)
    params, _ = d.sharded(layer, mesh).init(fn.key(0), x)
    _, pullback, _ = d.sharded(layer, mesh).vjp(params, x)
    inside, _ = layer.init(fn.key(0), x)
    expected = layer.vjp(inside, x)[1](dy)[1]
    torch.testing.assert_close(pullback(dy, params=False)[1], expected)
    return [leaf.numel() for leaf in fn.tree.leaves(pullback)]


def slice_rule(residuals, dy, *, params, x):
    gradient = None
    if params:
        gradient = {"weight": torch.nn.functional.pad(residuals["x"].T @ dy, (1, 0))}
    return gradient, dy @ residuals["slice"].T if x else None


def test_views_of_params_are_not_kept(two_ranks):
    assert two_ranks(views) == [[15, 10]] * 2


def test_over_one_rank_it_is_the_layer_itself():
    layer = fn.linear(2)
    assert d.sharded(layer, {"data": 1}) is layer
    params = {"w": numbers(3, 2)}
    zero, adam = d.zero(fn.adam(), {"data": 1}), fn.adam()
    updates, _ = zero.update(params, zero.init_state(params), params)
    expected, _ = adam.update(params, adam.init_state(params), params)
    torch.testing.assert_close(updates, expected)


NOT_ELEMENTWISE = [fn.muon, fn.lamb, lambda: fn.chain(opt.centralize(), fn.sgd(0.1)), fn.shampoo]


@pytest.mark.parametrize("make", NOT_ELEMENTWISE)
def test_optimizers_that_are_not_elementwise_are_refused(make):
    optimizer = make()
    with pytest.raises(ValueError, match=f"zero: {optimizer.name} is not elementwise"):
        d.zero(optimizer, {"data": 2})
    model = d.sharded(fn.linear(2), {"data": 2})
    placed = d.placements(model, torch.ones(3, 2, device="meta"))
    with pytest.raises(ValueError, match=f"over_parts: {optimizer.name} is not elementwise"):
        d.over_parts(optimizer, placed)


def test_bad_input_is_refused_before_anything_is_sent():
    mesh, x = {"data": 2}, torch.ones(4, 3, device="meta")
    layer = d.sharded(fn.linear(2), mesh)
    whole, _ = fn.linear(2).init(fn.key(0), x)
    with pytest.raises(ValueError, match=r"sharded: params: expects shape .*this rank's part"):
        layer.apply(whole, x)
    zero = d.zero(fn.adam(), mesh)
    with pytest.raises(TypeError, match="ZeroState"):
        zero.update(whole, fn.adam().init_state(whole), whole)
    with pytest.raises(ValueError, match="zero: expects the state of"):
        zero.update(whole, d.zero(fn.adam(), {"data": 4}).init_state(whole), whole)
    parts, _ = layer.init(fn.key(0), x)
    again = d.over_parts(zero, d.placements(layer, x))
    with pytest.raises(ValueError, match="part over 'data' already"):
        again.update(parts, again.init_state(parts), parts)
    with pytest.raises(ValueError, match="placements has no 'bias'"):
        d.over_parts(fn.adam(), {}).update(parts, fn.adam().init_state(parts), parts)


def test_placements_of_a_state_and_of_stacks():
    mesh, x = {"data": 2}, torch.ones(4, 3, device="meta")
    net = fn.repeat(d.sharded(fn.linear(3), mesh), 5)
    (split,) = d.placements(net, x)["weight"]
    assert (split.shape, split.part_shape) == ((5, 3, 3), (5, 5))
    params, _ = fn.serial(fn.linear(3), fn.linear(2)).init(fn.key(0), x)
    placed = d.zero(fn.adam(), mesh).init_state(params).placements()
    splits = {path: [each.shape for each in splits] for path, splits in placed.items()}
    assert splits["inner.scale_by_adam.mu.1.weight"] == [(2, 3)]
    assert splits["inner.scale_by_adam.nu.0.weight"] == [(3, 3)]
    assert splits["inner.scale_by_adam.step"] == []
