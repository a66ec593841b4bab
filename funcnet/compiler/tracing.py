"""What `jit` sees of a function: a graph of operators in which loops are regions between marks.

The function runs once on fake tensors. `scan` and `vmap` run their body once, on tensors that the
operator ``funcnet::begin`` makes, and hand what it gives to ``funcnet::end``: whatever lies between
the two and depends on the first is the body. What does not is computed once, before the loop. The
function may so close over any tensor, at any depth.
"""

import functools
import operator
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from funcnet import tree
from funcnet.compiler.numbers import Arithmetic, numbers_meet_tensors
from funcnet.compiler.signature import Kind, check_tensor

aten = torch.ops.aten

Node = Any
"""A ``torch.fx.Node``, whose arguments are typed too widely to be read without a check each."""

Graph = Any
"""A ``torch.fx.Graph``; see `Node`."""


class Spec(NamedTuple):
    """What is known of a tensor before the program runs."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        """A tensor of this kind, with any values."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


def spec_of(tensor: Tensor) -> Spec:
    """The shape, dtype and device of a tensor."""
    return Spec(tuple(tensor.shape), tensor.dtype, tensor.device)


@dataclass(eq=False)
class Loop:
    """A loop of ``length`` rounds over slices of its operands along their first axis.

    A scan hands ``carried`` tensors from each round to the next, which stand first among its
    operands and results; the rounds of a map know nothing of each other. What a round returns
    beside is stacked.
    """

    kind: str
    length: int
    carried: int
    inner: list[Spec]
    outer: list[Spec] = field(default_factory=list)


_library = torch.library.Library("funcnet", "FRAGMENT")
# The tag keeps make_fx from calling them at once on small constants.
for _schema in (
    "begin(Tensor[] operands, int loop) -> Tensor[]",
    "end(Tensor[] results, int loop) -> Tensor[]",
    "barrier(Tensor[] values) -> Tensor[]",
):
    _library.define(_schema, tags=torch.Tag.nondeterministic_seeded)


@torch.library.register_fake("funcnet::begin", lib=_library)
def _begin(operands: list[Tensor], loop: int) -> list[Tensor]:
    return [spec.empty() for spec in _active.loops[loop].inner]


@torch.library.register_fake("funcnet::end", lib=_library)
def _end(results: list[Tensor], loop: int) -> list[Tensor]:
    return [spec.empty() for spec in _active.loops[loop].outer]


@torch.library.register_fake("funcnet::barrier", lib=_library)
def _barrier(values: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(value, memory_format=torch.contiguous_format) for value in values]


class _Active(threading.local):
    """The loops of the trace that this thread is in; None outside one."""

    loops: Any = None


_active = _Active()


def tracing() -> bool:
    """Whether jit is tracing here, so that loops can be recorded.

    Under torch.vmap or torch.func inside the traced function they cannot: there they unroll.
    """
    if _active.loops is None:
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


def record_loop(
    kind: str,
    length: int,
    carry: Sequence[Tensor],
    xs: Sequence[Tensor],
    body: Callable[[list[Tensor]], list[Tensor]],
) -> list[Tensor]:
    """Record a loop: ``body(carry + slices) -> new carry + what is stacked``; see `Loop`."""
    inner = [spec_of(leaf) for leaf in carry]
    inner += [Spec(tuple(x.shape[1:]), x.dtype, x.device) for x in xs]
    loop = Loop(kind, length, len(carry), inner)
    position = len(_active.loops)
    _active.loops.append(loop)
    results = body(torch.ops.funcnet.begin([*carry, *xs], position))
    for place, result in enumerate(results):
        spec = spec_of(result)
        if place >= len(carry):
            spec = spec._replace(shape=(length, *spec.shape))
        loop.outer.append(spec)
    return torch.ops.funcnet.end(results, position)


def barrier(values: list[Tensor]) -> list[Tensor]:
    """The same values, of which the compiler may compute nothing before this point."""
    return torch.ops.funcnet.barrier(values) if tracing() and values else values


