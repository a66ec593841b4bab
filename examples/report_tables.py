"""Reproduce what four reports measured on the disk, with mean and deviation over ten seeds.

    python examples/report_tables.py
    python examples/report_tables.py --table losses

Tables are printed in which a line of funcnet is above the report's line, with the targets that it
reaches ("pass") or misses ("FAIL"), and each has a figure in the output directory. Every run draws
its own data, first parameters and batches from its seed; the runs of a setting are one compiled
population (see `reports.py`). Without ``--table`` as many tables are made at once as there are
cores. Rates that "fall" do so linearly from the printed one to 0.
"""

import argparse
import io
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import disk
import matplotlib.pyplot as plt
import reports
import torch
from disk import Objective
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from reports import POINTS, RATES, TEST, TRAIN, VALIDATION, Recipe, percent, spread, verdict
from torch import Tensor, nn
from torch.func import functional_call

import funcnet as fn


def draw_net(axes: Axes, recipe: Recipe, params: fn.Params, title: str) -> AxesImage:
    """The output of a net of seed 0 over the unit square, and the test points it gets wrong."""
    train, test, _ = reports.data_sets(fn.key(0), recipe.labels)
    disk.unit_square(axes, title)
    return disk.draw_output(axes, recipe.model, recipe.objective, params, train, test)


def activations(options: argparse.Namespace) -> None:
    """Linear-Tanh-Linear-ReLU with targets of -1 and 1, by learning rate.

    A ReLU as the last layer can die: targets of -1 push both outputs below 0 before the hidden
    layer can tell the classes apart, and from there no gradient leads back. So the outputs start
    at 1/2 for every point, and the hidden layer starts with units that see the disk. The rate is
    chosen by validation accuracy.
    """
    rates = {"MSE": (0.001, 0.003, 0.01, 0.03, 0.1), "MAE": (0.01, 0.02, 0.05, 0.1, 0.2)}
    wide, zeros = fn.initializers.normal(std=3.0), fn.initializers.zeros()
    hidden = fn.linear(25, weight_init=wide, bias_init=wide)
    last = fn.linear(2, weight_init=zeros, bias_init=fn.initializers.constant(0.5))
    model = fn.serial(hidden, fn.tanh(), last, fn.relu())
    figure, (net, by_epoch, by_rate) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    rows = []
    for name, loss in (("MSE", fn.mse()), ("MAE", fn.mae())):
        signs = Objective(loss, 2, lambda labels: 2 * disk.one_hot(labels) - 1, disk.margin_score)
        recipe = Recipe(model, signs, fn.sgd, 10)
        runs = reports.train(recipe, rates[name], options.seeds, options.epochs)
        validation, test = runs.history.error[VALIDATION], runs.history.error[TEST, ..., -1]
        chosen = reports.best(validation[..., -1])
        for index, rate in enumerate(rates[name]):
            row = [name, f"{rate:g}", percent(validation[index, :, -1]), percent(test[index])]
            reached = verdict(test[index].mean().item() <= 0.04)
            rows.append([*row, *(("96", reached) if index == chosen else ("", ""))])
        accuracy = 1 - validation
        reports.plot_band(by_rate, rates[name], accuracy[..., -1].T, name, marker="o")
        if name == "MSE":
            title = "Test points, output and mistakes (MSE)"
            draw_net(net, recipe, runs.first_seed(chosen), title)
            disk.draw_points(net, reports.data_sets(fn.key(0))[TEST])
            lines = {f"{rate:g}": by for rate, by in zip(rates[name], accuracy, strict=True)}
            title = "Validation accuracy by epoch and rate (MSE)"
            reports.plot_epochs(by_epoch, lines, yscale="linear", title=title, ylim=(0.4, 1.01))
    header = ["loss", "rate", "validation accuracy %", "test accuracy %", "report", "best rate"]
    reports.print_table(header, rows)
    by_rate.axhline(0.96, color="gray", linestyle="--", label="report")
    by_rate.set(title="Validation accuracy by learning rate", xlabel="learning rate")
    by_rate.set(xscale="log", ylim=(0.4, 1.01))
    by_rate.grid(alpha=0.3)
    by_rate.legend(frameon=False, loc="lower left")
    disk.save(figure, options.output / "activations.png")


