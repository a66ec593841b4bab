"""The order of images in memory: channels last for convolutions and what is between them.

oneDNN computes convolutions of images whose channels lie together, and has to bring others into
that order and back: twice to ten times the time. What the function is given and what it returns
stay contiguous, as is what a loop carries.
"""

import torch

from funcnet.compiler.loops import PARTS
from funcnet.compiler.nodes import Graph, Node, graph_break, unread, value_of

aten = torch.ops.aten

# Which arguments of an operator are images.
_IMAGES = {
    aten.convolution.default: (0,),
    aten.convolution_backward.default: (0, 1),
    aten.max_pool2d_with_indices.default: (0,),
    aten.max_pool2d_with_indices_backward.default: (0, 1, 7),
}
_CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)
_CHANNELS_LAST = (0, 2, 3, 1)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of a result that is contiguous they may be views; of one whose channels are last they copy.
_RESHAPES = (aten.view.default, aten._unsafe_view.default)
# What they give depends on strides.
_OF_STRIDES = {aten.as_strided.default, aten.as_strided_copy.default}


def channels_last(graph: Graph) -> bool:
    """Have convolutions of images take their channels last; whether there are any.

    The values that are recorded are wrong then: the graph is to be recorded anew.
    """
    users = [node for node in graph.nodes if node.target in _IMAGES and _fits(node)]
    targets = {node.target for node in graph.nodes}
    if not any([node.target in _CONVOLUTIONS for node in users]) or targets & _OF_STRIDES:
        return False
    for node in users:
        for value in dict.fromkeys([node.args[index] for index in _IMAGES[node.target]]):
            _order(graph, node, value, _CHANNELS_LAST)
    for node in list(graph.nodes):
        if node.target in _RESHAPES:
            node.target = aten.reshape.default
        elif node.op == "output" or graph_break(node) in PARTS:
            for value in node.all_input_nodes:
                if isinstance(value_of(value), torch.Tensor) and value_of(value).is_contiguous():
                    _order(graph, node, value)
    return True


def _fits(node: Node) -> bool:
    x = value_of(node.args[0])
    return x.dim() == 4 and x.is_cpu and x.dtype in _DTYPES


def _order(graph: Graph, user: Node, value: Node, axes: tuple[int, ...] = ()) -> None:
    """Give a user the value with these axes in order in memory, as it may be already."""
    shape = value_of(value).shape
    if value in unread(user):
        value.kwargs = {**value.kwargs, "memory_format": torch.channels_last}
        return
    with graph.inserting_before(user):
        if not axes:
            ordered = value
        elif shape[1] == 1:
            # Contiguous either way; the strides say which way is meant.
            ordered = graph.call_function(aten.reshape.default, (value, [shape[i] for i in axes]))
        else:
            ordered = graph.call_function(aten.permute.default, (value, axes))
        ordered = graph.call_function(aten.contiguous.default, (ordered,))
        if axes:
            back = [axes.index(axis) for axis in range(len(axes))]
            ordered = graph.call_function(aten.permute.default, (ordered, back))
    user.replace_input_with(value, ordered)
