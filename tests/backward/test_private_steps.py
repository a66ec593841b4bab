"""Private steps: clipped by the norms of torch.func, with noise of the right size."""

import pytest
import torch

import funcnet as fn

KEY = fn.key(7)
DOUBLE = torch.float64
NET = fn.serial(fn.linear(8), fn.tanh(), fn.layer_norm(), fn.linear(3))
LOSS = fn.cross_entropy()
X = fn.random.normal(fn.key(1), (10, 6), DOUBLE)
TARGET = torch.arange(10) % 3
PARAMS, _ = NET.init(KEY, X)
BATCH = (X, TARGET)


def example_grads():
    def loss(params, x, target):
        return LOSS.apply(NET.apply(params, x[None])[0], target[None])

    return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(PARAMS, *BATCH)


def norms_of(grads):
    return torch.stack([g.flatten(1).norm(dim=1) for g in fn.tree.leaves(grads)]).norm(dim=0)


def require_close(expected, found, rtol=1e-12):
    for leaf, other in zip(fn.tree.leaves(expected), fn.tree.leaves(found), strict=True):
        torch.testing.assert_close(leaf, other, rtol=rtol, atol=1e-14)


def weighted_mean(grads, weights):
    return fn.tree.map(lambda g: torch.tensordot(weights, g, 1) / len(X), grads)


def test_clipped_gradients_are_those_of_torch_func():
    grads, bound = example_grads(), 3.5
    norms = norms_of(grads)
    assert bool((norms > bound).any())
    assert bool((norms < bound).any())
    expected = weighted_mean(grads, (bound / norms).clamp(max=1))
    value, found, state = fn.private_value_and_grad(NET, LOSS, bound, 0.0)(PARAMS, BATCH)
    require_close(expected, found)
    torch.testing.assert_close(value, LOSS.apply(NET.apply(PARAMS, X)[0], TARGET))
    assert state == {}


def test_each_layer_by_itself_and_all_alike():
    grads, bound = example_grads(), 3.5
    per_layer = {
        name: weighted_mean(each, (bound / 3**0.5 / norms_of(each)).clamp(max=1))
        for name, each in grads.items()
    }
    f = fn.private_value_and_grad(NET, LOSS, bound, 0.0, clipping="layer")
    require_close(per_layer, f(PARAMS, BATCH)[1])
    alike = weighted_mean(grads, bound / (norms_of(grads) + 0.01))
    f = fn.private_value_and_grad(NET, LOSS, bound, 0.0, clipping="normalized")
    require_close(alike, f(PARAMS, BATCH)[1])


def test_without_noise_and_with_a_large_bound_training_is_sgd():
    plain = fn.value_and_grad(NET, LOSS)
    private = fn.private_value_and_grad(NET, LOSS, 1e9, 0.0)
    ends = []
    for f in (plain, private):
        params = PARAMS
        for _ in range(20):
            _, grads, _ = f(params, BATCH)
            params = fn.tree.map(lambda p, g: p - 0.5 * g, params, grads)
        ends.append(params)
    require_close(*ends, rtol=1e-10)


def test_noise_has_the_deviation_of_the_bound_and_draws_of_its_own_for_each_leaf():
    bound, noise = 0.5, 2.0
    quiet = fn.private_value_and_grad(NET, LOSS, bound, 0.0)(PARAMS, BATCH)[1]
    f = fn.private_value_and_grad(NET, LOSS, bound, noise)
    found = fn.vmap(lambda key: f(PARAMS, BATCH, key=key)[1])(fn.random.split(KEY, 500))
    for path, drawn in fn.tree.to_dotted(found).items():
        errors = drawn - fn.tree.to_dotted(quiet)[path]
        assert errors.std().item() == pytest.approx(bound * noise / len(X), rel=0.05), path
        assert abs(errors.mean().item()) < 0.02, path
    assert not torch.equal(found["0"]["bias"], found["2"]["bias"])
    again = f(PARAMS, BATCH, key=KEY)[1]
    require_close(again, f(PARAMS, BATCH, key=KEY)[1], rtol=0)


def test_what_pads_a_batch_counts_for_nothing():
    mask = torch.arange(10) < 6
    f = fn.private_value_and_grad(NET, LOSS, 0.5, 0.0, batch_size=8.0)
    value, grads, _ = f(PARAMS, BATCH, mask=mask)
    short_value, short, _ = f(PARAMS, (X[:6], TARGET[:6]))
    require_close(short, grads)
    torch.testing.assert_close(value, short_value)
    _, nothing, _ = f(PARAMS, BATCH, mask=torch.zeros(10, dtype=torch.bool))
    assert not any(leaf.any() for leaf in fn.tree.leaves(nothing))


