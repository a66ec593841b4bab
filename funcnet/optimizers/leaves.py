"""The leaves of a tree as one value: what the formulas of optimizers compute with."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import repeat
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet.collectives import Axis
from funcnet.runtime import FOREACH, foreach_add_, is_transformed, read

_dtype = attrgetter("dtype")
WIDE = ({torch.float32}, {torch.float64})

Axes = tuple[Axis, ...]
"""The axes of a mesh over which a leaf is a part; none for a whole one."""


class Across(NamedTuple):
    """Ranks each of which has some of the leaves, as the stages of a pipeline have."""

    axis: Axis
    """The ranks."""

    elsewhere: frozenset[str]
    """The dotted paths of this rank's leaves that another one has too, and counts."""

    device: torch.device
    """For what they tell each other, where a rank has no leaves."""


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

    __slots__ = ("across", "axes", "fresh", "tensors", "treedef")
    __hash__ = object.__hash__
    treedef: Any  # the structure of their tree, if they are params
    axes: Sequence[Axes] | None  # over which each leaf is a part, if they are params
    across: Across | None  # the ranks that have the other params, if they are params

    def __init__(self, tensors: list[Tensor], fresh: bool = False) -> None:
        self.tensors = tensors
        self.fresh = fresh  # whether nothing else has their memory

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def to_dtypes(self, others: "Leaves") -> "Leaves":
        """The leaves, each in the dtype of the other."""
        new, old = self.tensors, others.tensors
        if [*map(_dtype, new)] == [*map(_dtype, old)]:
            return self
        return Leaves([leaf.to(other.dtype) for leaf, other in zip(new, old, strict=True)])

    def __bool__(self) -> bool:
        raise TypeError(
            "a formula is for all leaves at once, and so has no if, and, or, not, min and max: "
            "use torch.where, &, |, ~, torch.minimum and torch.maximum"
        )

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


class Applied(Leaves):
    """Updates that were added to the params already, in their memory; the leaves are the params."""

    __slots__ = ()


def _operator(name: str) -> Callable[..., Leaves]:
    known = {"radd": "add", "rmul": "mul", "truediv": "div"}.get(name, name)
    function: Any = getattr(torch, known, None) or getattr(Tensor, f"__{name}__")
    return lambda self, *others: leafwise(function, self, *others)


for _name in (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow"),
    *("lt", "le", "gt", "ge", "eq", "ne", "and", "or", "invert", "neg", "abs"),
):
    setattr(Leaves, f"__{_name}__", _operator(_name))


def as_number(value: Any) -> Any:
    """A 0-d tensor as a number, where it can be read for free and nothing is derived; else itself.

    >>> as_number(torch.tensor(0.5)), as_number(torch.ones((), device="meta")).device
    (0.5, device(type='meta'))
    """
    if not isinstance(value, Tensor) or value.dim() or is_transformed(value):
        return value
    number = read(value)
    return value if number is None else number


# PyTorch's functions read this option of theirs; with a tensor that cannot be read, a formula is
# used. Under vmap, torch.add and others refuse one at once, and methods of leaves do not.
_FORMULAS: dict[str, tuple[str, Callable[..., Leaves]]] = {
    "add": ("alpha", lambda input, other, alpha: input + alpha * other),
    "sub": ("alpha", lambda input, other, alpha: input - alpha * other),
    "addcmul": (
        "value",
        lambda input, tensor1, tensor2, value: input + value * (tensor1 * tensor2),
    ),
    "addcdiv": (
        "value",
        lambda input, tensor1, tensor2, value: input + value * (tensor1 / tensor2),
    ),
    "lerp": ("weight", lambda input, end, weight: input + weight * (end - input)),
}


