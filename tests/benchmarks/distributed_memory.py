"""Peak memory a rank of steps of Adam: data parallel, zero, sharded, on two gloo processes.

    python tests/benchmarks/distributed_memory.py
    python tests/benchmarks/distributed_memory.py --modes eager --blocks 32 --width 512

The net is that many residual blocks, each a linear layer of that width and tanh, float32, one
thread; a rank's batch is 4 rows, so that params, gradients and the optimizer's state are nearly
all there is. In eager mode they are a `serial`, under jit a `repeat`. ``data`` has
``fn.chain(mean, fn.adam(...))``, whose mean is of one leaf at a time, ``zero`` has
`fn.distributed.zero`, and ``sharded`` has `fn.distributed.sharded` blocks. ``donated`` is
``train_step(..., donate=True)``, ``jit`` is ``fn.jit(step, donate=0)``.

Each run is two processes of their own, which take a step of a small net first; a rank's memory is
its greatest resident set in three steps, less that before the train state was made. It is measured
with MALLOC_MMAP_THRESHOLD_=65536, so that what is freed goes back. The larger of the two ranks
counts; each number is the median over the rounds.
"""

import argparse
import gc
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from worker import host_memory

MODES = ("eager", "donated", "jit")
KINDS = ("data", "zero", "sharded")


def mean_of_gradients(axis: Any) -> Any:
    """The mean over the ranks, one leaf after another; each gradient goes when it was read."""

    def update(g: Any, p: Any) -> Any:
        left, g.tensors = [*g.tensors][::-1], []
        means = []
        while left:
            means.append(axis.mean(left.pop()))
        return type(g)(means, True)

    return fn.optimizers.stateless(update)


def train(kind: str, mode: str, blocks: int, width: int) -> None:
    """Three steps."""
    mesh = fn.distributed.mesh()
    axis = fn.distributed.axis_of(mesh, "data")

    def block() -> Any:
        made = fn.residual(fn.serial(fn.linear(width), fn.tanh()))
        return fn.distributed.sharded(made, mesh) if kind == "sharded" else made

    looped = mode == "jit"
    net = fn.repeat(block(), blocks) if looped else fn.serial(*[block() for _ in range(blocks)])
    optimizer = fn.adam(1e-4)
    if kind == "data":
        optimizer = fn.chain(mean_of_gradients(axis), optimizer)
    if kind == "zero":
        optimizer = fn.distributed.zero(optimizer, mesh)
    step: Any = fn.train_step(net, fn.mse(), optimizer, donate=mode == "donated")
    step = fn.jit(step, donate=0) if mode == "jit" else step
    x, target = fn.random.normal(fn.key(axis.index), (2, 4, width)).unbind()
    state = fn.init_train_state(net, optimizer, fn.key(0), x)
    for _ in range(3):
        state, _ = step(state, (x, target))


def rank(kind: str, mode: str, blocks: int, width: int) -> None:
    """Print the MiB that this rank takes."""
    torch.set_num_threads(1)
    fn.distributed.initialize(device="cpu")
    train(kind, mode, 2, 8)
    gc.collect()
    peak = host_memory()
    train(kind, mode, blocks, width)
    print(peak())
    fn.distributed.finalize()


def run(arguments: list[str]) -> float:
    """MiB of the rank that takes more."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, __file__, "--run", *arguments]
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    freed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    processes = []
    for index in ("0", "1"):
        environment = {**os.environ, **told, **freed, "RANK": index, "LOCAL_RANK": index}
        options: Any = {"stdout": subprocess.PIPE, "text": True, "env": environment}
        processes.append(subprocess.Popen(command, **options))
    return max([float(process.communicate()[0]) for process in processes])


def main() -> None:
    """Print the table, or, for one rank of a run, its number."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--modes", nargs="*", default=MODES, help="eager, donated, jit")
    parser.add_argument("--blocks", type=int, default=64, help="blocks (default 64)")
    parser.add_argument("--width", type=int, default=1024, help="their width (default 1024)")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        kind, mode, blocks, width = options.run
        rank(kind, mode, int(blocks), int(width))
        return
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.rounds):
        for mode in options.modes:
            for kind in KINDS:
                mib = run([kind, mode, str(options.blocks), str(options.width)])
                found.setdefault((mode, kind), []).append(mib)
    params = options.blocks * (options.width + 1) * options.width * 4 / 2**20
    print(f"params: {params:.0f} MiB")
    print("| | " + " | ".join(f"{kind}, MiB" for kind in KINDS) + " |")
    print("|---" * (1 + len(KINDS)) + "|")
    for mode in options.modes:
        whole, *parts = (statistics.median(found[mode, kind]) for kind in KINDS)
        cells = [f"{whole:.0f}", *(f"{each:.0f} ({each / whole:.2f})" for each in parts)]
        print(f"| {mode} | {' | '.join(cells)} |")


if __name__ == "__main__":
    import torch

    import funcnet as fn

    main()
