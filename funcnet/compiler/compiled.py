"""A function compiled for one signature, and how it is called."""

import contextlib
import functools
import re
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from operator import methodcaller
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from funcnet import tree
from funcnet.compiler import cache
from funcnet.compiler.blocks import Block, blocks
from funcnet.compiler.build import load, text_key
from funcnet.compiler.calls import Calls, call_sites, calling, say_if_often
from funcnet.compiler.donation import pair
from funcnet.compiler.errors import (
    BuildError,
    NoCompilerError,
    NoKernelError,
    UnknownTorchError,
    UnsupportedError,
    say_once,
    say_unknown,
)
from funcnet.compiler.inductor import writing
from funcnet.compiler.instructions import Kernels
from funcnet.compiler.missing import mark_alike, mark_missing
from funcnet.compiler.nodes import is_called, mark_called, through_barriers
from funcnet.compiler.numbers import NUMBERS, Arithmetic
from funcnet.compiler.plan import Plan
from funcnet.compiler.program import program_text
from funcnet.compiler.record import Recorded, settings_of_programs
from funcnet.compiler.recycling import Pool
from funcnet.compiler.signature import is_plain, settings
from funcnet.compiler.specs import input_spec, spec_of
from funcnet.compiler.staged import Staged

_address = methodcaller("data_ptr")


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

    def __format__(self, spec: str) -> str:
        return repr(self)


@functools.cache
def _without_memory(device: torch.device) -> Tensor:
    """What takes the place of a donated tensor's data: reading it is an error."""
    tensor = torch.empty(0, device=device)
    torch._C._set_throw_on_mutable_data_ptr(tensor)
    return tensor


class Lowered(NamedTuple):
    """What each stage makes of a jitted function, as text; the compiler's README has an example.

    Attributes:
        graph: what was recorded, operator by operator.
        blocks: the graph cut into segments, loops and primitives.
        buffers: the memory plan: which arguments are donated to which results, and for each buffer
            of the workspace its offset, its size, the statements of the code between which it is
            alive, and its values. Empty where there is no single program.
        code: the C++ program, or what Inductor wrote where segments run one by one.
        called: the operators that the program calls through PyTorch, as there is no kernel for
            them: how often, how long a call took in the runs so far, and for which line of yours.
        why_not_one: the reason why there is no single program; None where there is one.
    """

    graph: str
    blocks: str
    buffers: str
    code: str
    called: tuple[str, ...]
    why_not_one: str | None


