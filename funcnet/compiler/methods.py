"""Jitted methods of objects that are no trees of tensors."""

from collections.abc import Callable, Sequence
from typing import Any


class Method:
    """A jitted method of an instance, which it keeps alive."""

    __slots__ = ("_instance", "_jitted")

    def __init__(self, jitted: Any, instance: Any) -> None:
        self._jitted = jitted
        self._instance = instance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._jitted(*args, **kwargs)

    def __repr__(self) -> str:
        return repr(self._jitted)

    @property
    def lower(self) -> Callable[..., Any]:
        """The jitted function's ``lower``."""
        return self._jitted.lower

    @property
    def clear(self) -> Callable[[], None]:
        """The jitted function's ``clear``."""
        return self._jitted.clear


def without_self(which: Sequence[Any]) -> tuple[Any, ...]:
    """Positions and names of parameters, without the first one and counted after it.

    >>> without_self([0, 2, -1, "x"])
    (1, -1, 'x')
    """
    rest = [each for each in which if each != 0]
    return tuple([each - 1 if isinstance(each, int) and each > 0 else each for each in rest])
