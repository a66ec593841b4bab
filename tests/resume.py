"""Kill processes that train and save, and see that nothing is lost: ``python -m tests.resume``.

A run saves its train state every few steps. Beside a run that is left alone, another one is killed
(SIGKILL) at random moments, in the middle of a step or of a save, and each time a new process goes
on from the file that is there. All that both have in the end must be the same, bit for bit: params,
running statistics, the optimizer's means, the loss scale and the losses. The order of the data, the
noise of dropout and the learning rate are functions of the key and of the step. Then processes that
save a large tree over and over are killed, whose file must be whole, old or new.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import funcnet as fn

STEPS, EVERY = 300, 7
NET = fn.serial(
    *(fn.linear(32), fn.batch_norm(), fn.relu(), fn.dropout(0.2)),
    *(fn.linear(16), fn.layer_norm(), fn.tanh(), fn.dropout(0.1), fn.linear(3)),
)
OPTIMIZER = fn.adamw(lambda step: 1e-2 * torch.cos(step / STEPS), weight_decay=0.1)
LOSS = fn.cross_entropy()
X = fn.random.normal(fn.key(1), (256, 5))
TARGET = (X.sum(1) > 0).long() + (X[:, 0] > 1).long()

Step = Callable[["Run"], "Run"]


class LossScale(NamedTuple):
    """As for float16: it doubles after ten good steps, and is halved by one that is not."""

    factor: Tensor
    good: Tensor


class Run(NamedTuple):
    """All that a run has to go on with."""

    train: fn.TrainState
    scale: LossScale
    losses: Tensor


def start() -> Run:
    scale = LossScale(torch.tensor(2.0**10), torch.tensor(0))
    train = fn.init_train_state(NET, OPTIMIZER, fn.key(0), X)
    return Run(train, scale, torch.zeros(STEPS))


def step(run: Run) -> Run:
    """A step on a batch that is a function of the key and of the number of the step."""
    (params, state, opt_state, key, count), (factor, good), losses = run
    epoch, place = count // 8, count % 8
    order = fn.random.permutation(fn.fold_in(fn.fold_in(key, "order"), epoch), len(X))
    rows = order[32 * place + torch.arange(32)]
    step_key = fn.fold_in(key, count)
    value, grads, state = value_and_grad(params, (X[rows], TARGET[rows]), state, key=step_key)
    scaled = fn.tree.map(lambda g: g * factor, grads)
    fits = torch.stack([g.abs().max() for g in fn.tree.leaves(scaled)]).max() < 2.0**11
    grads = fn.tree.map(lambda g: g / factor, scaled)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
    params = fn.optimizers.apply_updates(params, updates)
    good = torch.where(fits, good + 1, 0)
    factor = torch.where(fits, torch.where(good % 10 == 0, 2 * factor, factor), factor / 2)
    losses = torch.where(torch.arange(STEPS) == count, value, losses)
    return Run(
        fn.TrainState(params, state, opt_state, key, count + 1), LossScale(factor, good), losses
    )


value_and_grad = fn.value_and_grad(NET, LOSS)


def train(path: Path, step: Step, tick: Callable[[], Any]) -> None:
    """Train from the file, if it is there, to the end; ``tick`` is called after each step."""
    run = fn.load(path, like=start()) if path.exists() else start()
    for number in range(int(run.train.step) + 1, STEPS + 1):
        run = step(run)
        if number % EVERY == 0 or number == STEPS:
            fn.save(path, run)
        tick()


def save_over_and_over(path: Path, limit: int | None, tick: Callable[[], Any]) -> None:
    """Save a tree of one number, which grows."""
    number = int(fn.load(path, at="0")[0]) if saved(path) else 0
    while True:
        number += 1
        tree = {str(i): torch.full((2**19,), float(number)) for i in range(8)}
        fn.save(path, tree, max_shard_bytes=limit)
        tick()


def saved(path: Path) -> bool:
    return path.exists() or path.with_name(f"{path.name}.index.json").exists()


def ends(work: Callable[[Callable[[], Any]], None], ticks: int, seconds: float) -> int | None:
    """Do the work in a process that is killed so many seconds after so many ticks.

    Returns:
        None if the work ended before, else how often it ticked.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        status = 1
        try:
            work(lambda: os.write(writer, b"."))
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        seen = 0
        while seen < ticks and pipe.read(1):
            seen += 1
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        while pipe.read(1):
            seen += 1
    if os.WIFSIGNALED(status):
        return seen
    if os.WEXITSTATUS(status):
        raise RuntimeError("the process that was to be killed ended with an error")
    return None


def check_resume(folder: Path, mode: str, kills: int, moments: random.Random) -> None:
    """A run that is killed so often ends as one that is left alone."""
    call = step if mode == "eager" else fn.jit(step, donate=0)
    alone, killed = folder / f"alone-{mode}.safetensors", folder / f"killed-{mode}.safetensors"
    train(alone, call, lambda: None)  # here, so that the others need not compile
    done = 0
    while done < kills:
        ticks = moments.randint(0, STEPS // kills)
        if ends(lambda tick: train(killed, call, tick), ticks, moments.uniform(0, 0.005)) is None:
            killed.unlink()  # it was done before: another run is killed the other times
        else:
            done += 1
    train(killed, call, lambda: None)
    expected, found = fn.load(alone), fn.load(killed)
    for name, leaf in fn.tree.to_dotted(expected).items():
        other = fn.tree.to_dotted(found)[name]
        if leaf.dtype != other.dtype or leaf.tolist() != other.tolist():
            raise SystemExit(f"{mode}: {name} is not what it is in the run that was left alone")
    count, losses = len(fn.tree.leaves(found)), expected["losses"]
    print(
        f"{mode}: killed {done} times, all {count} tensors are bit for bit those of the run left "
        f"alone; its loss went from {losses[0]:.3f} to {losses[-1]:.3f}"
    )


def check_whole(folder: Path, limit: int | None, kills: int, moments: random.Random) -> None:
    """The file of a process that is killed while it saves is the last one or the one before."""
    path = folder / f"large{limit}.safetensors"
    last = 0
    for _ in range(kills):
        work = lambda tick: save_over_and_over(path, limit, tick)  # noqa: E731
        seen = ends(work, moments.randint(0, 3), moments.uniform(0, 0.03))
        if not saved(path):
            continue
        values = {
            value for leaf in fn.tree.leaves(fn.load(path)) for value in leaf.unique().tolist()
        }
        # Killed after the new file was there and before it said so, it is one further.
        if values not in ({last + seen}, {last + seen + 1}):
            raise SystemExit(f"after {last} + {seen} saves the file has {sorted(values)}")
        last = int(values.pop())
    count = 1 if limit is None else 5
    fn.save(
        path, {str(i): torch.full((2**19,), float(last)) for i in range(8)}, max_shard_bytes=limit
    )
    found = [name for name in os.listdir(folder) if path.stem in name]
    if len(found) != count:
        raise SystemExit(f"processes that were killed left files behind: {found}")
    form = "one file" if limit is None else "several files"
    print(f"{form}: killed {kills} times during {last} saves, and always whole")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each kind of run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads would not be there after a fork
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        for mode in ("eager", "jit"):
            check_resume(Path(folder), mode, options.kills, moments)
        for limit in (None, 2**22):  # four files of two tensors
            check_whole(Path(folder), limit, options.kills, moments)


if __name__ == "__main__":
    main()
