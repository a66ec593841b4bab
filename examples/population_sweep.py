"""Train the 700 nets of the fourth report's Table I as populations: minutes instead of hours.

    python examples/population_sweep.py --output examples/figures
    python examples/population_sweep.py --quick

Seven batch sizes, five learning rates and two activations, each ten times with training and test
points of its own, for 500 epochs: 69 million steps. A batch size and an activation are a row of the
table. Its 5 rates x 10 rounds are one population: `fn.vmap` over the runs of `fn.scan` over the
epochs of `fn.scan` over the batches, compiled by `fn.jit` to one program, in which the runs are
shared out to the cores. Finished rows are kept in the file ``--results``; a run that was
interrupted goes on where it stopped.

The points, labels, net, rates and epochs are the report's. It does not tell how its net starts, how
the loss of a batch is reduced, or whether the points are scaled. Here

- the loss of a step is the squared error summed over the batch and both outputs, so that the
  batches of all sizes move the parameters alike in an epoch;
- the points are z-scored by the mean and deviation of the training points;
- the first layer's weights and biases start uniform in (-3, 3), so that its units bend all over the
  square, and the others as `fn.linear` lets them start: uniform in 1 / sqrt(inputs);
- what is measured after an epoch is the net with the average of the parameters after the last 100
  epochs (Polyak and Juditsky 1992), which takes the noise of SGD out: it gets about 0.3 % of the
  test points right that the last parameters get wrong.

The loss that is printed and drawn is the squared error summed over both outputs and averaged over
the points. The report's must be the same: from a net that knows but the share of the classes, it is
0.45, and the report's nets of 73 % have 0.36.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from disk import (
    Data,
    Objective,
    draw,
    margin_score,
    mistakes,
    one_hot,
    one_thread,
    out_of_annulus,
    require_positive,
    save,
    standardized,
)
from matplotlib.axes import Axes
from report_tables import (
    ERROR,
    LOSS,
    POINTS,
    RATES,
    TEST,
    TRAIN,
    percent,
    plot_band,
    print_table,
    spread,
    verdict,
)
from torch import Tensor, nn
from tqdm import tqdm

import funcnet as fn

OBJECTIVE = Objective(fn.mse("sum"), 2, one_hot, margin_score)
ACTIVATIONS = {"ReLU": fn.relu(), "Tanh": fn.tanh()}
MODULES = {"ReLU": nn.ReLU, "Tanh": nn.Tanh}
AVERAGED = 100
CHUNK = 5
"""Epochs of one call, between which the progress bar moves."""

# By batch size: the best rate, and by activation the train and test loss, and the train and test
# accuracy in percent.
REPORTED = {
    (1, "ReLU"): ("0.01", "0.0160 ± 0.0027", "0.0189 ± 0.0047", "98.82 ± 0.19", "98.82 ± 0.29"),
    (1, "Tanh"): ("0.01", "0.0171 ± 0.0025", "0.0191 ± 0.0039", "98.78 ± 0.17", "98.78 ± 0.24"),
    (5, "ReLU"): ("0.01", "0.0148 ± 0.0033", "0.0187 ± 0.0043", "98.78 ± 0.27", "98.88 ± 0.27"),
    (5, "Tanh"): ("0.01", "0.0164 ± 0.0032", "0.0198 ± 0.0044", "98.78 ± 0.27", "98.78 ± 0.36"),
    (10, "ReLU"): ("0.01", "0.0174 ± 0.0041", "0.0220 ± 0.0058", "98.61 ± 0.29", "98.61 ± 0.44"),
    (10, "Tanh"): ("0.01", "0.0269 ± 0.0099", "0.0292 ± 0.0053", "98.56 ± 0.45", "98.56 ± 0.32"),
    (20, "ReLU"): ("0.01", "0.0987 ± 0.0028", "0.0339 ± 0.0037", "98.39 ± 0.22", "98.39 ± 0.36"),
    (20, "Tanh"): ("0.01", "0.0708 ± 0.0148", "0.0704 ± 0.0114", "96.63 ± 0.91", "96.63 ± 0.83"),
    (50, "ReLU"): ("0.001", "0.1077 ± 0.0078", "0.1071 ± 0.0076", "96.28 ± 0.63", "96.28 ± 0.79"),
    (50, "Tanh"): ("0.001", "0.1290 ± 0.0104", "0.1270 ± 0.0073", "94.89 ± 1.25", "94.89 ± 0.89"),
    (100, "ReLU"): ("0.001", "0.1815 ± 0.0311", "0.1812 ± 0.0309", "90.48 ± 3.67", "90.48 ± 3.62"),
    (100, "Tanh"): ("0.001", "0.2748 ± 0.0628", "0.2736 ± 0.0595", "81.74 ± 2.91", "81.74 ± 4.00"),
    (200, "ReLU"): ("0.001", "0.3600 ± 0.0305", "0.3598 ± 0.0363", "72.76 ± 4.06", "72.76 ± 5.87"),
    (200, "Tanh"): ("0.001", "0.3866 ± 0.0308", "0.3865 ± 0.0286", "75.93 ± 6.36", "75.93 ± 6.45"),
}
BATCH_SIZES = tuple(dict.fromkeys(batch_size for batch_size, _ in REPORTED))
QUICK = {"batch_sizes": (5, 100), "rounds": 3, "epochs": 20}


class Row(NamedTuple):
    """What the result of a population depends on."""

    batch_size: int
    activation: str
    rounds: int
    epochs: int
    seed: int
    rates: tuple[float, ...] = RATES
    points: int = POINTS

    @property
    def runs(self) -> int:
        return len(self.rates) * self.rounds

    def steps(self, epochs: int) -> int:
        """Of all runs together."""
        return self.runs * epochs * (self.points // self.batch_size)


class Result(NamedTuple):
    """What a row gave."""

    history: Tensor
    """Loss and error by rate, round, epoch and data set, (rates, rounds, epochs, 2, 2)."""
    step_seconds: float
    """The time of the population's training by its steps, evaluation included."""

    def best(self) -> int:
        """The place of the rate with the least mean test loss; too high a one ends in NaN."""
        return self.history[:, :, -1, TEST, LOSS].mean(1).nan_to_num(torch.inf).argmin().item()


