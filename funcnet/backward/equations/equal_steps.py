"""Integration with a number of equal steps from each time to the next, and its pullback."""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet import tree
from funcnet.backward.equations.runge_kutta import Field, Method, step, step_back, time_dtype
from funcnet.control_flow import scan
from funcnet.core import EMPTY, Params, Tree


class Equal(NamedTuple):
    """Equal steps, in groups: the y before each group is kept."""

    times: tuple[float, ...]
    at_all: bool
    steps: int
    method: Method
    keep: int

    def no_figures(self, y: Tree) -> Params:
        """There are none to tell of steps that are known beforehand."""
        return EMPTY

    def run(self, field: Field, y: Tree, keeps: bool) -> tuple[Tree, Tree, Params, Params]:
        """y at the end or at all times, the y before each group, the new state, and no figures."""

        def group(carry: Any, grid: Any) -> tuple[Any, Any]:
            start = carry[0] if keeps else None
            if self.keep == 1:
                return one(carry, tree.map(lambda leaf: leaf[0], grid))[0], start
            return scan(one, carry, grid)[0], start

        def one(carry: Any, at: Any) -> tuple[Any, Any]:
            after, _, state = step(field, self.method, at["t"], at["h"], carry[0])
            return (after, state), None

        def interval(carry: Any, grid: Any) -> tuple[Any, Any]:
            carry, starts = scan(group, carry, grid)
            return carry, (carry[0] if self.at_all else None, starts)

        (last, state), (ys, starts) = scan(interval, (y, field.state), self._grid(y))
        if self.at_all:
            last = tree.map(lambda first, later: torch.cat([first[None], later]), y, ys)
        return last, starts, state, EMPTY

    def run_back(self, field: Field, starts: Tree, dy: Tree, total: Any) -> tuple[Any, Tree]:
        """dparams and dx of the cotangent of y at the end or at all times."""

        def one(carry: Any, each: Any) -> tuple[Any, Any]:
            dy, total = carry
            y, at = each
            total, dy = step_back(field, self.method, at["t"], at["h"], y, dy, total)
            return (dy, total), None

        def group(carry: Any, each: Any) -> tuple[Any, Any]:
            y, grid = each
            if self.keep == 1:
                return one(carry, (y, tree.map(lambda leaf: leaf[0], grid)))
            _, ys = scan(again, y, grid)
            return scan(one, carry, (ys, grid), reverse=True)

        def again(y: Tree, at: Any) -> tuple[Tree, Tree]:
            return step(field, self.method, at["t"], at["h"], y)[0], y

        def interval(carry: Any, each: Any) -> tuple[Any, Any]:
            starts, grid, dy = each
            carry = tree.map(torch.add, carry[0], dy), carry[1]
            return scan(group, carry, (starts, grid), reverse=True)

        grid = self._grid(tree.map(lambda leaf: leaf[0], dy) if self.at_all else dy)
        if self.at_all:
            first, later = (tree.map(part, dy) for part in (lambda d: d[0], lambda d: d[1:]))
        else:
            first, later = None, tree.map(lambda leaf: leaf[None], dy)
        nothing = tree.map(lambda leaf: torch.zeros_like(leaf[0]), later)
        (dx, total), _ = scan(interval, (nothing, total), (starts, grid, later), reverse=True)
        return total, dx if first is None else tree.map(torch.add, dx, first)

    def _grid(self, y: Tree) -> dict[str, Tensor]:
        """The times and sizes of the steps: (intervals, groups, steps of a group)."""
        kind: Any = {"dtype": time_dtype(y), "device": tree.device_of(y)}
        numbers = torch.arange(self.steps, **kind)
        sizes = [(after - before) / self.steps for before, after in pairwise(self.times)]
        ts = [before + h * numbers for before, h in zip(self.times, sizes, strict=False)]
        hs = [torch.full((self.steps,), h, **kind) for h in sizes]
        shape = (len(sizes), self.steps // self.keep, self.keep)
        return {"t": torch.stack(ts).reshape(shape), "h": torch.stack(hs).reshape(shape)}
