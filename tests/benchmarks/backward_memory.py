"""Memory of activations, and time, of backward passes that keep less: reversible, compressed.

    python tests/benchmarks/backward_memory.py
    python tests/benchmarks/backward_memory.py --rows "blocks 32" "int8 32" --peers eager

Each run computes the gradient of the sum of y^2 / 2 with respect to all parameters, float32, on one
thread, in a process of its own. ``eager`` calls vjp and pullback, ``jit`` a compiled function of
both. Its memory is the peak of the resident set in the second call, less that before, with x and
the parameters, less the size of the gradients: what activations and cotangents take. It is measured
with MALLOC_MMAP_THRESHOLD_=65536: by default glibc puts gradients into the holes that activations
left, which are then too small for the next ones. A compiled function keeps its memory for the next
call: of it the size of its workspace is shown, which is all that is neither argument nor result.
The time is the least of five calls. The runs take turns; each number is the median over the rounds.

- ``pairs``, ``remat``, ``reversible``: that many pairs of residual blocks f and g, each
  (layer_norm, linear, relu, linear), 128 wide, on two halves of 8192 rows: kept as they are, each
  pair rematerialised, and `fn.reversible`. ``torch`` is autograd, ``torch.utils.checkpoint`` around
  each pair, and a hand-written ``torch.autograd.Function`` of all pairs.
- ``blocks``, ``bfloat16``, ``int8``: that many of (linear, layer_norm, relu), 512 wide, on 2048
  rows: as they are, and by `fn.compressed`; relu by one bit, int8 by stochastic rounding.
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

PEERS = ("eager", "jit", "torch")
ROWS = (
    *("pairs 64", "remat 64", "reversible 4", "reversible 64"),
    *("blocks 32", "bfloat16 32", "int8 32"),
)
PAIR_WIDTH, PAIR_ROWS = 128, 8192
WIDTH, BATCH = 512, 2048


def net_of(kind: str, depth: int) -> Any:
    """The net, and an example of x."""
    if kind in ("pairs", "remat", "reversible"):

        def block() -> fn.Layer:
            hidden = fn.linear(PAIR_WIDTH), fn.relu(), fn.linear(PAIR_WIDTH)
            return fn.serial(fn.layer_norm(), *hidden)

        x = tuple([fn.random.normal(fn.key(each), (PAIR_ROWS, PAIR_WIDTH)) for each in (1, 2)])
        pairs = [(block(), block()) for _ in range(depth)]
        if kind == "reversible":
            return fn.reversible(*pairs), x
        made = [plain_pair(*each) for each in pairs]
        return fn.serial(*[fn.remat(each) if kind == "remat" else each for each in made]), x
    layers: list[fn.Layer] = []
    for _ in range(depth):
        layers += [fn.linear(WIDTH), fn.layer_norm(), fn.relu()]
    net = fn.serial(*layers)
    x = fn.random.normal(fn.key(1), (BATCH, WIDTH))
    return net if kind == "blocks" else fn.compressed(net, kind), x


def plain_pair(f: Any, g: Any) -> Any:
    """``y1 = x1 + f(x2)``, ``y2 = x2 + g(y1)``, which keeps its residuals."""
    return fn.combine("pair", {"f": f, "g": g}, pair_forward, pair_backward)


def pair_forward(run: Any, x: Any) -> Any:
    """Both halves."""
    y1 = x[0] + run("f", x[1])
    return (y1, x[1] + run("g", y1)), {}


def pair_backward(pull: Any, dy: Any, residuals: Any) -> Any:
    """Their cotangents."""
    dx1 = dy[0] + pull("g", dy[1])
    return dx1, dy[1] + pull("f", dx1)


def ours(kind: str, depth: int, jit: bool) -> tuple[Callable[[], Any], int, Callable[[], int]]:
    """A call that computes the gradients, their size in bytes, and a compiled call's workspace."""
    net, x = net_of(kind, depth)
    params, state = net.init(fn.key(0), x)

    def gradient(params: Any, x: Any, key: Any) -> Any:
        y, pullback, _ = net.vjp(params, x, state, key=key)
        return pullback(y, x=False)[0]

    def workspace() -> int:
        code = fn.jit(gradient).lower(params, x, fn.key(3)).code
        return int(code.split("Workspace workspace(")[1].split(")")[0])

    called = fn.jit(gradient) if jit else gradient
    return lambda: called(params, x, fn.key(3)), fn.tree.bytes(params), workspace


