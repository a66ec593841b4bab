"""Train a 2-25-25-25 net to tell the points inside a disk from those outside.

    python examples/disk_classifier.py
    python examples/disk_classifier.py --activation tanh --optimizer sgd --loss mse --seeds 10

1000 training and 1000 test points are uniform in the unit square; half of it lies inside the disk.
Prints loss and error, the share of points on the wrong side, of both sets, for each seed, and the
mean over several. The figure: the data, the output with wrong test points, the losses by epoch.
"""

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Circle
from tqdm import trange

import funcnet as fn

POINTS, RADIUS = 1000, 1 / math.sqrt(2 * math.pi)
ACTIVATIONS = "elu", "gelu", "leaky_relu", "relu", "sigmoid", "silu", "tanh"
LOSSES = {  # the loss, the number of outputs, their accuracy, their score: 1 inside, 0 outside
    "bce_with_logits": (fn.bce_with_logits(), 1, fn.metrics.accuracy(threshold=0.0), torch.sigmoid),
    "cross_entropy": (fn.cross_entropy(), 2, fn.metrics.accuracy(), lambda y: y.softmax(-1)[:, 1]),
    "mae": (fn.mae(), 1, fn.metrics.accuracy(), lambda y: y.clamp(0, 1)),
    "mse": (fn.mse(), 1, fn.metrics.accuracy(), lambda y: y.clamp(0, 1)),
}
OPTIMIZERS = {  # the optimizer, and the learning rate to start with unless the user gives one
    "adam": (fn.adam, 0.003),
    "adamw": (fn.adamw, 0.003),
    "rmsprop": (fn.rmsprop, 0.002),
    "sgd": (fn.sgd, 0.5),
    "sgd_momentum": (lambda lr: fn.sgd(lr, momentum=0.9), 0.1),
    "signsgd": (fn.signsgd, 0.0005),
}

parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
add, rates = parser.add_argument, {name: rate for name, (_, rate) in OPTIMIZERS.items()}
add("--seed", type=int, default=0, help="of the data, the first parameters and the batches")
add("--seeds", type=int, default=1, metavar="N", help="train with N seeds, from --seed on")
add("--epochs", type=int, default=100, help="passes over the training points")
add("--batch-size", type=int, default=20, help="points a step")
add("--optimizer", choices=OPTIMIZERS, default="adam", help="the update rule")
add("--lr", type=float, default=argparse.SUPPRESS, help=f"falls to 0 from here; default {rates}")
add("--activation", choices=ACTIVATIONS, default="gelu", help="after each hidden layer")
add("--loss", choices=LOSSES, default="cross_entropy", help="what is minimized")
add("--output", type=Path, default=Path("disk_classifier.png"), help="the figure's file")
options = parser.parse_args()
if min(options.seeds, options.epochs) < 1 or not 1 <= options.batch_size <= POINTS:
    parser.error(f"--seeds and --epochs must be at least 1, --batch-size from 1 to {POINTS}")
torch.set_num_threads(1)  # 25 units are too few to share

loss, outputs, accuracy, score = LOSSES[options.loss]
hidden = [fn.linear(25), getattr(fn, options.activation)()] * 3
net = fn.serial(*hidden, fn.linear(outputs), *[fn.flatten(0)] * (outputs == 1))  # 1: (n,)
make, rate = OPTIMIZERS[options.optimizer]
steps = options.epochs * (POINTS // options.batch_size)
optimizer = make(fn.schedules.linear(getattr(options, "lr", rate), 1.0, 0.0, steps))
step = fn.train_step(net, loss, optimizer)  # a pure function (state, batch) -> (state, metrics)
epoch = fn.jit(lambda state, batches: fn.scan(step, state, batches))  # one compiled loop


def draw(key):
    """Points of the unit square, and their labels: 1 inside the disk, 0 outside."""
    points = fn.random.uniform(key, (POINTS, 2))
    inside = (points - 0.5).norm(dim=-1) <= RADIUS
    return points, inside.long() if outputs == 2 else inside.float()


def scaled(points):
    """With mean 0 and variance 1, as the net sees them."""
    return (points - 0.5) * math.sqrt(12)


def train(seed):
    """The data, the params, and after each epoch the loss and accuracy of both sets."""
    key = fn.key(seed)
    data = [draw(fn.fold_in(key, name)) for name in ("train", "test")]
    sets = [(scaled(points), label) for points, label in data]
    measures = [fn.evaluate(net, loss, {"accuracy": accuracy}, [each]) for each in sets]
    state = fn.init_train_state(net, optimizer, fn.fold_in(key, "model"), sets[0][0])
    history, shuffle = [], fn.fold_in(key, "shuffle")
    for i in trange(options.epochs, desc=f"seed {seed}", unit="epoch"):
        batches = fn.epoch_batches(fn.fold_in(shuffle, i), sets[0], options.batch_size)
        state, _ = epoch(state, batches)
        history.append([measure(state) for measure in measures])
    found = [f"loss {each['loss']:.4f}, error {1 - each['accuracy']:.2%}" for each in history[-1]]
    print(f"seed {seed}: train {found[0]}; test {found[1]}")
    return data, state.params, history


runs = [train(seed) for seed in range(options.seed, options.seed + options.seeds)]
errors = torch.stack([1 - history[-1][1]["accuracy"] for _, _, history in runs])
if len(runs) > 1:
    deviation = f"(standard deviation {errors.std():.2%})"
    print(f"mean test error of {len(runs)} seeds: {errors.mean():.2%} {deviation}")

((points, label), (test, inside)), params, history = runs[0]
plt.rcParams.update({"image.cmap": "RdYlBu_r", "figure.constrained_layout.wspace": 0.06})
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
for axes in (left, middle):
    axes.add_patch(Circle((0.5, 0.5), RADIUS, fill=False, linewidth=1.5, zorder=3))
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=(0, 0.5, 1), yticks=(0.5, 1))
left.set(title=f"{POINTS} training points and the disk", xlabel="$x_1$", ylabel="$x_2$")
left.scatter(*points.T, c=label, s=10, edgecolors="white", linewidths=0.2)
middle.set(title=f"Output and wrong test points: {errors[0]:.1%}", xlabel="$x_1$")
grid = torch.cartesian_prod(*[(torch.arange(200) + 0.5) / 200] * 2)
output, tested = [score(net.apply(params, scaled(x))[0]) for x in (grid, test)]
image = middle.imshow(output.reshape(200, 200).T.numpy(), origin="lower", extent=2 * (0, 1))
figure.colorbar(image, label="score of the disk")
middle.scatter(*test[(tested > 0.5) != inside.bool()].T, marker="x", c="black", clip_on=False)
for name, values in zip(("train", "test"), zip(*history, strict=True), strict=True):
    right.plot(range(1, options.epochs + 1), [value["loss"] for value in values], label=name)
right.set(title=f"Loss ({options.loss})", xlabel="epoch", yscale="log")
right.legend(frameon=False)
options.output.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(options.output, dpi=150)
print(f"wrote {options.output}")
