"""A backward pass in two halves, beside both at once: the time of each, eager and compiled.

    python tests/benchmarks/deferred.py

`whole` is forward and backward pass, with gradients of params and of x; `first` the forward pass
and the cotangents of inputs, which `fn.defer` gives, and `second` the gradients of params from
that. Each is a function of its own, compiled where the mode is jit, and what the first one gives
goes to the second one as a value. They run in turns; a time is the median over the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import funcnet as fn

Run = Callable[[], Any]


def nets() -> dict[str, tuple[fn.Layer, torch.Tensor]]:
    """The nets by name, with an input."""
    hidden = [layer for _ in range(4) for layer in (fn.linear(512), fn.relu())]
    wide = [layer for _ in range(4) for layer in (fn.linear(1024), fn.relu())]
    images = [fn.conv2d(32, 3, padding=1), fn.relu(), fn.conv2d(32, 3, padding=1), fn.relu()]
    block = fn.transformer_encoder_layer(4, 512, dropout=0.0, batch_first=True)
    return {
        "MLP, 4 x 512, batch 256": (fn.serial(*hidden, fn.linear(10)), torch.randn(256, 256)),
        "MLP, 4 x 1024, batch 256": (fn.serial(*wide, fn.linear(10)), torch.randn(256, 1024)),
        "CNN, 32 channels, batch 32": (
            fn.serial(*images, fn.flatten(), fn.linear(10)),
            torch.randn(32, 3, 28, 28),
        ),
        "2 transformer layers, 16 x 64": (fn.serial(block, block), torch.randn(16, 64, 128)),
        "LSTM of 128, 32 x 64": (
            fn.serial(fn.lstm(128, batch_first=True), fn.item(0)),
            torch.randn(32, 64, 64),
        ),
    }


def halves(net: fn.Layer, x: torch.Tensor, mode: str) -> tuple[Run, Run, Run]:
    """``whole``, ``first`` and ``second``, each a function of nothing."""
    params, state = net.init(fn.key(0), x)
    y, _ = net.apply(params, x, state)
    dy = torch.randn_like(y)

    def whole(params: Any, x: Any, dy: Any) -> Any:
        _, pullback, _ = net.vjp(params, x, state)
        return pullback(dy)

    def first(params: Any, x: Any, dy: Any) -> Any:
        _, pullback, _ = net.vjp(params, x, state)
        return fn.defer(pullback)(dy)

    run = fn.jit if mode == "jit" else lambda function: function
    both, begin, finish = run(whole), run(first), run(fn.gradients)
    deferred, _ = begin(params, x, dy)
    return (
        lambda: both(params, x, dy),
        lambda: begin(params, x, dy),
        lambda: finish(deferred),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40, help="rounds (default 40)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| net | mode | whole, ms | first | second | both halves / whole |")
    print("|---" * 6 + "|")
    for name, (net, x) in nets().items():
        for mode in ("eager", "jit"):
            runs = halves(net, x, mode)
            found: list[list[float]] = [[], [], []]
            for number in range(options.rounds + 2):
                for run, times in zip(runs, found, strict=True):
                    start = time.perf_counter()
                    run()
                    if number > 1:
                        times.append(1e3 * (time.perf_counter() - start))
            whole, first, second = map(statistics.median, found)
            ratio = statistics.median(
                [(b + c) / a for a, b, c in zip(*found, strict=True)],
            )
            print(f"| {name} | {mode} | {whole:.2f} | {first:.2f} | {second:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
