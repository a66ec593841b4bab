"""Products with the zeros of forward mode, which are not computed.

``torch.func.jvp`` takes 0 for the tangent of what does not depend on the direction, such as a
weight where the derivative is by the input: a tensor without memory that is known to be zero. Of
most operators PyTorch asks the formula nevertheless, so that each linear layer has a product of x
with zeros, a third of the products of a jvp. Zeros that a function makes itself are left alone:
times infinity they are NaN.
"""

import torch
from torch import Tensor

from funcnet.compiler.nodes import Graph, Node, value_of, view_base
from funcnet.compiler.specs import spec_of

aten = torch.ops.aten

Zeros = dict[Node, None]
"""Nodes that are known to be zero, in the order of the graph."""


def fold_zeros(graph: Graph) -> None:
    """Take out of a graph, in which nothing is written in place, what is known to be zero."""
    zeros: Zeros = {}
    for node in graph.nodes:
        if _is_made_zero(node) or (zeros and _is_zero(node, zeros)):
            zeros[node] = None
    for node in [each for each in graph.nodes if each.target in _SUMS] if zeros else ():
        _leave_out(node, zeros)
    for node in zeros:
        _make_constant(graph, node)


_MADE = {
    aten._efficientzerotensor.default,
    # Memory for a tangent that lies otherwise than its value, into which it is copied.
    aten._new_zeros_with_same_feature_meta.default,
}
_PRODUCTS = {aten.mul.Tensor, aten.mm.default, aten.bmm.default, aten.convolution.default}
_LINEAR = {aten.neg.default, aten.clone.default, aten._to_copy.default}
_SUMS = {aten.add.Tensor, aten.sub.Tensor}


def _is_made_zero(node: Node) -> bool:
    """Whether it is a zero without memory, or what PyTorch expands in the place of one.

    That one names the layout and no pinned memory, as nothing does that a user can call.
    """
    if node.target in _MADE:
        return True
    is_number = node.target is aten.zeros.default and node.args == ([],)
    return is_number and "layout" in node.kwargs and "pin_memory" not in node.kwargs


def _is_zero(node: Node, zeros: Zeros) -> bool:
    """Whether an operator gives zeros because its operands are."""
    if node.op != "call_function" or not isinstance(value_of(node), Tensor):
        return False
    if node.target in _PRODUCTS:
        has_bias = node.target is aten.convolution.default and node.args[2] is not None
        return not has_bias and any([each in zeros for each in node.args[:2]])
    if node.target in _LINEAR:
        return node.args[0] in zeros
    if node.target in _SUMS:
        return all([each in zeros for each in node.args])
    return view_base(node) in zeros


def _make_constant(graph: Graph, node: Node) -> None:
    shape, dtype, device = spec_of(value_of(node))
    options = {"dtype": dtype, "device": device}
    with graph.inserting_before(node):
        constant = graph.call_function(aten.full.default, (list(shape), 0), options)
    constant.meta["val"] = spec_of(value_of(node)).empty()
    node.replace_all_uses_with(constant)
    graph.erase_node(node)


def _leave_out(node: Node, zeros: Zeros) -> None:
    """Give what reads a sum with zeros the other operand, if that is alike in memory."""
    first, second = node.args
    if node in zeros:
        return
    if second in zeros:
        other = first
    elif first in zeros and node.target is aten.add.Tensor and not node.kwargs:
        other = second
    else:
        return
    if isinstance(other, torch.fx.Node):
        value, total = value_of(other), value_of(node)
        if spec_of(value) == spec_of(total) and value.stride() == total.stride():
            node.replace_all_uses_with(other)
