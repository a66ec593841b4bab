"""Watch cotangents vanish: a deep tanh net and the same net with skip connections, observed.

    python examples/vanishing.py
    python examples/vanishing.py --output examples/figures/vanishing.png

Both nets have 40 blocks, a linear layer and a tanh, and learn whether a point is in a disk. The
second one adds to what a block gives what it got. `fn.observe(net)` in the place of ``net`` is all
that it takes to have, among the metrics of each step, the norms of each layer's output and of the
cotangent that comes back to it, and the fraction of both that is zero. Here they come out of one
compiled run.

In the plain net the cotangents shrink by a factor from block to block on their way back, so that
the first blocks learn nothing, and the net nothing at all. With skip connections each block gets
the cotangent of the last one, and more (He et al. 2016).

The program prints the loss, and the ratio of the norms of the cotangents at the first and the last
block; its figure shows the norms by block, at the first step and at the last.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from disk import draw, require_positive, save, z_score
from torch import Tensor

import funcnet as fn

EXAMPLES, WIDTH, RATE = 500, 25, 0.003


def deep_net(depth: int, residual: bool) -> fn.Layer:
    """``depth`` blocks between two linear layers; with skip connections, or without."""
    block = fn.serial(linear=fn.linear(WIDTH), tanh=fn.tanh())
    block = fn.residual(block) if residual else block
    return fn.serial(first=fn.linear(WIDTH), blocks=fn.repeat(block, depth), last=fn.linear(2))


class Run(NamedTuple):
    """A run's losses, (steps,), and norms by step and block, (steps, depth)."""

    loss: Tensor
    outputs: Tensor
    cotangents: Tensor


def train(key: Tensor, net: fn.Layer, steps: int) -> Run:
    """Train on points of a disk, and of what is observed give what belongs to the blocks."""
    data = draw(fn.fold_in(key, "data"), EXAMPLES)
    batch = z_score(data.points)(data.points), data.labels
    observed, optimizer = fn.observe(net), fn.sgd(RATE, 0.9)
    step = fn.train_step(observed, fn.cross_entropy(), optimizer)
    state = fn.init_train_state(observed, optimizer, fn.fold_in(key, "model"), batch[0])
    _, metrics = fn.scan(lambda state, _: step(state, batch), state, length=steps)
    figures = [metrics[f"blocks.tanh.{name}"] for name in ("y_norm", "dy_norm")]
    return Run(metrics["loss"], *figures)


def decay(run: Run) -> Tensor:
    """The norm of the cotangent at the first block, by that at the last, of each step."""
    return run.cotangents[:, 0] / run.cotangents[:, -1]


def draw_norms(runs: dict[str, Run], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for color, (name, run) in zip(("tab:red", "tab:blue"), runs.items(), strict=True):
        for place, style, when in ((0, "--", "first"), (-1, "-", "last")):
            label = f"{name}, {when} step"
            blocks = range(1, run.outputs.shape[1] + 1)
            axes[0].plot(blocks, run.outputs[place], style, color=color, label=label)
            axes[1].semilogy(blocks, run.cotangents[place], style, color=color, label=label)
        axes[2].plot(run.loss, color=color, label=name)
    axes[0].set(title="norm of the output", xlabel="block", ylabel="norm of tanh's y")
    axes[1].set(title="norm of the cotangent", xlabel="block", ylabel="norm of tanh's dy")
    axes[2].set(title="loss", xlabel="step", ylabel="cross-entropy")
    for each in (axes[0], axes[2]):
        each.set_ylim(bottom=0)
    axes[1].legend(frameon=False)
    axes[2].legend(frameon=False)
    save(figure, path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Watch the cotangents of a deep net vanish, and of a residual one stay.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the data and the first parameters")
    add("--depth", type=int, default=40, help="the number of blocks")
    add("--steps", type=int, default=300, help=f"of gradient descent on {EXAMPLES} points")
    add("--output", type=Path, default=Path("vanishing.png"), help="the figure's file")
    options = parser.parse_args()
    require_positive(parser, options, "depth", "steps")
    return options


def main() -> None:
    options = parse()
    key, run = fn.key(options.seed), fn.jit(train, static=(1, 2))
    nets = {"plain": deep_net(options.depth, False), "residual": deep_net(options.depth, True)}
    runs = {name: run(key, net, options.steps) for name, net in nets.items()}
    for name, found in runs.items():
        ratio = decay(found)
        print(
            f"{name}: loss {found.loss[0]:.3f} to {found.loss[-1]:.3f}; cotangent at the first "
            f"block, of that at the last: {ratio[0]:.1e} to {ratio[-1]:.1e}"
        )
    draw_norms(runs, options.output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
