"""fit: the loop around a step, its validations, checkpoints, and how it ends."""

import os
import signal
import sys
import types

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import funcnet as fn

X = torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(20, 3)
TARGET = X.sum(1, keepdim=True).sin()
NET = fn.serial(fn.linear(4), fn.tanh(), fn.dropout(0.1), fn.linear(1))
OPTIMIZER = fn.adam(0.05)
STEP = fn.train_step(NET, fn.mse(), OPTIMIZER, metrics={"mae": fn.mae()})
VALIDATION = fn.evaluate(NET, fn.mse(), None, [(X, TARGET)])
SOURCE = fn.batches((X, TARGET), 5)


def start():
    return fn.init_train_state(NET, OPTIMIZER, fn.key(0), X)


def fit(batches=SOURCE, step=STEP, state=None, **options):
    return fn.fit(step, start() if state is None else state, batches, progress=False, **options)


def equal(found, expected):
    leaves, treedef = fn.tree.flatten(found)
    others, other_treedef = fn.tree.flatten(expected)
    assert treedef == other_treedef
    for a, b in zip(leaves, others, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def by_hand(steps, batches=SOURCE):
    state, losses = start(), []
    for number in range(steps):
        batch = batches(state.key, number) if callable(batches) else batches[number % len(batches)]
        state, metrics = STEP(state, batch)
        losses.append(metrics["loss"])
    return state, torch.stack(losses)


BATCHES = [(X[i : i + 5], TARGET[i : i + 5]) for i in (0, 5, 10, 15)]


class Unsized(IterableDataset):
    """Of a length that nobody knows before its end."""

    def __iter__(self):
        yield from zip(X, TARGET, strict=True)


KINDS = {
    "source": (SOURCE, SOURCE),
    "function": (lambda key, step: BATCHES[step % 4], BATCHES),
    "list": (BATCHES, BATCHES),
    "arrays of numpy": ([(x.numpy(), target.numpy()) for x, target in BATCHES], BATCHES),
    "loader": (DataLoader(TensorDataset(X, TARGET), 5), BATCHES),
    "unsized": (DataLoader(Unsized(), 5), BATCHES),
}


@pytest.mark.cpu_only
@pytest.mark.parametrize(("batches", "same"), KINDS.values(), ids=KINDS)
def test_it_is_the_loop_by_hand(batches, same):
    state, history = fit(batches, steps=10)
    expected, losses = by_hand(10, same)
    equal(state, expected)
    equal(history["loss"], losses)
    assert {name: tuple(values.shape) for name, values in history.items()} == {
        "loss": (10,), "mae": (10,)
    }  # fmt: skip


def test_epochs_are_passes_over_the_data_and_another_call_goes_on():
    once, _ = fit(epochs=3)
    assert int(once.step) == 12
    first, _ = fit(epochs=1)
    again, history = fit(state=first, epochs=2)
    equal(again, once)
    assert len(history["loss"]) == 8


def test_what_is_given_does_not_change():
    state = start()
    before = [(leaf, leaf._version) for leaf in fn.tree.leaves(state)]
    fit(state=state, steps=2)
    assert all(leaf._version == version for leaf, version in before)


def test_a_compiled_step_that_donates_takes_the_steps_of_the_eager_one(tmp_path):
    step = fn.jit(STEP, donate=0)
    state, history = fit(step=step, epochs=2, checkpoint=tmp_path, every=3, validation=VALIDATION)
    _, expected = fit(epochs=2, validation=VALIDATION)
    for name, values in expected.items():
        torch.testing.assert_close(history[name], values)
    assert int(state.step) == 8


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"epochs": 3}, [4, 8, 12]),
        ({"steps": 6}, [4, 6]),
        ({"steps": 8}, [4, 8]),
        ({"steps": 7, "validate_every": 3}, [3, 6, 7]),
    ],
)
def test_validations_are_at_the_ends_of_epochs_or_every_n_steps(options, expected):
    state, history = fit(validation=VALIDATION, **options)
    assert history["val_step"].tolist() == expected
    equal(history["val_loss"][-1], VALIDATION(state)["loss"])
    assert history["val_step"].dtype == torch.int64


