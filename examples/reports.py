"""What the programs of the reports share: populations of small nets, and tables of their results.

A population is the runs of one `Recipe` for several learning rates and seeds. All of them train in
one call: `fn.vmap` over the runs of `fn.scan` over the epochs of `fn.scan` over the batches, which
`fn.jit` compiles to one program that divides the runs among the cores.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from disk import (
    Data,
    Labels,
    Measured,
    Objective,
    draw,
    in_disk,
    margin_score,
    measure,
    one_hot,
    standardized,
)
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

import funcnet as fn

POINTS = 1000
"""In each data set."""
TRAIN, TEST, VALIDATION = 0, 1, 2
"""Indices of the data sets."""

# Of the fourth report: how a net is scored, and the learning rates.
SUMMED = Objective(fn.mse("sum"), 2, one_hot, margin_score)
RATES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
# Its Table I, by batch size and activation: the best rate, train and test loss, train and test
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


class Recipe(NamedTuple):
    """One way to train, except for the learning rate: what a program is compiled from."""

    model: fn.Layer
    objective: Objective
    optimizer: Callable[[Tensor], fn.Optimizer]
    """From the learning rate of the run."""
    batch_size: int
    labels: Labels = in_disk


class Run(NamedTuple):
    """What differs from run to run and does not change during training."""

    key: Tensor
    rate: Tensor
    sets: Data
    """The training, test and validation points, standardized, (3, POINTS, 2)."""


def data_sets(key: Tensor, labels: Labels = in_disk) -> list[Data]:
    """Points for training, test and validation, in the unit square."""
    return [draw(fn.fold_in(key, name), POINTS, labels) for name in ("train", "test", "validation")]


def start(recipe: Recipe, key: Tensor, rate: Tensor) -> tuple[Run, fn.TrainState]:
    """A run before its first step: everything but the rate is a function of the key."""
    sets = standardized(*data_sets(key, recipe.labels))
    optimizer, model_key = recipe.optimizer(rate), fn.fold_in(key, "model")
    state = fn.init_train_state(recipe.model, optimizer, model_key, sets[TRAIN].points)
    return Run(key, rate, fn.tree.map(lambda *leaves: torch.stack(leaves), *sets)), state


def seed_keys(seeds: int) -> Tensor:
    return torch.stack([fn.key(seed) for seed in range(seeds)])


def start_all(recipe: Recipe, rates: Tensor, keys: Tensor) -> tuple[Run, fn.TrainState]:
    """The runs of each rate with each key, stacked: the first rate's, then the second's, ..."""
    return fn.vmap(lambda key, rate: start(recipe, key, rate))(
        keys.repeat(len(rates), 1), rates.repeat_interleave(len(keys), 0)
    )


def batches(recipe: Recipe, run: Run, epoch: Tensor | int) -> tuple[Tensor, Tensor]:
    """The training points in an order that depends on the run's key, and targets: one epoch's."""
    examples = run.sets.points[TRAIN], recipe.objective.target(run.sets.labels[TRAIN])
    key = fn.fold_in(fn.fold_in(run.key, "shuffle"), epoch)
    return fn.epoch_batches(key, examples, recipe.batch_size)


def train_epoch(recipe: Recipe, run: Run, state: fn.TrainState, epoch: Tensor) -> fn.TrainState:
    """One pass over the training points."""
    step = fn.train_step(recipe.model, recipe.objective.loss, recipe.optimizer(run.rate))
    return fn.scan(
        lambda state, batch: (step(state, batch)[0], None), state, batches(recipe, run, epoch)
    )[0]


def measure_all(recipe: Recipe, run: Run, params: fn.Params) -> Measured:
    """Loss and error of each data set, (3,)."""
    return fn.vmap(lambda data: measure(recipe.model, recipe.objective, params, data))(run.sets)


class Runs(NamedTuple):
    """What training with several rates and seeds gave."""

    history: Measured
    """Loss and error by data set, rate, seed and epoch, (3, rates, seeds, epochs)."""
    params: fn.Params
    """After each epoch, (rates, seeds, epochs, ...)."""

    def first_seed(self, rate: int) -> fn.Params:
        """The parameters after the last epoch, by the index of the rate."""
        return fn.tree.map(lambda leaf: leaf[rate, 0, -1], self.params)


def train(recipe: Recipe, rates: Any, seeds: int, epochs: int) -> Runs:
    """Train with each rate and the seeds 0, 1, ..., in one call of one program."""

    def train_one(run, state):
        def epoch(state, number):
            state = train_epoch(recipe, run, state, number)
            return state, (measure_all(recipe, run, state.params), state.params)

        return fn.scan(epoch, state, torch.arange(epochs))[1]

    runs, states = start_all(recipe, torch.as_tensor(rates), seed_keys(seeds))
    trained = fn.jit(fn.vmap(train_one))(runs, states)
    history, params = fn.tree.map(lambda leaf: leaf.unflatten(0, (len(rates), -1)), trained)
    return Runs(fn.tree.map(lambda leaf: leaf.movedim(-1, 0), history), params)


def best(values: Tensor) -> int:
    """The index of the rate with the least mean of values (rates, seeds) that may be NaN."""
    return values.mean(1).nan_to_num(math.inf).argmin().item()


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
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
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


def plot_epochs(
    axes: Axes, lines: dict[str, Tensor], *, every: int = 1, yscale: str = "log", **labels: Any
) -> None:
    """Bands of values of shape (seeds, measurements), one each ``every`` epochs."""
    for label, values in lines.items():
        plot_band(axes, range(every, every * values.shape[1] + 1, every), values, label)
    axes.set(xlabel="epoch", yscale=yscale, **labels)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