def leafwise(function: Callable[..., Any], *args: Any, **options: Any) -> Leaves:
    """``function`` applied to the first leaf of each argument, to the second of each, and so on.

    An argument that is no `Leaves` is the same for all.

    >>> list(leafwise(torch.where, Leaves([torch.tensor([True, False])]), 1.0, 2.0))
    [tensor([1., 2.])]
    """
    if (options or len(args) > 2) and function.__name__ in _FORMULAS:
        option, formula = _FORMULAS[function.__name__]
        if option == "weight" and len(args) == 3:
            *args, options[option] = args  # type: ignore[assignment]
        if isinstance(options.get(option), Tensor):
            options[option] = as_number(options[option])
            if isinstance(options[option], Tensor):
                return formula(*args, **options)
    found = _by_foreach(function, args, options)
    fresh = found is not None
    if found is None:
        values, count = (*args, *options.values()), len(args)
        first = next(value.tensors for value in values if isinstance(value, Leaves))
        rows = zip(*[column(value, first) for value in values], strict=False)
        found = [
            function(*row[:count], **dict(zip(options, row[count:], strict=True))) for row in rows
        ]
    return Leaves(found, fresh)


def at_least_float32(x: Any) -> Any:
    """A tensor, or leaves, in float32 where they are of half precision; anything else as it is.

    >>> [leaf.dtype for leaf in at_least_float32(Leaves([torch.ones(1).bfloat16()]))]
    [torch.float32]
    """
    if isinstance(x, Leaves):
        return Leaves([at_least_float32(leaf) for leaf in x])
    is_half = isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16)
    return x.float() if is_half else x


def sum_into(g: Any, p: Any, factor: float | Tensor = 1.0) -> Any:
    """``g + factor p``, for the last use of g: in its memory, where nothing else has that.

    In an eager step of Adam each result of its own would be an eighth of the memory.

    >>> fresh = 2.0 * Leaves([torch.ones(2)])
    >>> sum_into(fresh, Leaves([torch.ones(2)]), 0.5) is fresh, list(fresh)
    (True, [tensor([2.5000, 2.5000])])
    """
    factor = as_number(factor)
    if isinstance(factor, Tensor):
        return g + factor * p
    new, old = g.tensors, p.tensors
    alike = g.fresh and new and [*map(_dtype, new)] == [*map(_dtype, old)]
    if alike and not is_transformed(*new, *old):
        foreach_add_(new, old, alpha=factor)
        return g
    return torch.add(g, p, alpha=factor) if factor != 1.0 else torch.add(g, p)


def _by_foreach(
    function: Callable[..., Any], args: Sequence[Any], options: dict[str, Any]
) -> list[Tensor] | None:
    """What PyTorch's operator on lists gives in one call; None where it cannot be used."""
    foreach: Any = FOREACH.get(function.__name__)
    lists = [arg.tensors for arg in args if isinstance(arg, Leaves)]
    numbers = args[len(lists) :]
    # vmap and autograd's transformations have no rules for it; meta tensors cannot be read.
    if foreach is None or not lists or not lists[0] or lists[0][0].is_meta or is_transformed():
        return None
    if any([isinstance(value, Leaves) for value in (*numbers, *options.values())]):
        return None
    if not numbers:
        return foreach(*lists, **options)
    number, first = numbers[0], lists[0]
    takes_tensor = function.__name__ in ("add", "mul", "div") and _uniform(first)
    if isinstance(number, Tensor):
        # Autograd's rule for one tensor and a list wants all leaves of one shape.
        if not takes_tensor or number.requires_grad or number.dim():
            return None
        # By position a tensor is read, for the overload that takes a number.
        return foreach(*lists, other=number.to(first[0].dtype))
    if takes_tensor and first[0].is_cpu:
        return foreach(*lists, other=_constant(number, first[0].dtype))
    return foreach(*lists, number, **options)


def _uniform(leaves: list[Tensor]) -> bool:
    """Whether a 0-d tensor can take the leaves' dtype; half precision would round it."""
    return {*map(_dtype, leaves)} in WIDE


@lru_cache(maxsize=256)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a 0-d tensor.

    On CPU a list times a 0-d tensor takes half the time of a list times a number, for which a
    tensor is made for each leaf: 7 % of an eager step of SGD (tests/benchmarks/step.py).
    """
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


def column(value: Any, leaves: list[Tensor]) -> Iterable[Any]:
    """An argument leaf by leaf; a 0-d tensor in the leaf's dtype, but for half precision."""
    if isinstance(value, Leaves):
        return value.tensors
    if not isinstance(value, Tensor) or value.dim() or value.dtype == torch.bool:
        return repeat(value)
    if _uniform(leaves):
        return repeat(value.to(leaves[0].dtype))
    return [value.to(leaf.dtype) if _uniform([leaf]) else value for leaf in leaves]
