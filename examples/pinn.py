"""Solve Burgers' equation by a physics-informed net, beside its exact solution.

    python examples/pinn.py --output examples/figures/pinn.png
    python examples/pinn.py --quick

The equation, of Raissi et al. 2019, whose solution becomes a shock at x = 0:

    u_t + u u_x = nu u_xx,  nu = 0.01 / pi,  u(0, x) = -sin(pi x),  u(t, -1) = u(t, 1) = 0

The net is u of (x, t), and its loss is the equation's own: the squared residual at random points,
and the squared error at the start and the edges. Three derivatives meet in it:

- u_x and u_t are what the net's pullback gives for ones, by explicit rules;
- u_xx is the derivative of that in the direction of x, by `fn.jvp`;
- the gradient of the loss by the params, through both, is ``torch.func.grad`` of a plain function.

`fn.jit` makes one program of all that, with Adam, the points drawn anew for each step and the loop
over the steps in it.

Prints the relative L2 error on a grid, ``|u - exact| / |exact|``, as it falls, and the time of a
step of Adam beside the same step in plain PyTorch, where autograd takes the derivatives.
"""

import argparse
import math
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from cartpole import seconds_of
from disk import require_positive
from torch import Tensor, nn

import funcnet as fn

NU = 0.01 / math.pi
POINTS, KNOWN = 1000, 200
"""Of a batch: where the equation is to hold, and where u is known, half at the start."""
LAYERS, WIDTH = 4, 32
CHUNKS = 10
"""Calls of the program, after each of which the error is printed."""

net = fn.serial(*[fn.linear(WIDTH), fn.tanh()] * LAYERS, fn.linear(1))
Batch = tuple[Tensor, fn.Tree]


def residual(params: fn.Params, points: Tensor) -> Tensor:
    """``u_t + u u_x - nu u_xx`` at points (n, 2) of x and t, (n,)."""

    def slopes(points: Tensor) -> tuple[Tensor, Tensor]:
        """u, and its derivatives by x and t."""
        u, pullback, _ = net.vjp(params, points)
        return u[:, 0], pullback(torch.ones_like(u), params=False)[1]

    along_x = torch.tensor([1.0, 0.0], dtype=points.dtype).expand_as(points)
    (u, slope), (_, change) = fn.jvp(slopes, (points,), (along_x,))
    return slope[:, 1] + u * slope[:, 0] - NU * change[:, 0]


def loss(params: fn.Params, batch: Batch) -> Tensor:
    points, (known, u) = batch
    wrong = net.apply(params, known)[0][:, 0] - u
    return residual(params, points).square().mean() + wrong.square().mean()


def value_and_grad(params: fn.Params, batch: Batch) -> tuple[Tensor, fn.Params]:
    grads, value = torch.func.grad_and_value(loss)(params, batch)
    return value, grads


