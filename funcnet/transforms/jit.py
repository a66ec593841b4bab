"""`jit`: a pure function compiled as one program."""

import functools
import inspect
import re
import threading
from array import array
from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter, methodcaller
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from funcnet import tree
from funcnet.transforms.build import cache_dir, compiler, fingerprint, load
from funcnet.transforms.host import Program
from funcnet.transforms.inductor import UnsupportedError
from funcnet.transforms.staged import Staged
from funcnet.transforms.tracing import (
    Spec,
    Traced,
    WritesToArgumentError,
    readable,
    spec_of,
    through_barriers,
    trace,
)

_shape = attrgetter("shape")
_dtype = attrgetter("dtype")
_is_cpu = attrgetter("is_cpu")
_is_contiguous = methodcaller("is_contiguous")
_is_neg = methodcaller("is_neg")
_address = methodcaller("data_ptr")
_NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}


class Donated(Tensor):
    """What is left of a tensor whose memory was given to a jitted function."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(
            "this tensor was donated to a function that fn.jit compiled, and its memory now holds "
            "a result: use the tensors that the function returned, or do not donate the argument"
        )

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return "<a tensor that was donated to a jitted function>"


class Lowered(NamedTuple):
    """What a jitted function becomes: text to read.

    ``graph`` is what was traced, operator by operator; ``code`` is the C++ program, or what
    Inductor wrote where the program is run by `Staged`, for the reason ``why_not_one``.
    """

    graph: str
    code: str
    why_not_one: str | None


class _Entry:
    """A compiled program and how to call it."""

    def __init__(
        self,
        treedef: optree.PyTreeSpec,
        leaves: list[Any],
        traced: Traced,
        out_treedef: optree.PyTreeSpec,
        donated: list[int],
    ) -> None:
        self.treedef = treedef
        self.out_treedef = out_treedef
        self.shapes = [*map(_shape, leaves)]
        self.dtypes = [*map(_dtype, leaves)]
        self.devices = [leaf.device for leaf in leaves]
        self.sizes = [leaf.numel() * leaf.element_size() for leaf in leaves]
        self.captured_sizes = [each.numel() * each.element_size() for each in traced.captured]
        self.traced = traced
        self.threads = torch.get_num_threads()
        self.default_dtype = torch.get_default_dtype()
        self.on_cpu = all([leaf.is_cpu for leaf in [*leaves, *traced.captured]])
        inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
        outputs = [through_barriers(node) for node in traced.graph.output_node().args[0]]
        self.specs = [spec_of(node.meta["val"]) for node in outputs]
        position = {node: place for place, node in enumerate(inputs)}
        # An output that is an argument, untouched, is that very tensor.
        self.passed = {
            place: position[node] for place, node in enumerate(outputs) if node in position
        }
        untouched = {source for source in self.passed.values() if source in donated}
        # Donated, and still there afterwards: neither written nor lost.
        self.donated = [source for source in donated if source not in untouched]
        self.reused = _pair(
            self.specs, [spec_of(leaf) for leaf in leaves], self.donated, self.passed
        )
        self.fresh = [
            place
            for place in range(len(outputs))
            if place not in self.reused and place not in self.passed
        ]
        self.run: Callable[[int, int], int] | None = None
        self.error: Callable[[], bytes] | None = None
        self.staged: Staged | None = None
        self.why_not_one: str | None = None


def _pair(
    outputs: list[Spec], inputs: list[Spec], donated: list[int], passed: dict[int, int]
) -> dict[int, int]:
    """The donated input whose memory each output takes: the first that is like it."""
    free = dict.fromkeys(donated)
    pairs = {}
    for place, spec in enumerate(outputs):
        if place not in passed:
            source = next((each for each in free if inputs[each] == spec), None)
            if source is not None:
                del free[source]
                pairs[place] = source
    return pairs


class Jitted:
    """A compiled function; see `jit`."""

    def __init__(
        self, function: Callable[..., Any], donate: tuple[int, ...], static: tuple[int | str, ...]
    ) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._donate = donate
        self._static = static
        self._last: _Entry | None = None
        self._entries: dict[Any, _Entry] = {}
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"jit({getattr(self._function, '__qualname__', self._function)})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if tree.transformed():
            # One program is compiled, that of the outermost function.
            return self._function(*args, **kwargs)
        entry = self._last
        if entry is not None and not self._static:
            try:
                leaves: list[Any] = entry.treedef.flatten_up_to((args, kwargs))  # type: ignore[arg-type]
                if (
                    [*map(_shape, leaves)] == entry.shapes
                    and [*map(_dtype, leaves)] == entry.dtypes
                    and all([*map(_is_cpu, leaves)])
                    and torch.get_num_threads() == entry.threads
                    and torch.get_default_dtype() is entry.default_dtype
                ):
                    return self._run(entry, leaves)
            except (ValueError, TypeError, AttributeError):
                pass
        entry, leaves = self._find(args, kwargs)
        if entry is None:
            return self._function(*args, **kwargs)
        return self._run(entry, leaves)

    def lower(self, *args: Any, **kwargs: Any) -> Lowered:
        """The graph and the generated code for these arguments."""
        entry, _ = self._find(args, kwargs)
        if entry is None:
            raise TypeError("jit: tensors on the meta device run uncompiled")
        code = _program(entry) if entry.staged is None else entry.staged.code()
        return Lowered(readable(entry.traced), code, entry.why_not_one)

    def _find(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[_Entry | None, list[Tensor]]:
        args, kwargs, statics = self._split(args, kwargs)
        given, treedef = tree.flatten((args, kwargs))
        leaves = self._tensors(given, treedef)
        if any([leaf.is_meta for leaf in leaves]):
            return None, leaves
        numbers = [place for place, leaf in enumerate(given) if type(leaf) in _NUMBERS]
        key = (
            treedef,
            statics,
            tuple(numbers),
            tuple([(tuple(leaf.shape), leaf.dtype, leaf.device) for leaf in leaves]),
            torch.get_num_threads(),
            torch.get_default_dtype(),
        )
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = self._compile(treedef, statics, leaves, numbers)
                self._entries[key] = entry
            if entry.run is not None and not numbers:
                self._last = entry
        return entry, leaves

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
        # 1, 1.0 and True are equal, and a program for one is not one for another.
        return tuple(rest), named, tuple([(which, type(value), value) for which, value in found])

    def _parameter(self, which: int | str) -> tuple[int | None, str]:
        """The position and the name of a parameter."""
        try:
            names = list(inspect.signature(self._function).parameters)
        except (TypeError, ValueError):
            names = []
        if isinstance(which, int):
            return which, names[which] if -len(names) <= which < len(names) else ""
        return names.index(which) if which in names else None, which

    def _tensors(self, leaves: list[Any], treedef: optree.PyTreeSpec) -> list[Tensor]:
        tensors = []
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Donated):
                _ = leaf.shape  # raises
            if type(leaf) in _NUMBERS:
                leaf = torch.tensor(leaf, dtype=_NUMBERS[type(leaf)], device="cpu")
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"jit: expects tensors and numbers, got {leaf!r} as {_where(treedef, place)}; "
                    "name what is no tensor in static="
                )
            if leaf.is_complex():
                raise TypeError(f"jit: expects real tensors, got {_where(treedef, place)} complex")
            tensors.append(leaf)
        return tensors

    def _compile(
        self,
        treedef: optree.PyTreeSpec,
        statics: tuple[Any, ...],
        leaves: list[Tensor],
        numbers: list[int],
    ) -> _Entry:
        if all([leaf.is_cpu for leaf in leaves]):
            # Before anything else: Inductor reads CXX once, when it is first imported.
            compiler()
        out_treedef: Any = None

        def flat(*inputs: Tensor) -> list[Tensor]:
            nonlocal out_treedef
            args, kwargs = treedef.unflatten(inputs)
            rest, named = list(args), dict(kwargs)
            for which, _, value in statics:
                if isinstance(which, int):
                    rest[which] = value
                else:
                    named[which] = value
            results, out_treedef = tree.flatten(self._function(*rest, **named))
            return [_as_tensor(result) for result in results]

        try:
            traced = trace(flat, [spec_of(leaf) for leaf in leaves], numbers)
        except DataDependentOutputException as error:
            raise TypeError(
                f"{self!r}: the function reads the value of a tensor, which a compiled program "
                "does not know yet. Name a number that shapes or Python's control flow depend on "
                "in static=, or choose between tensors with torch.where"
            ) from error
        except WritesToArgumentError as error:
            raise ValueError(
                f"{self!r}: the function writes in place to {_where(treedef, error.args[0])}; a "
                "pure function writes to tensors of its own only"
            ) from None
        donated = self._donated_leaves(treedef)
        entry = _Entry(treedef, leaves, traced, out_treedef, donated)
        _prepare(entry)
        return entry

    def _donated_leaves(self, treedef: optree.PyTreeSpec) -> list[int]:
        args = treedef.child(0)
        counts = [child.num_leaves for child in args.children()]
        places: list[int] = []
        for which in self._donate:
            if not -len(counts) <= which < len(counts):
                raise ValueError(
                    f"jit: donate={self._donate}, but there are {len(counts)} positional arguments"
                )
            start = sum(counts[: which % len(counts)])
            places += range(start, start + counts[which])
        return places

    def _run(self, entry: _Entry, given: list[Tensor]) -> Any:
        leaves = given
        if not all([*map(_is_contiguous, leaves)]) or any([*map(_is_neg, leaves)]):
            leaves = [leaf.contiguous().resolve_neg() for leaf in leaves]
        captured = entry.traced.captured
        if not all([*map(_is_contiguous, captured)]):
            captured = [tensor.contiguous() for tensor in captured]
        tensors = [*leaves, *captured]
        outputs: list[Any] = [None] * len(entry.specs)
        if entry.run is None:
            assert entry.staged is not None
            outputs = entry.staged(tensors)
        else:
            addresses = [*map(_address, tensors)]
            if entry.donated:
                self._check_overlap(entry, addresses)
            for place in entry.fresh:
                spec = entry.specs[place]
                outputs[place] = torch.empty(spec.shape, dtype=spec.dtype, device=spec.device)
            ins = array("Q", addresses)
            outs = array("Q", [0 if each is None else each.data_ptr() for each in outputs])
            if entry.run(ins.buffer_info()[0], outs.buffer_info()[0]):
                assert entry.error is not None
                message = _plain(entry.error().decode())
                if entry.donated:
                    # Some of it may hold new values and some old ones.
                    message += "; what was donated is lost"
                    for source in entry.donated:
                        given[source].__class__ = Donated
                raise RuntimeError(f"{self!r}: {message}")
            for place, source in entry.reused.items():
                # As detach gives it, and faster.
                outputs[place] = leaves[source].data
        for place, source in entry.passed.items():
            outputs[place] = given[source] if source < len(given) else captured[source - len(given)]
        for source in entry.donated:
            given[source].__class__ = Donated
        return entry.out_treedef.unflatten(outputs)

    def _check_overlap(self, entry: _Entry, addresses: list[int]) -> None:
        """Refuse donated memory that another argument shares: it would change under it."""
        places = sorted(zip(addresses, [*entry.sizes, *entry.captured_sizes], strict=True))
        end = 0
        for start, size in places:
            if size and start < end:
                break
            end = start + size
        else:
            return
        spans = [*zip(addresses, [*entry.sizes, *entry.captured_sizes], strict=True)]
        for source in entry.donated:
            start, size = spans[source]
            for other, (begin, length) in enumerate(spans):
                if other != source and begin < start + size and start < begin + length:
                    raise ValueError(
                        f"{self!r}: {_where(entry.treedef, source)} is donated and shares memory "
                        f"with {_where(entry.treedef, other)}: pass a clone, or do not donate it"
                    )


def _where(treedef: optree.PyTreeSpec, place: int) -> str:
    """How errors call a leaf of (args, kwargs)."""
    paths = treedef.paths()
    if place >= len(paths):
        return "a tensor that the function closes over"
    _, argument, *inside = paths[place]
    return f"argument {argument!r}" + (f" at {tree.path_string(inside)!r}" if inside else "")


def _plain(message: str) -> str:
    """An error of a kernel without its place in the C++ text and the names there."""
    message = re.sub(r"^kernel_\d+, \S*, ", "", message)
    return re.sub(r"0 <= tmp\d+ < (\d+)L", r"expected 0 <= index < \1", message)


def _as_tensor(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    if type(result) in _NUMBERS:
        return torch.tensor(result, dtype=_NUMBERS[type(result)])
    raise TypeError(f"jit: a function returns tensors and numbers, got {result!r}")


def _prepare(entry: _Entry) -> None:
    """Compile a program, or load it from disk."""
    if not entry.on_cpu:
        entry.why_not_one = "tensors on another device than the CPU"
        entry.staged = Staged(entry.traced)
        return
    setting = f"{entry.threads} {entry.default_dtype} {entry.specs}"
    name = fingerprint(readable(entry.traced), repr(entry.reused), setting)
    refused = cache_dir() / f"{name}.refused"
    if refused.exists():
        entry.why_not_one = refused.read_text()
    else:
        try:
            library = load(name, lambda: _program(entry))
            entry.run, entry.error = library.funcnet_run, library.funcnet_error
            return
        except UnsupportedError as reason:
            entry.why_not_one = str(reason)
            refused.parent.mkdir(parents=True, exist_ok=True)
            refused.write_text(str(reason))
    entry.staged = Staged(entry.traced)


def _program(entry: _Entry) -> str:
    return Program(entry.traced, entry.reused, entry.passed, entry.threads).text


def jit(
    f: Callable[..., Any],
    donate: int | Sequence[int] = (),
    static: int | str | Sequence[int | str] = (),
) -> Jitted:
    """Compile a pure function: one program for all that it does, loops included.

    The function is traced once for each structure, shapes, dtypes and devices of its arguments
    and each value of the static ones. On the CPU the program is C++: Inductor fuses the operators
    into kernels, and one function calls them, without a tensor made or memory allocated between.
    It is kept on disk, in ``FUNCNET_CACHE_DIR`` or the user's cache folder, for other processes.
    Tensors that the function closes over are read at each call; Python's own effects, such as
    printing, happen while tracing only. Inside another transformation, f itself is called.

    Args:
        f: a pure function of trees of tensors and numbers. A Python number is traced as a 0-d
            tensor (float64, int64 or bool), so that another value needs no new program. With
            tensors it promotes dtypes as a number does, by its kind alone.
        donate: positions of arguments whose memory the results may take. Their tensors cannot be
            used afterwards.
        static: positions or names of hashable arguments that f may read while it is traced.

    Returns:
        A function like f, with ``lower(*args)``, which gives the graph and the code as text. Its
        results need no gradient.

    Raises:
        RuntimeError: there is no C++ compiler, a donated tensor is used, or an index is out of
            range; what was donated to that call is lost.
        TypeError: f reads the value of a tensor, or an argument is neither tensor nor number.
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
