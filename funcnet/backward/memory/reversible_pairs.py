"""`reversible`: residual pairs whose inputs are computed back from their outputs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.checks import check_kind
from funcnet.combinators.combine import OWN, Pull, Run, combine, combine_rule
from funcnet.combinators.entries import parts_of
from funcnet.core import (
    Applied,
    Forward,
    Key,
    Layer,
    Params,
    Pullback,
    Tree,
    barrier,
    sum_cotangents,
)
from funcnet.errors import require
from funcnet.lift import stateful

Pair = tuple[Layer, Layer]

_OUTPUT = ".y"


def reversible(*pairs: Pair, dim: int | None = None, **named: Pair) -> Layer:
    """Residual pairs, one after another, that keep their last output alone for the backward pass.

    A pair of layers (f, g) maps ``(x1, x2)`` to ``y1 = x1 + f(x2)``, ``y2 = x2 + g(y1)``. That has
    an inverse, ``x2 = y2 - g(y1)``, ``x1 = y1 - f(x2)``. So the backward pass computes each pair's
    input from its output, and the memory of activations is the same at any depth. It runs f and g
    once more, as `remat` does, with the same key, state and params; their noise is the same.

    In eager mode on a CPU glibc's malloc may keep holes between the gradients that nothing fits in;
    with MALLOC_MMAP_THRESHOLD_=65536 in the environment it gives them back.

    Args:
        pairs: (f, g), named "0", "1", ...; or
        named: pairs by name. f must keep the shape of x1 for an x2, and g that of x2 for an x1.
        dim: None for an x that is a tuple (x1, x2). Else x is a tensor, whose halves along this
            dimension are x1 and x2, and so is y.

    Inputs:
        a tuple (x1, x2) of floating-point tensors, or of trees of such; a tensor with ``dim``.
    Returns:
        y, likewise.
    Learned params, state:
        ``{name: {"f": those of f, "g": those of g}}``.
    VJP:
        of each pair, from the last to the first, with x2 and x1 as above:
        ``dx1 = dy1 + dg(dy2)``, ``dx2 = dy2 + df(dx1)``. The inputs are exact up to rounding, and
        so are the gradients; the error of float32 grows with the depth and the size of f and g.
        float16 and bfloat16 lose too much: use `cast` inside of f and g.
    Raises:
        ValueError: f or g changes a shape.
        TypeError: x is no pair.

    Source: Gomez et al. 2017, RevNet; Kitaev et al. 2020, Reformer.

    >>> import funcnet as fn
    >>> block = lambda: fn.serial(fn.layer_norm(), fn.linear(2), fn.tanh())
    >>> net = reversible(*[(block(), block()) for _ in range(8)])
    >>> x = torch.ones(4, 2), torch.zeros(4, 2)
    >>> params, _ = net.init(fn.key(0), x)
    >>> y, pullback, _ = net.vjp(params, x)
    >>> kept = len(fn.tree.leaves(pullback)) - len(fn.tree.leaves(params))
    >>> kept, list(params["7"])
    (2, ['f', 'g'])
    """
    children = _children(pairs, named)
    whole = dim is None or (isinstance(dim, int) and not isinstance(dim, bool))
    require(whole, f"reversible: dim must be an int or None, got {dim!r}", TypeError)
    return _reversible(children, dim)


def _children(pairs: tuple[Pair, ...], named: Mapping[str, Pair]) -> dict[str, Layer]:
    """The layers by dotted path: "0.f", "0.g", "1.f", ..."""
    if pairs and named:
        raise TypeError("reversible: expects pairs by position or by name, not both")
    found = named or {str(index): pair for index, pair in enumerate(pairs)}
    children: dict[str, Layer] = {}
    for name, pair in found.items():
        where = f"reversible[{name!r}]"
        if not isinstance(pair, (tuple, list)) or isinstance(pair, Layer) or len(pair) != 2:
            got = repr(pair) if isinstance(pair, Layer) else tree.describe(pair)
            raise TypeError(f"{where} expects a pair of layers (f, g), got {got}")
        wrong = f"reversible: a name must not be empty or have a dot, got {name!r}"
        require(bool(name) and "." not in name, wrong)
        for letter, layer in zip("fg", pair, strict=True):
            check_kind(f"{where} {letter}", layer, Layer)
            children[f"{name}.{letter}"] = layer
    return children


def _reversible(children: Mapping[str, Layer], dim: int | None) -> Layer:
    plain = combine(
        "reversible", children, reversible_forward, reversible_backward, dim, dotted=True
    )
    names, layers = tuple(children), tuple(children.values())

    def apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Applied:
        return plain.apply(params, x, state, key=key, train=train)

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        y, new_state = apply(params, x, state, key, train)
        own = {
            "params": parts_of("reversible", names, "params", params),
            "state": parts_of("reversible", names, "state", state),
        }
        if key is not None and plain.takes_key:
            own["key"] = {"": key}
        told = ("reversible", names, tuple(own["params"]), dim, layers, train)
        kept = {_OUTPUT: y, OWN: own}
        return y, Pullback(combine_rule, kept, (reversible_backward, *told)), new_state

    return stateful(
        plain.init,
        forward,
        apply=apply,
        name="reversible",
        children=children,
        rebuild=lambda children: _reversible(children, dim),
        takes_key=plain.takes_key,
    )


def reversible_forward(run: Run, x: Tree, dim: int | None) -> tuple[Tree, Mapping[str, Tree]]:
    """``x1 = x1 + f(x2)``, ``x2 = x2 + g(x1)`` for each pair."""
    x1, x2 = _halves(x, dim)
    for f, g in _pairs(run.names):
        x1 = _plus(x1, run(f, x2), f)
        x2 = _plus(x2, run(g, x1), g)
    return _whole(x1, x2, dim), {}


def reversible_backward(
    pull: Pull,
    dy: Tree,
    residuals: Any,
    dim: int | None,
    layers: tuple[Layer, ...],
    train: bool,
) -> Tree:
    """Each pair's input from its output, and the cotangents through it.

    Only one pair's residuals are there at a time: under `jit` its layers may not start before the
    cotangent is there, and nothing that the forward pass made of its key or params is kept.
    """
    children = dict(zip(pull.names, layers, strict=True))
    y1, y2 = _halves(pull.pullbacks.pop(_OUTPUT), dim)
    dy1, dy2 = _halves(dy, dim)
    del dy
    pairs = _pairs(pull.names)
    for index in range(len(pairs) - 1, -1, -1):
        f, g = pairs[index]
        own = {what: _of(pairs[index], parts) for what, parts in residuals.items()}
        own, y1, y2, dy1, dy2 = barrier((own, y1, y2, dy1, dy2))
        key = own["key"][""] if "key" in own else None
        run = Run(pull.parent, children, own["params"], own["state"], key, train, pull.pullbacks)
        y2 = tree.map(torch.sub, y2, run(g, y1))
        dy1 = sum_cotangents(dy1, pull(g, dy2))
        y1 = tree.map(torch.sub, y1, run(f, y2))
        needed = pull.x or index > 0
        dy2 = sum_cotangents(dy2, pull(f, dy1, needed=needed))
    return _whole(dy1, dy2, dim) if pull.x else None


def _of(pair: tuple[str, str], parts: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a pair's layers, and what has no layer's name."""
    return {name: part for name, part in parts.items() if name in pair or not name}


