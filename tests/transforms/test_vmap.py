"""vmap: axes, trees, nesting, and populations that equal their members, eager and compiled."""

import pytest
import torch

import funcnet as fn

A = fn.random.normal(fn.key(0), (4, 3, 2))
B = fn.random.normal(fn.key(1), (3, 5, 2))


def assert_same(found, expected):
    assert fn.tree.flatten(found)[1] == fn.tree.flatten(expected)[1]
    for one, other in zip(fn.tree.leaves(found), fn.tree.leaves(expected), strict=True):
        torch.testing.assert_close(one, other)


def stacked(results):
    return fn.tree.map(lambda *leaves: torch.stack(leaves), *results)


@pytest.fixture(params=[False, True], ids=["eager", "jitted"])
def apply(request):
    return (lambda f, *args: fn.jit(f)(*args)) if request.param else (lambda f, *args: f(*args))


def test_axes_are_prefixes_of_trees(apply):
    def f(pair, scale):
        return {"sum": pair["a"] + pair["b"][0], "scale": (scale, pair["a"].sum())}

    pair = {"a": A, "b": (B,)}
    mapped = fn.vmap(f, in_axes=({"a": 1, "b": 0}, None), out_axes={"sum": -1, "scale": 0})
    with pytest.raises(RuntimeError):
        apply(mapped, pair, torch.tensor(2.0))
    pair = {"a": A, "b": (B[:, :4],)}
    found = apply(mapped, pair, torch.tensor(2.0))
    alone = [f({"a": A[:, i], "b": (B[i, :4],)}, torch.tensor(2.0)) for i in range(3)]
    assert_same(found["sum"], torch.stack([each["sum"] for each in alone], -1))
    assert_same(found["scale"], stacked([each["scale"] for each in alone]))


def test_an_unmapped_result_stays_one(apply):
    def f(x, y):
        return x + y, y * 2

    found = apply(fn.vmap(f, in_axes=(-1, None), out_axes=(1, None)), A, torch.tensor(1.0))
    assert_same(found, ((A + 1).movedim(-1, 1), torch.tensor(2.0)))


def test_it_nests(apply):
    def f(x, y):
        return x @ y

    outer = fn.vmap(fn.vmap(f, in_axes=(None, 0)), in_axes=(0, None))
    found = apply(outer, A, B.transpose(1, 2))
    expected = torch.stack([torch.stack([a @ b.T for b in B]) for a in A])
    assert_same(found, expected)


def test_a_pullback_may_be_the_result(apply):
    net = fn.serial(fn.linear(4), fn.tanh(), fn.linear(1))
    params, _ = net.init(fn.key(0), A[0])

    def forward(x):
        y, pullback, _ = net.vjp(params, x)
        return y, pullback

    y, pullback = apply(fn.vmap(forward), A)
    assert isinstance(pullback, fn.Pullback)
    grads = apply(fn.vmap(lambda pullback, dy: pullback(dy)), pullback, torch.ones_like(y))
    alone = [forward(x) for x in A]
    assert_same(y, stacked([each for each, _ in alone]))
    assert_same(grads, stacked([each(torch.ones(3, 1)) for _, each in alone]))


NET = fn.serial(fn.linear(6), fn.batch_norm(), fn.tanh(), fn.dropout(0.3), fn.linear(2))
X = fn.random.normal(fn.key(2), (5, 8, 3))
TARGET = fn.random.normal(fn.key(3), (5, 8, 2))


def test_a_population_is_its_members(apply):
    optimizer = fn.sgd(0.1, 0.9)
    step = fn.train_step(NET, fn.mse(), optimizer)
    keys = fn.random.split(fn.key(4), 5)

    def start(key):
        return fn.init_train_state(NET, optimizer, key, X[0])

    population = apply(fn.vmap(start), keys)
    members = [start(key) for key in keys]
    assert_same(population, stacked(members))
    for _ in range(3):
        population, _ = apply(fn.vmap(step), population, (X, TARGET))
        members = [step(member, (X[i], TARGET[i]))[0] for i, member in enumerate(members)]
    assert_same(population, stacked(members))


