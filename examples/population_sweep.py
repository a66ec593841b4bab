"""Train the nets of the fourth report's Table I as populations: minutes instead of hours.

    python examples/population_sweep.py --output examples/figures
    python examples/population_sweep.py --quick

Seven batch sizes, five learning rates and two activations, each trained for 500 epochs in ten
repetitions with training and test points of their own: 700 nets and 69 million steps. Three more
repetitions of each choose the learning rate and the averaging window, and are not reported. A batch
size and an activation are a row of the table, whose 5 rates x 13 repetitions are one population:
`fn.vmap` over the runs of `fn.scan` over the epochs of `fn.scan` over the batches, compiled by
`fn.jit` to one program that divides the runs among the cores. Finished rows are kept in the file
``--results``; a sweep that was interrupted goes on where it stopped.

The points, labels, net, rates and epochs are the report's. It does not tell how its net starts, how
the loss of a batch is reduced, or whether the points are scaled. Here

- the loss of a step is the squared error summed over the batch and both outputs, so that the
  batches of all sizes move the parameters alike in an epoch;
- the points are z-scored by the mean and deviation of the training points;
- the first layer's weights and biases start uniform in (-3, 3), so that its units change slope all
  over the square, and the others as in `fn.linear`: uniform within 1 / sqrt(inputs);
- what is measured is the net with the average of the parameters after the epochs (Polyak and
  Juditsky 1992), which reduces the noise of SGD. With a window of w epochs it is their mean until
  epoch w, and then an exponential moving average in which the newest has the weight 1 / w. A window
  of 1 gives the last parameters, whose accuracy has a column of its own.

The loss that is printed and drawn is the squared error summed over both outputs and averaged over
the points. The report's must be the same: a net whose outputs are the shares of the classes has
0.45, and the report's nets of 73 % have 0.36.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import disk
import matplotlib.pyplot as plt
import reports
import torch
from reports import POINTS, RATES, REPORTED, TEST, TRAIN, Recipe, percent, spread, verdict
from torch import Tensor, nn
from tqdm import tqdm

import funcnet as fn

ACTIVATIONS = {"ReLU": fn.relu(), "Tanh": fn.tanh()}
MODULES = {"ReLU": nn.ReLU, "Tanh": nn.Tanh}
WINDOWS = (1, 10, 30, 100, 300)
"""Of the averages of the parameters, in epochs; the first must be 1, the last parameters."""
CHOOSING = 3
"""Repetitions that choose among the rates and windows and are not reported."""
CHUNK = 10
"""Epochs of one call of the program. After each call the nets are measured."""
EPOCHS = 500
"""Of a run of the report."""
BATCH_SIZES = tuple(dict.fromkeys(batch_size for batch_size, _ in REPORTED))
QUICK = {"batch_sizes": (5, 100), "repetitions": 3, "epochs": 20}


class Row(NamedTuple):
    """What the result of a population depends on."""

    batch_size: int
    activation: str
    repetitions: int
    epochs: int
    seed: int
    rates: tuple[float, ...] = RATES
    windows: tuple[int, ...] = WINDOWS

    @property
    def runs(self) -> int:
        return len(self.rates) * (CHOOSING + self.repetitions)

    def steps(self, epochs: int) -> int:
        """Of all runs together."""
        return self.runs * epochs * (POINTS // self.batch_size)

    def recipe(self) -> Recipe:
        net = make_net(ACTIVATIONS[self.activation])
        return Recipe(net, reports.SUMMED, fn.sgd, self.batch_size, disk.out_of_annulus)


class Result(NamedTuple):
    """What a row gave."""

    loss: Tensor
    error: Tensor
    """By data set, rate, window, repetition and call, (2, rates, windows, repetitions, calls)."""
    step_seconds: float
    """The time of the population's training by its steps, measurements included."""

    def chosen(self) -> tuple[int, int]:
        """The indices of the rate and window of least test loss, of repetitions for choosing."""
        losses = self.loss[TEST, ..., :CHOOSING, -1].flatten(0, 1)
        return divmod(reports.best(losses), self.loss.shape[2])

    def reported(self, values: Tensor, rate: int, window: int) -> Tensor:
        """Losses or errors of the other repetitions, (2, repetitions, calls)."""
        return values[:, rate, window, CHOOSING:]


class Progress(NamedTuple):
    """How far a run is."""

    state: fn.TrainState
    averages: fn.Params
    """Of the parameters after the epochs, by window, (windows, ...)."""


def make_net(activation: fn.Layer) -> fn.Layer:
    """2-25-25-25-2; each unit of the first layer changes slope somewhere in the square."""
    wide = fn.initializers.uniform(-3.0, 3.0)
    first = fn.linear(25, weight_init=wide, bias_init=wide)
    hidden = [layer for _ in range(2) for layer in (activation, fn.linear(25))]
    return fn.serial(first, *hidden, activation, fn.linear(2))


