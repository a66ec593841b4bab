"""Writing some elements of a value into its own memory, when nothing reads the old value later.

``x.index_put(indices, values)`` gives a new tensor, a copy of x with some elements replaced. Where
the result takes the memory of x, as a new carry takes that of the old one, the copies to and from
are left out: an iteration that writes one row of a table then costs one row.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from funcnet.compiler.nodes import Graph, Node, aten, value_of

_MASKS = (torch.bool, torch.uint8)


def write_in_place(graph: Graph, source: Node, result: Node) -> bool:
    """Make a result in the memory of an input; whether that can be done.

    Args:
        graph: functional, as Inductor takes it.
        source: an input, whose memory is to hold the result when the graph has run.
        result: one of the outputs. It must be read by nothing else.
    """
    writes = _writes_between(source, result)
    order = {node: index for index, node in enumerate(graph.nodes)}
    if not writes or not _is_last_reader(graph, writes, result, order):
        return False
    changing = {source, *writes}
    for write in writes:
        _, indices, values, *_ = write.args
        given = [each for each in indices if each is not None]
        if any([value_of(each).dtype in _MASKS for each in given]):
            return False
        # Inductor reads values before it writes, if they are no view of what is written; not so
        # the indices.
        if _storage(values) in map(_storage, changing) or any(_needs(given, source)):
            return False
    for write in writes:
        with graph.inserting_before(write):
            arguments = (source, *write.args[1:])
            graph.call_function(aten.index_put_.default, arguments, write.kwargs)
        write.replace_all_uses_with(source)
    for write in reversed(writes):
        if not write.users:
            graph.erase_node(write)
    graph.eliminate_dead_code()
    return True


def _writes_between(source: Node, result: Node) -> list[Node]:
    """The chain of ``index_put`` that leads from an input to a result; nothing if there is none."""
    found: list[Node] = []
    node = result
    while node is not source:
        if node.target is aten.index_put.default:
            found.insert(0, node)
        elif not _is_copy(node):
            return []
        node = node.args[0]
    return found


def _is_copy(node: Node) -> bool:
    if node.target is not aten.clone.default:
        return False
    return bool(value_of(node).stride() == value_of(node.args[0]).stride())


def _is_last_reader(graph: Graph, writes: list[Node], result: Node, order: dict[Node, int]) -> bool:
    """Whether each write comes after all that reads what it overwrites."""
    for write in writes:
        for alias in _aliases(write.args[0], writes):
            for user in alias.users:
                copied_on = _is_copy(user) and _leads_to(user, write)
                if user is not write and not copied_on and order[user] > order[write]:
                    return False
    output = graph.output_node()
    return result is writes[-1] and [*output.args[0]].count(result) == 1


def _aliases(node: Node, writes: list[Node]) -> Iterator[Node]:
    """A node, the nodes of which it is a copy, back to a write, and all views of those."""
    found = [node]
    while _is_copy(found[-1]):
        found.append(found[-1].args[0])
    for each in found:
        yield each
        for user in each.users:
            if user not in found and _storage(user) == _storage(each):
                found.append(user)


def _leads_to(copy: Node, write: Node) -> bool:
    node = write.args[0]
    while _is_copy(node):
        if node is copy:
            return True
        node = node.args[0]
    return False


def _storage(node: Node) -> object:
    value = value_of(node)
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else node


def _needs(nodes: list[Node], source: Node) -> Iterator[bool]:
    """Whether nodes are computed of another one."""
    seen: set[Node] = set()
    left = [*nodes]
    while left:
        node = left.pop()
        if node not in seen:
            seen.add(node)
            yield node is source
            left += node.all_input_nodes
