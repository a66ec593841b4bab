"""What the gradients of single examples tell: noise, curvature, and which examples are wrong.

    python examples/influence.py
    python examples/influence.py --epochs 10 --output figures/influence.png

A net of linear layers learns the digits of `digits_cnn.py`, at half their side, with a tenth of the
labels wrong. After each epoch the deferred gradients of a thousand images, which are an input and a
cotangent for each layer and image, give without the gradients of any single image:

- the gradient noise scale ``tr(S) / |G|^2`` of McCandlish et al. 2018: the batch size from which on
  larger batches save few steps;
- the diagonal of the empirical Fisher matrix, and its Kronecker factors, printed as the share of
  the parameters, and of the directions, that have 90 % of its trace;
- the influence of each training image on each other one, the inner product of their gradients
  (Pruthi et al. 2020, "TracIn"). An image with a large one on itself is one that the net learns by
  heart: the wrong labels are found by it.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import digits_cnn
import matplotlib.pyplot as plt
import torch
from disk import require_positive, save
from torch import Tensor

import funcnet as fn

NET = fn.serial(fn.flatten(), fn.linear(64), fn.tanh(), fn.linear(32), fn.tanh(), fn.linear(10))
LOSS = fn.cross_entropy()
SUMMED = fn.cross_entropy(reduction="sum")
BATCH_SIZE, RATE = 50, 2e-3
STUDIED = 1000
"""Images whose gradients are studied."""
WRONG = 0.1
"""The share of wrong labels."""


def defer(params: fn.Params, images: Tensor, digits: Tensor) -> fn.Deferred:
    """The gradients of the sum of the images' losses, deferred."""
    logits, pullback, _ = NET.vjp(params, images)
    _, loss_pullback = SUMMED.vjp(logits, digits)
    return fn.defer(pullback)(loss_pullback(), x=False)[0]


def rows(deferred: fn.Deferred) -> Iterator[tuple[str, Tensor, Tensor]]:
    """For each linear layer its path, the inputs with a 1 for the bias, and the cotangents."""
    for path, term in deferred.terms():
        x = term.parts["pullback"].residuals["x"]
        yield path, torch.cat([x, torch.ones_like(x[:, :1])], 1), term.parts["dy"]


def noise_scale(deferred: fn.Deferred) -> Tensor:
    """``tr(S) / |G|^2``: S is the covariance of the examples' gradients, G their mean.

    A gradient of one example is ``dy x^T``, whose square is ``|dy|^2 |x|^2``.
    """
    n = len(next(rows(deferred))[1])
    squares = sum(x.square().sum(1) * dy.square().sum(1) for _, x, dy in rows(deferred))
    mean_square = sum((dy.mT @ x / n).square().sum() for _, x, dy in rows(deferred))
    covariance = (squares.mean() - mean_square) * n / (n - 1)
    return covariance / (mean_square - covariance / n)  # both are without bias


def fisher_diagonal(deferred: fn.Deferred) -> dict[str, Tensor]:
    """The mean over the examples of each squared gradient: ``(dy^2)^T (x^2)``."""
    return {path: dy.square().mT @ x.square() / len(x) for path, x, dy in rows(deferred)}


def kronecker(deferred: fn.Deferred) -> dict[str, tuple[Tensor, Tensor]]:
    """``A = E[x x^T]`` and ``G = E[dy dy^T]``; `fn.kronecker_factors` knows sequences as well."""
    return {path: (x.mT @ x / len(x), dy.mT @ dy / len(x)) for path, x, dy in rows(deferred)}


def influence(one: fn.Deferred, other: fn.Deferred) -> Tensor:
    """The inner products of the gradients of each example of one with each of the other."""
    found = [
        (x @ x_other.mT) * (dy @ dy_other.mT)
        for (_, x, dy), (_, x_other, dy_other) in zip(rows(one), rows(other), strict=True)
    ]
    return torch.stack(found).sum(0)


