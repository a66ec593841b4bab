"""Control flow that is compiled as such: `scan`, a loop with a carry, and `fori`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.compiler.loops import is_recording, record_loop, without_values
from funcnet.compiler.specs import spec_of
from funcnet.core import Tree

Body = Callable[[Tree, Tree], tuple[Tree, Tree]]


def scan(
    f: Body,
    carry: Tree,
    xs: Tree = None,
    length: int | None = None,
    unroll: int | bool = 1,
    *,
    reverse: bool = False,
) -> tuple[Tree, Tree]:
    """A loop over the leading axis of ``xs``.

    ``for x in xs: carry, y = f(carry, x)`` gives the last carry and all y, stacked. Eagerly this
    is that loop; under `jit` it is one compiled loop, whose body is compiled once.

    Args:
        f: ``(carry, x) -> (carry, y)``. The carry keeps its structure, shapes and dtypes; y may
            be None.
        carry: the first one.
        xs: a tree of tensors with one leading extent, or None.
        length: the number of iterations, needed if ``xs`` is None.
        unroll: how many iterations the body of the compiled loop holds; True for all of them.
        reverse: whether to go from the last x to the first; y has the index of its x.

    Raises:
        ValueError: the extents of ``xs`` differ, or the carry changes.
        TypeError: f does not return a pair.

    Source: ``jax.lax.scan``.

    >>> total, sums = scan(lambda sum, x: (sum + x, sum + x), torch.tensor(0), torch.arange(4))
    >>> total, sums
    (tensor(6), tensor([0, 1, 3, 6]))
    """
    length = _iterations(xs, length)
    carry = tree.map(_as_tensor, carry)
    if unroll is True:
        unroll = max(length, 1)
    if isinstance(unroll, bool) or not isinstance(unroll, int) or unroll < 1:
        raise ValueError(f"scan: expects unroll of at least 1, got {unroll!r}")
    if not length:
        return carry, _empty_ys(f, carry, xs)
    if not is_recording():
        return _loop(f, carry, xs, range(length), reverse)
    if reverse:
        carry, ys = _recorded(f, carry, tree.map(lambda x: x.flip(0), xs), length, unroll)
        return carry, tree.map(lambda y: y.flip(0), ys)
    return _recorded(f, carry, xs, length, unroll)


def fori(lower: int, upper: int, body: Callable[[Tensor, Tree], Tree], carry: Tree) -> Tree:
    """``for i in range(lower, upper): carry = body(i, carry)``, as one `scan`.

    Args:
        lower, upper: Python integers; ``i`` is a 0-d int64 tensor.
        body: ``(i, carry) -> carry``.
        carry: the first one.

    Source: ``jax.lax.fori_loop``.

    >>> fori(0, 5, lambda i, total: total + i, torch.tensor(0))
    tensor(10)
    """
    device = next((leaf.device for leaf in tree.leaves(carry) if isinstance(leaf, Tensor)), None)
    steps = torch.arange(lower, max(lower, upper), device=device)
    return scan(lambda carry, i: (body(i, carry), None), carry, steps)[0]


def _iterations(xs: Tree, length: int | None) -> int:
    leaves, treedef = tree.flatten(xs)
    if length is not None and (isinstance(length, bool) or not isinstance(length, int)):
        raise TypeError(f"scan: expects an integer length, got {length!r}")
    extents = {} if length is None else {length: "length"}
    for path, leaf in zip(treedef.paths(), leaves, strict=True):
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            where = tree.path_string(path)
            what = tree.describe(leaf)
            raise ValueError(f"scan: expects xs with a leading axis, got {what} at {where!r}")
        extents.setdefault(leaf.shape[0], f"xs {tree.path_string(path)!r}".strip())
    if not extents:
        raise ValueError("scan: expects xs or a length")
    if len(extents) > 1:
        found = ", ".join(f"{extent} of {what}" for extent, what in extents.items())
        raise ValueError(f"scan: expects one number of iterations, got {found}")
    return next(iter(extents))


def _call(f: Body, carry: Tree, x: Tree) -> tuple[Tree, Tree]:
    result = f(carry, x)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"scan: f must return (carry, y), got {tree.describe(result)}")
    after = tree.map(_as_tensor, result[0])
    if not tree.alike(carry, after):
        raise ValueError(
            "scan: the carry must keep its structure, shapes and dtypes, came in as "
            f"{tree.describe(carry)} and went out as {tree.describe(after)}"
        )
    return after, tree.map(_as_tensor, result[1])


def _loop(f: Body, carry: Tree, xs: Tree, order: Any, reverse: bool) -> tuple[Tree, Tree]:
    ys = []
    for index in reversed(order) if reverse else order:
        carry, y = _call(f, carry, tree.map(lambda x, i=index: x[i], xs))
        ys.append(y)
    if reverse:
        ys.reverse()
    return carry, tree.map(lambda *each: torch.stack(each), *ys)


def _recorded(f: Body, carry: Tree, xs: Tree, length: int, unroll: int) -> tuple[Tree, Tree]:
    whole, rest = divmod(length, unroll)
    if unroll > 1:
        head = tree.map(lambda x: x[: whole * unroll].unflatten(0, (whole, unroll)), xs)
        carry, ys = _recorded(
            lambda carry, x: _loop(f, carry, x, range(unroll), False), carry, head, whole, 1
        )
        ys = tree.map(lambda y: y.flatten(0, 1), ys)
        if rest:
            tail = tree.map(lambda x: x[whole * unroll :], xs)
            carry, more = _loop(f, carry, tail, range(rest), False)
            ys = tree.map(lambda a, b: torch.cat([a, b]), ys, more)
        return carry, ys
    leaves, treedef = tree.flatten(carry)
    x_leaves, x_treedef = tree.flatten(xs)
    y_treedef: Any = None

    def body(inputs: list[Tensor]) -> list[Tensor]:
        nonlocal y_treedef
        before = treedef.unflatten(inputs[: len(leaves)])
        after, y = _call(f, before, x_treedef.unflatten(inputs[len(leaves) :]))
        y_leaves, y_treedef = tree.flatten(y)
        return [*treedef.flatten_up_to(after), *y_leaves]

    results = record_loop(leaves, x_leaves, length, body)
    ys = y_treedef.unflatten(results[len(leaves) :])
    return treedef.unflatten(results[: len(leaves)]), ys


def _empty_ys(f: Body, carry: Tree, xs: Tree) -> Tree:
    """The y of no iterations: found on tensors without values."""
    with without_values():
        x = tree.map(lambda x: torch.empty(x.shape[1:], dtype=x.dtype, device=x.device), xs)
        before = tree.map(lambda leaf: spec_of(leaf).empty(), carry)
        _, y = _call(f, before, x)
    leaves, treedef = tree.flatten(y)
    specs = [spec_of(leaf) for leaf in leaves]
    return treedef.unflatten([spec._replace(shape=(0, *spec.shape)).empty() for spec in specs])


def _as_tensor(leaf: Any) -> Tensor:
    return leaf if isinstance(leaf, Tensor) else torch.as_tensor(leaf)
