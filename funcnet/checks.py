"""Checks of what the public functions are given; their errors say what to write instead."""

from collections.abc import Mapping
from inspect import Parameter
from typing import Any, NoReturn

from torch import Tensor

from funcnet.hints import hint_for
from funcnet.tree import describe, leaves

MISSING: Any = Parameter.empty
"""The default of an argument that must be given, for errors that say it in the user's words."""


def check_kind(name: str, found: Any, kind: type, role: str = "") -> None:
    """Raise TypeError, with what to do instead, for what is no Layer, Loss or Optimizer."""
    if not isinstance(found, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        as_role = f" as {role}" if role else ""
        got = hint_for(found, name, kind.__name__)
        raise TypeError(f"{name}: expects {article} {kind.__name__}{as_role}, got {got}")


def check_function(name: str, found: Any) -> None:
    """Raise TypeError, with what to do instead, for what is no function."""
    if not callable(found) or (getattr(found, "name", None) and hasattr(found, "call")):
        raise TypeError(f"{name}: expects a function, got {hint_for(found, name)}")


def check_tensors(name: str, what: str, given: Any) -> None:
    """Raise TypeError if there is an array of numpy, or of another library, in a tree."""
    for leaf in leaves(given):
        if not isinstance(leaf, Tensor) and hasattr(leaf, "__array__"):
            raise TypeError(f"{name}: expects tensors as {what}, got {describe(given)}")


def check_call(name: str, params: Any, x: Any, state: Any, key: Any) -> None:
    """Raise TypeError for arguments of a layer that are in each other's places, or arrays."""
    if not isinstance(params, Mapping):
        swapped = isinstance(x, Mapping) and not isinstance(params, (tuple, list))
        hint = "; the params come first: net.apply(params, x)" if swapped else ""
        raise TypeError(f"{name}: expects a dict of params, got {describe(params)}{hint}")
    if not isinstance(state, Mapping):
        hint = "; a key is given by name: key=..." if isinstance(state, Tensor) else ""
        raise TypeError(f"{name}: expects a dict of state, got {describe(state)}{hint}")
    if key is not None:
        check_key(name, key)
    check_tensors(name, "x", x)


def check_init(name: str, key: Any, x: Any) -> None:
    """Raise TypeError unless a layer's init has a key and an example input."""
    if not isinstance(key, Tensor):
        raise TypeError(f"{name}: init expects a key, such as {_key_for(key)}, got {describe(key)}")
    if x is MISSING:
        raise TypeError(
            f"{name}: init expects a key and an example input, net.init(key, x), got "
            f"{describe(key)} alone"
        )
    if key.shape[-1:] != (2,) or key.is_floating_point():
        hint = "; the key comes first: net.init(key, x)" if isinstance(x, Tensor) else ""
        raise TypeError(f"{name}: init expects a key, such as fn.key(0), got {describe(key)}{hint}")
    check_tensors(name, "x", x)


def check_key(name: str, key: Any) -> None:
    """Raise TypeError for a seed, a generator, or whatever else is no key."""
    if not isinstance(key, Tensor):
        raise TypeError(f"{name}: expects a key, such as {_key_for(key)}, got {describe(key)}")


def _key_for(given: Any) -> str:
    """The key that somebody meant who gave a seed or a generator."""
    return f"fn.key({given})" if type(given) is int else "fn.key(0)"


def refuse_missing(name: str, call: str, given: Any) -> NoReturn:
    """Raise TypeError: a layer's function has one argument, and needs two."""
    is_params = isinstance(given, Mapping) or given is None
    hint = "" if is_params else ", where params, state = net.init(key, x)"
    raise TypeError(
        f"{name}: {call} expects params and x, net.{call}(params, x){hint}; got one argument, "
        f"{describe(given)}"
    )
