"""Errors: how they are raised, and how they get the path of the layer they come from."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter
from typing import Any

MISSING: Any = Parameter.empty
"""The default of an argument that must be given, for errors that say it in the user's words."""


def require(condition: object, message: str, error: type[Exception] = ValueError) -> None:
    """Raise an error with a message unless a condition holds."""
    if not condition:
        raise error(message)


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
