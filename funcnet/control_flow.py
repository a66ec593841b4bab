"""Control flow that is compiled as such: `scan` and `fori`, `while_loop`, `cond` and `switch`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from funcnet import runtime, tree
from funcnet.checks import check_tensors
from funcnet.compiler.loops import (
    is_recording,
    record_branches,
    record_loop,
    record_while,
    records_while,
    without_values,
)
from funcnet.compiler.numbers import is_traced
from funcnet.compiler.specs import spec_of
from funcnet.core import Tree

Body = Callable[[Tree, Tree], tuple[Tree, Tree]]
Function = Callable[..., Tree]


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
    return _recorded(f, carry, xs, length, unroll, reverse)


def fori(
    lower: int | Tensor, upper: int | Tensor, body: Callable[[Tensor, Tree], Tree], carry: Tree
) -> Tree:
    """``for i in range(lower, upper): carry = body(i, carry)``, as one `scan`.

    Args:
        lower, upper: integers; ``i`` is a 0-d int64 tensor. With a 0-d tensor among them, or a
            number that a jitted function is given, it is a `while_loop`, for any number of
            iterations.
        body: ``(i, carry) -> carry``.
        carry: the first one.

    Source: ``jax.lax.fori_loop``.

    >>> fori(0, 5, lambda i, total: total + i, torch.tensor(0))
    tensor(10)
    """
    known = not is_traced(lower) and not is_traced(upper)
    if isinstance(lower, Tensor) or isinstance(upper, Tensor) or not known:
        last, start = torch.as_tensor(upper), torch.as_tensor(lower).long()
        return while_loop(
            lambda both: both[0] < last,
            lambda both: (both[0] + 1, body(both[0], both[1])),
            (start, carry),
        )[1]
    device = next((leaf.device for leaf in tree.leaves(carry) if isinstance(leaf, Tensor)), None)
    steps = torch.arange(lower, max(lower, upper), device=device)
    return scan(lambda carry, i: (body(i, carry), None), carry, steps)[0]


def while_loop(condition: Function, body: Callable[[Tree], Tree], carry: Tree) -> Tree:
    """``while condition(carry): carry = body(carry)``; gives the last carry.

    Eagerly this is that loop; under `jit` it is one compiled loop, whose body is compiled once and
    which ends when its condition does. Under `vmap` each member has as many iterations as its own
    condition says: eagerly all go on until the last is done, and those that are done keep their
    carry, whatever the body gives for it; under jit each member has a loop of its own.

    Args:
        condition: ``carry -> bool``, a 0-d tensor or a Python bool.
        body: ``carry -> carry``, of the same structure, shapes and dtypes.
        carry: the first one; it is the result if the condition does not hold for it.

    Eagerly, derivatives go through the iterations that were done. Under jit they cannot, as their
    number is not known: use `scan` or `fori` there.

    Raises:
        ValueError: the carry changes, or the condition is not one number.
        TypeError: the condition or the body cannot be called.

    Source: ``jax.lax.while_loop``.

    >>> while_loop(lambda x: x < 100, lambda x: 2 * x, torch.tensor(3))
    tensor(192)
    >>> halve = lambda x: while_loop(lambda x: x % 2 == 0, lambda x: x // 2, x)
    >>> torch.vmap(halve)(torch.tensor([12, 7, 64]))
    tensor([3, 7, 1])
    """
    _check_callable("while_loop", condition=condition, body=body)
    carry = tree.map(_as_tensor, carry)

    def holds(carry: Tree) -> Tensor:
        return _flag("while_loop: expects the condition to give", condition(carry))

    def after(carry: Tree) -> Tree:
        return _same("while_loop", carry, body(carry))

    if records_while():
        return _recorded_while(holds, after, carry)
    while runtime.holds_anywhere(flag := holds(carry)):
        carry = _where(flag, after(carry), carry)
    return carry


def cond(predicate: Tensor | bool, on_true: Function, on_false: Function, *operands: Tree) -> Tree:
    """``on_true(*operands) if predicate else on_false(*operands)``.

    Eagerly this is that; under `jit` it is a branch in the compiled program, which computes nothing
    of the one that is not taken, whether it needs its operands or what is around it. Under `vmap`
    each member takes its own: eagerly both are computed for all members, and ``torch.where``
    chooses; under jit each member runs one. Where ``torch.where`` chooses, a derivative is NaN if
    the branch that is not taken has no finite one.

    Args:
        predicate: a 0-d tensor, of any dtype, or a Python bool.
        on_true, on_false: functions of the operands, which may read any other tensor as well. They
            give tensors of one structure, with the same shapes and dtypes.
        operands: what they are called with.

    Raises:
        ValueError: the predicate is not one number, or where both branches are looked at, as under
            jit, they differ in what they give.
        TypeError: a branch cannot be called.

    Source: ``jax.lax.cond``.

    >>> absolute = lambda x: cond(x < 0, lambda x: -x, lambda x: x, x)
    >>> absolute(torch.tensor(-2.0)), torch.vmap(absolute)(torch.tensor([-1.0, 3.0]))
    (tensor(2.), tensor([1., 3.]))
    """
    _check_callable("cond", on_true=on_true, on_false=on_false)
    flag = _flag("cond: expects a predicate that is", predicate)
    return _branch("cond", flag, {"on_true": on_true, "on_false": on_false}, operands)


def switch(index: Tensor | int, branches: Sequence[Function], *operands: Tree) -> Tree:
    """``branches[index](*operands)``, of which one is computed as in `cond`.

    Args:
        index: a 0-d integer tensor or a Python int. One below 0 is taken for 0, and one beyond the
            last branch for the last.
        branches: functions of the operands; see `cond`.
        operands: what they are called with.

    Raises:
        ValueError: there are no branches, or as in `cond`.
        TypeError: the index is not an integer, or a branch cannot be called.

    Source: ``jax.lax.switch``.

    >>> switch(torch.tensor(1), [torch.sin, torch.square, torch.neg], torch.tensor(3.0))
    tensor(9.)
    """
    names = {f"branches[{number}]": branch for number, branch in enumerate(branches)}
    if not names:
        raise ValueError("switch: expects at least one branch")
    _check_callable("switch", **names)
    position = torch.as_tensor(index)
    integers = not position.is_floating_point() and not position.is_complex()
    if not integers or position.dtype == torch.bool:
        raise TypeError(f"switch: expects an integer index, got {tree.describe(index)}")
    if position.dim():
        raise ValueError(f"switch: expects a 0-d index, got {tree.describe(index)}")
    if len(names) == 1:
        return tree.map(_as_tensor, branches[0](*operands))
    position = position.clamp(0, len(names) - 1).long()
    return _branch("switch", position, names, operands)


def _check_callable(name: str, **functions: Any) -> None:
    for argument, function in functions.items():
        if not callable(function):
            raise TypeError(
                f"{name}: expects {argument} to be a function, got {tree.describe(function)}"
            )


def _flag(what: str, value: Any) -> Tensor:
    """A 0-d bool tensor for a number or a 0-d tensor."""
    if not isinstance(value, (Tensor, bool, int, float)):
        raise TypeError(f"{what} a 0-d tensor or a bool, got {tree.describe(value)}")
    flag = torch.as_tensor(value)
    if flag.dim():
        raise ValueError(f"{what} a 0-d tensor or a bool, got {tree.describe(flag)}")
    return flag if flag.dtype == torch.bool else flag != 0


def _branch(name: str, selector: Tensor, branches: dict[str, Function], operands: Any) -> Tree:
    """What the branch gives that the selector says: a number, or a bool, True for the first."""
    functions = [*branches.values()]
    if not is_recording() and runtime.has_one_value(selector):
        value = selector.item()
        position = int(1 - value if selector.dtype == torch.bool else value)
        return tree.map(_as_tensor, functions[position](*operands))
    results: list[Tree] = []

    def run(function: Function) -> list[Tensor]:
        result = tree.map(_as_tensor, function(*operands))
        if results and not tree.alike(results[0], result):
            one, *_, other = [*branches][: len(results) + 1]
            raise ValueError(
                f"{name}: expects all branches to give one structure, with the same shapes and "
                f"dtypes: {one} gives {tree.describe(results[0])}, {other} gives "
                f"{tree.describe(result)}"
            )
        results.append(result)
        return tree.leaves(result)

    if is_recording():
        leaves = record_branches(selector, [partial(run, each) for each in functions])
        return tree.flatten(results[0])[1].unflatten(leaves)
    for function in functions:
        run(function)
    if selector.dtype == torch.bool:
        return _where(selector, *results)
    chosen = results[-1]
    for number, result in enumerate(results[:-1]):
        chosen = _where(selector == number, result, chosen)
    return chosen


def _where(flag: Tensor, yes: Tree, no: Tree) -> Tree:
    """``yes if flag else no``, under vmap for each member."""
    if runtime.has_one_value(flag):
        return yes if flag else no
    return tree.map(
        lambda one, other: one if one is other else torch.where(flag, one, other), yes, no
    )


def _recorded_while(
    holds: Callable[[Tree], Tensor], after: Callable[[Tree], Tree], carry: Tree
) -> Tree:
    leaves, treedef = tree.flatten(carry)

    def condition(inputs: list[Tensor]) -> Tensor:
        return holds(treedef.unflatten(inputs))

    def body(inputs: list[Tensor]) -> list[Tensor]:
        before = treedef.unflatten(inputs)
        result = after(before)
        if not is_recording():
            # Under torch.vmap inside the jitted function the members are in one loop.
            result = _where(holds(before), result, before)
        return treedef.flatten_up_to(result)

    return treedef.unflatten(record_while(leaves, condition, body))


def _iterations(xs: Tree, length: int | None) -> int:
    leaves, treedef = tree.flatten(xs)
    if length is not None and (isinstance(length, bool) or not isinstance(length, int)):
        raise TypeError(f"scan: expects an integer length, got {length!r}")
    extents = {} if length is None else {length: "length"}
    for path, leaf in zip(treedef.paths(), leaves, strict=True):
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            check_tensors("scan", "xs", leaf)
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
    return _same("scan", carry, result[0]), tree.map(_as_tensor, result[1])


def _same(name: str, carry: Tree, after: Tree) -> Tree:
    """The new carry, which must be like the old one."""
    after = tree.map(_as_tensor, after)
    if not tree.alike(carry, after):
        raise ValueError(
            f"{name}: the carry must keep its structure, shapes and dtypes, came in as "
            f"{tree.describe(carry)} and went out as {tree.describe(after)}"
        )
    return after


def _loop(f: Body, carry: Tree, xs: Tree, order: Any, reverse: bool) -> tuple[Tree, Tree]:
    ys = []
    for index in reversed(order) if reverse else order:
        carry, y = _call(f, carry, tree.map(lambda x, i=index: x[i], xs))
        ys.append(y)
    if reverse:
        ys.reverse()
    return carry, tree.map(lambda *each: torch.stack(each), *ys)


def _recorded(
    f: Body, carry: Tree, xs: Tree, length: int, unroll: int, reverse: bool
) -> tuple[Tree, Tree]:
    whole, rest = divmod(length, unroll)
    if unroll > 1:
        # Those that fill no body come last: in reverse these are the first ones.
        start, end = (rest, length) if reverse else (0, length - rest)
        full = tree.map(lambda x: x[start:end].unflatten(0, (whole, unroll)), xs)

        def several(carry: Tree, x: Tree) -> tuple[Tree, Tree]:
            return _loop(f, carry, x, range(unroll), reverse)

        carry, ys = _recorded(several, carry, full, whole, 1, reverse)
        ys = tree.map(lambda y: y.flatten(0, 1), ys)
        if rest:
            left = tree.map(lambda x: x[:start] if reverse else x[end:], xs)
            carry, more = _loop(f, carry, left, range(rest), reverse)
            pair = (more, ys) if reverse else (ys, more)
            ys = tree.map(lambda *parts: torch.cat(parts), *pair)
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

    results = record_loop(leaves, x_leaves, length, body, reverse=reverse)
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