def share_of_most(values: Tensor, of_total: float = 0.9) -> float:
    """The share of the values, the largest first, whose sum is this share of that of all."""
    most = values.flatten().sort(descending=True).values.cumsum(0)
    return ((most < of_total * most[-1]).sum() + 1).item() / values.numel()


def mislabeled(key: Tensor, digits: Tensor) -> tuple[Tensor, Tensor]:
    """The labels with some wrong ones, and which are wrong."""
    key, other_key = fn.random.split(key)
    wrong = fn.random.bernoulli(key, WRONG, digits.shape)
    others = (digits + fn.random.randint(other_key, digits.shape, 1, 10)) % 10
    return torch.where(wrong, others, digits), wrong


def train(key: Tensor, images: Tensor, digits: Tensor, epochs: int) -> Iterator[fn.Params]:
    """The params before the first epoch and after each."""
    optimizer = fn.adam(RATE)
    step = fn.train_step(NET, LOSS, optimizer)

    @fn.jit
    def epoch(state: fn.TrainState, key: Tensor) -> fn.TrainState:
        return fn.scan(step, state, fn.epoch_batches(key, (images, digits), BATCH_SIZE))[0]

    state = fn.init_train_state(NET, optimizer, key, images)
    yield state.params
    for number in range(epochs):
        state = epoch(state, fn.fold_in(key, number))
        yield state.params


def study(params: fn.Params, images: Tensor, labels: Tensor, wrong: Tensor) -> list[str]:
    """A row of the table."""
    deferred = defer(params, images, labels)
    diagonal = torch.cat([each.flatten() for each in fisher_diagonal(deferred).values()])
    spectra = [
        torch.outer(torch.linalg.eigvalsh(g), torch.linalg.eigvalsh(a)).clamp(min=0).flatten()
        for a, g in kronecker(deferred).values()
    ]
    own = influence(deferred, deferred).diagonal()
    found = wrong[own.topk(int(wrong.sum())).indices].float().mean()
    loss = SUMMED.apply(NET.apply(params, images)[0], labels) / len(images)
    shares = share_of_most(diagonal), share_of_most(torch.cat(spectra))
    numbers = [f"{loss:.2f}", f"{noise_scale(deferred):.0f}", *(f"{s:.2%}" for s in shares)]
    return [*numbers, f"{found:.0%}"]


def draw(params: fn.Params, images: Tensor, labels: Tensor, path: Path) -> None:
    """The images with the largest influence on themselves."""
    deferred = defer(params, images, labels)
    own = influence(deferred, deferred).diagonal().topk(24).indices
    figure, panels = plt.subplots(3, 8, figsize=(9, 4), layout="constrained")
    guesses = NET.apply(params, images)[0].argmax(1)
    for panel, index in zip(panels.flat, own.tolist(), strict=True):
        panel.imshow(images[index, 0].numpy(), cmap="gray_r")
        panel.set_title(f"label {labels[index]}, net {guesses[index]}", fontsize=8)
        panel.axis("off")
    figure.suptitle("training images with the largest gradients, with label and guess")
    save(figure, path)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default 0)")
    parser.add_argument("--epochs", type=int, default=6, help="of training (default 6)")
    parser.add_argument("--output", type=Path, help="where the figure is saved")
    options = parser.parse_args(arguments)
    require_positive(parser, options, "epochs")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    key = fn.key(options.seed)
    data = digits_cnn.load()
    order = fn.random.permutation(key, len(data.images))
    images = torch.nn.functional.avg_pool2d(data.images[order], 2)
    labels, wrong = mislabeled(fn.fold_in(key, "labels"), data.digits[order])
    print("epoch  loss  noise scale  Fisher: params  directions with 90 %  wrong labels found")
    chosen = images[:STUDIED], labels[:STUDIED]
    for number, params in enumerate(train(key, images, labels, options.epochs)):
        loss, noise, diagonal, directions, found = study(params, *chosen, wrong[:STUDIED])
        print(f"{number:5} {loss:>5} {noise:>12} {diagonal:>15} {directions:>21} {found:>19}")
    if options.output:
        draw(params, *chosen, options.output)


if __name__ == "__main__":
    main()
