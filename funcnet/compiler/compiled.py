"""A function that was traced and compiled for one signature, and how it is called."""

import functools
import re
from array import array
from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet import tree
from funcnet.compiler import cache
from funcnet.compiler.build import BuildError, fingerprint, load
from funcnet.compiler.host import Program
from funcnet.compiler.inductor import UnsupportedError, writing
from funcnet.compiler.numbers import NUMBERS, Arithmetic
from funcnet.compiler.signature import is_plain, kind_of, settings
from funcnet.compiler.staged import Staged
from funcnet.compiler.tracing import (
    Spec,
    Traced,
    readable,
    settings_of_programs,
    spec_of,
    through_barriers,
)

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
def _gone(device: torch.device) -> Tensor:
    """What is left in a donated tensor for functions that do not ask its class: no memory."""
    tensor = torch.empty(0, device=device)
    torch._C._set_throw_on_mutable_data_ptr(tensor)
    return tensor


class Compiled:
    """A program: C++ if that can be, else `Staged`, else nothing but the function itself."""

    def __init__(
        self,
        name: str,
        treedef: optree.PyTreeSpec,
        leaves: Sequence[Tensor],
        places: Sequence[int],
        arithmetic: Arithmetic,
        traced: Traced,
        out_treedef: optree.PyTreeSpec,
        donated: Sequence[int],
    ) -> None:
        """Compile what was traced.

        Args:
            name: of the function, for errors.
            treedef: the structure of its arguments.
            leaves: the tensors that it was traced for.
            places: the place of each of them among the leaves of the arguments.
            arithmetic: what it does with the numbers among them.
            traced: what it does with tensors.
            out_treedef: the structure of its results.
            donated: the positions of the tensors whose memory the results may take.
        """
        self.name = name
        self.treedef = treedef
        self.out_treedef = out_treedef
        self.places = places
        self.arithmetic = arithmetic
        self.traced = traced
        self.sizes = [leaf.numel() * leaf.element_size() for leaf in leaves]
        self.threads = torch.get_num_threads()
        self.captured = traced.captured
        self.watched = traced.watched
        self.watched_kinds = [*map(_state_of, self.watched)]
        self.captured_sizes = [each.numel() * each.element_size() for each in self.captured]
        self.captured_extents = [*map(_extent, self.captured)]
        inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
        outputs = [through_barriers(node) for node in traced.graph.output_node().args[0]]
        self.specs = [spec_of(node.meta["val"]) for node in outputs]
        position = {node: place for place, node in enumerate(inputs)}
        # An output that is an argument, untouched, is that very tensor.
        self.passed = {
            place: position[node]
            for place, node in enumerate(outputs)
            if position.get(node, len(inputs)) < len(leaves) + len(self.captured)
        }
        untouched = {source for source in self.passed.values() if source in donated}
        # What is donated and returned untouched is neither written nor lost.
        self.donated = [source for source in donated if source not in untouched]
        self.gone = [_gone(leaves[source].device) for source in self.donated]
        self.reused = _pair(
            self.specs, [spec_of(leaf) for leaf in leaves], self.donated, self.passed
        )
        self.fresh = [
            place
            for place in range(len(outputs))
            if place not in self.reused and place not in self.passed
        ]
        self._apart: list[int] | None = None
        self.run: Callable[[int, int], int] | None = None
        self.error: Callable[[], bytes] | None = None
        self.staged: Staged | None = None
        self.why_not_one: str | None = None
        self._prepare()

    def _prepare(self) -> None:
        """Compile, or load from disk."""
        values = [node.meta.get("val") for node in self.traced.graph.nodes]
        if any([isinstance(value, Tensor) and not value.is_cpu for value in values]):
            self.why_not_one = "tensors on another device than the CPU"
            self.staged = Staged(self.traced)
            return
        # What grad mode and autocast did is in the graph.
        _, *others = settings()
        deterministic = torch.are_deterministic_algorithms_enabled()
        made_for = f"{self.threads} {torch.get_default_dtype()} {deterministic} {others}"
        name = fingerprint(readable(self.traced), repr(self.reused), f"{made_for} {self.specs}")
        if refused := cache.find(f"{name}.refused"):
            self.why_not_one = (cache.content(refused) or b"").decode()
        else:
            try:
                library = load(name, self.threads, self.text)
                self.run, self.error = library.funcnet_run, library.funcnet_error
                return
            except UnsupportedError as reason:
                self.why_not_one = str(reason)
                cache.keep(f"{name}.refused", str(reason).encode())
            except BuildError as reason:
                cache.say_once("jit: functions run eagerly, as no program can be made", reason)
                self.why_not_one = str(reason)
                return
        self.staged = Staged(self.traced)

    def text(self) -> str:
        """The C++ program."""
        with writing(), settings_of_programs():
            return Program(self.traced, self.reused, self.passed, self.threads).text

    def inputs_for(self, numbers: Sequence[Any]) -> list[Any] | None:
        """The inputs that come of these numbers; None if this program is not for this call.

        It is not if the function would do something else with the numbers, or if a tensor that it
        closes over is of another kind, or lies elsewhere, than when it was traced.
        """
        if [*map(_state_of, self.watched)] != self.watched_kinds:
            return None
        return self.arithmetic.again(numbers)

    def __call__(self, given: list[Tensor], numbers: Sequence[Any], plain: bool) -> Any:
        """The results for these tensors, which ``plain`` says can be read as they lie."""
        leaves, captured = given, self.captured
        if self.traced.storage_read or not plain:
            self._check_layout(given)
            leaves = [leaf.contiguous().resolve_neg() for leaf in leaves]
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
            # A step whose state is donated finds it in the same memory each time.
            if self.donated and addresses != self._apart:
                self._check_overlap(addresses)
                self._apart = addresses
            for place in self.fresh:
                spec = self.specs[place]
                outputs[place] = torch.empty(spec.shape, dtype=spec.dtype, device=spec.device)
            ins = array("Q", addresses)
            outs = array("Q", [0 if each is None else each.data_ptr() for each in outputs])
            if self.run(ins.buffer_info()[0], outs.buffer_info()[0]):
                self._raise(given)
            for place, source in self.reused.items():
                # As detach gives it, and faster.
                outputs[place] = leaves[source].data
        for place, source in self.passed.items():
            outputs[place] = (
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
        """The captured tensors as they are now, in memory that can be read as it lies."""
        # Their memory may be gone although their shapes are what they were.
        for tensor, extent in zip(self.captured, self.captured_extents, strict=True):
            start = tensor.storage_offset() * tensor.element_size()
            if extent and tensor.untyped_storage().nbytes() < start + extent:
                raise RuntimeError(
                    f"{self.name}: the memory of a tensor that the function closes over was taken "
                    "away"
                )
        self._check_layout(self.captured, len(self.places))
        return [tensor.contiguous().resolve_neg() for tensor in self.captured]

    def _check_layout(self, tensors: Sequence[Tensor], first: int = 0) -> None:
        """Refuse views if the function asks for what a program knows of contiguous tensors alone.

        Args:
            tensors: some of the inputs.
            first: the position of the first of them.
        """
        if not self.traced.layout_read:
            return
        fits = _lies_alone if self.traced.storage_read else is_plain
        for source, tensor in enumerate(tensors, first):
            if not fits(tensor):
                raise TypeError(
                    f"{self.name}: the function asks how tensors lie in memory "
                    f"(Tensor.{self.traced.layout_read}), and {self.where(source)} is a view of "
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
        if self.donated:
            # Some of it may hold new values and some old ones.
            message += "; what was donated is lost"
            self._give_away(given)
        raise RuntimeError(f"{self.name}: {message}")

    def _check_overlap(self, addresses: list[int]) -> None:
        """Refuse donated memory that another argument shares: it would change under it."""
        sizes = [*self.sizes, *self.captured_sizes]
        places = sorted(zip(addresses, sizes, strict=False))
        end = 0
        for start, size in places:
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
        return where(self.treedef, self.places, source)


def where(treedef: optree.PyTreeSpec, places: Sequence[int], source: int) -> str:
    """How errors call the tensor at a position, of those at these places in (args, kwargs)."""
    if source >= len(places):
        return "a tensor that the function closes over"
    return name_of(treedef, places[source])


def name_of(treedef: optree.PyTreeSpec, place: int) -> str:
    """How errors call a leaf of (args, kwargs)."""
    _, argument, *inside = treedef.paths()[place]
    return f"argument {argument!r}" + (f" at {tree.path_string(inside)!r}" if inside else "")


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


def _state_of(tensor: Tensor) -> Any:
    """What must not change of a tensor that a function closes over, but for its values."""
    return kind_of(tensor), tensor.stride(), tensor.is_neg(), type(tensor)


def _extent(tensor: Tensor) -> int:
    """How many bytes lie between the first and the last of a tensor, both included."""
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum([(size - 1) * step for size, step in steps])) * tensor.element_size()


def _lies_alone(tensor: Tensor) -> bool:
    """Whether a tensor's memory is its own, from the first byte to the last."""
    own = tensor.numel() * tensor.element_size()
    return is_plain(tensor) and tensor.untyped_storage().nbytes() == own


def _plain(message: str) -> str:
    """An error of a kernel without its place in the C++ text and the names there."""
    message = re.sub(r"^kernel_\d+, \S*, ", "", message)
    return re.sub(r"0 <= tmp\d+ < (\d+)L", r"expected 0 <= index < \1", message)
