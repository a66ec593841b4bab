"""Runs a model on the meta device, layer by layer watched, and counts."""

from collections import Counter
from collections.abc import Callable
from operator import add
from typing import Any

import torch
from torch import Tensor

from funcnet import runtime, tree
from funcnet.core import Grads, Layer, Params, Pullback, Tree, map_layers, pull, wrap
from funcnet.deferred import defers
from funcnet.summaries.table import Row, Summary

Name = tuple[str, str]
"""The path of a layer and what it is called: a `residual` has the path of the layer in it."""


def summary(model: Layer, x: Tree, *, train: bool = True) -> Summary:
    """Layer by layer: the output's shape, the sizes of what it holds, and its FLOPs.

    Residuals are what a training step keeps from the forward for the backward pass. A storage
    counts once, for the layer that keeps it first; parameters and state, kept or not, count as
    such. FLOPs are those of matrix products, convolutions and attention, a multiplication and an
    addition as two, as ``torch.utils.flop_counter`` counts them; elementwise operations count
    nothing. ``backward`` is the backward pass of a training step, which needs no gradient of x.

    A combinator has a row of its own where it holds or computes something beside its children,
    and a `remat` has one for all that is in it. In print, equal blocks stand once, as ``x`` their
    number.

    Args:
        model: any layer.
        x: an example input; only its shape and dtype matter, and it may be on the meta device.
        train: the mode in which the residuals are counted.

    >>> net = fn.serial(fn.linear(25), *[fn.relu(), fn.linear(25)] * 2, fn.relu(), fn.linear(2))
    >>> summary(net, torch.ones(100, 2))
    path   layer   output             params  bytes  state  residuals  forward  backward
    -----  ------  -----------------  ------  -----  -----  ---------  -------  --------
    0      linear  float32 (100, 25)      75    300      0        800      10k       10k
    1 - 4  x 2
      1    relu    float32 (100, 25)       0      0      0     10,000        0         0
      2    linear  float32 (100, 25)     650  2,600      0          0     125k      250k
    5      relu    float32 (100, 25)       0      0      0     10,000        0         0
    6      linear  float32 (100, 2)       52    208      0          0      10k       20k
    -----  ------  -----------------  ------  -----  -----  ---------  -------  --------
    total                              1,427  5,708      0     30,800     270k      530k
    """
    example = tree.to_meta(x)
    key = torch.empty(2, dtype=torch.int64, device="meta")
    params, state = model.init(key, example)
    sizes, flops = _Sizes(params, state), _Flops()
    for each in (sizes, flops):
        each.run(model, params, example, state, key=key, train=train)
    rows = []
    for name, row in sizes.rows.items():
        forward, backward = flops.forward[name], flops.backward[name]
        row = row._replace(forward_flops=forward, backward_flops=backward)
        if name in sizes.leaves or any(row.numbers):
            rows.append(row)
    total = Row("total", "", "")
    for row in rows:
        total = total.with_numbers([*map(add, total.numbers, row.numbers)])
    return Summary(tuple(rows), total)


class _Run:
    """A layer that runs: what its children have so far."""

    def __init__(self, name: Name, is_loop: bool) -> None:
        self.name, self.is_loop = name, is_loop
        self.children = 0  # how many ran
        self.sum = 0  # of their residuals, or FLOPs