def train(
    row: Row, run: reports.Run, progress: Progress, epochs: Tensor
) -> tuple[Progress, disk.Measured]:
    """Some epochs of one run: what is vmapped and compiled.

    Returns:
        How far it is, and the losses and errors after the last of these epochs, (windows, 2).
    """
    recipe, windows = row.recipe(), torch.tensor(row.windows)

    def epoch(progress: Progress, number: Tensor) -> tuple[Progress, None]:
        state = reports.train_epoch(recipe, run, progress.state, number)
        shares = 1 / torch.minimum(number + 1, windows)

        def average(old: Tensor, new: Tensor) -> Tensor:
            share = shares.view(-1, *[1] * new.dim())
            return (1 - share) * old + share * new

        return Progress(state, fn.tree.map(average, progress.averages, state.params)), None

    progress, _ = fn.scan(epoch, progress, epochs)
    return progress, fn.vmap(lambda net: reports.measure_all(recipe, run, net))(progress.averages)


def start(row: Row) -> tuple[reports.Run, Progress]:
    """The runs before their first step, by rate and repetition."""
    keys = fn.random.split(fn.key(row.seed), CHOOSING + row.repetitions)
    runs, states = reports.start_all(row.recipe(), torch.tensor(row.rates), keys)
    runs = runs._replace(sets=fn.tree.map(lambda leaf: leaf[:, : TEST + 1], runs.sets))
    averages = fn.tree.map(lambda p: torch.stack([p] * len(row.windows), 1), states.params)
    return runs, Progress(states, averages)


def train_row(row: Row, advance: Callable[[int], Any]) -> Result:
    """Train a population; after each call of the program ``advance`` is told its epochs."""
    runs, progress = start(row)
    train_all = fn.jit(fn.vmap(partial(train, row), in_axes=(0, 0, None)))
    history, seconds = [], []
    for epochs in torch.arange(row.epochs).split(CHUNK):
        begin = time.perf_counter()
        progress, measured = train_all(runs, progress, epochs)
        seconds.append((time.perf_counter() - begin) / row.steps(len(epochs)))
        history.append(measured)
        advance(len(epochs))
    loss, error = (
        torch.stack(values).unflatten(1, (len(row.rates), -1)).permute(4, 1, 3, 2, 0)
        for values in zip(*history, strict=True)
    )
    # The first call compiles.
    return Result(loss / POINTS, error, statistics.median_low(seconds))


def load(path: Path) -> dict[str, Result]:
    if not path.exists():
        return {}
    return {name: Result(**saved) for name, saved in fn.load(path).items()}


def sweep(rows: list[Row], path: Path) -> dict[tuple[int, str], Result]:
    """The results by batch size and activation: from the file those it has, trained the others.

    The file holds rows of any settings, each under its own.
    """
    results = load(path)
    missing = [row for row in rows if repr(row) not in results]
    if len(missing) < len(rows):
        print(f"{len(rows) - len(missing)} of {len(rows)} rows are taken from {path}")
    with tqdm(
        total=sum(epoch_cost(row) * row.epochs for row in missing),
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left",
        smoothing=0,
        disable=not missing,
    ) as progress:
        for number, row in enumerate(missing, 1):
            progress.set_description_str(
                f"row {number} of {len(missing)}, batch {row.batch_size} {row.activation}:"
            )
            cost = epoch_cost(row)
            results[repr(row)] = train_row(row, lambda n, cost=cost: progress.update(n * cost))
            fn.save(path, results)
    return {(row.batch_size, row.activation): results[repr(row)] for row in rows}


def epoch_cost(row: Row) -> float:
    """About how long an epoch takes: so much for its points, and so much for its steps."""
    return row.runs * (1 + 2.5 / row.batch_size)


def eager_step_seconds(row: Row, steps: int) -> float:
    """The time of a step of one such net in PyTorch: torch.nn, autograd and torch.optim.SGD."""
    widths, layers = (2, 25, 25, 25, 2), []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), MODULES[row.activation]()]
    module = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.SGD(module.parameters(), 1e-4)
    loss = nn.MSELoss(reduction="sum")
    key = fn.key(row.seed)
    x = fn.random.normal(fn.fold_in(key, "x"), (row.batch_size, 2))
    target = disk.one_hot(
        fn.random.bernoulli(fn.fold_in(key, "target"), 0.5, (row.batch_size,)).long()
    )
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss(module(x), target).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def compare(rows: list[Row], results: dict[tuple[int, str], Result], steps: int) -> None:
    """Print the time of a step in the populations, and one at a time in PyTorch."""
    table, ours, theirs = [], 0.0, 0.0
    for row in rows:
        step = results[row.batch_size, row.activation].step_seconds
        eager = eager_step_seconds(row, steps)
        ours += step * row.steps(row.epochs)
        theirs += eager * row.steps(row.epochs)
        times = [f"{1e6 * step:.2f}", f"{1e6 * eager:.0f}", f"{eager / step:.0f}"]
        table.append([str(row.batch_size), row.activation, *times])
    reports.print_table(["batch", "", "us a step and run", "eager PyTorch", "ratio"], table)
    print(
        f"these steps one at a time in eager PyTorch: {theirs / 3600:.2f} h without evaluation;"
        f" here {ours / 60:.1f} min with evaluation and without compilation: {theirs / ours:.0f}"
        " times as fast"
    )


