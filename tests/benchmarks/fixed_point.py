"""Peak memory and time of a fixed point's forward and backward pass beside an unrolled loop.

    python tests/benchmarks/fixed_point.py
    python tests/benchmarks/fixed_point.py --cells "one layer" --rounds 3

The peer is torch's autograd through 30 iterations ``z = f(x, z)``, float32, batch 4096, width 512;
the layer has 30 evaluations forward and as many backward, as its tolerance is out of reach. f is
one layer, ``tanh(x + W z)``, or a block, ``layer_norm(z + W2 relu(W1 z) + x)``. Each run is a
process of its own, which runs on small tensors first; its memory is its greatest resident set from
then on, with params, y and the gradients, less that before. Times are of the second call, with
the allocator as it is; for memory it is told to give back what is freed.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from worker import host_memory

WIDTH, BATCH, ITERATIONS = 512, 4096, 30
CELLS = ("one layer", "block")
PEERS = ("torch", "plain", "anderson", "plain jit", "anderson jit")


def torch_run(cell: str, width: int) -> Callable[[Any], Any]:
    """``x -> gradients`` by autograd through the loop."""
    from torch import nn

    if cell == "one layer":
        linear = nn.Linear(width, width, bias=False)
        linear.weight.data.mul_(0.5)
        parameters = [linear.weight]

        def f(x: Any, z: Any) -> Any:
            return torch.tanh(x + linear(z))
    else:
        inner = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        norm = nn.LayerNorm(width)
        parameters = [*inner.parameters(), *norm.parameters()]

        def f(x: Any, z: Any) -> Any:
            return norm(z + inner(z) + x)

    def run(x: Any) -> Any:
        x = x.clone().requires_grad_()
        z = torch.zeros_like(x)
        for _ in range(ITERATIONS):
            z = f(x, z)
        return torch.autograd.grad(z.square().mean(), [x, *parameters])

    return run


def funcnet_run(cell: str, width: int, peer: str) -> Callable[[Any], Any]:
    """``x -> gradients`` by the layer's pullback."""
    if cell == "one layer":
        f = fn.serial(fn.parallel(fn.identity(), fn.linear(width, bias=False)), fn.add(), fn.tanh())
    else:
        inner = fn.residual(fn.serial(fn.linear(width), fn.relu(), fn.linear(width)))
        f = fn.serial(fn.parallel(fn.identity(), inner), fn.add(), fn.layer_norm())
    history = 3 if peer.startswith("anderson") else 0
    net = fn.fixed_point(f, tol=1e-30, max_iter=ITERATIONS, history=history, limit=float("inf"))
    params, state = net.init(fn.key(0), torch.empty(1, width))

    def gradients(params: Any, x: Any) -> Any:
        z, pullback, _ = net.vjp(params, x, state)
        return pullback(z * (2 / z.numel()))

    compiled: Any = fn.jit(gradients) if peer.endswith("jit") else gradients
    return lambda x: compiled(params, x)


def run(cell: str, peer: str) -> tuple[float, float]:
    """MiB, and seconds of a call."""
    torch.set_num_threads(1)
    found, seconds = 0.0, 0.0
    for width, batch in ((8, 8), (WIDTH, BATCH)):
        x = torch.randn(batch, width)
        gc.collect()
        peak = host_memory()
        call = torch_run(cell, width) if peer == "torch" else funcnet_run(cell, width, peer)
        call(x)
        begin = time.perf_counter()
        call(x)
        found, seconds = peak(), time.perf_counter() - begin
    return found, seconds


def measured(cell: str, peer: str, rounds: int) -> tuple[float, float]:
    """The medians of several runs, those for memory with each tensor in pages of its own."""
    command = [sys.executable, __file__, "--run", cell, peer]
    found: list[list[float]] = [[], []]
    for place, more in enumerate(({"MALLOC_MMAP_THRESHOLD_": str(2**20)}, {})):
        for _ in range(rounds):
            options: Any = {"check": True, "capture_output": True, "text": True}
            result = subprocess.run(command, env={**os.environ, **more}, **options)
            found[place].append(float(result.stdout.split()[place]))
    memory, seconds = map(statistics.median, found)
    return memory, seconds


def main() -> None:
    """Print the table, or, for one run, its numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1, help="rounds (default 1)")
    parser.add_argument("--cells", nargs="*", default=CELLS)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(*run(*options.run))
        return
    print("| f, solver | MiB | of torch's | seconds | of torch's |\n|---|---|---|---|---|")
    for cell in options.cells:
        base = (0.0, 0.0)
        for peer in PEERS:
            memory, seconds = measured(cell, peer, options.rounds)
            base = (memory, seconds) if peer == "torch" else base
            ratios = memory / base[0], seconds / base[1]
            cells = f"{memory:.0f} | {ratios[0]:.2f} | {seconds:.2f} | {ratios[1]:.2f}"
            print(f"| {cell}, {peer} | {cells} |", flush=True)


if __name__ == "__main__":
    import torch

    import funcnet as fn

    main()
