"""`remat`: a layer that computes its residuals again instead of keeping them."""

from collections.abc import Callable, Collection
from itertools import pairwise
from typing import Any

from funcnet.checks import check_kind
from funcnet.combinators.combine import combine
from funcnet.combinators.serial import serial, serial_backward, serial_forward
from funcnet.core import (
    Applied,
    Forward,
    Key,
    Layer,
    Params,
    Pullback,
    Tree,
    around,
    barrier,
    join_paths,
    pull,
    rebuilt,
)
from funcnet.deferred import defers
from funcnet.lift import stateful

Policy = Collection[str] | Callable[[str, Layer], bool]


def remat(layer: Layer, policy: Policy | None = None) -> Layer:
    """The same layer, which keeps its inputs for the backward pass and runs again there.

    Time for memory: of ``serial(remat(block), remat(block), ...)`` only the inputs of the blocks
    and one block's residuals are there at a time. The second run sees the same key, state and
    params, so noise and results are those of the first, bit for bit. Under `jit` the compiler may
    not start it before the cotangent is there.

    Args:
        layer: any layer.
        policy: which layers inside keep their residuals all the same: dotted paths of their
            params, or a function ``(path, layer) -> bool``. In a `serial` each run of layers
            between such ones is rematerialised as one.

    VJP:
        that of the layer, run on the same arguments.
    Raises:
        ValueError: a path that the layer does not have.

    Source: Chen et al. 2016; ``torch.utils.checkpoint``; ``jax.checkpoint``.

    >>> import funcnet as fn
    >>> block = fn.serial(fn.linear(8), fn.tanh())
    >>> params, _ = block.init(fn.key(0), torch.ones(4, 2))
    >>> y, pullback, _ = remat(block).vjp(params, torch.ones(4, 2))
    >>> sorted(pullback.residuals)
    ['params', 'state', 'x']
    """
    check_kind("remat", layer, Layer)
    if policy is None:
        return _whole(layer)
    if isinstance(policy, str):
        raise TypeError(f"remat: policy expects a collection of paths, got the string {policy!r}")
    if callable(policy):
        keeps = policy
    else:
        kept = frozenset(policy)
        if unknown := kept - set(_paths("", layer)):
            raise ValueError(f"remat: policy names {sorted(unknown)[0]!r}, which no layer is")

        def keeps(path: str, layer: Layer) -> bool:
            return path in kept

    return _partly(layer, "", keeps)


def _paths(path: str, layer: Layer) -> list[str]:
    children = layer.children.items()
    below = [each for name, child in children for each in _paths(join_paths(path, name), child)]
    return [path, *below]


def _keeps_some(layer: Layer, path: str, keeps: Callable[[str, Layer], bool]) -> bool:
    children = layer.children.items()
    return keeps(path, layer) or any(
        [_keeps_some(child, join_paths(path, name), keeps) for name, child in children]
    )


def _partly(layer: Layer, path: str, keeps: Callable[[str, Layer], bool]) -> Layer:
    if keeps(path, layer):
        return layer
    if not _keeps_some(layer, path, keeps):
        return _whole(layer)
    if layer.name == "serial":
        return _in_groups(layer, path, keeps)
    children = layer.children.items()
    return rebuilt(
        layer, {name: _partly(child, join_paths(path, name), keeps) for name, child in children}
    )


def _in_groups(layer: Layer, path: str, keeps: Callable[[str, Layer], bool]) -> Layer:
    """A serial of groups: each is a run of children that keep nothing, or one that does."""
    groups: dict[tuple[str, ...], Layer] = {}
    run: dict[str, Layer] = {}
    for name, child in layer.children.items():
        child_path = join_paths(path, name)
        if not _keeps_some(child, child_path, keeps):
            run[name] = child
            continue
        if run:
            groups[tuple(run)] = _whole(serial(**run))
            run = {}
        groups[(name,)] = serial(**{name: _partly(child, child_path, keeps)})
    if run:
        groups[tuple(run)] = _whole(serial(**run))
    return _grouped("remat", groups, layer, lambda layer: _partly(layer, path, keeps))


def checkpointed(layer: Layer, segments: int) -> Layer:
    """A `serial` in several runs of its layers, each rematerialised as one.

    Only the inputs of the runs are kept for the backward pass. With the square root of the number
    of layers as ``segments``, the memory grows as the square root of the depth.

    Args:
        layer: a `serial`.
        segments: the number of runs, which are as equally long as can be.

    Source: ``torch.utils.checkpoint.checkpoint_sequential``; Chen et al. 2016.

    >>> net = checkpointed(fn.serial(*[fn.tanh()] * 9), 3)
    >>> _, pullback, _ = net.vjp({}, torch.ones(2))
    >>> len(fn.tree.leaves(pullback))
    3
    """
    if not isinstance(layer, Layer) or layer.name != "serial":
        raise TypeError(f"checkpointed: expects a serial, got {layer!r}")
    names = list(layer.children)
    if not 1 <= segments <= max(len(names), 1):
        most = f"from 1 to {len(names)}, the number of layers"
        raise ValueError(f"checkpointed: segments must be {most}, got {segments}")
    edges = [len(names) * index // segments for index in range(segments + 1)]
    runs = [tuple(names[start:stop]) for start, stop in pairwise(edges)]
    groups = {run: _whole(serial(**{name: layer.children[name] for name in run})) for run in runs}
    return _grouped("checkpointed", groups, layer, lambda layer: checkpointed(layer, segments))


def _grouped(
    name: str,
    groups: dict[tuple[str, ...], Layer],
    layer: Layer,
    rebuild: Callable[[Layer], Layer],
) -> Layer:
    """The groups of a serial's children, one after the other; its child is the serial."""
    return Layer(
        *combine(name, groups, serial_forward, serial_backward),
        name=name,
        **around(layer, rebuild),
    )


def _whole(layer: Layer) -> Layer:
    def apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Applied:
        return layer.apply(params, x, state, key=key, train=train)

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        y, new_state = apply(params, x, state, key, train)
        kept = {"params": params or {}, "x": x, "state": state}
        if key is not None and layer.takes_key:
            kept["key"] = key
        return y, Pullback(remat_rule, kept, (layer, train)), new_state

    return stateful(
        layer.init,
        forward,
        apply=apply,
        name="remat",
        **around(layer, _whole),
    )


@defers
def remat_rule(
    residuals: dict[str, Any], dy: Tree, layer: Layer, train: bool, *, params: bool, x: bool
) -> tuple[Params | None, Tree]:
    """Run the layer again, when dy is there, and pull dy back through it."""
    again, dy = barrier((residuals, dy))
    _, pullback, _ = layer.vjp(
        again.pop("params"),
        again.pop("x"),
        again.pop("state"),
        key=again.pop("key", None),
        train=train,
    )
    pullbacks = {"": pullback}
    del pullback
    return pull(pullbacks, "", dy, params=params, x=x)
