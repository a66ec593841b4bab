"""Train an LSTM to follow a walk: where on a ring of places is it after each command?

    python examples/sequence_lstm.py
    python examples/sequence_lstm.py --places 8 --steps 2000

A walk on a ring of places takes commands: one place forward, one back, stay, or home, to place 0.
Walks are of different lengths, in one batch; there is a class for each command, the place after it.
The baseline is a linear classifier that sees the last command and how often each was given so far,
which is all that there is to know but for the order.

Batches are drawn in the compiled program, a hundred steps a call, so no walk is seen twice. The
program ends with the accuracy of both on new walks, and on walks that are twice as long.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from disk import one_thread, require_positive
from torch import Tensor
from tqdm import tqdm

import funcnet as fn

FORWARD, BACK, STAY, HOME = COMMANDS = range(4)
BATCH_SIZE, STEPS_A_CALL = 64, 100
RATE = 1e-2
NO_PLACE = -100
"""The class behind the end of a walk, which `cross_entropy` leaves out."""

Batch = tuple[dict[str, Tensor], Tensor]


def walk(commands: Tensor, places: int) -> Tensor:
    """The place after each command, int64 like the commands (batch, steps)."""

    def move(place: Tensor, command: Tensor) -> tuple[Tensor, Tensor]:
        moved = place + (command == FORWARD).long() - (command == BACK).long()
        place = torch.where(command == HOME, 0, moved % places)
        return place, place

    home = torch.zeros_like(commands[:, 0])
    return fn.scan(move, home, commands.t())[1].t()


def draw(key: Tensor, count: int, longest: int, places: int) -> Batch:
    """Walks of up to ``longest`` commands, few of them home, with their lengths and places."""
    command_key, length_key = fn.random.split(key)
    number = fn.random.randint(command_key, (count, longest), 0, 16)
    commands = torch.where(number == 0, HOME, number % HOME)
    lengths = fn.random.randint(length_key, (count,), 1, longest + 1)
    ended = torch.arange(longest) >= lengths[:, None]
    target = torch.where(ended, NO_PLACE, walk(commands, places))
    return {"input": commands, "lengths": lengths}, target


def lstm(places: int, hidden: int) -> fn.Layer:
    """Of walks: a dict with the commands, ``input``, and ``lengths``."""
    return fn.serial(
        embed=fn.parallel(input=fn.embedding(len(COMMANDS), 16), lengths=fn.identity()),
        recurrent=fn.lstm(hidden, batch_first=True),
        output=fn.item(0),
        head=fn.linear(places),
        classes=fn.permute(0, 2, 1),
    )


def baseline(places: int) -> fn.Layer:
    """Of the last command and the number of each command so far."""
    return fn.serial(head=fn.linear(places), classes=fn.permute(0, 2, 1))


def counts(batch: Batch) -> tuple[Tensor, Tensor]:
    """The batch as the baseline sees it."""
    walks, target = batch
    each = (walks["input"][..., None] == torch.arange(len(COMMANDS))).float()
    so_far = torch.ones(each.shape[1], each.shape[1]).tril()
    return torch.cat([each, so_far @ each], -1), target


def train(
    net: fn.Layer,
    see: Callable[[Batch], Any],
    options: argparse.Namespace,
    name: str,
) -> fn.TrainState:
    """Adam on batches that are drawn as it goes; ``see`` makes of a batch what the net takes."""
    optimizer = fn.adam(RATE)
    take = fn.train_step(net, fn.cross_entropy(), optimizer)

    @fn.jit
    def call(state: fn.TrainState, key: Tensor) -> tuple[fn.TrainState, Tensor]:
        def step(state: fn.TrainState, key: Tensor) -> tuple[fn.TrainState, Tensor]:
            batch = draw(key, BATCH_SIZE, options.longest, options.places)
            state, metrics = take(state, see(batch))
            return state, metrics["loss"]

        state, losses = fn.scan(step, state, fn.random.split(key, STEPS_A_CALL))
        return state, losses.mean()

    key = fn.fold_in(fn.key(options.seed), "training")
    x, _ = see(draw(key, BATCH_SIZE, options.longest, options.places))
    state = fn.init_train_state(net, optimizer, fn.fold_in(key, name), x)
    calls = max(1, options.steps // STEPS_A_CALL)
    with tqdm(range(calls), name, unit="call") as progress:
        for number in progress:
            state, loss = call(state, fn.fold_in(key, number))
            progress.set_postfix(loss=f"{loss.item():.4f}")
    return state


def accuracy(net: fn.Layer, state: fn.TrainState, batch: tuple[Any, Tensor]) -> float:
    """How often the likeliest place is the right one, of the places of walks."""
    x, target = batch
    logits, _ = net.apply(state.params, x)
    return fn.metrics.accuracy(ignore_index=NO_PLACE).of_batch(logits, target).item()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train an LSTM to follow a walk on a ring of places.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the parameters and walks")
    add("--steps", type=int, default=600, help="training steps, in hundreds")
    add("--places", type=int, default=6, help="on the ring")
    add("--longest", type=int, default=30, help="the number of commands of the longest walks")
    add("--hidden", type=int, default=64, help="features of the LSTM")
    options = parser.parse_args()
    require_positive(parser, options, "steps", "places", "longest", "hidden")
    return options


def main() -> None:
    options = parse()
    one_thread()
    nets: dict[str, tuple[fn.Layer, Callable[[Batch], Any]]] = {
        "LSTM": (lstm(options.places, options.hidden), lambda batch: batch),
        "counts": (baseline(options.places), counts),
    }
    key = fn.fold_in(fn.key(options.seed), "test")
    tests = [draw(key, 500, times * options.longest, options.places) for times in (1, 2)]
    for name, (net, see) in nets.items():
        state = train(net, see, options, name)
        found = [accuracy(net, state, see(test)) for test in tests]
        print(f"{name}: accuracy {found[0]:.1%}, on walks twice as long {found[1]:.1%}")


if __name__ == "__main__":
    main()
