"""`remat`: a layer that computes its residuals again instead of keeping them."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from funcnet import tree
from funcnet.combinators import serial
from funcnet.compiler.loops import barrier
from funcnet.core import EMPTY, Anatomy, Layer, Params, Pullback, Tree, anatomy, pull, with_anatomy

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

    VJP: that of the layer, run on the same arguments.
    Raises: ValueError for a path that the layer does not have.
    Source: Chen et al. 2016; ``torch.utils.checkpoint``; ``jax.checkpoint``.

    >>> import funcnet as fn
    >>> block = fn.serial(fn.linear(8), fn.tanh())
    >>> params, _ = block.init(fn.key(0), torch.ones(4, 2))
    >>> y, pullback, _ = remat(block).vjp(params, torch.ones(4, 2))
    >>> sorted(pullback.residuals)
    ['params', 'state', 'x']
    """
    if not isinstance(layer, Layer):
        raise TypeError(f"remat: expects a Layer, got {type(layer).__name__}")
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


def _join(path: str, name: str) -> str:
    return ".".join([part for part in (path, name) if part])


def _paths(path: str, layer: Layer) -> list[str]:
    children = anatomy(layer).children.items()
    below = [each for name, child in children for each in _paths(_join(path, name), child)]
    return [path, *below]


def _keeps_some(layer: Layer, path: str, keeps: Callable[[str, Layer], bool]) -> bool:
    children = anatomy(layer).children.items()
    return keeps(path, layer) or any(
        [_keeps_some(child, _join(path, name), keeps) for name, child in children]
    )


def _partly(layer: Layer, path: str, keeps: Callable[[str, Layer], bool]) -> Layer:
    if keeps(path, layer):
        return layer
    if not _keeps_some(layer, path, keeps):
        return _whole(layer)
    name, children, rebuild, *_ = anatomy(layer)
    assert rebuild is not None
    if name != "serial":
        return rebuild(
            {each: _partly(child, _join(path, each), keeps) for each, child in children.items()}
        )
    runs: list[Layer] = []
    run: dict[str, Layer] = {}
    for each, child in children.items():
        if not _keeps_some(child, _join(path, each), keeps):
            run[each] = child
            continue
        if run:
            runs.append(_whole(serial(**run)))
            run = {}
        runs.append(serial(**{each: _partly(child, _join(path, each), keeps)}))
    if run:
        runs.append(_whole(serial(**run)))
    return _chained(layer, runs, lambda made: _partly(made[""], path, keeps))


def _whole(layer: Layer) -> Layer:
    def vjp(
        params: Params,
        x: Tree,
        state: Params = EMPTY,
        *,
        key: Tensor | None = None,
        train: bool = True,
    ) -> tuple[Tree, Pullback, Params]:
        state = {**state}
        y, new_state = layer.apply(params, x, state, key=key, train=train)
        kept = {"params": params, "x": x, "state": state}
        if key is not None and anatomy(layer).takes_key:
            kept["key"] = key
        return y, Pullback(remat_rule, kept, (layer, train), y), new_state

    return with_anatomy(
        Layer(_copy_of(layer.init), layer.apply, vjp),
        Anatomy("remat", {"": layer}, lambda made: _whole(made[""]), anatomy(layer).takes_key),
    )


def remat_rule(
    residuals: dict[str, Any], dy: Tree, layer: Layer, train: bool, *, params: bool, x: bool
) -> tuple[Params | None, Tree]:
    """Run the layer again, when dy is there, and pull dy back through it."""
    leaves, treedef = tree.flatten((residuals, dy))
    again, dy = treedef.unflatten(barrier(leaves))
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


def _chained(
    layer: Layer, runs: list[Layer], rebuild: Callable[[Mapping[str, Layer]], Layer]
) -> Layer:
    """A serial whose children are grouped: each run is a serial of some of them."""
    names = [tuple(_serial_of(run)) for run in runs]

    def vjp(
        params: Params,
        x: Tree,
        state: Params = EMPTY,
        *,
        key: Tensor | None = None,
        train: bool = True,
    ) -> tuple[Tree, Pullback, Params]:
        pullbacks: dict[str, Pullback] = {}
        new_state: dict[str, Any] = {}
        y = x
        for place, run in enumerate(runs):
            own, own_state = (_only(whole, names[place]) for whole in (params, state))
            y, pullbacks[str(place)], changed = run.vjp(own, y, own_state, key=key, train=train)
            new_state.update(changed)
        learned = tuple([bool(_only(params, each)) for each in names])
        return y, Pullback(chained_rule, pullbacks, (learned,), y), new_state

    return with_anatomy(
        Layer(_copy_of(layer.init), layer.apply, vjp),
        Anatomy("remat", {"": layer}, rebuild, anatomy(layer).takes_key),
    )


def _serial_of(run: Layer) -> Mapping[str, Layer]:
    """The children of a serial, or of a rematerialised one."""
    children = anatomy(run).children
    return anatomy(children[""]).children if list(children) == [""] else children


def _only(whole: Params, names: tuple[str, ...]) -> Params:
    return {name: whole[name] for name in names if name in whole}


def chained_rule(
    residuals: dict[str, Any], dy: Tree, learned: tuple[bool, ...], *, params: bool, x: bool
) -> tuple[Params | None, Tree]:
    """The pullbacks of the runs, last to first."""
    dparams: dict[str, Any] = {}
    for place in reversed(range(len(learned))):
        before = params and any(learned[:place])
        if not x and not before and not (params and learned[place]):
            break
        dchildren, dy = pull(residuals, str(place), dy, params=params, x=x or before)
        dparams.update(dchildren or {})
    return (dparams if params else None), dy if x else None


def _copy_of(init: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own, on which the anatomy of the new layer is recorded."""

    def remat_init(key: Tensor, x: Tree) -> tuple[Params, Params]:
        return init(key, x)

    return remat_init
