"""Inductor as a writer of kernels: a segment in, C++ functions and the calls of them out.

Inductor fuses the operators of a segment and writes a C++ function for each group. What it says to
do around them becomes `instructions`; `plan` and `program` make the rest. This is the one module
that needs Inductor's private names.
"""

import contextlib
import functools
import gc
import itertools
import re
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from funcnet.compiler.blocks import Segment
from funcnet.compiler.build import compiler
from funcnet.compiler.corrections import CORRECTED, sums_of_int64
from funcnet.compiler.errors import BuildError, NoKernelError, UnsupportedError
from funcnet.compiler.instructions import (
    Allocate,
    Call,
    Free,
    Instruction,
    Kernels,
    Place,
    Rename,
    View,
)
from funcnet.compiler.reinplace import write_in_place
from funcnet.compiler.user_code import Rerecorded, origin_of

aten = torch.ops.aten

_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """One thread at a time records or runs Inductor: the process has one set of its settings.

    Meanwhile Python looks for no garbage, which among so many small objects takes a quarter of the
    time.
    """
    dynamo = sys.modules.get("torch._dynamo.convert_frame")
    with _one_at_a_time, contextlib.nullcontext() if dynamo is None else dynamo.compile_lock:
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """As `compiling`, without Inductor's warnings, at its import too, which tell users nothing."""
    with compiling(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# Products are primitives, if they are not hidden in an operator that decomposes into them.
_KEPT = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)


def decomposed(segment: Segment) -> fx.GraphModule:
    """The segment in the operators that Inductor has lowerings for."""
    from torch._inductor.decomposition import select_decomp_table

    table = {
        operator: rule
        for operator, rule in select_decomp_table().items()
        if getattr(operator, "overloadpacket", operator) not in _KEPT
    }
    table |= CORRECTED
    examples = [node.meta["val"] for node in segment.graph.nodes if node.op == "placeholder"]
    module = fx.GraphModule(torch.nn.Module(), segment.graph)
    with torch.no_grad():
        retraced = make_fx(Rerecorded(module).run, decomposition_table=table)(*examples)
    retraced.graph.eliminate_dead_code()
    return retraced


@contextlib.contextmanager
def settings(threads: int) -> Iterator[None]:
    """Inductor's settings for kernels on this machine's CPU, run by so many threads."""
    import torch._inductor.compile_fx  # what follows needs it loaded first
    from torch._inductor import config

    width = {"AVX512": 512, "AVX2": 256}.get(torch.backends.cpu.get_cpu_capability())
    changes = {
        "cpp.cxx": (None, _program(compiler())),
        "cpp.threads": threads,
        # Starting threads for less than this takes longer than the work.
        "cpp.min_chunk_size": 1 << 15,
        "cpp.fallback_scatter_reduce_sum": False,
        "cpp_wrapper": True,
        "fx_graph_cache": False,
        "comment_origin": False,
        # Every value is contiguous.
        "comprehensive_padding": False,
        "size_asserts": False,
    }
    if width is not None:
        changes["cpp.simdlen"] = width
    known = {name: value for name, value in changes.items() if _has(config, name)}
    with config.patch(known), _vectors_of(width), sums_of_int64():
        yield


@contextlib.contextmanager
def _vectors_of(width: int | None) -> Iterator[None]:
    """Have kernels written for vectors of this many bits, if they are known.

    Inductor would compile programs to find out which instructions the processor has.
    """
    if width is None:
        yield
        return
    from torch._inductor import cpu_vec_isa

    kind: Any = {512: cpu_vec_isa.VecAVX512, 256: cpu_vec_isa.VecAVX2}[width]
    vectors = type(kind.__name__, (kind,), {"__bool__": lambda self: True})()
    with patch.object(cpu_vec_isa, "pick_vec_isa", lambda: vectors):
        yield


def _program(command: Sequence[str]) -> str:
    """The compiler itself in a command such as ``ccache g++ -O1``: Inductor takes one word."""
    words = itertools.takewhile(lambda word: not word.startswith("-"), command)
    return [*words][-1]


@contextlib.contextmanager
def refusals_of_the_compiler() -> Iterator[None]:
    """Make Inductor's errors about the C++ compiler a `BuildError`."""
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        yield
    except (BackendCompilerFailed, CppCompileError, InvalidCxxCompiler) as error:
        raise BuildError(str(error).strip()[-2000:]) from error


