"""Which operators have no kernel, so that a program calls them through PyTorch."""

import functools
from collections.abc import Sequence

import torch

from funcnet.compiler.blocks import segment_of
from funcnet.compiler.errors import BuildError, NoCompilerError, NoKernelError
from funcnet.compiler.inductor import has_kernel, kernels
from funcnet.compiler.instructions import Kernels
from funcnet.compiler.nodes import (
    Graph,
    Node,
    graph_break,
    is_called,
    is_free,
    mark_called,
    signature,
    value_of,
)
from funcnet.compiler.specs import Spec
from funcnet.compiler.steps import Segment


def mark_missing(graph: Graph) -> None:
    """Have a program call the operators of a graph that are known to have no kernel."""
    for node in graph.nodes:
        is_operator = isinstance(node.target, torch._ops.OpOverload) and not graph_break(node)
        if is_operator and not is_free(node) and not has_kernel(node.target):
            mark_called(node)


def mark_alike(graph: Graph, missing: NoKernelError) -> None:
    """Have a program call operators without a kernel, and others that are like them.

    Raises:
        NoKernelError: they are called already, so that the cause is another.
    """
    if all([is_called(node) for node in missing.nodes]):
        raise missing
    targets = {node.target for node in missing.nodes}
    alike = {signature(node) for node in missing.nodes}
    for node in graph.nodes:
        if node.target in targets and signature(node) in alike:
            mark_called(node)


def kernels_or_missing(
    segment: Segment, threads: int, in_place: Sequence[tuple[int, int]], dying: Sequence[int]
) -> Kernels:
    """The kernels of a segment.

    Raises:
        NoKernelError: some of its operators have none.
    """
    try:
        return kernels(segment, threads, in_place, dying)
    except (BuildError, NoCompilerError):
        raise
    except Exception as error:
        if isinstance(error, NoKernelError) and error.nodes:
            raise
        found = [node for node in segment.origins.values() if not _compiles(node)]
        if not found or not _works():
            raise
        raise NoKernelError(found, error) from error


def _compiles(node: Node) -> bool:
    try:
        kernels(segment_of([node]), 1, (), ())
    except Exception:
        return False
    return True


@functools.cache
def _works() -> bool:
    """Whether the simplest of operators has a kernel; else this PyTorch is not known."""
    graph: Graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = Spec((4,), torch.float32, torch.device("cpu")).empty()
    y = graph.call_function(torch.ops.aten.exp.default, (x,))
    y.meta["val"] = value_of(x)
    graph.output([y])
    return _compiles(y)
