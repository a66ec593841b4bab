"""K-FAC: its step is the minimum of the quadratic model, and it needs fewer of them than Adam."""

import pytest
import torch
from torch.func import grad, jvp

import funcnet as fn

KEY = fn.key(2)
X = fn.random.normal(fn.key(1), (16, 5))
TARGET = X[:, :3].sin()
NET = fn.serial(fn.linear(6), fn.tanh(), fn.linear(3))


def half_square():
    """The squared error, summed over outputs and halved: -log N(y, 1), but for a constant."""

    def apply(prediction, target):
        return (prediction - target).square().sum() / (2 * len(prediction))

    def vjp(prediction, target):
        residuals = {"difference": (prediction - target) / len(prediction)}
        return apply(prediction, target), fn.LossPullback(half_square_rule, residuals)

    return fn.Loss(apply, vjp)


def half_square_rule(residuals, dvalue):
    return residuals["difference"] * dvalue


def draw(key, y):
    return y + fn.random.normal(key, y.shape, y.dtype)


def started(net=NET, x=X, **options):
    optimizer = fn.kfac(**{"damping": 0.1, **options})
    return optimizer, fn.init_train_state(net, optimizer, KEY, x)


def dotted(found, like):
    return torch.cat([fn.tree.to_dotted(found)[path].flatten() for path in fn.tree.paths(like)])


def test_the_first_step_is_the_minimum_of_the_quadratic_model_along_the_direction():
    """With enough examples the sampled curvature is J^T J, by torch.func."""
    x = fn.random.normal(fn.key(1), (20000, 5), torch.float64)
    target = x[:, :3].sin()
    optimizer, state = started(x=x)
    step = fn.kfac_train_step(NET, half_square(), optimizer, draw, adapt_every=0)
    after, _ = step(state, (x, target))
    params = state.params
    delta = fn.tree.map(torch.sub, after.params, params)

    def loss(params):
        return half_square().apply(NET.apply(params, x)[0], target)

    slope = dotted(grad(loss)(params), params) @ dotted(delta, params)
    _, moved = jvp(lambda params: NET.apply(params, x)[0], (params,), (delta,))
    length = dotted(delta, params).square().sum()
    curvature = moved.square().sum() / len(x) + 0.1 * length
    # Along the step, the model has its minimum at 1: slope + curvature = 0.
    torch.testing.assert_close(-slope / curvature, torch.ones_like(slope), rtol=0.05, atol=0)
    torch.testing.assert_close(after.opt_state.decrease.double(), -slope / 2, rtol=1e-4, atol=0)


def test_of_a_linear_layer_and_little_damping_one_step_is_least_squares():
    """There A (x) G is exact but for sampling, so the direction is Newton's."""
    x, net = fn.random.normal(fn.key(1), (4000, 5)), fn.linear(3)
    target = x @ torch.arange(15.0).view(5, 3) + 2
    optimizer, state = started(net, x, damping=1e-6)
    step = fn.kfac_train_step(net, half_square(), optimizer, draw)
    before = half_square().apply(net.apply(state.params, x)[0], target)
    for _ in range(3):
        state, _ = step(state, (x, target))
    after = half_square().apply(net.apply(state.params, x)[0], target)
    assert after < 1e-4 * before


def test_it_needs_fewer_steps_than_adam():
    net = fn.serial(*[layer for n in (8, 4, 2, 4, 8) for layer in (fn.linear(n), fn.tanh())][:-1])
    x = fn.random.normal(fn.key(1), (64, 3)) @ fn.random.normal(fn.key(4), (3, 8))

    def last(optimizer, step, steps=60):
        state = fn.init_train_state(net, optimizer, KEY, x)
        for _ in range(steps):
            state, metrics = step(state, (x, x))
        return metrics["loss"]

    adams = [
        last(fn.adam(rate), fn.train_step(net, half_square(), fn.adam(rate)))
        for rate in (3e-3, 1e-2, 3e-2, 1e-1)
    ]
    optimizer = fn.kfac(1.0)
    found = last(optimizer, fn.kfac_train_step(net, half_square(), optimizer, draw), steps=30)
    assert found < min(adams)


@pytest.mark.cpu_only
def test_a_compiled_and_scanned_epoch_is_the_loop():
    optimizer, start = started()
    step = fn.kfac_train_step(NET, half_square(), optimizer, draw, adapt_every=2)
    batches = tuple(each.view(4, 4, -1) for each in (X, TARGET))
    compiled, metrics = fn.jit(lambda *args: fn.scan(step, *args))(start, batches)
    state = start
    for batch in zip(*batches, strict=True):
        state, last = step(state, batch)
    torch.testing.assert_close(metrics["loss"][-1], last["loss"], rtol=1e-3, atol=1e-4)
    for leaf, other in zip(fn.tree.leaves(state), fn.tree.leaves(compiled), strict=True):
        torch.testing.assert_close(leaf, other, rtol=1e-2, atol=1e-3)


def test_a_member_of_a_population_is_its_solo_run():
    optimizer, _ = started()
    step = fn.kfac_train_step(NET, half_square(), optimizer, draw, adapt_every=2)

    def run(key):
        state = fn.init_train_state(NET, optimizer, key, X)
        for _ in range(2):
            state, _ = step(state, (X, TARGET))
        return state.params

    keys = fn.random.split(KEY, 2)
    together = fn.vmap(run)(keys)
    for leaf, other in zip(fn.tree.leaves(together), fn.tree.leaves(run(keys[1])), strict=True):
        torch.testing.assert_close(leaf[1], other, rtol=1e-3, atol=1e-4)