def _pairs(names: tuple[str, ...]) -> list[tuple[str, str]]:
    return list(zip(names[::2], names[1::2], strict=True))


def _halves(x: Tree, dim: int | None) -> tuple[Tree, Tree]:
    if dim is None:
        pair = isinstance(x, (tuple, list)) and len(x) == 2
        require(pair, f"reversible: expects a tuple (x1, x2), got {tree.describe(x)}", TypeError)
        x1, x2 = x
    else:
        found = f"got {tree.describe(x)}"
        tensor = isinstance(x, Tensor)
        require(tensor, f"reversible: with dim={dim} expects a tensor, {found}", TypeError)
        inside = -x.dim() <= dim < x.dim() and x.shape[dim] % 2 == 0
        require(inside, f"reversible: expects two equal halves along dimension {dim}, {found}")
        x1, x2 = x.chunk(2, dim)
    floating = all([leaf.is_floating_point() for leaf in tree.leaves((x1, x2))])
    found = tree.describe(x)
    require(floating, f"reversible: expects floating-point tensors, got {found}", TypeError)
    return x1, x2


def _whole(x1: Tree, x2: Tree, dim: int | None) -> Tree:
    return (x1, x2) if dim is None else torch.cat((x1, x2), dim)


def _plus(x: Tree, change: Tree, child: str) -> Tree:
    if not tree.alike(x, change):
        raise ValueError(
            f"reversible[{child!r}] must keep the shape and dtype of the half that it is added to, "
            f"{tree.describe(x)}, got {tree.describe(change)}"
        )
    return tree.map(torch.add, x, change)