def draw(key: Tensor, n: int = POINTS, known: int = KNOWN) -> Batch:
    """Points of [-1, 1] x [0, 1], uniform; and points at the start and the edges, with their u."""
    keys = fn.random.split(key, 3)
    x, t = (fn.random.uniform(each, (n,)) for each in keys[:2])
    place = 2 * fn.random.uniform(keys[2], (known,)) - 1
    start, edge = place[: known // 2], place[known // 2 :]
    at_start = torch.stack([start, torch.zeros_like(start)], 1)
    at_edge = torch.stack([edge.sign(), edge.abs()], 1)
    u = torch.cat([-torch.sin(math.pi * start), torch.zeros_like(edge)])
    return torch.stack([2 * x - 1, t], 1), (torch.cat([at_start, at_edge]), u)


def exact(x: Tensor, t: Tensor) -> Tensor:
    """The solution for t > 0, by Cole and Hopf.

    It is a ratio of two integrals of a normal density of variance 2 nu t around x, by the
    quadrature of Gauss and Hermite:

        u(t, x) = -E[sin(pi y) f(y)] / E[f(y)],   f(y) = exp(-cos(pi y) / (2 pi nu))
    """
    nodes, weights = (torch.from_numpy(each) for each in np.polynomial.hermite.hermgauss(200))
    y = math.pi * (x[..., None] - (4 * NU * t[..., None]).sqrt() * nodes)
    f = weights * torch.exp(-torch.cos(y) / (2 * math.pi * NU))
    return -(y.sin() * f).sum(-1) / f.sum(-1)


class Grid:
    """A grid of points, without the start, and the solution on it."""

    def __init__(self) -> None:
        self.x = torch.linspace(-1, 1, 201, dtype=torch.float64)
        self.t = torch.linspace(0, 1, 101, dtype=torch.float64)[1:]
        self.points = torch.cartesian_prod(self.x, self.t)
        self.u = exact(*self.points.unbind(1)).view(201, 100)

    def found(self, params: fn.Params) -> Tensor:
        """What the net says, of float64."""
        params = fn.tree.map(Tensor.double, params)
        return net.apply(params, self.points)[0].view(201, 100)

    def error(self, params: fn.Params) -> float:
        return ((self.found(params) - self.u).norm() / self.u.norm()).item()


class ByAdam:
    """The training, with points drawn anew for each step."""

    def __init__(self, key: Tensor, steps: int) -> None:
        optimizer = fn.adam(fn.schedules.linear(3e-3, 1.0, 0.0, steps))
        self.params, _ = net.init(fn.fold_in(key, "net"), torch.zeros(1, 2))
        self.opt_state = optimizer.init_state(self.params)

        def step(carry: fn.Tree, count: Tensor) -> tuple[fn.Tree, Tensor]:
            params, opt_state = carry
            value, grads = value_and_grad(params, draw(fn.fold_in(key, count)))
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (fn.apply_updates(params, updates), opt_state), value

        self._run = fn.jit(lambda carry, counts: fn.scan(step, carry, counts), donate=0)

    def run(self, counts: Tensor) -> Tensor:
        """Steps of these numbers; gives their losses."""
        (self.params, self.opt_state), values = self._run((self.params, self.opt_state), counts)
        return values


class InPyTorch:
    """The same steps by autograd and `torch.optim`."""

    def __init__(self, steps: int) -> None:
        hidden = [
            each
            for extent in (2, *[WIDTH] * (LAYERS - 1))
            for each in (nn.Linear(extent, WIDTH), nn.Tanh())
        ]
        self.net = nn.Sequential(*hidden, nn.Linear(WIDTH, 1))
        self.optimizer = torch.optim.Adam(self.net.parameters(), 3e-3)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, steps)

    def loss(self, batch: Batch) -> Tensor:
        points, (known, target) = batch
        points = points.detach().requires_grad_()
        u = self.net(points)
        (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        (change,) = torch.autograd.grad(slope[:, 0].sum(), points, create_graph=True)
        equation = slope[:, 1] + u[:, 0] * slope[:, 0] - NU * change[:, 0]
        wrong = self.net(known)[:, 0] - target
        return equation.square().mean() + wrong.square().mean()

    def run(self, counts: Tensor) -> None:
        for _ in counts:
            start, edge = 2 * torch.rand(KNOWN // 2) - 1, 2 * torch.rand(KNOWN // 2) - 1
            at_start = torch.stack([start, torch.zeros_like(start)], 1)
            at_edge = torch.stack([edge.sign(), edge.abs()], 1)
            u = torch.cat([-torch.sin(math.pi * start), torch.zeros_like(edge)])
            points = torch.rand(POINTS, 2) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])
            value = self.loss((points, (torch.cat([at_start, at_edge]), u)))
            self.optimizer.zero_grad()
            value.backward()
            self.optimizer.step()
            self.schedule.step()


def draw_figure(grid: Grid, params: fn.Params, path: Path) -> None:
    found = grid.found(params)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    box = {"origin": "lower", "extent": (0, 1, -1, 1), "aspect": "auto"}
    image = left.imshow(found.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, **box)
    figure.colorbar(image)
    left.set(title="$u(t, x)$ of the net", xlabel="$t$", ylabel="$x$")
    wrong = (found - grid.u).abs().clamp(min=1e-6).log10()
    figure.colorbar(middle.imshow(wrong.numpy(), cmap="magma", vmin=-5, vmax=-1, **box))
    middle.set(title="$\\log_{10}$ of its error", xlabel="$t$", ylabel="$x$")
    for place, color in zip((24, 49, 99), ("tab:blue", "tab:orange", "tab:red"), strict=True):
        right.plot(grid.x, found[:, place], color=color, label=f"$t = {grid.t[place]:.2f}$")
        right.plot(grid.x[::5], grid.u[::5, place], ".", color=color, markersize=5)
    right.set(title="The net (lines), the solution (dots)", xlabel="$x$")
    right.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Solve Burgers' equation by a physics-informed net.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the net and the points")
    add("--steps", type=int, default=40_000, help=f"of Adam, a multiple of {CHUNKS}")
    add("--quick", action="store_true", help="100 steps, for a test")
    add("--output", type=Path, default=Path("pinn.png"), help="the figure's file")
    options = parser.parse_args()
    if options.quick:
        options.steps = 100
    require_positive(parser, options, "steps")
    if options.steps % CHUNKS:
        parser.error(f"--steps must be a multiple of {CHUNKS}")
    return options


def main() -> None:
    options = parse()
    key, grid, begin = fn.key(options.seed), Grid(), time.perf_counter()

    adam, chunk = ByAdam(key, options.steps), options.steps // CHUNKS
    for first in range(0, options.steps, chunk):
        values = adam.run(torch.arange(first, first + chunk))
        seconds, error = time.perf_counter() - begin, grid.error(adam.params)
        print(
            f"{first + chunk} steps, {seconds:.1f} s: loss {values[-100:].mean():.1e}, "
            f"relative L2 error {error:.2e}",
            flush=True,
        )
    draw_figure(grid, adam.params, options.output)

    counts, peer = torch.arange(20 if options.quick else 300), InPyTorch(options.steps)
    programs = {"program": lambda: adam.run(counts), "PyTorch": lambda: peer.run(counts)}
    ours, theirs = (1000 * each / len(counts) for each in seconds_of(programs, 3).values())
    print(
        f"a step of Adam takes {ours:.2f} ms in the program, {theirs:.2f} ms in plain PyTorch: "
        f"{ours / theirs:.2f} of that"
    )


if __name__ == "__main__":
    main()