def test_padding_need_not_be_finite():
    mask = torch.arange(10) % 3 != 0
    f = fn.private_value_and_grad(NET, LOSS, 0.5, 0.0, batch_size=8.0)
    expected = f(PARAMS, (X[mask], TARGET[mask]))[:2]
    for wrong in (float("nan"), float("inf"), 1e200):
        x = torch.where(mask[:, None], X, wrong)
        require_close(expected, f(PARAMS, (x, TARGET), mask=mask)[:2])


def test_no_example_is_above_the_bound_where_positions_cancel():
    # Cotangents that sum to 0, of positions that are nearly equal, as those of keys in attention.
    x = 100 + 0.005 * fn.random.normal(fn.key(2), (8, 5, 64))
    net, loss = fn.linear(64, bias=False), fn.mse("sum")
    params, _ = net.init(KEY, x)
    dy = 1000 * fn.random.normal(fn.key(3), (8, 5, 64))
    dy -= dy.mean(1, keepdim=True)
    batch = x, net.apply(params, x)[0] - dy / 2
    f = fn.private_value_and_grad(net, loss, 1.0, 0.0, batch_size=1)
    for index in range(8):
        _, grads, _ = f(params, batch, mask=torch.arange(8) == index)
        assert grads["weight"].norm() <= 1.0 + 1e-5


@pytest.mark.parametrize("clipping", ["flat", "layer", "normalized"])
def test_without_params_there_is_the_value_alone(clipping):
    frozen = fn.freeze(NET, ("0", "2", "3"))
    for net in (fn.tanh(), fn.serial(), frozen):
        params, state = net.init(KEY, X)
        f = fn.private_value_and_grad(net, fn.mse(), 1.0, 1.0, clipping=clipping)
        target = net.apply(params, X, state)[0] + 1
        value, grads, _ = f(params, (X, target), state, key=KEY)
        assert (value.item(), grads) == (pytest.approx(1.0), {})


def test_a_step_of_a_poisson_batch_runs_under_jit_and_over_seeds():
    f = fn.private_value_and_grad(NET, LOSS, 0.5, 1.0, batch_size=4.0)

    def step(key):
        examples, mask, _ = fn.poisson_batch(fn.fold_in(key, 0), 10, 0.4, capacity=8)
        batch = X[examples], TARGET[examples]
        return f(PARAMS, batch, key=fn.fold_in(key, 1), mask=mask)[:2]

    keys = fn.random.split(KEY, 3)
    solo = [step(key) for key in keys]
    members = fn.vmap(step)(keys)
    for index, each in enumerate(solo):
        require_close(each, fn.tree.map(lambda leaf, i=index: leaf[i], members), rtol=1e-10)
    require_close(solo[0], fn.jit(step)(keys[0]), rtol=1e-10)


def test_examples_on_another_axis_and_inputs_that_all_share():
    net = fn.serial(fn.rnn(4), fn.item(0), fn.select(-1, 0), fn.linear(3))
    x = fn.random.normal(KEY, (5, 10, 6), DOUBLE)  # (steps, batch, features)
    params, _ = net.init(KEY, x)
    _, plain, _ = fn.value_and_grad(net, LOSS)(params, (x, TARGET))
    f = fn.private_value_and_grad(net, LOSS, 1e9, 0.0, in_axes=(1, 0))
    require_close(plain, f(params, (x, TARGET))[1], rtol=1e-10)
    f = fn.private_value_and_grad(net, LOSS, 1e9, 0.0, in_axes=(-2, 0))
    require_close(plain, f(params, (x, TARGET))[1], rtol=1e-10)
    bilinear, row = fn.bilinear(3), X[:1]
    params, _ = bilinear.init(KEY, (row, row))
    f = fn.defer_examples(bilinear, LOSS, in_axes=((0, None), 0))
    values, _, _ = f(params, ((X, row), TARGET))
    y, _ = bilinear.apply(params, (X, row.expand_as(X)))
    torch.testing.assert_close(values.mean(), LOSS.apply(y, TARGET))


def test_each_example_has_a_dropout_of_its_own():
    net = fn.serial(fn.dropout(0.5), fn.linear(3))
    x = X[:1].expand(6, 6)
    params, _ = net.init(KEY, x)
    f = fn.defer_examples(net, LOSS)
    values, _, _ = f(params, (x, TARGET[:1].expand(6)), key=KEY)
    assert len(values.unique()) > 1