class Traced(NamedTuple):
    """A traced function: its graph, whose inputs are the arguments, ``captured`` and numbers.

    ``layout_read`` names what the function asked of how a tensor lies in memory, if it did, and
    ``storage_read`` says whether that was about memory beyond the tensor's own. ``watched`` are
    all tensors from outside that it met, captured ones among them.
    """

    graph: Graph
    loops: list[Loop]
    captured: list[Tensor]
    mode: FakeTensorMode
    layout_read: str | None
    storage_read: bool
    watched: list[Tensor]


@contextmanager
def _recording(loops: list[Loop]) -> Iterator[None]:
    before, _active.loops = _active.loops, loops
    try:
        yield
    finally:
        _active.loops = before


@contextmanager
def _settings_of_caller() -> Iterator[None]:
    """The caller's grad mode and autocast, whose casts become part of the graph.

    Autocast keeps what it has cast, which must not be fake tensors, nor values of today.
    """
    grad, cache = torch.is_grad_enabled(), torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            yield
    finally:
        torch.set_autocast_cache_enabled(cache)


@contextmanager
def settings_of_programs() -> Iterator[None]:
    """Those under which what was recorded is compiled and run: it says its casts and devices."""
    no_autocast = torch._C._DisableAutocast()
    with torch.inference_mode(False), torch.no_grad(), no_autocast, torch.device("cpu"):
        yield


class WritesToArgumentError(ValueError):
    """A function writes in place to its argument of this position."""


def trace(
    function: Callable[..., list[Tensor]],
    kinds: Sequence[Kind],
    arithmetic: Arithmetic,
) -> Traced:
    """Run a function of tensors on fake ones and record what it does.

    Args:
        function: takes and gives tensors.
        kinds: what it is called with.
        arithmetic: the Python numbers that it is called with.

    Raises:
        ValueError: the function writes to an argument or to a tensor that it closes over, or
            draws from torch's own generator.
        TypeError: it closes over tensors that are complex, sparse or of a class of their own.
    """
    loops: list[Loop] = []
    layout = _Layout()
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def guarded(*inputs: Tensor) -> list[Tensor]:
        with _Guard(), numbers_meet_tensors(arithmetic), layout:
            return function(*inputs)

    with mode, _recording(loops):
        with _settings_of_caller():
            recorded = make_fx(guarded, _allow_non_fake_inputs=True)(*[_example(k) for k in kinds])
        # From here on nothing but what was recorded is run.
        with settings_of_programs():
            captured = _lift(recorded, mode)
            _place_numbers(recorded.graph, len(arithmetic.inputs))
            # What is found out below is no longer what was recorded: then it is recorded again.
            stale = _put_in_rows(recorded.graph)
            stale |= any([_writes(node) for node in recorded.graph.nodes])
            stale |= not all([tensor.is_contiguous() for tensor in captured])
            if stale:
                recorded = _again(recorded)
    _drop_unused(recorded.graph)
    watched = [*({id(each): each for each in captured} | layout.met).values()]
    return Traced(recorded.graph, loops, captured, mode, layout.read, layout.of_storage, watched)


def _example(kind: Kind) -> Tensor:
    """A tensor of a kind, without values."""
    example = torch.empty(kind.shape, dtype=kind.dtype, device=kind.device)
    if kind.is_parameter:
        return torch.nn.Parameter(example, requires_grad=kind.requires_grad)
    return example.requires_grad_() if kind.requires_grad else example


class _Layout(TorchFunctionMode):
    """Notes when a function asks how a tensor lies in memory: a program's tensors are contiguous.

    It notes the tensors from outside that the function meets, if only to ask for their shapes, and
    refuses questions for what a tensor keeps beside its values.
    """

    read: str | None = None
    of_storage = False

    def __init__(self) -> None:
        super().__init__()
        self.met: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Torch's own functions ask too, and give the same values whatever the answer.
        asked = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] != "torch"
        real = [each for each in args if _is_real(each) and each.layout is torch.strided]
        self.met.update({id(each): each for each in real})
        # torch.tensor reads the values of tensors in a list, and copies one that is alone.
        listed = func in _FROM_LISTS and args and isinstance(args[0], (list, tuple))
        read = tree.leaves(args[0]) if listed or func in _VALUES else []
        if any([*map(_is_real, read)]):
            raise DataDependentOutputException(func)
        if asked and func in _HIDDEN:
            raise TypeError(
                f"jit: the function reads or sets Tensor.{_HIDDEN[func]}, which is no value of "
                "its arguments: pass what it needs as one"
            )
        if asked and func in _STRIDES and self.read is None:
            self.read = func.__name__
        if asked and func in _STORAGE:
            self.read, self.of_storage = func.__name__, True
        return func(*args, **(kwargs or {}))