def theirs(kind: str, depth: int) -> tuple[Callable[[], Any], int]:
    """The same with torch.nn and autograd."""
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    if kind in ("pairs", "remat", "reversible"):

        def block() -> nn.Module:
            hidden = nn.Linear(PAIR_WIDTH, PAIR_WIDTH), nn.ReLU(), nn.Linear(PAIR_WIDTH, PAIR_WIDTH)
            return nn.Sequential(nn.LayerNorm(PAIR_WIDTH), *hidden)

        blocks = nn.ModuleList([block() for _ in range(2 * depth)])
        x = [torch.randn(PAIR_ROWS, PAIR_WIDTH) for _ in range(2)]

        def pair(index: int, x1: Any, x2: Any) -> Any:
            y1 = x1 + blocks[2 * index](x2)
            return y1, x2 + blocks[2 * index + 1](y1)

        class Reversible(torch.autograd.Function):
            """All pairs: the forward pass without a tape, the backward pass from the outputs."""

            @staticmethod
            def forward(ctx: Any, x1: Any, x2: Any, *params: Any) -> Any:
                with torch.no_grad():
                    for index in range(depth):
                        x1, x2 = pair(index, x1, x2)
                ctx.save_for_backward(x1, x2)
                return x1, x2

            @staticmethod
            def backward(ctx: Any, dy1: Any, dy2: Any) -> Any:
                y1, y2 = ctx.saved_tensors
                for index in range(depth - 1, -1, -1):
                    f, g = blocks[2 * index], blocks[2 * index + 1]
                    with torch.enable_grad():
                        y1 = y1.detach().requires_grad_()
                        out = g(y1)
                    out.backward(dy2)
                    with torch.no_grad():
                        y2, dy1 = y2 - out, dy1 + y1.grad
                    with torch.enable_grad():
                        y2 = y2.detach().requires_grad_()
                        out = f(y2)
                    out.backward(dy1)
                    with torch.no_grad():
                        y1, dy2 = y1 - out, dy2 + y2.grad
                return (None,) * (2 + len(list(blocks.parameters())))

        def call() -> None:
            for each in blocks.parameters():
                each.grad = None
            x1, x2 = x
            if kind == "reversible":
                x1, x2 = Reversible.apply(x1, x2, *blocks.parameters())
            for index in range(0 if kind == "reversible" else depth):
                if kind == "remat":
                    x1, x2 = checkpoint(pair, index, x1, x2, use_reentrant=False)
                else:
                    x1, x2 = pair(index, x1, x2)
            torch.autograd.backward((x1, x2), (x1.detach(), x2.detach()))

        module: nn.Module = blocks
    else:
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU()]
        module, rows = nn.Sequential(*layers), torch.randn(BATCH, WIDTH)

        def call() -> None:
            for each in module.parameters():
                each.grad = None
            y = module(rows)
            y.backward(y.detach())

    return call, sum([each.nbytes for each in module.parameters()])


def run(peer: str, kind: str, depth: int, what: str) -> float:
    """MiB of activations, or seconds."""
    torch.set_num_threads(1)
    if peer == "torch":
        call, size = theirs(kind, depth)
    else:
        call, size, workspace = ours(kind, depth, peer == "jit")
        if peer == "jit" and what == "memory":
            return workspace() / 2**20
    call()
    gc.collect()
    if what == "memory":
        peak = host_memory()
        call()
        return peak() - size / 2**20
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Print the table, or, for one run, its number."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--rows", nargs="*", default=ROWS, help="nets and depths")
    parser.add_argument("--peers", nargs="*", default=PEERS, help="eager, jit, torch")
    parser.add_argument("--what", nargs="*", default=("memory", "time"), help="memory, time")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        peer, kind, depth, what = options.run
        print(run(peer, kind, int(depth), what))
        return
    runs = [
        (row, peer, what)
        for row in options.rows
        for peer in options.peers
        for what in options.what
        if peer != "torch" or row.split()[0] not in ("bfloat16", "int8")
    ]
    found: dict[tuple[str, str, str], list[float]] = {each: [] for each in runs}
    freed = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for _ in range(options.rounds):
        for row, peer, what in runs:
            command = [sys.executable, __file__, "--run", peer, *row.split(), what]
            environment = freed if what == "memory" else None
            result = subprocess.run(
                command, check=True, capture_output=True, text=True, env=environment
            )
            found[row, peer, what].append(float(result.stdout))
    print(
        "| net, depth | " + " | ".join(f"{peer}, MiB | {peer}, s" for peer in options.peers) + " |"
    )
    print("|---" * (1 + 2 * len(options.peers)) + "|")
    for row in options.rows:
        cells = []
        for peer in options.peers:
            for what, form in (("memory", ".1f"), ("time", ".3f")):
                numbers = found.get((row, peer, what))
                cells.append(format(statistics.median(numbers), form) if numbers else "-")
        print(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    import torch

    import funcnet as fn

    main()
