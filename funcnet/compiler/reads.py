"""Errors for what needs the values of tensors, which have none while a function is traced.

Such are Python's control flow, conversions to Python's numbers and to numpy, text, and operators
whose results have a shape that depends on values. Each error shows the user's line, and says what
to write instead.
"""

import ast
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)

from funcnet import tree
from funcnet.compiler.tracebacks import eager_error
from funcnet.compiler.user_code import at_line, calling_frame, enclosing

_PRINT = (
    "fn.debug_print('{x}', x=x) prints when the program runs; shapes and dtypes can be printed as "
    "they are; or return the tensor"
)
_STATIC = "a value that is known before the call can be a Python number named in static="
_WHERE = "torch.where(condition, a, b) chooses by element"
_NUMBER = (
    "operators take a 0-d tensor where they take a number, so leave the conversion out, or use "
    "x.float(), x.long(); or return the tensor and convert the result"
)
_NUMPY = (
    "write it with torch's functions, and make a tensor of an array by torch.as_tensor; or return "
    "the tensor and call numpy on the result"
)
_SIZE = "sizes and positions are part of the program: " + _STATIC
_OTHER = f"this function takes Python numbers there: {_STATIC}; or write its formula with tensors"
_MASKED = (
    "torch.where(mask, x, 0) keeps the shape, and the mean of what the mask takes is "
    "torch.where(mask, x, 0).sum() / mask.sum()"
)
_AS_MASK = (
    "keep the mask, and choose by torch.where(mask, a, b); torch.nonzero_static(mask, size=n) has "
    "a given number of rows"
)
_SORTED = (
    "s = x.sort().values puts equal ones side by side, and s[1:] != s[:-1] says where the next "
    "begins"
)

_CHOICES: dict[str, str] = {
    "if": f"{_WHERE}, fn.cond(condition, on_true, on_false, *operands) runs one of two functions",
    "while": "fn.while_loop(condition, body, carry) goes on while a tensor says so",
    "assert": "check it outside the jitted function, on what it returns",
    "and": "a & b, a | b and ~a are tensors; `and`, `or` and `not` are not",
    "chain": "(a < x) & (x < b) is a tensor; a < x < b is not",
    "in": "(values == x).any() is a tensor",
    "max": "torch.maximum(a, b), or x.max() of one tensor",
    "min": "torch.minimum(a, b), or x.min() of one tensor",
    "sorted": "torch.sort(x), torch.stack of them first",
    "any": "x.any() is a tensor",
    "all": "x.all() is a tensor",
    "filter": _MASKED,
    "range": "fn.while_loop(condition, body, carry); fn.fori and fn.scan take a number of "
    "iterations that is known before the call",
    "enumerate": "fn.scan(f, carry, xs)",
}
"""What to write for a choice by a tensor's truth, by the statement or the function around it."""

_INSTEAD: dict[str, str] = {
    "item": f"{_NUMBER}; {_STATIC}",
    "tolist": f"x.unbind() gives the rows of a tensor as tensors; {_NUMBER}",
    "__float__": f"{_NUMBER}; for math.sin and the like take torch.sin",
    "__int__": f"{_NUMBER}; {_STATIC}",
    "__complex__": _NUMBER,
    "__index__": f"fn.dynamic_slice(x, start, size) reads a window at a tensor's position, "
    f"torch.where chooses; {_SIZE}",
    "numpy": _NUMPY,
    "__array__": _NUMPY,
    "__dlpack__": _NUMPY,
    "__repr__": _PRINT,
    "__format__": _PRINT,
    "__reduce_ex__": "return the tensor, and save the result",
    "__contains__": _CHOICES["in"],
    "is_nonzero": _CHOICES["if"],
    "equal": "(a == b).all() is a tensor",
    "allclose": "torch.isclose(a, b).all() is a tensor",
    "tensor": "torch.stack makes a tensor of tensors",
    "as_tensor": "torch.stack makes a tensor of tensors",
    "asarray": "torch.stack makes a tensor of tensors",
    "full": "value.expand(shape), or torch.ones(shape) * value",
    "one_hot": "pass num_classes",
    "nonzero": _AS_MASK,
    "argwhere": _AS_MASK,
    "where": _AS_MASK,
    "__getitem__": _MASKED,
    "masked_select": _MASKED,
    "__setitem__": "x = torch.where(mask, values, x), with values shaped like x",
    "unique": _SORTED,
    "unique_consecutive": "x[1:] != x[:-1] says where the next run begins",
    "bincount": "torch.nn.functional.one_hot(x, n).sum(0), or torch.zeros(n).index_add(0, x, "
    "weights)",
    "tensor_split": f"pass Python numbers; {_STATIC}",
    "repeat_interleave": "pass output_size, or a Python number of repeats",
}
"""What to write, by the name of torch's function."""

_TEXTS = ("__repr__", "__format__")
_VALUES = ("numpy", "__array__", "__dlpack__", "__reduce_ex__", *_TEXTS)
_LISTS = ("tensor", "as_tensor", "asarray")
_SAID = {
    **dict.fromkeys(_TEXTS, "as text"),
    "__float__": "float()",
    "__int__": "int()",
    "__complex__": "complex()",
    "__index__": "as an index or a size",
    "__array__": "numpy",
    "__reduce_ex__": "pickle",
    "__contains__": "`in`",
    "__getitem__": "an index or a slice of x[...]",
    "chain": "a < b < c",
}
_UNREADABLE = (
    "data-dependent control flow",
    "calling .item()",
    "not supported for tensor subclasses",
    "its data is not allocated yet",
    "dynamic shape",
)
"""What torch says of the same under ``torch.vmap``, and of what has no operator."""


