"""Recording: a function runs once on fake tensors, and its operators become a graph.

The graph is pure: writes in place are replaced by operators that give new tensors. Its inputs are
the arguments, then the tensors that the function closes over, then the Python numbers that met
tensors; all of them are contiguous when the program runs. Loops are recorded by `loops`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx

from funcnet.compiler import user_code
from funcnet.compiler.guards import LayoutReads, PurityGuard
from funcnet.compiler.indexing import tensors_as_positions
from funcnet.compiler.layout import channels_last
from funcnet.compiler.loops import CONTROL, EFFECTS, Control, recording
from funcnet.compiler.nodes import (
    Graph,
    Node,
    contiguous_copy,
    graph_break,
    line_of,
    takes_order,
    unread,
    value_of,
)
from funcnet.compiler.numbers import Arithmetic
from funcnet.compiler.promotion import numbers_meet_tensors
from funcnet.compiler.signature import check_tensor
from funcnet.compiler.small_convolutions import make_products
from funcnet.compiler.specs import InputSpec, spec_of
from funcnet.compiler.tracebacks import quiet
from funcnet.compiler.user_code import Line, Rerecorded
from funcnet.compiler.zeros import fold_zeros

aten = torch.ops.aten


class Recorded(NamedTuple):
    """A recorded function.

    Attributes:
        graph: its operators.
        loops: its loops and branches, by the index that their operators name.
        captured: the tensors that it closes over.
        layout_read: what it asked of how a tensor lies in memory, if it did.
        storage_read: whether that was about memory beyond the tensor's own.
        watched: all tensors from outside that it met, captured ones among them.
    """

    graph: Graph
    loops: list[Control]
    captured: list[Tensor]
    layout_read: str | None
    storage_read: bool
    watched: list[Tensor]

    @property
    def inputs(self) -> list[Node]:
        """The nodes of its inputs."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def __str__(self) -> str:
        """All that a program is made from, as text."""
        lines = [f"{node.name}: {spec_of(value_of(node))}" for node in self.inputs]
        lines += [f"loop {index}: {loop.signature()}" for index, loop in enumerate(self.loops)]
        for node in self.graph.nodes:
            if node.op == "call_function":
                lines.append(line_of(node))
            elif node.op == "output":
                lines.append(f"return {node.args[0]}")
        return "\n".join(lines)


class WritesToArgumentError(ValueError):
    """A function writes in place to the argument of this index, in this line of the user's."""


