"""What the stages ask of the nodes of a graph: their values, their memory, which are graph breaks.

The value of a node is the fake tensor that it gave when the graph was recorded. Its storage and
strides say which nodes are views of which.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from funcnet import tree
from funcnet.compiler.calls import called
from funcnet.compiler.loops import CONTROL, EFFECTS
from funcnet.compiler.primitives import PRIMITIVES, Primitive
from funcnet.compiler.specs import spec_of

aten = torch.ops.aten

Node = Any
"""A ``torch.fx.Node``, whose arguments are typed too widely to be read without a check each."""

Graph = Any
"""A ``torch.fx.Graph``; see `Node`."""


def value_of(node: Node) -> Any:
    """The fake tensor, or list of them, that a node gives."""
    return node.meta.get("val")


def size_of(node: Node) -> int:
    """The bytes of a node's value."""
    value: Tensor = value_of(node)
    return value.numel() * value.element_size()


def graph_break(node: Node) -> str | None:
    """The name of an operator at which segments end, such as ``aten::sort``; None for others.

    Where only one overload is a primitive, the name has that: ``aten::scatter.reduce``.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = _kernel_name(node) or node.target._schema.name
    return name if name in CONTROL or name in PRIMITIVES or is_called(node) else None


def primitive_of(node: Node) -> Primitive | None:
    """The primitive that a node calls; None for others."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    return called(node) if is_called(node) else PRIMITIVES.get(str(_kernel_name(node)))


def _kernel_name(node: Node) -> str | None:
    """The name of the primitive that computes an operator or an overload of it."""
    name = node.target._schema.name
    names = (name, f"{name}.{node.target._overloadname}")
    return next((each for each in names if each in PRIMITIVES), None)


def signature(node: Node) -> str:
    """The same text for nodes that do the same with tensors of the same kinds."""
    return str(
        fx.node.map_arg((node.target, node.args, node.kwargs), lambda each: spec_of(value_of(each)))
    )


def mark_called(node: Node) -> None:
    """Have a program call this operator through PyTorch."""
    node.meta[_CALLED] = True
    shared = {_storage(value_of(each)) for each in node.all_input_nodes}

    def apart(value: Any) -> Any:
        """Memory without gaps, which it shares with nothing."""
        if value is None or (is_dense(value) and _storage(value) not in shared):
            return value
        with value.fake_mode:
            return spec_of(value).empty()

    values = value_of(node)
    single = isinstance(values, Tensor)
    node.meta["val"] = apart(values) if single else [*map(apart, values or ())]


def is_called(node: Node) -> bool:
    """Whether a program calls an operator through PyTorch: a marked one, or of complex numbers."""
    if _CALLED not in node.meta:
        node.meta[_CALLED] = False
        is_operator = isinstance(node.target, torch._ops.OpOverload)
        if is_operator and (has_effect(node) or _is_of_complex_numbers(node)):
            mark_called(node)
    return bool(node.meta[_CALLED])


_CALLED = "funcnet_called"


