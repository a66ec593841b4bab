"""Ten training steps of each network at its full size, beside its twin in torch.nn.

``python -m tests.networks`` from the root of the repository; ``--only NAME...`` chooses, and
``--small`` takes the sizes of CI. It prints the greatest relative difference of the parameters,
running statistics and losses, eager and compiled, in float64; above 1e-8 the program fails.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from networks.training import CASES, error, train, train_twin

import funcnet as fn


def main() -> None:
    """Print the table; exit with 1 if a network differs from its twin."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CASES, default=[*CASES], metavar="NAME")
    parser.add_argument("--small", action="store_true", help="the sizes of CI")
    options = parser.parse_args()
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


if __name__ == "__main__":
    main()
