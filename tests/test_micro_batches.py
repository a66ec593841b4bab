"""A batch in parts: the gradients, metrics, state and keys of train_step(micro_batches=k)."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import funcnet as fn
from funcnet.core import Sums, pull

F64 = torch.float64


def numbers(*shape, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=F64, device="cpu")
    return drawn.to(torch.get_default_device(), dtype)


def close(found, expected, rtol=1e-11, atol=1e-13):
    leaves, treedef = fn.tree.flatten(found)
    others, other_treedef = fn.tree.flatten(expected)
    assert treedef == other_treedef
    for a, b in zip(leaves, others, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


NETS = {
    "linear": lambda: fn.linear(3),
    "nested": lambda: fn.serial(
        body=fn.residual(fn.serial(fn.linear(5), fn.tanh())),
        ends=fn.branch(fn.linear(2), fn.linear(3)),
        out=fn.serial(fn.concat(), fn.linear(3)),
    ),
    "shared": lambda: fn.serial(
        fn.branch(fn.linear(4), fn.linear(4)), fn.shared(fn.linear(5)), fn.add(), fn.linear(3)
    ),
    "tied and cast": lambda: fn.serial(
        fn.tie(fn.serial(fn.linear(5), fn.linear(5)), {"1.weight": "0.weight"}),
        fn.cast(fn.linear(3), F64),
    ),
    "rematerialised": lambda: fn.serial(fn.remat(fn.serial(fn.linear(4), fn.relu())), fn.linear(3)),
    "frozen": lambda: fn.serial(fn.freeze(fn.linear(4), lambda path: "bias" in path), fn.linear(3)),
    "repeated": lambda: fn.serial(fn.repeat(fn.linear(5), 2), fn.linear(3)),
    "without params": lambda: fn.serial(fn.tanh(), fn.select(slice(0, 3))),
}


@pytest.mark.parametrize("make_net", NETS.values(), ids=NETS)
@pytest.mark.parametrize("count", [2, 8])
def test_a_step_in_parts_is_that_of_the_whole_batch(make_net, count):
    net, optimizer, batch = make_net(), fn.adam(0.1), (numbers(8, 5), numbers(8, 3, seed=1))
    start = fn.init_train_state(net, optimizer, fn.key(0), batch[0])
    metrics = {"mae": fn.mae(), "one": lambda y, t: (y - t).sum(1).mean(), "many": lambda y, t: 3}
    metrics["many"] = lambda y, t: torch.tensor(3)
    whole = fn.train_step(net, fn.mse(), optimizer, metrics=metrics)
    parts = fn.train_step(net, fn.mse(), optimizer, metrics=metrics, micro_batches=count)
    expected, found = (start, {}), (start, {})
    for _ in range(2):
        expected, found = whole(expected[0], batch), parts(found[0], batch)
    # Adam's updates are those of the sign of a gradient that is all rounding.
    close(found[0], expected[0], rtol=1e-6, atol=1e-8)
    assert found[1].pop("many") == expected[1].pop("many") == 3
    close(found[1], expected[1], rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 6), each=st.integers(1, 4), features=st.integers(0, 3))
def test_any_number_of_parts_of_any_size(count, each, features):
    net, optimizer = fn.linear(2), fn.sgd(1.0)
    batch = numbers(count * each, features), numbers(count * each, 2, seed=1)
    start = fn.init_train_state(net, optimizer, fn.key(0), batch[0])
    expected = fn.train_step(net, fn.mse(), optimizer)(start, batch)
    found = fn.train_step(net, fn.mse(), optimizer, micro_batches=count)(start, batch)
    close(found, expected)


def test_it_is_the_accumulation_of_pytorch():
    net, optimizer = fn.serial(fn.linear(6), fn.batch_norm(), fn.relu(), fn.linear(3)), fn.sgd(0.1)
    theirs = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    x, target = numbers(12, 5), numbers(12, 3, seed=1)
    state = fn.init_train_state(net, optimizer, fn.key(0), x)
    theirs.load_state_dict(fn.tree.to_dotted(fn.tree.merge(state.params, state.state)))
    theirs_optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    step = fn.train_step(net, fn.mse(), optimizer, micro_batches=4)
    for _ in range(3):
        state, metrics = step(state, (x, target))
        theirs_optimizer.zero_grad()
        total = 0.0
        for part, wanted in zip(x.chunk(4), target.chunk(4), strict=True):
            loss = nn.functional.mse_loss(theirs(part), wanted) / 4
            loss.backward()
            total += loss.detach()
        theirs_optimizer.step()
        close(metrics["loss"], total)
    found = fn.tree.to_dotted(fn.tree.merge(state.params, state.state))
    close(found, {name: theirs.state_dict()[name] for name in found})


def test_part_i_draws_from_the_steps_key_folded_with_i():
    net, optimizer = fn.serial(fn.dropout(0.5), fn.linear(3)), fn.sgd(0.1)
    x, target = numbers(6, 5), numbers(6, 3, seed=1)
    start = fn.init_train_state(net, optimizer, fn.key(4), x)._replace(step=torch.tensor(7))
    step = fn.train_step(net, fn.mse(), optimizer, micro_batches=3)
    _, metrics = step(start, (x, target))
    values = []
    for i in range(3):
        key = fn.fold_in(fn.fold_in(fn.key(4), 7), i)
        part = slice(2 * i, 2 * i + 2)
        y, _ = net.apply(start.params, x[part], key=key, train=True)
        values.append((y - target[part]).square().mean())
    close(metrics["loss"], torch.stack(values).mean())


def test_under_jit_and_vmap_it_is_what_it_is_eagerly_and_one_loop():
    net = fn.serial(fn.linear(6, bias=False), fn.batch_norm(), fn.dropout(0.2), fn.linear(3))
    optimizer = fn.adamw(0.01)
    batch = numbers(12, 5), numbers(12, 3, seed=1)
    step = fn.train_step(net, fn.mse(), optimizer, metrics={"mae": fn.mae()}, micro_batches=4)
    members = [fn.init_train_state(net, optimizer, fn.key(seed), batch[0]) for seed in range(2)]
    rows = [step(member, batch) for member in members]
    compiled = fn.jit(step)
    close(compiled(members[0], batch), rows[0], rtol=1e-9)
    assert "scan of 4 iterations" in compiled.lower(members[0], batch).graph
    many = fn.tree.map(lambda *leaves: torch.stack(leaves), *members)
    together = fn.vmap(step, (0, None))(many, batch)
    for i, row in enumerate(rows):
        close(fn.tree.map(lambda leaf, i=i: leaf[i], together), row, rtol=1e-9)


def test_nothing_that_is_given_changes():
    net, optimizer = NETS["nested"](), fn.adam(0.1)
    batch = numbers(8, 5), numbers(8, 3, seed=1)
    start = fn.init_train_state(net, optimizer, fn.key(0), batch[0])
    before = [(leaf, leaf._version, leaf.clone()) for leaf in fn.tree.leaves((start, batch))]
    step = fn.train_step(net, fn.mse(), optimizer, micro_batches=4)
    once, again = step(start, batch), step(start, batch)
    for leaf, version, copy in before:
        assert leaf._version == version
        assert torch.equal(leaf, copy)
    close(once, again, rtol=0, atol=0)


def test_a_metric_is_that_of_the_whole_batch():
    net, optimizer = fn.linear(3), fn.sgd(0.1)
    x, target = numbers(12, 5), torch.arange(12) % 3
    start = fn.init_train_state(net, optimizer, fn.key(0), x)
    metrics = {"recall": fn.metrics.recall(3, "macro"), "accuracy": fn.metrics.accuracy()}
    whole, parts = (
        fn.train_step(net, fn.cross_entropy(), optimizer, metrics=metrics, micro_batches=count)(
            start, (x, target)
        )[1]
        for count in (1, 4)
    )
    close(parts, whole)
    y, _ = net.apply(start.params, x)
    close(whole["accuracy"], (y.argmax(1) == target).double().mean())


def test_the_gradients_are_added_in_the_memory_that_is_given():
    net = NETS["nested"]()
    x = numbers(8, 5)
    params, state = net.init(fn.key(0), x)
    y, pullback, _ = net.vjp(params, x, state)
    total = fn.tree.map(torch.ones_like, params)
    where = [leaf.data_ptr() for leaf in fn.tree.leaves(total)]
    sums, _ = pull({"": pullback}, "", torch.ones_like(y), params=Sums(total), x=False)
    assert [leaf.data_ptr() for leaf in fn.tree.leaves(sums)] == where
    alone, _ = pullback(torch.ones_like(y))
    close(sums, fn.tree.map(lambda gradient: 1 + gradient, alone))


def wrong_rule(residuals, dy, *, params, x):
    return ({"w": dy.sum()[None]} if params else None), dy if x else None


def test_a_gradient_of_another_shape_is_told_and_not_broadcast():
    layer = fn.stateless(
        lambda key, x: {"w": torch.zeros(3, dtype=x.dtype)},
        lambda params, x: x + params["w"],
        lambda params, x: (x + params["w"], fn.Pullback(wrong_rule, {})),
        name="wrong",
    )
    optimizer, batch = fn.sgd(0.1), (numbers(4, 3), numbers(4, 3))
    start = fn.init_train_state(layer, optimizer, fn.key(0), batch[0])
    with pytest.raises(ValueError, match=r"grads: expects shape \(3,\), got \(1,\)"):
        fn.train_step(layer, fn.mse(), optimizer, micro_batches=2)(start, batch)


@pytest.mark.parametrize(
    ("count", "batch", "message"),
    [
        (0, None, "micro_batches must be an integer >= 1, got 0"),
        (True, None, "micro_batches must be an integer >= 1, got True"),
        (2.0, None, "micro_batches must be an integer >= 1, got 2.0"),
        (3, ((8, 5), (8, 3)), "micro_batches: expects a batch of a multiple of 3, got 8"),
        (2, ((0, 5), (0, 3)), "micro_batches: expects a batch of a multiple of 2, got 0"),
        (2, ((8, 5), (4, 3)), "micro_batches: expects a batch of tensors with one leading extent"),
        (2, ((8, 5), ()), "micro_batches: expects a batch of tensors with one leading extent"),
        (2, ((8, 5), (8, 3), (8,)), r"expects a batch \(x, target\), got 3 things: \(float64"),
    ],
)
def test_what_does_not_fit_is_told(count, batch, message):
    net, optimizer = fn.linear(3), fn.sgd(0.1)
    start = fn.init_train_state(net, optimizer, fn.key(0), numbers(8, 5))
    with pytest.raises(ValueError, match=message):
        fn.train_step(net, fn.mse(), optimizer, micro_batches=count)(
            start, tuple(torch.zeros(shape, dtype=F64) for shape in batch)
        )
