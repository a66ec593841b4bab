"""Balance a pole by proximal policy optimization, with 16 seeds at once as one compiled program.

    python examples/ppo.py
    python examples/ppo.py --output examples/figures/ppo.png

A run is a pure function of its key: 32 carts are pushed for 64 steps (`fn.vmap` of `fn.scan`), the
advantages are computed backwards in time (`fn.scan` with ``reverse=True``), and four epochs of 8
minibatches improve the policy and the value of what is observed (`fn.train_step`, scanned over
`fn.epoch_batches`). `fn.vmap` over keys makes a population of runs, which the program divides among
the cores.

The loss is that of Schulman et al. 2017: the clipped objective, the squared error of the value and
an entropy bonus. Its derivative stands beside it. That of the clipped objective is, as for any
policy gradient, the derivative of ``-log p(action)`` with a cotangent, ``ratio * advantage`` or, if
the ratio is clipped, 0.

Prints and draws the mean return of 100 episodes after every 5 updates, of each seed, and the steps
of the environment in a second, beside those of the same run in plain PyTorch.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cartpole
import torch
from cartpole import State
from disk import require_positive
from torch import Tensor, nn

import funcnet as fn

CARTS, STEPS = 32, 64
EPOCHS, MINIBATCHES = 4, 8
EVERY = 5
"""Updates of one call of the program, after which the policy is measured."""
UNITS, RATE, MAX_NORM = 64, 2.5e-3, 0.5
DISCOUNT, TRACE = 0.99, 0.95
"""The gamma and the lambda of the advantages."""
CLIP, VALUE_WEIGHT, ENTROPY_WEIGHT = 0.2, 0.5, 0.01


def tower(outputs: int) -> fn.Layer:
    hidden = [layer for _ in range(2) for layer in (fn.linear(UNITS), fn.tanh())]
    return fn.serial(*hidden, fn.linear(outputs))


MODEL = fn.branch(policy=tower(cartpole.ACTIONS), value=fn.serial(tower(1), fn.select(0)))


class Seen(NamedTuple):
    """What happened in each step, and what the model said before it."""

    observed: Tensor
    action: Tensor
    log_p: Tensor
    """Of the action."""
    value: Tensor
    reward: Tensor
    fallen: Tensor


class Target(NamedTuple):
    """What the model's outputs are compared with, (examples,)."""

    action: Tensor
    log_p: Tensor
    """Of the action, when it was drawn."""
    advantage: Tensor
    value: Tensor


def one_hot(action: Tensor) -> Tensor:
    return (action.unsqueeze(-1) == torch.arange(cartpole.ACTIONS)).float()


def objective_rule(residuals: dict[str, Tensor], dvalue: Tensor | float) -> dict[str, Tensor]:
    """The derivatives of ``-log p(action)``, ``-entropy`` and ``error^2 / 2``, weighted."""
    log_p, entropy = residuals["log_p"], residuals["entropy"].unsqueeze(-1)
    p, d = log_p.exp(), dvalue / len(log_p)
    dpolicy = residuals["cotangent"].unsqueeze(-1) * (p - residuals["chosen"])
    dpolicy = dpolicy + ENTROPY_WEIGHT * p * (log_p + entropy)
    return {"policy": d * dpolicy, "value": d * VALUE_WEIGHT * residuals["error"]}


