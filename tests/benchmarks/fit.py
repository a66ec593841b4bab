"""What `fn.fit` takes a step beside the step itself, over a DataLoader.

    python tests/benchmarks/fit.py

The step only counts, so that all else is seen. A loop ``for batch in loader: state, metrics =
step(state, batch)`` and `fn.fit` take turns in one process; each number is the median over the
rounds, of the processor's time.
"""

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import funcnet as fn

STEPS = 500


def step(state: fn.TrainState, batch: Any) -> tuple[fn.TrainState, dict[str, torch.Tensor]]:
    return state._replace(step=state.step + 1), {"loss": batch[0][0, 0], "mae": batch[1][0, 0]}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="rounds (default 20)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, target = torch.randn(STEPS * 4, 10), torch.randn(STEPS * 4, 1)
    loader = DataLoader(TensorDataset(x, target), 4)
    start = fn.init_train_state(fn.linear(1), fn.sgd(0.1), fn.key(0), x)

    def by_hand() -> None:
        state = start
        for batch in loader:
            state, _ = step(state, batch)

    def plain() -> None:
        fn.fit(step, start, loader, progress=False)

    def watched() -> None:
        with tempfile.TemporaryDirectory() as folder:
            callback = lambda state, logs: None  # noqa: E731
            fn.fit(step, start, loader, callbacks=callback, checkpoint=folder)

    runs = {"loop": by_hand, "fit": plain, "fit, callback, bar, checkpoint": watched}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds + 1):
        for name, run in runs.items():
            begin = time.process_time()
            run()
            times[name].append((time.process_time() - begin) / STEPS * 1e6)
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    print("| loop | us a step | beyond the loop |")
    print("|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median:.1f} | {median - medians['loop']:.1f} |")


if __name__ == "__main__":
    main()
