"""An x of several parts, some of them optional: the arguments of a module's forward in torch."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import Tree
from funcnet.errors import require

Form = tuple[str, ...] | int | None
"""How the parts came: in a dict with these names, in a tuple of this length, or as one tensor."""


def parts_of(x: Tree, names: tuple[str, ...], required: int) -> tuple[dict[str, Any], Form]:
    """The parts of x by name, without those that are None, and its form.

    Args:
        x: a tensor, which is the first part; a tuple of parts in the order of the names, or a
            dict of them. The last ones may be missing, in a dict any that is not required.
        names: of all parts.
        required: how many of them, the first ones, must be there.

    >>> import torch
    >>> one = torch.ones(())
    >>> parts_of((one, None), ("input", "target"), 1)
    ({'input': tensor(1.)}, 2)
    >>> parts_of({"inputs": one}, ("input", "target"), 1)
    Traceback (most recent call last):
    ...
    ValueError: expects a dict with 'input', and maybe ['target'], got ['inputs']
    """
    if isinstance(x, Tensor) and required <= 1:
        return {names[0]: x}, None
    if isinstance(x, Mapping):
        needed = " and ".join(map(repr, names[:required]))
        known = set(names[:required]) <= set(x) <= set(names)
        wrong = f"expects a dict with {needed}, and maybe {list(names[required:])}, got {sorted(x)}"
        require(known, wrong)
        given, form = dict(x), cast("Form", tuple(x))
    elif isinstance(x, tuple):
        counts = f"{required} to {len(names)}" if required < len(names) else f"{required}"
        wrong = f"expects a tuple of {counts}: ({', '.join(names)}), got one of {len(x)}"
        require(required <= len(x) <= len(names), wrong)
        given, form = dict(zip(names, x, strict=False)), len(x)
    else:
        one = "a tensor, " if required <= 1 else ""
        wrong = f"expects {one}a tuple ({', '.join(names)}) or a dict, got {tree.describe(x)}"
        raise TypeError(wrong)
    given = {name: part for name, part in given.items() if part is not None}
    missing = [name for name in names[:required] if name not in given]
    require(not missing, f"expects {' and '.join(names[:required])}, got None for {missing}")
    # Among residuals () stands for a part that the backward pass does not need.
    others = [name for name, part in given.items() if not isinstance(part, Tensor) and part != ()]
    require(not others, f"expects tensors, got {tree.describe(given)}", TypeError)
    return given, form


def without_tensors(
    parts: Mapping[str, Any], names: tuple[str, ...], form: Form
) -> dict[str, Tree]:
    """The residuals of which `in_form` takes the form, for a layer that keeps nothing else of x.

    >>> without_tensors({"input": 1}, ("input", "target"), 2)
    {'x': ((), None)}
    """
    return {} if form is None else {"x": in_form(dict.fromkeys(parts, ()), names, form)}


def in_form(
    parts: Mapping[str, Any], names: tuple[str, ...], form: Form | Mapping[str, Tree]
) -> Tree:
    """What `parts_of` took apart, with these parts; None for those that are missing.

    The form is that of `parts_of`, or residuals of `without_tensors`.

    >>> in_form({"input": 1}, ("input", "target"), 2)
    (1, None)
    """
    if isinstance(form, Mapping):
        form = parts_of(form["x"], names, 1)[1] if form else None
    if form is None:
        return parts[names[0]]
    if isinstance(form, int):
        return tuple([parts.get(name) for name in names[:form]])
    return {name: parts.get(name) for name in form}


def zero_cotangent(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """That of a tensor of which the size alone was read; None where it has integers.

    >>> zero_cotangent((2,), torch.float32, torch.device("cpu"))
    tensor([0., 0.])
    """
    zero = torch.zeros((), dtype=dtype, device=device)
    return zero.expand(shape) if dtype.is_floating_point else None
