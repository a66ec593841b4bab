"""Fine-tune a PyTorch model with funcnet, and go back to PyTorch.

    python examples/finetune_torch.py
    python examples/finetune_torch.py --seed 1 --epochs 2 --images 1000

A convolutional network of torch.nn learns MNIST's digits, black on white, in an ordinary loop with
torch.optim. Then 500 images come with ink and paper exchanged, of which it knows little. The module
becomes a layer of funcnet; its stem is frozen, the body learns at a low rate and the head at a high
one. The tuned parameters are saved, loaded, and put back into the module, which then gives the same
predictions as the layer.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from digits_cnn import IMAGES, Data, load, split
from torch import Tensor, nn
from torch.nn import functional as F

import funcnet as fn

BATCH_SIZE, FEW = 50, 500
RATES = {"body": 1e-3, "head": 1e-2}


class Digits(nn.Module):
    """A stem, a residual block, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(
            *(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(16 * 7 * 7, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 2)
        x = F.relu(x + self.body(x))
        return self.head(F.max_pool2d(x, 2))


def train_in_torch(model: nn.Module, data: Data, epochs: int) -> None:
    """An ordinary loop of PyTorch."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data.digits)).split(BATCH_SIZE):
            optimizer.zero_grad()
            F.cross_entropy(model(data.images[batch]), data.digits[batch]).backward()
            optimizer.step()
    model.eval()


def tune(model: nn.Module, data: Data, epochs: int, key: Tensor) -> tuple[fn.Layer, fn.TrainState]:
    """The module as a layer, whose body and head have learned from other images."""
    layer, params, state = fn.interop.from_module(model)
    layer = fn.freeze(layer, "stem")
    frozen, params = fn.tree.partition(lambda path: path.startswith("stem."), params)
    optimizer = fn.optimizers.partition(
        {part: fn.adamw(rate) for part, rate in RATES.items()}, {part: part for part in RATES}
    )
    step = fn.train_step(layer, fn.cross_entropy(), optimizer)

    @fn.jit
    def epoch(train_state: fn.TrainState, key: Tensor) -> fn.TrainState:
        return fn.scan(step, train_state, fn.epoch_batches(key, tuple(data), BATCH_SIZE))[0]

    opt_state, start = optimizer.init_state(params), torch.tensor(0)
    train_state = fn.TrainState(params, {**state, "frozen": frozen}, opt_state, key, start)
    for number in range(epochs):
        train_state = epoch(train_state, fn.fold_in(fn.fold_in(key, "order"), number))
    return layer, train_state


def accuracy(logits: Tensor, digits: Tensor) -> float:
    return (logits.argmax(1) == digits).float().mean().item()


class Result(NamedTuple):
    """Accuracies on test images, and how far the module's logits are from the layer's."""

    plain: float
    inverted: float
    tuned: float
    difference: float
    same: bool


def run(seed: int, epochs: int, images: int, path: Path) -> Result:
    key = fn.key(seed)
    torch.manual_seed(seed)
    train, test = split(fn.fold_in(key, "split"), load(), images)
    model = Digits()
    train_in_torch(model, train, epochs)
    some = slice(None, None, max(len(train.digits) // FEW, 1))
    few = Data(1 - train.images[some], train.digits[some])
    inverted = 1 - test.images
    with torch.no_grad():
        before = [accuracy(model(each), test.digits) for each in (test.images, inverted)]

    layer, tuned = tune(model, few, 2 * epochs, fn.fold_in(key, "tune"))
    logits, _ = layer.apply(tuned.params, inverted, tuned.state)
    fn.save(path, {"params": tuned.params, "state": tuned.state})

    loaded = fn.load(path, like={"params": tuned.params, "state": tuned.state})
    model.load_state_dict(fn.interop.to_state_dict(loaded["params"], loaded["state"]))
    with torch.no_grad():
        theirs = model(inverted)
    difference = (theirs - logits).abs().max().item()
    same = torch.equal(theirs.argmax(1), logits.argmax(1))
    return Result(*before, accuracy(theirs, test.digits), difference, same)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train digits in PyTorch, fine-tune in funcnet, and go back.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the split, the parameters and the batches")
    add("--epochs", type=int, default=3, help="in PyTorch; twice as many for fine-tuning")
    add("--images", type=int, default=IMAGES, metavar="N", help="in use; a fifth is for the test")
    add("--output", type=Path, help="where to save the tuned parameters")
    options = parser.parse_args()
    if not 100 <= options.images <= IMAGES:
        parser.error(f"--images must be from 100 to {IMAGES}")
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")
    return options


def main() -> None:
    options = parse()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = options.output or Path(folder) / "digits.safetensors"
        result = run(options.seed, options.epochs, options.images, path)
    print(f"trained in PyTorch: {result.plain:.1%} of the test images right")
    print(f"ink and paper exchanged: {result.inverted:.1%}, fine-tuned {result.tuned:.1%}")
    same = "the same predictions" if result.same else "other predictions"
    print(f"back in PyTorch: {same}, logits differ by {result.difference:.1e} at most")
    print(f"{time.perf_counter() - begin:.1f} s with compilation")


if __name__ == "__main__":
    main()