def compiled(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
    """A graph compiled by Inductor alone, for any device."""
    from torch._inductor import compile as compile_graph, config

    on_cpu = all([tensor.is_cpu for tensor in inputs])
    changes = {"cpp.cxx": (None, _program(compiler()))} if on_cpu else {}
    with refusals_of_the_compiler(), config.patch(changes):
        return compile_graph(graph, [*inputs])


def _has(config: Any, name: str) -> bool:
    with contextlib.suppress(AttributeError):
        for part in name.split("."):
            config = getattr(config, part)
        return True
    return False


def kernels(
    segment: Segment, threads: int, in_place: Sequence[tuple[int, int]], dying: Sequence[int]
) -> Kernels:
    """Compile a segment.

    Args:
        segment: operators on contiguous CPU tensors.
        threads: how many run a kernel.
        in_place: pairs of an input and an output; the output is written into the input's memory,
            after all that reads it.
        dying: other inputs whose memory may be written when they have been read.
    """
    from torch._inductor.codegen.common import get_device_op_overrides
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    module = decomposed(segment)
    graph: Any = module.graph
    if any(node.op == "get_attr" for node in graph.nodes):
        raise UnsupportedError("a constant tensor in a decomposition")
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    result = next(node for node in graph.nodes if node.op == "output")
    returned = list(result.args[0])
    written = {output for _, output in in_place}
    copied = [
        (placeholders[source], returned[output])
        for source, output in in_place
        if not write_in_place(graph, placeholders[source], returned[output])
    ]
    with graph.inserting_before(result):
        for source, value in copied:
            graph.call_function(aten.copy_.default, (source, value))
    kept = [value for output, value in enumerate(returned) if output not in written]
    result.args = (kept,)
    module.recompile()
    examples: list[Any] = [node.meta["val"] for node in placeholders]
    fake_mode = next((example.fake_mode for example in examples), None) or FakeTensorMode()
    with (
        settings(threads),
        DebugContext(),
        V.set_fake_mode(fake_mode),
        fake_mode,
        torch.no_grad(),
        refusals_of_the_compiler(),
    ):
        lowering = _computes_scalars_once(GraphLowering)(
            module, example_inputs=examples, cpp_wrapper=True, is_backward=True
        )
        # As what a backward pass alone reads.
        lowering.bw_donated_idxs = dying
        with V.set_graph_handler(lowering):
            lowering.run(*examples)
            _check_operations(lowering, segment)
            lowering.device_type = "cpu"
            lowering.device_ops = get_device_op_overrides("cpu")
            lowering.wrapper_code = CppWrapperCpu()
            lowering._update_scheduler()
            lowering.wrapper_code.push_codegened_graph(lowering)
            for buffer in lowering.scheduler.name_to_buf.values():
                # The order is settled: a weak user only waits for the buffer, and does not read it.
                buffer.users = [user for user in buffer.users if not user.is_weak]
            lowering.scheduler.codegen()
            if lowering.constants:
                raise UnsupportedError("a constant tensor")
            sources, instructions = _instructions(lowering)
            outputs = iter([_place(value) for value in lowering.graph_outputs])
    return Kernels(
        sources,
        instructions,
        list(lowering.graph_inputs),
        [None if output in written else next(outputs) for output in range(len(returned))],
    )


@functools.cache
def _computes_scalars_once(base: Any) -> Any:
    """Inductor's lowering, which keeps a 0-d value in memory that larger ones are computed with.

    Inlined, as Inductor would have it, Adam's two powers of the step would be computed again for
    each vector of each leaf.
    """

    class Lowering(base):
        def run_node(self, node: fx.Node) -> Any:
            result = super().run_node(node)
            computed = node.op == "call_function" and _is_scalar(node)
            if computed and not all([_is_scalar(user) for user in node.users]):
                result.realize()
            return result

    return Lowering


def _is_scalar(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 0


def _check_operations(lowering: Any, segment: Segment) -> None:
    """Raise NoKernelError for operators that Inductor would call."""
    from torch._inductor import ir

    outside = [
        each
        for each in lowering.operations
        if isinstance(each, ir.ExternKernel) and not isinstance(each, ir.NopKernel)
    ]
    if outside:
        origins = [origin_of(node) for each in outside for node in each.origins]
        # Views that lead to an operator are among its origins.
        found = {segment.origins[node]: None for node in origins if node in segment.origins}
        raise NoKernelError([*found], f"no kernel for {', '.join([*map(str, found)])}")


@functools.cache
def has_kernel(operator: Any) -> bool:
    """Whether Inductor knows an operator otherwise than as one to call.

    It may still call it for some arguments: that shows when it writes the kernel.
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import lowerings

    if operator in select_decomp_table() or operator in CORRECTED:
        return True
    lower = lowerings.get(operator)
    return lower is not None and not getattr(lower, "_is_fallback_handler", False)


def _instructions(lowering: Any) -> tuple[dict[str, str], list[Instruction]]:
    sources: dict[str, str] = {}
    instructions: list[Instruction] = []
    for line in lowering.wrapper_code.lines:
        match type(line).__name__:
            case "KernelDefinitionLine":
                sources[line.kernel_name] = _caught(_ordered(line.kernel_body))
            case "KernelCallLine":
                args = tuple(str(arg) for arg in line.call_args)
                instructions.append(Call(line.kernel_name, args, tuple(line.arg_types)))
            case "AllocateLine":
                name = line.node.get_name()
                if name not in lowering.removed_buffers:
                    instructions.append(Allocate(name, _bytes(line.node)))
            case "FreeIfNotReusedLine" | "FreeLine":
                name = line.node.get_name()
                if name not in lowering.removed_buffers:
                    instructions.append(Free(name))
            case "ReuseLine":
                old, new = line.node.get_name(), line.reused_as.get_name()
                if new not in lowering.removed_buffers:
                    instructions.append(Rename(old, new))
            case "ReinterpretLine":
                layout = line.layout.view.get_layout()
                offset = int(layout.offset) * layout.dtype.itemsize
                instructions.append(View(line.reused_as.get_name(), line.node.get_name(), offset))
            case "LineContext" | "CommentLine" | "AssertSizeStrideLine" | "NullLine":
                pass
            case "str":
                if not line.startswith("static constexpr int64_t int_array_"):
                    raise UnsupportedError(f"the line {line!r}")
            case name:
                raise UnsupportedError(f"{name} {getattr(line, 'node', '')!s:.200}")
    return sources, instructions


def _ordered(body: str) -> str:
    """A kernel in which one thread runs the loops whose threads would add to the same number.

    In any order they would, and give other bits each time.
    """
    if "atomic_add" not in body:
        return body
    lines = body.splitlines()
    for index, line in enumerate(lines):
        shared = line.strip().startswith("#pragma omp for")
        if shared and "atomic_add" in "\n".join(_nest(lines[index + 1 :])):
            lines[index] = line.split("#")[0] + "#pragma omp single"
    return "\n".join(lines)


def _nest(lines: list[str]) -> list[str]:
    """The loop that begins on the first line, up to the brace that ends it."""
    depth = 0
    for index, line in enumerate(lines):
        depth += line.count("{") - line.count("}")
        if depth == 0 and "}" in line:
            return lines[: index + 1]
    return lines


def _caught(body: str) -> str:
    """A kernel whose errors, such as an index out of range, leave the loops that threads share.

    An exception that went through such a loop would end the process.
    """
    if "TORCH_CHECK" not in body or "#pragma omp" not in body:
        return body
    lines: list[str] = []
    depth = shared = 0
    ends: list[int] = []
    for line in body.splitlines():
        text = line.strip()
        if text.startswith(("#pragma omp for", "#pragma omp single")):
            collapsed = re.search(r"collapse\((\d+)\)", text)
            shared = int(collapsed[1]) if collapsed else 1
        if text == "}" and depth in ends:
            ends.remove(depth)
            lines.append("} catch (const std::exception& error) { failure.keep(error); }")
        if text == "}" and depth == 1:
            lines.append("failure.rethrow();")
        depth += line.count("{") - line.count("}")
        lines.append(line)
        if text == "{" and depth == 1:
            lines.append("funcnet::Failure failure;")
        elif text == "{" and shared:
            shared -= 1
            if not shared:
                lines.append("try {")
                ends.append(depth)
    return "\n".join(lines)


def _bytes(node: Any) -> int:
    layout = node.get_layout()
    extent = 1 + sum(
        (int(size) - 1) * int(step) for size, step in zip(layout.size, layout.stride, strict=True)
    )
    if any(int(size) == 0 for size in layout.size):
        return 0
    return (extent + int(layout.offset)) * layout.dtype.itemsize


def _place(value: Any) -> Place:
    layout = value.get_layout()
    return Place(
        value.get_name(),
        int(layout.offset),
        tuple(int(size) for size in layout.size),
        tuple(int(step) for step in layout.stride),
    )
