"""A step of Muon beside torch.optim.Muon's, on matrices of one size, on one thread.

    python tests/benchmarks/muon.py [--size 512] [--matrices 20] [--dtype bfloat16]

The peers take turns in one process; each number is the median of its processor time over the
rounds, and the ratio the median over the rounds of the ratio in one. ``--dtype`` is that of the
iterations: torch's is bfloat16.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import funcnet as fn


def peers(size: int, matrices: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """What is measured, by name: a step with given gradients."""
    names = [str(index) for index in range(matrices)]
    params, grads = (
        {name: torch.randn(size, size) for name in names},
        {name: torch.randn(size, size) for name in names},
    )
    leaves = [torch.nn.Parameter(params[name].clone()) for name in names]
    for leaf, name in zip(leaves, names, strict=True):
        leaf.grad = grads[name]
    optimizer = fn.muon(ns_dtype=dtype)

    def step(state: tuple, grads: dict) -> tuple:
        params, opt_state = state
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return fn.apply_updates(params, updates), opt_state

    def looped(step: Callable[[tuple, dict], tuple]) -> Callable[[], None]:
        states = [(fn.tree.map(torch.clone, params), optimizer.init_state(params))]

        def run() -> None:
            states[0] = step(states[0], grads)

        return run

    return {
        "torch": torch.optim.Muon(leaves).step,
        "funcnet eager": looped(step),
        "funcnet jit": looped(fn.jit(step, donate=0)),
    }


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--matrices", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps = peers(options.size, options.matrices, getattr(torch, options.dtype))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds + 2):
        for name, step in steps.items():
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    print("| step | ms | / torch |\n|---|---|---|")
    for name in steps:
        kept, peer = times[name][2:], times["torch"][2:]
        ratio = statistics.median(one / other for one, other in zip(kept, peer, strict=True))
        print(f"| {name} | {1e3 * statistics.median(kept):.1f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
