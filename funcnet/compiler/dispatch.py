"""From a call to its program: what is static in the arguments, and which program fits the rest."""

import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from funcnet import tree
from funcnet.compiler.build import compiler
from funcnet.compiler.compiled import Compiled, Donated, Lowered, name_of, where
from funcnet.compiler.escaped import Escaped
from funcnet.compiler.inductor import compiling
from funcnet.compiler.numbers import NUMBERS, Arithmetic
from funcnet.compiler.progress import shown, stage
from funcnet.compiler.reads import needs_value
from funcnet.compiler.record import WritesToArgumentError, record
from funcnet.compiler.signature import (
    Recognizer,
    attributes_key,
    check_tensor,
    exact,
    is_plain,
    recognizer,
    runs_itself,
    settings,
    structure,
)
from funcnet.compiler.specs import input_spec


class Call(NamedTuple):
    """The arguments of a call.

    Attributes:
        statics: which arguments are static, and their values.
        treedef: the structure of the others.
        leaves: their leaves.
        indices: which of the leaves are tensors.
        tensors: those tensors.
        numbers: the ints and floats, which are traced.
        flags: the bools. A bool has two values, and each has its own program.
    """

    statics: tuple[Any, ...]
    treedef: optree.PyTreeSpec
    leaves: list[Any]
    indices: list[int]
    tensors: list[Tensor]
    numbers: list[Any]
    flags: tuple[bool, ...]


