"""Peak memory of eager training steps beside PyTorch's.

    python tests/benchmarks/memory.py

The net is an MLP of 8 linear layers, 1024 wide, with ReLU; the batch is 4096, float32, SGD. Each
run is a process of its own; its memory is its greatest resident set less that before training.
The runs take turns; each number is the median over the rounds.
"""

import argparse
import resource
import statistics
import subprocess
import sys

WIDTH, LAYERS, BATCH, STEPS = 1024, 8, 4096, 5


def peak() -> int:
    """The greatest resident set of this process so far, in KiB (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_torch(optimizer_name: str) -> float:
    """MiB that training takes with torch.nn, autograd and torch.optim."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    x, target = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    net = nn.Sequential(*layers[:-1])
    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer_name]
    loss, optimizer = nn.MSELoss(), make(net.parameters(), lr=1e-3)
    before = peak()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(net(x), target).backward()
        optimizer.step()
    return (peak() - before) / 1024


def run_funcnet(optimizer_name: str) -> float:
    """MiB that training takes with funcnet."""
    import torch

    import funcnet as fn

    torch.set_num_threads(1)
    x, target = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)
    layers: list[fn.Layer] = []
    for _ in range(LAYERS):
        layers += [fn.linear(WIDTH), fn.relu()]
    net = fn.serial(*layers[:-1])
    optimizer = {"sgd": fn.sgd, "adam": fn.adam}[optimizer_name](1e-3)
    step = fn.train_step(net, fn.mse(), optimizer)
    state = fn.init_train_state(net, optimizer, fn.key(0), x)
    before = peak()
    for _ in range(STEPS):
        state, _ = step(state, (x, target))
    return (peak() - before) / 1024


def main() -> None:
    """Print the table, or, for one run, its number."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--run", nargs=2, metavar=("PEER", "OPTIMIZER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        peer, optimizer = options.run
        print({"torch": run_torch, "funcnet": run_funcnet}[peer](optimizer))
        return
    runs = [(peer, optimizer) for optimizer in ("sgd", "adam") for peer in ("torch", "funcnet")]
    found: dict[tuple[str, str], list[float]] = {run: [] for run in runs}
    for _ in range(options.rounds):
        for run in runs:
            command = [sys.executable, __file__, "--run", *run]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            found[run].append(float(result.stdout))
    print("| optimizer | torch, MiB | funcnet, MiB | ratio |")
    print("|---|---|---|---|")
    for optimizer in ("sgd", "adam"):
        theirs, ours = (statistics.median(found[peer, optimizer]) for peer in ("torch", "funcnet"))
        print(f"| {optimizer} | {theirs:.1f} | {ours:.1f} | {ours / theirs:.3f} |")


if __name__ == "__main__":
    main()