def objective() -> fn.Loss:
    """``-min(r A, clip(r, 0.8, 1.2) A) + 0.5 (v - target)^2 / 2 - 0.01 entropy``, averaged.

    r is the probability of the action by that when it was drawn, A its advantage.

    Inputs: prediction, a dict with the logits of the "policy" (n, actions) and the "value" (n,); a
    `Target`.
    """

    def vjp(prediction: dict[str, Tensor], target: Target) -> tuple[Tensor, fn.LossPullback]:
        log_p, chosen = prediction["policy"].log_softmax(-1), one_hot(target.action)
        ratio = ((log_p * chosen).sum(-1) - target.log_p).exp()
        gain = ratio * target.advantage
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP) * target.advantage
        entropy = -(log_p.exp() * log_p).sum(-1)
        error = prediction["value"] - target.value
        bonus = ENTROPY_WEIGHT * entropy - VALUE_WEIGHT * error.square() / 2
        residuals = {
            "cotangent": torch.where(gain <= clipped, gain, 0.0),
            "log_p": log_p,
            "chosen": chosen,
            "entropy": entropy,
            "error": error,
        }
        value = -(torch.minimum(gain, clipped) + bonus).mean()
        return value, fn.LossPullback(objective_rule, residuals)

    def apply(prediction: dict[str, Tensor], target: Target) -> Tensor:
        return vjp(prediction, target)[0]

    return fn.Loss(apply, vjp)


def push(params: fn.Params, cart: State, key: Tensor) -> tuple[State, Seen]:
    """64 steps of one cart, which starts anew when it has fallen.

    It starts anew too if the time of its episode was over before: not in between, where that would
    look like a fall.
    """
    restart_key, key = fn.random.split(key).unbind()

    def one(cart: State, key: Tensor) -> tuple[State, Seen]:
        action_key, restart_key = fn.random.split(key).unbind()
        said, _ = MODEL.apply(params, cart.observed)
        action = fn.random.categorical(action_key, said["policy"])
        log_p = (said["policy"].log_softmax(-1) * one_hot(action)).sum(-1)
        after, reward, fallen = cartpole.step(cart, action)
        seen = Seen(cart.observed, action, log_p, said["value"], reward, fallen)
        return cartpole.restart(fallen, after, restart_key), seen

    cart = cartpole.restart(cartpole.cut_off(cart), cart, restart_key)
    return fn.scan(one, cart, fn.random.split(key, STEPS))


def advantages(seen: Seen, last_value: Tensor) -> Tensor:
    """``A_t = d_t + gamma lambda A_t+1``, ``d_t = r_t + gamma v_t+1 - v_t``, and 0 after a fall.

    Of one cart or, with the steps as leading dimension, of many. Schulman et al. 2016.
    """

    def back(after: tuple[Tensor, Tensor], now: Seen) -> tuple[tuple[Tensor, Tensor], Tensor]:
        value, advantage = after
        discount = torch.where(now.fallen, 0.0, DISCOUNT)
        surprise = now.reward + discount * value - now.value
        advantage = surprise + discount * TRACE * advantage
        return (now.value, advantage), advantage

    end = last_value, torch.zeros_like(last_value)
    return fn.scan(back, end, seen, reverse=True)[1]


def examples_of(params: fn.Params, cart: State, key: Tensor) -> tuple[State, tuple[Tensor, Target]]:
    """The steps of one cart as examples to learn from."""
    cart, seen = push(params, cart, key)
    said, _ = MODEL.apply(params, cart.observed)
    advantage = advantages(seen, said["value"])
    return cart, (seen.observed, Target(seen.action, seen.log_p, advantage, advantage + seen.value))


def normalized(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.std() + 1e-8)


class Run(NamedTuple):
    """How far a training is: what is learned, and the carts."""

    train: fn.TrainState
    carts: State


def make_update(optimizer: fn.Optimizer) -> Callable[[Run, None], tuple[Run, None]]:
    step = fn.train_step(MODEL, objective(), optimizer)

    def update(run: Run, _: None) -> tuple[Run, None]:
        key = fn.fold_in(fn.fold_in(run.train.key, "update"), run.train.step)
        keys = fn.random.split(key, CARTS)
        carts, examples = fn.vmap(examples_of, in_axes=(None, 0, 0))(
            run.train.params, run.carts, keys
        )
        observed, target = fn.tree.map(lambda x: x.flatten(0, 1), examples)
        target = target._replace(advantage=normalized(target.advantage))

        def epoch(train: fn.TrainState, key: Tensor) -> tuple[fn.TrainState, None]:
            size = CARTS * STEPS // MINIBATCHES
            return fn.scan(step, train, fn.epoch_batches(key, (observed, target), size))[0], None

        epoch_keys = fn.random.split(fn.fold_in(key, "epochs"), EPOCHS)
        train, _ = fn.scan(epoch, run.train, epoch_keys)
        return Run(train, carts), None

    return update


