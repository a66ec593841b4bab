"""Ten training steps of each network at its full size, beside its twin in torch.nn.

``python -m tests.networks`` from the root of the repository; ``--only NAME...`` chooses, and
``--small`` takes the sizes of CI. It prints the greatest relative difference of the parameters,
running statistics and losses, eager and compiled, in float64; above 1e-8 the program fails.

``--gpt2`` holds GPT-2 with its 124 million parameters to that of the package `transformers`: logits
and gradients, in float64 and float32.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from networks import gpt2
from networks.training import CASES, error, train, train_twin

import funcnet as fn

GPT2_WITHIN = {torch.float64: 1e-10, torch.float32: 1e-5}


def main() -> None:
    """Print the table; exit with 1 if a network differs from its twin."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CASES, default=[*CASES], metavar="NAME")
    parser.add_argument("--small", action="store_true", help="the sizes of CI")
    parser.add_argument("--gpt2", action="store_true", help="GPT-2 alone")
    options = parser.parse_args()
    if options.gpt2:
        sys.exit(hold_gpt2())
    worst = 0.0
    print(
        "| network | parameters | eager | compiled | seconds |\n|---|---|---|---|---|", flush=True
    )
    for name in options.only:
        case, full, begin = CASES[name], not options.small, time.perf_counter()
        expected = train_twin(case, full)
        eager = error(train(case, full), expected)
        compiled = error(train(case, full, fn.jit), expected)
        count = sum(leaf.numel() for leaf in expected.params.values())
        seconds = time.perf_counter() - begin
        print(f"| {name} | {count} | {eager:.1e} | {compiled:.1e} | {seconds:.0f} |", flush=True)
        worst = max(worst, eager, compiled)
    sys.exit(worst > 1e-8)


def hold_gpt2() -> bool:
    """Print the errors of GPT-2's logits and gradients; whether one is too large."""
    failed = False
    print("| dtype | logits | gradients | the largest of |\n|---|---|---|---|")
    for dtype, within in GPT2_WITHIN.items():
        found = gpt2.errors(dtype)
        logits = found.pop("logits")
        path = max(found, key=lambda path: found[path])
        print(f"| {dtype} | {logits:.1e} | {found[path]:.1e} | {path} |", flush=True)
        failed |= max(logits, found[path]) > within
    return failed


if __name__ == "__main__":
    main()