class Run(NamedTuple):
    """One member of a population: what differs from run to run, and does not change in it."""

    key: Tensor
    rate: Tensor
    train: Data
    test: Data


class Progress(NamedTuple):
    """How far a run is."""

    state: fn.TrainState
    average: fn.Params
    """Of the parameters after the last epochs, or all of them if they are not so many."""


def net(activation: fn.Layer) -> fn.Layer:
    """2-25-25-25-2; each unit of the first layer starts with its bend somewhere in the square."""
    wide = fn.initializers.uniform(-3.0, 3.0)
    first = fn.linear(25, weight_init=wide, bias_init=wide)
    hidden = [layer for _ in range(2) for layer in (activation, fn.linear(25))]
    return fn.serial(first, *hidden, activation, fn.linear(OBJECTIVE.outputs))


def start(model: fn.Layer, key: Tensor, rate: Tensor) -> tuple[Run, Progress]:
    """A run before its first step: all but the rate is a function of the round's key."""
    points = [draw(fn.fold_in(key, name), POINTS, out_of_annulus) for name in ("train", "test")]
    train, test = standardized(*points)
    state = fn.init_train_state(model, fn.sgd(rate), fn.fold_in(key, "model"), train.points)
    return Run(key, rate, train, test), Progress(state, state.params)


def measure(model: fn.Layer, params: fn.Params, data: Data) -> Tensor:
    """Loss and error, (2,)."""
    outputs, _ = model.apply(params, data.points)
    loss = OBJECTIVE.loss.apply(outputs, OBJECTIVE.target(data.labels)) / len(data.points)
    return torch.stack([loss, mistakes(OBJECTIVE, outputs, data).float().mean()])


