"""evaluate: the numbers of the whole data set at once, whatever the batches are."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import funcnet as fn

F64 = torch.float64
METRICS = {
    "accuracy": fn.metrics.accuracy(),
    "confusion": fn.metrics.confusion_matrix(3),
    "perplexity": fn.metrics.perplexity(),
    "smoothed": fn.cross_entropy(label_smoothing=0.1),
    "each": fn.cross_entropy(reduction="none"),
    "margin": lambda prediction, target: prediction.amax(1) - prediction.amin(1),
    "spread": lambda prediction, target: prediction.std(1).mean(),
}


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=F64, device="cpu")
    return drawn.to(torch.get_default_device())


NET = fn.serial(fn.linear(6), fn.batch_norm(), fn.dropout(0.5), fn.tanh(), fn.linear(3))
SMALL = fn.linear(3)
X = numbers(23, 4)
TARGET = numbers(23, 3, seed=1).argmax(1)


def trained(optimizer=None, net=NET, x=X):
    """A train state after a few steps."""
    optimizer = optimizer or fn.sgd(0.1)
    state = fn.init_train_state(net, optimizer, fn.key(0), x)
    step = fn.train_step(net, fn.cross_entropy(), optimizer)
    for _ in range(3):
        state, _ = step(state, (x, TARGET))
    return state


def expected(state, params=None):
    """The same of all examples in one batch, from the definitions."""
    prediction, _ = NET.apply(params or state.params, X, state.state, train=False)
    loss = fn.cross_entropy(reduction="none").apply(prediction, TARGET)
    onehot = torch.nn.functional.one_hot
    return {
        "loss": loss.mean(),
        "accuracy": (prediction.argmax(1) == TARGET).double().mean(),
        "confusion": onehot(TARGET, 3).T @ onehot(prediction.argmax(1), 3),
        "perplexity": loss.mean().exp(),
        "smoothed": METRICS["smoothed"].apply(prediction, TARGET),
        "each": loss.mean(),
        "margin": (prediction.amax(1) - prediction.amin(1)).mean(),
        "spread": prediction.std(1).mean(),
    }


def assert_close(found, wanted):
    assert list(found) == ["loss", *METRICS]
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-12, atol=1e-12)


def cut(size):
    return [(X[i : i + size], TARGET[i : i + size]) for i in range(0, 23, size)]


@pytest.mark.parametrize("size", [1, 8, 23])
def test_the_values_are_those_of_all_examples_at_once(size):
    state = trained()
    before = [leaf._version for leaf in fn.tree.leaves(state)]
    evaluation = fn.evaluate(NET, fn.cross_entropy(), METRICS, cut(size))
    for _ in range(2):
        assert_close(evaluation(state), expected(state))
    assert [leaf._version for leaf in fn.tree.leaves(state)] == before
    assert fn.evaluate(NET, fn.cross_entropy(), None, cut(size))(state).keys() == {"loss"}


def test_an_empty_batch_changes_nothing():
    state = trained()
    batches = [cut(8)[0], (X[:0], TARGET[:0]), *cut(8)[1:]]
    metrics = {name: METRICS[name] for name in ("accuracy", "smoothed", "each")}
    found = fn.evaluate(NET, fn.cross_entropy(), metrics, batches)(state)
    for name, value in found.items():
        torch.testing.assert_close(value, expected(state)[name], rtol=1e-12, atol=1e-12)


@pytest.mark.cpu_only
def test_batches_may_be_of_a_dataloader_or_of_numpy():
    state = trained()
    loader = DataLoader(TensorDataset(X, TARGET), batch_size=8)
    arrays = [[x.numpy(), target.numpy()] for x, target in cut(8)]
    arrays[0][0].flags.writeable = False  # as memory-mapped arrays are
    for batches in (loader, tuple(cut(8)), arrays):
        evaluation = fn.evaluate(NET, fn.cross_entropy(), METRICS, batches)
        assert_close(evaluation(state), expected(state))
        assert_close(evaluation(state), expected(state))


@pytest.mark.cpu_only
def test_under_jit_each_size_of_batch_compiles_once():
    traces = []

    def margin(prediction, target):
        traces.append(None)
        return METRICS["margin"](prediction, target)

    options = (SMALL, fn.cross_entropy(), {"accuracy": METRICS["accuracy"], "margin": margin})
    compiled = fn.evaluate(*options, cut(12), jit=True)
    for seed in range(2):
        state = fn.init_train_state(SMALL, fn.sgd(0.1), fn.key(seed), X)
        found = compiled(state)
        assert len(traces) == 2 + 2 * seed
        expected = fn.evaluate(*options, cut(12))(state)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


def test_averaged_params_are_those_that_the_optimizer_keeps():
    optimizer = fn.optimizers.params_ema(fn.sgd(0.5), 0.5)
    state = trained(optimizer)
    average = fn.optimizers.eval_params(state.opt_state, state.params)
    assert not torch.equal(average["0"]["weight"], state.params["0"]["weight"])
    found = fn.evaluate(NET, fn.cross_entropy(), METRICS, cut(8), averaged=True)(state)
    assert_close(found, expected(state, average))
    plain = trained()
    found = fn.evaluate(NET, fn.cross_entropy(), METRICS, cut(8), averaged=True)(plain)
    assert_close(found, expected(plain))


def test_a_population_is_evaluated_under_vmap():
    evaluation = fn.evaluate(NET, fn.cross_entropy(), METRICS, cut(8))
    states = [trained(fn.sgd(rate)) for rate in (0.1, 0.2, 0.3)]
    together = fn.vmap(evaluation)(fn.tree.map(lambda *each: torch.stack(each), *states))
    for member, state in enumerate(states):
        assert_close({name: v[member] for name, v in together.items()}, expected(state))


def test_a_step_gives_the_metrics_of_its_batch():
    state = trained()
    metrics = {name: METRICS[name] for name in ("accuracy", "confusion", "smoothed")}
    step = fn.train_step(NET, fn.cross_entropy(), fn.sgd(0.1), metrics=metrics)
    _, measured = step(state, (X, TARGET))
    key = fn.fold_in(state.key, state.step)
    prediction, _ = NET.apply(state.params, X, state.state, key=key, train=True)
    for name in ("accuracy", "confusion"):
        wanted = METRICS[name].of_batch(prediction, TARGET)
        assert torch.equal(measured[name], wanted)
    assert torch.equal(measured["smoothed"], METRICS["smoothed"].apply(prediction, TARGET))


@pytest.mark.cpu_only
def test_a_compiled_step_gives_them_too():
    metrics = {name: METRICS[name] for name in ("accuracy", "perplexity")}
    step = fn.train_step(SMALL, fn.cross_entropy(), fn.sgd(0.1), metrics=metrics)
    state = fn.init_train_state(SMALL, fn.sgd(0.1), fn.key(0), X)
    _, found = fn.jit(step)(state, (X, TARGET))
    _, expected = step(state, (X, TARGET))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


LOSS = fn.cross_entropy()
REFUSED = [
    (lambda: fn.evaluate(NET, LOSS, {}, iter(cut(8))), TypeError, "gone over again"),
    (lambda: fn.evaluate(NET, LOSS, {}, (b for b in cut(8))), TypeError, "got generator"),
    (lambda: fn.evaluate(NET, LOSS, {}, X), TypeError, "a list of batches or the like"),
    (lambda: fn.evaluate(NET, LOSS, {}, None), TypeError, "got NoneType"),
    (lambda: fn.evaluate(NET, LOSS, {}, [])(trained()), ValueError, "at least one batch"),
    (lambda: fn.evaluate(NET, LOSS, {}, (X, TARGET))(trained()), ValueError, "a batch .x, target"),
    (lambda: fn.evaluate(NET, LOSS, {}, [(X, X, X)])(trained()), ValueError, "got 3 things"),
    (lambda: fn.evaluate(NET, LOSS, {}, cut(8))(trained().params), TypeError, "a TrainState"),
    (lambda: fn.evaluate(NET, LOSS, [METRICS], cut(8)), TypeError, "dict of metrics, got list"),
    (lambda: fn.evaluate(NET, LOSS, {"loss": LOSS}, cut(8)), ValueError, "pick another name"),
    (lambda: fn.evaluate(NET, LOSS, {"f": 3}, cut(8)), TypeError, "metric 'f': expects a Metric"),
    (
        lambda: fn.evaluate(NET, fn.mse, {}, cut(8)),
        TypeError,
        "Loss as loss.*call it, as in fn.mse",
    ),
    (lambda: fn.evaluate(fn.linear, LOSS, {}, cut(8)), TypeError, "Layer as model"),
    (lambda: fn.evaluate(NET, LOSS, {"f": fn.metrics.r2}, cut(8)), TypeError, "got r2; call it"),
    (lambda: fn.evaluate(NET, LOSS, {"f": fn.mse}, cut(8)), TypeError, "got mse; call it"),
    (
        lambda: fn.evaluate(NET, LOSS, {"f": lambda y, t: 1.0}, cut(8))(trained()),
        TypeError,
        "metric 'f': expects a tensor, got float",
    ),
    (
        lambda: fn.evaluate(NET, LOSS, {}, [(np.array([None]), TARGET)])(trained()),
        TypeError,
        "arrays of numbers, got one of dtype object",
    ),
    (
        lambda: fn.train_step(NET, LOSS, fn.sgd(0.1), metrics={"f": fn.metrics.f1}),
        TypeError,
        "got f1; call it",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_wrong_input_is_an_error(call, error, message):
    with pytest.raises(error, match=message):
        call()