def train_pytorch(
    module: nn.Module, recipe: Recipe, rate: Tensor, options: argparse.Namespace
) -> tuple[fn.Params, Tensor]:
    """Train a torch.nn module from the parameters and on the batches of the recipe's runs.

    As in PyTorch's tutorial on ensembles, autograd and torch.optim train all seeds at once.

    Returns:
        Parameters after each epoch, (seeds, epochs, ...), and test losses, (seeds, epochs).
    """
    runs, states = reports.start_all(recipe, rate[None], reports.seed_keys(options.seeds))
    weights = fn.tree.to_dotted(fn.tree.map(lambda p: p.clone().requires_grad_(), states.params))
    optimizer = torch.optim.SGD(weights.values(), rate[0].item())
    losses = torch.vmap(
        lambda weights, x, y: nn.functional.mse_loss(functional_call(module, weights, (x,)), y)
    )
    test = runs.sets.points[:, TEST], runs.sets.labels[:, TEST, :, None].float()
    history, test_losses = [], []
    for epoch in range(options.epochs):
        shuffled = fn.vmap(lambda run, epoch=epoch: reports.batches(recipe, run, epoch))(runs)
        for batch in zip(*(part.unbind(1) for part in shuffled), strict=True):
            optimizer.zero_grad()
            losses(weights, *batch).sum().backward()
            optimizer.step()
        with torch.no_grad():
            history.append({path: weight.clone() for path, weight in weights.items()})
            test_losses.append(losses(weights, *test))
    params = fn.tree.map(lambda *leaves: torch.stack(leaves, 1), *history)
    return fn.tree.from_dotted(params), torch.stack(test_losses, 1)


