"""Convolutions and their gradients: PyTorch's own kernels, on memory of the program."""

from collections.abc import Sequence
from typing import Any

import torch

from funcnet.compiler.errors import UnsupportedError
from funcnet.compiler.primitives import Operand, Primitive, channels_last, word

aten = torch.ops.aten


def _forward(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    bias = borrowed(operands[2]) if len(operands) == 3 else "{}"
    inputs = ", ".join([borrowed(operands[0]), borrowed(operands[1]), bias])
    return f"funcnet::convolution({inputs}, {borrowed(results[0])}, {_window(options)});"


def _backward(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    inputs = ", ".join([borrowed(operand) for operand in operands])
    out = ", ".join([borrowed(results[each]) if each in results else "{}" for each in range(3)])
    return f"funcnet::convolution_backward({inputs}, {out}, {_window(options)});"


def borrowed(operand: Operand) -> str:
    """A ``Borrowed`` of the header: a tensor of PyTorch's in the program's memory."""
    dtype = str(operand.value.dtype).removeprefix("torch.")
    if dtype not in ("float32", "float64", "bfloat16", "float16"):
        raise UnsupportedError(f"a convolution in {dtype}")
    sizes, strides = _list(operand.value.shape), _list(operand.value.stride())
    return f"{{{operand.address}, {sizes}, {strides}, aoti_torch_dtype_{dtype}()}}"


def _window(options: dict[str, Any]) -> str:
    lists = [_list(options[name]) for name in ("stride", "padding", "dilation", "output_padding")]
    return f"{{{', '.join(lists)}, {word(options['transposed'])}, {options['groups']}}}"


def _list(numbers: Sequence[int]) -> str:
    return f"{{{', '.join(map(str, numbers))}}}"


PRIMITIVES = [
    Primitive(
        "aten::convolution",
        aten.convolution.default,
        _forward,
        "convolution.h",
        has_threads=True,
        takes=channels_last,
    ),
    Primitive(
        "aten::convolution_backward",
        aten.convolution_backward.default,
        _backward,
        "convolution.h",
        has_threads=True,
        takes=channels_last,
    ),
]
