"""Train a 2-25-25-25 net to tell the points inside a disk from those outside.

    python examples/disk_classifier.py
    python examples/disk_classifier.py --activation tanh --optimizer sgd --loss mse
    python examples/disk_classifier.py --seeds 10

1000 training and 1000 test points are uniform in the unit square; half of the square lies inside
the disk. The program prints the loss and the error, which is the share of points on the wrong
side, of both sets, for each seed and, for more than one, their mean. Its figure shows the data,
the net's output with the test points that it gets wrong, and the losses by epoch.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from disk import (
    Data,
    Measured,
    Objective,
    Rate,
    column,
    draw,
    draw_output,
    draw_points,
    first_output,
    fit,
    linear_decay,
    margin_score,
    measure,
    mlp,
    one_hot,
    one_thread,
    require_positive,
    save,
    standardized,
    steps_in,
    unit_square,
)
from tqdm import tqdm

import funcnet as fn

POINTS = 1000

ACTIVATIONS: dict[str, Callable[[], fn.Layer]] = {
    "elu": fn.elu,
    "gelu": fn.gelu,
    "leaky_relu": fn.leaky_relu,
    "relu": fn.relu,
    "sigmoid": fn.sigmoid,
    "silu": fn.silu,
    "tanh": fn.tanh,
}

LOSSES: dict[str, Objective] = {
    "bce_with_logits": Objective(
        fn.bce_with_logits(), 1, column, lambda outputs: outputs[:, 0].sigmoid()
    ),
    "cross_entropy": Objective(
        fn.cross_entropy(), 2, lambda labels: labels, lambda outputs: outputs.softmax(-1)[:, 1]
    ),
    "mae": Objective(fn.mae(), 1, column, first_output),
    "mse": Objective(fn.mse(), 2, one_hot, margin_score),
}


class Method(NamedTuple):
    make: Callable[[Rate], fn.Optimizer]
    rate: float
    """The learning rate that it starts with, unless the user gives one."""


OPTIMIZERS: dict[str, Method] = {
    "adam": Method(fn.adam, 0.003),
    "adamw": Method(fn.adamw, 0.003),
    "rmsprop": Method(fn.rmsprop, 0.002),
    "sgd": Method(fn.sgd, 0.5),
    "sgd_momentum": Method(lambda rate: fn.sgd(rate, momentum=0.9), 0.1),
    "signsgd": Method(fn.signsgd, 0.0005),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a 2-25-25-25 net on the disk in the unit square.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    rates = ", ".join(f"{name} {method.rate}" for name, method in OPTIMIZERS.items())
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the data, the first parameters and the batches")
    add("--seeds", type=int, default=1, metavar="N", help="train with N seeds, from --seed on")
    add("--epochs", type=int, default=100, help="passes over the training points")
    add("--batch-size", type=int, default=20, help="points a step")
    add("--optimizer", choices=OPTIMIZERS, default="adam", help="the update rule")
    add(
        "--lr",
        type=float,
        default=argparse.SUPPRESS,
        help=f"learning rate of the first step, from which it falls to 0 (default: {rates})",
    )
    add("--activation", choices=ACTIVATIONS, default="gelu", help="after each hidden layer")
    add("--loss", choices=LOSSES, default="cross_entropy", help="what is minimized")
    add("--output", type=Path, default=Path("disk_classifier.png"), help="the figure's file")
    options = parser.parse_args(arguments)
    require_positive(parser, options, "seeds", "epochs", "batch_size")
    return options


class Run(NamedTuple):
    """What one seed gave."""

    train_points: Data
    test_points: Data
    model: fn.Layer
    params: fn.Params
    train: list[Measured]
    """Of the training points, by epoch."""
    test: list[Measured]


def train(options: argparse.Namespace, seed: int) -> Run:
    key = fn.key(seed)
    train_points = draw(fn.fold_in(key, "train"), POINTS)
    test_points = draw(fn.fold_in(key, "test"), POINTS)
    train_data, test_data = standardized(train_points, test_points)

    objective = LOSSES[options.loss]
    model = mlp(ACTIVATIONS[options.activation](), objective.outputs)
    method = OPTIMIZERS[options.optimizer]
    steps = steps_in(POINTS, options.batch_size, options.epochs)
    optimizer = method.make(linear_decay(getattr(options, "lr", method.rate), steps))

    states = fit(
        model,
        objective,
        optimizer,
        train_data,
        key,
        epochs=options.epochs,
        batch_size=options.batch_size,
    )
    losses: tuple[list[Measured], list[Measured]] = ([], [])
    with tqdm(states, f"seed {seed}", options.epochs, unit="epoch") as progress:
        for state in progress:
            for history, data in zip(losses, (train_data, test_data), strict=True):
                history.append(measure(model, objective, state.params, data))
            progress.set_postfix(test_error=f"{losses[1][-1].error:.1%}")
    return Run(train_points, test_points, model, state.params, *losses)


def draw_run(run: Run, options: argparse.Namespace, path: Path) -> None:
    figure, (data, output, curves) = plt.subplots(
        1, 3, figsize=(14, 4.2), layout="constrained", width_ratios=(1.06, 1.22, 1.3)
    )
    unit_square(data, f"{POINTS} training points and the disk")
    draw_points(data, run.train_points)

    unit_square(output, f"Output and wrong test points: {run.test[-1].error:.1%}")
    image = draw_output(
        output, run.model, LOSSES[options.loss], run.params, run.train_points, run.test_points
    )
    scale = output.inset_axes((1.04, 0, 0.05, 1))
    figure.colorbar(image, cax=scale, label="score of the disk", ticks=(0, 0.5, 1))

    epochs = range(1, options.epochs + 1)
    curves.plot(epochs, [measured.loss.item() for measured in run.train], label="train")
    curves.plot(epochs, [measured.loss.item() for measured in run.test], label="test")
    curves.set(title=f"Loss ({options.loss})", xlabel="epoch", yscale="log")
    curves.grid(alpha=0.3)
    curves.legend(frameon=False)
    save(figure, path)


def main() -> None:
    options = parse()
    one_thread()
    runs = []
    for seed in range(options.seed, options.seed + options.seeds):
        run = train(options, seed)
        runs.append(run)
        print(
            f"seed {seed}: train loss {run.train[-1].loss:.4f}, error {run.train[-1].error:.2%};"
            f" test loss {run.test[-1].loss:.4f}, error {run.test[-1].error:.2%}"
        )
    if len(runs) > 1:
        errors = [run.test[-1].error.item() for run in runs]
        print(
            f"mean test error of {len(runs)} seeds: {statistics.mean(errors):.2%}"
            f" (standard deviation {statistics.stdev(errors):.2%})"
        )
    draw_run(runs[0], options, options.output)


if __name__ == "__main__":
    main()
