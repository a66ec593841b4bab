"""Calls of torch's functions with Python numbers among their arguments, while jit records.

A `TracedNumber` becomes a 0-d tensor there, an input of the program, which must promote dtypes as
the number does, and must be refused where the number would be.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from funcnet import tree
from funcnet.compiler.number_formulas import by_formula
from funcnet.compiler.numbers import Arithmetic, TracedNumber, is_traced, value_of_number

aten = torch.ops.aten


@contextmanager
def numbers_meet_tensors(arithmetic: Arithmetic) -> Iterator[None]:
    """Let torch's functions take traced numbers, with the dtypes that Python numbers give."""
    with _Promotion(arithmetic), _Constructors():
        yield


class _Constructors(TorchFunctionMode):
    """Finds traced numbers where torch does not look for them: ``torch.tensor([n, 1.0])``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FROM_DATA and _numbers_in((args, kwargs)):
            return call_with_numbers(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


_FROM_DATA: dict[Any, tuple[str, ...]] = {
    torch.tensor: ("data",),
    torch.as_tensor: ("data",),
    torch.asarray: ("obj",),
    torch.scalar_tensor: ("s",),
    torch.full: ("size", "fill_value"),
    torch.full_like: ("input", "fill_value"),
    Tensor.new_full: ("self", "size", "fill_value"),
    Tensor.new_tensor: ("self", "data"),
}
"""Functions that make a tensor of Python's data, and the names of their first parameters."""
_DATA = ("fill_value", "data", "obj", "s")


def _numbers_in(arguments: Any) -> list[TracedNumber]:
    return [leaf for leaf in tree.leaves(arguments) if is_traced(leaf)]


def call_with_numbers(func: Any, args: Any, kwargs: Any) -> Any:
    """``func`` of tensors and traced numbers: what it gives for the numbers themselves."""
    numbers = _numbers_in((args, kwargs))
    arithmetic = numbers[0]._arithmetic
    arithmetic.check_is_traced()
    name = getattr(func, "__name__", str(func))
    # What it gives eagerly is the measure, and what it does not take is an error here too.
    expected = _eager(func, args, kwargs)
    taken = _takes(name, numbers, args, kwargs, expected)
    for way in (functools.partial(_with_tensors, func), by_formula) if taken else ():
        try:
            result = way(name, args, kwargs, expected)
        except _FAILURES:
            # The number itself is taken, so it is for its tensor that the function fails.
            continue
        if _shapes_and_dtypes(result) == _shapes_and_dtypes(expected):
            return result
    return arithmetic.refuse(numbers, f"goes to {name}")


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


def _takes(
    name: str, numbers: Sequence[TracedNumber], args: Any, kwargs: Any, expected: Any
) -> bool:
    """Whether PyTorch's kernels take the numbers, which fake tensors do not tell."""
    plain = _base_name(name)
    factors = [kwargs.get(factor) for factor in ("alpha", "beta")]
    leaves = [leaf for leaf in tree.leaves((expected, args)) if isinstance(leaf, Tensor)]
    for number in numbers:
        for dtype in {leaf.dtype for leaf in leaves} - {torch.bool}:
            # Arithmetic wraps what does not fit, or makes it infinite; other kernels refuse it.
            wraps = plain in _WRAPS or (dtype.is_floating_point and plain in _DIVIDES)
            wraps &= not any([number is factor for factor in factors])
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
    return leaf._arithmetic.input(leaf) if is_traced(leaf) else leaf


def _shapes_and_dtypes(result: Any) -> Any:
    leaves = tree.leaves(result)
    return [(leaf.shape, leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor)]


def _eager(func: Any, args: Any, kwargs: Any) -> Any:
    """The result for the numbers' values, unrecorded, on copies, as ``func`` may write to them."""

    def plain(leaf: Any) -> Any:
        return leaf.detach().clone() if isinstance(leaf, Tensor) else value_of_number(leaf)

    with disable_proxy_modes_tracing(), torch.no_grad():
        copies, named = tree.map(plain, (args, kwargs))
        return func(*copies, **named)


def _powers(args: Sequence[Any]) -> list[Any]:
    """The operands of a power, which torch computes otherwise where the exponent is special."""
    lowered = []
    for index, arg in enumerate(args):
        if index == 1 and is_traced(arg):
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
    given = dict(zip(_FROM_DATA[func], args, strict=False)) | kwargs
    name = next(name for name in _DATA if name in given)
    data = given.pop(name)
    if _numbers_in(given):
        raise _UnknownError("a shape or an option is a traced number")
    dtype, device = expected.dtype, expected.device
    elements = [
        # A copy: the tensor of a number must keep its value.
        _lowered(leaf).to(device, dtype, copy=True)
        if is_traced(leaf)
        else torch.tensor(leaf, device=device, dtype=dtype)
        for leaf in tree.leaves(data)
    ]
    if name == "fill_value":
        return elements[0].expand(expected.shape).clone()
    return torch.stack(elements).reshape(expected.shape)


class _UnknownError(Exception):
    """An operator got a number, and it is not known what it does with numbers."""


_FAILURES = (
    *(DataDependentOutputException, _UnknownError, KeyError),
    *(RuntimeError, ValueError, TypeError),
)


class _Promotion(TorchDispatchMode):
    """Lets the tensors of numbers promote dtypes as numbers do: by their category alone.

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
        # n - x is pointwise, though it has no tag that says so.
        if torch.Tag.pointwise not in operator.tags and operator is not aten.rsub.Tensor:
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
    categories = [_category(each.dtype) for each in others]
    highest = max(categories, default=-1)
    if not others or highest > _category(number.dtype):
        return number.dtype
    if highest < _category(number.dtype):
        return torch.get_default_dtype() if number.is_floating_point() else number.dtype
    alike = [each for each, category in zip(others, categories, strict=True) if category == highest]
    if any([each.dim() for each in alike]):
        return number.dtype
    return functools.reduce(torch.promote_types, [each.dtype for each in alike])


def _category(dtype: torch.dtype) -> int:
    """bool, integers, floats: of two operands the higher category decides the dtype."""
    return 2 if dtype.is_floating_point else int(dtype != torch.bool)
