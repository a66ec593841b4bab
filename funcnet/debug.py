"""Looking at values while a function runs, compiled or not."""

import string
from typing import Any

import torch
from torch import Tensor

from funcnet.compiler.loops import PRINTS, library


def debug_print(format: str, **tensors: Any) -> None:
    """Print tensors when the function runs: in a jitted function too, in loops and for each member.

    ``print`` belongs to tracing: it would run once, when there are no values yet.

    Args:
        format: as for ``str.format``, with the names of the tensors.
        tensors: what it shows; tensors or numbers.

    Under `jit` the text is printed whenever the program comes there, in order, also where nothing
    else of the function's results depends on it. Under `vmap` each member prints. It costs a few
    microseconds, and members of a map that print run one after the other.

    Raises:
        ValueError: the format names what is not given.
        TypeError: what is given is neither a tensor nor a number.

    Source: ``jax.debug.print``.

    >>> import funcnet as fn
    >>> def double(x):
    ...     y = 2 * x
    ...     fn.debug_print("twice {x} is {y:.1f}", x=x, y=y)
    ...     return y
    >>> y = fn.jit(double)(torch.tensor(3.0))
    twice 3.0 is 6.0
    """
    if not isinstance(format, str):
        raise TypeError(f"debug_print: expects a format string first, got {type(format).__name__}")
    fields = [field for _, field, _, _ in string.Formatter().parse(format) if field is not None]
    for field in fields:
        name = field.partition(".")[0].partition("[")[0]
        if name not in tensors:
            raise ValueError(
                f"debug_print: the format names {name!r}, and what is given is {[*tensors]}; "
                "give each tensor by its name: debug_print('x is {x}', x=x)"
            )
    given = []
    for name, value in tensors.items():
        if not isinstance(value, (Tensor, bool, int, float)):
            raise TypeError(f"debug_print: expects tensors and numbers, got {value!r} as {name!r}")
        given.append(value if isinstance(value, Tensor) else torch.tensor(value))
    torch.ops.funcnet.debug_print(given, format, [*tensors])


# The tag keeps make_fx from calling it at once on small constants.
library.define(
    "debug_print(Tensor[] tensors, str format, str[] names) -> ()",
    tags=torch.Tag.nondeterministic_seeded,
)


@torch.library.impl(library, "debug_print", "CompositeExplicitAutograd")
def _print(tensors: list[Tensor], format: str, names: list[str]) -> None:
    # A tensor of one number is formatted as the number.
    print(format.format(**dict(zip(names, [each.detach() for each in tensors], strict=True))))


@torch.library.register_fake(PRINTS, lib=library)
def _(tensors: list[Tensor], format: str, names: list[str]) -> None:
    return None


@torch.library.register_vmap(PRINTS, lib=library)
def _each(info: Any, in_dims: Any, tensors: list[Tensor], format: str, names: list[str]) -> Any:
    for member in range(info.batch_size):
        own = [
            each if axis is None else each.select(axis, member)
            for each, axis in zip(tensors, in_dims[0], strict=True)
        ]
        torch.ops.funcnet.debug_print(own, format, names)
    return None, None
