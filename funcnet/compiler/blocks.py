"""Blocks: a graph as nested lists of steps: segments, primitives, loops and branches.

A segment is a run of operators between two graph breaks; Inductor makes kernels of it. An operator
belongs to the innermost loop of whose slices it needs one; what needs none is done before the loop.
One that was recorded in a branch belongs to it, so that it is not done if the branch is not taken.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, fx

from funcnet.compiler.loops import PARTS, Branches, Control, Loop, WhileLoop
from funcnet.compiler.nodes import (
    Graph,
    Node,
    arguments_of,
    aten,
    break_before,
    contiguous_copy,
    graph_break,
    has_effect,
    is_called,
    is_dense,
    is_free,
    memory_order,
    primitive_of,
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
from funcnet.compiler.steps import (
    Block,
    BranchStep,
    LoopStep,
    PrimitiveStep,
    RepeatStep,
    Segment,
    Step,
    WhileStep,
    blocks_of,
)


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
    operators: dict[Block, list[Any]] = defaultdict(list)
    home: dict[Node, Block] = {}
    stack = [_Open(program, None)]
    parts_of: dict[Step, Iterator[list[_Open]]] = {}
    step_of: dict[Node, Any] = {}
    depths = _conditional_depths(recorded)
    for node in graph.nodes:
        operator = graph_break(node)
        inner = _innermost([home[each] for each in node.all_input_nodes], stack, depths[node])
        if node.op == "placeholder":
            home[node] = program
        elif node.op == "output":
            program.outputs = list(node.args[0])
        elif operator in PARTS:
            if operator == "funcnet::begin":
                step = _step(recorded.loops[node.args[1]], list(node.args[0]))
                parts_of[step] = iter(_parts(step))
            else:
                step = _closed(stack, list(node.args[0]))
            if operator == "funcnet::end":
                operators[stack[-1].block].append(step)
                if isinstance(step, WhileStep):
                    operators[step.entered].append(step.repeated)
            else:
                stack += next(parts_of[step])
            step_of[node] = step
            home[node] = stack[-1].block
        elif (part := break_before(node)) in PARTS:
            _given(step_of[node.args[0]], part)[node.args[1]] = node
            home[node] = home[node.args[0]]
        elif has_effect(node):
            # In each iteration, also of what was there before the loop.
            home[node] = stack[-1][0]
            operators[home[node]].append(node)
        else:
            home[node] = inner
            if not is_free(node):
                operators[home[node]].append(node)
    _cut(program, operators, for_one)
    return program


class _Open(NamedTuple):
    """A block whose operators are being read.

    Attributes:
        block: the block.
        step: the loop or the branches whose part it is.
        is_conditional: whether it may not be run: then all that is recorded in it is done in it,
            also what depends on nothing in it.
    """

    block: Block
    step: Any
    is_conditional: bool = False


def _step(control: Control, operands: list[Node]) -> LoopStep | WhileStep | BranchStep:
    """The step that begins with these operands."""
    match control:
        case Loop():
            return LoopStep(control, operands, {}, Block(), {})
        case WhileLoop():
            repeated = RepeatStep({}, Block())
            return WhileStep(control, operands, {}, Block(), Block(), repeated, {})
        case Branches(count):
            return BranchStep(control, operands[0], [Block() for _ in range(count)], {})


def _parts(step: LoopStep | WhileStep | BranchStep) -> list[list[_Open]]:
    """The blocks that are open in each part of a step."""
    match step:
        case LoopStep():
            return [[_Open(step.body, step)]]
        case WhileStep():
            body = [_Open(step.entered, step, True), _Open(step.repeated.body, step)]
            return [[_Open(step.condition, step)], body]
        case BranchStep():
            return [[_Open(block, step, True)] for block in step.blocks]


def _closed(stack: list[_Open], outputs: list[Node]) -> Any:
    """The step of which a part is now at its end, with these outputs."""
    block, step, _ = stack[-1]
    is_condition = isinstance(step, WhileStep) and block is step.condition
    block.outputs = outputs[:1] if is_condition else outputs
    while stack[-1].step is step:
        stack.pop()
    return step


def _given(step: Any, part: str | None) -> dict[int, Node]:
    """Where a step keeps the results of an operator at which a part begins or ends."""
    if part == "funcnet::end":
        return step.results
    if part == "funcnet::next":
        return step.repeated.slices
    return step.tested if isinstance(step, WhileStep) else step.slices


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


def _conditional_depths(recorded: Recorded) -> dict[Node, int]:
    """How many of the parts that may not be run a node is in.

    That is where it was recorded, unless it is read outside: a view of a value that was written in
    place is made anew where it is first read, which may be in a branch.
    """
    nodes = [*recorded.graph.nodes]
    around: list[list[object]] = [[]]
    places: dict[Node, list[object]] = {}
    for node in nodes:
        places[node] = [part for parts in around for part in parts]
        operator = graph_break(node)
        if operator not in PARTS:
            continue
        first = operator == "funcnet::begin"
        if not first:
            around.pop()
        if operator != "funcnet::end":
            control = recorded.loops[node.args[1]]
            may_not_run = isinstance(control, Branches) or (
                isinstance(control, WhileLoop) and not first
            )
            around.append([object()] if may_not_run else [])
    for node in reversed(nodes):
        for user in () if graph_break(node) in PARTS else node.users:
            both = zip(places[node], places[user], strict=False)
            places[node] = [
                a for a, _ in itertools.takewhile(lambda each: each[0] is each[1], both)
            ]
    return {node: len(parts) for node, parts in places.items()}


def _innermost(homes: list[Block], stack: list[_Open], depth: int) -> Block:
    """The innermost of the blocks that hold the operands, or one inside it that may not be run."""
    order = [block for block, _, _ in stack]
    if not all([home in order for home in homes]):
        raise ValueError(
            "jit: a value from the body of a scan, vmap, while_loop or cond is used outside it; "
            "was a tensor from outside written in place?"
        )
    conditional = [index for index, each in enumerate(stack) if each.is_conditional][:depth]
    return order[max([0, *map(order.index, homes), *conditional[-1:]])]


def _cut(block: Block, operators: dict[Block, list[Any]], for_one: bool) -> None:
    """Make steps of the operators of a block."""
    pieces: list[Piece] = []
    run: Run = []
    barriers = set()
    for entry in operators[block]:
        if not isinstance(entry, fx.Node):
            pieces += [run, entry]
            run = []
            for inner in blocks_of(entry):
                _cut(inner, operators, for_one)
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
