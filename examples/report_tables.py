"""Reproduce what four reports measured on the disk, with mean and deviation over ten seeds.

    python examples/report_tables.py --table activations
    python examples/report_tables.py --table pytorch
    python examples/report_tables.py --table losses
    python examples/report_tables.py --table batch-sizes

Each prints a table in which a line of funcnet stands above the report's line, with the targets
that it reaches ("pass") or misses ("FAIL"), and writes a figure to the output directory. Every
run draws its own data, first parameters and batches from its seed. Rates that "fall" do so from
the printed one to 0, in a straight line.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from disk import (
    Data,
    Labels,
    Objective,
    column,
    draw,
    draw_output,
    draw_points,
    first_output,
    fit,
    in_disk,
    linear_decay,
    margin_score,
    measure,
    mlp,
    one_hot,
    one_thread,
    out_of_annulus,
    require_positive,
    save,
    shuffled,
    standardized,
    steps_in,
    unit_square,
)
from matplotlib.axes import Axes
from torch import Tensor, nn
from tqdm import tqdm

import funcnet as fn

POINTS = 1000
"""Of the training and of the test set."""
TRAIN, TEST, VALIDATION = 0, 1, 2
LOSS, ERROR = 0, 1


class Recipe(NamedTuple):
    """One way to train."""

    model: fn.Layer
    objective: Objective
    optimizer: fn.Optimizer
    batch_size: int
    labels: Labels = in_disk


class Runs(NamedTuple):
    """What training with several seeds gave."""

    history: Tensor
    """Loss and error by seed, epoch and data set, (seeds, epochs, 3, 2)."""
    params: list[fn.Params]

    def last(self, data_set: int, what: int) -> Tensor:
        """The loss or error after the last epoch, (seeds,)."""
        return self.history[:, -1, data_set, what]


def data_sets(seed: int, labels: Labels = in_disk) -> list[Data]:
    """Points for training, test and validation, in the unit square."""
    key = fn.key(seed)
    return [draw(fn.fold_in(key, name), POINTS, labels) for name in ("train", "test", "validation")]


def best_rate(results: dict[float, Runs], data_set: int, what: int) -> float:
    """The learning rate with the least mean; one that is too high may have ended in NaN."""
    means = {rate: runs.last(data_set, what).mean() for rate, runs in results.items()}
    return min(means, key=lambda rate: means[rate].nan_to_num(math.inf).item())


def repeat(name: str, recipe: Recipe, options: argparse.Namespace) -> Runs:
    """Train with each seed."""
    history, params = [], []
    for seed in tqdm(range(options.seeds), name, leave=False, unit="run"):
        sets = standardized(*data_sets(seed, recipe.labels))
        states = fit(
            recipe.model,
            recipe.objective,
            recipe.optimizer,
            sets[TRAIN],
            fn.key(seed),
            epochs=options.epochs,
            batch_size=recipe.batch_size,
        )
        for state in states:
            history.append(
                [measure(recipe.model, recipe.objective, state.params, data) for data in sets]
            )
        params.append(state.params)
    return Runs(torch.tensor(history).reshape(options.seeds, options.epochs, 3, 2), params)


def spread(values: Tensor, digits: int = 4) -> str:
    """Mean and standard deviation."""
    deviation = values.std(correction=min(1, len(values) - 1))
    return f"{values.mean():.{digits}f} ± {deviation:.{digits}f}"


def percent(errors: Tensor) -> str:
    """The accuracy that belongs to errors, in percent, as the reports print it."""
    return spread(100 * (1 - errors), 2)


def verdict(reached: bool) -> str:
    return "pass" if reached else "FAIL"


def print_table(header: list[str], rows: Iterable[list[str]]) -> None:
    lines = [header, *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(header))]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join(cells).rstrip())


def plot_band(axes: Axes, x: Sequence[float], values: Tensor, label: str, **style: Any) -> None:
    """The mean over the first dimension, and one standard deviation around it.

    The band stays within the values, so that it has an end on a logarithmic axis.
    """
    mean, deviation = values.mean(0), values.std(0, correction=min(1, len(values) - 1))
    low = torch.maximum(mean - deviation, values.amin(0))
    high = torch.minimum(mean + deviation, values.amax(0))
    (line,) = axes.plot(x, mean, label=label, **style)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def plot_losses(axes: Axes, runs: Runs, title: str) -> None:
    for data_set, label in ((TRAIN, "train"), (TEST, "test")):
        losses = runs.history[:, :, data_set, LOSS]
        plot_band(axes, range(1, losses.shape[1] + 1), losses, label)
    axes.set(title=title, xlabel="epoch", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def activations(options: argparse.Namespace) -> None:
    """Linear-Tanh-Linear-ReLU with targets of -1 and 1, by learning rate.

    A ReLU as the last layer can die: targets of -1 push both outputs below 0 before the hidden
    layer can tell the classes apart, and from there no gradient leads back. So the outputs start
    at 1/2 for every point, and the hidden layer starts with units that see the disk. The rate is
    chosen by validation accuracy.
    """
    rates = {"MSE": (0.001, 0.003, 0.01, 0.03, 0.1), "MAE": (0.01, 0.02, 0.05, 0.1, 0.2)}
    spread_out = fn.initializers.normal(std=3.0)
    model = fn.serial(
        fn.linear(25, weight_init=spread_out, bias_init=spread_out),
        fn.tanh(),
        fn.linear(2, weight_init=fn.initializers.zeros(), bias_init=fn.initializers.constant(0.5)),
        fn.relu(),
    )
    runs: dict[str, dict[float, Runs]] = {}
    rows = []
    for name, loss in (("MSE", fn.mse()), ("MAE", fn.mae())):
        objective = Objective(loss, 2, lambda labels: 2 * one_hot(labels) - 1, margin_score)
        runs[name] = {
            rate: repeat(f"{name} {rate}", Recipe(model, objective, fn.sgd(rate), 10), options)
            for rate in rates[name]
        }
        best = best_rate(runs[name], VALIDATION, ERROR)
        for rate, result in runs[name].items():
            chosen = rate == best
            errors = result.last(TEST, ERROR)
            rows.append(
                [
                    name,
                    f"{rate:g}",
                    percent(result.last(VALIDATION, ERROR)),
                    percent(errors),
                    "96" if chosen else "",
                    verdict(errors.mean().item() <= 0.04) if chosen else "",
                ]
            )
    print_table(
        ["loss", "rate", "validation accuracy %", "test accuracy %", "report", "best rate"], rows
    )

    figure, (predicted, by_epoch, by_rate) = plt.subplots(
        1, 3, figsize=(13, 4.2), layout="constrained"
    )
    train, test, _ = data_sets(0)
    params = runs["MSE"][best_rate(runs["MSE"], VALIDATION, ERROR)].params[0]
    unit_square(predicted, "Test points, output and mistakes (MSE)")
    draw_points(predicted, test)
    draw_output(predicted, model, objective, params, train, test)
    for rate, result in runs["MSE"].items():
        accuracy = 1 - result.history[:, :, VALIDATION, ERROR]
        plot_band(by_epoch, range(1, options.epochs + 1), accuracy, f"{rate:g}")
    by_epoch.set(title="Validation accuracy by epoch (MSE)", xlabel="epoch", ylim=(0.4, 1.01))
    by_epoch.legend(title="learning rate", loc="center right", bbox_to_anchor=(1, 0.41))
    for name, results in runs.items():
        accuracy = 1 - torch.stack([r.last(VALIDATION, ERROR) for r in results.values()], 1)
        plot_band(by_rate, list(results), accuracy, name, marker="o")
    by_rate.axhline(0.96, color="gray", linestyle="--", label="report")
    by_rate.set(title="Validation accuracy by learning rate", xlabel="learning rate")
    by_rate.set(xscale="log", ylim=(0.4, 1.01))
    by_rate.legend(frameon=False, loc="lower left")
    for axes in (by_epoch, by_rate):
        axes.grid(alpha=0.3)
    save(figure, options.output / "activations.png")


REGRESSION = Objective(fn.mse(), 1, column, first_output)


class Both(NamedTuple):
    """A net of funcnet and its twin of torch.nn, by epoch."""

    difference: list[float]
    """The greatest distance of a parameter from PyTorch's."""
    ours: list[float]
    theirs: list[float]
    """Test losses."""