def test_callbacks_see_each_step_and_each_validation_and_may_stop():
    seen = []

    def watch(state, logs):
        seen.append((int(state.step), list(logs)))

    def stop(state, logs):
        return "stop" if "val_loss" in logs and state.step == 8 else None

    state, _ = fit(epochs=5, validation=VALIDATION, callbacks=[watch, stop])
    assert int(state.step) == 8
    each = [(n, ["loss", "mae"]) for n in range(1, 9)]
    assert seen == [*each[:4], (4, ["val_loss"]), *each[4:], (8, ["val_loss"])]
    for answer in (True, torch.tensor(True), "stop"):
        assert int(fit(epochs=5, callbacks=lambda state, logs, a=answer: a)[0].step) == 1
    with pytest.raises(TypeError, match="a callback must return None, True, or 'stop', got 3"):
        fit(callbacks=lambda state, logs: 3)


def test_early_stopping_ends_the_run():
    values = iter([3.0, 2.0, 2.5, 2.5, 1.0])

    def validation(state):
        return {"loss": torch.tensor(next(values))}

    stopping = {"val_loss": fn.early_stopping(2)}
    state, history = fit(epochs=9, validation=validation, early_stopping=stopping)
    assert history["val_loss"].tolist() == [3.0, 2.0, 2.5, 2.5]
    assert int(state.step) == 16
    state, _ = fit(epochs=9, early_stopping={"mae": fn.early_stopping(1, min_delta=100.0)})
    assert int(state.step) == 2


class DiedError(Exception):
    """A process that ends."""


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", ["source", "list", "loader", "unsized"])
@pytest.mark.parametrize(
    "options", [{"every": 3}, {"every": 4}, {}, {"every": 1, "validate_every": 3}]
)
@pytest.mark.parametrize("moment", [4, 7, 8, 10])
def test_a_run_that_is_resumed_ends_as_one_that_is_left_alone(tmp_path, kind, options, moment):
    common = {"epochs": 3, "validation": VALIDATION, **options}
    common["early_stopping"] = {"val_loss": fn.early_stopping(2, min_delta=0.05)}
    alone, history = fit(KINDS[kind][0], checkpoint=tmp_path / "alone", **common)

    def die(state, logs):
        if state.step == moment:
            raise DiedError

    killed = {"checkpoint": tmp_path / "killed", "resume": True, **common}
    with pytest.raises(DiedError):
        fit(KINDS[kind][0], callbacks=die, **killed)
    resumed, later = fit(KINDS[kind][0], **killed)
    equal(resumed, alone)
    equal(later, history)
    # A run that is done is not gone on with.
    equal(fit(KINDS[kind][0], **killed), (resumed, later))


def test_checkpoints_are_kept_with_the_best_one(tmp_path):
    values = iter([0.1, 0.5, 0.4, 0.3, 0.2])
    state, _ = fit(
        epochs=5, checkpoint=tmp_path, keep=2,
        validation=lambda state: {"loss": torch.tensor(next(values))},
    )  # fmt: skip
    assert list(fn.checkpoint.steps(tmp_path)) == [4, 16, 20]
    assert fn.checkpoint.best(tmp_path).name == "step_0000000004.safetensors"
    last = fn.load(fn.checkpoint.latest(tmp_path), like=start(), at="train_state")
    equal(last, state)
    with pytest.raises(ValueError, match="checkpoints of another run, the last step_0000000020"):
        fit(checkpoint=tmp_path)


def test_a_full_disk_is_a_warning_and_loses_nothing(tmp_path):
    written = []

    def save(step, tree, **options):
        if step == 3:
            raise OSError(28, "No space left on device")
        written.append(step)

    run = fn.checkpoint.run_folder(tmp_path / "run")._replace(save=save)
    with pytest.warns(RuntimeWarning, match="no checkpoint of step 3.*No space left"):
        state, history = fit(steps=5, checkpoint=run, every=1)
    expected, losses = by_hand(5)
    equal(state.params, expected.params)
    equal(history["loss"], losses)
    assert written == [1, 2, 4, 5]


