"""Sums, means and other reductions; products of matrices."""

import math
import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcnet.errors import require
from funcnet.interop.operations.arithmetic import Call, cached
from funcnet.lift import Step, accept_any, parameterless

Dims = tuple[int, ...]


def _dims(x: Tensor, dim: Any) -> Dims:
    """The dimensions that are meant, none of them negative; None is all."""
    if dim is None or dim == ():
        return tuple(range(x.dim()))
    each = tuple(dim) if isinstance(dim, Sequence) else (dim,)
    return tuple([one % x.dim() if x.dim() else 0 for one in each]) if x.dim() else ()


def _spread(dy: Tensor, shape: Dims, dims: Dims, keepdim: bool) -> Tensor:
    """dy at all places that were reduced."""
    if not keepdim:
        kept = [1 if dim in dims else size for dim, size in enumerate(shape)]
        dy = dy.reshape(kept)
    return dy.expand(shape)


def sum_backward(dy: Tensor, shape: Dims, dims: Dims, keepdim: bool, divisor: int) -> Tensor:
    """dy at all places that were added, divided by their number for a mean."""
    spread = _spread(dy, shape, dims, keepdim)
    return spread if divisor == 1 else spread / divisor


def _sum(name: str, is_mean: bool) -> Callable[..., Call]:
    def call(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: None = None) -> Call:
        require(dtype is None, f"{name}: expects dtype=None, got {dtype}")
        dims = _dims(x, dim)

        def forward(x: Tensor) -> Step:
            shape = tuple(x.shape)
            divisor = math.prod([shape[each] for each in dims]) if is_mean else 1
            y = x.mean(dims, keepdim) if is_mean and dims else x.sum(dims, keepdim) if dims else x
            return y, {}, (shape, dims, keepdim, divisor)

        return parameterless(forward, sum_backward, declaration=accept_any, name=name), x

    return call


def extreme_backward(dy: Tensor, dims: Dims, keepdim: bool, *, x: Tensor, y: Tensor) -> Tensor:
    """dy, divided among the places that have the extreme value."""
    is_extreme = x == _spread(y, tuple(x.shape), dims, keepdim)
    spread = _spread(dy, tuple(x.shape), dims, keepdim)
    return torch.where(is_extreme, spread / is_extreme.sum(dims, keepdim=True), 0.0)


def _extreme(name: str, function: Callable[..., Tensor]) -> Callable[..., Call]:
    def call(x: Tensor, dim: Any = None, keepdim: bool = False) -> Call:
        dims = _dims(x, dim)

        def forward(x: Tensor) -> Step:
            y = function(x, dims, keepdim)
            return y, {"x": x, "y": y}, (dims, keepdim)

        return parameterless(forward, extreme_backward, declaration=accept_any, name=name), x

    return call


def indexed_backward(
    dy: tuple[Tensor, None], shape: Dims, dim: int, keepdim: bool, *, indices: Tensor
) -> Tensor:
    """dy at the places of the values that were taken."""
    values, places = dy[0], indices
    if not keepdim and shape:
        values, places = values.unsqueeze(dim), places.unsqueeze(dim)
    return values.new_zeros(shape).scatter_add(dim, places, values) if shape else values


def _indexed(name: str, function: Callable[..., Any], whole: Callable[..., Call]) -> Any:
    def call(x: Tensor, dim: Any = None, keepdim: bool = False) -> Call:
        if dim is None:
            return whole(x)
        require(isinstance(dim, int), f"{name}: expects a dimension or nothing, got {dim!r}")

        def forward(x: Tensor) -> Step:
            values, indices = function(x, dim, keepdim)
            y = values, indices
            return y, {"indices": indices}, (tuple(x.shape), dim, keepdim)

        return parameterless(forward, indexed_backward, declaration=accept_any, name=name), x

    return call


def var_backward(dy: Tensor, dims: Dims, keepdim: bool, divisor: float, *, x: Tensor) -> Tensor:
    """``2 dy (x - mean) / divisor``."""
    spread = _spread(dy, tuple(x.shape), dims, keepdim)
    return spread * (x - x.mean(dims, keepdim=True)) * (2 / divisor)