def our_net(activation: fn.Layer) -> fn.Layer:
    return fn.serial(
        fn.linear(25),
        activation,
        fn.linear(25),
        fn.tanh(),
        fn.linear(25),
        fn.tanh(),
        fn.linear(1),
    )


def their_net(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2, 25),
        activation,
        nn.Linear(25, 25),
        nn.Tanh(),
        nn.Linear(25, 25),
        nn.Tanh(),
        nn.Linear(25, 1),
    )


def train_both(model: fn.Layer, module: nn.Module, seed: int, rate: float, epochs: int) -> Both:
    """Train a net of funcnet and one of torch.nn alike: parameters, batches, gradient descent."""
    train, test, _ = standardized(*data_sets(seed))
    # PyTorch's optimizer writes into its parameters, so funcnet starts from a copy.
    start = {path: value.clone() for path, value in module.state_dict().items()}
    params = fn.tree.from_dotted(start)

    optimizer = fn.sgd(rate)
    step = fn.train_step(model, REGRESSION.loss, optimizer)
    state = fn.TrainState(
        params, {}, optimizer.init_state(params), fn.key(seed), torch.zeros((), dtype=torch.int64)
    )
    their_optimizer = torch.optim.SGD(module.parameters(), rate)
    their_loss = nn.MSELoss()

    result = Both([], [], [])
    x, target = train.points, column(train.labels)
    for epoch in range(epochs):
        for batch in shuffled(fn.fold_in(fn.key(seed), epoch), x, target, 4):
            state, _ = step(state, batch)
            their_optimizer.zero_grad()
            their_loss(module(batch[0]), batch[1]).backward()
            their_optimizer.step()
        theirs = module.state_dict()
        ours = fn.tree.to_dotted(state.params)
        distances = [(ours[path] - theirs[path]).abs().max().item() for path in theirs]
        result.difference.append(max(distances))
        result.ours.append(measure(model, REGRESSION, state.params, test).loss)
        with torch.no_grad():
            result.theirs.append(their_loss(module(test.points), column(test.labels)).item())
    return result


