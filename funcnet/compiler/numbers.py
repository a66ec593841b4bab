"""Python numbers as arguments of a jitted function.

Another learning rate shall not need another program, and arithmetic on numbers is Python's own:
``10**-n`` is an int or a float by the value of n, ``n * n`` has no largest value, the sum of two
bools is an int. So while a function is traced, each int and float that it was given is a
`TracedNumber`. Arithmetic on it is recorded as a list of steps, and done again, in Python, on the
numbers of each call. What meets a tensor becomes an input of the program. Where a result has
another type than when it was traced, or an ``if`` on it would go the other way, the function is
traced again. A bool, which has two values, is part of what the program is made for.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from funcnet import tree

aten = torch.ops.aten

NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}
"""The types that count as numbers, and the dtype in which each is an input of a program."""

_library = torch.library.Library("funcnet", "FRAGMENT")
# The tag keeps make_fx from calling it at once, as it does with constants.
_library.define(
    "number(int position, ScalarType dtype) -> Tensor", tags=torch.Tag.nondeterministic_seeded
)


@torch.library.register_fake("funcnet::number", lib=_library)
def _(position: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((), dtype=dtype, device="cpu")


class _Value(NamedTuple):
    """The result of a step, or a number that was given, by its position."""

    position: int


class _Step(NamedTuple):
    """``function(*operands)``, whose result has this type."""

    function: Callable[..., Any]
    operands: tuple[Any, ...]
    kind: type


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
        self.given = [TracedNumber(self, position) for position in range(len(given))]

    def record(self, function: Callable[..., Any], *operands: Any) -> Any:
        """Do a step now, and whenever the program runs."""
        recorded = tuple([_Value(each._position) if _is(each) else each for each in operands])
        try:
            result = function(*[_value_of(each) for each in operands])
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
        found = read(number._value)
        self.steps.append(_Condition(read, _Value(number._position), found))
        return found

    def input(self, number: "TracedNumber") -> Tensor:
        """The tensor for a number that meets tensors."""
        position = number._position
        if position not in self.tensors:
            dtype = NUMBERS[type(number._value)]
            torch.tensor(number._value, dtype=dtype)  # raises if it is too large
            self.inputs[position] = len(self.inputs)
            self.tensors[position] = torch.ops.funcnet.number(self.inputs[position], dtype)
        return self.tensors[position]

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
            if isinstance(step, _Raises) or type(result) is not step.kind:
                return None
            values.append(result)
        return [values[position] for position in self.inputs]

    def _sources(self, operands: Sequence[Any]) -> set[str]:
        positions = [each._position for each in operands if _is(each)]
        return {name for position in positions for name in self.sources[position]}

    def refuse(self, operands: Sequence[Any], what: str) -> NoReturn:
        """Raise TypeError for a use that would need the number's value."""
        found = sorted(self._sources(operands))
        self.refusal = (
            f"jit: the number {' and '.join(found)} {what}, which reads the value while the "
            "function is traced: name it in static=, or pass a tensor"
        )
        raise TypeError(self.refusal)


def _value_of(operand: Any) -> Any:
    return operand._value if _is(operand) else operand


class TracedNumber:
    """A Python number that a function is traced with; see the module's docstring.

    To ``isinstance`` it is a bool, an int or a float, as its value is.
    """

    __slots__ = ("_arithmetic", "_position")

    def __init__(self, arithmetic: Arithmetic, position: int) -> None:
        self._arithmetic = arithmetic
        self._position = position

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._value)

    @property
    def _value(self) -> Any:
        return self._arithmetic.values[self._position]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    def __bool__(self) -> bool:
        return bool(self._arithmetic.read(self, bool))

    def __repr__(self) -> str:
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


def _is(operand: Any) -> bool:
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


# Numbers and tensors: everything below is about calls of torch's functions with numbers in them.


@contextmanager
def numbers_meet_tensors(arithmetic: Arithmetic) -> Iterator[None]:
    """Let torch's functions take traced numbers, with the dtypes that Python numbers give."""
    with _Promotion(arithmetic), _Constructors():
        yield


