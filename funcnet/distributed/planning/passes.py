"""What the forward and the backward pass of one micro-batch take, on the meta device."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from funcnet import runtime, tree
from funcnet.combinators.repeat import repeat
from funcnet.core import Layer, Loss, Tree, defer, map_layers
from funcnet.distributed.planning.traffic import Traffic, merged, recorded
from funcnet.summaries.observe import flop_counter


class Passes(NamedTuple):
    """What the two passes keep, compute and communicate; and the output."""

    residuals: int
    forward_flops: int
    backward_flops: int
    weight_flops: int
    largest: int
    """The bytes of the tensors of the largest collective."""

    forward: tuple[Traffic, ...]
    backward: tuple[Traffic, ...]
    y: Tree


def meta_key() -> Tensor:
    """A key without values."""
    return torch.empty(2, dtype=torch.int64, device="meta")


def passes_of(
    layer: Layer,
    x: Tree,
    judged: tuple[Loss | None, Tree],
    sizes: Mapping[str, int],
    *,
    is_first: bool,
    splits: bool,
) -> Passes:
    """Run a layer forwards and backwards.

    Args:
        layer: a stage.
        x: a micro-batch, on the meta device.
        judged: the loss and its target, if it is the last stage.
        sizes: of the mesh's axes.
        is_first: whether nobody needs the gradient of x.
        splits: whether to tell the FLOPs of the gradients of params from the others.
    """
    key = meta_key()
    params, state = layer.init(key, x)
    with flop_counter() as flops, recorded(sizes) as forward:
        y, pullback, _ = layer.vjp(params, x, state, key=key, train=True)
        residuals = _own_bytes(pullback, (params, state))
        dy = y
        loss, target = judged
        if loss is not None:
            _, loss_pullback = loss.vjp(y, target)
            residuals += _own_bytes(loss_pullback, (params, pullback, target))
    forward_flops = flops.get_total_flops()
    with flop_counter() as flops, recorded(sizes) as backward:
        if loss is not None:
            dy = loss_pullback()
        pullback(dy, params=True, x=not is_first)
    backward_flops, weight_flops = flops.get_total_flops(), 0
    if splits:
        with flop_counter() as flops:
            defer(pullback)(dy)
        weight_flops = max(0, backward_flops - flops.get_total_flops())
    return Passes(
        residuals,
        forward_flops,
        backward_flops,
        weight_flops,
        max(forward.largest, backward.largest),
        forward.traffic(),
        backward.traffic(),
        y,
    )


def of_copies(run: Callable[[Layer], Passes], layer: Layer) -> Passes:
    """``run(layer)``, where each `repeat` is run with one copy and with two, not with all.

    All its copies take the same: what n take is what one takes, and n - 1 times what the second
    one adds.
    """
    counts: dict[str, int] = {}

    def found(path: str, layer: Layer) -> Layer:
        if layer.name == "repeat" and layer.call is not None:
            inside = any([name.startswith(f"{path}.") or name == path for name in counts])
            counts[path] = 1 if inside else layer.call.values["n"]
        return layer

    def short(which: str | None) -> Layer:
        def shortened(path: str, layer: Layer) -> Layer:
            if layer.name != "repeat" or path not in counts:
                return layer
            return repeat(layer.children[""], 2 if path == which else 1)

        return map_layers(shortened, layer)

    map_layers(found, layer)
    if not counts or 1 in counts.values():  # one in another, or nothing to gain
        return run(layer)
    one = run(short(None))
    parts = [(1 - sum(counts.values()) + len(counts), one)]
    parts += [(count - 1, run(short(path))) for path, count in counts.items()]

    def total(field: str) -> int:
        return sum([times * getattr(each, field) for times, each in parts])

    def traffic(field: str) -> tuple[Traffic, ...]:
        return merged(*[_times(count, getattr(each, field)) for count, each in parts])

    return Passes(
        residuals=total("residuals"),
        forward_flops=total("forward_flops"),
        backward_flops=total("backward_flops"),
        weight_flops=total("weight_flops"),
        largest=max([each.largest for _, each in parts]),
        forward=traffic("forward"),
        backward=traffic("backward"),
        y=one.y,
    )


def _times(count: int, traffic: tuple[Traffic, ...]) -> tuple[Traffic, ...]:
    return tuple(
        [each._replace(calls=count * each.calls, bytes=count * each.bytes) for each in traffic]
    )


def _own_bytes(kept: Tree, others: Tree) -> int:
    """The bytes of storages that are in a tree, and not in others."""
    known = {runtime.storage_id(leaf) for leaf in tree.leaves(others)}
    storages = {runtime.storage_id(leaf): leaf.untyped_storage() for leaf in tree.leaves(kept)}
    return sum([storage.nbytes() for each, storage in storages.items() if each not in known])
