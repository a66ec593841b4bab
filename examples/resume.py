"""Kill a training run at random moments, resume it, and compare it with one left alone.

    python examples/resume.py
    python examples/resume.py --kills 10 --jit

The run is trained in another process, which saves its train state every few steps. That is all that
a run is: parameters, the optimizer's means, the key, and the number of the step. The order of the
data, the noise of dropout and the learning rate are functions of the last two. So a run that is
killed, even while it writes the file, goes on from it as if nothing had been, bit for bit.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import funcnet as fn

STEPS, EVERY, BATCH = 300, 10, 20


def train(path: Path, seed: int, jit: bool) -> None:
    """Train, from the file on if it is there; prints the number of each step."""
    key = fn.key(seed)
    points = fn.random.uniform(key, (1000, 2))
    labels = ((points - 0.5).norm(dim=1) < 0.4).long()
    hidden = fn.linear(64), fn.relu(), fn.dropout(0.1), fn.linear(64), fn.relu(), fn.dropout(0.1)
    net = fn.serial(*hidden, fn.linear(2))
    optimizer = fn.adamw(lambda step: 0.01 * (1 - step / STEPS))
    step = fn.train_step(net, fn.cross_entropy(), optimizer)
    step = fn.jit(step, donate=0) if jit else step

    state = fn.init_train_state(net, optimizer, key, points)
    if path.exists():
        state = fn.load(path, like=state)
    per_epoch = len(points) // BATCH
    for number in range(int(state.step), STEPS):
        epoch, place = divmod(number, per_epoch)
        order = fn.random.permutation(
            fn.fold_in(fn.fold_in(state.key, "order"), epoch), len(points)
        )
        rows = order[BATCH * place : BATCH * (place + 1)]
        state, _ = step(state, (points[rows], labels[rows]))
        if (number + 1) % EVERY == 0:
            fn.save(path, state)
        print(number + 1, flush=True)


def run(path: Path, options: argparse.Namespace, steps: int = STEPS) -> None:
    """Train in another process, which is killed soon after so many steps, if it has that many."""
    command = [sys.executable, __file__, "--train", path, "--seed", str(options.seed)]
    command += ["--jit"] * options.jit
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for done, line in enumerate(process.stdout, 1):
        if done == steps < STEPS:
            time.sleep(random.uniform(0, 0.02))
            process.kill()
            last = [line, *process.stdout][-1].strip()
            saved = int(fn.load(path, at="step")) if path.exists() else 0
            print(f"killed after step {last} of {STEPS}, goes on from step {saved}")
    if process.wait() > 0:
        sys.exit("the process that trains has failed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Kill a training run at random moments, resume it, and compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the run")
    parser.add_argument("--kills", type=int, default=3, help="how often the run is killed")
    parser.add_argument("--jit", action="store_true", help="compile the step")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.train:
        train(options.train, options.seed, options.jit)
        return
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = Path(folder, "alone.safetensors"), Path(folder, "killed.safetensors")
        run(alone, options)
        for _ in range(options.kills):
            run(killed, options, steps=random.randint(1, STEPS // (options.kills + 1)))
        run(killed, options)
        one, other = (fn.tree.to_dotted(fn.load(path)) for path in (alone, killed))
        equal = [torch.equal(one[path], other[path]) for path in one]
        print(
            f"all {len(equal)} tensors are equal, bit for bit"
            if all(equal)
            else f"{equal.count(False)} of {len(equal)} tensors differ"
        )


if __name__ == "__main__":
    main()
