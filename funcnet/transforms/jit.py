"""`jit`: a pure function compiled as one program."""

import copyreg
import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from funcnet import runtime, tree
from funcnet.compiler.build import compiler
from funcnet.compiler.compiled import Compiled, Donated, name_of, where
from funcnet.compiler.inductor import compiling
from funcnet.compiler.numbers import NUMBERS, Arithmetic
from funcnet.compiler.signature import (
    Recognizer,
    Same,
    check_tensor,
    exact,
    is_plain,
    kind_of,
    recognizer,
    runs_itself,
    settings,
    structure,
)
from funcnet.compiler.tracing import WritesToArgumentError, readable, trace


class Lowered(NamedTuple):
    """What a jitted function becomes: text to read.

    ``graph`` is what was traced, operator by operator; ``code`` is the C++ program, or what
    Inductor wrote where the program is run by `Staged`, for the reason ``why_not_one``.
    """

    graph: str
    code: str
    why_not_one: str | None


class _Call(NamedTuple):
    """The arguments of a call: what is static, and what the leaves are.

    A bool among them has two values, so each has its own program; other numbers are traced.
    """

    statics: tuple[Any, ...]
    treedef: optree.PyTreeSpec
    leaves: list[Any]
    places: list[int]
    tensors: list[Tensor]
    numbers: list[Any]
    flags: tuple[bool, ...]


