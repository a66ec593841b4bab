"""Errors: how they are raised, and how they get the path of the layer they come from."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


def require(condition: object, message: str, error: type[Exception] = ValueError) -> None:
    """Raise an error with a message unless a condition holds."""
    if not condition:
        raise error(message)


_INSTEAD_OF_TORCHS = {
    "Layer": "make one of a module by fn.interop.from_module",
    "Loss": "take one of funcnet's, such as fn.cross_entropy()",
    "Optimizer": "take one of funcnet's, such as fn.adam(1e-3)",
}


def check_kind(name: str, found: Any, kind: type, role: str = "") -> None:
    """Raise TypeError, with what to do instead, for what is no Layer, Loss or Optimizer."""
    if isinstance(found, kind):
        return
    of_torch = isinstance(found, (torch.nn.Module, torch.optim.Optimizer))
    hint = ""
    if of_torch or getattr(found, "__module__", "").startswith("torch."):
        hint = f"; {_INSTEAD_OF_TORCHS[kind.__name__]}"
    elif callable(found):
        hint = "; call its constructor"
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    as_role = f" as {role}" if role else ""
    got = f"{type(found).__name__}{hint}"
    raise TypeError(f"{name}: expects {article} {kind.__name__}{as_role}, got {got}")


def check_count(name: str, least: int = 1, **options: Any) -> None:
    """Raise ValueError for an option that is no integer of at least ``least``.

    >>> check_count("lookahead", k=0)
    Traceback (most recent call last):
    ...
    ValueError: lookahead: k must be an integer >= 1, got 0
    """
    for option, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: {option} must be an integer >= {least}, got {value!r}")


def locate(error: Exception, where: str) -> None:
    """Put a layer's path, or a part of it, in front of an error's message."""
    if isinstance(error, (ValueError, TypeError)) and len(error.args) == 1:
        error.args = (f"{where} {error.args[0]}",)
    else:
        error.add_note(f"in {where}")


@contextmanager
def located(where: str) -> Iterator[None]:
    """A block whose errors get a layer's path, or its name, in front."""
    try:
        yield
    except Exception as error:
        locate(error, where)
        raise


def refuse_state(name: str, state: Mapping[str, Any]) -> None:
    """Raise ValueError: state was given to a layer or an optimizer that has none."""
    raise ValueError(f"{name}: has no state, got state with {sorted(state)}")