def has_effect(node: Node) -> bool:
    """Whether a node prints or raises, so that it is called although it gives nothing."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in EFFECTS


def _is_of_complex_numbers(node: Node) -> bool:
    """Whether an operator reads or gives complex numbers, for which there are no kernels."""
    if node.target._schema.name in CONTROL:
        return False
    made = tree.leaves(value_of(node))
    read = tree.leaves([value_of(each) for each in node.all_input_nodes])
    if not any([isinstance(each, Tensor) and each.is_complex() for each in (*made, *read)]):
        return False
    # A view is an address, whatever its numbers are.
    shared = {_storage(each) for each in read if each.is_complex()}
    return not all([each.is_complex() and _storage(each) in shared for each in made])


def arguments_of(node: Node) -> dict[str, Any]:
    """The arguments that an operator is given, by name."""
    names = [argument.name for argument in node.target._schema.arguments]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def unread(node: Node) -> list[Node]:
    """The operands of which a primitive reads no values, but the shape."""
    primitive = primitive_of(node)
    if primitive is None or not primitive.only_shape:
        return []
    given = arguments_of(node)
    return [given[name] for name in primitive.only_shape]


def takes_order(user: Node, value: Tensor) -> bool:
    """Whether a graph break, or the output, takes a value as it lies in memory, with no copy."""
    primitive = primitive_of(user)
    return value.is_contiguous() if primitive is None else primitive.takes(value)


def break_before(node: Node) -> str | None:
    """The `graph_break` of the node of which this one is a result."""
    return graph_break(node.args[0]) if node.target is operator.getitem else None


def view_base(node: Node) -> Node | None:
    """The node of whose memory this one is a view; None for a value of its own."""
    if node.op != "call_function" or graph_break(node) is not None:
        return None
    source = node.args[0] if node.args else None
    if node.target is operator.getitem:
        assert isinstance(source, fx.Node)
        return source if view_base(source) is not None else None
    if not isinstance(source, fx.Node):
        return None
    storage = _storage(value_of(source))
    value = value_of(node)
    values = value if isinstance(value, (list, tuple)) else [value]
    if storage is not None and values and all(_storage(each) == storage for each in values):
        return source
    return None


def _storage(value: Any) -> int | None:
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def is_free(node: Node) -> bool:
    """Whether a node costs nothing where it is used: a view, or a constant."""
    if node.op != "call_function" or graph_break(node) is not None:
        return False
    if node.target is operator.getitem:
        return view_base(node) is not None
    return not node.all_input_nodes or view_base(node) is not None


def through_barriers(node: Node) -> Node:
    """The value that a barrier handed on; any other node itself."""
    while break_before(node) == "funcnet::barrier":
        node = node.args[0].args[0][node.args[1]]
    return node


def memory_of(node: Node) -> tuple[Node, int]:
    """The value in whose memory a node lies, and how many bytes from its start."""
    root, distance = node, 0
    while True:
        start = root
        while (base := view_base(root)) is not None:
            root = base
        distance += _from_storage(value_of(start)) - _from_storage(value_of(root))
        if break_before(root) != "funcnet::barrier":
            return root, distance
        root = root.args[0].args[0][root.args[1]]


def _from_storage(value: Tensor) -> int:
    return int(value.storage_offset()) * value.element_size()


def memory_order(value: Tensor) -> list[int]:
    """The axes of a value as they lie in memory, the slowest first.

    Every value is kept as its strides say, so that views of it stay views: between segments it
    goes as the permutation that is contiguous.
    """
    order = sorted(range(value.dim()), key=lambda axis: (-value.stride()[axis], axis))
    if value.is_contiguous() or not value.permute(order).is_contiguous():
        return list(range(value.dim()))
    return order


def is_dense(value: Tensor) -> bool:
    """Whether there are no gaps between a tensor's numbers in memory."""
    return value.permute(memory_order(value)).is_contiguous()


def contiguous_copy(graph: Graph, node: Node) -> Node:
    """A new node: a contiguous copy of this one."""
    copy = graph.call_function(
        aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
    )
    value = value_of(node)
    if value is not None:
        with value.fake_mode:
            copy.meta["val"] = spec_of(value).empty()
    return copy


def line_of(node: Node) -> str:
    """A node as text: ``name = operator(arguments): dtype[shape]``."""
    arguments = [*map(repr, node.args)]
    arguments += [f"{name}={value!r}" for name, value in node.kwargs.items()]
    target = node.target
    function = "item" if target is operator.getitem else str(target)
    value = value_of(node)
    values = value if isinstance(value, (list, tuple)) else [value]
    specs = [str(spec_of(each)) for each in values if isinstance(each, Tensor)]
    return f"{node.name} = {function}({', '.join(arguments)})" + (
        f": {', '.join(specs)}" if specs else ""
    )
