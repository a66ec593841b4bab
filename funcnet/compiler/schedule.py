"""Which operators make a segment: the runs between graph breaks, moved up and taken apart.

What is recorded comes in the order of the user's code, in which the sum that is a bias's gradient
may stand behind products that have nothing to do with it, and all updates at the end.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from funcnet.compiler.nodes import Node, graph_break, is_free, through_barriers, value_of
from funcnet.compiler.steps import BranchStep, LoopStep, PrimitiveStep, RepeatStep, WhileStep, reads

Run = list[Node]
"""Operators without a graph break between them."""

Piece = Run | LoopStep | WhileStep | RepeatStep | BranchStep | PrimitiveStep


def move_up(pieces: list[Piece], barriers: set[int]) -> set[Node]:
    """Compute early what frees memory: reductions, and updates, which only outputs need.

    A reduction goes where its operands are made, and they become one kernel. The update of a
    parameter goes where its gradient is made: it takes no more memory there, for outputs have
    memory of their own, and the gradient can go. What the block was given is left alone until
    others have read it, so that it may be overwritten.

    Args:
        pieces: the steps, and the runs of which segments will be made.
        barriers: the indices of the runs that end at a barrier. No reduction goes past one, which
            would undo what it is for: values that are computed again, late.

    Returns:
        The operators of updates.
    """
    runs = {index: piece for index, piece in enumerate(pieces) if isinstance(piece, list)}
    home = {node: index for index, run in runs.items() for node in run}
    made = home | {
        node: index
        for index, piece in enumerate(pieces)
        if not isinstance(piece, list)
        for node in piece.results.values()
    }
    final = _only_for_outputs(set(home))
    last_read: dict[Node, int] = {}
    first_read: dict[Node, int] = {}
    for index, piece in enumerate(pieces):
        if isinstance(piece, list):
            found = {root for node in piece if node not in final for root in _roots(node)}
        else:
            found = reads(piece)
            for node in found:
                first_read.setdefault(node, index)
        last_read.update(dict.fromkeys(found, index))

    def move(nodes: Run, first: int) -> None:
        for node in nodes:
            runs[home[node]].remove(node)
        index = min([each for each in runs if each >= first])
        runs[index] += nodes
        home.update(dict.fromkeys(nodes, index))
        made.update(dict.fromkeys(nodes, index))

    for node, index in list(home.items()):
        if node not in final and _is_reduction(node):
            fence = max([each + 1 for each in barriers if each < index], default=0)
            nodes = _with_operands(node, runs[index])
            roots = {root for each in nodes for root in _roots(each)}.difference(nodes)
            move(nodes, max([fence, *[made.get(root, 0) for root in roots]]))
    ends = [node for node in home if node in final]
    numbers = _of_numbers(ends)
    groups = _connected([node for node in ends if node not in numbers], outside=False)
    for nodes in [*[[node] for node in numbers], *groups]:
        roots = {root for node in nodes for root in _roots(node)}.difference(nodes)
        needs = [made.get(root, last_read.get(root, 0)) for root in roots]
        current = [home[node] for node in nodes]
        # A loop may give a value as its own that was made before it.
        limit = min([max(current), *[first_read[node] for node in nodes if node in first_read]])
        if (first := max(needs, default=limit)) <= limit:
            move(nodes, first)
    return final


def _only_for_outputs(nodes: set[Node]) -> set[Node]:
    """The pointwise nodes whose values reach nothing but outputs, and each other."""
    if not nodes:
        return set()
    final: dict[Node, bool] = {}
    for node in reversed(next(iter(nodes)).graph.nodes):
        ends = node.op == "output" or graph_break(node) in ("funcnet::next", "funcnet::end")
        inner = is_free(node) or (node in nodes and _is_pointwise(node))
        final[node] = ends or (inner and all([final[user] for user in node.users]))
    return {node for node in nodes if final[node]}


def _with_operands(reduction: Node, run: Run) -> Run:
    """A reduction, behind the pointwise operators of its run that are for it alone."""
    found = [reduction]
    for node in found:
        for operand in node.all_input_nodes:
            is_for_it = all([user in found for user in operand.users])
            if operand not in found and is_for_it and (is_free(operand) or _is_pointwise(operand)):
                found.append(operand)
    return [node for node in run if node in found]


def _is_pointwise(node: Node) -> bool:
    # A copy to another dtype, as of Adam's corrections, has no such tag.
    is_copy = node.target is torch.ops.aten._to_copy.default
    return is_copy or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _is_reduction(node: Node) -> bool:
    value = value_of(node)
    operands = [value_of(operand) for operand in node.all_input_nodes]
    return isinstance(value, Tensor) and all(
        [isinstance(each, Tensor) and each.numel() > value.numel() for each in operands]
    )


def parts(run: Run, updates: set[Node]) -> list[Run]:
    """A run as smaller ones, of operators that need each other's values, or read the same tensor.

    What is computed of numbers alone is a part of its own, before those that read it: all updates
    read Adam's corrections of its averages, and are equal for params of the same shape. The updates
    come last, as they may overwrite what others read.
    """
    numbers = _of_numbers(run)
    found = _connected([node for node in run if node not in numbers], outside=True)
    found.sort(key=updates.issuperset)
    return [*_connected(numbers, outside=True), *found]


def _of_numbers(run: Run) -> dict[Node, None]:
    """The operators on numbers that were there before, or come of such operators, in order."""
    found: dict[Node, None] = {}
    members = set(run)
    for node in run:
        unknown = [root for root in _roots(node) if root in members and root not in found]
        if not unknown and all([_is_number(each) for each in (node, *_roots(node))]):
            found[node] = None
    return found


def _connected(nodes: Iterable[Node], outside: bool) -> list[Run]:
    """The groups of nodes of which one reads another's value.

    Args:
        nodes: operators, in order.
        outside: whether to read the same tensor from elsewhere connects them too.
    """
    members = dict.fromkeys(nodes)
    leader: dict[Node, Node] = {}

    def lead(node: Node) -> Node:
        while (above := leader.setdefault(node, node)) is not node:
            node = above
        return node

    for node in members:
        for root in _roots(node):
            if root in members or (outside and not _is_number(root)):
                leader[lead(root)] = lead(node)
    found: dict[Node, Run] = {}
    for node in members:
        found.setdefault(lead(node), []).append(node)
    return [*found.values()]


def _is_number(node: Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.numel() == 1


def _roots(node: Node) -> set[Node]:
    """The values that an operator reads, through views."""
    return set(_found(node.all_input_nodes))


def _found(operands: Iterable[Node]) -> Iterator[Node]:
    for operand in operands:
        root = through_barriers(operand)
        if is_free(root):
            yield from _found(root.all_input_nodes)
        else:
            yield root
