"""Parameters and state, declared once: how they are made, and what given ones must be."""

import math
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import EMPTY, Params, Tree
from funcnet.errors import locate, refuse_state
from funcnet.initializers import Initializer, torch_default
from funcnet.random import fold_in


class Param(NamedTuple):
    """One parameter of a layer.

    Args:
        shape: its shape.
        init: makes its first value, ``(key, shape, dtype, device) -> tensor``.
        dtype: what it is made in; default that of x, or float32 if x is not floating. Beside a
            floating x it must have x's dtype when it is used, unless it is an integer.
        wide: whether it may also be float32 beside an x of half precision.
        of_x: which of its sizes are sizes of x, as an index or slice into its shape, and what
            they are in words: ``(1, "{} features in the last dimension")``. For errors.
    """

    shape: tuple[int, ...]
    init: Initializer
    dtype: torch.dtype | None = None
    wide: bool = False
    of_x: tuple[int | slice, str] | None = None


class State(Param):
    """One tensor of a layer's state, such as a running mean; the arguments are those of `Param`."""


def declare(declaration: Callable[[Tree], Mapping[str, Param]]) -> "Declaration":
    """Makes the ``init`` of a layer, and the check of its arguments, from one declaration.

    The function declares the parameters, and the state, for an input like x: ``x -> {name: Param
    or State}``. It reads only the shape and dtype of x, and raises ValueError or TypeError
    for an x that does not fit; the layer's name is put in front. `stateless` and `stateful` call
    it at each use of the layer, too, and hold the arguments to it.

    >>> import funcnet as fn
    >>> @declare
    ... def init(x):
    ...     return {"scale": Param((x.shape[-1],), fn.initializers.ones())}
    >>> init(fn.key(0), torch.zeros(5, 2))
    ({'scale': tensor([1., 1.])}, {})
    >>> init.check("scale", {"scale": torch.ones(3)}, {}, torch.zeros(5, 2))
    Traceback (most recent call last):
    ...
    ValueError: scale: expects a scale of shape (2,), got (3,)
    """
    return Declaration(declaration)


class Declaration:
    """What `declare` makes of a function: an ``init`` that can check a layer's arguments too."""

    def __init__(self, declaration: Callable[[Tree], Mapping[str, Param]]) -> None:
        self.declaration = declaration
        self._known = _Known(None, None, EMPTY, ())

    def __call__(self, key: Tensor, x: Tree, layer: str = "init") -> tuple[Params, Params]:
        """``(params, state)``; each tensor's key is folded from ``key`` by its name."""
        params: dict[str, Tensor] = {}
        state: dict[str, Tensor] = {}
        for name, entry in self._declared(layer, x).items():
            dtype = entry.dtype or _floating_dtype(x) or torch.float32
            made = entry.init(fold_in(key, name), entry.shape, dtype, tree.device_of(x))
            (state if isinstance(entry, State) else params)[name] = made
        return params, state

    def _declared(self, layer: str, x: Tree) -> Mapping[str, Param]:
        try:
            return self.declaration(x)
        except (ValueError, TypeError) as error:
            locate(error, f"{layer}:")
            raise

    def check(self, layer: str, params: Params, state: Params, x: Tree) -> None:
        """Raise ValueError or TypeError unless x fits, and params and state are as declared."""
        known = self._known
        if type(x) is not Tensor or known.dtype is not x.dtype or known.shape != x.shape:
            known = self._known = _Known.of(self._declared(layer, x), x)
        try:
            for name, is_state, shape, dtype in known.leaves:
                leaf: Any = (state if is_state else params).get(name)
                if leaf.shape != shape or leaf.dtype is not dtype:
                    break
            else:
                if len(params) + len(state) == len(known.leaves):
                    return
        except (TypeError, AttributeError, RuntimeError):
            pass
        known.explain(layer, params, state, x)


