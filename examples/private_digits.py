"""Train on digits so that no image can be told to have been among them: DP-SGD.

    python examples/private_digits.py
    python examples/private_digits.py --epsilon 2 --epochs 30

Each image's gradient is clipped to a norm of 1, and noise is added to the sum of each batch: so the
trained net is (epsilon, delta)-differentially private with respect to each of its 4000 images. The
noise is the least for the epsilon that is asked for. Batches are Poisson samples, as the accountant
assumes; an epoch is one compiled call. The program prints the epsilon that was spent, and the
accuracy on 1000 other images, after each few epochs.
"""

import argparse
import math
from typing import Any

from digits_cnn import CLASSES, IMAGES, Data, load, split
from torch import Tensor

import funcnet as fn

BATCH_SIZE = 200
BOUND, RATE, MOMENTUM = 1.0, 0.4, 0.9
DELTA = 1e-5

# A normalization of each example by itself: one over the batch would mix them.
MODEL = fn.serial(
    fn.conv2d(16, 5, stride=2, padding=2),
    fn.group_norm(4),
    fn.tanh(),
    fn.max_pool2d(2),
    fn.conv2d(32, 3, padding=1),
    fn.group_norm(4),
    fn.tanh(),
    fn.max_pool2d(2),
    fn.flatten(),
    fn.linear(CLASSES),
)
LOSS = fn.cross_entropy()
OPTIMIZER = fn.sgd(RATE, MOMENTUM)
Epoch = Any


def steps_of(data: Data) -> int:
    """How many steps an epoch has, in which each image is drawn once on average."""
    return math.ceil(len(data.images) / BATCH_SIZE)


def make_epoch(data: Data, noise: float) -> Epoch:
    """``epoch(carry, key) -> (carry, losses)``, where the carry is params and opt_state."""
    count = len(data.images)
    gradients = fn.private_value_and_grad(MODEL, LOSS, BOUND, noise, batch_size=BATCH_SIZE)

    def step(carry: Any, key: Tensor) -> tuple[Any, Tensor]:
        params, opt_state = carry
        examples, mask, _ = fn.poisson_batch(fn.fold_in(key, "batch"), count, BATCH_SIZE / count)
        batch = data.images[examples], data.digits[examples]
        loss, grads, _ = gradients(params, batch, key=fn.fold_in(key, "step"), mask=mask)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return (fn.apply_updates(params, updates), opt_state), loss

    def epoch(carry: Any, key: Tensor) -> tuple[Any, Tensor]:
        return fn.scan(step, carry, fn.random.split(key, steps_of(data)))

    return fn.jit(epoch, donate=0)


def accuracy(params: Any, data: Data) -> float:
    """The fraction of digits that are recognized."""
    y, _ = MODEL.apply(params, data.images)
    return (y.argmax(1) == data.digits).float().mean().item()


def train(train_data: Data, test_data: Data, seed: int, epochs: int, epsilon: float) -> float:
    """Print how training goes; the accuracy at its end."""
    rate, steps = BATCH_SIZE / len(train_data.images), steps_of(train_data)
    noise = fn.private_noise(epsilon, rate, epochs * steps, DELTA)
    print(f"noise {noise:.2f} times the bound, for {epochs * steps} steps at a rate of {rate:.3f}")
    key = fn.key(seed)
    params, _ = MODEL.init(fn.fold_in(key, "init"), train_data.images[:1])
    carry = params, OPTIMIZER.init_state(params)
    epoch = make_epoch(train_data, noise)
    for number in range(1, epochs + 1):
        carry, _ = epoch(carry, fn.fold_in(key, number))
        if number % max(1, epochs // 5) == 0 or number == epochs:
            spent = fn.private_epsilon(noise, rate, number * steps, DELTA)
            found = accuracy(carry[0], test_data)
            print(f"epoch {number}: epsilon {spent:.2f}, accuracy {found:.1%}")
    return accuracy(carry[0], test_data)


def main() -> None:
    """Parse the options, train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of all draws (default 0)")
    add("--epochs", type=int, default=20, help="how often an image is drawn on average")
    add("--epsilon", type=float, default=4.0, help="the privacy loss at the end (default 4)")
    add("--images", type=int, default=IMAGES, help=f"how many of the {IMAGES} images to use")
    options = parser.parse_args()
    if options.epochs < 1 or not options.epsilon > 0:
        parser.error("epochs and epsilon must be above 0")
    if not 500 <= options.images <= IMAGES:
        parser.error(f"images must be from 500 to {IMAGES}")
    train_data, test_data = split(fn.key(options.seed), load(), options.images)
    train(train_data, test_data, options.seed, options.epochs, options.epsilon)


if __name__ == "__main__":
    main()
