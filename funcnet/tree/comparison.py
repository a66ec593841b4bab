"""Whether two trees hold the same, and where they first differ."""

from typing import Any

import torch
from torch import Tensor

from funcnet.tree.dotted import to_dotted
from funcnet.tree.structure import check_same_structure
from funcnet.tree.trees import describe


def compare(a: Any, b: Any, *, rtol: float = 0.0, atol: float = 0.0) -> str | None:
    """The first difference of two trees, in words; None where they hold the same.

    It is of the structure, or of the first leaf whose shape, dtype or numbers differ, with its path
    and, for numbers, the place in it. NaN is the same as NaN. It reads the values, so it is
    for eager mode.

    Args:
        a, b: any trees of tensors: params, train states, checkpoints. Tensors may be on different
            devices; of those on the meta device only shapes and dtypes are compared.
        rtol, atol: numbers are the same where ``|a - b| <= atol + rtol |b|``; by default where they
            are equal.

    See ``torch.testing.assert_close``; ``assert compare(a, b) is None`` shows the difference.

    >>> params = {"0": {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}}
    >>> compare(params, params)
    >>> compare(params, {"0": {"weight": torch.ones(2, 4), "bias": torch.zeros(2)}})
    '0.weight: float32 (2, 3) and float32 (2, 4)'
    >>> compare(params, {"0": {"weight": torch.eye(2, 3), "bias": torch.zeros(2)}})
    '0.weight[0, 1]: 1 and 0; 4 of 6 numbers differ'
    >>> compare(params, {"0": {"weight": torch.ones(2, 3)}})
    "b: the tree has no leaf '0.bias'"
    """
    try:
        check_same_structure(a, b, "b")
    except ValueError as error:
        return str(error)
    other = to_dotted(b)
    for path, leaf in to_dotted(a).items():
        found = _difference(leaf, other[path], rtol, atol)
        if found is not None:
            place, words = found
            at = path + place
            return f"{at}: {words}" if at else words
    return None


def _difference(a: Any, b: Any, rtol: float, atol: float) -> tuple[str, str] | None:
    """Where two leaves differ and how, None for nowhere."""
    if describe(a) != describe(b):
        return "", f"{describe(a)} and {describe(b)}"
    if not isinstance(a, Tensor):
        return None if a == b else ("", f"{a!r} and {b!r}")
    if a.is_meta or b.is_meta:
        return None
    b = b.to(a.device)
    differs = ~torch.isclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
    count = int(differs.sum())
    if not count:
        return None
    index = tuple(differs.nonzero()[0].tolist())
    words = f"{_number(a[index])} and {_number(b[index])}"
    if index:
        return f"{[*index]}", f"{words}; {count} of {a.numel()} numbers differ"
    return "", words


def _number(value: Tensor) -> str:
    """With as many digits as tell it from the next one of its dtype."""
    digits = {torch.float64: 17, torch.float32: 9}.get(value.dtype, 6)
    number = value.item()
    return f"{number:.{digits}g}" if value.is_floating_point() else str(number)
