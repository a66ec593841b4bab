"""Integration with steps that are chosen by their error (Dormand-Prince), and its pullback."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet import tree
from funcnet.backward.equations.loops import (
    first_rows,
    loop_with_values,
    read_row,
    rows_like,
    written,
)
from funcnet.backward.equations.runge_kutta import (
    DOPRI5,
    DOPRI5_ERROR,
    Field,
    plus,
    step,
    step_back,
    time_dtype,
    weighted,
)
from funcnet.core import Params, Tree

_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 10.0
"""The next size is that of an error of 1, times the first, within the other two."""


class Adaptive(NamedTuple):
    """Steps whose estimated error is at most ``atol + rtol |y|``; they end at the given times."""

    times: tuple[float, ...]
    at_all: bool
    steps: int
    rtol: float
    atol: float

    def no_figures(self, y: Tree) -> Params:
        """Those of no call."""
        device = tree.device_of(y)
        kinds = {"steps": torch.int64, "rejected": torch.int64, "reached": time_dtype(y)}
        made = {name: torch.zeros((), dtype=kind, device=device) for name, kind in kinds.items()}
        return {**made, "finished": torch.zeros((), dtype=torch.bool, device=device)}

    def run(self, field: Field, y: Tree, keeps: bool) -> tuple[Tree, Tree, Params, Params]:
        """y at the end or at all times, the steps that were taken, the new state, the figures."""
        times = self._times(y)
        t = times[0]
        k, state = field(t, y)
        zero = torch.zeros((), dtype=torch.int64, device=t.device)
        carry: dict[str, Any] = {"t": t, "y": y, "k": k, "state": state}
        carry["h"] = self._first_size(field, t, y, k)
        carry.update(steps=zero, rejected=zero, next=zero + 1)
        carry["kept"] = ()
        if keeps:
            row = {"t": t, "h": t, "y": y, "next": zero}
            carry["kept"] = tree.map(lambda leaf: rows_like(leaf, self.steps), row)
        carry["outputs"] = ()
        if self.at_all:
            rows = tree.map(lambda leaf: rows_like(leaf, len(self.times)), y)
            carry["outputs"] = tree.map(lambda rows, row: written(rows, row, zero), rows, y)

        def goes_on(carry: Any) -> Tensor:
            tried = carry["steps"] + carry["rejected"]
            return (carry["next"] < len(self.times)) & (tried < self.steps)

        carry = loop_with_values(goes_on, lambda carry: self._tried(field, times, carry), carry)
        finished = carry["next"] == len(self.times)
        result = carry["outputs"] if self.at_all else carry["y"]
        result = tree.map(lambda leaf: torch.where(finished, leaf, torch.nan), result)
        kept = tree.map(lambda rows: first_rows(rows, carry["steps"]), carry["kept"])
        if keeps:
            kept["steps"] = carry["steps"]
        figures = {"steps": carry["steps"], "rejected": carry["rejected"], "reached": carry["t"]}
        return result, kept, carry["state"], {**figures, "finished": finished}

    def _tried(self, field: Field, times: Tensor, carry: Any) -> Any:
        """The carry after a step was tried: taken, or rejected for a smaller one."""
        t, y, count = carry["t"], carry["y"], carry["steps"]
        end = read_row(times, carry["next"])
        ends = carry["h"] >= end - t
        h = torch.where(ends, end - t, carry["h"])
        new_t = torch.where(ends, end, t + h)
        new_y, ks, _ = step(field, DOPRI5, t, h, y, carry["k"])
        new_k, state = field(new_t, new_y)
        error = self._error(h, y, new_y, [*ks, new_k])
        taken = error <= 1.0
        size = _next_size(h, error, taken)
        # A step that was cut at a time says nothing against the size it would have had.
        size = torch.where(taken & ends, torch.maximum(size, carry["h"]), size)

        def chosen(new: Tree, old: Tree) -> Tree:
            return tree.map(lambda new, old: torch.where(taken, new, old), new, old)

        kept = carry["kept"]
        if kept:
            # A row that was not taken is written over by the next one.
            row = {"t": t, "h": h, "y": y, "next": torch.where(ends, carry["next"], 0)}
            kept = tree.map(lambda rows, row: written(rows, row, count), kept, row)
        outputs = carry["outputs"]
        if self.at_all:
            outputs = tree.map(lambda rows, row: written(rows, row, carry["next"]), outputs, new_y)
        return {
            "t": torch.where(taken, new_t, t),
            "y": chosen(new_y, y),
            "k": chosen(new_k, carry["k"]),
            "state": state,
            "h": size,
            "steps": count + taken,
            "rejected": carry["rejected"] + ~taken,
            "next": carry["next"] + (taken & ends),
            "kept": kept,
            "outputs": outputs,
        }

    def run_back(self, field: Field, kept: Tree, dy: Tree, total: Any) -> tuple[Any, Tree]:
        """dparams and dx of the cotangent of y at the end or at all times."""
        rows = {name: part for name, part in kept.items() if name != "steps"}
        first = tree.map(lambda leaf: leaf[0], dy) if self.at_all else dy
        nothing = tree.map(torch.zeros_like, first)
        carry = {"left": kept["steps"], "dy": nothing if self.at_all else dy, "total": total}

        def body(carry: Any) -> Any:
            place = carry["left"] - 1
            row = tree.map(lambda rows: read_row(rows, place), rows)
            after = carry["dy"]
            if self.at_all:
                # The cotangent of the y at the end of a step comes from there, if it is an output.
                ends = row["next"] > 0
                outer = tree.map(lambda leaf: read_row(leaf, row["next"]), dy)
                after = tree.map(lambda d, more: d + torch.where(ends, more, 0), after, outer)
            total, before = step_back(
                field, DOPRI5, row["t"], row["h"], row["y"], after, carry["total"]
            )
            return {"left": place, "dy": before, "total": total}

        carry = loop_with_values(lambda carry: carry["left"] > 0, body, carry)
        dx = tree.map(torch.add, carry["dy"], first) if self.at_all else carry["dy"]
        return carry["total"], dx

    def _times(self, y: Tree) -> Tensor:
        kind: Any = {"dtype": time_dtype(y), "device": tree.device_of(y)}
        return torch.stack([torch.full((), time, **kind) for time in self.times])

    def _error(self, h: Tensor, y: Tree, new_y: Tree, ks: list[Tree]) -> Tensor:
        """The estimated error of a step over what is allowed: no derivative goes through it."""

        def one(before: Tensor, after: Tensor, *stages: Tensor) -> Tensor:
            error = h.to(before.dtype) * weighted(DOPRI5_ERROR, stages)
            return error / (self.atol + self.rtol * torch.maximum(before.abs(), after.abs()))

        return _root_mean_square(tree.map(one, *map(_constant, (y, new_y, *ks)))).to(h.dtype)

    def _first_size(self, field: Field, t: Tensor, y: Tree, k: Tree) -> Tensor:
        """The size of the first step: Hairer, Norsett and Wanner 1993, II.4."""
        y, k = _constant(y), _constant(k)
        scale = tree.map(lambda leaf: self.atol + self.rtol * leaf.abs(), y)
        size = _root_mean_square(tree.map(torch.div, y, scale))
        slope = _root_mean_square(tree.map(torch.div, k, scale))
        flat = (size < 1e-5) | (slope < 1e-5)
        h = torch.where(flat, 1e-6, 0.01 * size / torch.where(flat, 1.0, slope)).to(t.dtype)
        bent = _constant(field(t + h, plus(y, h, (1.0,), [k]))[0])
        change = tree.map(lambda after, before, scale: (after - before) / scale, bent, k, scale)
        curve = torch.maximum(slope, _root_mean_square(change) / h).to(t.dtype)
        straight = curve <= 1e-15
        longer = (0.01 / torch.where(straight, 1.0, curve)) ** (1 / 5)
        longer = torch.where(straight, (h * 1e-3).clamp(min=1e-6), longer)
        return torch.minimum(100 * h, longer)


def _constant(tensors: Tree) -> Tree:
    return tree.map(torch.Tensor.detach, tensors)


def _next_size(h: Tensor, error: Tensor, taken: Tensor) -> Tensor:
    factor = _SAFETY * error.clamp(min=1e-10) ** (-1 / 5)
    factor = torch.where(taken, factor.clamp(1.0, _GROW), factor.clamp(_SHRINK, 1.0))
    return h * torch.nan_to_num(factor, nan=_SHRINK)


def _root_mean_square(values: Tree) -> Tensor:
    return tree.global_norm(values) / max(tree.count(values), 1) ** 0.5