_STRIDES = {Tensor.stride, Tensor.is_contiguous, Tensor.is_neg}
_STORAGE = {
    *(Tensor.as_strided, torch.as_strided, torch.as_strided_copy, torch.as_strided_scatter),
    *(Tensor.as_strided_, Tensor.as_strided_scatter, Tensor.storage_offset),
    *(Tensor.untyped_storage, Tensor.storage),
}
_FROM_LISTS = {torch.tensor, torch.as_tensor, torch.asarray}
_VALUES = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
_HIDDEN = {
    cast(Any, Tensor.grad).__get__: "grad",
    cast(Any, Tensor._version).__get__: "_version",
    cast(Any, Tensor._base).__get__: "_base",
    cast(Any, Tensor.grad_fn).__get__: "grad_fn",
    cast(Any, Tensor.is_leaf).__get__: "is_leaf",
    cast(Any, Tensor.data).__set__: "data",
    Tensor.is_inference: "is_inference",
    Tensor.is_shared: "is_shared",
}


class _Guard(TorchDispatchMode):
    """Refuses, before it happens, what a pure function does not do to the world outside it."""

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in operator.tags and operator.namespace != "funcnet":
            raise ValueError(
                f"jit: the function draws from torch's generator ({operator}), whose state is "
                "hidden; draw from a key with funcnet.random"
            )
        if operator._schema.is_mutable and args and _is_real(args[0]):
            raise ValueError(
                f"jit: the function writes in place to a tensor it closes over ({operator}); a "
                "pure function writes to tensors of its own only"
            )
        if torch.Tag.data_dependent_output in operator.tags and any([*map(_is_real, args)]):
            raise DataDependentOutputException(operator)
        _check_as_kernels_do(operator, args)
        return operator(*args, **(kwargs or {}))


def _is_real(operand: Any) -> bool:
    """Whether a tensor comes from outside: its values are there, and may be others next time."""
    return isinstance(operand, Tensor) and not isinstance(operand, FakeTensor)


def _check_as_kernels_do(operator: Any, args: Any) -> None:
    """Raise what PyTorch's kernels raise for arguments that fake tensors let pass."""
    if operator is aten.pow.Tensor_Scalar:
        x, exponent = args
        if isinstance(exponent, int) and exponent < 0 and not x.is_floating_point():
            raise RuntimeError("Integers to negative integer powers are not allowed.")
    if operator in _SUBTRACTIONS and any([_is_bool(each) for each in args[:2]]):
        raise RuntimeError(
            "Subtraction, the `-` operator, with a bool tensor is not supported. If you are trying "
            "to invert a mask, use the `~` or `logical_not()` operator instead."
        )


_SUBTRACTIONS = {
    *(aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Tensor, aten.rsub.Scalar),
    *(aten.sub_.Tensor, aten.sub_.Scalar),
}


def _is_bool(operand: Any) -> bool:
    return isinstance(operand, bool) or getattr(operand, "dtype", None) is torch.bool


