"""An eager training step beside PyTorch's, and beside the same operations written by hand.

    python tests/benchmarks/step.py

The net is 2-25-25-25-2 with ReLU, the loss MSE, the batch 100 points, float32, one thread. The
peers take turns in one process; each number is the median over the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import funcnet as fn

Step = Callable[[], None]


def make_torch_step(
    x: torch.Tensor, target: torch.Tensor, make: Callable[..., torch.optim.Optimizer]
) -> Step:
    """torch.nn, autograd and torch.optim with their default settings."""
    net = nn.Sequential(
        nn.Linear(2, 25), nn.ReLU(), nn.Linear(25, 25), nn.ReLU(),
        nn.Linear(25, 25), nn.ReLU(), nn.Linear(25, 2),
    )  # fmt: skip
    loss, optimizer = nn.MSELoss(), make(net.parameters())

    def step() -> None:
        optimizer.zero_grad()
        loss(net(x), target).backward()
        optimizer.step()

    return step


def make_funcnet_step(
    x: torch.Tensor, target: torch.Tensor, optimizer: fn.Optimizer, inference: bool = False
) -> Step:
    """funcnet's pure step, called in a loop."""
    model = fn.serial(
        fn.linear(25), fn.relu(), fn.linear(25), fn.relu(),
        fn.linear(25), fn.relu(), fn.linear(2),
    )  # fmt: skip
    pure = fn.train_step(model, fn.mse(), optimizer)
    state = fn.init_train_state(model, optimizer, fn.key(0), x)

    def step() -> None:
        nonlocal state
        state, _ = pure(state, (x, target))

    return torch.inference_mode()(step) if inference else step


def make_hand_step(x: torch.Tensor, target: torch.Tensor, lr: float) -> Step:
    """SGD by the same torch operations, pure too, with no trees and no functions."""
    net = fn.serial(fn.linear(25), fn.linear(25), fn.linear(25), fn.linear(2))
    params = list(fn.tree.to_dotted(net.init(fn.key(0), x)[0]).values())
    relu_backward = torch.ops.aten.threshold_backward.default

    def step() -> None:
        nonlocal params
        w1, b1, w2, b2, w3, b3, w4, b4 = params
        h1 = torch.relu(F.linear(x, w1, b1))
        h2 = torch.relu(F.linear(h1, w2, b2))
        h3 = torch.relu(F.linear(h2, w3, b3))
        error = F.linear(h3, w4, b4) - target
        error.square().mean()
        dy = error * (2 / error.numel())
        dw4, db4 = dy.t().mm(h3), dy.sum(0)
        dy = relu_backward(dy.mm(w4), h3, 0)
        dw3, db3 = dy.t().mm(h2), dy.sum(0)
        dy = relu_backward(dy.mm(w3), h2, 0)
        dw2, db2 = dy.t().mm(h1), dy.sum(0)
        dy = relu_backward(dy.mm(w2), h1, 0)
        grads = (dy.t().mm(x), dy.sum(0), dw2, db2, dw3, db3, dw4, db4)
        updates = [-lr * grad for grad in grads]
        params = [param + update for param, update in zip(params, updates, strict=True)]

    return step


def measure(steps: dict[str, Step], rounds: int, calls: int) -> dict[str, float]:
    """Microseconds a call: the median over rounds in which the steps take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(calls):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(calls):
                step()
            times[name].append((time.perf_counter() - start) / calls * 1e6)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50, help="rounds (default 50)")
    parser.add_argument("--calls", type=int, default=200, help="steps a round (default 200)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, target = fn.random.normal(fn.key(1), (100, 2)), fn.random.normal(fn.key(2), (100, 2))
    lr = 1e-3
    steps = {
        "torch SGD": make_torch_step(x, target, lambda params: torch.optim.SGD(params, lr)),
        "torch Adam": make_torch_step(x, target, lambda params: torch.optim.Adam(params, lr)),
        "by hand SGD": make_hand_step(x, target, lr),
        "funcnet SGD": make_funcnet_step(x, target, fn.sgd(lr)),
        "funcnet SGD, inference mode": make_funcnet_step(x, target, fn.sgd(lr), True),
        "funcnet Adam": make_funcnet_step(x, target, fn.adam(lr)),
        "funcnet Adam, inference mode": make_funcnet_step(x, target, fn.adam(lr), True),
    }
    found = measure(steps, options.rounds, options.calls)
    print("| step | us | / torch | / by hand |")
    print("|---|---|---|---|")
    for name, microseconds in found.items():
        peer = found["torch Adam" if "Adam" in name else "torch SGD"]
        by_hand = f"{microseconds / found['by hand SGD']:.2f}" if "SGD" in name else ""
        print(f"| {name} | {microseconds:.1f} | {microseconds / peer:.3f} | {by_hand} |")


if __name__ == "__main__":
    main()
