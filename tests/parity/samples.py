"""The cases: those of PyTorch's module database, and our own, each with numbers drawn for it."""

import inspect
import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.testing._internal.common_modules import ModuleInfo, module_db

from tests.layers import oracle
from tests.parity.names import PARTS
from tests.parity.own import OWN, Case

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
TORCH, REFUSED, OWN_CASES = "torch", "torch errors", "own"


class Sample(NamedTuple):
    """A module's arguments, and those of its forward.

    The inputs have names where x is a dict of them.
    """

    cls: type
    source: str
    what: str
    dtype: torch.dtype
    train: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Any, ...]
    options: dict[str, Any]
    contiguous: bool = True
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, module: type, *fields: Any, contiguous: bool = True) -> "Sample":
        """A sample whose inputs have names if they are parts of x."""
        *fields, inputs, options = fields
        if module.__name__ not in PARTS:
            return cls(module, *fields, inputs, options, contiguous)
        arguments = [*inspect.signature(module.forward).parameters][1:]
        options = dict(zip(arguments, inputs, strict=False)) | options
        options = {name: value for name, value in options.items() if value is not None}
        names = tuple([name for name in PARTS[module.__name__] if name in options])
        inputs = tuple([options.pop(name) for name in names])
        return cls(module, *fields, inputs, options, contiguous, names)

    def __str__(self) -> str:
        mode = "train" if self.train else "eval"
        layout = "" if self.contiguous else ", not contiguous"
        given = [*map(_shown, self.args), *(f"{k}={_shown(v)}" for k, v in self.kwargs.items())]
        inputs = [*map(_shown, self.inputs), *(f"{k}={_shown(v)}" for k, v in self.options.items())]
        return (
            f"{self.source}: {self.cls.__name__}({', '.join(given)})({', '.join(inputs)}), "
            f"{str(self.dtype).removeprefix('torch.')}, {mode}{layout} {self.what}"
        )


def _shown(value: Any) -> str:
    if type(value) is tuple:
        return f"({', '.join(map(_shown, value))})"
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__ if isinstance(value, nn.Module) else repr(value)


def from_torch(info: ModuleInfo, dtype: torch.dtype) -> list[Sample]:
    """The samples of one class in the module database, in train and in eval mode."""
    found = []
    for train in (True, False):
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            given = list(
                info.module_inputs_func(
                    info, device="cpu", dtype=dtype, requires_grad=False, training=train
                )
            )
        found += [_of_torch(info, TORCH, each, each.desc, dtype, train) for each in given]
    return found


def refused_by_torch(info: ModuleInfo, dtype: torch.dtype) -> list[Sample]:
    """The samples of one class that torch answers with an error."""
    if info.module_error_inputs_func is None:
        return []
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        given = list(
            info.module_error_inputs_func(
                info, device="cpu", dtype=dtype, requires_grad=False, training=True
            )
        )
    return [
        _of_torch(info, REFUSED, each.module_error_input, each.error_regex, dtype, True)
        for each in given
    ]


def _of_torch(
    info: ModuleInfo, source: str, given: Any, what: str, dtype: torch.dtype, train: bool
) -> Sample:
    made, called = given.constructor_input, given.forward_input
    args, kwargs = (called.args, dict(called.kwargs)) if called is not None else ((), {})
    if "input" in kwargs:
        args = (kwargs.pop("input"), *args)
    told = info.module_cls, source, what, dtype, train
    return Sample.of(*told, made.args, made.kwargs, args, kwargs)


def of_own(cls: type, case: Case, dtype: torch.dtype, train: bool, contiguous: bool) -> Sample:
    """One of our own cases, with numbers."""
    drawn = case.drawn(dtype)
    sample = Sample.of(cls, OWN_CASES, "", dtype, train, *drawn, contiguous=contiguous)
    if contiguous:
        return sample
    return sample._replace(inputs=tuple(other_layout(each) for each in sample.inputs))


def other_layout(value: Any) -> Any:
    """The same numbers, not contiguous."""
    if type(value) is tuple:
        return tuple(map(other_layout, value))
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    if value.dim() > 1:
        return oracle.transposed(value)
    return value.repeat_interleave(2)[::2]


def own(name: str, dtypes: Iterable[torch.dtype]) -> Iterator[Sample]:
    """All of our own cases of a class, in each dtype, mode and layout."""
    modes = itertools.product(dtypes, (True, False), (True, False))
    for dtype, train, contiguous in modes:
        for case in OWN.get(name, []):
            yield of_own(getattr(nn, name), case, dtype, train, contiguous)


def samples_of(name: str, dtypes: Iterable[torch.dtype]) -> dict[str, list[Sample]]:
    """The samples of a class by their source."""
    found: dict[str, list[Sample]] = {TORCH: [], REFUSED: [], OWN_CASES: list(own(name, dtypes))}
    for info in module_db:
        if info.module_cls.__name__ == name:
            for dtype in dtypes:
                found[TORCH] += from_torch(info, dtype)
                found[REFUSED] += refused_by_torch(info, dtype)
    return found
