"""A table of what a model holds, found on the meta device before anything is computed."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet import runtime, tree
from funcnet.core import Layer, Params, Pullback, Tree, map_layers, wrap


class Row(NamedTuple):
    """What one layer holds; sizes are in bytes."""

    path: str
    layer: str
    output: str
    params: int
    param_bytes: int
    state_bytes: int
    residual_bytes: int


class Summary(NamedTuple):
    """The rows of a model's layers, in the order in which they run, and their total."""

    rows: tuple[Row, ...]
    total: Row

    def __repr__(self) -> str:
        header = ("path", "layer", "output", "params", "bytes", "state", "residuals")
        body = [
            (row.path, row.layer, row.output, *(f"{number:,}" for number in row[3:]))
            for row in (*self.rows, self.total)
        ]
        widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]

        def line(cells: tuple[str, ...]) -> str:
            aligned = [
                cell.ljust(width) if column < 3 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            return "  ".join(aligned).rstrip()

        rule = "  ".join("-" * width for width in widths)
        return "\n".join([line(header), rule, *map(line, body[:-1]), rule, line(body[-1])])


def summary(model: Layer, x: Tree, *, train: bool = True) -> Summary:
    """Paths, output shapes, and the sizes of parameters, state and residuals, layer by layer.

    Residuals are what a training step keeps from the forward for the backward pass. A storage
    counts once, for the layer that keeps it first; parameters and state, kept or not, count as
    such. A combinator has a row of its own where it keeps tensors beside those of its children,
    and a `remat` has one for all that is in it.

    Args:
        model: any layer.
        x: an example input; only its shape and dtype matter, and it may be on the meta device.
        train: the mode in which the residuals are counted.

    >>> import funcnet as fn
    >>> summary(fn.serial(fn.linear(25), fn.relu(), fn.linear(2)), torch.ones(100, 2))
    path   layer   output             params  bytes  state  residuals
    -----  ------  -----------------  ------  -----  -----  ---------
    0      linear  float32 (100, 25)      75    300      0        800
    1      relu    float32 (100, 25)       0      0      0     10,000
    2      linear  float32 (100, 2)       52    208      0          0
    -----  ------  -----------------  ------  -----  -----  ---------
    total                                127    508      0     10,800
    """
    example = tree.to_meta(x)
    key = torch.empty(2, dtype=torch.int64, device="meta")
    params, state = model.init(key, example)
    counted = {runtime.storage_id(leaf) for leaf in tree.leaves((params, state))}
    listed: set[int] = set()
    found: dict[tuple[str, str], Row] = {}

    def own(leaves: list[Tensor], seen: set[int]) -> list[Tensor]:
        """The tensors whose storages have not been seen, which then have."""
        fresh = {runtime.storage_id(leaf): leaf for leaf in leaves}
        fresh = {storage: leaf for storage, leaf in fresh.items() if storage not in seen}
        seen.update(fresh)
        return list(fresh.values())

    def watched(path: str, layer: Layer) -> Layer:
        def vjp(
            params: Params, x: Tree, state: Params, **options: Any
        ) -> tuple[Tree, Pullback, Params]:
            y, pullback, new_state = layer.vjp(params, x, state, **options)
            kept = own(tree.leaves(pullback), counted)
            residual_bytes = sum(leaf.untyped_storage().nbytes() for leaf in kept)
            learned, states = tree.leaves(params), tree.leaves(state)
            if layer.children:  # what they have is in their rows, if they ran
                learned, states = own(learned, listed), own(states, listed)
                if not (learned or states or kept):
                    return y, pullback, new_state
            listed.update(runtime.storage_id(leaf) for leaf in (*learned, *states))
            # A shared layer runs several times.
            earlier = found.get((path, layer.name))
            found[path, layer.name] = Row(
                path,
                layer.name,
                tree.describe(y),
                sum(leaf.numel() for leaf in learned),
                _bytes(learned),
                _bytes(states),
                residual_bytes + (earlier.residual_bytes if earlier else 0),
            )
            return y, pullback, new_state

        return layer._replace(vjp=vjp)

    def observed(path: str, layer: Layer) -> Layer:
        return wrap(layer, lambda layer: watched(path, layer))

    y, pullback, _ = map_layers(observed, model).vjp(params, example, state, key=key, train=train)
    del y, pullback  # until here no storage may be freed, and its address used again
    rows = tuple(found.values())
    numbers = [sum(column) for column in zip(*[row[3:] for row in rows], strict=True)]
    return Summary(rows, Row("total", "", "", *(numbers or [0, 0, 0, 0])))


def _bytes(leaves: list[Tensor]) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)