class _Sizes:
    """What the layers of a model hold, by one forward pass."""

    def __init__(self, params: Params, state: Params) -> None:
        self.rows: dict[Name, Row] = {}
        self.leaves: set[Name] = set()  # the layers without children
        self.owned = [{*map(runtime.storage_id, tree.leaves(each))} for each in (params, state)]
        self.listed: set[tuple[int, int]] = set()  # params and state that are in a row
        self.counted = self.owned[0] | self.owned[1]  # storages that are no new residuals
        self.held: list[Any] = []  # until the end no storage may go, and its address come again
        self.runs: list[_Run] = []
        self.loops: dict[Name, tuple[Name, ...]] = {}  # those that a layer is in
        self.copies: dict[Name, int] = {}  # of a loop

    def run(self, model: Layer, *args: Any, **options: Any) -> None:
        """Fill the rows."""
        map_layers(self.watched, model).vjp(*args, **options)
        for name, loops in self.loops.items():
            copies = tuple([(*loop, self.copies[loop]) for loop in loops])
            self.rows[name] = self.rows[name]._replace(copies=copies)

    def watched(self, path: str, layer: Layer) -> Layer:
        name, is_loop = (path, layer.name), layer.name in ("repeat", "stacked")
        if not layer.children:
            self.leaves.add(name)

        def vjp(
            params: Params, x: Tree, state: Params, **options: Any
        ) -> tuple[Tree, Pullback, Params]:
            run, loops = _Run(name, is_loop), [each for each in self.runs if each.is_loop]
            self.runs.append(run)
            y, pullback, new_state = layer.vjp(params, x, state, **options)
            self.runs.pop()
            self.held.append(pullback)
            kept = tree.leaves(pullback)
            if loops:  # what it keeps is copied into the loop's residuals
                whole = [leaf for leaf in kept if runtime.storage_id(leaf) not in self.counted]
                residuals = tree.bytes(whole) - run.sum
            else:
                fresh = {runtime.storage_id(leaf): leaf for leaf in kept}
                fresh = {each: leaf for each, leaf in fresh.items() if each not in self.counted}
                residuals = sum([leaf.untyped_storage().nbytes() for leaf in fresh.values()])
                self.counted |= fresh.keys()
                if is_loop:
                    residuals -= run.sum
            if self.runs:
                self.runs[-1].children += 1
                self.runs[-1].sum += residuals + run.sum
            if is_loop:
                self.copies[name] = run.children
            self.loops[name] = tuple([each.name for each in loops])
            learned, states = [self.fresh(tree.leaves((params, state)), own) for own in self.owned]
            sizes = tree.count(learned), tree.bytes(learned), tree.bytes(states), residuals, 0, 0
            # A shared layer runs several times.
            row = self.rows.get(name, Row(*name, tree.describe(y)))
            self.rows[name] = row._replace(output=tree.describe(y)).with_numbers(
                [*map(add, row.numbers, sizes)]
            )
            return y, pullback, new_state

        return wrap(layer, lambda layer: layer._replace(vjp=vjp))

    def fresh(self, leaves: list[Tensor], owned: set[int]) -> list[Tensor]:
        """The leaves that are among the model's own, and in no row yet. A copy's are slices."""
        found = {(runtime.storage_id(leaf), int(leaf.storage_offset())): leaf for leaf in leaves}
        places = [each for each in found if each[0] in owned and each not in self.listed]
        self.listed.update(places)
        return [found[each] for each in places]


def flop_counter() -> Any:
    """A FlopCounterMode of torch's that knows the kernels of attention that layers use."""
    # Here, since it loads much of torch that funcnet has no other use for.
    from torch.utils.flop_counter import (
        FlopCounterMode,
        sdpa_backward_flop_count,
        sdpa_flop_count,
    )

    def attention(*shapes: Any, **_: Any) -> int:
        return sdpa_flop_count(*shapes[:3])

    def attention_backward(*shapes: Any, **_: Any) -> int:
        return sdpa_backward_flop_count(*shapes[:4])

    kernels = {
        runtime.flash_attention: attention,
        runtime.flash_attention_backward: attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=kernels)


class _Flops:
    """What the layers of a model compute, by a forward and a backward pass."""

    def __init__(self) -> None:
        self.counter = flop_counter()
        self.forward: Counter[Name] = Counter()
        self.backward: Counter[Name] = Counter()
        self.now = self.forward
        self.runs: list[_Run] = []

    def run(self, model: Layer, *args: Any, **options: Any) -> None:
        """Fill the counts."""
        with self.counter:
            y, pullback, _ = map_layers(self.watched, model).vjp(*args, **options)
            self.now = self.backward
            dy = tree.map(lambda leaf: leaf if leaf.is_floating_point() else None, y)
            pullback(dy, params=True, x=False)

    def count(self, name: Name, function: Callable[[], Any]) -> Any:
        """The function's result; its FLOPs, less those counted inside, are the layer's."""
        before, run = self.counter.get_total_flops(), _Run(name, False)
        self.runs.append(run)
        result = function()
        self.runs.pop()
        total = self.counter.get_total_flops() - before
        self.now[name] += total - run.sum
        if self.runs:
            self.runs[-1].sum += total
        return result

    def watched(self, path: str, layer: Layer) -> Layer:
        name = path, layer.name

        def vjp(*args: Any, **options: Any) -> tuple[Tree, Pullback, Params]:
            if self.now is self.backward:  # what a remat computes again is its own
                return layer.vjp(*args, **options)
            y, pullback, state = self.count(name, lambda: layer.vjp(*args, **options))
            return y, Pullback(counted_rule, {"": pullback}, (self, name)), state

        return wrap(layer, lambda layer: layer._replace(vjp=vjp))


@defers
def counted_rule(
    residuals: Any, dy: Tree, flops: _Flops, name: Name, *, params: bool, x: bool
) -> Grads:
    """The layer's pullback, with its FLOPs counted."""
    return flops.count(name, lambda: pull(residuals, "", dy, params=params, x=x))
