"""Balance a pole by policy gradients: environment, episodes and update are one compiled program.

    python examples/policy_gradient.py
    python examples/policy_gradient.py --output examples/figures/policy_gradient.png

In each update 64 carts (`fn.vmap`) are pushed for 200 steps (`fn.scan`) by a net that draws the
actions, and then the net's parameters go up the gradient of what it will earn, which is that of
``mean(advantage * log p(action))`` with the advantages held fixed (Williams 1992). An advantage is
what is earned from a step on, less what the carts that stand earn on average from then on.

That is the gradient of a classification: `fn.cross_entropy` gives ``-log p(action)`` for each step,
and its pullback takes ``advantage / n`` where the mean of a loss would have ``1 / n``. The policy
gradient is one cotangent.

Prints and draws the mean return of 100 episodes after every 10 updates, and the steps of the
environment in a second, beside those of the same updates in plain PyTorch.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import cartpole
import torch
from cartpole import State
from disk import require_positive
from torch import Tensor, nn

import funcnet as fn

CARTS, STEPS = 64, 200
EVERY = 10
"""Updates of one call of the program, after which the policy is measured."""
UNITS, RATE = 32, 0.01

POLICY = fn.serial(fn.linear(UNITS), fn.tanh(), fn.linear(cartpole.ACTIONS))
SURPRISE = fn.cross_entropy(reduction="none")
OPTIMIZER = fn.adam(RATE)


class Run(NamedTuple):
    """How far a training is: what is learned, and the carts."""

    train: fn.TrainState
    carts: State


class Seen(NamedTuple):
    """What happened in each step of each cart, (carts, steps)."""

    observed: Tensor
    action: Tensor
    reward: Tensor
    standing: Tensor
    """Whether the pole still stood before it."""


def policy_of(params: fn.Params) -> cartpole.Policy:
    return lambda observed: POLICY.apply(params, observed)[0]


def push(params: fn.Params, cart: State, key: Tensor) -> tuple[State, Seen]:
    """200 steps of one cart, which is a new one if its episode is over."""
    restart_key, key = fn.random.split(key).unbind()
    policy = policy_of(params)

    def one(cart: State, key: Tensor) -> tuple[State, Seen]:
        action = cartpole.draw_action(policy, cart, key)
        after, reward, _ = cartpole.step(cart, action)
        return after, Seen(cart.observed, action, reward, ~cart.fallen)

    cart = cartpole.restart(cart.fallen | cartpole.cut_off(cart), cart, restart_key)
    return fn.scan(one, cart, fn.random.split(key, STEPS))


def advantages(reward: Tensor, standing: Tensor) -> Tensor:
    """What is earned from each step on, less what those that stand then earn on average."""
    returns = reward.flip(1).cumsum(1).flip(1)
    average = returns.sum(0) / standing.sum(0).clamp(min=1)
    return torch.where(standing, returns - average, 0.0)


def gradient(params: fn.Params, seen: Seen, advantage: Tensor) -> fn.Params:
    """Of ``-sum(advantage * log p(action))`` over all steps."""
    logits, pullback, _ = POLICY.vjp(params, seen.observed.flatten(0, 1))
    _, surprise_pullback = SURPRISE.vjp(logits, seen.action.flatten())
    grads, _ = pullback(surprise_pullback(advantage.flatten()), x=False)
    return grads


def update(run: Run, _: None) -> tuple[Run, None]:
    params, state, opt_state, key, count = run.train
    keys = fn.random.split(fn.fold_in(key, count), CARTS)
    carts, seen = fn.vmap(push, in_axes=(None, 0, 0))(params, run.carts, keys)
    weight = advantages(seen.reward, seen.standing) / seen.standing.sum()
    grads = gradient(params, seen, weight)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
    params = fn.apply_updates(params, updates)
    return Run(fn.TrainState(params, state, opt_state, key, count + 1), carts), None


def start(key: Tensor) -> Run:
    train = fn.init_train_state(POLICY, OPTIMIZER, key, torch.zeros(cartpole.NUMBERS))
    carts = fn.vmap(cartpole.reset)(fn.random.split(fn.fold_in(key, "carts"), CARTS))
    return Run(train, carts)


@fn.jit
def advance(run: Run) -> tuple[Run, Tensor]:
    """Ten updates, and the mean return after them."""
    run, _ = fn.scan(update, run, length=EVERY)
    key = fn.fold_in(fn.fold_in(run.train.key, "measure"), run.train.step)
    return run, cartpole.mean_return(policy_of(run.train.params), key)


class InPyTorch:
    """The same updates with autograd: the carts are one batch, and the steps a Python loop."""

    def __init__(self) -> None:
        self.policy = nn.Sequential(
            nn.Linear(cartpole.NUMBERS, UNITS), nn.Tanh(), nn.Linear(UNITS, cartpole.ACTIONS)
        )
        self.optimizer = torch.optim.Adam(self.policy.parameters(), RATE)
        self.carts = self.reset()

    def reset(self) -> State:
        steps = torch.zeros(CARTS, dtype=torch.int64)
        return State(0.1 * torch.rand(CARTS, cartpole.NUMBERS) - 0.05, steps, steps > 0)

    @torch.no_grad()
    def push(self) -> Seen:
        over = self.carts.fallen | cartpole.cut_off(self.carts)
        new = zip(self.reset(), self.carts, strict=True)
        cart = State(*[torch.where(over.view(-1, *[1] * (b.dim() - 1)), a, b) for a, b in new])
        seen = []
        for _ in range(STEPS):
            action = self.policy(cart.observed).softmax(-1).multinomial(1).squeeze(-1)
            after, reward, _ = cartpole.step(cart, action)
            seen.append(Seen(cart.observed, action, reward, ~cart.fallen))
            cart = after
        self.carts = cart
        return Seen(*[torch.stack(values, 1) for values in zip(*seen, strict=True)])

    def update(self) -> None:
        seen = self.push()
        advantage = advantages(seen.reward, seen.standing) / seen.standing.sum()
        logits = self.policy(seen.observed.flatten(0, 1))
        surprise = nn.functional.cross_entropy(logits, seen.action.flatten(), reduction="none")
        self.optimizer.zero_grad()
        (advantage.flatten() * surprise).sum().backward()
        self.optimizer.step()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Balance a pole by policy gradients.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the net, the carts and the actions")
    add("--updates", type=int, default=100, help=f"of the net, a multiple of {EVERY}")
    add("--quick", action="store_true", help=f"{2 * EVERY} updates, for a test")
    add("--output", type=Path, default=Path("policy_gradient.png"), help="the figure's file")
    options = parser.parse_args()
    require_positive(parser, options, "updates")
    if options.updates % EVERY:
        parser.error(f"--updates must be a multiple of {EVERY}")
    return options


def main() -> None:
    options = parse()
    begin = time.perf_counter()
    run, returns = start(fn.key(options.seed)), []
    for count in range(EVERY, (2 * EVERY if options.quick else options.updates) + 1, EVERY):
        run, value = advance(run)
        returns.append(value)
        seconds = time.perf_counter() - begin
        print(f"{count} updates, {seconds:.1f} s: mean return {value:.0f}")
    above = [index for index, value in enumerate(returns) if value >= cartpole.SOLVED]
    solved = f"solved after {EVERY * (above[0] + 1)} updates" if above else "not solved"
    print(f"{solved}; {time.perf_counter() - begin:.1f} s with compilation")

    seconds = cartpole.seconds_of(
        {"program": lambda: advance(run), "PyTorch": InPyTorch().update}, 2 if options.quick else 5
    )
    ours, theirs = EVERY * CARTS * STEPS / seconds["program"], CARTS * STEPS / seconds["PyTorch"]
    print(
        f"steps of the environment in a second, updates included: {ours:.3g} in one program, "
        f"{theirs:.3g} in plain PyTorch; {ours / theirs:.0f} times as many"
    )
    title = "CartPole by policy gradients"
    cartpole.draw(torch.stack(returns)[:, None], EVERY * CARTS * STEPS, title, options.output)


if __name__ == "__main__":
    main()
