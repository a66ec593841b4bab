"""The leaves of a tree as one value: what the formulas of optimizers compute with."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import repeat
from typing import Any, Union

import torch
from torch import Tensor

from funcnet.runtime import FOREACH, is_transformed

Operand = Union["Leaves", Tensor, float]

_WHOLE = {torch.float32, torch.float64}


def _operator(function: Callable[..., Tensor]) -> Callable[["Leaves", Operand], "Leaves"]:
    def operator(self: "Leaves", other: Operand) -> "Leaves":
        return leafwise(function, self, other)

    return operator


class Leaves:
    """Tensors to which operators, PyTorch's functions and a tensor's methods apply leaf by leaf.

    A formula that is written for one tensor works on these. The other operand is as many leaves,
    or a number or a 0-d tensor, which is taken for a number: it changes no leaf's dtype.

    >>> a, b = Leaves([torch.ones(2), torch.ones(1)]), Leaves([torch.zeros(2), torch.ones(1)])
    >>> list(0.5 * a + b)
    [tensor([0.5000, 0.5000]), tensor([1.5000])]
    >>> list(torch.sign(-a)), list(a.norm())
    ([tensor([-1., -1.]), tensor([-1.])], [tensor(1.4142), tensor(1.)])
    """

    __slots__ = ("tensors",)

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    __add__ = __radd__ = _operator(torch.add)
    __mul__ = __rmul__ = _operator(torch.mul)
    __truediv__ = _operator(torch.div)
    __pow__ = _operator(torch.pow)
    __lt__ = _operator(torch.lt)
    __le__ = _operator(torch.le)
    __gt__ = _operator(torch.gt)
    __ge__ = _operator(torch.ge)

    def __neg__(self) -> "Leaves":
        return leafwise(torch.neg, self)

    def __sub__(self, other: Operand) -> "Leaves":
        return leafwise(torch.sub, self, other) if isinstance(other, Leaves) else self + -other

    def __rsub__(self, other: Tensor | float) -> "Leaves":
        return -self + other

    def __rtruediv__(self, other: Tensor | float) -> "Leaves":
        return leafwise(torch.reciprocal, self) * other

    def __getattr__(self, name: str) -> Callable[..., "Leaves"]:
        method = None if name.startswith("_") or name.endswith("_") else getattr(Tensor, name, None)
        if not callable(method):
            raise AttributeError(f"leaves have no {name!r}; loop over them for that of each")
        return partial(leafwise, method, self)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> "Leaves":
        if function in (Tensor.add, Tensor.mul):  # tensor + leaves, tensor * leaves
            args = args[::-1]
        return leafwise(function, *args, **kwargs or {})


def leafwise(function: Callable[..., Any], *args: Any, **options: Any) -> Leaves:
    """``function`` applied to the first leaf of each argument, to the second of each, and so on.

    An argument that is no `Leaves` is the same for all. PyTorch's operators on lists of tensors
    do it in one call; vmap and autograd's transformations have no rules for them.

    >>> list(leafwise(torch.where, Leaves([torch.tensor([True, False])]), 1.0, 2.0))
    [tensor([1., 2.])]
    """
    lists = [arg.tensors for arg in args if isinstance(arg, Leaves)]
    first = lists[0]
    if not first:
        return Leaves([])
    # On meta tensors a 0-d tensor would be read.
    if function.__name__ in FOREACH and not first[0].is_meta and not is_transformed():
        found = _by_foreach(function.__name__, lists, args[len(lists) :], options)
        if found is not None:
            return Leaves(list(found))
    columns = [arg.tensors if isinstance(arg, Leaves) else _column(arg, first) for arg in args]
    return Leaves([function(*row, **options) for row in zip(*columns, strict=False)])


def _by_foreach(
    name: str, lists: list[list[Tensor]], rest: tuple[Any, ...], options: dict[str, Any]
) -> Sequence[Tensor] | None:
    """The operator on lists of tensors, None where it cannot take these arguments."""
    foreach = FOREACH[name]
    if not rest:
        return foreach(*lists, **options)
    (other, *more), dtypes = rest, {leaf.dtype for leaf in lists[0]}
    if more or isinstance(other, Leaves):
        return None
    if isinstance(other, Tensor):
        # Autograd's rule for one tensor and a list wants all leaves of one shape, and rounding
        # the tensor to half precision would cost accuracy.
        if len(dtypes) > 1 or not dtypes <= _WHOLE or other.requires_grad or other.dim():
            return None
        other = other.to(lists[0][0].dtype)
    elif lists[0][0].is_cpu and dtypes in ({torch.float32}, {torch.float64}):
        other = _constant(other, lists[0][0].dtype)
    if not isinstance(other, Tensor):
        return foreach(*lists, other, **options)
    # By position a tensor is read, for the overload that takes a number.
    return foreach(*lists, other=other) if name in ("add", "mul", "div") else None


@lru_cache(maxsize=256)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a 0-d tensor.

    On CPU a list times a 0-d tensor takes a third of the time of a list times a number, for
    which a tensor is made for each leaf.
    """
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


def _column(other: Any, leaves: list[Tensor]) -> Iterable[Any]:
    """What is the same for all leaves, once for each; a 0-d tensor in the leaf's dtype."""
    if not isinstance(other, Tensor) or other.dim():
        return repeat(other)
    cast = {dtype: other.to(dtype) for dtype in {leaf.dtype for leaf in leaves} & _WHOLE}
    return [cast.get(leaf.dtype, other) for leaf in leaves]