def make_optimizer(updates: int) -> fn.Optimizer:
    rate = fn.schedules.linear(RATE, 1.0, 0.0, updates * EPOCHS * MINIBATCHES)
    return fn.chain(fn.optimizers.clip_by_global_norm(MAX_NORM), fn.adam(rate))


def start(optimizer: fn.Optimizer, key: Tensor) -> Run:
    train = fn.init_train_state(MODEL, optimizer, key, torch.zeros(cartpole.NUMBERS))
    carts = fn.vmap(cartpole.reset)(fn.random.split(fn.fold_in(key, "carts"), CARTS))
    return Run(train, carts)


def make_advance(optimizer: fn.Optimizer) -> Callable[[Run], tuple[Run, Tensor]]:
    """Five updates of a run, and the mean return after them."""
    update = make_update(optimizer)

    def advance(run: Run) -> tuple[Run, Tensor]:
        run, _ = fn.scan(update, run, length=EVERY)
        key = fn.fold_in(fn.fold_in(run.train.key, "measure"), run.train.step)
        return run, cartpole.mean_return(
            lambda observed: MODEL.apply(run.train.params, observed)[0]["policy"], key
        )

    return advance


class InPyTorch:
    """A run with autograd: the carts are one batch, and the steps, batches and updates a loop."""

    def __init__(self, updates: int) -> None:
        def tower(outputs: int) -> nn.Module:
            hidden = nn.Linear(cartpole.NUMBERS, UNITS), nn.Tanh(), nn.Linear(UNITS, UNITS)
            return nn.Sequential(*hidden, nn.Tanh(), nn.Linear(UNITS, outputs))

        self.policy, self.value = tower(cartpole.ACTIONS), tower(1)
        self.params = [*self.policy.parameters(), *self.value.parameters()]
        self.optimizer = torch.optim.Adam(self.params, RATE)
        self.schedule = torch.optim.lr_scheduler.LinearLR(
            self.optimizer, 1.0, 0.0, updates * EPOCHS * MINIBATCHES
        )
        self.carts = self.reset()

    def reset(self) -> State:
        steps = torch.zeros(CARTS, dtype=torch.int64)
        return State(0.1 * torch.rand(CARTS, cartpole.NUMBERS) - 0.05, steps, steps > 0)

    def restart(self, where: Tensor, carts: State) -> State:
        observed, steps, fallen = self.reset()
        return State(
            torch.where(where.unsqueeze(-1), observed, carts.observed),
            torch.where(where, steps, carts.steps),
            torch.where(where, fallen, carts.fallen),
        )

    @torch.no_grad()
    def push(self) -> tuple[Seen, Tensor]:
        carts, seen = self.restart(cartpole.cut_off(self.carts), self.carts), []
        for _ in range(STEPS):
            log_p = self.policy(carts.observed).log_softmax(-1)
            action = log_p.exp().multinomial(1)
            after, reward, fallen = cartpole.step(carts, action.squeeze(-1))
            said = log_p.gather(-1, action).squeeze(-1), self.value(carts.observed).squeeze(-1)
            seen.append(Seen(carts.observed, action.squeeze(-1), *said, reward, fallen))
            carts = self.restart(fallen, after)
        self.carts = carts
        stacked = Seen(*[torch.stack(values) for values in zip(*seen, strict=True)])
        return stacked, self.value(carts.observed).squeeze(-1)

    @torch.no_grad()
    def advantages(self, seen: Seen, value: Tensor) -> Tensor:
        found, advantage = [], torch.zeros(CARTS)
        for t in reversed(range(STEPS)):
            discount = DISCOUNT * (~seen.fallen[t]).float()
            surprise = seen.reward[t] + discount * value - seen.value[t]
            advantage = surprise + discount * TRACE * advantage
            value = seen.value[t]
            found.append(advantage)
        return torch.stack(found[::-1])

    def loss(self, observed: Tensor, target: Target) -> Tensor:
        log_p = self.policy(observed).log_softmax(-1)
        ratio = (log_p.gather(-1, target.action[:, None]).squeeze(-1) - target.log_p).exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        gain = torch.minimum(ratio * target.advantage, clipped * target.advantage)
        entropy = -(log_p.exp() * log_p).sum(-1)
        error = self.value(observed).squeeze(-1) - target.value
        return (-gain - ENTROPY_WEIGHT * entropy + VALUE_WEIGHT * error.square() / 2).mean()

    def update(self) -> None:
        seen, last_value = self.push()
        advantage = self.advantages(seen, last_value)
        target = Target(seen.action, seen.log_p, normalized(advantage), advantage + seen.value)
        observed, target = seen.observed.flatten(0, 1), Target(*[x.flatten() for x in target])
        for _ in range(EPOCHS):
            for index in torch.randperm(CARTS * STEPS).chunk(MINIBATCHES):
                self.optimizer.zero_grad()
                self.loss(observed[index], Target(*[x[index] for x in target])).backward()
                nn.utils.clip_grad_norm_(self.params, MAX_NORM)
                self.optimizer.step()
                self.schedule.step()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Balance a pole by proximal policy optimization.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the nets, the carts and the actions")
    add("--seeds", type=int, default=16, metavar="N", help="runs of the population")
    add("--updates", type=int, default=60, help=f"of each run, a multiple of {EVERY}")
    add("--quick", action="store_true", help=f"two runs of {2 * EVERY} updates, for a test")
    add("--output", type=Path, default=Path("ppo.png"), help="the figure's file")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.updates = 2, 2 * EVERY
    require_positive(parser, options, "seeds", "updates")
    if options.updates % EVERY:
        parser.error(f"--updates must be a multiple of {EVERY}")
    return options


