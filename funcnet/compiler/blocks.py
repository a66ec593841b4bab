"""Blocks: a graph as nested lists of steps, which are segments, loops and primitives.

A segment is a run of operators between two graph breaks; Inductor makes kernels of it. An operator
belongs to the innermost loop of whose slices it needs one; what needs none is done before the loop.
"""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from funcnet.compiler.loops import Loop
from funcnet.compiler.nodes import (
    Graph,
    Node,
    aten,
    break_before,
    contiguous_copy,
    graph_break,
    is_free,
    line_of,
    memory_of,
    memory_order,
    takes_order,
    through_barriers,
    value_of,
    view_base,
)
from funcnet.compiler.primitives import PRIMITIVES, Primitive
from funcnet.compiler.record import Recorded
from funcnet.compiler.specs import spec_of


@dataclass(eq=False)
class Segment:
    """Operators without a graph break, as a function of ``inputs`` that gives ``outputs``."""

    inputs: list[Node]
    outputs: list[Node]
    graph: Graph

    def __str__(self) -> str:
        lines = [line_of(node) for node in self.graph.nodes if node.op == "call_function"]
        names = [node for node in self.graph.nodes if node.op == "placeholder"]
        given = [f"{name}={node}" for name, node in zip(names, self.inputs, strict=True)]
        results = self.graph.output_node().args[0]
        made = [f"{node}={result}" for node, result in zip(self.outputs, results, strict=True)]
        return f"segment ({_listed(given)}) -> ({_listed(made)})\n{_indented(lines)}"


@dataclass(eq=False)
class LoopStep:
    """A loop: its operands, its slices and body, and its results, in the graph around it."""

    loop: Loop
    operands: list[Node]
    slices: dict[int, Node]
    body: "Block"
    results: dict[int, Node]

    def __str__(self) -> str:
        operands = [
            f"{self.slices[index]} {'from' if index < self.loop.carried else 'in'} {operand}"
            for index, operand in enumerate(self.operands)
            if index in self.slices
        ]
        outputs = self.body.outputs
        results = [
            f"{node} {'is the last' if index < self.loop.carried else 'stacks'} {outputs[index]}"
            for index, node in sorted(self.results.items())
        ]
        body = _indented([str(self.body)])
        return f"{self.loop}: {_listed(operands)}\n{body}\n    results: {_listed(results)}"


@dataclass(eq=False)
class PrimitiveStep:
    """A call of a primitive; results that nothing reads are missing."""

    primitive: Primitive
    operands: list[Node]
    options: dict[str, Any]
    results: dict[int, Node]

    def __str__(self) -> str:
        options = [f"{name}={value!r}" for name, value in self.options.items()]
        given = _listed([*map(str, self.operands), *options])
        results = _listed(map(str, self.results.values()))
        return f"primitive {self.primitive.operator} ({given}) -> ({results})"


Step = Segment | LoopStep | PrimitiveStep


@dataclass(eq=False)
class Block:
    """Steps, done in order, and the values that come of them."""

    steps: list[Step] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.steps), f"outputs: {_listed(map(str, self.outputs))}"])


def _listed(parts: Iterable[str]) -> str:
    return ", ".join(parts)


def _indented(lines: Iterable[str]) -> str:
    return textwrap.indent("\n".join(lines), "    ")


def blocks(recorded: Recorded) -> Block:
    """The program as nested blocks."""
    graph = recorded.graph
    _make_contiguous(graph)
    program = Block()
    # The operators of each block, loops among them; segments are made of them below.
    operators: dict[Block, list[Any]] = {program: []}
    home: dict[Node, Block] = {}
    stack: list[tuple[Block, LoopStep | None]] = [(program, None)]
    loop_of: dict[Node, LoopStep] = {}
    for node in graph.nodes:
        operator = graph_break(node)
        if node.op == "placeholder":
            home[node] = program
        elif node.op == "output":
            program.outputs = list(node.args[0])
        elif operator == "funcnet::begin":
            step = LoopStep(recorded.loops[node.args[1]], list(node.args[0]), {}, Block(), {})
            loop_of[node] = step
            stack.append((step.body, step))
            operators[step.body] = []
            home[node] = step.body
        elif operator == "funcnet::end":
            block, closed = stack.pop()
            assert closed is not None
            block.outputs = list(node.args[0])
            loop_of[node] = closed
            home[node] = stack[-1][0]
            operators[stack[-1][0]].append(closed)
        elif break_before(node) in ("funcnet::begin", "funcnet::end"):
            step = loop_of[node.args[0]]
            at_begin = break_before(node) == "funcnet::begin"
            (step.slices if at_begin else step.results)[node.args[1]] = node
            home[node] = home[node.args[0]]
        else:
            home[node] = _innermost([home[each] for each in node.all_input_nodes], stack)
            if not is_free(node):
                operators[home[node]].append(node)
    _cut(program, operators)
    return program


