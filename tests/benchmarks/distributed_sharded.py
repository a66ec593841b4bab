"""Time of a step of sharded blocks beside torch's fully_shard (FSDP2), on two gloo processes.

    python tests/benchmarks/distributed_sharded.py
    python tests/benchmarks/distributed_sharded.py --blocks 8 --width 512 --batch 64

The net is that many residual blocks, each two linear layers of that width and a ReLU, and a linear
head; float32, one thread a process, Adam, MSE, eager. Each block is sharded for itself, and its
params are gathered for the forward and again for the backward pass. The steps take turns in the
same processes, some in a row; each number is the median over the rounds, and the ratio that of the
rounds' ratios. First the losses of some steps are compared.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

STEPS = 4


def ours(blocks: int, width: int, batch: Any) -> tuple[Callable[[], Any], dict[str, Any]]:
    """A step of funcnet's, and the first params, whole."""
    mesh = fn.distributed.mesh()

    def block() -> Any:
        inside = fn.serial(fn.linear(width), fn.relu(), fn.linear(width))
        return fn.distributed.sharded(fn.residual(inside), mesh)

    head = fn.distributed.sharded(fn.linear(width), mesh)
    net = fn.serial(*[block() for _ in range(blocks)], head)
    optimizer = fn.adam(1e-4)
    step: Any = fn.train_step(net, fn.mse(), optimizer, donate=True)
    state = fn.init_train_state(net, optimizer, fn.key(0), batch[0])
    placed = fn.distributed.placements(net, batch[0])
    first = {
        path: placed[path][0].whole(leaf) for path, leaf in fn.tree.to_dotted(state.params).items()
    }

    def call() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"]

    return call, first


def theirs(blocks: int, width: int, batch: Any, first: dict[str, Any]) -> Callable[[], Any]:
    """The same with fully_shard."""
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    class Residual(nn.Sequential):
        """Layers beside a connection that skips them."""

        def forward(self, x: Any) -> Any:
            return x + super().forward(x)

    made = [
        Residual(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(blocks)
    ]
    net = nn.Sequential(*made, nn.Linear(width, width))
    net.load_state_dict(first)
    mesh = fn.distributed.mesh()["data"]
    for each in net:
        fully_shard(each, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer, loss = torch.optim.Adam(net.parameters(), 1e-4, fused=True), nn.MSELoss()

    def call() -> Any:
        optimizer.zero_grad()
        value = loss(net(batch[0]), batch[1])
        value.backward()
        optimizer.step()
        return value.detach()

    return call


def rank(blocks: int, width: int, size: int, rounds: int) -> None:
    """Take turns, and print the milliseconds a step on rank 0."""
    torch.set_num_threads(1)
    fn.distributed.initialize(device="cpu")
    axis = fn.distributed.axis_of(fn.distributed.mesh(), "data")
    key = fn.random.fold_in(fn.key(1), axis.index)
    batch = tuple(fn.random.normal(key, (2, size, width)).unbind())
    step, first = ours(blocks, width, batch)
    calls = {"funcnet": step, "fully_shard": theirs(blocks, width, batch, first)}
    losses = {name: torch.stack([call() for _ in range(STEPS)]) for name, call in calls.items()}
    torch.testing.assert_close(losses["funcnet"], losses["fully_shard"], rtol=1e-4, atol=1e-5)
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            torch.distributed.barrier()
            start = time.perf_counter()
            for _ in range(STEPS):
                call()
            torch.distributed.barrier()
            found[name].append((time.perf_counter() - start) / STEPS * 1e3)
    if axis.index == 0:
        for name, times in found.items():
            print(f"{name}: {statistics.median(times):.1f} ms a step")
        pairs = zip(found["funcnet"], found["fully_shard"], strict=True)
        print(f"ratio: {statistics.median([one / other for one, other in pairs]):.2f}")
    fn.distributed.finalize()


def main() -> None:
    """Start the two ranks, or be one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds (default 15)")
    parser.add_argument("--blocks", type=int, default=8, help="blocks (default 8)")
    parser.add_argument("--width", type=int, default=512, help="their width (default 512)")
    parser.add_argument("--batch", type=int, default=64, help="rows of a rank (default 64)")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        rank(options.blocks, options.width, options.batch, options.rounds)
        return
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, __file__, "--run", *sys.argv[1:]]
    processes = [
        subprocess.Popen(command, env={**os.environ, **told, "RANK": index, "LOCAL_RANK": index})
        for index in ("0", "1")
    ]
    sys.exit(max([process.wait() for process in processes]))


if __name__ == "__main__":
    import torch

    import funcnet as fn

    main()