def print_results(results: dict[tuple[int, str], Result], compared: bool = True) -> None:
    """Losses and accuracies, beside the report's where the runs are ``compared`` with its runs."""
    table, reached = [], []
    for (batch_size, activation), result in results.items():
        rate, window = result.chosen()
        loss = result.reported(result.loss, rate, window)[..., -1]
        error = result.reported(result.error, rate, window)[..., -1]
        plain = result.reported(result.error, rate, 0)[TEST, :, -1]
        reported_rate, *reported = REPORTED[batch_size, activation]
        # What is compared is what is printed.
        needed = float(reported[-1].split()[0])
        reached.append([float(percent(e).split()[0]) >= needed for e in (error[TEST], plain)])
        verdicts = [verdict(each) if compared else "" for each in reached[-1]]
        measured = [*map(spread, loss), *map(percent, error), *verdicts]
        measured.insert(-1, percent(plain))
        table.append(
            [str(batch_size), activation, f"{RATES[rate]:g}", str(WINDOWS[window]), *measured]
        )
        if compared:
            table.append(["", "  report", reported_rate, "", *reported, "", "", ""])
    header = ["batch", "", "rate", "window", "train loss", "test loss", "train accuracy %"]
    header += ["test accuracy %", "", "of the last parameters", ""]
    reports.print_table(header, table)
    if not compared:
        print(f"not compared with the report, whose runs took {EPOCHS} epochs")
        return
    averaged, plain = (sum(column) for column in zip(*reached, strict=True))
    print(
        f"{averaged} of {len(reached)} rows reach the report's test accuracy,"
        f" {plain} with the last parameters"
    )


def draw_losses(title: str, lines: dict[str, Tensor], legend: str, path: Path) -> None:
    """Losses of (data sets, repetitions, calls) by epoch: of the training and test points."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for panel, data_set, name in zip(panels, (TRAIN, TEST), ("training", "test"), strict=True):
        losses = {label: loss[data_set] for label, loss in lines.items()}
        reports.plot_epochs(panel, losses, every=CHUNK, title=f"{title}: {name} points")
    panels[0].set_ylabel("loss")
    panels[0].get_legend().remove()
    panels[1].legend(title=legend, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    disk.save(figure, path)


def draw_figures(results: dict[tuple[int, str], Result], output: Path) -> None:
    """The report's figures 7 and 8, of the rows that are there."""
    best = {}
    for (batch_size, activation), result in results.items():
        rate, window = result.chosen()
        if activation == "ReLU":
            label = f"{batch_size} ({RATES[rate]:g})"
            best[label] = result.reported(result.loss, rate, window)
        if (batch_size, activation) == (5, "ReLU"):
            rates = {
                f"{value:g}": result.reported(result.loss, index, window)
                for index, value in enumerate(RATES)
            }
            path = output / "population_fig7.png"
            draw_losses("Batch size 5, ReLU", rates, "learning rate", path)
    if best:
        draw_losses("ReLU", best, "batch size (rate)", output / "population_fig8.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train the nets of the fourth report's Table I as populations.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the data, the first parameters and the batches")
    add("--repetitions", type=int, default=10, help="of each setting, with data of their own")
    add("--epochs", type=int, default=EPOCHS, help=f"of a run; best a multiple of {CHUNK}")
    add(
        "--batch-sizes",
        type=int,
        nargs="+",
        choices=BATCH_SIZES,
        default=BATCH_SIZES,
        metavar="N",
        help="which of the report's",
    )
    add("--activations", nargs="+", choices=ACTIVATIONS, default=[*ACTIVATIONS], help="which")
    given = {name: value if isinstance(value, tuple) else (value,) for name, value in QUICK.items()}
    quick = "; ".join(
        f"--{name.replace('_', '-')} {' '.join(map(str, values))}" for name, values in given.items()
    )
    add("--quick", action="store_true", help=quick)
    add(
        "--results",
        type=Path,
        default=Path("population_sweep.safetensors"),
        metavar="FILE",
        help="where finished rows are kept; with another file, or none there, all start anew",
    )
    add("--slice", type=int, default=300, metavar="N", help="steps of PyTorch that are timed")
    add("--output", type=Path, default=Path(), metavar="DIRECTORY", help="where the figures go")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    disk.require_positive(parser, options, "repetitions", "epochs", "slice")
    return options


def main() -> None:
    options = parse()
    rows = [
        Row(batch_size, activation, options.repetitions, options.epochs, options.seed)
        for batch_size in options.batch_sizes
        for activation in options.activations
    ]
    begin = time.perf_counter()
    results = sweep(rows, options.results)
    print(f"{sum(row.runs for row in rows)} runs: {time.perf_counter() - begin:.0f} s")
    print_results(results, compared=options.epochs >= EPOCHS)
    disk.one_thread()
    compare(rows, results, options.slice)
    draw_figures(results, options.output)


if __name__ == "__main__":
    main()
