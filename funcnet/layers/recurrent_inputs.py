"""What recurrent layers take: an input, its first states and lengths, in several forms."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from funcnet import runtime, tree
from funcnet.core import Tree
from funcnet.errors import require


class Parts(NamedTuple):
    """The parts of an x: its input, ``hx`` and ``lengths``, None where they are not given."""

    input: Tensor
    hx: Tree = None
    lengths: Tensor | None = None


def parts_of(x: Tree, names: tuple[str, ...] = Parts._fields) -> Parts:
    """The parts of a tensor, of a tuple (input, hx), or of a dict with some of the names."""
    if type(x) is tuple and 1 <= len(x) <= 2:
        found = Parts(*x)
    elif isinstance(x, Mapping) and "input" in x and x.keys() <= set(names):
        found = Parts(**x)
    else:
        found = Parts(x)
    what = "expects a tensor, a tuple (input, hx) or a dict with input"
    also = " and ".join(names[1:])
    require(
        isinstance(found.input, Tensor),
        f"{what}, and, if wanted, {also}, got {tree.describe(x)}",
        TypeError,
    )
    floating = found.input.is_floating_point()
    wrong = f"expects a floating-point input, got {tree.describe(found.input)}"
    require(floating, wrong, TypeError)
    return found


def in_form_of(x: Tree, dinput: Tensor | None, dhx: Tree) -> Tree:
    """The cotangents of the parts in the form of x; lengths have none."""
    if isinstance(x, Tensor):
        return dinput
    if isinstance(x, tuple):
        return (dinput, dhx)[: len(x)]
    return {name: {"input": dinput, "hx": dhx}.get(name) for name in x}


def check_states(parts: Parts, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise unless hx is what the layer takes: a tensor for each name, alone if it is one."""
    if parts.hx is None:
        return
    names, hx = list(shapes), states_of(parts.hx)
    form = f"a tuple ({', '.join(names)}) as hx" if len(names) > 1 else "a tensor as hx"
    fits = isinstance(parts.hx, Tensor if len(names) == 1 else tuple) and len(hx) == len(names)
    tensors = fits and all([isinstance(each, Tensor) for each in hx])
    require(tensors, f"expects {form}, got {tree.describe(parts.hx)}", TypeError)
    for name, each in zip(names, hx, strict=True):
        expected, found = shapes[name], tuple(each.shape)
        require(
            found == expected,
            f"expects {name} of shape {expected} beside an input of shape "
            f"{tuple(parts.input.shape)}, got {found}",
        )
        alike = each.dtype == parts.input.dtype
        require(alike, f"{name} is {each.dtype}, the input is {parts.input.dtype}", TypeError)


def check_lengths(parts: Parts, batch: int | None) -> None:
    """Raise unless there is a length for each of the batch."""
    lengths = parts.lengths
    if lengths is None:
        return
    require(batch is not None, "expects lengths beside a batch alone, got an input of 2 dimensions")
    integers = isinstance(lengths, Tensor) and lengths.dtype in (torch.int32, torch.int64)
    require(integers, f"expects int32 or int64 lengths, got {tree.describe(lengths)}", TypeError)
    found = tuple(lengths.shape)
    require(found == (batch,), f"expects lengths of shape {(batch,)}, got {found}")


def check_values(name: str, lengths: Tensor, steps: int) -> None:
    """Raise unless the lengths are from 1 to the number of steps, where they can be read."""
    if values := runtime.read(lengths):
        low, high = min(values), max(values)
        inside = low >= 1 and high <= steps
        require(inside, f"{name}: expects lengths in [1, {steps}], got {low} to {high}")


def states_of(hx: Tree) -> tuple[Tensor, ...]:
    """The states as a tuple, whether there is one or several."""
    return hx if isinstance(hx, tuple) else (hx,)


def joined(states: tuple[Tensor, ...]) -> Tree:
    """The inverse of `states_of`: one state alone, or the tuple of several."""
    return states if len(states) > 1 else states[0]