def with_reasons(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``func(*args, **kwargs)``, with an error that says what to write where it needs values."""
    name = getattr(func, "__name__", str(func))
    if name == "__deepcopy__" and isinstance(args[0], FakeTensor):
        return args[0].clone()
    if _reads(name, args):
        raise needs_value(name)
    try:
        return func(*args, **kwargs)
    except DataDependentOutputException:
        raise needs_value(name) from None
    except DynamicOutputShapeException:
        raise needs_value(name, of_shape=True) from None
    except Exception as error:
        if any([part in str(error) for part in _UNREADABLE]):
            raise needs_value(name, of_shape=_UNREADABLE[-1] in str(error)) from None
        found = eager_error(error, func, args, kwargs)
        if found is error:
            raise
        raise found from None


def _reads(name: str, args: Any) -> bool:
    """Whether a function reads values without asking an operator for them."""
    if not args:
        return False
    if name == "tolist":
        return isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor)
    # torch.tensor reads the values of tensors in a list, and copies one that is alone.
    if name in _LISTS:
        listed = tree.leaves(args[0]) if isinstance(args[0], (list, tuple)) else ()
        return any([isinstance(leaf, Tensor) for leaf in listed])
    return name in _VALUES and isinstance(args[0], Tensor) and _is_asked(name)


def needs_value(name: str, *, of_shape: bool = False) -> TypeError:
    """The error for a function of torch that needs a tensor's values.

    Args:
        name: of the function.
        of_shape: whether the shape of its result depends on them.
    """
    if name == "item" and _called_by("tolist"):
        name = "tolist"
    frame = calling_frame()
    around = enclosing(frame) if frame is not None and _asks(frame) else []
    if name == "__bool__":
        situations = _situations(around)
        shown = next((each for each in situations if each in _KEYWORDS), None)
        what = (
            f"`{_SAID.get(shown, shown)}`"
            if shown
            else f"{situations[0]}()"
            if situations
            else "bool()"
        )
        hints = [_CHOICES[each] for each in situations if each in _CHOICES] or [_CHOICES["if"]]
        hints.append(_STATIC)
    else:
        what = _SAID.get(name, name)
        hints = [_INSTEAD.get(name, _MASKED if of_shape else _OTHER)]
        if name == "__getitem__" and not of_shape:
            hints = [_INSTEAD["__index__"]]
        called = next((each for each in _situations(around) if each in _CHOICES), None)
        if name == "__index__" and called == "range":
            what, hints = "range()", [_CHOICES["range"], _STATIC]
    if frame is not None and _module_that_asks().startswith("torch.distributions"):
        hints.insert(0, "distributions check their arguments: pass validate_args=False")
    instead = "; ".join(hints)
    why = "which a compiled program does not know yet"
    if of_shape:
        what = {"__getitem__": "x[mask]", "__setitem__": "x[mask] = values"}.get(name, what)
        said = f"the shape of a result of {what} depends on the values of a tensor, {why}"
    else:
        said = f"the function reads the value of a tensor ({what}), {why}"
    return TypeError(f"jit: {said}{at_line()}\nInstead: {instead}")


_KEYWORDS = ("while", "if", "assert", "in", "chain", "and")
_BUILTINS = ("bool", "filter", "sorted", "max", "min", "any", "all", "range", "enumerate")


def _situations(around: list[ast.AST]) -> list[str]:
    """What a truth or an index is read for, from the expression outwards."""
    found: list[str] = []
    before: ast.AST | None = None
    for node in around:
        match node:
            case ast.Call(func=ast.Name(id=name)) if before is None and name in _BUILTINS:
                found.append(name)
            case ast.Compare(ops=ops) if before is None and len(ops) > 1:
                found.append("chain")
            case ast.Compare(ops=[ast.In() | ast.NotIn()]) if before is None:
                found.append("in")
            case ast.BoolOp() | ast.UnaryOp(op=ast.Not()):
                found.append("and")
            case ast.If(test=test) | ast.IfExp(test=test) if test is before or before is None:
                found.append("if")
            case ast.comprehension(ifs=ifs) if before in ifs:
                found.append("if")
            case ast.match_case():
                found.append("if")
            case ast.While(test=test) if test is before:
                found.append("while")
            case ast.Assert(test=test) if test is before or before is None:
                found.append("assert")
            case ast.stmt():
                break
        before = node
    return [*dict.fromkeys(found)]


_PASSED = (
    *(__name__, "funcnet.compiler.guards", "funcnet.compiler.indexing"),
    *("torch.overrides", "torch._tensor"),
)


def _asking_frame() -> FrameType | None:
    """The function that asks, below those by which torch finds what answers."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in _PASSED:
        frame = frame.f_back
    return frame


def _module_that_asks() -> str:
    frame = _asking_frame()
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


def _called_by(name: str) -> bool:
    frame = _asking_frame()
    return frame is not None and name in frame.f_code.co_qualname.split(".")


def _asks(frame: FrameType) -> bool:
    """Whether it is this very function that asks, and no library below it."""
    return _asking_frame() is frame


def _is_asked(name: str) -> bool:
    """Whether what asks is neither torch nor this package, which may show tensors in errors."""
    return name not in _TEXTS or _module_that_asks().partition(".")[0] not in ("torch", "funcnet")
