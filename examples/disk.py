"""What the other example programs share: the disk data, shuffled epochs, measurements, drawing.

Everything random, the points, the order of the batches and the first parameters, is a function of
a key.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Circle
from torch import Tensor

import funcnet as fn

RADIUS = 1 / math.sqrt(2 * math.pi)
"""Of the disk: half of the unit square lies inside."""

Labels = Callable[[Tensor], Tensor]
Rate = Callable[[Tensor], Tensor]
Batch = tuple[Tensor, Tensor]


class Data(NamedTuple):
    """Points of the unit square, (n, 2), and their labels 0 and 1, int64 (n,)."""

    points: Tensor
    labels: Tensor


class Objective(NamedTuple):
    """How two classes are learned: what the net is compared with, and how its output is read."""

    loss: fn.Loss
    outputs: int
    target: Labels
    """From labels to what the loss compares the output with."""
    score: Labels
    """From outputs to numbers of [0, 1]; above 1/2 the class is 1."""


def in_disk(points: Tensor) -> Tensor:
    """Label 1 inside the disk of radius ``RADIUS`` around the middle of the unit square."""
    return ((points - 0.5).square().sum(-1) <= RADIUS**2).long()


def out_of_annulus(points: Tensor) -> Tensor:
    """Label 0 where ``RADIUS < |point| < 1``, as in the fourth report, else 1."""
    radius = points.square().sum(-1).sqrt()
    return ((radius <= RADIUS) | (radius >= 1)).long()


def draw(key: Tensor, n: int, label: Labels = in_disk) -> Data:
    """``n`` uniform points of the unit square with their labels."""
    points = fn.random.uniform(key, (n, 2))
    return Data(points, label(points))


def z_score(points: Tensor) -> Labels:
    """The map that gives these points mean 0 and standard deviation 1."""
    mean, std = points.mean(0), points.std(0)
    return lambda x: (x - mean) / std


def standardized(train: Data, *others: Data) -> list[Data]:
    """All data z-scored by the mean and standard deviation of the training points."""
    scale = z_score(train.points)
    return [Data(scale(data.points), data.labels) for data in (train, *others)]


def one_hot(labels: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(labels, 2).float()


def column(labels: Tensor) -> Tensor:
    return labels[:, None].float()


def margin_score(outputs: Tensor) -> Tensor:
    """1/2 where both outputs are equal; the greater one is the class."""
    return (0.5 + (outputs[:, 1] - outputs[:, 0]) / 2).clamp(0, 1)


def first_output(outputs: Tensor) -> Tensor:
    return outputs[:, 0].clamp(0, 1)


def mlp(activation: fn.Layer, outputs: int) -> fn.Layer:
    """The net of the reports: 2-25-25-25-outputs."""
    hidden = [layer for _ in range(3) for layer in (fn.linear(25), activation)]
    return fn.serial(*hidden, fn.linear(outputs))


def linear_decay(peak: float | Tensor, steps: int) -> Rate:
    """A learning rate that falls from ``peak`` to 0 in a straight line."""
    return lambda step: peak * (1 - step / steps)


def one_thread() -> None:
    """Compute on one core: 25 units are too few to share, and waiting for a busy core is slow."""
    torch.set_num_threads(1)


def require_positive(
    parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str
) -> None:
    """End the program with an error unless these options are at least 1."""
    for name in names:
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")


def steps_in(n: int, batch_size: int, epochs: int) -> int:
    """The number of steps that ``epochs`` epochs of n examples take."""
    return epochs * math.ceil(n / batch_size)


def shuffled(key: Tensor, x: Tensor, target: Tensor, batch_size: int) -> Iterator[Batch]:
    """The batches of one epoch, in an order that depends on the key alone."""
    order = fn.random.permutation(key, len(x))
    return zip(x[order].split(batch_size), target[order].split(batch_size), strict=True)


class Measured(NamedTuple):
    loss: Tensor
    error: Tensor
    """The share of wrong classes."""


def measure(model: fn.Layer, objective: Objective, params: fn.Params, data: Data) -> Measured:
    outputs, _ = model.apply(params, data.points)
    loss = objective.loss.apply(outputs, objective.target(data.labels))
    return Measured(loss, mistakes(objective, outputs, data).float().mean())


def mistakes(objective: Objective, outputs: Tensor, data: Data) -> Tensor:
    """Where the class of the output is not the label."""
    return (objective.score(outputs) > 0.5) != data.labels.bool()


COLORS = "RdYlBu_r"
"""Blue is 0, yellow 1/2, red 1."""


def unit_square(axes: Axes, title: str) -> None:
    """An empty unit square with the true boundary of the disk."""
    axes.add_patch(Circle((0.5, 0.5), RADIUS, fill=False, linewidth=1.5, zorder=3))
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title=title, xlabel="$x_1$", ylabel="$x_2$")
    axes.set(xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))


def draw_points(axes: Axes, data: Data) -> PathCollection:
    """The points in the colours of their labels."""
    return axes.scatter(
        data.points[:, 0],
        data.points[:, 1],
        c=data.labels,
        s=10,
        cmap=COLORS,
        edgecolors="white",
        linewidths=0.2,
    )


def draw_output(
    axes: Axes, model: fn.Layer, objective: Objective, params: fn.Params, train: Data, test: Data
) -> AxesImage:
    """The score over the unit square, and the test points whose class is wrong as crosses.

    Points are those of the unit square; the net sees them z-scored by the training points.
    """
    scale = z_score(train.points)
    ticks = (torch.arange(200) + 0.5) / 200
    grid = torch.cartesian_prod(ticks, ticks)
    score = objective.score(model.apply(params, scale(grid))[0]).reshape(200, 200)
    image = axes.imshow(
        score.T.numpy(), origin="lower", extent=(0, 1, 0, 1), cmap=COLORS, vmin=0, vmax=1, alpha=0.8
    )
    outputs, _ = model.apply(params, scale(test.points))
    wrong = test.points[mistakes(objective, outputs, test)]
    axes.scatter(
        wrong[:, 0],
        wrong[:, 1],
        marker="x",
        c="black",
        s=36,
        linewidths=1.5,
        zorder=4,
        clip_on=False,
    )
    return image


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"wrote {path}")
