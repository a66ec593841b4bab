"""Peak memory of training steps beside PyTorch's: of a whole batch, and in micro-batches.

    python tests/benchmarks/memory.py
    python tests/benchmarks/memory.py --rows "sgd 8" "adam 8"

The net is an MLP of 8 linear layers, 1024 wide, with ReLU; the batch is 4096, float32, whole or in
8 parts whose gradients are accumulated. Each run is a process of its own, which trains a small net
first; its memory is its greatest resident set from then on, with params and the optimizer's state,
less that before, with the data. The runs take turns; each number is the median over the rounds.
``donated`` is ``train_step(..., donate=True)``, which updates in place as PyTorch does; ``jit`` is
``fn.jit(step, donate=0)``, from the cache of compiled programs.
"""

import argparse
import gc
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from worker import host_memory

WIDTH, LAYERS, BATCH, STEPS = 1024, 8, 4096, 5
PEERS = ("torch", "funcnet", "donated", "jit")
ROWS = ("sgd 1", "adam 1", "sgd 8", "adam 8")


def train_torch(width: int, optimizer_name: str, parts: int) -> Callable[[Any, Any, int], None]:
    """``(x, target, steps)`` trains with torch.nn, autograd and torch.optim."""
    from torch import nn

    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layers += [nn.Linear(width, width), nn.ReLU()]
    net = nn.Sequential(*layers[:-1])
    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer_name]
    loss, optimizer = nn.MSELoss(), make(net.parameters(), lr=1e-3)

    def train(x: Any, target: Any, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            for each, wanted in zip(x.chunk(parts), target.chunk(parts), strict=True):
                (loss(net(each), wanted) / parts).backward()
            optimizer.step()

    return train


def train_funcnet(
    width: int, optimizer_name: str, parts: int, peer: str
) -> Callable[[Any, Any, int], None]:
    """``(x, target, steps)`` trains with funcnet."""
    layers: list[fn.Layer] = []
    for _ in range(LAYERS):
        layers += [fn.linear(width), fn.relu()]
    net = fn.serial(*layers[:-1])
    optimizer = {"sgd": fn.sgd, "adam": fn.adam}[optimizer_name](1e-3)
    donate = peer == "donated"
    step: Any = fn.train_step(net, fn.mse(), optimizer, micro_batches=parts, donate=donate)
    step = fn.jit(step, donate=0) if peer == "jit" else step
    state = fn.init_train_state(net, optimizer, fn.key(0), torch.empty(1, width))

    def train(x: Any, target: Any, steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, _ = step(state, (x, target))

    return train


def run(peer: str, optimizer_name: str, parts: int) -> float:
    """MiB that training takes."""
    torch.set_num_threads(1)
    found = 0.0
    for width, batch in ((8, 8 * parts), (WIDTH, BATCH)):
        x, target = torch.randn(batch, width), torch.randn(batch, width)
        options = width, optimizer_name, parts
        gc.collect()
        peak = host_memory()
        train = train_torch(*options) if peer == "torch" else train_funcnet(*options, peer)
        train(x, target, STEPS)
        found = peak()
    return found


def main() -> None:
    """Print the table, or, for one run, its number."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--rows", nargs="*", default=ROWS, help="optimizers and parts")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        peer, optimizer, parts = options.run
        print(run(peer, optimizer, int(parts)))
        return
    runs = [(row, peer) for row in options.rows for peer in PEERS]
    found: dict[tuple[str, str], list[float]] = {each: [] for each in runs}
    for number in range(options.rounds + 1):
        for row, peer in runs:
            command = [sys.executable, __file__, "--run", peer, *row.split()]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            if number:  # the first round compiles
                found[row, peer].append(float(result.stdout))
    print("| optimizer, parts | " + " | ".join(f"{peer}, MiB" for peer in PEERS) + " |")
    print("|---" * (1 + len(PEERS)) + "|")
    for row in options.rows:
        theirs, *ours = (statistics.median(found[row, peer]) for peer in PEERS)
        cells = [f"{theirs:.1f}", *(f"{each:.1f} ({each / theirs:.2f})" for each in ours)]
        print(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    import torch

    import funcnet as fn

    main()
