"""Operators that a program calls by name, because Inductor makes no kernel of them, or a slow one.

Each has a file here, in which ``PRIMITIVES`` lists a `Primitive` for each of its operators, and a
header of the same name if its C++ is ours. To add one, add a file: all files here are imported.
"""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet.compiler.errors import UnsupportedError


class Operand(NamedTuple):
    """A tensor of a program: the C++ expression for its address, and a fake tensor like it."""

    address: str
    value: Tensor

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return self.value.numel()


def channels_last(images: Tensor) -> bool:
    """Whether images are contiguous, or have their channels last."""
    return images.is_contiguous() or (
        images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last)
    )


class Primitive(NamedTuple):
    """An operator, what it computes, and how a C++ program calls it.

    Under `vmap` a program calls it once for each member, in the loop over them. The staged path
    batches ``formula`` by ``torch.vmap`` instead, so that PyTorch must have batching rules for it.

    Attributes:
        operator: its name with its namespace, such as ``aten::sort``.
        formula: ``formula(*tensors, **options) -> results``, in operators that Inductor knows.
        call: ``call(operands, results, options)`` is the C++ statement, or nothing. Its operands
            are the tensors among the arguments; its results are keyed by their index, and those
            that nothing reads are missing. In the statement the constant ``threads`` says
            how many may run it.
        header: the file in this folder with the C++ function.
        has_threads: whether it starts threads of its own, which it cannot do in a parallel loop.
        only_shape: the arguments of which it reads no values. They are options, not operands: the
            shape in place of the tensor.
        takes: whether it takes an operand as it lies in memory; else it gets a contiguous copy.
        is_inductors: whether it stays in the segments of the staged path, as Inductor knows it.
    """

    operator: str
    formula: Callable[..., Any]
    call: Callable[[Sequence[Operand], dict[int, Operand], dict[str, Any]], str]
    header: str
    has_threads: bool = False
    only_shape: tuple[str, ...] = ()
    takes: Callable[[Tensor], bool] = Tensor.is_contiguous
    is_inductors: bool = False


C_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "c10::BFloat16",
    torch.float16: "c10::Half",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.int16: "int16_t",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
    torch.bool: "bool",
}
"""The types of numbers in C++."""


def c_type(value: Tensor) -> str:
    """The type in C++ of a tensor's numbers.

    Raises:
        UnsupportedError: the kernels of this folder do not compute with such numbers.
    """
    if value.dtype not in C_TYPES:
        raise UnsupportedError(f"numbers of {value.dtype}")
    return C_TYPES[value.dtype]


def word(flag: object) -> str:
    """True or false in C++."""
    return "true" if flag else "false"


def any_order(operand: Tensor) -> bool:
    """What `Primitive.takes` is where operands are read by their strides."""
    return True


def lines(value: Tensor, dim: int) -> str:
    """How many lines lie before an axis of a contiguous tensor, its length, and how many after."""
    shape = tuple(value.shape) or (1,)
    axis = dim % len(shape)
    return f"{prod(shape[:axis])}, {shape[axis]}, {prod(shape[axis + 1 :])}"


def pointers(operands: Sequence[Operand], results: dict[int, Operand], count: int) -> str:
    """Arguments in C++: the operands, and so many results, of which those unread are null."""
    given = [f"(const {c_type(each.value)}*)({each.address})" for each in operands]
    made = [results.get(index) for index in range(count)]
    given += [
        "nullptr" if each is None else f"({c_type(each.value)}*)({each.address})" for each in made
    ]
    return ", ".join(given)


PRIMITIVES: dict[str, Primitive] = {
    primitive.operator: primitive
    for module in pkgutil.iter_modules(__path__)
    for primitive in importlib.import_module(f"{__name__}.{module.name}").PRIMITIVES
}
"""All of them, by the names of their operators."""