def pytorch(options: argparse.Namespace) -> None:
    """The same net, parameters and batches in funcnet and PyTorch; then a better learning rate.

    The net is 2-25-25-25-1 with ReLU or LeakyReLU after the first layer and Tanh after the next
    two, a regression of the labels 0 and 1 in batches of 4.
    """
    nets = {"ReLU": (fn.relu(), nn.ReLU()), "LeakyReLU": (fn.leaky_relu(), nn.LeakyReLU())}
    reported = {"ReLU": "0.2505", "LeakyReLU": "3.3261"}
    figure, (alike, better) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    epochs = range(1, options.epochs + 1)

    print("Gradient descent at 1e-4, test loss after the last epoch")
    rows = []
    for name, (ours, theirs) in nets.items():
        both = []
        for seed in tqdm(range(options.seeds), name, leave=False, unit="run"):
            torch.manual_seed(seed)  # of PyTorch's first parameters
            both.append(train_both(our_net(ours), their_net(theirs), seed, 1e-4, options.epochs))
        difference = max(max(result.difference) for result in both)
        our_losses = torch.tensor([result.ours for result in both])
        their_losses = torch.tensor([result.theirs for result in both])
        rows.append(
            [
                name,
                spread(our_losses[:, -1]),
                spread(their_losses[:, -1]),
                reported[name],
                f"{difference:.1e}",
                verdict(difference <= 1e-5),
            ]
        )
        plot_band(alike, epochs, our_losses, f"funcnet, {name}")
        alike.plot(epochs, their_losses.mean(0), "k:", label="PyTorch" if name == "ReLU" else None)
    alike.set(title="Test loss, gradient descent at 1e-4", xlabel="epoch", ylabel="MSE")
    header = ["net", "funcnet", "PyTorch here", "report's framework"]
    print_table([*header, "max |difference| of parameters, any epoch", "<= 1e-5"], rows)

    print("\nWith a rate that falls from 0.2, after the last epoch; the report's best is PyTorch's")
    rate = linear_decay(0.2, steps_in(POINTS, 4, options.epochs))
    rows = []
    for name, (activation, _) in nets.items():
        runs = repeat(name, Recipe(our_net(activation), REGRESSION, fn.sgd(rate), 4), options)
        loss = runs.last(TEST, LOSS)
        reached = verdict(loss.mean().item() <= 0.0165)
        rows += [
            [name, spread(runs.last(TRAIN, LOSS)), spread(loss), reached],
            ["  report", "0.01765", "0.01646", ""],
        ]
        plot_band(better, epochs, runs.history[:, :, TEST, LOSS], f"funcnet, {name}")
    print_table(["net", "train loss", "test loss", "<= 0.0165"], rows)
    better.axhline(0.0165, color="gray", linestyle="--", label="report's best")
    better.set(title="Test loss, rate falling from 0.2", xlabel="epoch", yscale="log")
    for axes in (alike, better):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    save(figure, options.output / "pytorch.png")


