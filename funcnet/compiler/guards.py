"""What a function may not do while it is recorded, and what it is seen to ask of its tensors."""

import sys
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from funcnet.compiler.escaped import Made
from funcnet.compiler.indexing import note_copy
from funcnet.compiler.reads import with_reasons
from funcnet.compiler.user_code import at_line, calling_line, note_line

aten = torch.ops.aten


class LayoutReads(TorchFunctionMode):
    """Notes whether a function asks how a tensor lies in memory: in a program, all are contiguous.

    It notes the tensors from outside that the function meets, if only to ask for their shapes, and
    refuses to give what a tensor keeps beside its values.

    Attributes:
        asked: the name of the question, if there was one.
        of_storage: whether it was about memory beyond the tensor's own.
        met: the tensors from outside, by their ids.
    """

    asked: str | None = None
    of_storage = False

    def __init__(self) -> None:
        super().__init__()
        self.met: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Torch's own functions ask too, and give the same values whatever the answer.
        by_user = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] != "torch"
        real = [each for each in args if _is_real(each) and each.layout is torch.strided]
        self.met.update({id(each): each for each in real})
        if by_user and func in _HIDDEN:
            raise TypeError(
                f"jit: the function reads or sets Tensor.{_HIDDEN[func]}, which is no value of "
                f"its arguments: pass what it needs as one{at_line()}"
            )
        if by_user and func in _STRIDES and self.asked is None:
            self.asked = func.__name__
        if by_user and func in _STORAGE:
            self.asked, self.of_storage = func.__name__, True
        return with_reasons(func, args, kwargs or {})


_STRIDES = {Tensor.stride, Tensor.is_contiguous, Tensor.is_neg}
_STORAGE = {
    *(Tensor.as_strided, torch.as_strided, torch.as_strided_copy, torch.as_strided_scatter),
    *(Tensor.as_strided_, Tensor.as_strided_scatter, Tensor.storage_offset),
    *(Tensor.untyped_storage, Tensor.storage),
}
_HIDDEN = {
    cast(Any, Tensor.grad).__get__: "grad",
    cast(Any, Tensor._version).__get__: "_version",
    cast(Any, Tensor._base).__get__: "_base",
    cast(Any, Tensor.grad_fn).__get__: "grad_fn",
    cast(Any, Tensor.is_leaf).__get__: "is_leaf",
    cast(Any, Tensor.data).__set__: "data",
    Tensor.data_ptr: "data_ptr",
    Tensor.is_inference: "is_inference",
    Tensor.is_shared: "is_shared",
}


class PurityGuard(TorchDispatchMode):
    """Refuses, before it happens, what a pure function does not do to the world outside it.

    Attributes:
        made: the tensors that the function makes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made = Made()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if _draws(operator, args, kwargs or {}):
            raise ValueError(
                f"jit: the function draws from torch's generator ({_name(operator)}), whose "
                f"state is hidden; draw from a key by fn.random{at_line()}"
            )
        operator, args, kwargs = _as_declared(operator, args, kwargs or {})
        if operator._schema.is_mutable and args and _is_real(args[0]):
            raise ValueError(
                "jit: the function writes in place to a tensor it closes over "
                f"({_name(operator)}); a pure function writes to tensors of its own only{at_line()}"
            )
        if torch.Tag.data_dependent_output in operator.tags and any([*map(_is_real, args)]):
            raise DataDependentOutputException(operator)
        _check_as_kernels_do(operator, args)
        result = operator(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.layout is not torch.strided:
            raise TypeError(
                f"jit: the function makes a tensor in the layout {result.layout} "
                f"({_name(operator)}); programs have dense tensors{at_line()}"
            )
        note_copy(operator, args, result)
        line = calling_line()
        note_line(line)
        self.made.note(result, line)
        return result


def _name(operator: Any) -> str:
    """An operator by the name that users know, such as randn."""
    return str(operator._schema.name).partition("::")[2]


def _draws(operator: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator reads torch's generator; some do so in training alone."""
    if torch.Tag.nondeterministic_seeded not in operator.tags or operator.namespace == "funcnet":
        return False
    expected = operator._schema.arguments
    given = {each.name: each.default_value for each in expected}
    given |= dict(zip(given, args, strict=False)) | kwargs
    in_training = given.get("training", given.get("train")) is not False
    return given.get("dropout_p") != 0.0 and in_training


def _as_declared(operator: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """An operator that writes to what it says it writes to, in place of one that does not so."""
    names = [each.name for each in operator._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    if operator is aten._native_batch_norm_legit.default and not given["training"]:
        return aten.native_batch_norm.default, args, kwargs
    has_averages = given.get("running_mean") is not None and given.get("running_var") is not None
    if operator is aten.native_batch_norm.default and given["training"] and has_averages:
        return aten._native_batch_norm_legit.default, args, kwargs
    if operator in _RRELU and not given.get("training", False):
        slope = (given.get("lower", 1 / 8) + given.get("upper", 1 / 3)) / 2
        return _RRELU[operator], (given["self"], slope), {}
    return operator, args, kwargs


_RRELU = {
    aten.rrelu_with_noise.default: aten.leaky_relu.default,
    aten.rrelu_with_noise_.default: aten.leaky_relu_.default,
}


def _is_real(operand: Any) -> bool:
    """Whether a tensor comes from outside: its values are there, and may be others next time."""
    return isinstance(operand, Tensor) and not isinstance(operand, FakeTensor)


def _check_as_kernels_do(operator: Any, args: Any) -> None:
    """Raise what PyTorch's kernels raise for arguments that fake tensors let pass."""
    if operator is aten.pow.Tensor_Scalar:
        x, exponent = args
        if isinstance(exponent, int) and exponent < 0 and not x.is_floating_point():
            raise RuntimeError("Integers to negative integer powers are not allowed.")
    if operator in _SUBTRACTIONS and any([_is_bool(each) for each in args[:2]]):
        raise RuntimeError(
            "Subtraction, the `-` operator, with a bool tensor is not supported. If you are trying "
            "to invert a mask, use the `~` or `logical_not()` operator instead."
        )

    if operator in _PRODUCTS and len({each.dtype for each in args if _is_tensor(each)}) > 1:
        raise RuntimeError("expected m1 and m2 to have the same dtype")


_PRODUCTS = {
    *(aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default, aten.vdot.default),
    *(aten.addmm.default, aten.baddbmm.default, aten.addmv.default, aten.addbmm.default),
}
_SUBTRACTIONS = {
    *(aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Tensor, aten.rsub.Scalar),
    *(aten.sub_.Tensor, aten.sub_.Scalar),
}


def _is_tensor(operand: Any) -> bool:
    return isinstance(operand, Tensor)


def _is_bool(operand: Any) -> bool:
    return isinstance(operand, bool) or getattr(operand, "dtype", None) is torch.bool