def _make_contiguous(graph: Graph) -> None:
    """Give every operand of a graph break, and every output, contiguous memory."""
    for node in list(graph.nodes):
        if node.op != "output" and graph_break(node) is None:
            continue
        copies: dict[Node, Node] = {}

        def settle(value: Node, node: Node = node, copies: Any = copies) -> Node:
            root = value
            while (base := view_base(root)) is not None:
                root = base
            constant = root.op == "call_function" and not root.all_input_nodes
            dense = value_of(root).permute(memory_order(value_of(root))).is_contiguous()
            if dense and takes_order(node, value_of(value)) and (not constant or graph_break(root)):
                return value
            if value not in copies:
                with graph.inserting_before(node):
                    copies[value] = contiguous_copy(graph, value)
            return copies[value]

        node.args = fx.node.map_arg(node.args, settle)


def _innermost(homes: list[Block], stack: list[tuple[Block, Any]]) -> Block:
    """The innermost of the blocks that hold the operands."""
    order = [block for block, _ in stack]
    if not all([home in order for home in homes]):
        raise ValueError(
            "jit: a value from the body of a scan or vmap is used outside it; was a tensor from "
            "outside written in place?"
        )
    return order[max([order.index(home) for home in homes], default=0)]


Piece = list[Node] | LoopStep | PrimitiveStep
"""A step, or the operators of which a segment is made."""


def _cut(block: Block, operators: dict[Block, list[Any]]) -> None:
    """Make steps of the operators of a block."""
    pieces: list[Piece] = []
    run: list[Node] = []
    for entry in operators[block]:
        if isinstance(entry, LoopStep):
            pieces += [run, entry]
            run = []
            _cut(entry.body, operators)
        elif graph_break(entry) == "funcnet::barrier":
            pieces.append(run)
            run = []
        elif graph_break(entry) is not None:
            pieces += [run, _primitive(entry)]
            run = []
        elif break_before(entry) is None:
            run.append(entry)
    pieces.append(run)
    _move_up(pieces)
    block.steps = [
        _segment(piece) if isinstance(piece, list) else piece for piece in pieces if piece
    ]


def _move_up(pieces: list[Piece]) -> None:
    """Compute what only outputs need as soon as it can be, such as the update of a parameter.

    It takes no more memory then, for outputs have memory of their own, and what it is made of, such
    as a gradient, can go. What the block was given is left alone until others have read it, so that
    it may be overwritten.
    """
    made: dict[Node, int] = {}
    for index, piece in enumerate(pieces):
        for node in piece if isinstance(piece, list) else piece.results.values():
            made[node] = index
    runs = {index: piece for index, piece in enumerate(pieces) if isinstance(piece, list)}
    final = _only_for_outputs({node for run in runs.values() for node in run})
    last_read: dict[Node, int] = {}
    for index, piece in enumerate(pieces):
        if isinstance(piece, list):
            readers = [node for node in piece if node not in final]
            found = {root for node in readers for root in _roots(node)}
        else:
            found = reads(piece)
        last_read.update(dict.fromkeys(found, index))
    for index, run in runs.items():
        for node in [node for node in run if node in final]:
            needs = [made.get(root, last_read.get(root, 0)) for root in _roots(node)]
            earliest = min([each for each in runs if each >= max(needs, default=index)])
            if earliest < index:
                run.remove(node)
                runs[earliest].append(node)
                made[node] = earliest


