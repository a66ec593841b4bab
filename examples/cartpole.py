"""A cart with a pole on it as pure functions, and how policies that balance the pole are compared.

A force of 10 N pushes the cart to the left or to the right in each of at most 500 steps of 0.02 s.
A step is worth 1 until the pole has fallen or the cart has left its track. The dynamics (Barto,
Sutton and Anderson 1983), the numbers and the ends of an episode are those of gymnasium's
``CartPole-v1``, which counts as solved at a mean return of 475 over 100 episodes.
"""

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from disk import save
from torch import Tensor

import funcnet as fn

GRAVITY, CART_MASS, POLE_MASS, HALF_POLE = 9.8, 1.0, 0.1, 0.5  # m/s^2, kg, kg, m
FORCE, SECONDS = 10.0, 0.02
TRACK, MOST_ANGLE = 2.4, math.radians(12)
NUMBERS, ACTIONS = 4, 2
LIMIT, SOLVED, EPISODES = 500, 475.0, 100

Policy = Callable[[Tensor], Tensor]
"""From what is observed, (..., 4), to the logits of the actions, (..., 2)."""


class State(NamedTuple):
    """Of one cart, or of many with the same leading dimensions."""

    observed: Tensor
    """The cart's position and velocity, the pole's angle and angular velocity, (4,)."""
    steps: Tensor
    """Since the start, an integer."""
    fallen: Tensor
    """Whether the episode is over; what follows is worth 0."""


def reset(key: Tensor) -> State:
    """A cart that nearly stands still in the middle: all four numbers are within 0.05."""
    observed = fn.random.uniform(key, (NUMBERS,), minval=-0.05, maxval=0.05)
    return State(observed, torch.zeros((), dtype=torch.int64), torch.tensor(False))


def step(state: State, action: Tensor) -> tuple[State, Tensor, Tensor]:
    """Push to the left, action 0, or to the right, action 1: ``(state, reward, fallen)``.

    The limit of 500 steps is not here but in `cut_off`, since no policy can see it coming.
    """
    position, velocity, angle, spin = state.observed.unbind(-1)
    force = torch.where(action == 1, FORCE, -FORCE)
    mass, sine, cosine = CART_MASS + POLE_MASS, angle.sin(), angle.cos()
    push = (force + POLE_MASS * HALF_POLE * spin.square() * sine) / mass
    inertia = HALF_POLE * (4 / 3 - POLE_MASS * cosine.square() / mass)
    spin_rate = (GRAVITY * sine - cosine * push) / inertia
    velocity_rate = push - POLE_MASS * HALF_POLE * spin_rate * cosine / mass
    # Euler's method: all four move at the rates of the old state.
    rates = torch.stack([velocity, velocity_rate, spin, spin_rate], -1)
    observed = state.observed + SECONDS * rates
    position, _, angle, _ = observed.unbind(-1)
    fallen = state.fallen | (position.abs() > TRACK) | (angle.abs() > MOST_ANGLE)
    return State(observed, state.steps + 1, fallen), torch.where(state.fallen, 0.0, 1.0), fallen


def cut_off(state: State) -> Tensor:
    return state.steps >= LIMIT


def restart(where: Tensor, state: State, key: Tensor) -> State:
    """A new start where that is so, otherwise the state."""
    return fn.tree.map(lambda new, old: torch.where(where, new, old), reset(key), state)


def draw_action(policy: Policy, state: State, key: Tensor) -> Tensor:
    return fn.random.categorical(key, policy(state.observed))


def episode_return(policy: Policy, key: Tensor) -> Tensor:
    """The reward of all of an episode."""
    start_key, key = fn.random.split(key).unbind()

    def one(state: State, key: Tensor) -> tuple[State, Tensor]:
        state, reward, _ = step(state, draw_action(policy, state, key))
        return state, reward

    return fn.scan(one, reset(start_key), fn.random.split(key, LIMIT))[1].sum()


def mean_return(policy: Policy, key: Tensor) -> Tensor:
    """Of 100 episodes, by which the problem counts as solved."""
    keys = fn.random.split(key, EPISODES)
    return fn.vmap(lambda key: episode_return(policy, key))(keys).mean()


def seconds_of(programs: dict[str, Callable[[], Any]], rounds: int = 5) -> dict[str, float]:
    """The median time of each, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            begin = time.perf_counter()
            program()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def draw(returns: Tensor, steps: int, title: str, path: Path) -> None:
    """Learning curves: mean returns (points, seeds), of which each is after so many more steps."""
    many = returns.shape[1] > 1
    x = torch.arange(1, len(returns) + 1) * steps / 1000
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.axhline(SOLVED, color="gray", linestyle="--", linewidth=1, label="solved")
    thin = {"linewidth": 0.7, "alpha": 0.5} if many else {"marker": "o", "markersize": 3}
    axes.plot(x, returns, color="tab:blue", **thin)
    if many:
        axes.plot(x, returns.median(1).values, color="tab:blue", linewidth=2.5, label="median")
    axes.set(xlabel="steps of the environment, in thousands", title=title, ylim=(0, 1.04 * LIMIT))
    axes.set_ylabel(f"mean return of {EPISODES} episodes")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    save(figure, path)
