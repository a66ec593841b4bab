"""`fn.jit` of a layer, a loss and an optimizer."""

import pickle

import pytest
import torch

import funcnet as fn
from funcnet.transforms.jit import Jitted

pytestmark = pytest.mark.cpu_only

X = fn.random.normal(fn.key(0), (4, 3))
NET = fn.serial(hidden=fn.linear(5), drop=fn.dropout(0.5), norm=fn.batch_norm(), out=fn.linear(2))


@pytest.fixture(scope="module")
def compiled():
    return fn.jit(NET)


def test_a_jitted_layer_gives_what_the_layer_gives(compiled):
    params, state = compiled.init(fn.key(1), X)
    assert fn.tree.alike((params, state), NET.init(fn.key(1), X))
    for train in (True, False):
        options = {"key": fn.key(2), "train": train}
        y, pullback, after = NET.vjp(params, X, state, **options)
        found, compiled_pullback, compiled_after = compiled.vjp(params, X, state, **options)
        torch.testing.assert_close(
            (found, compiled_after), (y, after), rtol=1e-5, atol=1e-5, msg=f"train={train}"
        )
        applied, _ = compiled.apply(params, X, state, **options)
        torch.testing.assert_close(applied, y, rtol=1e-5, atol=1e-5)
        dy = torch.ones_like(y)
        dparams, dx = pullback(dy)
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(compiled_pullback(dy), (dparams, dx), **close)
        assert compiled_pullback(dy, params=False)[0] is None
        torch.testing.assert_close(compiled_pullback(dy, x=False), (dparams, None), **close)
    # By their defaults vjp is of training, and apply is not.
    torch.testing.assert_close(compiled.apply(params, X, state)[0], y, rtol=1e-5, atol=1e-5)


def test_the_pullback_of_a_jitted_layer_is_a_pytree_that_may_be_compiled_or_pickled(compiled):
    params, state = compiled.init(fn.key(1), X)
    y, pullback, _ = compiled.vjp(params, X, state, key=fn.key(2))
    again = compiled.vjp(params, X, state, key=fn.key(2))[1]
    assert fn.tree.flatten(pullback)[1] == fn.tree.flatten(again)[1]
    dy = torch.ones_like(y)
    expected = pullback(dy)
    doubled = fn.tree.map(lambda leaf: leaf.clone(), pullback)
    torch.testing.assert_close(doubled(dy), expected, rtol=0, atol=0)
    inside = fn.jit(lambda pullback, dy: pullback(dy))(pullback, dy)
    torch.testing.assert_close(inside, expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(pullback))(dy), expected)
    with pytest.raises(ValueError, match="serial: pullback expects dy of shape"):
        pullback(dy[:1])


def test_a_jitted_layer_is_part_of_nets_steps_and_transformations():
    block = fn.jit(fn.serial(fn.linear(3), fn.tanh()))
    assert repr(block) == "serial(linear(3), tanh())"
    assert isinstance(block.apply, Jitted)
    net, plain = fn.residual(block), fn.residual(fn.serial(fn.linear(3), fn.tanh()))
    optimizer = fn.jit(fn.adam(1e-2))
    state = fn.init_train_state(net, optimizer, fn.key(0), X)
    step = fn.train_step(net, fn.jit(fn.mse()), optimizer)
    expected, metrics = fn.train_step(plain, fn.mse(), fn.adam(1e-2))(state, (X, 0 * X))
    for taken in (step, fn.jit(step)):
        torch.testing.assert_close(taken(state, (X, 0 * X)), (expected, metrics))
    keys = fn.random.split(fn.key(0), 2)
    params, _ = fn.vmap(net.init, in_axes=(0, None))(keys, X)
    y, pullback, _ = fn.vmap(net.vjp, in_axes=(0, None))(params, X)
    assert y.shape == (2, 4, 3)
    assert fn.tree.leaves(fn.vmap(lambda pullback, y: pullback(y))(pullback, y))
    walked = fn.map_layers(lambda path, layer: layer, net)
    torch.testing.assert_close(walked.apply(state.params, X)[0], plain.apply(state.params, X)[0])


def test_a_jitted_loss_gives_what_the_loss_gives():
    loss = fn.jit(fn.cross_entropy(label_smoothing=0.1))
    target = torch.tensor([0, 2, 1, 1])
    value, pullback = loss.vjp(X, target)
    expected, plain = fn.cross_entropy(label_smoothing=0.1).vjp(X, target)
    torch.testing.assert_close((value, loss.apply(X, target)), (expected, expected))
    torch.testing.assert_close((pullback(), pullback(2.0)), (plain(), plain(2.0)))
    assert repr(loss) == "cross_entropy(label_smoothing=0.1)"


def test_a_jitted_optimizer_gives_what_the_optimizer_gives():
    optimizer, plain = fn.jit(fn.adam(1e-2)), fn.adam(1e-2)
    params = {"w": X}
    state = optimizer.init_state(params)
    torch.testing.assert_close(
        optimizer.update(params, state, params), plain.update(params, state, params)
    )
    chained = fn.chain(fn.optimizers.clip(1.0), optimizer)
    expected = fn.chain(fn.optimizers.clip(1.0), plain)
    state = chained.init_state(params)
    torch.testing.assert_close(
        chained.update(params, state, params), expected.update(params, state, params)
    )


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (
            torch.nn.Linear(3, 2),
            {},
            "expects a function, got a torch.nn.Linear; use fn.linear, or ",
        ),
        (3, {}, "expects a function, got int"),
        (None, {}, "expects a function, got None"),
        (X, {}, r"expects a function, got float32 \(4, 3\)"),
        (fn.tanh(), {"donate": 0}, "donate and static are of a function, and a Layer's functions"),
    ],
)
def test_jit_says_what_it_compiles(given, options, message):
    with pytest.raises(TypeError, match=f"^jit: {message}"):
        fn.jit(given, **options)
