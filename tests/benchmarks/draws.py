"""A million random draws in eager mode beside torch's own generator, one thread.

python tests/benchmarks/draws.py
"""

import argparse
import statistics
import time

import torch

import funcnet as fn


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30, help="rounds (default 30)")
    parser.add_argument("--draws", type=int, default=10**6, help="draws a call (default 10**6)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    key, n = fn.key(0), options.draws
    pairs = {
        "uniform": (lambda: torch.rand(n), lambda: fn.random.uniform(key, (n,))),
        "normal": (lambda: torch.randn(n), lambda: fn.random.normal(key, (n,))),
        "bernoulli": (
            lambda: torch.bernoulli(torch.full((n,), 0.5)),
            lambda: fn.random.bernoulli(key, 0.5, (n,)),
        ),
        "permutation": (lambda: torch.randperm(n), lambda: fn.random.permutation(key, n)),
    }
    print("| draws | torch, ms | funcnet, ms | ratio |")
    print("|---|---|---|---|")
    for name, calls in pairs.items():
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(options.rounds):
            for call, found in zip(calls, times, strict=True):
                start = time.perf_counter()
                call()
                found.append(1e3 * (time.perf_counter() - start))
        theirs, ours = map(statistics.median, times)
        print(f"| {name} | {theirs:.2f} | {ours:.2f} | {ours / theirs:.2f} |")


if __name__ == "__main__":
    main()