def train(
    model: fn.Layer, batch_size: int, run: Run, progress: Progress, epochs: Tensor
) -> tuple[Progress, Tensor]:
    """Some epochs of one run: what is vmapped and compiled.

    Returns:
        How far it is, and loss and error of both data sets after each epoch, (epochs, 2, 2).
    """
    step = fn.train_step(model, OBJECTIVE.loss, fn.sgd(run.rate))
    examples = run.train.points, OBJECTIVE.target(run.train.labels)
    shuffle_key = fn.fold_in(run.key, "shuffle")

    def epoch(progress: Progress, number: Tensor) -> tuple[Progress, Tensor]:
        batches = fn.epoch_batches(fn.fold_in(shuffle_key, number), examples, batch_size)
        state, _ = fn.scan(
            lambda state, batch: (step(state, batch)[0], None), progress.state, batches
        )
        share = 1 / (number + 1).clamp(max=AVERAGED)
        average = fn.tree.map(
            lambda old, new: old + share * (new - old), progress.average, state.params
        )
        sets = [measure(model, average, data) for data in (run.train, run.test)]
        return Progress(state, average), torch.stack(sets)

    return fn.scan(epoch, progress, epochs)


def train_row(row: Row, advance: Callable[[int], Any]) -> Result:
    """Train a population; after each call of the program ``advance`` hears of its epochs."""
    model = net(ACTIVATIONS[row.activation])
    keys = fn.random.split(fn.key(row.seed), row.rounds).repeat(len(row.rates), 1)
    rates = torch.tensor(row.rates).repeat_interleave(row.rounds)
    runs, progress = fn.vmap(lambda key, rate: start(model, key, rate))(keys, rates)

    train_all = fn.jit(
        fn.vmap(
            lambda run, progress, epochs: train(model, row.batch_size, run, progress, epochs),
            in_axes=(0, 0, None),
        )
    )
    histories, seconds = [], []
    for epochs in torch.arange(row.epochs).split(CHUNK):
        begin = time.perf_counter()
        progress, history = train_all(runs, progress, epochs)
        seconds.append((time.perf_counter() - begin) / row.steps(len(epochs)))
        histories.append(history)
        advance(len(epochs))
    history = torch.cat(histories, 1).unflatten(0, (len(row.rates), row.rounds))
    # The first call compiles.
    return Result(history, statistics.median_low(seconds))


def load(path: Path) -> dict[str, Result]:
    if not path.exists():
        return {}
    return {name: Result(**saved) for name, saved in torch.load(path).items()}