def _only_for_outputs(nodes: set[Node]) -> set[Node]:
    """The pointwise nodes whose values reach nothing but outputs, and each other."""
    if not nodes:
        return set()
    final: dict[Node, bool] = {}
    for node in reversed(next(iter(nodes)).graph.nodes):
        ends = node.op == "output" or graph_break(node) == "funcnet::end"
        tags = getattr(node.target, "tags", ())
        inner = is_free(node) or (node in nodes and torch.Tag.pointwise in tags)
        final[node] = ends or (inner and all([final[user] for user in node.users]))
    return {node for node in nodes if final[node]}


def _roots(node: Node) -> set[Node]:
    """The values that an operator reads, through views."""
    found: set[Node] = set()
    for operand in node.all_input_nodes:
        root = through_barriers(operand)
        found |= _roots(root) if is_free(root) else {root}
    return found


def _primitive(node: Node) -> PrimitiveStep:
    names = [argument.name for argument in node.target._schema.arguments]
    arguments = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    primitive = PRIMITIVES[str(graph_break(node))]
    for name in primitive.only_shape:
        arguments[name] = tuple(value_of(arguments[name]).shape)
    operands = [value for value in arguments.values() if isinstance(value, fx.Node)]
    options = {name: each for name, each in arguments.items() if not isinstance(each, fx.Node)}
    single = isinstance(value_of(node), Tensor)
    results = {0: node} if single else {user.args[1]: user for user in node.users}
    return PrimitiveStep(primitive, operands, options, results)


def _segment(run: list[Node]) -> Segment:
    inside = set(run)
    graph: Graph = fx.Graph()
    copies: dict[Node, Node] = {}
    inputs: dict[Node, Node] = {}

    def copy(node: Node) -> Node:
        node = through_barriers(node)
        if node in copies:
            return copies[node]
        if node in inside or is_free(node):
            args = fx.node.map_arg((node.args, node.kwargs), copy)
            copies[node] = graph.create_node("call_function", node.target, *args)
            return copies[node]
        value = value_of(node)
        order = memory_order(value)
        with graph.inserting_before(next(iter(graph.nodes), None)):
            given = graph.placeholder(f"input_{len(inputs)}")
        with value.fake_mode:
            given.meta["val"] = spec_of(value.permute(order)).empty()
        inputs[given] = node
        back = [order.index(axis) for axis in range(len(order))]
        copies[node] = _permuted(graph, given, back)
        return copies[node]

    for node in run:
        copy(node)
    outputs = [
        node for node in run if isinstance(value_of(node), Tensor) and _is_read(node, inside)
    ]
    results = []
    for node in outputs:
        result = _permuted(graph, copies[node], memory_order(value_of(node)))
        if not value_of(node).is_contiguous():
            result = contiguous_copy(graph, result)
        results.append(result)
    graph.output(results)
    given = [node for node in graph.nodes if node.op == "placeholder"]
    return Segment([inputs[node] for node in given], outputs, graph)


def _permuted(graph: Graph, node: Node, order: list[int]) -> Node:
    if order == sorted(order):
        return node
    return graph.call_function(aten.permute.default, (node, order))


def _is_read(node: Node, inside: set[Node]) -> bool:
    """Whether a value is used outside its segment, through views and barriers too."""
    for user in node.users:
        if user in inside:
            continue
        handed_on = "funcnet::barrier" in (graph_break(user), break_before(user))
        if not (is_free(user) or handed_on) or _is_read(user, inside):
            return True
    return False


def reads(step: Step) -> set[Node]:
    """The values from outside that a step reads."""
    if isinstance(step, Segment):
        return _memories(step.inputs)
    if isinstance(step, PrimitiveStep):
        return _memories(step.operands)
    return _memories(step.operands) | reads_inside(step)


def reads_inside(step: LoopStep) -> set[Node]:
    """The values from outside that the body of a loop reads, its operands' slices aside."""
    made = set(step.slices.values())
    read = _memories(step.body.outputs)
    for inner in step.body.steps:
        read |= reads(inner)
        made |= set(inner.outputs if isinstance(inner, Segment) else inner.results.values())
    return read - made


def _memories(nodes: Sequence[Node]) -> set[Node]:
    return {memory_of(node)[0] for node in nodes}