def var(
    x: Tensor,
    dim: Any = None,
    unbiased: Any = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Call:
    """``torch.var``."""
    if isinstance(dim, bool):  # torch.var(x, unbiased)
        dim, unbiased = None, dim
    dims = _dims(x, dim)
    less = (1 if unbiased in (None, True) else 0) if correction is None else correction

    def forward(x: Tensor) -> Step:
        divisor = max(math.prod([x.shape[each] for each in dims]) - less, 0)
        y = x.var(dims, correction=less, keepdim=keepdim)
        return y, {"x": x}, (dims, keepdim, divisor)

    return parameterless(forward, var_backward, declaration=accept_any, name="var"), x


def norm_backward(dy: Tensor, dims: Dims, keepdim: bool, *, x: Tensor, y: Tensor) -> Tensor:
    """``dy x / |x|``, 0 where the norm is."""
    length, spread = [_spread(each, tuple(x.shape), dims, keepdim) for each in (y, dy)]
    return torch.where(length == 0, 0.0, spread * x / length)


def norm(x: Tensor, p: Any = 2, dim: Any = None, keepdim: bool = False, dtype: None = None) -> Call:
    """``torch.norm``, that of Euclid."""
    require(dtype is None, f"norm: expects dtype=None, got {dtype}")
    require(p in (2, "fro", None), f"norm: expects p=2, got {p!r}")
    dims = _dims(x, dim)

    def forward(x: Tensor) -> Step:
        y = torch.linalg.vector_norm(x, 2, dims, keepdim)
        return y, {"x": x, "y": y}, (dims, keepdim)

    return parameterless(forward, norm_backward, declaration=accept_any, name="norm"), x


def normalize_backward(dy: Tensor, dim: int, eps: float, *, x: Tensor) -> Tensor:
    """``(dy - u <dy, u>) / |x|`` with ``u = x / |x|``; ``dy / eps`` where the norm is below it."""
    length = torch.linalg.vector_norm(x, 2, dim, keepdim=True)
    long, length = length > eps, length.clamp_min(eps)
    u = x / length
    return torch.where(long, dy - u * (dy * u).sum(dim, keepdim=True), dy) / length


def normalize(x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> Call:
    """``F.normalize``, by the norm of Euclid."""
    require(p == 2, f"normalize: expects p=2, got {p!r}")

    def forward(x: Tensor) -> Step:
        return torch.nn.functional.normalize(x, 2.0, dim, eps), {"x": x}, (dim, eps)

    return parameterless(forward, normalize_backward, declaration=accept_any, name="normalize"), x


def logsumexp_backward(dy: Tensor, dims: Dims, keepdim: bool, *, x: Tensor, y: Tensor) -> Tensor:
    """``dy exp(x - y)``."""
    total, spread = [_spread(each, tuple(x.shape), dims, keepdim) for each in (y, dy)]
    return spread * (x - total).exp()


def logsumexp(x: Tensor, dim: Any, keepdim: bool = False) -> Call:
    """``torch.logsumexp``."""
    dims = _dims(x, dim)

    def forward(x: Tensor) -> Step:
        y = x.logsumexp(dims, keepdim)
        return y, {"x": x, "y": y}, (dims, keepdim)

    return parameterless(forward, logsumexp_backward, declaration=accept_any, name="logsumexp"), x


def cumsum_backward(dy: Tensor, dim: int) -> Tensor:
    """The sums from the end."""
    return dy.flip(dim).cumsum(dim).flip(dim)


def cumsum(x: Tensor, dim: int) -> Call:
    """``torch.cumsum``."""

    def forward(x: Tensor) -> Step:
        return x.cumsum(dim), {}, (dim,)

    return parameterless(forward, cumsum_backward, declaration=accept_any, name="cumsum"), x


def matmul_backward(dy: Tensor, *, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``da = dy b^T``, ``db = a^T dy``, summed where an operand was repeated."""
    row = a.unsqueeze(0) if a.dim() == 1 else a
    column = b.unsqueeze(1) if b.dim() == 1 else b
    if a.dim() == 1:
        dy = dy.unsqueeze(-1 if b.dim() == 1 else -2)
    if b.dim() == 1:
        dy = dy.unsqueeze(-1)
    da, db = dy @ column.mT, row.mT @ dy
    da, db = da.sum_to_size(row.shape), db.sum_to_size(column.shape)
    return da.reshape(a.shape), db.reshape(b.shape)


@cached
def _matmul() -> Any:
    def forward(x: tuple[Tensor, Tensor]) -> Step:
        return torch.matmul(*x), {"a": x[0], "b": x[1]}, ()

    return parameterless(forward, matmul_backward, declaration=accept_any, name="matmul")


def matmul(a: Tensor, b: Tensor) -> Call:
    """``torch.matmul``, ``mm`` and ``bmm``."""
    return _matmul(), (a, b)


def einsum_backward(dy: Tensor, inputs: tuple[str, ...], output: str, *, x: Any) -> Any:
    """For each operand the sum over the letters of the others and of the output."""
    found = []
    for place, letters in enumerate(inputs):
        others = [each for i, each in enumerate(inputs) if i != place]
        given = [each for i, each in enumerate(x) if i != place]
        equation = f"{','.join([output, *others])}->{letters}"
        found.append(torch.einsum(equation, dy, *given))
    return tuple(found)


def einsum(equation: str, *operands: Any) -> Call:
    """``torch.einsum`` with letters, each once an operand, that are in another one or in y."""
    x = (
        tuple(operands[0])
        if len(operands) == 1 and type(operands[0]) in (tuple, list)
        else operands
    )
    text = equation.replace(" ", "")
    left, arrow, output = text.partition("->")
    inputs = tuple(left.split(","))
    if not arrow:
        counts = {letter: left.count(letter) for letter in left if letter != ","}
        output = "".join(sorted([letter for letter, count in counts.items() if count == 1]))
    for place, letters in enumerate(inputs):
        others = set(output).union(*[each for i, each in enumerate(inputs) if i != place])
        once = len(set(letters)) == len(letters) and set(letters) <= set(string.ascii_letters)
        wrong = "einsum: expects letters, each once an operand and in another operand or the output"
        require(once and set(letters) <= others, f"{wrong}, got {equation!r}")

    def forward(x: tuple[Tensor, ...]) -> Step:
        return torch.einsum(equation, *x), {"x": x}, (inputs, output)

    return parameterless(forward, einsum_backward, declaration=accept_any, name="einsum"), x


PRODUCTS: dict[str, Callable[..., Call]] = {
    "sum": _sum("sum", False),
    "mean": _sum("mean", True),
    "amax": _extreme("amax", torch.amax),
    "amin": _extreme("amin", torch.amin),
    "max": _indexed("max", torch.max, _extreme("amax", torch.amax)),
    "min": _indexed("min", torch.min, _extreme("amin", torch.amin)),
    "var": var,
    "norm": norm,
    "normalize": normalize,
    "logsumexp": logsumexp,
    "cumsum": cumsum,
    **dict.fromkeys(["matmul", "mm", "bmm", "mv", "dot"], matmul),
    "einsum": einsum,
}
"""From the name of a function or method of torch to its layer and what that is applied to."""
