"""Python numbers as arguments of a jitted function.

A new learning rate must not need a new program, and arithmetic on numbers must be Python's own:
``10**-n`` is an int or a float by the value of n, ``n * n`` has no largest value, the sum of two
bools is an int. So while a function is recorded, each int and float that it was given is a
`TracedNumber`. Arithmetic on it is recorded as a list of steps, which Python does again on the
numbers of each call. A number that meets a tensor becomes an input of the program. Where a result
has another type than when the function was recorded, or an ``if`` on it would go the other way,
the function is recorded again. A bool, which has two values, is part of what a program is made for.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from funcnet.compiler.escaped import escape_of
from funcnet.compiler.user_code import at_line

NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}
"""The types that count as numbers, and the dtype in which each is an input of a program."""

_library = torch.library.Library("funcnet", "FRAGMENT")
# The tag keeps make_fx from calling it at once, as it does with constants.
_library.define(
    "number(int index, ScalarType dtype) -> Tensor", tags=torch.Tag.nondeterministic_seeded
)


@torch.library.register_fake("funcnet::number", lib=_library)
def _(index: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((), dtype=dtype, device="cpu")


class _Value(NamedTuple):
    """The result of a step, or a number that was given, by its position among all of them."""

    position: int


class _Step(NamedTuple):
    """``function(*operands)``, whose result has this type."""

    function: Callable[..., Any]
    operands: tuple[Any, ...]
    result_type: type


class _Condition(NamedTuple):
    """What the function read of a value, and what it found: its truth, or its text."""

    read: Callable[[Any], Any]
    value: _Value
    found: Any


class _Raises(NamedTuple):
    """``function(*operands)``, which raised an error of this type; the function may catch it."""

    function: Callable[..., Any]
    operands: tuple[Any, ...]
    error: type[Exception]


class Arithmetic:
    """What a function does with the numbers that it is given, as steps to do again on others."""

    def __init__(self, given: Sequence[Any], names: Sequence[str]) -> None:
        self.values = [*given]
        # The names of the arguments from which each value was computed.
        self.sources = [{name} for name in names]
        self.steps: list[_Step | _Condition | _Raises] = []
        self.inputs: dict[int, int] = {}
        self.tensors: dict[int, Tensor] = {}
        self.refusal = ""
        self.escape = ""
        self.given = [TracedNumber(self, index) for index in range(len(given))]

    def record(self, function: Callable[..., Any], *operands: Any) -> Any:
        """Do a step now, and whenever the program runs."""
        self.check_is_traced()
        recorded = tuple([_Value(each._index) if is_traced(each) else each for each in operands])
        try:
            result = function(*[value_of_number(each) for each in operands])
        except Exception as error:
            self.steps.append(_Raises(function, recorded, type(error)))
            raise
        if result is NotImplemented:
            return result
        if type(result) not in NUMBERS:
            self.refuse(operands, f"becomes a {type(result).__name__}")
        self.steps.append(_Step(function, recorded, type(result)))
        self.values.append(result)
        self.sources.append(self._sources(operands))
        return TracedNumber(self, len(self.values) - 1)

    def read(self, number: "TracedNumber", read: Callable[[Any], Any]) -> Any:
        """``read(value)``, on which the function now depends."""
        self.check_is_traced()
        found = read(number._value)
        self.steps.append(_Condition(read, _Value(number._index), found))
        return found

    def input(self, number: "TracedNumber") -> Tensor:
        """The tensor for a number that meets tensors."""
        self.check_is_traced()
        index = number._index
        if index not in self.tensors:
            dtype = NUMBERS[type(number._value)]
            torch.tensor(number._value, dtype=dtype)  # raises if it is too large
            self.inputs[index] = len(self.inputs)
            self.tensors[index] = torch.ops.funcnet.number(self.inputs[index], dtype)
        return self.tensors[index]

    def again(self, given: Sequence[Any]) -> list[Any] | None:
        """The inputs for other numbers; None if the function would go another way with them."""
        values = [*given]
        for step in self.steps:
            if isinstance(step, _Condition):
                if step.read(values[step.value.position]) != step.found:
                    return None
                continue
            operands = [
                values[each.position] if type(each) is _Value else each for each in step.operands
            ]
            try:
                result = step.function(*operands)
            except Exception as error:
                # An error where there was none: tracing again raises it, or finds it caught.
                if not isinstance(step, _Raises) or type(error) is not step.error:
                    return None
                continue
            if isinstance(step, _Raises) or type(result) is not step.result_type:
                return None
            values.append(result)
        return [values[index] for index in self.inputs]

    def let_go(self, name: str) -> None:
        """The function has been traced: what is left of its numbers may not be used."""
        self.escape = escape_of(name, None, "number")
        self.tensors.clear()

    def check_is_traced(self) -> None:
        """Raise RuntimeError for what is done with a number after the function was traced."""
        if self.escape:
            raise RuntimeError(self.escape)

    def _sources(self, operands: Sequence[Any]) -> set[str]:
        indices = [each._index for each in operands if is_traced(each)]
        return {name for index in indices for name in self.sources[index]}

    def refuse(self, operands: Sequence[Any], what: str) -> NoReturn:
        """Raise TypeError for a use that would need the number's value."""
        found = sorted(self._sources(operands))
        # Sizes and positions are ints, and tensors are no sizes.
        sizes = all([isinstance(each, int) for each in operands if is_traced(each)])
        self.refusal = (
            f"jit: the number {' and '.join(found)} {what}, which reads the value while the "
            f"function is traced: name it in static={'' if sizes else ', or pass a tensor'}"
            f"{at_line()}"
        )
        raise TypeError(self.refusal)


