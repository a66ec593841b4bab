"""Kill ranks that torchrun starts again: ``python -m tests.distributed.restarts --kills 10``.

Two ranks train, and rank 0 saves the train state every few steps. Beside a run that is left alone,
in another one ranks are killed (SIGKILL) at random moments: while they start, in the middle of a
step, of a collective, or of a save. Each time torchrun starts all of them again, they find each
other anew, and go on from the last checkpoint. In the end all that the run has must be the same,
bit for bit.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import funcnet as fn

STEPS, EVERY, RANKS = 120, 7, 2
NET = fn.serial(fn.linear(16), fn.tanh(), fn.linear(16), fn.tanh(), fn.linear(3))
OPTIMIZER = fn.adamw(lambda step: 1e-2 * torch.cos(step / STEPS), weight_decay=0.1)
X = fn.random.normal(fn.key(1), (64, 5))
TARGET = (X.sum(1) > 0).long() + (X[:, 0] > 1).long()


def train(folder: Path, jit: bool) -> None:
    """Train as one of the ranks, from the last checkpoint on."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    (folder / f"rank{os.environ['RANK']}").write_text(f"{os.getpid()} {count}")
    fn.distributed.initialize(device="cpu", timeout=60)
    mesh = fn.distributed.mesh()
    data = fn.distributed.axis_of(mesh, "data")
    value_and_grad = fn.value_and_grad(NET, fn.cross_entropy())

    def step(state: fn.TrainState) -> fn.TrainState:
        order = fn.random.permutation(fn.fold_in(state.key, state.step), len(X))
        rows = data.part(order[:16])
        _, grads, _ = value_and_grad(state.params, (X[rows], TARGET[rows]))
        grads = fn.tree.map(data.mean, grads)
        updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
        params = fn.optimizers.apply_updates(state.params, updates)
        return fn.TrainState(params, state.state, opt_state, state.key, state.step + 1)

    call = fn.jit(step) if jit else step
    state = fn.init_train_state(NET, OPTIMIZER, fn.key(0), X)
    last = fn.checkpoint.latest(folder)
    state = state if last is None else fn.load(last, like=state)
    fn.distributed.check_same(state, mesh)
    for number in range(int(state.step) + 1, STEPS + 1):
        state = call(state)
        if data.index == 0:
            if number % EVERY == 0 or number == STEPS:
                fn.checkpoint.save_step(folder, number, state)
            with (folder / "steps").open("a") as file:
                file.write(".")
    fn.distributed.check_same(state, mesh)


def start(folder: Path, jit: bool, restarts: int) -> subprocess.Popen:
    """torchrun, on this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={RANKS}", f"--max-restarts={restarts}", __file__]
    command += ["--train", str(folder)] + ["--jit"] * jit
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def finish(process: subprocess.Popen, folder: Path, seconds: float) -> None:
    code = process.wait(seconds)
    if code:
        raise SystemExit(f"torchrun ended with {code}:\n{(folder / 'log').read_text()[-4000:]}")


def taken(folder: Path) -> int:
    """How many steps were taken, those that were lost too."""
    path = folder / "steps"
    return path.stat().st_size if path.exists() else 0


def kill(process: subprocess.Popen, folder: Path, moments: random.Random, apart: int) -> bool:
    """Kill a rank after so many steps or so, or soon after it was started; False if it was done."""
    rank = folder / f"rank{moments.randrange(RANKS)}"
    steps = taken(folder) + moments.randint(0, apart)
    deadline = time.monotonic() + 120
    while not (rank.exists() and rank.read_text() and taken(folder) >= steps):
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    time.sleep(moments.uniform(0, 0.02))
    found = int(rank.read_text().split()[0])
    rank.unlink()
    with contextlib.suppress(ProcessLookupError):
        os.kill(found, signal.SIGKILL)
    return True


def compare(alone: Path, killed: Path, kills: int, jit: bool, moments: random.Random) -> int:
    """How many tensors are the same in a run that is killed so often as in one that was not."""
    process = start(killed, jit, kills)
    try:
        done = [kill(process, killed, moments, STEPS // (2 * kills)) for _ in range(kills)]
        finish(process, killed, 240)
    finally:
        process.kill()
    if not all(done):
        raise SystemExit(
            f"the run ended before it was killed for the {done.index(False) + 1}. time"
        )
    restarts = {(killed / f"rank{rank}").read_text().split()[1] for rank in range(RANKS)}
    if restarts != {str(kills)}:
        raise SystemExit(f"killed {kills} times, but torchrun counts {restarts} restarts")
    expected, found = (
        fn.tree.to_dotted(fn.load(path / f"step_{STEPS:010}.safetensors"))
        for path in (alone, killed)
    )
    differing = [path for path, leaf in expected.items() if leaf.tolist() != found[path].tolist()]
    if differing:
        raise SystemExit(f"these are not those of the run that was left alone: {differing}")
    return len(expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10, help="how often a rank is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--jit", action="store_true", help="compile the step")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.train:
        train(options.train, options.jit)
        return
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = Path(folder, "alone"), Path(folder, "killed")
        finish(start(alone, options.jit, 0), alone, 240)
        moments = random.Random(options.seed)
        count = compare(alone, killed, options.kills, options.jit, moments)
    print(f"killed {options.kills} times: all {count} tensors are the same, bit for bit")


if __name__ == "__main__":
    main()
