"""Blocks: a graph as nested lists of steps, which are segments, loops and primitives.

A segment is a run of operators between two graph breaks; Inductor makes kernels of it. An operator
belongs to the innermost loop of whose slices it needs one; what needs none is done before the loop.
"""

from typing import Any

from torch import Tensor, fx

from funcnet.compiler.nodes import (
    Graph,
    Node,
    arguments_of,
    aten,
    break_before,
    contiguous_copy,
    graph_break,
    is_called,
    is_dense,
    is_free,
    memory_order,
    primitive_of,
    prints,
    takes_order,
    through_barriers,
    unread,
    value_of,
    view_base,
)
from funcnet.compiler.primitives import Primitive
from funcnet.compiler.record import Recorded
from funcnet.compiler.schedule import Piece, Run, move_up, parts
from funcnet.compiler.specs import spec_of
from funcnet.compiler.steps import Block, LoopStep, PrimitiveStep, Segment


def blocks(recorded: Recorded, for_one: bool) -> Block:
    """The program as nested blocks.

    Args:
        recorded: the program.
        for_one: whether it becomes one C++ program. Then a segment ends at a product of matrices
            too, and holds only operators that have to do with each other: of those that occur many
            times in a program, as layers do, Inductor makes kernels once.
    """
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
        elif prints(node):
            # In each iteration, also of what was there before the loop.
            home[node] = stack[-1][0]
            operators[home[node]].append(node)
        else:
            home[node] = _innermost([home[each] for each in node.all_input_nodes], stack)
            if not is_free(node):
                operators[home[node]].append(node)
    _cut(program, operators, for_one)
    return program


def _make_contiguous(graph: Graph) -> None:
    """Give every operand of a graph break, and every output, contiguous memory."""
    for node in list(graph.nodes):
        if node.op != "output" and graph_break(node) is None:
            continue
        copies: dict[Node, Node] = {value: value for value in unread(node)}

        def settle(value: Node, node: Node = node, copies: Any = copies) -> Node:
            if value in copies:
                return copies[value]
            root = value
            while (base := view_base(root)) is not None:
                root = base
            constant = root.op == "call_function" and not root.all_input_nodes
            dense = is_dense(value_of(root))
            if dense and takes_order(node, value_of(value)) and (not constant or graph_break(root)):
                return value
            with graph.inserting_before(node):
                copies[value] = contiguous_copy(graph, value)
            return copies[value]

        node.args = fx.node.map_arg(node.args, settle)
        node.kwargs = fx.node.map_arg(node.kwargs, settle)


def _innermost(homes: list[Block], stack: list[tuple[Block, Any]]) -> Block:
    """The innermost of the blocks that hold the operands."""
    order = [block for block, _ in stack]
    if not all([home in order for home in homes]):
        raise ValueError(
            "jit: a value from the body of a scan or vmap is used outside it; was a tensor from "
            "outside written in place?"
        )
    return order[max([order.index(home) for home in homes], default=0)]


def _cut(block: Block, operators: dict[Block, list[Any]], for_one: bool) -> None:
    """Make steps of the operators of a block."""
    pieces: list[Piece] = []
    run: Run = []
    barriers = set()
    for entry in operators[block]:
        if isinstance(entry, LoopStep):
            pieces += [run, entry]
            run = []
            _cut(entry.body, operators, for_one)
        elif graph_break(entry) == "funcnet::barrier":
            barriers.add(len(pieces))
            pieces.append(run)
            run = []
        elif (primitive := primitive_of(entry)) is not None and (
            for_one or not primitive.is_inductors
        ):
            pieces += [run, _primitive_step(primitive, entry)]
            run = []
        elif break_before(entry) is None:
            run.append(entry)
    pieces.append(run)
    updates = move_up(pieces, barriers)
    for piece in pieces:
        if isinstance(piece, list):
            runs = parts(piece, updates) if for_one else [piece]
            block.steps += [segment_of(run) for run in runs if run]
        else:
            block.steps.append(piece)


def _primitive_step(primitive: Primitive, node: Node) -> PrimitiveStep:
    single = isinstance(value_of(node), Tensor)
    results = {0: node} if single else {user.args[1]: user for user in node.users}
    if is_called(node):
        return PrimitiveStep(primitive, node.all_input_nodes, {}, results, node)
    arguments = arguments_of(node)
    for name in primitive.only_shape:
        arguments[name] = tuple(value_of(arguments[name]).shape)
    operands = [value for value in arguments.values() if isinstance(value, fx.Node)]
    options = {name: each for name, each in arguments.items() if not isinstance(each, fx.Node)}
    return PrimitiveStep(primitive, operands, options, results, node)


def segment_of(run: list[Node]) -> Segment:
    """A run of operators without a graph break as a segment."""
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
    origins = {copies[node]: node for node in run}
    return Segment([inputs[node] for node in given], outputs, graph, origins)


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