def weight_sharing_net() -> fn.Layer:
    """The third report's net, whose first two layers are one function of either coordinate.

    The report slices its input and concatenates what a layer makes of the slices. Here too: the
    two coordinates go through the same 1-25-25 net, and the last hidden layer sees both results.
    """
    coordinate = fn.serial(fn.linear(25), fn.tanh(), fn.linear(25), fn.relu())
    return fn.serial(
        fn.split(1),
        fn.shared(coordinate),
        fn.concat(),
        fn.linear(25),
        fn.relu(),
        fn.linear(1),
        fn.sigmoid(),
    )


def losses(options: argparse.Namespace) -> None:
    """Table I of the third report: MSE and BCE, SGD and Adam, and weight sharing."""
    net = fn.serial(
        fn.linear(25),
        fn.tanh(),
        fn.linear(25),
        fn.relu(),
        fn.linear(25),
        fn.relu(),
        fn.linear(1),
        fn.sigmoid(),
    )
    mse = Objective(fn.mse("half_mean"), 1, column, first_output)
    bce = Objective(fn.bce(), 1, column, first_output)
    batch_size = 20

    def falling(peak: float) -> Callable[[Tensor], Tensor]:
        return linear_decay(peak, steps_in(POINTS, batch_size, options.epochs))

    sgd, adam = fn.sgd, fn.adam
    settings = {
        "MSE_SGD": (net, mse, sgd(falling(0.5), weight_decay=1e-4), "falls from 0.5"),
        "BCE_SGD": (net, bce, sgd(falling(0.3), weight_decay=1e-4), "falls from 0.3"),
        "MSE_Adam": (net, mse, adam(falling(0.003)), "falls from 0.003"),
        "BCE_Adam": (net, bce, adam(falling(0.003)), "falls from 0.003"),
        "WS_MSE_SGD": (weight_sharing_net(), mse, sgd(falling(0.5)), "falls from 0.5"),
        "WS_MSE_Adam": (weight_sharing_net(), mse, adam(falling(0.003)), "falls from 0.003"),
    }
    reported = {
        "MSE_SGD": ("0.0317 ± 0.0137", "0.0352 ± 0.0114", "0.5"),
        "BCE_SGD": ("0.0642 ± 0.0177", "0.0856 ± 0.0188", "0.3"),
        "MSE_Adam": ("0.0072 ± 0.0021", "0.0157 ± 0.0056", "-"),
        "BCE_Adam": ("0.0095 ± 0.0100", "0.0167 ± 0.0100", "-"),
        "WS_MSE_SGD": ("0.1141 ± 0.0921", "0.1172 ± 0.0812", "0.5"),
        "WS_MSE_Adam": ("0.0062 ± 0.0036", "0.0099 ± 0.0028", "-"),
    }
    rows, runs = [], {}
    for name, (model, objective, optimizer, rate) in settings.items():
        runs[name] = repeat(name, Recipe(model, objective, optimizer, batch_size), options)
        errors = runs[name].last(TEST, ERROR)
        reached = errors.mean().item() <= float(reported[name][1].split()[0])
        train_error = spread(runs[name].last(TRAIN, ERROR))
        rows += [
            [name, train_error, spread(errors), rate, verdict(reached)],
            ["  report", *reported[name], ""],
        ]
    print_table(["", "train error", "test error", "learning rate", "test"], rows)

    figure, (curves, output) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    plot_losses(curves, runs["MSE_SGD"], "MSE_SGD")
    train, test, _ = data_sets(0)
    unit_square(output, "Output of MSE_SGD and wrong test points")
    image = draw_output(output, net, mse, runs["MSE_SGD"].params[0], train, test)
    figure.colorbar(image, ax=output, ticks=(0, 0.5, 1))
    save(figure, options.output / "losses.png")


RATES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)