def test_a_state_of_the_params_alone_is_kept():
    net = fn.serial(fn.spectral_norm(fn.linear(4)), fn.linear(3))
    params, state = net.init(KEY, X)
    f = fn.private_value_and_grad(net, LOSS, 1.0, 0.0)
    _, _, after = f(params, BATCH, state)
    require_close(net.apply(params, X, state, train=True)[1], after)


def counting():
    def init(x):
        return {"count": fn.State((), fn.initializers.zeros())}

    def forward(params, x, state, key, train):
        y, pullback, _ = fn.tanh().vjp({}, x)
        return y, pullback, {"count": state["count"] + x.sum()}

    return fn.stateful(fn.declare(init), forward, name="counting")


MIXING = {
    "batch_norm": (
        fn.serial(fn.linear(3), fn.residual(fn.serial(body=fn.batch_norm()))),
        r"serial\['1.body'\] batch_norm computes what is of one example from others.*group_norm",
    ),
    "by frequency": (
        fn.serial(table=fn.embedding(5, 3, scale_grad_by_freq=True)),
        r"serial\['table'\] embedding computes",
    ),
    "experts": (fn.experts(fn.linear(4), fn.linear(3), n=4), "private_value_and_grad: experts com"),
}


@pytest.mark.parametrize("name", MIXING)
def test_layers_that_mix_examples_are_refused_by_path(name):
    net, message = MIXING[name]
    with pytest.raises(ValueError, match=message):
        fn.private_value_and_grad(net, LOSS, 1.0, 1.0)


def test_a_state_that_depends_on_the_examples_is_refused():
    net = fn.serial(head=fn.linear(3), count=counting())
    params, state = net.init(KEY, X)
    with pytest.raises(ValueError, match=r"new state 'count.count' depends on the examples"):
        fn.private_value_and_grad(net, LOSS, 1.0, 0.0)(params, BATCH, state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bound": 0.0}, "bound must be > 0, got 0.0"),
        ({"noise": -1.0}, "noise must be >= 0, got -1.0"),
        ({"batch_size": 0}, "batch_size must be > 0, got 0"),
        ({"clipping": "ghost"}, "clipping must be one of .*'flat'.*, got 'ghost'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    options = {"bound": 1.0, "noise": 1.0, **options}
    with pytest.raises(ValueError, match=f"private_value_and_grad: {message}"):
        fn.private_value_and_grad(NET, LOSS, **options)


def test_a_wrong_batch_mask_loss_or_key_is_refused():
    f = fn.private_value_and_grad(NET, LOSS, 1.0, 1.0)
    with pytest.raises(ValueError, match="noise needs a key"):
        f(PARAMS, BATCH)
    with pytest.raises(ValueError, match=r"expects a mask of \(10,\), .* got bool \(9,\)"):
        f(PARAMS, BATCH, key=KEY, mask=torch.ones(9, dtype=torch.bool))
    for wrong in (torch.ones(10), torch.arange(10), [True] * 10):
        with pytest.raises(ValueError, match=r"expects a mask of \(10,\), of booleans, got "):
            f(PARAMS, BATCH, key=KEY, mask=wrong)
    with pytest.raises(ValueError, match="expects mapped axes of one length"):
        f(PARAMS, (X, TARGET[:9]), key=KEY, mask=torch.ones(10, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one example"):
        f(PARAMS, (X[:0], TARGET[:0]), key=KEY)
    with pytest.raises(ValueError, match="expects mapped axes of one length"):
        f(PARAMS, (X, TARGET[:9]), key=KEY)
    with pytest.raises(ValueError, match="scalar value"):
        fn.private_value_and_grad(NET, fn.cross_entropy(reduction="none"), 1.0, 0.0)(PARAMS, BATCH)
    with pytest.raises(TypeError, match=r"in_axes .* does not fit the batch"):
        fn.private_value_and_grad(NET, LOSS, 1.0, 0.0, in_axes=(0,))(PARAMS, BATCH)
    with pytest.raises(TypeError, match=r"in_axes expects integers and None, got 'a'"):
        fn.private_value_and_grad(NET, LOSS, 1.0, 0.0, in_axes="a")(PARAMS, BATCH)
    with pytest.raises(ValueError, match="in_axes: 2 is no axis of"):
        fn.private_value_and_grad(NET, LOSS, 1.0, 0.0, in_axes=(2, 0))(PARAMS, BATCH)


def test_a_bound_is_a_number_and_finite_where_there_is_noise():
    with pytest.raises(TypeError, match="bound must be a number or a 0-d tensor, got None"):
        fn.private_value_and_grad(fn.linear(1), fn.mse(), None, 1.0)
    with pytest.raises(ValueError, match="bound must be finite where there is noise"):
        fn.private_value_and_grad(fn.linear(1), fn.mse(), float("inf"), 1.0)