def value_of_number(operand: Any) -> Any:
    """The value of a traced number; anything else itself."""
    return operand._value if is_traced(operand) else operand


class TracedNumber:
    """A Python number that a function is traced with; see the module's docstring.

    To ``isinstance`` it is a bool, an int or a float, as its value is.
    """

    __slots__ = ("_arithmetic", "_index")

    def __init__(self, arithmetic: Arithmetic, index: int) -> None:
        self._arithmetic = arithmetic
        self._index = index

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._value)

    @property
    def _value(self) -> Any:
        return self._arithmetic.values[self._index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from funcnet.compiler.promotion import call_with_numbers

        return call_with_numbers(func, args, kwargs or {})

    def __bool__(self) -> bool:
        return bool(self._arithmetic.read(self, bool))

    def __repr__(self) -> str:
        if self._arithmetic.escape:
            return "<a number without a value, made while a function was traced>"
        return str(self._arithmetic.read(self, repr))

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return str(self._arithmetic.read(self, functools.partial(_formatted, spec)))

    def __round__(self, digits: int | None = None) -> Any:
        return self._arithmetic.record(round, self, digits)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __getattr__(self, name: str) -> Any:
        if hasattr(self._value, name):
            self._arithmetic.refuse([self], f"is asked for its {name}")
        raise AttributeError(name)

    def __copy__(self) -> "TracedNumber":
        return self

    def __deepcopy__(self, memo: Any) -> "TracedNumber":
        return self


def _formatted(spec: str, value: Any) -> str:
    return format(value, spec)


def is_traced(operand: Any) -> bool:
    """Whether it is a `TracedNumber`, whatever its class says."""
    return type(operand) is TracedNumber


def _binary(function: Callable[..., Any], swapped: bool) -> Callable[..., Any]:
    def method(self: TracedNumber, other: Any, *rest: Any) -> Any:
        if not isinstance(other, (bool, int, float)):
            return NotImplemented
        operands = (other, self) if swapped else (self, other)
        return self._arithmetic.record(function, *operands, *rest)

    return method


def _unary(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self: self._arithmetic.record(function, self)


def _refused(what: str) -> Callable[..., Any]:
    return lambda self, *_: self._arithmetic.refuse([self], what)


_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "pow": pow,
    "truediv": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "lshift": operator.lshift,
    "rshift": operator.rshift,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}
_COMPARISONS = ("lt", "le", "eq", "ne", "ge", "gt")
_UNARY: dict[str, Callable[..., Any]] = {
    "neg": operator.neg,
    "pos": operator.pos,
    "abs": abs,
    "invert": operator.invert,
    "floor": math.floor,
    "ceil": math.ceil,
    "trunc": math.trunc,
}
_READS = {
    **dict.fromkeys(("int", "index"), "is needed as an int"),
    **dict.fromkeys(("float", "complex"), "is needed as a float"),
    "hash": "is hashed",
    "reduce_ex": "is pickled",
}
for _name, _function in _ARITHMETIC.items():
    setattr(TracedNumber, f"__{_name}__", _binary(_function, False))
    setattr(TracedNumber, f"__r{_name}__", _binary(_function, True))
for _name in _COMPARISONS:
    setattr(TracedNumber, f"__{_name}__", _binary(getattr(operator, _name), False))
for _name, _function in _UNARY.items():
    setattr(TracedNumber, f"__{_name}__", _unary(_function))
for _name, _what in _READS.items():
    setattr(TracedNumber, f"__{_name}__", _refused(_what))