@contextmanager
def _settings_of_caller() -> Iterator[None]:
    """The caller's grad mode and autocast, whose casts become part of the graph.

    Autocast caches what it has cast, which must be neither fake tensors nor values of today.
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
    """The settings to compile and run a graph under, whose casts and devices are in the graph."""
    no_autocast = torch._C._DisableAutocast()
    with torch.inference_mode(False), torch.no_grad(), no_autocast, torch.device("cpu"):
        yield


def record(
    function: Callable[..., list[Tensor]],
    inputs: Sequence[InputSpec],
    arithmetic: Arithmetic,
    name: str = "a function",
) -> Recorded:
    """Run a function of tensors on fake ones and record what it does.

    Args:
        function: takes and gives tensors.
        inputs: what it is called with.
        arithmetic: the Python numbers that it is called with.
        name: of the function, for errors.

    Raises:
        ValueError: the function writes to an argument or to a tensor that it closes over, or
            draws from torch's own generator.
        TypeError: it closes over tensors that are complex, sparse or of a class of their own.
    """
    loops: list[Control] = []
    layout, guard = LayoutReads(), PurityGuard()
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def guarded(*inputs: Tensor) -> list[Tensor]:
        guard.made.note(inputs, None)
        with guard, numbers_meet_tensors(arithmetic), layout, tensors_as_positions():
            return function(*inputs)

    with mode, recording(loops):
        with _settings_of_caller(), quiet():
            examples = [spec.example() for spec in inputs]
            module = make_fx(guarded, _allow_non_fake_inputs=True)(*examples)
        # From here on nothing but what was recorded is run.
        with settings_of_programs():
            captured = _captured_to_inputs(module, mode)
            _numbers_to_inputs(module.graph, len(arithmetic.inputs))
            _make_shapes_constant(module.graph)
            if make_products(module.graph, loops):
                module = _recorded_again(module)
            if not layout.asked and channels_last(module.graph):
                module = _recorded_again(module)
            # Any of these makes the recorded values wrong: the graph is recorded anew.
            changed = _copy_operands_of_primitives(module.graph)
            changed |= any([_writes(node) for node in module.graph.nodes])
            changed |= not all([tensor.is_contiguous() for tensor in captured])
            reads_otherwise = [node.target for node in module.graph.nodes if node.target in _COPIES]
            if changed or reads_otherwise:
                module = _recorded_again(module)
            if reads_otherwise:
                # Now that nothing is written in place, a copy does.
                for node in module.graph.nodes:
                    node.target = (_COPIES | ANY_LAYOUT).get(node.target, node.target)
                module = _recorded_again(module)
            fold_zeros(module.graph)
    _drop_unused(module.graph)
    del examples
    guard.made.let_go(name)
    arithmetic.let_go(name)
    watched = [*({id(each): each for each in captured} | layout.met).values()]
    return Recorded(module.graph, loops, captured, layout.asked, layout.of_storage, watched)


def _captured_to_inputs(module: fx.GraphModule, mode: FakeTensorMode) -> list[Tensor]:
    """Make the tensors that the function closes over inputs of its graph, and return them."""
    graph: Graph = module.graph
    captured: list[Tensor] = []
    inputs: dict[int, Node] = {}
    last = [node for node in graph.nodes if node.op == "placeholder"]
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(module, node.target)
        users = list(node.users)
        written_here = users and all(user.target is aten.lift_fresh_copy.default for user in users)
        if written_here and tensor.dim() == 0 and not tensor.is_complex():
            # A number in the function's own text: torch.tensor(0.5).
            for user in users:
                _replace_by_constant(graph, user, tensor)
            graph.erase_node(node)
            continue
        check_tensor(tensor, lambda: "a tensor that the function closes over")
        if id(tensor) not in inputs:
            first = next(iter(graph.nodes))
            with graph.inserting_after(last[-1]) if last else graph.inserting_before(first):
                inputs[id(tensor)] = graph.placeholder(f"captured_{len(captured)}")
            # The very fake tensor of which the recorded views are views.
            inputs[id(tensor)].meta["val"] = mode.from_tensor(tensor)
            last.append(inputs[id(tensor)])
            captured.append(tensor)
        node.replace_all_uses_with(inputs[id(tensor)])
        graph.erase_node(node)
    return captured


def _replace_by_constant(graph: Graph, node: Node, tensor: Tensor) -> None:
    with unset_fake_temporarily():
        value = tensor.item()
    with graph.inserting_before(node):
        options = {"dtype": tensor.dtype, "device": tensor.device}
        constant = graph.call_function(aten.full.default, ([], value), options)
    constant.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(constant)
    graph.erase_node(node)


def _numbers_to_inputs(graph: Graph, count: int) -> None:
    """Make the numbers that meet tensors inputs of the graph, the last ones."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1:]
    made = [node for node in graph.nodes if node.target is torch.ops.funcnet.number.default]
    for index in range(count):
        first = next(iter(graph.nodes))
        with graph.inserting_after(last[0]) if last else graph.inserting_before(first):
            last = [graph.placeholder(f"number_{index}")]
        (node,) = [node for node in made if node.args[0] == index]
        last[0].meta["val"] = node.meta["val"]
        node.replace_all_uses_with(last[0])
        graph.erase_node(node)


def _make_shapes_constant(graph: Graph) -> None:
    """Give primitives constants for operands of which they read the shape alone."""
    for node in list(graph.nodes):
        for operand in unread(node):
            value = value_of(operand)
            options = {"dtype": value.dtype, "device": value.device}
            with graph.inserting_before(node):
                constant = graph.call_function(aten.empty.memory_format, (value.shape,), options)
            constant.meta["val"] = spec_of(value).empty()
            node.replace_input_with(operand, constant)


