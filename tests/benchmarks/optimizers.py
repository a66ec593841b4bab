"""Optimizers alone, beside torch.optim's on the same params and gradients.

    python tests/benchmarks/optimizers.py [--only adam ...]

A workload is a row of `WORKLOADS`: its peers are functions that make a step, a function without
arguments; the first is torch's, by which the others are divided. The peers of a workload take
turns in one process, one thread; each number is the median over the rounds.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import funcnet as fn
from funcnet.core import Box
from funcnet.optimizers.lift import step_params

Step = Callable[[], None]
Params = dict[str, Tensor]


def random_params(count: int, *shape: int, seed: int = 0) -> Params:
    """Params of ``count`` leaves, or gradients for them."""
    generator = torch.Generator().manual_seed(seed)
    return {f"p{i}": torch.randn(shape, generator=generator) for i in range(count)}


def torch_step(
    params: Params,
    make: Callable[..., torch.optim.Optimizer],
    clip: float | None = None,
    schedule: Callable[[int], float] | None = None,
) -> Step:
    """PyTorch's ``step()``, after a clipping of the global norm and before that of a LambdaLR."""
    leaves = [torch.nn.Parameter(leaf.clone()) for leaf in params.values()]
    grads = [*random_params(len(params), *leaves[0].shape, seed=1).values()]
    for leaf in leaves:
        leaf.grad = torch.empty_like(leaf)
    optimizer = make(leaves)
    scheduler = schedule and torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)

    def step() -> None:
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(leaves, clip)
        optimizer.step()
        if scheduler:
            scheduler.step()

    return step


def eager_step(params: Params, optimizer: fn.Optimizer) -> Step:
    """The pure update and `apply_updates`, in a loop."""
    state = optimizer.init_state(params)
    grads = random_params(len(params), *next(iter(params.values())).shape, seed=1)

    def step() -> None:
        nonlocal params, state
        updates, state = optimizer.update(grads, state, params)
        params = fn.apply_updates(params, updates)

    return step


def donated_step(params: Params, optimizer: fn.Optimizer) -> Step:
    """The same in the memory of params and state, as ``train_step(donate=True)`` does it."""
    params = {name: leaf.clone() for name, leaf in params.items()}
    state = optimizer.init_state(params)
    grads = random_params(len(params), *next(iter(params.values())).shape, seed=1)

    def step() -> None:
        nonlocal params, state
        params, state = step_params(optimizer, Box([grads]), state, params, donated=True)

    return step


def jit_step(params: Params, optimizer: fn.Optimizer) -> Step:
    """The same as one program, to which params and state are donated."""

    def update(params_and_state: Any, grads: Params) -> Any:
        params, state = params_and_state
        updates, state = optimizer.update(grads, state, params)
        return fn.apply_updates(params, updates), state

    compiled = fn.jit(update, donate=0)
    grads = random_params(len(params), *next(iter(params.values())).shape, seed=1)
    own = {name: leaf.clone() for name, leaf in params.items()}
    carried = (own, optimizer.init_state(own))

    def step() -> None:
        nonlocal carried
        carried = compiled(carried, grads)

    return step


def cosine(rate: float, steps: int) -> Callable[[Tensor], Tensor]:
    """Falls from the rate to 0."""
    return lambda step: rate * 0.5 * (1.0 + torch.cos(torch.pi * step.double() / steps))


def cosine_of_int(steps: int) -> Callable[[int], float]:
    """The same for LambdaLR, times the rate."""
    return lambda step: 0.5 * (1.0 + math.cos(math.pi * step / steps))


def leaves() -> Params:
    """The params of the first three workloads: 200 leaves of 10 000."""
    return random_params(200, 10_000)


def adam() -> dict[str, Step]:
    """Adam alone, eager."""
    return {
        "torch": torch_step(leaves(), torch.optim.Adam),
        "torch foreach": torch_step(leaves(), lambda p: torch.optim.Adam(p, foreach=True)),
        "funcnet eager": eager_step(leaves(), fn.adam(1e-3)),
        "funcnet eager, donated": donated_step(leaves(), fn.adam(1e-3)),
    }


def adam_fused() -> dict[str, Step]:
    """Adam alone, compiled, beside PyTorch's kernel."""
    return {
        "torch fused": torch_step(leaves(), lambda p: torch.optim.Adam(p, fused=True)),
        "funcnet jit": jit_step(leaves(), fn.adam(1e-3)),
    }


def adamw_clipped() -> dict[str, Step]:
    """AdamW, clipping by the global norm, and a cosine schedule."""
    ours = fn.chain(
        fn.optimizers.clip_by_global_norm(1.0), fn.adamw(cosine(1e-3, 10_000), weight_decay=0.01)
    )
    return {
        "torch fused": torch_step(
            leaves(),
            lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.01, fused=True),
            1.0,
            cosine_of_int(10_000),
        ),
        "funcnet eager, donated": donated_step(leaves(), ours),
        "funcnet jit": jit_step(leaves(), ours),
    }


WORKLOADS: dict[str, Callable[[], dict[str, Step]]] = {
    "adam": adam,
    "adam fused": adam_fused,
    "adamw clipped, cosine": adamw_clipped,
}


def measure(
    steps: dict[str, Step],
    rounds: int,
    calls: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Milliseconds a call: the median over rounds in which the steps take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(calls):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = clock()
            for _ in range(calls):
                step()
            times[name].append((clock() - start) / calls * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="workloads whose names have one of these words")
    parser.add_argument("--rounds", type=int, default=40, help="rounds (default 40)")
    parser.add_argument("--calls", type=int, default=5, help="steps a round (default 5)")
    parser.add_argument("--cpu", action="store_true", help="processor time: on a busy machine")
    options = parser.parse_args()
    clock = time.process_time if options.cpu else time.perf_counter
    torch.set_num_threads(1)
    # As of any training's batch: until a large block was freed, glibc gives all memory that is
    # freed at the top of the heap back to the system, and gets it again page by page.
    torch.empty(2**23)
    print("| workload | peer | ms a step | ratio |\n|---|---|---|---|")
    for name, make in WORKLOADS.items():
        if options.only and not any(word in name for word in options.only):
            continue
        found = measure(make(), options.rounds, options.calls, clock)
        first = next(iter(found.values()))
        for peer, taken in found.items():
            print(f"| {name} | {peer} | {taken:.3f} | {taken / first:.3f} |", flush=True)


if __name__ == "__main__":
    main()
