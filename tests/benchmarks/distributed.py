"""Training on two processes of this machine, beside PyTorch's DistributedDataParallel.

    python -m tests.benchmarks.distributed [--rows "small eager" ...]

Two ranks with gloo on the loopback address, one thread each, float32. The peers of a row run in
turn on both ranks, some steps in a row; before it is the turn of the next one, the ranks wait for
each other. A time is the median over the rounds, on rank 0, and so is the ratio within a round.

A row is a function that returns its peers by name, each a function of nothing that runs one step;
the first one is compared with each of the others. It is called on every rank.
"""

import argparse
import functools
import itertools
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import funcnet as fn

RANKS, RATE = 2, 1e-3
Step = Callable[[], Any]
Peers = dict[str, Step]


def modules(widths: Iterable[int]) -> nn.Sequential:
    """Linear layers of these widths, with ReLU between them."""
    layers = [
        layer for size in itertools.pairwise(widths) for layer in (nn.Linear(*size), nn.ReLU())
    ]
    return nn.Sequential(*layers[:-1])


def layers(widths: Iterable[int]) -> fn.Layer:
    """The same net of layers."""
    _, *outputs = widths
    made = [layer for size in outputs for layer in (fn.linear(size), fn.relu())]
    return fn.serial(*made[:-1])


def ddp_step(
    widths: list[int], x: Tensor, target: Tensor, compiled: bool = False, **options: Any
) -> Step:
    """A step of DistributedDataParallel and torch.optim.Adam."""
    net: Any = modules(widths)
    net = nn.parallel.DistributedDataParallel(torch.compile(net) if compiled else net)
    optimizer, loss = torch.optim.Adam(net.parameters(), RATE, **options), nn.MSELoss()

    def step() -> None:
        optimizer.zero_grad()
        loss(net(x), target).backward()
        optimizer.step()

    return step


def funcnet_step(
    model: fn.Layer,
    x: Tensor,
    target: Tensor,
    optimizer: fn.Optimizer,
    mode: str = "eager",
) -> Step:
    """A step of ours, which may write to the state that it is given."""
    state = fn.init_train_state(model, optimizer, fn.key(0), x)
    run = fn.train_step(model, fn.mse(), optimizer, donate=mode == "eager")
    run = fn.jit(run, donate=0) if mode == "jit" else run

    def step() -> None:
        nonlocal state
        state, _ = run(state, (x, target))

    return step


def data_parallel(widths: list[int], rows: int, mode: str) -> Peers:
    """Data-parallel steps of Adam."""
    mesh = fn.distributed.mesh()
    x, target = torch.randn(rows, widths[0]), torch.randn(rows, widths[-1])
    net, adam = layers(widths), fn.adam(RATE)
    mean = fn.chain(fn.distributed.mean(mesh), adam)
    whole = fn.distributed.replicated(net, mesh, bucket_bytes=2**22)
    peers = {"mean": funcnet_step(net, x, target, mean, mode)}
    if mode == "eager":
        peers["replicated"] = funcnet_step(whole, x, target, adam, mode)
    compiled = mode == "jit"
    peers["DDP"] = ddp_step(widths, x, target, compiled)
    peers["DDP, fused Adam"] = ddp_step(widths, x, target, compiled, fused=True)
    return peers


SMALL, LARGE = [32] * 22, [1024] * 7
"""The widths of nets of 42 leaves, and of 25 MB."""

Row = Callable[[], Peers]
ROWS: dict[str, tuple[Row, int]] = {
    "small eager": (functools.partial(data_parallel, SMALL, 32, "eager"), 20),
    "small jit": (functools.partial(data_parallel, SMALL, 32, "jit"), 20),
    "25 MB eager": (functools.partial(data_parallel, LARGE, 64, "eager"), 2),
    "25 MB jit": (functools.partial(data_parallel, LARGE, 64, "jit"), 2),
}
"""By name: a row, and how many steps in a row are one time."""


def measure(peers: Peers, steps: int, rounds: int) -> dict[str, list[float]]:
    """The times of a step of each peer in each round, in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in peers}
    for number in range(rounds + 1):
        for name, step in peers.items():
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(steps):
                step()
            if number:  # the first round compiles
                times[name].append(1e3 * (time.perf_counter() - begin) / steps)
    return times


def show(row: str, times: dict[str, list[float]]) -> None:
    """Print the row of the table."""
    first, *_ = times
    for name, found in times.items():
        ratio = statistics.median([a / b for a, b in zip(times[first], found, strict=True)])
        print(f"| {row} | {name} | {statistics.median(found):.3f} | {ratio:.3f} |", flush=True)


def _run(rank: int, port: int, rows: list[str], rounds: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    fn.distributed.initialize(device="cpu")
    for name in rows:
        row, steps = ROWS[name]
        torch.manual_seed(rank)
        times = measure(row(), steps, rounds)
        if rank == 0:
            show(name, times)
    dist.barrier()
    fn.distributed.finalize()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="*", default=[*ROWS], help=f"of {[*ROWS]}")
    parser.add_argument("--rounds", type=int, default=15, help="rounds (default 15)")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    print("| row | peer | ms a step | first / this |", "|---" * 4 + "|", sep="\n", flush=True)
    context = multiprocessing.get_context("spawn")
    args = port, options.rows, options.rounds
    ranks = [context.Process(target=_run, args=(rank, *args)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()


if __name__ == "__main__":
    main()
