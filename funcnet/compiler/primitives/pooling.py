"""The maximum over windows: values and indices in one pass, and a backward pass without atomics."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from funcnet.compiler.errors import UnsupportedError
from funcnet.compiler.primitives import Operand, Primitive, c_type, channels_last, pointers

aten = torch.ops.aten


def _check_order(*operands: Operand) -> None:
    """Raise UnsupportedError unless the axes of all lie in memory in one order."""
    values = [operand.value for operand in operands]
    last = torch.channels_last
    if not all([each.is_contiguous() for each in values]) and not all(
        [each.dim() == 4 and each.is_contiguous(memory_format=last) for each in values]
    ):
        raise UnsupportedError("pooling of images whose axes lie in memory in another order")


def _forward(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    _check_order(*operands, *results.values())
    value = operands[0].value
    size = options["kernel_size"]
    y = next(iter(results.values())).value
    numbers = [value.shape[-2:], y.shape[-2:], size, options.get("stride") or size]
    numbers += [options.get("padding", 0), options.get("dilation", 1)]
    function, images = _of(value)
    given = f"{pointers(operands, results, 2)}, {images}, {{{', '.join(map(_pair, numbers))}}}"
    return f"{function}<{c_type(value)}>({given});"


def _of(images: Tensor) -> tuple[str, str]:
    """The function for images that lie in memory like these, and how many there are."""
    if images.is_contiguous():
        return "funcnet::max_pool2d", str(prod(images.shape[:-2]))
    return "funcnet::max_pool2d_of_last", f"{images.shape[0]}, {images.shape[1]}"


def _pair(value: Any) -> str:
    """As C++: an option of PyTorch's with one number for both axes, or two."""
    numbers = [value] if isinstance(value, int) else [*value]
    return "{" + ", ".join(map(str, numbers * 2 if len(numbers) == 1 else numbers)) + "}"


def _backward(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    dy, indices = operands
    _check_order(dy, indices, results[0])
    shape = dy.value.shape
    # A plane of an image is an image of one channel, which is the last one too.
    is_plane = dy.value.is_contiguous()
    images, channels = (prod(shape[:-2]), 1) if is_plane else shape[:2]
    sizes = f"{images}, {channels}, {prod(options['self'][-2:])}, {prod(shape[-2:])}"
    given = f"{pointers(operands, results, 1)}, {sizes}"
    return f"funcnet::max_pool2d_backward<{c_type(dy.value)}>({given});"


def _backward_formula(dy: Tensor, indices: Tensor, *, self: tuple[int, ...], **options: Any) -> Any:
    flat = dy.new_zeros((*self[:-2], self[-2] * self[-1]))
    return flat.scatter_add(-1, indices.flatten(-2), dy.flatten(-2)).reshape(self)


PRIMITIVES = [
    Primitive(
        "aten::max_pool2d_with_indices",
        aten.max_pool2d_with_indices,
        _forward,
        "pooling.h",
        takes=channels_last,
    ),
    Primitive(
        "aten::max_pool2d_with_indices_backward",
        _backward_formula,
        _backward,
        "pooling.h",
        only_shape=("self",),
        takes=channels_last,
    ),
]