class Jitted:
    """A compiled function; see `jit`."""

    def __init__(
        self, function: Callable[..., Any], donate: tuple[int, ...], static: tuple[int | str, ...]
    ) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._donate = donate
        self._static = static
        # The program of the last call, and what recognizes calls like it.
        self._last: tuple[Recognizer, Compiled, bool] | None = None
        self._programs: dict[Hashable, list[Compiled]] = {}
        self._lock = threading.RLock()
        self._methods: dict[int, tuple[Jitted, Callable[[], Any]]] = {}
        self._instance: Callable[[], Any] | None = None

    def __repr__(self) -> str:
        return f"jit({getattr(self._function, '__qualname__', self._function)})"

    def __deepcopy__(self, memo: Any) -> "Jitted":
        return self

    def __reduce__(self) -> str:
        # As functions are pickled: by name.
        return str(getattr(self, "__qualname__", ""))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if runtime.is_transformed():
            # One program is compiled, that of the outermost function.
            return self._function(*args, **kwargs)
        last = self._last
        if last is not None:
            recognize, program, plain = last
            leaves = recognize((args, kwargs))
            if leaves is not None:
                return program(leaves, (), plain)
        call = self._read(args, kwargs)
        if runs_itself(call.leaves):
            return self._function(*args, **kwargs)
        program, inputs = self._find(call)
        if program.run is None and program.staged is None:
            return self._function(*args, **kwargs)
        plain = all([is_plain(tensor) for tensor in call.tensors])
        if program.run is not None and not (call.numbers or self._static or self._instance):
            recognize_next = recognizer((args, kwargs), call.treedef, call.tensors, program.watched)
            self._last = (recognize_next, program, plain) if recognize_next else None
        return program(call.tensors, inputs, plain)

    def lower(self, *args: Any, **kwargs: Any) -> Lowered:
        """The graph and the generated code for these arguments."""
        call = self._read(args, kwargs)
        if runs_itself(call.leaves):
            raise TypeError("jit: tensors without data, such as those on meta, run uncompiled")
        program, _ = self._find(call)
        code = program.text() if program.staged is None else program.staged.code()
        return Lowered(readable(program.traced), code, program.why_not_one)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """As a method: of a tree, such as a NamedTuple, whose tensors are arguments then.

        Any other instance is closed over, as by a lambda: the values of its tensors are read at
        each call, and what else it has is part of what the program is made for.
        """
        if instance is None:
            return self
        if not optree.tree_is_leaf(instance):
            return types.MethodType(self, instance)
        identity = id(instance)
        found, reference = self._methods.get(identity, (None, None))
        if found is None or reference is None or reference() is not instance:
            try:
                # When the instance goes, so do its programs.
                reference = weakref.ref(instance, lambda _: self._methods.pop(identity, None))
            except TypeError:
                reference = functools.partial(_itself, instance)
            found = self._bound_to(instance, reference)
            self._methods[identity] = found, reference
        return _Method(found, instance)

    def _bound_to(self, instance: Any, reference: Callable[[], Any]) -> "Jitted":
        """This function without its first parameter, which is what ``reference`` gives."""
        if 0 in self._donate:
            raise ValueError(f"{self!r}: self is no tree of tensors, and cannot be donated")

        def method(*args: Any, **kwargs: Any) -> Any:
            return self._function(reference(), *args, **kwargs)

        functools.update_wrapper(method, self._function)
        method.__signature__ = inspect.signature(  # type: ignore[attr-defined]
            types.MethodType(self._function, instance)
        )
        # Positions are those of the function, whose first parameter is self.
        donate = [each - (each > 0) for each in self._donate]
        static = [
            each - (each > 0) if isinstance(each, int) else each
            for each in self._static
            if each != 0
        ]
        bound = Jitted(method, tuple(donate), tuple(static))
        bound._instance = reference
        return bound

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        args, kwargs, statics = self._split(args, kwargs)
        leaves, treedef = tree.flatten((args, kwargs))
        places: list[int] = []
        tensors: list[Tensor] = []
        numbers: list[Any] = []
        flags: list[bool] = []
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Donated):
                _ = leaf.shape  # raises
            if type(leaf) is bool:
                flags.append(leaf)
            elif type(leaf) in NUMBERS:
                numbers.append(leaf)
            elif isinstance(leaf, Tensor):
                places.append(place)
                tensors.append(leaf)
            else:
                raise TypeError(
                    f"jit: expects tensors and numbers, got {leaf!r} as {name_of(treedef, place)}; "
                    "name what is no tensor in static="
                )
        return _Call(statics, treedef, leaves, places, tensors, numbers, tuple(flags))

    def _find(self, call: _Call) -> tuple[Compiled, list[Any]]:
        """The program for a call, compiled if there is none, and its inputs of numbers."""
        for place, tensor in zip(call.places, call.tensors, strict=True):
            check_tensor(tensor, functools.partial(name_of, call.treedef, place))
        key = (
            structure(call.treedef),
            exact(call.statics),
            tuple([type(leaf) for leaf in call.leaves if not isinstance(leaf, Tensor)]),
            tuple([kind_of(tensor) for tensor in call.tensors]),
            tuple(call.places),
            call.flags,
            settings(),
            self._instance and _attributes(self._instance()),
        )
        with self._lock:
            programs = self._programs.setdefault(key, [])
            for program in programs:
                inputs = program.inputs_for(call.numbers)
                if inputs is not None:
                    return program, inputs
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
            place, name = self._parameter(which)
            if place is not None and -len(rest) <= place < len(rest):
                found.append((place % len(rest), rest[place]))
                rest[place] = None
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

    def _compile(self, call: _Call) -> Compiled:
        if all([tensor.is_cpu for tensor in call.tensors]):
            # Before anything else: Inductor reads CXX once, when it is first imported.
            compiler()
        numbered = [place for place, leaf in enumerate(call.leaves) if type(leaf) in (int, float)]
        names = [name_of(call.treedef, place) for place in numbered]
        arithmetic = Arithmetic(call.numbers, names)
        out_treedef: Any = None

        def flat(*inputs: Tensor) -> list[Tensor]:
            nonlocal out_treedef
            leaves = [*call.leaves]
            for place, given in zip(call.places, inputs, strict=True):
                leaves[place] = given
            for place, number in zip(numbered, arithmetic.given, strict=True):
                leaves[place] = number
            args, kwargs = call.treedef.unflatten(leaves)
            rest, named = list(args), dict(kwargs)
            for which, value in call.statics:
                if isinstance(which, int):
                    rest[which] = value
                else:
                    named[which] = value
            results, out_treedef = tree.flatten(self._function(*rest, **named))
            return [_as_tensor(result) for result in results]

        kinds = [kind_of(tensor) for tensor in call.tensors]
        try:
            with compiling():
                traced = trace(flat, kinds, arithmetic)
        except DynamicOutputShapeException as error:
            raise TypeError(
                f"{self!r}: the shape of a result of {error.func} depends on the values of a "
                "tensor, which a compiled program does not know yet: choose with torch.where"
            ) from error
        except DataDependentOutputException as error:
            raise TypeError(
                f"{self!r}: the function reads the value of a tensor, which a compiled program "
                "does not know yet. Name a number that shapes or Python's control flow depend on "
                "in static=, or choose between tensors with torch.where"
            ) from error
        except TypeError as error:
            # Python puts an error of its own in the place of a TypeError from n - tensor.
            if "TracedNumber" in str(error) and arithmetic.refusal:
                raise TypeError(arithmetic.refusal) from error
            raise
        except WritesToArgumentError as error:
            what = where(call.treedef, call.places, error.args[0])
            raise ValueError(
                f"{self!r}: the function writes in place to {what}; a pure function writes to "
                "tensors of its own only"
            ) from None
        donated = self._donated_tensors(call)
        return Compiled(
            repr(self),
            call.treedef,
            call.tensors,
            call.places,
            arithmetic,
            traced,
            out_treedef,
            donated,
        )

    def _donated_tensors(self, call: _Call) -> list[int]:
        """The positions of donated tensors among those of a call."""
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
            found += [source for source, place in enumerate(call.places) if place in leaves]
        return found


