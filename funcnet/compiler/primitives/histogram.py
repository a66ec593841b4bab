"""Histograms: `torch.histc`."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from funcnet.compiler.errors import UnsupportedError
from funcnet.compiler.primitives import Operand, Primitive, c_type, pointers


def _call(operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]) -> str:
    (x,) = operands
    edges = [float(options.get(name, 0)) for name in ("min", "max")]
    if x.value.dtype not in (torch.float32, torch.float64):
        raise UnsupportedError(f"a histogram in {x.value.dtype}")
    if not all([math.isfinite(each) for each in edges]) or edges[0] > edges[1]:
        raise UnsupportedError(f"a histogram from {edges[0]} to {edges[1]}")
    numbers = f"{c_type(x.value)}, {results[0].numel}, {x.numel}"
    given = [pointers(operands, results, 1), *map(repr, edges)]
    return f"funcnet::histogram<{numbers}>({', '.join(given)});"


PRIMITIVES = [Primitive("aten::histc", torch.histc, _call, "histogram.h")]
