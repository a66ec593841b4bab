"""`vmap`: a function of one, applied to many at once."""

import functools
from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet import tree
from funcnet.checks import check_function, check_tensors
from funcnet.compiler.loops import is_recording, record_loop
from funcnet.core import Tree

Axes = Any
"""An int, None for what is not mapped, or a tree of them that is a prefix of another tree."""


def vmap(f: Callable[..., Tree], in_axes: Axes = 0, out_axes: Axes = 0) -> Callable[..., Tree]:
    """Apply ``f`` to each slice of its arguments, all at once.

    ``vmap(model.init)(split(key, n), x)`` makes a population, ``vmap(step)`` trains it: random
    draws are the member's own because its key is. Eagerly this is ``torch.vmap`` on any optree
    tree; under `jit` it is a loop over the members in the compiled program, each member's work
    staying in the cache, the members shared out to the threads.

    Args:
        f: a function of positional trees of tensors.
        in_axes: the axis to map of each argument: one for all, or a tuple with an entry for each,
            which may be a tree itself, a prefix of the argument. None: the same for all members.
        out_axes: where the new axis goes in the results; None for results that are the same for
            all members. A prefix of the result.

    Raises:
        ValueError: no axis is mapped, or the mapped axes differ in length.
        TypeError: the axes do not fit the arguments.

    >>> import funcnet as fn
    >>> keys = fn.random.split(fn.key(0), 5)
    >>> params, _ = vmap(fn.linear(2).init, in_axes=(0, None))(keys, torch.ones(3))
    >>> params["weight"].shape
    torch.Size([5, 2, 3])
    """
    check_function("vmap", f)
    return _mapped(f, in_axes, out_axes, loops=True)


def batched(f: Callable[..., Tree], in_axes: Axes = 0, out_axes: Axes = 0) -> Callable[..., Tree]:
    """`vmap`, where under `jit` too each operator computes what is of all members at once.

    For members that share their weights, as the examples of a batch do: a product of each with the
    weights, one after another, would read these again and again, where one product of all reads
    them once. Of a population each member has its own, and the loop of `vmap` is faster.

    >>> batched(lambda x: x.square().sum())(torch.ones(3, 2))
    tensor([2., 2., 2.])
    """
    return _mapped(f, in_axes, out_axes, loops=False)


def _mapped(
    f: Callable[..., Tree], in_axes: Axes, out_axes: Axes, loops: bool
) -> Callable[..., Tree]:
    if isinstance(in_axes, list):
        in_axes = tuple(in_axes)

    @functools.wraps(f)
    def mapped(*args: Tree) -> Tree:
        check_tensors("vmap", "arguments", args)
        leaves, treedef = tree.flatten(args)
        axes = _axes("in_axes", in_axes, args, treedef)
        length, axes = _length(leaves, axes, treedef)
        out_treedef: Any = None
        out: list[int | None] = []

        def flat(*inputs: Any) -> list[Tensor]:
            nonlocal out_treedef, out
            result = f(*treedef.unflatten(inputs))
            results, out_treedef = tree.flatten(result)
            out = _axes("out_axes", out_axes, result, out_treedef)
            return [_as_tensor(each) for each in results]

        run = _recorded if loops and is_recording() else _eager
        stacked = run(flat, leaves, axes, length)
        placed = [
            _unmapped(each, length) if axis is None else each.movedim(0, _axis(axis, each))
            for each, axis in zip(stacked, out, strict=True)
        ]
        return out_treedef.unflatten(placed)

    return mapped


def _recorded(
    flat: Callable[..., list[Tensor]], leaves: list[Any], axes: list[int | None], length: int
) -> list[Tensor]:
    mapped = [index for index, axis in enumerate(axes) if axis is not None]
    xs = [leaves[index].movedim(axes[index], 0) for index in mapped]

    def body(slices: list[Tensor]) -> list[Tensor]:
        inputs = list(leaves)
        for index, each in zip(mapped, slices, strict=True):
            inputs[index] = each
        return flat(*inputs)

    return record_loop([], xs, length, body, is_map=True)


def _eager(
    flat: Callable[..., list[Tensor]], leaves: list[Any], axes: list[int | None], length: int
) -> list[Tensor]:
    return torch.vmap(flat, in_dims=tuple(axes), randomness="different")(*leaves)


def _axes(what: str, axes: Axes, of: Tree, treedef: Any) -> list[int | None]:
    """An axis for each leaf, from a prefix of the tree."""
    if type(axes) is int:
        return [axes] * treedef.num_leaves
    try:
        spread = optree.broadcast_prefix(
            axes, of, is_leaf=lambda each: each is None, none_is_leaf=True
        )
    except ValueError as error:
        raise TypeError(
            f"vmap: {what} {axes!r} does not fit {tree.describe(of)}: {error}"
        ) from None
    everything = optree.tree_leaves(of, none_is_leaf=True)
    found = [axis for axis, leaf in zip(spread, everything, strict=True) if leaf is not None]
    for axis in found:
        if axis is not None and (not isinstance(axis, int) or isinstance(axis, bool)):
            raise TypeError(f"vmap: {what} expects integers and None, got {axis!r}")
    return found


def _length(
    leaves: list[Any], axes: list[int | None], treedef: Any
) -> tuple[int, list[int | None]]:
    """The number of members, and the axes without negative ones."""
    paths = [tree.path_string(path) for path in treedef.paths()]
    lengths: dict[int, str] = {}
    positive: list[int | None] = []
    for leaf, axis, path in zip(leaves, axes, paths, strict=True):
        if axis is None:
            positive.append(None)
            continue
        if not isinstance(leaf, Tensor):
            raise TypeError(f"vmap: expects a tensor to map at argument {path}, got {leaf!r}")
        if not -leaf.dim() <= axis < leaf.dim():
            raise ValueError(
                f"vmap: axis {axis} is out of range for argument {path}, {tree.describe(leaf)}"
            )
        positive.append(axis % leaf.dim())
        lengths.setdefault(leaf.shape[axis], path)
    if not lengths:
        raise ValueError("vmap: expects at least one mapped tensor, and in_axes maps none")
    if len(lengths) > 1:
        found = ", ".join(f"{length} at argument {path}" for length, path in lengths.items())
        raise ValueError(f"vmap: expects mapped axes of one length, got {found}")
    return next(iter(lengths)), positive


def _axis(axis: int, tensor: Tensor) -> int:
    if not -tensor.dim() <= axis < tensor.dim():
        raise ValueError(f"vmap: out_axes {axis} is out of range for {tree.describe(tensor)}")
    return axis


def _unmapped(stacked: Tensor, length: int) -> Tensor:
    if not length:
        raise ValueError("vmap: out_axes None needs at least one member")
    return stacked[0]


def _as_tensor(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    if isinstance(result, (bool, int, float)):
        return torch.tensor(result)
    raise TypeError(f"vmap: a function returns tensors, got {result!r}")
