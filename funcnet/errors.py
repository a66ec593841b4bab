"""Errors: how they are raised, and how they get the path of the layer they come from."""

from collections.abc import Mapping
from typing import Any


def require(condition: object, message: str, error: type[Exception] = ValueError) -> None:
    """Raise an error with a message unless a condition holds."""
    if not condition:
        raise error(message)


def locate(error: Exception, where: str) -> None:
    """Put a layer's path, or a part of it, in front of an error's message."""
    if isinstance(error, (ValueError, TypeError)) and len(error.args) == 1:
        error.args = (f"{where} {error.args[0]}",)
    else:
        error.add_note(f"in {where}")


def refuse_state(name: str, state: Mapping[str, Any]) -> None:
    """Raise ValueError: state was given to a layer or an optimizer that has none."""
    raise ValueError(f"{name}: has no state, got state with {sorted(state)}")
