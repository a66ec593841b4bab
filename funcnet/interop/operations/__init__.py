"""The functions and methods of torch that a module's forward may call, by name.

`layer_of_call` finds the layer of a call, whose pullback is then the derivative. A function of
integers, or one without a derivative, is called as it is.
"""

import builtins
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import tree
from funcnet.core import Layer, Tree
from funcnet.interop.operations.arithmetic import ARITHMETIC, Call
from funcnet.interop.operations.functional import FUNCTIONAL
from funcnet.interop.operations.products import PRODUCTS
from funcnet.interop.operations.shapes import SHAPES

OPERATIONS: dict[str, Callable[..., Call]] = {**FUNCTIONAL, **SHAPES, **PRODUCTS, **ARITHMETIC}
"""Those with a derivative."""

CONSTANT = {
    *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "isnan"),
    *("isinf", "isfinite", "argmax", "argmin", "sign", "round", "floor", "ceil", "detach", "any"),
    *("all", "long", "int", "bool", "zeros_like", "ones_like", "full_like", "new_zeros", "arange"),
    *(
        "new_ones",
        "new_full",
        "new_tensor",
        "zeros",
        "ones",
        "full",
        "eye",
        "one_hot",
        "and_",
        "or_",
    ),
    *("invert", "not_", "bitwise_and", "bitwise_or", "bitwise_not", "argsort", "nonzero", "numel"),
    *("size", "dim", "ndimension", "stride", "is_floating_point", "element_size", "get_device"),
    *("floordiv", "mod", "linspace", "empty", "outer", "contains", "is_", "is_not"),
}
"""Those without: what they give has no cotangent."""

ATTRIBUTES = {"shape", "dtype", "device", "ndim", "is_cuda", "requires_grad", "nbytes"}
"""Attributes of a tensor that are no tensors."""

_MODULES = {
    "operator": operator,
    "torch": torch,
    "F": F,
    "linalg": torch.linalg,
    "special": torch.special,
    "math": math,
    "builtins": builtins,
}
_NAMED = {
    id(function): f"{where}:{name}"
    for where, module in reversed(_MODULES.items())
    for name, function in vars(module).items()
    if callable(function) and not name.startswith("__")
}


def name_of(function: Any) -> str | None:
    """A name for a function of torch or of Python, such as "torch:cat"; None for any other.

    >>> name_of(torch.cat), name_of(operator.add), name_of(F.relu), name_of(print)
    ('torch:cat', 'operator:add', 'F:relu', 'builtins:print')
    """
    return _NAMED.get(id(function))


def is_known(target: str) -> bool:
    """Whether a function is here; one of Python's may be called for numbers at least."""
    where, _, name = target.partition(":")
    return name in OPERATIONS or name in CONSTANT or where in ("math", "operator")


def run_plain(target: str, args: Any, kwargs: Any) -> Any:
    """What the function gives."""
    where, _, name = target.partition(":")
    if where == "method":
        return getattr(args[0], name)(*args[1:], **kwargs)
    return getattr(_MODULES[where], name)(*args, **kwargs)


def layer_of_call(target: str, args: Any, kwargs: Any) -> tuple[Layer, Tree] | None:
    """The layer of a call and its x; None where there is no derivative.

    >>> layer_of_call("torch:cat", ([torch.ones(1), torch.zeros(1)],), {})
    (concat(dim=0), (tensor([1.]), tensor([0.])))
    """
    name = target.partition(":")[2]
    given = tree.leaves((args, kwargs))
    has_floats = any([isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in given])
    if not has_floats or name in CONSTANT or (name == "getattr" and args[1] in ATTRIBUTES):
        return None
    if name not in OPERATIONS:
        raise ValueError(f"no layer for {name}")
    if kwargs.get("out", 0) is None:
        kwargs = {option: value for option, value in kwargs.items() if option != "out"}
    try:
        if "input" in kwargs:
            args, kwargs = (
                (kwargs["input"], *args),
                {k: v for k, v in kwargs.items() if k != "input"},
            )
        return OPERATIONS[name](*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"{name}: does not take {tree.describe(args)}: {error}") from error
