"""Tell what a net knows from what it guesses: an ensemble of 20, trained by one compiled call.

    python examples/deep_ensemble.py
    python examples/deep_ensemble.py --output examples/figures/deep_ensemble.png

Each member predicts a mean and a variance of a noisy sine, which it has seen on [-4, -1] and
[1, 4]. The members differ in their first parameters and in the order of their batches alone: where
there are data they agree, and in the gap and outside they do not. The variance of the ensemble is
the mean of the members' variances, the noise, and the variance of their means, the ignorance
(Lakshminarayanan et al. 2017).

The program prints the root mean square error and the negative log-likelihood of test points, of
one member and of the ensemble, and the width of the band by region; its figure shows the band.
"""

import argparse
import math
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from disk import require_positive, save
from torch import Tensor

import funcnet as fn

EXAMPLES, BATCH_SIZE = 200, 50
NOISE = 0.1
RATE = 0.01


def gaussian_nll_rule(residuals: dict[str, Tensor], dvalue: Tensor | float) -> Tensor:
    """``d (-error / variance, (1 - error^2 / variance) / 2) / n``."""
    error, variance = residuals["error"], residuals["variance"]
    derivative = torch.stack([-error / variance, (1 - error.square() / variance) / 2], -1)
    return derivative * (dvalue / error.numel())


def gaussian_nll() -> fn.Loss:
    """``(log variance + error^2 / variance) / 2``, averaged over n examples.

    That is the negative log-likelihood without its constant, ``log(2 pi) / 2``.

    Inputs: prediction (n, 2), a mean and the logarithm of a variance; target (n,).
    """

    def vjp(prediction: Tensor, target: Tensor) -> tuple[Tensor, fn.LossPullback]:
        mean, log_variance = prediction.unbind(-1)
        error, variance = target - mean, log_variance.exp()
        value = (log_variance + error.square() / variance).mean() / 2
        return value, fn.LossPullback(gaussian_nll_rule, {"error": error, "variance": variance})

    def apply(prediction: Tensor, target: Tensor) -> Tensor:
        return vjp(prediction, target)[0]

    return fn.Loss(apply, vjp)


# Bends all over the data at the start; outside of them each net goes on in its own direction.
MODEL = fn.serial(
    fn.linear(50, weight_init=fn.initializers.normal(), bias_init=fn.initializers.normal(std=3.0)),
    fn.silu(),
    fn.linear(50),
    fn.silu(),
    fn.linear(2),
)