def store(path: Path, results: dict[str, Result]) -> None:
    """Write a file that is never there in part, whenever the program is stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save({name: result._asdict() for name, result in results.items()}, partial)
    os.replace(partial, path)


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
            store(path, results)
    return {(row.batch_size, row.activation): results[repr(row)] for row in rows}


def epoch_cost(row: Row) -> float:
    """About how long an epoch takes: so much for its points, and so much for its steps."""
    return row.runs * (1 + 2.5 / row.batch_size)


def eager_step_seconds(row: Row, steps: int) -> float:
    """The time of a step of one such net in PyTorch: torch.nn, autograd and torch.optim.SGD."""
    widths, layers = (2, 25, 25, 25, OBJECTIVE.outputs), []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), MODULES[row.activation]()]
    module = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.SGD(module.parameters(), 1e-4)
    loss = nn.MSELoss(reduction="sum")
    key = fn.key(row.seed)
    x = fn.random.normal(fn.fold_in(key, "x"), (row.batch_size, 2))
    target = one_hot(fn.random.bernoulli(fn.fold_in(key, "target"), 0.5, (row.batch_size,)).long())
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
    print_table(["batch", "", "us a step and run", "eager PyTorch", "ratio"], table)
    print(
        f"these steps one at a time in eager PyTorch: {theirs / 3600:.2f} h without evaluation;"
        f" here {ours / 60:.1f} min with evaluation and without compilation: {theirs / ours:.0f}"
        " times as fast"
    )


def print_results(results: dict[tuple[int, str], Result]) -> None:
    table, reached = [], []
    for (batch_size, activation), result in results.items():
        best = result.best()
        last = result.history[best, :, -1]
        rate, *reported = REPORTED[batch_size, activation]
        accuracy = 100 * (1 - last[:, TEST, ERROR].mean().item())
        # What is compared is what is printed.
        reached.append(round(accuracy, 2) >= float(reported[-1].split()[0]))
        measured = [
            spread(last[:, TRAIN, LOSS]),
            spread(last[:, TEST, LOSS]),
            percent(last[:, TRAIN, ERROR]),
            percent(last[:, TEST, ERROR]),
        ]
        table += [
            [str(batch_size), activation, f"{RATES[best]:g}", *measured, verdict(reached[-1])],
            ["", "  report", rate, *reported, ""],
        ]
    header = ["batch", "", "rate", "train loss", "test loss", "train accuracy %"]
    print_table([*header, "test accuracy %", ""], table)
    print(f"{sum(reached)} of {len(reached)} rows reach the report's test accuracy")


def draw_losses(title: str, lines: dict[str, Tensor], legend: str, path: Path) -> None:
    """Losses of (rounds, epochs, data sets, 2) by epoch: of the training and of the test points."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    axes: Axes
    for axes, data_set, name in zip(panels, (TRAIN, TEST), ("training", "test"), strict=True):
        for label, history in lines.items():
            losses = history[:, :, data_set, LOSS]
            plot_band(axes, range(1, losses.shape[1] + 1), losses, label)
        axes.set(title=f"{title}: {name} points", xlabel="epoch", yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss")
    panels[1].legend(title=legend, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    save(figure, path)


def draw_figures(results: dict[tuple[int, str], Result], output: Path) -> None:
    """The report's figures 7 and 8, of the rows that are there."""
    if (5, "ReLU") in results:
        history = results[5, "ReLU"].history
        rates = {f"{rate:g}": history[place] for place, rate in enumerate(RATES)}
        path = output / "population_fig7.png"
        draw_losses("Batch size 5, ReLU", rates, "learning rate", path)
    best = {
        f"{batch_size} ({RATES[result.best()]:g})": result.history[result.best()]
        for (batch_size, activation), result in results.items()
        if activation == "ReLU"
    }
    if best:
        draw_losses("ReLU", best, "batch size (rate)", output / "population_fig8.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train the 700 nets of the fourth report's Table I as populations.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the data, the first parameters and the batches")
    add("--rounds", type=int, default=10, help="runs of each setting, with data of their own")
    add("--epochs", type=int, default=500, help=f"of a run; best a multiple of {CHUNK}")
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
        default=Path("population_sweep.pt"),
        metavar="FILE",
        help="where finished rows are kept; with another file, or none there, all start anew",
    )
    add("--slice", type=int, default=300, metavar="N", help="steps of PyTorch that are timed")
    add("--output", type=Path, default=Path(), metavar="DIRECTORY", help="where the figures go")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    require_positive(parser, options, "rounds", "epochs", "slice")
    return options


def main() -> None:
    options = parse()
    rows = [
        Row(batch_size, activation, options.rounds, options.epochs, options.seed)
        for batch_size in options.batch_sizes
        for activation in options.activations
    ]
    begin = time.perf_counter()
    results = sweep(rows, options.results)
    print(f"{sum(row.runs for row in rows)} runs: {time.perf_counter() - begin:.0f} s")
    print_results(results)
    one_thread()
    compare(rows, results, options.slice)
    draw_figures(results, options.output)


if __name__ == "__main__":
    main()
