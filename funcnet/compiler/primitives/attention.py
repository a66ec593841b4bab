"""Flash attention and its gradient: PyTorch's own kernels, on memory of the program."""

from collections.abc import Sequence
from typing import Any

import torch

from funcnet.compiler.errors import UnsupportedError
from funcnet.compiler.primitives import Operand, Primitive, word
from funcnet.compiler.primitives.convolution import borrowed

aten = torch.ops.aten
NAME = "_scaled_dot_product_flash_attention_for_cpu"


def _forward(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    return _call("attention", operands, 3, results, 2, options)


def _backward(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    return _call("attention_backward", operands, 6, results, 3, options)


def _has_rows(operand: torch.Tensor) -> bool:
    """Whether the last dimension is contiguous; the kernel takes the others as they are."""
    return operand.stride()[-1] == 1


def _call(
    function: str,
    operands: Sequence[Operand],
    required: int,
    results: dict[int, Operand],
    made: int,
    options: dict[str, Any],
) -> str:
    if options.get("dropout_p"):
        raise UnsupportedError("flash attention with dropout")
    scale = options.get("scale")
    if scale is None:
        scale = operands[0].value.shape[-1] ** -0.5
    inputs = [borrowed(operand) for operand in operands]
    inputs += ["{}"] * (required + 1 - len(inputs))  # the mask is the last one
    out = [borrowed(results[each]) if each in results else "{}" for each in range(made)]
    is_causal = word(options.get("is_causal"))
    return f"funcnet::{function}({', '.join([*inputs, *out, is_causal])}, {scale!r});"


PRIMITIVES = [
    Primitive(
        f"aten::{NAME}{suffix}",
        getattr(aten, f"{NAME}{suffix}").default,
        call,
        "attention.h",
        has_threads=True,
        takes=_has_rows,
    )
    for suffix, call in (("", _forward), ("_backward", _backward))
]
