"""Threefry-2x32, the hash behind random draws: `funcnet.threefry` has the operators and formula.

As one operator it is one call; its 20 rounds would be some 150 operators in the graph of each draw.
"""

from collections.abc import Sequence
from typing import Any

from funcnet.compiler.primitives import Operand, Primitive
from funcnet.threefry import threefry_at, threefry_from, threefry_range


def _call(operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]) -> str:
    key, *counters = operands
    counter = counters[0].address if counters else "0"
    count = counters[0].numel if counters else options["n"]
    out = [results[each].address if each in results else "0" for each in (0, 1)]
    return (
        f"funcnet::threefry((const int64_t*)({key.address}), (const int32_t*)({counter}), "
        f"{options.get('start', 0)}, {count}, (int32_t*)({out[0]}), (int32_t*)({out[1]}));"
    )


def _call_from(
    operands: Sequence[Operand], results: dict[int, Operand], options: dict[str, Any]
) -> str:
    key, start = operands
    out = [results[each].address if each in results else "0" for each in (0, 1)]
    return (
        f"funcnet::threefry_from((const int64_t*)({key.address}), "
        f"(const int64_t*)({start.address}), {start.numel}, {options['n']}, "
        f"(int32_t*)({out[0]}), (int32_t*)({out[1]}));"
    )


PRIMITIVES = [
    Primitive("funcnet::threefry", threefry_range, _call, "threefry.h"),
    Primitive("funcnet::threefry_at", threefry_at, _call, "threefry.h"),
    Primitive("funcnet::threefry_from", threefry_from, _call_from, "threefry.h"),
]
