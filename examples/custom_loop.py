"""The training step written by hand: what `fn.train_step` does, from the parts that it is made of.

    python examples/custom_loop.py

Prints the loss, averaged over the batches, of ten epochs on the way, and the test error.
"""

import argparse

from disk import draw, one_thread, standardized

import funcnet as fn

parser = argparse.ArgumentParser(
    description="Train on the disk by a hand-written step.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--seed", type=int, default=0, help="of the data, parameters and batches")
parser.add_argument("--epochs", type=int, default=100, help="passes over the training points")
options = parser.parse_args()

one_thread()
data_key, init_key, shuffle_key = fn.random.split(fn.key(options.seed), 3)
train_key, test_key = fn.random.split(data_key)
train, test = standardized(draw(train_key, 1000), draw(test_key, 1000))

model = fn.serial(fn.linear(25), fn.tanh(), fn.linear(25), fn.tanh(), fn.linear(2))
loss = fn.cross_entropy()
optimizer = fn.adam(lr=fn.schedules.linear(0.01, 1.0, 0.0, total_iters=50 * options.epochs))

params, state = model.init(init_key, train.points)
opt_state = optimizer.init_state(params)
for epoch in range(options.epochs):
    batches, values = fn.epoch_batches(fn.fold_in(shuffle_key, epoch), train, batch_size=20), []
    for x, target in zip(*batches, strict=True):
        # Forward: each vjp returns its value and a pullback, the linear map of its derivative.
        prediction, model_pullback, state = model.vjp(params, x, state)
        value, loss_pullback = loss.vjp(prediction, target)
        # Backward: from d value / d prediction to d value / d params. No one needs dx here.
        grads, _ = model_pullback(loss_pullback(), x=False)
        # Update: what is added to the params, and the optimizer's memory of it.
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = fn.apply_updates(params, updates)
        values.append(value.item())
    if (epoch + 1) % max(1, options.epochs // 10) == 0:
        print(f"epoch {epoch + 1}: loss {sum(values) / len(values):.4f}")

prediction, _ = model.apply(params, test.points, state)
print(f"test error {(prediction.argmax(-1) != test.labels).float().mean():.2%}")