class _Known(NamedTuple):
    """What was declared for the last x, whose shape and dtype are mostly those of the next one.

    To declare anew at each call takes 5 % of the eager step of a small net.
    """

    shape: Any
    dtype: Any
    declared: Mapping[str, Param]
    leaves: tuple[tuple[str, bool, tuple[int, ...], Any], ...]

    @classmethod
    def of(cls, declared: Mapping[str, Param], x: Tree) -> "_Known":
        """What to compare the next call's arguments with."""
        shape, kind = (x.shape, x.dtype) if type(x) is Tensor else (None, None)
        dtype = _floating_dtype(x)
        leaves = [
            (name, isinstance(e, State), e.shape, e.dtype if _is_integer(e.dtype) else dtype)
            for name, e in declared.items()
        ]
        return cls(shape, kind, declared, tuple(leaves))

    def explain(self, layer: str, params: Params, state: Params, x: Tree) -> None:
        """Raise what is wrong with the arguments, if anything is."""
        for what, found in (("params", params), ("state", state)):
            expected = [leaf[0] for leaf in self.leaves if leaf[1] == (what == "state")]
            if not isinstance(found, Mapping):
                raise TypeError(f"{layer}: expects a dict of {what}, got {tree.describe(found)}")
            if sorted(found) != sorted(expected):
                if what == "state" and not expected:
                    refuse_state(layer, found)
                raise ValueError(f"{layer}: expects {what} {sorted(expected)}, got {sorted(found)}")
            for name in expected:
                _explain_one(layer, name, self.declared[name], found[name], x)


def _is_integer(dtype: torch.dtype | None) -> bool:
    return dtype is not None and not dtype.is_floating_point


def weight_and_bias(
    shape: tuple[int, ...],
    of_x: tuple[int | slice, str],
    bias: bool,
    weight_init: Initializer | None,
    bias_init: Initializer | None,
    dtype: torch.dtype | None,
    out: int | None = None,
) -> dict[str, Param]:
    """A weight of shape (out, ...), and a bias of shape (out,), each U(-b, b) by default.

    ``b = 1 / sqrt(fan_in)``, where fan_in is the number of elements of ``weight[0]``, as in
    ``torch.nn.Linear`` and torch's convolutions. ``out`` says the size of the bias where the
    weight's first one is another.
    """
    default = torch_default(math.prod(shape[1:]))
    declared = {"weight": Param(shape, weight_init or default, dtype, of_x=of_x)}
    if bias:
        declared["bias"] = Param((out or shape[0],), bias_init or default, dtype)
    return declared


_shape, _dtype = attrgetter("shape"), attrgetter("dtype")
_HALF = (torch.float16, torch.bfloat16)


def _floating_dtype(x: Tree) -> torch.dtype | None:
    """The dtype of the first floating tensor of x."""
    return next((leaf.dtype for leaf in tree.leaves(x) if leaf.is_floating_point()), None)


def _has_right_dtype(leaf: Tensor, entry: Param, x: Tree) -> bool:
    expected = _floating_dtype(x)
    if not leaf.is_floating_point():
        return leaf.dtype == entry.dtype
    wide = entry.wide and expected in _HALF and leaf.dtype == torch.float32
    return expected is None or leaf.dtype == expected or wide


def _explain_one(layer: str, name: str, entry: Param, leaf: Any, x: Tree) -> None:
    if not isinstance(leaf, Tensor):
        raise TypeError(f"{layer}: expects a tensor as {name}, got {tree.describe(leaf)}")
    if not _has_right_dtype(leaf, entry, x):
        raise TypeError(f"{layer}: {name} is {leaf.dtype}, x is {_floating_dtype(x)}")
    if leaf.shape == entry.shape:
        return
    if entry.of_x is not None and len(leaf.shape) == len(entry.shape):
        index, words = entry.of_x
        matched: Any = list(entry.shape)
        matched[index] = leaf.shape[index]
        if leaf.shape == tuple(matched):
            size: Any = leaf.shape[index]
            words = words.format(tuple(size) if isinstance(index, slice) else size)
            found = tuple(x.shape) if isinstance(x, Tensor) else tree.describe(x)
            raise ValueError(f"{layer}: {name} expects {words}, got {found}")
    raise ValueError(
        f"{layer}: expects a {name} of shape {tuple(entry.shape)}, got {tuple(leaf.shape)}"
    )