def test_other_params_have_an_optimizer_of_their_own():
    net = fn.serial(fn.conv2d(2, 3), fn.flatten(), fn.linear(6), fn.layer_norm(), fn.linear(3))
    x = fn.random.normal(KEY, (4, 1, 5, 5))
    with pytest.raises(
        ValueError, match=r"linear layers alone, got \['0.bias', '0.weight', '3.bias'"
    ):
        fn.kfac().init_state(net.init(KEY, x)[0])
    optimizer, state = started(net, x, others=fn.sgd(0.1))
    assert list(state.opt_state.factors) == ["2", "4"]
    sgd = fn.train_step(net, half_square(), fn.sgd(0.1))
    plain, _ = sgd(fn.init_train_state(net, fn.sgd(0.1), KEY, x), (x, torch.ones(4, 3)))
    step = fn.kfac_train_step(net, half_square(), optimizer, draw)
    after, _ = step(state, (x, torch.ones(4, 3)))
    for path, leaf in fn.tree.to_dotted(after.params).items():
        same = torch.equal(leaf, fn.tree.to_dotted(plain.params)[path])
        assert same == path.startswith(("0", "3"))


@pytest.mark.parametrize("sample", [None, draw])
def test_the_pullback_is_called_again_for_drawn_targets_alone(sample):
    optimizer, state = started()
    calls = []

    def counted_rule(residuals, dy, *, params, x):
        calls.append(dy)
        return fn.pull(residuals, "", dy, params=params, x=x)

    def counted_vjp(*args, **options):
        y, pullback, state = fn.tanh().vjp(*args, **options)
        return y, fn.Pullback(counted_rule, {"": pullback}), state

    net = fn.serial(fn.linear(6), fn.tanh()._replace(vjp=counted_vjp), fn.linear(3))
    step = fn.kfac_train_step(net, half_square(), optimizer, sample, adapt_every=0)
    losses = []
    for _ in range(20):
        state, metrics = step(state, (X, TARGET))
        losses.append(metrics["loss"])
    assert losses[-1] < losses[0]
    assert len(calls) == (20 if sample is None else 40)


def test_a_mean_over_outputs_has_the_steps_of_the_sum():
    optimizer, state = started(damping=0.6)
    step = fn.kfac_train_step(NET, half_square(), optimizer, draw)
    summed, _ = step(state, (X, TARGET))
    optimizer, state = started(damping=0.4)  # for half of the sum is 3/2 of the mean

    def draw_mse(key, y):
        return y + 0.5**0.5 * fn.random.normal(key, y.shape)

    step = fn.kfac_train_step(NET, fn.mse(), optimizer, draw_mse, outputs=3)
    mean, _ = step(state, (X, TARGET))
    for leaf, other in zip(fn.tree.leaves(summed.params), fn.tree.leaves(mean.params), strict=True):
        torch.testing.assert_close(leaf, other, rtol=1e-3, atol=1e-5)


def test_the_damping_follows_how_well_the_loss_was_foretold():
    _, train_state = started()
    state = train_state.opt_state._replace(decrease=torch.tensor(1.0))
    before = torch.tensor(5.0)
    for after, expected in ((4.1, 0.95**5), (4.5, 1.0), (4.9, 0.95**-5), (torch.nan, 0.95**-5)):
        found = fn.adapt_damping(state, before, torch.tensor(after)).damping
        torch.testing.assert_close(found, torch.tensor(0.1 * expected))


def test_the_damping_does_not_fall_below_the_least():
    _, train_state = started(least_damping=0.09)
    state = train_state.opt_state._replace(decrease=torch.tensor(1.0))
    found = fn.adapt_damping(state, torch.tensor(5.0), torch.tensor(4.0))
    assert found.damping == found.least == torch.tensor(0.09)


def test_wrong_arguments_are_refused():
    optimizer, state = started()
    with pytest.raises(ValueError, match="kfac: damping must be > 0"):
        fn.kfac(0.0)
    with pytest.raises(ValueError, match="kfac: decay must be below 1"):
        fn.kfac(decay=1.0)
    with pytest.raises(
        TypeError, match=r"KfacGradients, got .*; fn.kfac_train_step takes the place"
    ):
        fn.train_step(NET, fn.mse(), optimizer)(state, (X, TARGET))
    with pytest.raises(ValueError, match="expects the optimizer kfac, got adam"):
        fn.kfac_train_step(NET, fn.mse(), fn.adam(), draw)
    embedding = fn.serial(fn.embedding(4, 5), fn.linear(2))
    tokens = torch.tensor([0, 1])
    optimizer, state = started(embedding, tokens)
    step = fn.kfac_train_step(embedding, half_square(), optimizer, draw)
    with pytest.raises(ValueError, match=r"kfac: expects linear layers, not what is at \['0'\]"):
        step(state, (tokens, torch.ones(2, 2)))


def test_a_layer_of_which_a_part_is_frozen_is_named():
    net, optimizer, x = fn.freeze(fn.serial(fn.linear(2)), "0.bias"), fn.kfac(), torch.ones(4, 3)
    step = fn.kfac_train_step(net, fn.cross_entropy(), optimizer, fn.random.categorical)
    state = fn.init_train_state(net, optimizer, fn.key(0), x)
    with pytest.raises(ValueError, match="kfac: '0' expects the weight and bias of a linear layer"):
        step(state, (x, torch.tensor([0, 1, 0, 1])))
    with pytest.raises(ValueError, match="expects params of linear layers, got none"):
        fn.kfac(others=fn.adam()).init_state({"bias": torch.ones(3)})