def test_hyperparameters_may_be_mapped(apply):
    net = fn.serial(fn.linear(4), fn.relu(), fn.linear(2))
    rates = torch.tensor([0.01, 0.1, 0.5])
    state = fn.init_train_state(net, fn.sgd(0.1), fn.key(0), X[0])
    batch = (X[0], TARGET[0])

    def step(rate, state, batch):
        return fn.train_step(net, fn.mse(), fn.sgd(rate, momentum=0.0))(state, batch)

    found = apply(fn.vmap(step, in_axes=(0, None, None)), rates, state, batch)
    assert_same(found, stacked([step(float(rate), state, batch) for rate in rates]))


def test_a_compiled_member_equals_its_compiled_solo_run_bit_for_bit():
    optimizer = fn.adam(0.01)
    step = fn.train_step(NET, fn.mse(), optimizer)
    keys = fn.random.split(fn.key(4), 5)
    population = fn.vmap(lambda key: fn.init_train_state(NET, optimizer, key, X[0]))(keys)
    together, _ = fn.jit(fn.vmap(step))(population, (X, TARGET))
    solo = fn.jit(step)
    for place in range(5):
        member = fn.tree.map(lambda leaf, i=place: leaf[i], population)
        alone, _ = solo(member, (X[place], TARGET[place]))
        for one, other in zip(fn.tree.leaves(alone), fn.tree.leaves(together), strict=True):
            assert torch.equal(one, other[place])


@pytest.mark.cpu_only
def test_a_donated_population_is_updated_in_place():
    step = fn.train_step(NET, fn.mse(), fn.adam(0.01))
    keys = fn.random.split(fn.key(4), 5)
    population = fn.vmap(lambda key: fn.init_train_state(NET, fn.adam(0.01), key, X[0]))(keys)
    expected = fn.vmap(step)(population, (X, TARGET))
    population = fn.tree.map(lambda leaf: leaf.contiguous(), population)
    places = {leaf.data_ptr() for leaf in fn.tree.leaves(population.params)}
    found = fn.jit(fn.vmap(step), donate=0)(population, (X, TARGET))
    assert {leaf.data_ptr() for leaf in fn.tree.leaves(found[0].params)} == places
    assert_same(found[1], expected[1])


def test_without_members_the_results_are_empty():
    found = fn.jit(fn.vmap(lambda x: x.sum() + torch.ones(2)))(torch.zeros(0, 3))
    assert found.shape == (0, 2)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "in_axes maps none", lambda: fn.vmap(abs, in_axes=None)(A)),
        (
            ValueError,
            "one length, got 4 at argument 0, 3 at argument 1",
            lambda: fn.vmap(torch.add)(A, B),
        ),
        (
            ValueError,
            r"axis 3 is out of range for argument 0, float32 \(4, 3, 2\)",
            lambda: fn.vmap(abs, in_axes=3)(A),
        ),
        (TypeError, "in_axes .* does not fit", lambda: fn.vmap(abs, in_axes=(0, 0))(A)),
        (TypeError, "expects integers and None, got 'x'", lambda: fn.vmap(abs, in_axes="x")(A)),
        (TypeError, "a tensor to map at argument 1", lambda: fn.vmap(torch.add)(A, 2.0)),
        (TypeError, "expects a function, got float32", lambda: fn.vmap(A)),
        (
            TypeError,
            "out_axes .* does not fit",
            lambda: fn.vmap(lambda x: x, out_axes={"a": 0})(A),
        ),
        (ValueError, "out_axes 5 is out of range", lambda: fn.vmap(abs, out_axes=5)(A)),
    ],
)
def test_misuse_is_told(error, message, call):
    with pytest.raises(error, match=message):
        call()