@pytest.mark.cpu_only
@pytest.mark.parametrize("moment", [6, 8])
def test_ctrl_c_ends_the_run_after_the_step_with_a_checkpoint(tmp_path, moment):
    before = signal.getsignal(signal.SIGINT)

    def press(state, logs):
        if state.step == moment:
            os.kill(os.getpid(), signal.SIGINT)

    step = fn.train_step(NET, fn.mse(), OPTIMIZER, metrics={"mae": fn.mae()}, donate=True)
    state, history = fit(
        step=step, epochs=5, checkpoint=tmp_path, callbacks=press, validation=VALIDATION
    )
    assert int(state.step) == len(history["loss"]) == moment
    assert signal.getsignal(signal.SIGINT) is before
    assert list(fn.checkpoint.steps(tmp_path)) == [4, moment]
    resumed = fit(epochs=5, checkpoint=tmp_path, resume=True, validation=VALIDATION)
    equal(resumed, fit(epochs=5, validation=VALIDATION))


@pytest.mark.cpu_only
def test_ctrl_c_twice_is_an_interrupt_at_once():
    before = signal.getsignal(signal.SIGINT)  # ignored in a process in the background

    def press(state, logs):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(epochs=5, callbacks=press)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_population_is_trained_by_a_step_under_vmap():
    states = [fn.init_train_state(NET, OPTIMIZER, fn.key(seed), X) for seed in range(2)]
    many = fn.tree.map(lambda *leaves: torch.stack(leaves), *states)
    _, history = fit(step=fn.vmap(STEP, (0, None)), state=many, epochs=2)
    assert history["loss"].shape == (8, 2)
    torch.testing.assert_close(history["loss"][:, 0], fit(epochs=2)[1]["loss"])


class Endless(IterableDataset):
    def __iter__(self):
        number = 0
        while True:
            yield X[number % 20], TARGET[number % 20]
            number += 1


def test_data_without_an_end_needs_steps():
    state, _ = fit(DataLoader(Endless(), 5), steps=6)
    equal(state, by_hand(6, BATCHES)[0])
    with pytest.raises(ValueError, match="a source without steps_per_epoch needs steps"):
        fit(lambda key, step: BATCHES[0])


def test_a_generator_is_one_pass():
    state, _ = fit(batch for batch in BATCHES)
    assert int(state.step) == 4
    with pytest.raises(ValueError, match="at least one batch, got none in epoch 2"):
        fit((batch for batch in BATCHES), epochs=2)


def test_a_long_history_is_that_of_a_short_one():
    step = lambda state, batch: (state, {"n": batch})  # noqa: E731
    numbers = [torch.tensor(float(n)) for n in range(2500)]
    _, history = fit(numbers, step=step)
    assert history["n"].tolist() == list(range(2500))


@pytest.mark.cpu_only
def test_the_bar_shows_the_metrics_and_needs_no_tqdm(monkeypatch):
    made = []

    class Recorded:
        def __init__(self, **options):
            made.append(self)
            self.n, self.total, self.shown = 0, options["total"], {}

        def set_postfix(self, values, refresh):
            self.shown.update(values)

        def update(self, n):
            self.n += n

        def close(self):
            self.closed = True

    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Recorded))
    fn.fit(STEP, start(), SOURCE, epochs=2, validation=VALIDATION)
    (bar,) = made
    assert (bar.n, bar.total, bar.closed) == (8, 8, True)
    assert {"loss", "mae"} <= bar.shown.keys()
    monkeypatch.setitem(sys.modules, "tqdm", None)
    fn.fit(STEP, start(), SOURCE)


@pytest.mark.cpu_only
def test_tensorboard_gets_every_value(monkeypatch, tmp_path):
    written = []

    class Recorded:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def close(self):
            written.append("closed")

    module = types.SimpleNamespace(SummaryWriter=Recorded)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    fit(log_dir=tmp_path, validation=VALIDATION)
    assert written[0] == str(tmp_path)
    assert written[-2:] == [("val_loss", 4), "closed"]
    assert written[1:-2] == [(name, step) for step in range(1, 5) for name in ("loss", "mae")]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"needs TensorBoard: pip install 'funcnet\[fit\]'"):
        fit(log_dir=tmp_path)


OBJECTS = np.array([[None] * 3] * 20, dtype=object)


def short_loader():
    return DataLoader(TensorDataset(X, TARGET), 50, drop_last=True)


def three_things():
    return DataLoader(TensorDataset(X, TARGET, TARGET), 5)