class Compiled:
    """A program: C++ if that can be, else `Staged`, else nothing but the function itself."""

    def __init__(
        self,
        name: str,
        treedef: optree.PyTreeSpec,
        leaves: Sequence[Tensor],
        indices: Sequence[int],
        arithmetic: Arithmetic,
        recorded: Recorded,
        out_treedef: optree.PyTreeSpec,
        donated: Sequence[int],
    ) -> None:
        """Compile what was recorded.

        Args:
            name: of the function, for errors.
            treedef: the structure of its arguments.
            leaves: the tensors that it was recorded for.
            indices: the index of each of them among the leaves of the arguments.
            arithmetic: what it does with the numbers among them.
            recorded: what it does with tensors.
            out_treedef: the structure of its results.
            donated: the inputs whose memory the results may take, by index among ``leaves``.
        """
        self.name = name
        self.treedef = treedef
        self.out_treedef = out_treedef
        self.indices = indices
        self.arithmetic = arithmetic
        self.recorded = recorded
        self.sizes = [leaf.numel() * leaf.element_size() for leaf in leaves]
        self.threads = torch.get_num_threads()
        self.captured = recorded.captured
        self.watched = recorded.watched
        self.watched_states = [*map(_state_of, self.watched)]
        self.captured_sizes = [each.numel() * each.element_size() for each in self.captured]
        self.captured_extents = [*map(_extent, self.captured)]
        outputs = [through_barriers(node) for node in recorded.graph.output_node().args[0]]
        self.specs = [spec_of(node.meta["val"]) for node in outputs]
        input_of = {node: index for index, node in enumerate(recorded.inputs)}
        # An output that is an argument, untouched, is that very tensor.
        tensors = len(leaves) + len(self.captured)
        self.passed = {
            index: input_of[node]
            for index, node in enumerate(outputs)
            if input_of.get(node, tensors) < tensors
        }
        untouched = {source for source in self.passed.values() if source in donated}
        # What is donated and returned untouched is neither written nor lost.
        self.donated = [source for source in donated if source not in untouched]
        self.gone = [_without_memory(leaves[source].device) for source in self.donated]
        self.reused = pair(outputs, recorded.inputs, self.donated, self.passed)
        self.fresh = sorted({*range(len(outputs))} - self.reused.keys() - self.passed.keys())
        self.pools = [(index, Pool.of(self.specs[index])) for index in self.fresh]
        self._apart: list[int] | None = None
        self.run: Callable[[int, int], int] | None = None
        self.error: Callable[[], bytes] | None = None
        self._clear: Callable[[], None] | None = None
        self.calls: Calls | None = None
        self.staged: Staged | None = None
        self.why_not_one: str | None = None
        self.why_not_built: str | None = None
        self._prepare()

    def _prepare(self) -> None:
        """Compile, or load from disk."""
        values = [node.meta.get("val") for node in self.recorded.graph.nodes]
        if any([isinstance(value, Tensor) and not value.is_cpu for value in values]):
            self.why_not_one = "tensors on another device than the CPU"
        else:
            self._make_one()
        if self.run is None and self.why_not_built is None:
            self.staged = Staged(self.recorded.inputs, blocks(self.recorded, for_one=False))

    def _make_one(self) -> None:
        """Make one program of it, or say why that cannot be."""
        # What grad mode and autocast did is in the graph.
        _, *others = settings()
        deterministic = torch.are_deterministic_algorithms_enabled()
        made_for = f"{self.threads} {torch.get_default_dtype()} {deterministic} {others}"
        key = text_key(str(self.recorded), repr((self.reused, self.passed)), made_for)
        try:
            with cache.alone(key):
                library = load(self._text(key), self.threads)
            self.run, self.error = library.funcnet_run, library.funcnet_error
            self._clear = library.funcnet_clear
            weakref.finalize(self, self._clear).atexit = False
        except UnsupportedError as reason:
            self.why_not_one = str(reason)
        except BuildError as reason:
            say_once("jit: functions run eagerly, as no program can be made", reason)
            self.why_not_one = self.why_not_built = str(reason)

    def _text(self, key: str) -> str:
        """The C++ text: from disk, or written, which takes Inductor seconds."""
        graph = self.recorded.graph
        text = cache.find_text(f"{key}.cpp")
        if text is None:
            text = program_text(self._plan()[1])
            called = " ".join([node.name for node in graph.nodes if is_called(node)])
            text = f"// called: {called}\n{text}"
            cache.keep(f"{key}.cpp", text.encode())
        names = text[: text.index("\n")].removeprefix("// called: ").split()
        for node in graph.nodes if names else ():
            if node.name in names:
                mark_called(node)
        sites = call_sites(blocks(self.recorded, for_one=True)) if names else []
        self.calls = Calls(sites) if sites else None
        say_if_often(self.name, sites)
        return text

    def _plan(self) -> tuple[Block, Plan]:
        """The blocks and the memory plan of the program."""
        kernels: dict[Any, Kernels] = {}
        graph, inputs = self.recorded.graph, self.recorded.inputs
        with _of_known_torch():
            mark_missing(graph)
        while True:
            program = blocks(self.recorded, for_one=True)
            try:
                with _of_known_torch():
                    plan = Plan(program, inputs, self.reused, self.passed, self.threads, kernels)
            except NoKernelError as missing:
                mark_alike(graph, missing)
            else:
                return program, plan

    def lowered(self) -> Lowered:
        """What each stage made of the function."""
        graph, called = str(self.recorded), self.calls.described() if self.calls else ()
        if self.run is None:
            program = blocks(self.recorded, for_one=False)
            code = "" if self.staged is None else self.staged.code()
            return Lowered(graph, str(program), "", code, called, self.why_not_one)
        program, plan = self._plan()
        buffers = "\n".join([*self._ends(), str(plan)])
        return Lowered(graph, str(program), buffers, program_text(plan), called, None)

    def _ends(self) -> list[str]:
        """The program's inputs and outputs, and which share memory, as text."""
        becomes = {source: output for output, source in self.reused.items()}
        lines = []
        for index, node in enumerate(self.recorded.inputs):
            what = f"number {node}" if node.name.startswith("number_") else self.where(index)
            if index in becomes:
                what += f"; donated, becomes output {becomes[index]}"
            elif index in self.donated:
                what += "; donated, not used again"
            lines.append(f"in[{index}]: {spec_of(node.meta['val'])}, {what}")
        lines += [f"out[{index}]: {self.specs[index]}, output {index}" for index in self.fresh]
        lines += [f"output {index} is in[{source}]" for index, source in self.passed.items()]
        return lines

    def clear(self) -> None:
        """Free the memory that it keeps from call to call."""
        if self._clear is not None:
            self._clear()
        for _, pool in self.pools:
            if pool is not None:
                pool.clear()

    def inputs_for(self, numbers: Sequence[Any]) -> list[Any] | None:
        """The inputs that come of these numbers; None if this program is not for this call.

        It is not if the function would do something else with the numbers, or if a tensor that it
        closes over has become another one in shape, dtype, strides or device.
        """
        if [*map(_state_of, self.watched)] != self.watched_states:
            return None
        return self.arithmetic.again(numbers)

    def __call__(self, given: list[Tensor], numbers: Sequence[Any], plain: bool) -> Any:
        """The results for these tensors; ``plain`` says that all are contiguous."""
        leaves, captured = given, self.captured
        if self.recorded.storage_read or not plain:
            self._check_layout(given)
            leaves = [*map(_as_in_memory, leaves)]
        if captured:
            captured = self._settled()
        inputs = [
            torch.tensor(number, dtype=NUMBERS[type(number)], device="cpu") for number in numbers
        ]
        tensors = [*leaves, *captured, *inputs]
        outputs: list[Any] = [None] * len(self.specs)
        if self.run is None:
            assert self.staged is not None
            outputs = self.staged(tensors)
        else:
            addresses = [*map(_address, tensors)]
            if 0 in addresses:
                self._check_memory(tensors)
            # A step whose state is donated has it in the same memory each time.
            if self.donated and addresses != self._apart:
                self._check_overlap(addresses)
                self._apart = addresses
            for index, pool in self.pools:
                outputs[index] = self.specs[index].empty() if pool is None else pool.new()
            outs = array("Q", [0 if each is None else each.data_ptr() for each in outputs])
            if self.calls is None:
                ins = array("Q", addresses)
                failed = self.run(ins.buffer_info()[0], outs.buffer_info()[0])
            else:
                ins = array("Q", [*addresses, self.calls.address])
                with calling():
                    failed = self.run(ins.buffer_info()[0], outs.buffer_info()[0])
            if failed:
                self._raise(given)
            for index, source in self.reused.items():
                # As detach gives it, and faster.
                outputs[index] = leaves[source].data
        for index, source in self.passed.items():
            outputs[index] = (
                given[source] if source < len(given) else self.captured[source - len(given)]
            )
        self._give_away(given)
        return self.out_treedef.unflatten(outputs)

    def _give_away(self, given: Sequence[Tensor]) -> None:
        for source, gone in zip(self.donated, self.gone, strict=True):
            tensor = given[source]
            tensor.data = gone
            tensor.__class__ = Donated

    def _settled(self) -> list[Tensor]:
        """The captured tensors as they are now, contiguous."""
        # Their memory may be gone although their shapes are what they were.
        for tensor, extent in zip(self.captured, self.captured_extents, strict=True):
            start = tensor.storage_offset() * tensor.element_size()
            if extent and tensor.untyped_storage().nbytes() < start + extent:
                raise RuntimeError(
                    f"{self.name}: the memory of a tensor that the function closes over was taken "
                    "away"
                )
        self._check_layout(self.captured, len(self.indices))
        return [*map(_as_in_memory, self.captured)]

    def _check_layout(self, tensors: Sequence[Tensor], first: int = 0) -> None:
        """Refuse views if the function asks for what a program knows of contiguous tensors alone.

        Args:
            tensors: some of the inputs.
            first: the position of the first of them.
        """
        if not self.recorded.layout_read:
            return
        fits = _has_own_storage if self.recorded.storage_read else is_plain
        for source, tensor in enumerate(tensors, first):
            if not fits(tensor):
                raise TypeError(
                    f"{self.name}: the function asks how tensors lie in memory "
                    f"(Tensor.{self.recorded.layout_read}), and {self.where(source)} is a view of "
                    "other memory: pass a contiguous clone of it"
                )

    def _check_memory(self, tensors: Sequence[Tensor]) -> None:
        for source, tensor in enumerate(tensors):
            if tensor.numel() and not tensor.data_ptr():
                raise RuntimeError(
                    f"{self.name}: the memory of {self.where(source)} was taken away"
                )

    def _raise(self, given: Sequence[Tensor]) -> None:
        assert self.error is not None
        message = _plain(self.error().decode())
        failure = self.calls and self.calls.failure()
        if self.donated:
            # Some of it may hold new values and some old ones.
            message += "; what was donated is lost"
            self._give_away(given)
        if failure:
            # As the operator raises it eagerly.
            raise failure
        raise RuntimeError(f"{self.name}: {message}")

    def _check_overlap(self, addresses: list[int]) -> None:
        """Refuse donated memory that another argument shares: it would change under it."""
        sizes = [*self.sizes, *self.captured_sizes]
        end = 0
        for start, size in sorted(zip(addresses, sizes, strict=False)):
            if size and start < end:
                break
            end = start + size
        else:
            return
        spans = [*zip(addresses, sizes, strict=False)]
        for source in self.donated:
            start, size = spans[source]
            for other, (begin, length) in enumerate(spans):
                if other != source and begin < start + size and start < begin + length:
                    raise ValueError(
                        f"{self.name}: {self.where(source)} is donated and shares memory "
                        f"with {self.where(other)}: pass a clone, or do not donate it"
                    )

    def where(self, source: int) -> str:
        """How errors call an input."""
        return where(self.treedef, self.indices, source)