def _writes(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _again(recorded: fx.GraphModule) -> fx.GraphModule:
    """The same program, of inputs that lie in rows, in which nothing is written in place."""
    for node in recorded.graph.nodes:
        # functionalize does not know the operators behind &=, |=, ^=, <<= and >>=.
        if isinstance(node.target, torch._ops.OpOverload):
            name = _SPELLED.get(node.target._schema.name)
            if name is not None:
                node.target = getattr(getattr(aten, name), node.target._overloadname)
    recorded.recompile()
    examples = [
        spec_of(node.meta["val"]).empty()
        for node in recorded.graph.nodes
        if node.op == "placeholder"
    ]
    pure = make_fx(torch.func.functionalize(recorded, remove="mutations"))(*examples)
    inputs = [node for node in pure.graph.nodes if node.op == "placeholder"]
    for node in pure.graph.nodes:
        if _writes(node):
            raise WritesToArgumentError(inputs.index(node.args[0]))
    return pure


_SPELLED = {
    "aten::__iand__": "bitwise_and_",
    "aten::__ior__": "bitwise_or_",
    "aten::__ixor__": "bitwise_xor_",
    "aten::__ilshift__": "bitwise_left_shift_",
    "aten::__irshift__": "bitwise_right_shift_",
}


def _put_in_rows(graph: Graph) -> bool:
    """Copy operands of primitives that do not lie in rows; whether there were any."""
    found = False
    for node in list(graph.nodes):
        if mark(node) in (None, "begin", "end", "barrier"):
            continue
        for operand in node.all_input_nodes:
            if not _value(operand).is_contiguous():
                found = True
                with graph.inserting_before(node):
                    options = {"memory_format": torch.contiguous_format}
                    copy = graph.call_function(aten.clone.default, (operand,), options)
                node.replace_input_with(operand, copy)
    return found


def _drop_unused(graph: Graph) -> None:
    """Remove what no output needs; a loop goes as a whole."""
    dead: set[int] = set()
    while True:
        graph.eliminate_dead_code(functools.partial(_stays, dead))
        ended = {node.args[1] for node in graph.nodes if mark(node) == "end"}
        begun = {node.args[1] for node in graph.nodes if mark(node) == "begin"}
        if begun <= ended:
            return
        dead |= begun - ended


def _stays(dead: set[int], node: Node) -> bool:
    """Whether a node that nothing reads is kept: the start of a loop is, until its end is gone."""
    if mark(node) == "begin":
        return node.args[1] not in dead
    return node.op in ("placeholder", "output")


def _lift(recorded: fx.GraphModule, mode: FakeTensorMode) -> list[Tensor]:
    """Make the tensors that the function closed over inputs of its graph."""
    graph: Graph = recorded.graph
    captured: list[Tensor] = []
    inputs: dict[int, Node] = {}
    last = [node for node in graph.nodes if node.op == "placeholder"]
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(recorded, node.target)
        users = list(node.users)
        written_here = users and all(user.target is aten.lift_fresh_copy.default for user in users)
        if written_here and tensor.dim() == 0 and not tensor.is_complex():
            # A number that the function itself wrote: torch.tensor(0.5).
            for user in users:
                _become_constant(graph, user, tensor)
            graph.erase_node(node)
            continue
        check_tensor(tensor, lambda: "a tensor that the function closes over")
        if id(tensor) not in inputs:
            first = next(iter(graph.nodes))
            with graph.inserting_after(last[-1]) if last else graph.inserting_before(first):
                inputs[id(tensor)] = graph.placeholder(f"captured_{len(captured)}")
            # The very fake of which the recorded views are views.
            inputs[id(tensor)].meta["val"] = mode.from_tensor(tensor)
            last.append(inputs[id(tensor)])
            captured.append(tensor)
        node.replace_all_uses_with(inputs[id(tensor)])
        graph.erase_node(node)
    return captured


def _place_numbers(graph: Graph, count: int) -> None:
    """Make the numbers that meet tensors inputs of the graph, the last ones."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1:]
    made = [node for node in graph.nodes if node.target is torch.ops.funcnet.number.default]
    for position in range(count):
        first = next(iter(graph.nodes))
        with graph.inserting_after(last[0]) if last else graph.inserting_before(first):
            last = [graph.placeholder(f"number_{position}")]
        (node,) = [node for node in made if node.args[0] == position]
        last[0].meta["val"] = node.meta["val"]
        node.replace_all_uses_with(last[0])
        graph.erase_node(node)


def _become_constant(graph: Graph, node: Node, tensor: Tensor) -> None:
    with unset_fake_temporarily():
        value = tensor.item()
    with graph.inserting_before(node):
        options = {"dtype": tensor.dtype, "device": tensor.device}
        constant = graph.call_function(aten.full.default, ([], value), options)
    constant.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(constant)
    graph.erase_node(node)


def readable(traced: Traced) -> str:
    """All that a program is made from, as text."""
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    kinds = [f"{node.name}: {spec_of(node.meta['val'])}" for node in inputs]
    loops = [f"loop {place}: {loop}" for place, loop in enumerate(traced.loops)]
    return "\n".join([*kinds, *loops, str(traced.graph)])


@dataclass(eq=False)
class Segment:
    """Operators without a loop among them, as a function of ``inputs`` that gives ``outputs``."""

    inputs: list[Node]
    outputs: list[Node]
    graph: Graph


@dataclass(eq=False)
class Region:
    """A loop: its operands outside, the slices inside, the body, and the results in both."""

    loop: Loop
    operands: list[Node]
    slices: dict[int, Node]
    body: "Block"
    results: dict[int, Node]


@dataclass(eq=False)
class Primitive:
    """An operator of which Inductor makes no kernel, or a slow one, such as a sort."""

    name: str
    operands: list[Node]
    options: dict[str, Any]
    results: dict[int, Node]


Item = Segment | Region | Primitive


@dataclass(eq=False)
class Block:
    """What is done in order, and the values that come of it."""

    items: list[Item] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)


def _value(node: Node) -> Any:
    return node.meta.get("val")


def _storage(value: Any) -> int | None:
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


_MARKS = {
    *("begin", "end", "barrier", "sort", "threefry", "threefry_at"),
    *("convolution", "convolution_backward"),
}


def mark(node: Node) -> str | None:
    """The name of an operator that cuts segments; None for others."""
    if isinstance(node.target, torch._ops.OpOverload):
        namespace, name = node.target._schema.name.split("::")
        if name in _MARKS and namespace in ("funcnet", "aten"):
            return name
    return None


def mark_of(node: Node) -> str | None:
    """The `mark` of the node of which this one is a result."""
    return mark(node.args[0]) if node.target is operator.getitem else None


def base_of(node: Node) -> Node | None:
    """The node of whose memory this one is a view; None for a value of its own."""
    if node.op != "call_function" or mark(node) is not None:
        return None
    source = node.args[0] if node.args else None
    if node.target is operator.getitem:
        assert isinstance(source, fx.Node)
        return source if base_of(source) is not None else None
    if not isinstance(source, fx.Node):
        return None
    storage = _storage(_value(source))
    value = _value(node)
    values = value if isinstance(value, (list, tuple)) else [value]
    if storage is not None and values and all(_storage(each) == storage for each in values):
        return source
    return None


def _is_free(node: Node) -> bool:
    """Whether a node costs nothing where it is used: a view, or a constant."""
    if node.op != "call_function" or mark(node) is not None:
        return False
    if node.target is operator.getitem:
        return base_of(node) is not None
    return not node.all_input_nodes or base_of(node) is not None


def _materialize(graph: Graph) -> None:
    """Give every operand of a mark, and every output, memory in which it lies in rows."""
    for node in list(graph.nodes):
        if node.op != "output" and mark(node) is None:
            continue
        copies: dict[Node, Node] = {}

        def settle(value: Node, node: Node = node, copies: Any = copies) -> Node:
            root = value
            while (base := base_of(root)) is not None:
                root = base
            constant = root.op == "call_function" and not root.all_input_nodes
            dense = _value(root).permute(_order(_value(root))).is_contiguous()
            if dense and _value(value).is_contiguous() and not (constant and mark(root) is None):
                return value
            if value not in copies:
                with graph.inserting_before(node):
                    options = {"memory_format": torch.contiguous_format}
                    copy = graph.call_function(aten.clone.default, (value,), options)
                spec = spec_of(_value(value))
                with _value(value).fake_mode:
                    copy.meta["val"] = spec.empty()
                copies[value] = copy
            return copies[value]

        node.args = fx.node.map_arg(node.args, settle)


def blocks(traced: Traced) -> Block:
    """The program as nested blocks of segments and loops."""
    graph = traced.graph
    _materialize(graph)
    program = Block()
    # Which operators belong to which block, loops among them; segments are made of them below.
    runs: dict[Block, list[Any]] = {program: []}
    home: dict[Node, Block] = {}
    stack: list[tuple[Block, Region | None]] = [(program, None)]
    region_of: dict[Node, Region] = {}
    for node in graph.nodes:
        kind = mark(node)
        if node.op == "placeholder":
            home[node] = program
        elif node.op == "output":
            program.outputs = list(node.args[0])
        elif kind == "begin":
            region = Region(traced.loops[node.args[1]], list(node.args[0]), {}, Block(), {})
            region_of[node] = region
            stack.append((region.body, region))
            runs[region.body] = []
            home[node] = region.body
        elif kind == "end":
            block, closed = stack.pop()
            assert closed is not None
            block.outputs = list(node.args[0])
            region_of[node] = closed
            home[node] = stack[-1][0]
            runs[stack[-1][0]].append(closed)
        elif mark_of(node) in ("begin", "end"):
            region = region_of[node.args[0]]
            side = region.slices if mark_of(node) == "begin" else region.results
            side[node.args[1]] = node
            home[node] = home[node.args[0]]
        else:
            home[node] = _innermost([home[each] for each in node.all_input_nodes], stack)
            if not _is_free(node):
                runs[home[node]].append(node)
    _cut(program, runs)
    return program


def _innermost(homes: list[Block], stack: list[tuple[Block, Any]]) -> Block:
    """The innermost of the blocks that hold the operands; what needs no loop is done before it."""
    order = [block for block, _ in stack]
    if not all([home in order for home in homes]):
        raise ValueError(
            "jit: a value from the body of a scan or vmap is used outside it; was a tensor from "
            "outside written in place?"
        )
    return order[max([order.index(home) for home in homes], default=0)]


def _cut(block: Block, runs: dict[Block, list[Any]]) -> None:
    """Make segments of the operators of a block, between its loops and barriers."""
    pieces: list[list[Node] | Region | Primitive] = []
    run: list[Node] = []
    for entry in runs[block]:
        if isinstance(entry, Region):
            pieces += [run, entry]
            run = []
            _cut(entry.body, runs)
        elif mark(entry) == "barrier":
            pieces.append(run)
            run = []
        elif mark(entry) is not None:
            pieces += [run, _primitive(entry)]
            run = []
        elif mark_of(entry) is None:
            run.append(entry)
    pieces.append(run)
    _move_up(pieces)
    block.items = [
        _segment(piece) if isinstance(piece, list) else piece for piece in pieces if piece
    ]


def _move_up(pieces: list[list[Node] | Region | Primitive]) -> None:
    """Compute what only outputs need as soon as it can be, such as the update of a parameter.

    It takes no more memory then, for outputs have memory of their own, and what it is made of, such
    as a gradient, can go. What the block was given is left alone until others have read it, so that
    it may be overwritten.
    """
    made: dict[Node, int] = {}
    for place, piece in enumerate(pieces):
        for node in piece if isinstance(piece, list) else piece.results.values():
            made[node] = place
    runs = {place: piece for place, piece in enumerate(pieces) if isinstance(piece, list)}
    final = _only_for_outputs({node for run in runs.values() for node in run})
    last_read: dict[Node, int] = {}
    for place, piece in enumerate(pieces):
        if isinstance(piece, list):
            readers = [node for node in piece if node not in final]
            found = {root for node in readers for root in _roots(node)}
        else:
            found = reads(piece)
        last_read.update(dict.fromkeys(found, place))
    for place, run in runs.items():
        for node in [node for node in run if node in final]:
            needs = [made.get(root, last_read.get(root, 0)) for root in _roots(node)]
            earliest = min([each for each in runs if each >= max(needs, default=place)])
            if earliest < place:
                run.remove(node)
                runs[earliest].append(node)
                made[node] = earliest


def _only_for_outputs(nodes: set[Node]) -> set[Node]:
    """The pointwise nodes whose values reach nothing but outputs, and each other."""
    if not nodes:
        return set()
    final: dict[Node, bool] = {}
    for node in reversed(next(iter(nodes)).graph.nodes):
        ends = node.op == "output" or mark(node) == "end"
        tags = getattr(node.target, "tags", ())
        inner = _is_free(node) or (node in nodes and torch.Tag.pointwise in tags)
        final[node] = ends or (inner and all([final[user] for user in node.users]))
    return {node for node in nodes if final[node]}


def _roots(node: Node) -> set[Node]:
    """The values that an operator reads, through views."""
    found: set[Node] = set()
    for operand in node.all_input_nodes:
        root = through_barriers(operand)
        found |= _roots(root) if _is_free(root) else {root}
    return found


def _primitive(node: Node) -> Primitive:
    names = [argument.name for argument in node.target._schema.arguments]
    options = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    operands = [value for value in options.values() if isinstance(value, fx.Node)]
    rest = {name: value for name, value in options.items() if not isinstance(value, fx.Node)}
    single = isinstance(_value(node), Tensor)
    results = {0: node} if single else {user.args[1]: user for user in node.users}
    return Primitive(str(mark(node)), operands, rest, results)


def _segment(run: list[Node]) -> Segment:
    inside = set(run)
    graph: Graph = fx.Graph()
    copies: dict[Node, Node] = {}
    inputs: list[Node] = []
    placeholders: dict[Node, Node] = {}

    def copy(node: Node) -> Node:
        node = through_barriers(node)
        if node not in copies:
            if node in inside or _is_free(node):
                args = fx.node.map_arg((node.args, node.kwargs), copy)
                copies[node] = graph.create_node("call_function", node.target, *args)
            else:
                place = len(inputs)
                inputs.append(node)
                order = _order(_value(node))
                with graph.inserting_before(next(iter(graph.nodes), None)):
                    given = graph.placeholder(f"input_{place}")
                with _value(node).fake_mode:
                    given.meta["val"] = spec_of(_value(node).permute(order)).empty()
                placeholders[given] = node
                back = [order.index(axis) for axis in range(len(order))]
                copies[node] = _permuted(graph, given, back)
        return copies[node]

    for node in run:
        copy(node)
    outputs = [node for node in run if isinstance(_value(node), Tensor) and _leaves(node, inside)]
    results = []
    for node in outputs:
        result = _permuted(graph, copies[node], _order(_value(node)))
        if not _value(node).is_contiguous():
            options = {"memory_format": torch.contiguous_format}
            result = graph.call_function(aten.clone.default, (result,), options)
        results.append(result)
    graph.output(results)
    # Placeholders were put in front one by one: read their order off the graph.
    inputs = [placeholders[node] for node in graph.nodes if node.op == "placeholder"]
    return Segment(inputs, outputs, graph)


def _order(value: Tensor) -> list[int]:
    """The axes of a value as they lie in memory, the slowest first.

    Every value is kept as its strides say, so that views of it stay views: between segments it
    goes as the permutation that lies in rows.
    """
    order = sorted(range(value.dim()), key=lambda axis: (-value.stride()[axis], axis))
    if value.is_contiguous() or not value.permute(order).is_contiguous():
        return list(range(value.dim()))
    return order


def _permuted(graph: Graph, node: Node, order: list[int]) -> Node:
    if order == sorted(order):
        return node
    return graph.call_function(aten.permute.default, (node, order))


def through_barriers(node: Node) -> Node:
    """The value that a barrier handed on; any other node itself."""
    while mark_of(node) == "barrier":
        node = node.args[0].args[0][node.args[1]]
    return node


def _leaves(node: Node, inside: set[Node]) -> bool:
    """Whether a value is used outside its run, through views and barriers too."""
    for user in node.users:
        if user in inside:
            continue
        if (
            _is_free(user)
            or mark(user) == "barrier"
            or (user.target is operator.getitem and mark(user.args[0]) == "barrier")
        ):
            if _leaves(user, inside):
                return True
        else:
            return True
    return False


def locate(node: Node) -> tuple[Node, int]:
    """The value in whose memory a node lies, and how many bytes from its start."""
    root, distance = node, 0
    while True:
        start = root
        while (base := base_of(root)) is not None:
            root = base
        distance += _from_storage(_value(start)) - _from_storage(_value(root))
        if mark_of(root) != "barrier":
            return root, distance
        root = root.args[0].args[0][root.args[1]]


def _from_storage(value: Tensor) -> int:
    return int(value.storage_offset()) * value.element_size()


def reads(item: Item) -> set[Node]:
    """The values from outside that a step reads."""
    if isinstance(item, Segment):
        return {locate(node)[0] for node in item.inputs}
    if isinstance(item, Primitive):
        return {locate(node)[0] for node in item.operands}
    return {locate(node)[0] for node in item.operands} | reads_inside(item)


def reads_inside(region: Region) -> set[Node]:
    """The values from outside that the body of a loop reads, its operands' slices aside."""
    made = set(region.slices.values())
    read: set[Node] = {locate(node)[0] for node in region.body.outputs}
    for item in region.body.items:
        read |= reads(item)
        made |= set(item.outputs if isinstance(item, Segment) else item.results.values())
    return read - made