class _Constructors(TorchFunctionMode):
    """Finds traced numbers where torch does not look for them: ``torch.tensor([n, 1.0])``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FROM_DATA and _numbers_in((args, kwargs)):
            return _call(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


_FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor, torch.full)


def _numbers_in(arguments: Any) -> list[TracedNumber]:
    return [leaf for leaf in tree.leaves(arguments) if _is(leaf)]


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    """``func`` of tensors and traced numbers: what it gives for the numbers themselves."""
    numbers = _numbers_in((args, kwargs))
    arithmetic = numbers[0]._arithmetic
    name = getattr(func, "__name__", str(func))
    # What it gives eagerly is the measure, and what it does not take is an error here too.
    expected = _eager(func, args, kwargs)
    taken = _takes(name, numbers, args, expected)
    result = None
    if taken:
        try:
            result = _with_tensors(func, name, args, kwargs, expected)
        except (DataDependentOutputException, _UnknownError, RuntimeError, ValueError, TypeError):
            # The number itself is taken, so it is for its tensor that the function fails.
            taken = False
    if not taken or _kinds(result) != _kinds(expected):
        arithmetic.refuse(numbers, f"goes to {name}")
    return result


def _with_tensors(func: Any, name: str, args: Any, kwargs: Any, expected: Any) -> Any:
    if func in _FROM_DATA:
        return _from_data(func, args, kwargs, expected)
    if _base_name(name) in _POWERS:
        return func(*_powers(args), **kwargs)
    lowered, named = tree.map(_lowered, (args, kwargs))
    if not any([isinstance(leaf, Tensor) for leaf in tree.leaves((args, kwargs))]):
        raise _UnknownError(name)
    return func(*lowered, **named)


def _base_name(name: str) -> str:
    """``add`` for ``add_``, ``__add__`` and ``__iadd__``."""
    plain = name.strip("_")
    return plain[1:] if name.startswith("__") and plain[:1] in ("i", "r") else plain


_POWERS = ("pow", "float_power")
_WRAPS = ("add", "sub", "mul")
_DIVIDES = ("div", "truediv", "true_divide")
_CASTS = ("fill", "masked_fill", "setitem", "index_fill", "copy", "to")


def _takes(name: str, numbers: Sequence[TracedNumber], args: Any, expected: Any) -> bool:
    """Whether PyTorch's kernels take the numbers, which fake tensors do not tell."""
    plain = _base_name(name)
    leaves = [leaf for leaf in tree.leaves((expected, args)) if isinstance(leaf, Tensor)]
    for number in numbers:
        for dtype in {leaf.dtype for leaf in leaves} - {torch.bool}:
            # Arithmetic wraps what does not fit, or makes it infinite; other kernels refuse it.
            wraps = plain in _WRAPS or (dtype.is_floating_point and plain in _DIVIDES)
            if not wraps and not number._arithmetic.read(number, functools.partial(_fits, dtype)):
                return False
        in_place = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
        written = args[0] if in_place and plain not in _CASTS and args else None
        if isinstance(written, Tensor):
            # Adding 0.5 to integers in place, say.
            result = torch.result_type(written, number._value)
            if not torch.can_cast(result, written.dtype):
                return False
    return True


def _fits(dtype: torch.dtype, value: Any) -> bool:
    if dtype.is_floating_point:
        return not math.isfinite(value) or abs(value) <= torch.finfo(dtype).max
    limits = torch.iinfo(dtype)
    return bool(limits.min <= value <= limits.max)


def _lowered(leaf: Any) -> Any:
    return leaf._arithmetic.input(leaf) if _is(leaf) else leaf


def _kinds(result: Any) -> Any:
    leaves = tree.leaves(result)
    return [(leaf.shape, leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor)]


def _eager(func: Any, args: Any, kwargs: Any) -> Any:
    """The result for the numbers' values, unrecorded, on copies, as ``func`` may write to them."""

    def plain(leaf: Any) -> Any:
        return leaf.detach().clone() if isinstance(leaf, Tensor) else _value_of(leaf)

    with disable_proxy_modes_tracing(), torch.no_grad():
        copies, named = tree.map(plain, (args, kwargs))
        return func(*copies, **named)