# By batch size and activation: train and test loss, train and test accuracy in percent. The best
# rate of each of these rows is 0.001.
BATCH_SIZES = {
    (100, "ReLU"): ("0.1815 ± 0.0311", "0.1812 ± 0.0309", "90.48 ± 3.67", "90.48 ± 3.62"),
    (100, "Tanh"): ("0.2748 ± 0.0628", "0.2736 ± 0.0595", "81.74 ± 2.91", "81.74 ± 4.00"),
    (200, "ReLU"): ("0.3600 ± 0.0305", "0.3598 ± 0.0363", "72.76 ± 4.06", "72.76 ± 5.87"),
    (200, "Tanh"): ("0.3866 ± 0.0308", "0.3865 ± 0.0286", "75.93 ± 6.36", "75.93 ± 6.45"),
}
COLORS = {100: "tab:blue", 200: "tab:orange"}


def batch_sizes(options: argparse.Namespace) -> None:
    """Rows of Table I of the fourth report: large batches, at the best of its learning rates.

    The loss of a step is summed over the batch and over both outputs. What is printed is the
    loss of an example: the sum over the outputs alone.
    """
    objective = Objective(fn.mse("sum"), 2, one_hot, margin_score)
    layers = {"ReLU": fn.relu(), "Tanh": fn.tanh()}
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    axes = dict(zip(layers, panels, strict=True))
    rows = []
    for (batch_size, name), reported in BATCH_SIZES.items():
        model = mlp(layers[name], objective.outputs)
        results = {}
        for tried in RATES:
            recipe = Recipe(model, objective, fn.sgd(tried), batch_size, out_of_annulus)
            results[tried] = repeat(f"{batch_size} {name} {tried:g}", recipe, options)
            results[tried].history[..., LOSS] /= POINTS
        rate = best_rate(results, TEST, LOSS)
        runs = results[rate]
        reached = 100 * (1 - runs.last(TEST, ERROR).mean().item()) >= float(reported[3].split()[0])
        rows += [
            [
                str(batch_size),
                name,
                f"{rate:g}",
                spread(runs.last(TRAIN, LOSS)),
                spread(runs.last(TEST, LOSS)),
                percent(runs.last(TRAIN, ERROR)),
                percent(runs.last(TEST, ERROR)),
                verdict(reached),
            ],
            ["", "  report", "0.001", *reported, ""],
        ]
        epochs = range(1, options.epochs + 1)
        color = COLORS[batch_size]
        train, test = (runs.history[:, :, data_set, LOSS] for data_set in (TRAIN, TEST))
        axes[name].plot(epochs, train.mean(0), ":", color=color, label=f"train, batch {batch_size}")
        plot_band(axes[name], epochs, test, f"test, batch {batch_size}", color=color)
    header = ["batch", "", "rate", "train loss", "test loss", "train accuracy %"]
    print_table([*header, "test accuracy %", ""], rows)
    for name, panel in axes.items():
        panel.set(title=name, xlabel="epoch", yscale="log")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    axes["ReLU"].set_ylabel("loss")
    save(figure, options.output / "batch_sizes.png")


class Table(NamedTuple):
    make: Callable[[argparse.Namespace], None]
    epochs: int


TABLES = {
    "activations": Table(activations, 300),
    "pytorch": Table(pytorch, 100),
    "losses": Table(losses, 250),
    "batch-sizes": Table(batch_sizes, 500),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Reproduce a table of the four reports.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    epochs = ", ".join(f"{name} {table.epochs}" for name, table in TABLES.items())
    add = parser.add_argument
    add("--table", choices=TABLES, required=True, default=argparse.SUPPRESS, help="which one")
    add("--seeds", type=int, default=10, metavar="N", help="runs of each setting, seeds 0 to N-1")
    add("--epochs", type=int, default=argparse.SUPPRESS, help=f"of a run (default: {epochs})")
    add("--output", type=Path, default=Path(), metavar="DIRECTORY", help="where the figure goes")
    options = parser.parse_args()
    options.epochs = getattr(options, "epochs", TABLES[options.table].epochs)
    require_positive(parser, options, "seeds", "epochs")
    return options


def main() -> None:
    options = parse()
    one_thread()
    start = time.perf_counter()
    TABLES[options.table].make(options)
    print(f"{options.seeds} seeds, {options.epochs} epochs: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