@contextlib.contextmanager
def _of_known_torch() -> Iterator[None]:
    """Make what another PyTorch explains alone an `UnknownTorchError`, and say it once."""
    try:
        with writing(), settings_of_programs():
            yield
    except (UnsupportedError, BuildError, NoCompilerError):
        raise
    except Exception as error:
        say_unknown("functions run in segments, which is slower", error)
        raise UnknownTorchError(f"{type(error).__name__}: {error}") from error


def where(treedef: optree.PyTreeSpec, indices: Sequence[int], source: int) -> str:
    """How errors call an input, given which leaves of (args, kwargs) the inputs are."""
    if source >= len(indices):
        return "a tensor that the function closes over"
    return name_of(treedef, indices[source])


def name_of(treedef: optree.PyTreeSpec, index: int) -> str:
    """How errors call a leaf of (args, kwargs)."""
    _, argument, *inside = treedef.paths()[index]
    return f"argument {argument!r}" + (f" at {tree.path_string(inside)!r}" if inside else "")


def _state_of(tensor: Tensor) -> Any:
    """What must not change of a tensor that a function closes over, but for its values."""
    seen_through = tensor.is_conj(), tensor.is_neg()
    return input_spec(tensor), tensor.stride(), seen_through, type(tensor)


def _as_in_memory(tensor: Tensor) -> Tensor:
    """A tensor as programs read it: contiguous, and no conjugated or negated view."""
    return tensor.contiguous().resolve_conj().resolve_neg()


def _extent(tensor: Tensor) -> int:
    """The bytes from the first to the last element of a tensor, both included."""
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum([(size - 1) * step for size, step in steps])) * tensor.element_size()


def _has_own_storage(tensor: Tensor) -> bool:
    """Whether a tensor is plain, and all of its storage."""
    own = tensor.numel() * tensor.element_size()
    return is_plain(tensor) and tensor.untyped_storage().nbytes() == own


def _plain(message: str) -> str:
    """An error of a kernel without the names in the C++ text."""
    message = re.sub(r"^kernel_\d+, \S*, ", "", message)
    return re.sub(r"0 <= tmp\d+ < (\d+)L", r"expected 0 <= index < \1", message)