def main() -> None:
    options = parse()
    begin = time.perf_counter()
    optimizer = make_optimizer(options.updates)
    keys = fn.random.split(fn.key(options.seed), options.seeds)
    runs, returns = fn.vmap(lambda key: start(optimizer, key))(keys), []
    advance = fn.jit(fn.vmap(make_advance(optimizer)))
    for count in range(EVERY, options.updates + 1, EVERY):
        runs, values = advance(runs)
        returns.append(values)
        seconds, (low, high) = time.perf_counter() - begin, values.aminmax()
        spread = f"median {values.median():.0f} of {low:.0f} to {high:.0f}"
        print(f"{count} updates, {seconds:.1f} s: mean return of the seeds, {spread}")
    solved = (torch.stack(returns) >= cartpole.SOLVED).any(0).sum()
    seconds = time.perf_counter() - begin
    print(f"{solved} of {options.seeds} seeds solved it; {seconds:.1f} s with compilation")

    seconds = cartpole.seconds_of(
        {"program": lambda: advance(runs), "PyTorch": InPyTorch(options.updates).update},
        2 if options.quick else 3,
    )
    steps = CARTS * STEPS
    ours, theirs = options.seeds * EVERY * steps / seconds["program"], steps / seconds["PyTorch"]
    print(
        f"steps of the environment in a second, updates included: {ours:.3g} by {options.seeds} "
        f"seeds in one program, {theirs:.3g} in plain PyTorch; {ours / theirs:.0f} times as many"
    )
    title = f"CartPole by PPO, {options.seeds} seeds in one program"
    cartpole.draw(torch.stack(returns), EVERY * steps, title, options.output)


if __name__ == "__main__":
    main()