class Dispatcher:
    """The programs of one function.

    Args:
        function: takes and gives trees of tensors and numbers.
        name: of the function, for errors.
        donate: positions of arguments whose memory the results may take.
        static: positions and names of arguments that each value has its own program for.
        instance: gives the object of which the function is a method, if it is one.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        donate: tuple[int, ...],
        static: tuple[int | str, ...],
        instance: Callable[[], Any] | None,
    ) -> None:
        self._function = function
        self._name = name
        self._donate = donate
        self._static = static
        self._instance = instance
        # The program of the last call, and what recognizes calls like it.
        self.last: tuple[Recognizer, Compiled, bool] | None = None
        self._programs: dict[Hashable, list[Compiled]] = {}
        self._lock = threading.RLock()

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function by a program, or itself where there is none."""
        call = self._read(args, kwargs)
        if runs_itself(call.leaves):
            return self._function(*args, **kwargs)
        program, inputs = self._find(call)
        if program.run is None and program.staged is None:
            return self._function(*args, **kwargs)
        plain = all([is_plain(tensor) for tensor in call.tensors])
        if program.run is not None and not (self._static or self._instance):
            found = recognizer((args, kwargs), call.treedef, call.leaves, program.watched)
            self.last = (found, program, plain) if found else None
        return program(call.tensors, inputs, plain)

    def lower(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lowered:
        """What each stage makes of the function, for these arguments."""
        call = self._read(args, kwargs)
        if runs_itself(call.leaves):
            raise TypeError("jit: tensors without data, such as those on meta, run uncompiled")
        return self._find(call)[0].lowered()

    def clear(self) -> None:
        """Free the memory that the programs keep from call to call."""
        with self._lock:
            for program in itertools.chain(*self._programs.values()):
                program.clear()

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        args, kwargs, statics = self._split(args, kwargs)
        leaves, treedef = tree.flatten((args, kwargs))
        indices: list[int] = []
        tensors: list[Tensor] = []
        numbers: list[Any] = []
        flags: list[bool] = []
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, (Donated, Escaped)):
                _ = leaf.shape  # raises
            if _is_numpy_scalar(leaf):
                leaf = leaves[index] = leaf.item()
            if type(leaf) is bool:
                flags.append(leaf)
            elif type(leaf) in NUMBERS:
                numbers.append(leaf)
            elif isinstance(leaf, Tensor):
                indices.append(index)
                tensors.append(leaf)
            else:
                if hasattr(leaf, "__array__"):
                    where = name_of(treedef, index)
                    raise TypeError(f"jit: expects tensors, as {where} got {tree.describe(leaf)}")
                raise TypeError(
                    f"jit: expects tensors and numbers, got {leaf!r} as {name_of(treedef, index)}; "
                    "name what is no tensor in static="
                )
        return Call(statics, treedef, leaves, indices, tensors, numbers, tuple(flags))

    def _find(self, call: Call) -> tuple[Compiled, list[Any]]:
        """The program for a call, compiled if there is none, and its inputs of numbers."""
        for index, tensor in zip(call.indices, call.tensors, strict=True):
            check_tensor(tensor, functools.partial(name_of, call.treedef, index))
        key = (
            structure(call.treedef),
            exact(call.statics),
            tuple([type(leaf) for leaf in call.leaves if not isinstance(leaf, Tensor)]),
            tuple([input_spec(tensor) for tensor in call.tensors]),
            tuple(call.indices),
            call.flags,
            settings(),
            self._instance and attributes_key(self._instance()),
        )
        with self._lock:
            programs = self._programs.setdefault(key, [])
            for program in programs:
                inputs = program.inputs_for(call.numbers)
                if inputs is not None:
                    return program, inputs
            with shown(self._name):
                program = self._compile(call)
            programs.insert(0, program)
        inputs = program.inputs_for(call.numbers)
        assert inputs is not None
        return program, inputs

    def _split(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...]]:
        """The arguments without the static ones, which leave None behind."""
        if not self._static:
            return args, kwargs, ()
        found: list[tuple[int | str, Hashable]] = []
        rest, named = list(args), dict(kwargs)
        for which in self._static:
            position, name = self._parameter(which)
            if position is not None and -len(rest) <= position < len(rest):
                found.append((position % len(rest), rest[position]))
                rest[position] = None
            elif name in named:
                found.append((name, named.pop(name)))
        for which, value in found:
            try:
                hash(value)
            except TypeError:
                raise TypeError(
                    f"jit: the static argument {which!r} must be hashable, got a "
                    f"{type(value).__name__}"
                ) from None
        return tuple(rest), named, tuple(found)

    def _parameter(self, which: int | str) -> tuple[int | None, str]:
        """The position and the name of a parameter."""
        try:
            names = list(inspect.signature(self._function).parameters)
        except (TypeError, ValueError):
            names = []
        if isinstance(which, int):
            return which, names[which] if -len(names) <= which < len(names) else ""
        return names.index(which) if which in names else None, which

    def _compile(self, call: Call) -> Compiled:
        if all([tensor.is_cpu for tensor in call.tensors]):
            # Before anything else: Inductor reads CXX once, when it is first imported.
            compiler()
        numbered = [index for index, leaf in enumerate(call.leaves) if type(leaf) in (int, float)]
        names = [name_of(call.treedef, index) for index in numbered]
        arithmetic = Arithmetic(call.numbers, names)
        out_treedef: Any = None

        def traced_function(*inputs: Tensor) -> list[Tensor]:
            nonlocal out_treedef
            leaves = [*call.leaves]
            for index, given in zip(call.indices, inputs, strict=True):
                leaves[index] = given
            for index, number in zip(numbered, arithmetic.given, strict=True):
                leaves[index] = number
            args, kwargs = call.treedef.unflatten(leaves)
            rest, named = list(args), dict(kwargs)
            for which, value in call.statics:
                if isinstance(which, int):
                    rest[which] = value
                else:
                    named[which] = value
            results, out_treedef = tree.flatten(self._function(*rest, **named))
            return [_as_tensor(result) for result in results]

        stage("recording its operators")
        try:
            with compiling():
                recorded = record(
                    traced_function, [*map(input_spec, call.tensors)], arithmetic, self._name
                )
        except (DynamicOutputShapeException, DataDependentOutputException) as error:
            dynamic = isinstance(error, DynamicOutputShapeException)
            raise needs_value(str(error.func), of_shape=dynamic) from None
        except TypeError as error:
            # Python raises an error of its own instead of the TypeError from n - tensor.
            if "TracedNumber" in str(error) and arithmetic.refusal:
                raise TypeError(arithmetic.refusal) from error
            raise
        except WritesToArgumentError as error:
            index, line = error.args
            what = where(call.treedef, call.indices, index)
            at = f"\n  {line}" if line else ""
            raise ValueError(
                f"{self._name}: the function writes in place to {what}; a pure function writes to "
                f"tensors of its own only{at}"
            ) from None
        return Compiled(
            self._name,
            call.treedef,
            call.tensors,
            call.indices,
            arithmetic,
            recorded,
            out_treedef,
            self._donated(call),
        )

    def _donated(self, call: Call) -> list[int]:
        """The donated tensors, by index among those of a call."""
        args = call.treedef.child(0)
        counts = [child.num_leaves for child in args.children()]
        found: list[int] = []
        for which in self._donate:
            if not -len(counts) <= which < len(counts):
                raise ValueError(
                    f"jit: donate={self._donate}, but there are {len(counts)} positional arguments"
                )
            start = sum(counts[: which % len(counts)])
            leaves = range(start, start + counts[which])
            found += [source for source, index in enumerate(call.indices) if index in leaves]
        return found


def _is_numpy_scalar(leaf: Any) -> bool:
    """Whether it is numpy's bool, int or float, which counts as Python's."""
    known = type(leaf).__module__ == "numpy" and type(leaf).__name__ != "ndarray"
    return known and isinstance(getattr(leaf, "item", str)(), (bool, int, float))


def _as_tensor(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    if isinstance(result, (bool, int, float)):
        number = next(number for number in NUMBERS if isinstance(result, number))
        return torch.tensor(result, dtype=NUMBERS[number])
    raise TypeError(f"jit: a function returns tensors and numbers, got {result!r}")