def _copy_operands_of_primitives(graph: Graph) -> bool:
    """Copy operands of primitives that are not contiguous; whether there were any."""
    found = False
    for node in list(graph.nodes):
        if graph_break(node) in (None, *CONTROL):
            continue
        for operand in node.all_input_nodes:
            if operand not in unread(node) and not takes_order(node, value_of(operand)):
                found = True
                with graph.inserting_before(node):
                    copy = contiguous_copy(graph, operand)
                node.replace_input_with(operand, copy)
    return found


def _writes(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _recorded_again(module: fx.GraphModule) -> fx.GraphModule:
    """The same program, of contiguous inputs, in which nothing is written in place."""
    for node in module.graph.nodes:
        # functionalize does not know the operators behind &=, |=, ^=, <<= and >>=.
        if isinstance(node.target, torch._ops.OpOverload):
            name = _IN_PLACE_NAMES.get(node.target._schema.name)
            if name is not None:
                node.target = getattr(getattr(aten, name), node.target._overloadname)
    module.recompile()
    examples = [
        spec_of(value_of(node)).empty() for node in module.graph.nodes if node.op == "placeholder"
    ]
    again = Rerecorded(module).run
    pure = make_fx(torch.func.functionalize(again, remove="mutations"))(*examples)
    inputs = [node for node in pure.graph.nodes if node.op == "placeholder"]
    for node in pure.graph.nodes:
        if _writes(node):
            index = inputs.index(node.args[0])
            raise WritesToArgumentError(index, _line_of_write(module.graph, index))
    return pure


def _line_of_write(graph: fx.Graph, index: int) -> Line | None:
    """The line that first writes to an input or to a view of it; None if it is not known."""
    seen = {[node for node in graph.nodes if node.op == "placeholder"][index]}
    for node in graph.nodes:
        first = node.args[0] if node.args else None
        if isinstance(node.target, torch._ops.OpOverload) and isinstance(first, fx.Node):
            if first not in seen:
                continue
            if node.target._schema.is_mutable:
                return user_code.line_of(node)
            if any([each.alias_info for each in node.target._schema.returns]):
                seen.add(node)
    return None


# Views that read the numbers in memory otherwise.
_COPIES = {
    aten._conj.default: aten.conj_physical.default,
    aten._neg_view.default: aten.neg.default,
    aten.view_as_real.default: aten.view_as_real_copy.default,
    aten.view_as_complex.default: aten.view_as_complex_copy.default,
}
ANY_LAYOUT = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
}
"""Operators for operands whose strides may differ from those that were recorded."""

_IN_PLACE_NAMES = {
    "aten::__iand__": "bitwise_and_",
    "aten::__ior__": "bitwise_or_",
    "aten::__ixor__": "bitwise_xor_",
    "aten::__ilshift__": "bitwise_left_shift_",
    "aten::__irshift__": "bitwise_right_shift_",
}


def _drop_unused(graph: Graph) -> None:
    """Remove what no output needs; a loop goes as a whole, unless it prints or may raise."""
    dead: set[int] = set()
    acting = _loops_with_effects(graph)
    while True:
        graph.eliminate_dead_code(functools.partial(_is_kept, dead, acting))
        ends = _loops_at(graph, "funcnet::end")
        begins = _loops_at(graph, "funcnet::begin")
        if begins <= ends:
            return
        dead |= begins - ends


def _loops_at(graph: Graph, operator: str) -> set[int]:
    return {node.args[1] for node in graph.nodes if graph_break(node) == operator}


def _loops_with_effects(graph: Graph) -> set[int]:
    """The loops in which something is printed, or may be raised."""
    found: set[int] = set()
    around: list[int] = []
    for node in graph.nodes:
        match graph_break(node):
            case "funcnet::begin":
                around.append(node.args[1])
            case "funcnet::end":
                around.pop()
            case name if name in EFFECTS:
                found.update(around)
    return found


def _is_kept(dead: set[int], acting: set[int], node: Node) -> bool:
    """Whether a node that nothing reads is kept: the start of a loop is, until its end is gone."""
    operator = graph_break(node)
    if operator in ("funcnet::begin", "funcnet::next"):
        return node.args[1] not in dead
    if operator == "funcnet::end" and node.args[1] in acting:
        return True
    return operator in EFFECTS or node.op in ("placeholder", "output")