def pytorch(options: argparse.Namespace) -> None:
    """The same net, parameters and batches in funcnet and PyTorch; then a better learning rate.

    The net is 2-25-25-25-1 with ReLU or LeakyReLU after the first layer and Tanh after the next
    two, a regression of the labels 0 and 1 in batches of 4.
    """
    nets = {"ReLU": (fn.relu(), nn.ReLU()), "LeakyReLU": (fn.leaky_relu(), nn.LeakyReLU())}
    reported = {"ReLU": "0.2505", "LeakyReLU": "3.3261"}
    regression = Objective(fn.mse(), 1, disk.column, disk.first_output)
    # Of the first and the last step, linear in between: one program for both rates.
    rates = torch.tensor([[1e-4, 1e-4], [0.2, 0.0]])
    steps = disk.steps_in(POINTS, 4, options.epochs)

    def sgd(rate):
        return fn.sgd(lambda step: rate[0] + (rate[1] - rate[0]) * (step / steps))

    rows, better_rows, curves, better_curves = [], [], {}, {}
    for name, (ours, theirs) in nets.items():
        tanh = fn.linear(25), fn.tanh()
        model = fn.serial(fn.linear(25), ours, *tanh, *tanh, fn.linear(1))
        module = nn.Sequential(
            nn.Linear(2, 25), theirs, nn.Linear(25, 25), nn.Tanh(), nn.Linear(25, 25), nn.Tanh(),
            nn.Linear(25, 1),
        )  # fmt: skip
        recipe = Recipe(model, regression, sgd, 4)
        history, our_params = reports.train(recipe, rates, options.seeds, options.epochs)
        their_params, their_losses = train_pytorch(module, recipe, rates[0], options)
        distances = fn.tree.map(lambda a, b: (a[0] - b).abs().max(), our_params, their_params)
        difference = max(fn.tree.leaves(distances)).item()
        alike, falling = history.loss[TEST]
        last = spread(alike[:, -1]), spread(their_losses[:, -1]), reported[name]
        rows.append([name, *last, f"{difference:.1e}", verdict(difference <= 1e-5)])
        better_row = [name, *map(spread, history.loss[:2, 1, :, -1])]
        better_row.append(verdict(falling[:, -1].mean().item() <= 0.0165))
        better_rows += [better_row, ["  report", "0.01765", "0.01646", ""]]
        curves |= {f"funcnet, {name}": alike, f"PyTorch, {name}": their_losses}
        better_curves[f"funcnet, {name}"] = falling
    print("Gradient descent at 1e-4, test loss after the last epoch")
    header = ["net", "funcnet", "PyTorch here", "report's framework"]
    reports.print_table([*header, "max |difference| of parameters, any epoch", "<= 1e-5"], rows)
    print("\nWith a rate that falls from 0.2, after the last epoch; the report's best is PyTorch's")
    reports.print_table(["net", "train loss", "test loss", "<= 0.0165"], better_rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    reports.plot_epochs(left, curves, title="Test loss, rate 1e-4", ylabel="MSE", yscale="linear")
    right.axhline(0.0165, color="gray", linestyle="--", label="report's best")
    reports.plot_epochs(right, better_curves, title="Test loss, rate falling from 0.2")
    disk.save(figure, options.output / "pytorch.png")


def losses(options: argparse.Namespace) -> None:
    """Table I of the third report: MSE and BCE, SGD and Adam, and weight sharing.

    The report's net with weight sharing (WS) slices its input and concatenates what a layer makes
    of the slices. Here too: the two coordinates go through the same 1-25-25 net, and the last
    hidden layer sees both results.
    """
    body = fn.linear(25), fn.tanh(), fn.linear(25), fn.relu()
    head = fn.linear(25), fn.relu(), fn.linear(1), fn.sigmoid()
    net = fn.serial(*body, *head)
    sharing = fn.serial(fn.split(1), fn.shared(fn.serial(*body)), fn.concat(), *head)
    mse = Objective(fn.mse("half_mean"), 1, disk.column, disk.first_output)
    bce = Objective(fn.bce(), 1, disk.column, disk.first_output)
    falling = partial(disk.linear_decay, steps=disk.steps_in(POINTS, 20, options.epochs))

    def sgd(rate, weight_decay=0.0):
        return fn.sgd(falling(rate), weight_decay=weight_decay)

    def adam(rate):
        return fn.adam(falling(rate))

    decay = partial(sgd, weight_decay=1e-4)
    settings = {
        "MSE_SGD": (net, mse, decay, 0.5, ("0.0317 ± 0.0137", "0.0352 ± 0.0114", "0.5")),
        "BCE_SGD": (net, bce, decay, 0.3, ("0.0642 ± 0.0177", "0.0856 ± 0.0188", "0.3")),
        "MSE_Adam": (net, mse, adam, 0.003, ("0.0072 ± 0.0021", "0.0157 ± 0.0056", "-")),
        "BCE_Adam": (net, bce, adam, 0.003, ("0.0095 ± 0.0100", "0.0167 ± 0.0100", "-")),
        "WS_MSE_SGD": (sharing, mse, sgd, 0.5, ("0.1141 ± 0.0921", "0.1172 ± 0.0812", "0.5")),
        "WS_MSE_Adam": (sharing, mse, adam, 0.003, ("0.0062 ± 0.0036", "0.0099 ± 0.0028", "-")),
    }
    rows = []
    figure, (curves, output) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for name, (model, objective, optimizer, rate, reported) in settings.items():
        recipe = Recipe(model, objective, optimizer, 20)
        runs = reports.train(recipe, [rate], options.seeds, options.epochs)
        errors = runs.history.error[:2, 0, :, -1]
        reached = verdict(errors[TEST].mean().item() <= float(reported[1].split()[0]))
        rows += [
            [name, *map(spread, errors), f"falls from {rate:g}", reached],
            ["  report", *reported, ""],
        ]
        if name == "MSE_SGD":
            lines = {"train": runs.history.loss[TRAIN, 0], "test": runs.history.loss[TEST, 0]}
            reports.plot_epochs(curves, lines, title=name, ylabel="loss")
            title = f"Output of {name} and wrong test points"
            image = draw_net(output, recipe, runs.first_seed(0), title)
            figure.colorbar(image, ax=output, ticks=(0, 0.5, 1))
    reports.print_table(["", "train error", "test error", "learning rate", "test"], rows)
    disk.save(figure, options.output / "losses.png")


def batch_sizes(options: argparse.Namespace) -> None:
    """Rows of Table I of the fourth report: large batches, at the best of its learning rates.

    The loss of a step is summed over the batch and over both outputs. What is printed is the
    loss of an example: the sum over the outputs alone. The rate is chosen by validation loss.
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    rows, lines = [], {"ReLU": {}, "Tanh": {}}
    for batch_size in (100, 200):
        for name, activation in (("ReLU", fn.relu()), ("Tanh", fn.tanh())):
            model = disk.mlp(activation, 2)
            recipe = Recipe(model, reports.SUMMED, fn.sgd, batch_size, disk.out_of_annulus)
            history = reports.train(recipe, RATES, options.seeds, options.epochs).history
            chosen = reports.best(history.loss[VALIDATION, ..., -1])
            loss, error = history.loss[:2, chosen] / POINTS, history.error[:2, chosen]
            rate, *reported = reports.REPORTED[batch_size, name]
            accuracy = 100 * (1 - error[TEST, :, -1].mean().item())
            cells = [*map(spread, loss[..., -1]), *map(percent, error[..., -1])]
            cells.append(verdict(accuracy >= float(reported[3].split()[0])))
            rows += [
                [str(batch_size), name, f"{RATES[chosen]:g}", *cells],
                ["", "  report", rate, *reported, ""],
            ]
            lines[name] |= {
                f"train, batch {batch_size}": loss[TRAIN], f"test, batch {batch_size}": loss[TEST]
            }  # fmt: skip
    header = ["batch", "", "rate", "train loss", "test loss", "train accuracy %"]
    reports.print_table([*header, "test accuracy %", ""], rows)
    for panel, name in zip(panels, lines, strict=True):
        reports.plot_epochs(panel, lines[name], title=name, ylabel="loss")
    disk.save(figure, options.output / "batch_sizes.png")


# Functions that make the tables, and their epochs; those that take the longest are first.
TABLES = {
    "batch-sizes": (batch_sizes, 500),
    "pytorch": (pytorch, 100),
    "losses": (losses, 250),
    "activations": (activations, 300),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Reproduce the tables of the four reports.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    defaults = ", ".join(f"{name} {epochs}" for name, (_, epochs) in TABLES.items())
    add = parser.add_argument
    add("--table", choices=TABLES, default=argparse.SUPPRESS, help="which one (default: all)")
    add("--seeds", type=int, default=10, metavar="N", help="runs of each setting, seeds 0 to N-1")
    add("--epochs", type=int, default=argparse.SUPPRESS, help=f"of a run (default: {defaults})")
    add("--output", type=Path, default=Path(), metavar="DIRECTORY", help="where the figures go")
    options = parser.parse_args()
    disk.require_positive(parser, options, *({"seeds", "epochs"} & vars(options).keys()))
    return options


def make(name: str, options: argparse.Namespace, threads: int) -> str:
    """What a table prints, made in a process of its own."""
    torch.set_num_threads(threads)
    start, (table, epochs) = time.perf_counter(), TABLES[name]
    options = argparse.Namespace(**{"epochs": epochs, **vars(options)})
    with redirect_stdout(io.StringIO()) as printed:
        table(options)
    seconds = time.perf_counter() - start
    return f"{printed.getvalue()}{options.seeds} seeds, {options.epochs} epochs: {seconds:.0f} s\n"


def main() -> None:
    options, start = parse(), time.perf_counter()
    names = [options.table] if "table" in options else list(TABLES)
    cores = os.cpu_count() or 1
    workers = min(len(names), cores)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for text in pool.map(partial(make, options=options, threads=cores // workers), names):
            print(text, flush=True)
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
