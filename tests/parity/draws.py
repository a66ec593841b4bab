"""A case of our own, written as arguments and shapes; its numbers are drawn when it is run."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


class Draw(NamedTuple):
    """A tensor that is drawn when a case is run: a function of a generator and a dtype."""

    make: Callable[[torch.Generator, torch.dtype], Any]


def normal(*shape: int) -> Draw:
    return Draw(lambda rng, dtype: torch.randn(shape, generator=rng, dtype=torch.double).to(dtype))


def uniform(*shape: int) -> Draw:
    """Numbers in [0.05, 0.95): probabilities."""
    return Draw(
        lambda rng, dtype: (
            torch.rand(shape, generator=rng, dtype=torch.double).mul(0.9).add(0.05).to(dtype)
        )
    )


def simplex(*shape: int) -> Draw:
    """Probabilities of classes, dimension 1."""
    return Draw(lambda rng, dtype: normal(*shape).make(rng, torch.double).softmax(1).to(dtype))


def log_probabilities(*shape: int) -> Draw:
    """Logarithms of the probabilities of classes, dimension 1, or 0 where there is one alone."""
    dim = 1 if len(shape) > 1 else 0
    return Draw(
        lambda rng, dtype: normal(*shape).make(rng, torch.double).log_softmax(dim).to(dtype)
    )


def signs(*shape: int) -> Draw:
    """1 and -1."""
    return Draw(lambda rng, dtype: (torch.randint(2, shape, generator=rng) * 2 - 1).to(dtype))


def integers(high: int, *shape: int) -> Draw:
    """Integers in [0, high)."""
    return Draw(lambda rng, dtype: torch.randint(high, shape, generator=rng))


def fixed(values: Any) -> Draw:
    """Integers as they are."""
    return Draw(lambda rng, dtype: torch.tensor(values))


def counts(*shape: int) -> Draw:
    """Small whole numbers as floating-point ones."""
    return Draw(lambda rng, dtype: torch.randint(5, shape, generator=rng).to(dtype))


def pooled(shape: tuple[int, ...], *window: Any) -> Draw:
    """What a pooling of a drawn input gives, ``(y, indices)``: two inputs."""
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(shape) - 3]

    def make(rng: torch.Generator, dtype: torch.dtype) -> Any:
        return pool(normal(*shape).make(rng, dtype), *window, return_indices=True)

    return Draw(make)


class Nested(NamedTuple):
    """A module that is an argument of another one; the layer of its name is an argument of ours."""

    name: str
    args: tuple[Any, ...] = ()

    def theirs(self) -> nn.Module:
        args = [each.theirs() if isinstance(each, Nested) else each for each in self.args]
        return getattr(nn, self.name)(*args)


class Case(NamedTuple):
    """Arguments of a class of torch.nn, and the inputs of a call.

    An input is a shape, whose numbers are from N(0, 1), or a `Draw`; so may be an argument.
    ``options`` are keyword arguments of torch's forward; they may be drawn, too.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Any, ...]
    options: dict[str, Any]

    def drawn(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """``(args, kwargs, inputs, options)`` with numbers, the same ones each time."""
        rng = torch.Generator().manual_seed(0)

        def number(value: Any) -> Any:
            return value.make(rng, dtype) if isinstance(value, Draw) else value

        inputs: list[Any] = []
        for each in self.inputs:
            value = number(normal(*each) if type(each) is tuple else each)
            inputs += value if type(value) is tuple else [value]
        args = tuple(map(number, self.args))
        kwargs, options = (
            {name: number(value) for name, value in given.items()}
            for given in (self.kwargs, self.options)
        )
        return args, kwargs, tuple(inputs), options


def case(*args: Any, x: Any, forward: dict[str, Any] | None = None, **kwargs: Any) -> Case:
    """A case; ``x`` is its input, or a list of them."""
    return Case(args, kwargs, tuple(x) if isinstance(x, list) else (x,), forward or {})


def each(*args: Any, x: Any, together: int = 1, **choices: list[Any]) -> list[Case]:
    """The case without options, and those with one option, or ``together`` of them, for each value.

    >>> [case.kwargs for case in each(2, x=(3,), a=[1], b=[2, 3])]
    [{}, {'a': 1}, {'b': 2}, {'b': 3}]
    """
    found = []
    for count in range(together + 1):
        for names in itertools.combinations(choices, count):
            for values in itertools.product(*[choices[name] for name in names]):
                found.append(case(*args, x=x, **dict(zip(names, values, strict=True))))
    return found