@pytest.mark.parametrize(
    ("error", "message", "batches", "options"),
    [
        (ValueError, r"expects a batch \(x, target\), got 3 things", three_things(), {}),
        (ValueError, r"expects a batch \(x, target\), got float64 \(5, 3\)", [X[:5]], {}),
        (ValueError, r"train_step: .* got 1 things: \(float64 \(5, 3\)\)", [[X[:5]]], {}),
        (TypeError, "tensors or arrays, got a str among them", [(X, "cat")], {}),
        (TypeError, "arrays of numbers, got one of dtype object", [(OBJECTS, TARGET)], {}),
        (ValueError, "at least one batch, got none", DataLoader(TensorDataset(X[:0])), {}),
        (ValueError, "at least one batch, got none", short_loader(), {"steps": 5}),
        (TypeError, r"fit: expects batches, such as .* got \(float64", (X, TARGET), {}),
        (TypeError, "fit: expects batches, such as .* got float64", X, {}),
        (TypeError, "fit: expects batches, such as .* got int", 3, {}),
        (ValueError, "at least one batch, got none in epoch 1", [], {}),
        (ValueError, "fit: epochs must be an integer >= 1, got 0", BATCHES, {"epochs": 0}),
        (ValueError, "fit: steps must be an integer >= 1, got 1.5", BATCHES, {"steps": 1.5}),
        (ValueError, "fit: every must be an integer >= 1, got 0", BATCHES, {"every": 0}),
        (ValueError, "resume needs a checkpoint folder", BATCHES, {"resume": True}),
        (TypeError, "expects a function as callback, got int", BATCHES, {"callbacks": [1]}),
        (TypeError, "fit: expects a validation such as", BATCHES, {"validation": BATCHES}),
        (TypeError, "fit: expects a TrainState, got", BATCHES, {"state": {}}),
        (TypeError, "fit: expects a function as step, got int", BATCHES, {"step": 1}),
        (TypeError, "fit: expects fn.early_stopping", BATCHES, {"early_stopping": {"loss": 3}}),
        (
            ValueError,
            "early stopping by 'val_loss' needs a validation",
            BATCHES,
            {"early_stopping": {"val_loss": fn.early_stopping()}},
        ),
        (
            ValueError,
            r"early stopping by 'lost', but there are \['loss', 'mae'\]",
            BATCHES,
            {"early_stopping": {"lost": fn.early_stopping()}},
        ),
    ],
)
def test_misuse_is_told(error, message, batches, options):
    with pytest.raises(error, match=message):
        fit(batches, **options)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    fit(checkpoint=tmp_path)
    other = fn.linear(1)
    state = fn.init_train_state(other, OPTIMIZER, fn.key(0), X)
    with pytest.raises(ValueError, match="is not like the tree"):
        fit(state=state, checkpoint=tmp_path, resume=True)
    fn.checkpoint.save_step(tmp_path, 99, {"w": torch.ones(1)})
    with pytest.raises(ValueError, match=r"is no checkpoint of fn\.fit"):
        fit(checkpoint=tmp_path, resume=True)


def test_a_run_that_has_taken_the_steps_is_not_gone_on_with(tmp_path):
    common = {"checkpoint": tmp_path, "resume": True}
    state, history = fit(steps=6, **common)
    equal(fit(steps=5, **common), (state, history))
    equal(fit(BATCHES, steps=2, **common), (state, history))
    equal(fit(epochs=1, **common), (state, history))


def test_the_folder_of_another_run_is_not_gone_on_with(tmp_path):
    later, _ = fit(epochs=2)
    state, _ = fit(epochs=1, checkpoint=tmp_path)
    files = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"fit: .*step_0000000004.* is of a run with another key"):
        fit(state=start()._replace(key=fn.key(7)), checkpoint=tmp_path, resume=True)
    with pytest.raises(ValueError, match="is of a step before that of the train state"):
        fit(state=later, checkpoint=tmp_path, resume=True)
    assert sorted(tmp_path.iterdir()) == files
    equal(fn.load(files[0], like=start(), at="train_state"), state)


def test_a_checkpoint_that_can_be_no_folder_is_an_error_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file"):
        fit(step=lambda *args: pytest.fail("a step was taken"), checkpoint=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_array_that_must_not_be_written_to_is_copied():
    frozen = X.numpy().copy()
    frozen.flags.writeable = False
    state, _ = fit([(frozen, TARGET.numpy())])
    assert int(state.step) == 1