def draw(key: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Points x, (n, 1), of [-4, -1] and [1, 4], and noisy values of a sine there, (n,)."""
    x_key, side_key, noise_key = fn.random.split(key, 3)
    side = torch.where(fn.random.bernoulli(side_key, 0.5, (n,)), 1.0, -1.0)
    x = side * fn.random.uniform(x_key, (n,), minval=1.0, maxval=4.0)
    return x[:, None], truth(x) + NOISE * fn.random.normal(noise_key, (n,))


def truth(x: Tensor) -> Tensor:
    return torch.sin(2 * x)


def train(key: Tensor, data: tuple[Tensor, Tensor], epochs: int) -> fn.Params:
    """The parameters of one member: all of a run, as a function of its key."""
    steps = epochs * (EXAMPLES // BATCH_SIZE)
    optimizer = fn.adam(lambda step: RATE * (1 - step / steps))
    step = fn.train_step(MODEL, gaussian_nll(), optimizer)
    state = fn.init_train_state(MODEL, optimizer, fn.fold_in(key, "model"), data[0])
    shuffle_key = fn.fold_in(key, "shuffle")

    def epoch(state: fn.TrainState, number: Tensor) -> tuple[fn.TrainState, None]:
        batches = fn.epoch_batches(fn.fold_in(shuffle_key, number), data, BATCH_SIZE)
        return fn.scan(lambda state, batch: (step(state, batch)[0], None), state, batches)

    return fn.scan(epoch, state, torch.arange(epochs))[0].params


class Prediction(NamedTuple):
    mean: Tensor
    variance: Tensor


def predict(population: fn.Params, x: Tensor) -> Prediction:
    """What each member says of x (n, 1): means and variances of shape (members, n)."""
    outputs, _ = fn.vmap(MODEL.apply, in_axes=(0, None))(population, x)
    mean, log_variance = outputs.unbind(-1)
    return Prediction(mean, log_variance.exp())


def mixture(members: Prediction) -> Prediction:
    """The mean and the variance of the mixture of the members."""
    ignorance = members.mean.var(0, correction=0)
    return Prediction(members.mean.mean(0), members.variance.mean(0) + ignorance)


def scores(prediction: Prediction, target: Tensor) -> str:
    """Of the normal distribution with the predicted mean and variance."""
    outputs = torch.stack([prediction.mean, prediction.variance.log()], -1)
    likelihood = gaussian_nll().apply(outputs, target) + math.log(2 * math.pi) / 2
    root = (prediction.mean - target).square().mean().sqrt()
    return f"RMSE {root:.4f}, negative log-likelihood {likelihood:.4f}"


REGIONS = {"on the data": (1.0, 4.0), "in the gap": (0.0, 0.5), "outside": (5.0, 6.0)}
"""Of ``|x|``."""


def widths(x: Tensor, ensemble: Prediction) -> dict[str, float]:
    """The mean standard deviation of each region."""
    distance, deviation = x[:, 0].abs(), ensemble.variance.sqrt()
    return {
        name: deviation[(distance >= low) & (distance <= high)].mean().item()
        for name, (low, high) in REGIONS.items()
    }


def draw_band(x: Tensor, members: Prediction, data: tuple[Tensor, Tensor], path: Path) -> None:
    ensemble, line = mixture(members), x[:, 0]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for deviations in (2, 1):
        spread = deviations * ensemble.variance.sqrt()
        label = f"± {deviations} standard deviation{'s' if deviations > 1 else ''}"
        axes.fill_between(
            line,
            ensemble.mean - spread,
            ensemble.mean + spread,
            color="tab:blue",
            alpha=0.15 * (3 - deviations),
            linewidth=0,
            label=label,
        )
    axes.plot(line, members.mean.T, color="tab:blue", linewidth=0.5, alpha=0.4)
    axes.plot(line, ensemble.mean, color="tab:blue", linewidth=2, label="mean of the ensemble")
    axes.plot(line, truth(line), "k--", linewidth=1, label="truth")
    axes.scatter(data[0][:, 0], data[1], s=8, color="tab:red", zorder=3, label="training points")
    axes.set(xlim=(-6, 6), ylim=(-3, 3), xlabel="x", ylabel="y")
    axes.set_title(f"{len(members.mean)} nets: the thin lines are their means")
    axes.legend(frameon=False, loc="upper left")
    save(figure, path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train an ensemble that knows where it knows nothing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the data, the first parameters and the batches")
    add("--members", type=int, default=20, metavar="N", help="nets of the ensemble")
    add("--epochs", type=int, default=300, help=f"passes over the {EXAMPLES} training points")
    add("--output", type=Path, default=Path("deep_ensemble.png"), help="the figure's file")
    options = parser.parse_args()
    require_positive(parser, options, "members", "epochs")
    return options


def main() -> None:
    options = parse()
    train_key, test_key, member_key = fn.random.split(fn.key(options.seed), 3)
    data, (test_x, test_target) = draw(train_key, EXAMPLES), draw(test_key, 1000)

    start = time.perf_counter()
    train_all = fn.jit(fn.vmap(train, in_axes=(0, None, None)), static=2)
    population = train_all(fn.random.split(member_key, options.members), data, options.epochs)
    seconds = time.perf_counter() - start
    print(f"{options.members} members, {options.epochs} epochs: {seconds:.1f} s with compilation")

    members = predict(population, test_x)
    first = Prediction(members.mean[0], members.variance[0])
    print(f"test, one member: {scores(first, test_target)}")
    print(f"test, ensemble:   {scores(mixture(members), test_target)}")

    x = torch.linspace(-6, 6, 481)[:, None]
    members = predict(population, x)
    for name, width in widths(x, mixture(members)).items():
        print(f"standard deviation {name}: {width:.3f}")
    draw_band(x, members, data, options.output)


if __name__ == "__main__":
    main()