class _Method:
    """A jitted method of an instance, which it keeps alive."""

    __slots__ = ("_instance", "_jitted")

    def __init__(self, jitted: Jitted, instance: Any) -> None:
        self._jitted = jitted
        self._instance = instance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._jitted(*args, **kwargs)

    def __repr__(self) -> str:
        return repr(self._jitted)

    def lower(self, *args: Any, **kwargs: Any) -> Lowered:
        """The graph and the generated code for these arguments."""
        return self._jitted.lower(*args, **kwargs)


def _itself(instance: Any) -> Any:
    return instance


def _attributes(value: Any, seen: frozenset[int] = frozenset()) -> Hashable:
    """What an instance has, and what the objects in it have, as a key.

    Tensors count by identity and kind, their values do not.
    """
    names = [*getattr(value, "__dict__", {}), *copyreg._slotnames(type(value))]  # type: ignore[attr-defined]
    own = {name: getattr(value, name) for name in names if hasattr(value, name)}
    leaves, treedef = tree.flatten(own)
    seen |= {id(value)}
    found: list[Hashable] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found.append((Same(leaf), kind_of(leaf)))
        elif id(leaf) in seen or isinstance(leaf, (type, types.FunctionType, types.ModuleType)):
            found.append(Same(leaf))
        elif hasattr(leaf, "__dict__"):
            found.append((type(leaf), _attributes(leaf, seen)))
        else:
            found.append(exact(leaf))
    return structure(treedef), tuple(found)


def _as_tensor(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    if isinstance(result, (bool, int, float)):
        kind = next(kind for kind in NUMBERS if isinstance(result, kind))
        return torch.tensor(result, dtype=NUMBERS[kind])
    raise TypeError(f"jit: a function returns tensors and numbers, got {result!r}")


def jit(
    f: Callable[..., Any],
    donate: int | Sequence[int] = (),
    static: int | str | Sequence[int | str] = (),
) -> Jitted:
    """Compile a pure function: one program for all that it does, loops included.

    The function is traced once for each structure, shapes, dtypes and devices of its arguments,
    each value of the static ones, and each setting of torch that operators read, such as autocast
    or the default dtype. On the CPU the program is C++: Inductor fuses the operators into kernels,
    and one function calls them, without a tensor made or memory allocated between. It is kept on
    disk, in ``FUNCNET_CACHE_DIR`` or the user's cache folder, for other processes. Where no program
    can be made, a warning says so once, and the function itself runs.

    Tensors that the function closes over are read at each call; if one has become of another shape
    or dtype, the function is traced again. All else that it closes over, other tensors that a name
    is bound to later among it, and Python's own effects, such as printing, belong to tracing only.
    Inside another transformation, f itself is called. As a decorator of a method it binds self:
    what the instance and the objects in it hold is then part of what the program is made for.

    Args:
        f: a pure function of trees of tensors and numbers. Another value of an int or a float
            needs no new program: arithmetic among numbers is done by Python at each call, and a
            number meets a tensor as it does eagerly. Only an ``if`` that goes another way, or a
            result of another type, is traced anew, and each bool has its own program. While f is
            traced, ``isinstance(n, float)`` is what it is eagerly, and ``type(n)`` is not. Numbers
            among the results become 0-d tensors.
        donate: positions of arguments whose memory the results may take. Their tensors cannot be
            used afterwards.
        static: positions or names of hashable arguments that f may read while it is traced.

    Returns:
        A function like f, with ``lower(*args)``, which gives the graph and the code as text. Its
        results need no gradient, and are contiguous.

    Raises:
        RuntimeError: there is no C++ compiler, a donated tensor is used, or an index is out of
            range; what was donated to that call is lost.
        TypeError: f reads the value of a tensor, or turns a number into an int, a float or an
            index; an argument is neither a plain, dense tensor nor a number.
        ValueError: a donated tensor shares its memory with another argument.

    >>> import funcnet as fn
    >>> f = jit(lambda x, factor: (factor * x).sum())
    >>> f(torch.ones(3), 2.0), f(torch.ones(3), 3.0)
    (tensor(6.), tensor(9.))
    """
    if not callable(f):
        raise TypeError(f"jit: expects a function, got {type(f).__name__}")
    donated = (donate,) if isinstance(donate, int) else tuple(donate)
    fixed = (static,) if isinstance(static, (int, str)) else tuple(static)
    if any(not isinstance(each, int) for each in donated):
        raise TypeError(f"jit: donate expects positions of arguments, got {donate!r}")
    if any(not isinstance(each, (int, str)) for each in fixed):
        raise TypeError(f"jit: static expects positions or names of arguments, got {static!r}")
    if both := set(donated) & set(fixed):
        raise ValueError(f"jit: argument {min(both)} cannot be donated and static")
    return Jitted(f, donated, fixed)