def _powers(args: Sequence[Any]) -> list[Any]:
    """The operands of a power, which torch computes otherwise where the exponent is special."""
    lowered = []
    for place, arg in enumerate(args):
        if place == 1 and _is(arg):
            special = [each for each in (-2, -1, -0.5, 0, 0.5, 1, 2, 3) if bool(arg == each)]
            if special:
                lowered.append(type(arg._value)(special[0]))
                continue
            base = args[0]
            if not (arg >= 0 or isinstance(arg, float) or base.is_floating_point()):
                raise RuntimeError("Integers to negative integer powers are not allowed.")
        lowered.append(_lowered(arg))
    return lowered


def _from_data(func: Any, args: Any, kwargs: Any, expected: Tensor) -> Tensor:
    """``torch.tensor`` and its like, of numbers of which some are traced."""
    names = ("size", "fill_value") if func is torch.full else ("data",)
    given = dict(zip(names, args, strict=False)) | kwargs
    data = next(given.pop(name) for name in ("fill_value", "data", "obj", "s") if name in given)
    if _numbers_in(given):
        raise _UnknownError("a shape or an option is a traced number")
    dtype, device = expected.dtype, expected.device
    elements = [
        # A copy: the tensor of a number goes on standing for the number.
        _lowered(leaf).to(device, dtype, copy=True)
        if _is(leaf)
        else torch.tensor(leaf, device=device, dtype=dtype)
        for leaf in tree.leaves(data)
    ]
    if func is torch.full:
        return elements[0].expand(expected.shape).clone()
    return torch.stack(elements).reshape(expected.shape)


class _UnknownError(Exception):
    """An operator got a number of which it is not known how it is one."""


class _Promotion(TorchDispatchMode):
    """Lets the tensors of numbers promote dtypes as numbers do: by their kind alone.

    A float times a 0-d float32 tensor is float32; a 0-d float64 tensor would make it float64.
    """

    def __init__(self, arithmetic: Arithmetic) -> None:
        super().__init__()
        self._arithmetic = arithmetic

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        numbers = {id(each) for each in self._arithmetic.tensors.values()}
        leaves = [leaf for leaf in tree.leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        others = [leaf for leaf in leaves if id(leaf) not in numbers]
        if len(others) == len(leaves) or operator in _TAKES_ANY or operator.namespace == "prim":
            return operator(*args, **kwargs)
        if torch.Tag.pointwise not in operator.tags:
            raise _UnknownError(operator)

        def cast(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and id(leaf) in numbers:
                return leaf.to(_promoted(leaf, others))
            return leaf

        args, kwargs = tree.map(cast, (args, kwargs))
        return operator(*args, **kwargs)


# These give their result the dtype of the tensor that is written, or one that they are told.
_TAKES_ANY = {
    *(aten._to_copy.default, aten.detach.default, aten.clone.default),
    *(aten.view.default, aten.expand.default, aten.unsqueeze.default),
    *(aten.copy_.default, aten.fill_.Tensor, aten.fill.Tensor),
    *(aten.masked_fill.Tensor, aten.masked_fill_.Tensor),
    *(aten._foreach_mul.Tensor, aten._foreach_mul_.Tensor),
    *(aten._foreach_div.Tensor, aten._foreach_div_.Tensor),
}


def _promoted(number: Tensor, others: Sequence[Tensor]) -> torch.dtype:
    """The dtype as which a Python number meets these tensors, none of which is one."""
    kinds = [_kind(each.dtype) for each in others]
    highest = max(kinds, default=-1)
    if not others or highest > _kind(number.dtype):
        return number.dtype
    if highest < _kind(number.dtype):
        return torch.get_default_dtype() if number.is_floating_point() else number.dtype
    alike = [each for each, kind in zip(others, kinds, strict=True) if kind == highest]
    if any([each.dim() for each in alike]):
        return number.dtype
    return functools.reduce(torch.promote_types, [each.dtype for each in alike])


def _kind(dtype: torch.dtype) -> int:
    """bool, integers, floats: of two operands the higher kind decides."""
    return 2 if dtype.is_floating_point else int(dtype != torch.bool)
