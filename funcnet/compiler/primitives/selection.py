"""Some elements of a line in order: `torch.topk`, `kthvalue`, `median`, `nanmedian` and `mode`."""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from funcnet.compiler.errors import UnsupportedError
from funcnet.compiler.primitives import Operand, Primitive, c_type, lines, pointers, word


def _call(
    function: str, operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    (x,) = operands
    if x.value.dtype == torch.bool and function != "mode":
        raise UnsupportedError(f"{function} of torch.bool")
    if not any([each.numel for each in results.values()]):
        return ""
    if not x.numel:
        raise UnsupportedError(f"{function} of no elements")
    numbers = [c_type(x.value)]
    match function:
        case "topk":
            numbers += [word(options.get(name, True)) for name in ("largest", "sorted")]
            numbers.append(str(options["k"]))
        case "kthvalue":
            numbers.append(str(options["k"] - 1))
        case "median" | "nanmedian":
            numbers.append(word(function == "nanmedian"))
    of_all = function.endswith("median") and "dim" not in options
    extents = f"1, {x.numel}, 1" if of_all else lines(x.value, options.get("dim", -1))
    name = function.removeprefix("nan")
    given = pointers(operands, results, 2)
    return f"funcnet::{name}<{', '.join(numbers)}, {extents}, threads>({given});"


PRIMITIVES = [
    Primitive(f"aten::{name}", getattr(torch, name), functools.partial(_call, name), "selection.h")
    for name in ("topk", "kthvalue", "median", "nanmedian", "mode")
]
