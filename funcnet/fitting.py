"""`fit`: the loop around a training step, with all that a run needs beside it."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, distributed as dist

from funcnet import checkpoint as checkpoints, tree
from funcnet.checkpoint.loading import open_checkpoint
from funcnet.core import TrainState, Tree
from funcnet.data import on_device_of
from funcnet.errors import check_count, require
from funcnet.fit_parts import Bar, History, Interrupt, Writer
from funcnet.stopping import EarlyStopping

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, Tensor]]]
Logs = Mapping[str, Tensor]
Callback = Callable[[TrainState, Logs], Any]

_EPOCH_END = object()


def fit(
    step: Step,
    train_state: TrainState,
    batches: Iterable[Any] | Callable[[Tensor, int], Any],
    *,
    epochs: int = 1,
    steps: int | None = None,
    validation: Callable[[TrainState], Logs] | None = None,
    validate_every: int | None = None,
    callbacks: Sequence[Callback] | Callback = (),
    early_stopping: Mapping[str, EarlyStopping] | None = None,
    checkpoint: str | os.PathLike[str] | checkpoints.RunFolder | None = None,
    every: int | None = None,
    keep: int | None = 3,
    resume: bool = False,
    log_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> tuple[TrainState, dict[str, Tensor]]:
    """Take a training step for each batch; the loop that one would write oneself.

    Args:
        step: ``(train_state, batch) -> (train_state, metrics)``, as `train_step` makes it, or
            ``fn.jit`` of that.
        train_state: of one run, or, for a step under `vmap`, of several, stacked.
        batches: a list, a ``DataLoader``, or anything else that can be gone over again and again;
            or a source ``(key, step) -> batch`` such as `batches` gives, which is called with the
            run's key and the number of the step. Arrays of numpy become tensors; all are moved to
            the device of the params.
        epochs: how often to go over the batches, from here on.
        steps: how many steps to take from here on, in place of ``epochs``.
        validation: ``train_state -> values``, as `funcnet.evaluate` makes it.
        validate_every: the steps between validations; by default they are at the end of each epoch.
            One more is at the end of the run.
        callbacks: functions ``(train_state, logs)``, called after each step with its metrics, and
            after each validation with its values, whose names begin with "val_". One that returns
            True or "stop" ends the run. Reading a value waits for the device. With a step that
            donates, the state is theirs until the next step only.
        early_stopping: from the name of a value, such as "val_loss", to `funcnet.early_stopping`.
        checkpoint: a folder for checkpoints of this run; see `funcnet.checkpoint.save_step`. For
            a run on several ranks, `funcnet.distributed.run_folder`.
        every: the steps between checkpoints; by default they are at the end of each epoch. One
            more is at the end of the run. Those right after a validation have, as their score, the
            value that is first in ``early_stopping``, or "val_loss". Where one cannot be written,
            as on a full disk, it is a RuntimeWarning, and the run goes on.
        keep: how many of the last checkpoints are kept, beside that of the best score.
        resume: whether to go on from the last checkpoint in the folder, if there is one:
            ``train_state`` and ``epochs`` or ``steps`` are those that the run began with; a folder
            of a run with another key, or another model or optimizer, is an error. What
            comes is bit for bit what would have come, history and all, if the batches are a source,
            a list, or a loader that goes over the data in the same order again: batches that were
            taken are skipped. A ``DataLoader(shuffle=True)`` goes on in another order.
        log_dir: a folder for TensorBoard's log of all metrics, for each step.
        progress: whether to show a bar, if tqdm is installed and the output is a terminal. It
            shows the metrics of the last step, read twice a second.

    Ctrl-C ends the run after the step that is being taken, with a checkpoint, and what is there is
    returned; once more, it is a KeyboardInterrupt at once.

    On several ranks each calls it, and all must stop after the same step. So what `early_stopping`
    watches, and what a callback decides by, must be the same on all ranks, such as the value of a
    metric in `funcnet.distributed.everywhere`, not the loss of a rank's own part of the batch; and
    Ctrl-C (SIGINT) must reach all ranks within the same step. If one rank stops alone, the others
    wait for it until their timeout, and then raise `funcnet.distributed.PeerError`. Each rank has a
    bar and a log of its own: give ``progress`` and ``log_dir`` on one rank alone.

    Returns:
        The last train state, and the history: for each metric its values at all steps, (steps,
        ...); the values of the validations, "val_...", and at which steps they were, "val_step".

    >>> x, target = torch.randn(100, 3), torch.randn(100, 1)
    >>> net, optimizer = fn.linear(1), fn.sgd(0.1)
    >>> state = fn.init_train_state(net, optimizer, fn.key(0), x)
    >>> state, history = fit(
    ...     fn.train_step(net, fn.mse(), optimizer), state, fn.batches((x, target), 10), epochs=2,
    ...     validation=fn.evaluate(net, fn.mse(), None, [(x, target)]),
    ... )
    >>> {name: tuple(values.shape) for name, values in history.items()}
    {'loss': (20,), 'val_loss': (2,), 'val_step': (2,)}
    """
    calls = [callbacks] if callable(callbacks) else list(callbacks)
    stoppers = dict(early_stopping or {})
    _check(step, train_state, batches, calls, stoppers, validation)
    counts = {"epochs": epochs, "steps": steps, "every": every, "validate_every": validate_every}
    check_count("fit", **{name: count for name, count in counts.items() if count is not None})
    require(not resume or checkpoint is not None, "fit: resume needs a checkpoint folder")

    begin = taken = _number(train_state.step)
    length = _steps_per_epoch(batches)
    if steps is None and length is None and not isinstance(batches, Iterable):
        raise ValueError("fit: a source without steps_per_epoch needs steps, the number of steps")
    states = {name: stopping.init() for name, stopping in stoppers.items()}
    history, ended = History(), 0
    folder = None if checkpoint is None else _run_folder(checkpoint)
    if folder is not None and (found := folder.latest()) is not None:
        if not resume:
            raise ValueError(
                f"fit: {found.parent} has checkpoints of another run, the last {found.name}: pass "
                "resume=True to go on from it, or take another folder"
            )
        train_state, states, history, ended = _load(folder, found, train_state, states)
        taken = _number(train_state.step)
    saved = taken if taken > begin else None
    validated = int(history.parts["val_step"][0][-1]) if "val_step" in history.parts else None
    values: Logs = {}
    stop = any([bool(state.stop) for state in states.values()])

    def call(logs: Logs) -> bool:
        stops = [_asks_to_stop(callback(train_state, logs)) for callback in calls]
        for name in stoppers.keys() & logs.keys():
            states[name] = stoppers[name].update(states[name], logs[name])
            stops.append(bool(states[name].stop))
        return any(stops)

    def validate() -> bool:
        nonlocal values, validated, saved
        if validation is None or validated == taken:
            return False
        values = {f"val_{name}": value for name, value in validation(train_state).items()}
        validated, saved = taken, None
        _check_watched([name for name in stoppers if name.startswith("val_")], values)
        history.add({**values, "val_step": torch.tensor(taken, device="cpu")})
        writer.add(values, taken)
        return call(values)

    def save() -> None:
        nonlocal saved
        if folder is None or saved == taken:
            return
        score = values.get(next(iter(stoppers), "val_loss")) if validated == taken else None
        parts = train_state, states, history.stacked(), ended
        content = dict(zip(_PARTS, parts, strict=True))
        try:
            folder.save(taken, content, keep=keep, score=score)
        except OSError as error:
            # What is in memory would be lost with the error; the last checkpoint is there whole.
            message = f"fit: no checkpoint of step {taken}, and the run goes on: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            return
        saved = taken

    total = steps if steps is not None or length is None else epochs * length
    first_key = train_state.key.reshape(-1, 2)[0]
    passes = _passes(batches, first_key, begin, length)
    stream = _stream(passes, length, taken - begin, ended, epochs, steps)
    move = on_device_of(train_state.params)
    with Writer(log_dir) as writer, Bar(total, progress) as bar, Interrupt() as interrupt:
        while not (stop or interrupt.asked):
            try:
                batch = next(stream, None)
            except RuntimeError:  # of a loader whose workers were interrupted too
                if interrupt.asked:
                    break
                raise
            if batch is _EPOCH_END:
                ended += 1
                stop = validate_every is None and validate()
                if every is None:
                    save()
                continue
            # Not before: a step that ends an epoch is saved after the validation.
            if every is not None and taken % every == 0 and taken > begin:
                save()
            if batch is None:
                break
            train_state, metrics = step(train_state, move(batch))
            taken += 1
            if taken == begin + 1:
                _check_watched([name for name in stoppers if not name.startswith("val_")], metrics)
            history.add(metrics)
            writer.add(metrics, taken)
            stop = bool(calls or stoppers) and call(metrics)
            if validate_every is not None and taken % validate_every == 0:
                stop = validate() or stop
            bar.show(taken - begin, {**metrics, **values})
        if not interrupt.asked and taken > begin:
            validate()
        save()
        bar.show(taken - begin, {}, now=True)
        if interrupt.asked:
            bar.say(f"fit: interrupted after step {taken}")
    return train_state, history.stacked()


_PARTS = ("train_state", "early_stopping", "history", "epochs")
"""What is in a checkpoint."""


def _run_folder(
    checkpoint: str | os.PathLike[str] | checkpoints.RunFolder,
) -> checkpoints.RunFolder:
    """What `fit` is given as ``checkpoint``; a path is a folder of one process."""
    if isinstance(checkpoint, checkpoints.RunFolder):
        return checkpoint
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    require(
        ranks == 1,
        f"fit: checkpoint={str(checkpoint)!r} is a folder of one process, and there are {ranks}, "
        "which would write over each other's parts; pass checkpoint=fn.distributed.run_folder("
        f"{str(checkpoint)!r}, mesh, fn.distributed.state_placements(train_state, net, x))",
    )
    os.makedirs(checkpoint, exist_ok=True)  # what cannot be a folder is an error at once
    return checkpoints.run_folder(checkpoint)


def _load(
    folder: checkpoints.RunFolder, path: Any, train_state: TrainState, states: Tree
) -> tuple[TrainState, Tree, History, int]:
    """The parts of a checkpoint."""
    tensors, rest = open_checkpoint(path, lazily=True)
    if {name.partition(".")[0] for name in (*tensors, *rest.values, *rest.nodes)} != set(_PARTS):
        raise ValueError(f"fit: {path} is no checkpoint of fn.fit, which have {list(_PARTS)}")
    begin = train_state
    train_state = folder.load(path, train_state, at="train_state")
    if not torch.equal(begin.key, train_state.key):
        raise ValueError(f"fit: {path} is of a run with another key: take another folder")
    if (begin.step > train_state.step).any():
        raise ValueError(
            f"fit: {path} is of a step before that of the train state, which it would replace: "
            "resume with the train state that the run began with, or take another folder"
        )
    if states:
        states = folder.load(path, states, at="early_stopping")
    history = History(checkpoints.load(path, at="history"))
    return train_state, states, history, checkpoints.load(path, at="epochs")


def _passes(
    batches: Any, key: Tensor, begin: int, length: int | None
) -> Callable[[int, int], Iterator[tuple[int, Any]]]:
    """``(epoch, skip) -> batches``, with their numbers in the epoch; of a source from skip on."""

    def of_iterable(epoch: int, skip: int) -> Iterator[tuple[int, Any]]:
        return enumerate(batches)

    def of_source(epoch: int, skip: int) -> Iterator[tuple[int, Any]]:
        first = begin + epoch * (length or 0)
        for number in range(skip, length) if length is not None else count(skip):
            yield number, batches(key, first + number)

    return of_iterable if isinstance(batches, Iterable) else of_source


def _stream(
    passes: Callable[[int, int], Iterator[tuple[int, Any]]],
    length: int | None,
    skip: int,
    ended: int,
    epochs: int,
    steps: int | None,
) -> Iterator[Any]:
    """The batches that are left after ``skip``, with a mark at the end of each epoch."""
    left = None if steps is None else steps - skip
    for epoch in range(epochs) if steps is None else count():
        if left is not None and left <= 0:
            return
        if length is None or skip < length:
            seen = 0
            for number, batch in passes(epoch, skip):
                seen = number + 1
                if number < skip:
                    continue
                yield batch
                left = None if left is None else left - 1
                if left == 0 and seen != length:
                    return
            require(seen, f"fit: expects at least one batch, got none in epoch {epoch + 1}")
            skip = max(0, skip - seen)
        else:
            skip -= length
        if epoch >= ended:
            yield _EPOCH_END


def _number(step: Tensor) -> int:
    """The number of steps that were taken; that of the first of several runs."""
    return int(step.flatten()[0])


def _steps_per_epoch(batches: Any) -> int | None:
    if not isinstance(batches, Iterable):
        return getattr(batches, "steps_per_epoch", None)
    try:
        return len(batches) or None  # type: ignore[arg-type]
    except TypeError:
        return None


def _asks_to_stop(answer: Any) -> bool:
    if answer is None or isinstance(answer, bool):
        return bool(answer)
    if isinstance(answer, Tensor) and answer.dtype == torch.bool and not answer.dim():
        return bool(answer)
    if answer == "stop":
        return True
    raise TypeError(f"fit: a callback must return None, True, or 'stop', got {answer!r}")


def _check(
    step: Any, train_state: Any, batches: Any, calls: Any, stoppers: Any, validation: Any
) -> None:
    for what, found in (("step", step), *[("callback", each) for each in calls]):
        if not callable(found):
            raise TypeError(f"fit: expects a function as {what}, got {type(found).__name__}")
    if not isinstance(train_state, TrainState):
        got = tree.describe(train_state)
        raise TypeError(f"fit: expects a TrainState, got {got}; make it by fn.init_train_state")
    one = isinstance(batches, (Tensor, Mapping, str)) or (
        isinstance(batches, tuple) and len(batches) == 2 and isinstance(batches[0], Tensor)
    )
    if one or not (isinstance(batches, Iterable) or callable(batches)):
        got = tree.describe(batches)
        raise TypeError(
            f"fit: expects batches, such as a DataLoader or fn.batches(data, batch_size), got {got}"
        )
    if validation is not None and not callable(validation):
        got = type(validation).__name__
        raise TypeError(f"fit: expects a validation such as fn.evaluate(...), got {got}")
    for name, stopping in stoppers.items():
        if not isinstance(stopping, EarlyStopping):
            got = type(stopping).__name__
            raise TypeError(f"fit: expects fn.early_stopping(...) for {name!r}, got {got}")
        if name.startswith("val_") and validation is None:
            raise ValueError(f"fit: early stopping by {name!r} needs a validation")


def _check_watched(names: Sequence[str], values: Logs) -> None:
    for name in names:
        if name not in values:
            raise ValueError(f"fit: early stopping by {name!r}, but there are {list(values)}")
