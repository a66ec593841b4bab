"""The program around the kernels: one C++ function that knows where every buffer lies.

Buffers are offsets into one workspace, loops are loops, products of matrices are inline, and the
arguments are pointers. Nothing is allocated and no tensor is made while it runs.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from funcnet.compiler.inductor import (
    Allocate,
    Call,
    Free,
    Kernels,
    Matrix,
    Product,
    Rename,
    UnsupportedError,
    View,
    kernels,
)
from funcnet.compiler.tracing import (
    Block,
    Node,
    Primitive,
    Region,
    Segment,
    Traced,
    blocks,
    locate,
    reads,
    reads_inside,
)

_ALIGNMENT = 64
_TYPES = {torch.float32: "float", torch.float64: "double"}
_SORTED = _TYPES | {
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.int16: "int16_t",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
    torch.bool: "bool",
}
# From this many multiplications on, blocks for the caches pay; to start threads pays earlier.
_LARGE = 1 << 22
_LARGE_FOR_THREADS = 1 << 20
# A panel of so many rows is put on the stack.
_LONG = 2048


class Arena:
    """Offsets for buffers that live at different times; the first gap that fits is taken."""

    def __init__(self) -> None:
        self.live: list[tuple[int, int]] = []
        self.size = 0

    def allocate(self, size: int) -> int:
        """The offset of a new buffer."""
        size = max(_aligned(size), _ALIGNMENT)
        start = 0
        for place, (begin, end) in enumerate(self.live):
            if begin - start >= size:
                self.live.insert(place, (start, start + size))
                break
            start = end
        else:
            self.live.append((start, start + size))
        self.size = max(self.size, start + size)
        return start

    def free(self, offset: int) -> None:
        """Give a buffer back."""
        self.live = [buffer for buffer in self.live if buffer[0] != offset]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass
class Target:
    """Where an output must end up; while ``owner`` is needed its memory may not be written."""

    place: str
    owner: Node | None = None


@dataclass
class Frame:
    """A block that is being written: its workspace, its depth, and what lies where."""

    base: str
    arena: Arena
    threads: int
    last_use: dict[Node, int]
    owned: dict[Node, int | None]
    targets: dict[Node, Target]
    lines: list[str] = field(default_factory=list)
    had_before: dict[Node, list[Node]] = field(default_factory=dict)

    def free_target(self, node: Node, place: int) -> str | None:
        """Where a value must end up, if step ``place`` may write there already."""
        target = self.targets.get(node)
        if target is None:
            return None
        writable = target.owner is None or self.last_use.get(target.owner, -1) < place
        return target.place if writable else None

    def own(self, node: Node, size: int, place: int) -> str:
        """New memory for a value that step ``place`` makes."""
        offset = self.arena.allocate(size)
        self.owned[node] = offset
        self.last_use.setdefault(node, place)
        return f"({self.base} + {offset})"


class Program:
    """The C++ text of a traced function."""

    def __init__(
        self, traced: Traced, donated: dict[int, int], passed: dict[int, int], threads: int
    ) -> None:
        """Write the program.

        Args:
            traced: the function.
            donated: for outputs, by position, the input whose memory each takes.
            passed: for outputs, by position, the input that each is, for which nothing is done.
            threads: how many threads may run.
        """
        self.sources: dict[str, str] = {}
        self.names: dict[str, str] = {}
        self.place: dict[Node, str] = {}
        self.loops = 0
        inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
        program = blocks(traced)
        self.place.update({node: f"in[{place}]" for place, node in enumerate(inputs)})
        targets = []
        for place in range(len(program.outputs)):
            if place in passed:
                targets.append(Target(f"in[{passed[place]}]"))
            elif place in donated:
                targets.append(Target(f"in[{donated[place]}]", inputs[donated[place]]))
            else:
                targets.append(Target(f"out[{place}]"))
        owned: dict[Node, int | None] = {inputs[source]: None for source in donated.values()}
        frame = self._block(program, "w0", threads, targets, owned)
        self.workspace = frame.arena.size
        self.text = self._text(frame.lines)

    def _text(self, lines: list[str]) -> str:
        includes = ["#include <torch/csrc/inductor/cpp_prefix.h>", '#include "kernels.h"', _PREFIX]
        body = [
            'extern "C" int funcnet_run(char** in, char** out) {',
            f"try {{ Workspace workspace({self.workspace}); char* const w0 = workspace.start;",
        ]
        ending = ["} catch (const std::exception& error) {", "  return fail(error.what());"]
        ending += ['} catch (...) { return fail("unknown"); }', "return 0;", "}"]
        return "\n".join([*includes, *self.sources.values(), *body, *lines, *ending]) + "\n"

    def _block(
        self,
        block: Block,
        base: str,
        threads: int,
        targets: Sequence[Target],
        owned: dict[Node, int | None],
    ) -> Frame:
        last_use: dict[Node, int] = {}
        for place, item in enumerate(block.items):
            for node in reads(item):
                last_use[node] = place
        wanted: dict[Node, Target] = {}
        for node, target in zip(block.outputs, targets, strict=True):
            root, offset = locate(node)
            last_use[root] = len(block.items)
            if offset == 0 and _size(root) == _size(node):
                wanted.setdefault(root, target)
        frame = Frame(base, Arena(), threads, last_use, dict(owned), wanted)
        for place, item in enumerate(block.items):
            match item:
                case Segment():
                    self._segment(frame, item, place)
                case Region():
                    self._region(frame, item, place)
                case Primitive():
                    self._primitive(frame, item, place)
            for node in [node for node in frame.owned if last_use.get(node, -1) <= place]:
                offset_of = frame.owned.pop(node)
                if offset_of is not None:
                    frame.arena.free(offset_of)
        self._deliver(frame, block, targets)
        return frame

    def _deliver(self, frame: Frame, block: Block, targets: Sequence[Target]) -> None:
        """Copy the outputs that do not lie where they must."""
        moves = []
        for node, target in zip(block.outputs, targets, strict=True):
            place = self._pointer(node)
            if place != target.place and _size(node):
                moves.append((place, target, _size(node)))
        overwritten = {target.place for _, target, _ in moves if target.owner is not None}
        # Those that overwrite something go last, and read copies of what is overwritten.
        for place, target, size in [move for move in moves if move[1].owner is None]:
            frame.lines.append(f"std::memcpy({target.place}, {place}, {size});")
        late = []
        for place, target, size in [move for move in moves if move[1].owner is not None]:
            if any(other in place for other in overwritten):
                copy = f"({frame.base} + {frame.arena.allocate(size)})"
                frame.lines.append(f"std::memcpy({copy}, {place}, {size});")
                place = copy
            late.append(f"std::memcpy({target.place}, {place}, {size});")
        frame.lines += late

    def _pointer(self, node: Node) -> str:
        root, offset = locate(node)
        place = self.place[root]
        return f"({place} + {offset})" if offset else place

    def _segment(self, frame: Frame, segment: Segment, place: int) -> None:
        in_place: list[tuple[int, int]] = []
        for position, node in enumerate(segment.outputs):
            target = frame.targets.get(node)
            if target is None or target.owner is None:
                continue
            owner = target.owner
            dies_here = frame.last_use.get(owner, -1) == place and owner in segment.inputs
            if dies_here and owner in frame.owned and _same(owner, node):
                in_place.append((segment.inputs.index(owner), position))
        compiled = kernels(segment, frame.threads, in_place)
        names = self._adopt(compiled)
        where = {
            name: self._pointer(node)
            for name, node in zip(compiled.inputs, segment.inputs, strict=True)
        }
        for source, position in in_place:
            self.place[segment.outputs[position]] = where[compiled.inputs[source]]
        self._aim(frame, segment, compiled, place, where)
        offsets: dict[str, int] = {}
        dying = self._dying(frame, compiled, place, where)
        for position, instruction in enumerate(compiled.instructions):
            match instruction:
                case Allocate(name, size):
                    if name not in where:
                        offsets[name] = frame.arena.allocate(size)
                        where[name] = f"({frame.base} + {offsets[name]})"
                case Free(name):
                    if name in offsets:
                        frame.arena.free(offsets.pop(name))
                case Rename(old, new):
                    where[new] = where[old]
                    if old in offsets:
                        offsets[new] = offsets.pop(old)
                case View(name, buffer, distance):
                    where[name] = f"({where[buffer]} + {distance})"
                case Call(kernel, args, types):
                    cast = [
                        f"({kind})({where[arg]})" for arg, kind in zip(args, types, strict=True)
                    ]
                    frame.lines.append(f"{names[kernel]}({', '.join(cast)});")
                case Product():
                    frame.lines.append(_product(instruction, where, frame.threads))
            for node in dying.get(position, ()):
                offset_of, frame.owned[node] = frame.owned[node], None
                assert offset_of is not None
                frame.arena.free(offset_of)
        owners: dict[str, Node] = {}
        for node, matrix in zip(segment.outputs, compiled.outputs, strict=True):
            if matrix is None:
                continue
            self.place[node] = where[matrix.buffer]
            if matrix.buffer in compiled.inputs:
                self.place[node] = frame.own(node, _size(node), place)
                given = where[matrix.buffer]
                frame.lines.append(f"std::memcpy({self.place[node]}, {given}, {_size(node)});")
            elif matrix.buffer in offsets:
                owners[matrix.buffer] = node
                frame.owned[node] = offsets.pop(matrix.buffer)
            elif matrix.buffer in owners:
                # Two outputs in one buffer: it lives as long as either.
                first = owners[matrix.buffer]
                uses = [frame.last_use.get(each, place) for each in (first, node)]
                frame.last_use[first] = max(uses)
        for left in offsets.values():
            frame.arena.free(left)

    def _dying(
        self, frame: Frame, compiled: Kernels, place: int, where: dict[str, str]
    ) -> dict[int, list[Node]]:
        """The values that nothing reads after an instruction of a segment, by its place."""
        last = _last_touch(compiled)
        dying: dict[int, list[Node]] = {}
        for node, offset in frame.owned.items():
            if offset is not None and frame.last_use.get(node) == place:
                inside = [name for name in compiled.inputs if self.place[node] in where[name]]
                if inside:
                    dying.setdefault(max([last.get(name, -1) for name in inside]), []).append(node)
        return dying

    def _adopt(self, compiled: Kernels) -> dict[str, str]:
        """Add kernels to the program, each text once, and return their names in it."""
        names = {}
        for name, source in compiled.sources.items():
            text = _tidy(source).replace(f" {name}(", " @(")
            if text not in self.names:
                self.names[text] = f"kernel_{len(self.names)}"
                self.sources[text] = text.replace(" @(", f" {self.names[text]}(")
            names[name] = self.names[text]
        return names

    def _aim(
        self,
        frame: Frame,
        segment: Segment,
        compiled: Kernels,
        place: int,
        where: dict[str, str],
    ) -> None:
        """Let the buffers of outputs be the memory in which the outputs must end up."""
        first: dict[str, str] = {}
        for instruction in compiled.instructions:
            if isinstance(instruction, Rename):
                first[instruction.new] = first.get(instruction.old, instruction.old)
        sizes = {
            instruction.name: instruction.size
            for instruction in compiled.instructions
            if isinstance(instruction, Allocate)
        }
        for node, matrix in zip(segment.outputs, compiled.outputs, strict=True):
            if matrix is None:
                continue
            if matrix.offset or not _in_rows(matrix):
                raise UnsupportedError(f"an output with strides {matrix.stride}")
            buffer = first.get(matrix.buffer, matrix.buffer)
            target = frame.free_target(node, place)
            if target is not None and buffer not in where and sizes.get(buffer) == _size(node):
                where[buffer] = target

    def _primitive(self, frame: Frame, item: Primitive, place: int) -> None:
        for node in item.results.values():
            target = frame.free_target(node, place)
            self.place[node] = target or frame.own(node, _size(node), place)
        operands = [(self._pointer(node), node.meta["val"]) for node in item.operands]
        results = {
            position: (self.place[node], node.meta["val"])
            for position, node in item.results.items()
        }
        frame.lines.append(_PRIMITIVES[item.name](operands, results, item.options))

    def _region(self, frame: Frame, region: Region, place: int) -> None:
        self.loops += 1
        index, base = f"i{self.loops}", f"w{self.loops}"
        loop = region.loop
        inside = reads_inside(region)
        slices_owned: dict[Node, int | None] = {}
        targets: list[Target] = []
        taken: set[Node] = set()
        for position, operand in enumerate(region.operands[: loop.carried]):
            slot = self._carry(frame, region, position, operand, place, inside, taken)
            if position in region.slices:
                node = region.slices[position]
                self.place[node] = slot
                slices_owned[node] = None
                targets.append(Target(slot, node))
            else:
                # Nothing reads this carry: its memory is free to be written at any time.
                targets.append(Target(slot))
        for position, operand in enumerate(region.operands):
            if position >= loop.carried and position in region.slices:
                node = region.slices[position]
                self.place[node] = f"({self._pointer(operand)} + {index} * {_size(node)})"
        for position in range(loop.carried, len(loop.outer)):
            stacked = region.results.get(position)
            size = prod(loop.outer[position].shape) * loop.outer[position].dtype.itemsize
            step = size // max(loop.length, 1)
            targets.append(
                self._stack(frame, region, stacked, size, step, index, place, inside, slices_owned)
            )
        # oneDNN waits for threads of its own, which it does not get within a parallel loop.
        parallel = loop.kind == "map" and frame.threads != 1 and not _convolves(region)
        threads = 1 if loop.kind == "map" else frame.threads
        body = self._block(region.body, base, threads, targets, slices_owned)
        stride = _aligned(body.arena.size) + (_ALIGNMENT if parallel else 0)
        offset = frame.arena.allocate(stride * (frame.threads if parallel else 1))
        frame.arena.free(offset)
        start = f"{frame.base} + {offset}"
        head = f"for (int64_t {index} = 0; {index} < {loop.length}; ++{index}) {{"
        if parallel:
            frame.lines += [
                "{ funcnet::Failure failure;",
                f"#pragma omp parallel for num_threads({frame.threads})",
                head,
                f"char* const {base} = {start} + omp_get_thread_num() * {stride}; (void){base};",
                "try {",
                *body.lines,
                "} catch (const std::exception& error) { failure.keep(error); } }",
                "failure.rethrow(); }",
            ]
        else:
            frame.lines += [
                f"{{ char* const {base} = {start}; (void){base};",
                head,
                *body.lines,
                "} }",
            ]

    def _carry(
        self,
        frame: Frame,
        region: Region,
        position: int,
        operand: Node,
        place: int,
        inside: set[Node],
        taken: set[Node],
    ) -> str:
        """The memory of a carry, with its first value in it."""
        root, offset = locate(operand)
        result = region.results.get(position)
        target = frame.targets.get(result)
        size = _size(operand)
        dies = (
            root in frame.owned
            and frame.last_use.get(root) == place
            and root not in inside
            and root not in taken
            and offset == 0
            and _size(root) == size
            and sum(locate(other)[0] is root for other in region.operands) == 1
        )
        if dies and (target is None or target.owner in (root, None)):
            # Taken over with its memory; from here on it belongs to the result.
            taken.add(root)
            heir = result if result is not None else object()
            self.place[heir] = self.place[root]
            frame.owned[heir] = frame.owned.pop(root)
            frame.last_use.setdefault(heir, place)
            # None of those that had this memory before may be taken for dead while the heir lives.
            frame.had_before[heir] = [root, *frame.had_before.get(root, [])]
            for each in frame.had_before[heir]:
                frame.last_use[each] = frame.last_use[heir]
            return self.place[heir]
        slot = frame.free_target(result, place)
        if slot is None:
            slot = frame.own(result if result is not None else object(), size, place)
        if result is not None:
            self.place[result] = slot
        if size and slot != self._pointer(operand):
            frame.lines.append(f"std::memcpy({slot}, {self._pointer(operand)}, {size});")
        return slot

    def _stack(
        self,
        frame: Frame,
        region: Region,
        result: Node | None,
        size: int,
        step: int,
        index: str,
        place: int,
        inside: set[Node],
        slices_owned: dict[Node, int | None],
    ) -> Target:
        """Where the rounds of a loop put what is stacked."""
        target = frame.targets.get(result)
        base = frame.free_target(result, place)
        if target is not None and base is None:
            owner = target.owner
            roots = [locate(operand) for operand in region.operands]
            sources = [each for each, (root, _) in enumerate(roots) if root is owner]
            if (
                region.loop.kind == "map"
                and owner in frame.owned
                and frame.last_use[owner] == place
                and owner not in inside
                and len(sources) == 1
                and roots[sources[0]][1] == 0
                and sources[0] in region.slices
                and _size(region.operands[sources[0]]) == _size(owner)
            ):
                # Each member overwrites its own slice, when it has been read.
                node = region.slices[sources[0]]
                slices_owned[node] = None
                self.place[result] = target.place
                return Target(f"({target.place} + {index} * {step})", node)
        if base is None:
            base = frame.own(result if result is not None else object(), size, place)
        if result is not None:
            self.place[result] = base
        return Target(f"({base} + {index} * {step})")


_PREFIX = """
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <omp.h>

static thread_local std::string message;
extern "C" const char* funcnet_error() { return message.c_str(); }
static int fail(const char* what) { message = what; return 1; }

// Memory for intermediate values. Little of it is kept by the thread from call to call.
namespace {
struct Workspace {
  static constexpr size_t KEPT = 1 << 24;
  char* start;
  char* owned = nullptr;
  explicit Workspace(size_t size) {
    static thread_local struct Kept {
      char* start = nullptr;
      ~Kept() { std::free(start); }
    } kept;
    if (size <= KEPT) {
      if (kept.start == nullptr) { kept.start = get(size); }
      start = kept.start;
    } else {
      start = owned = get(size);
    }
  }
  ~Workspace() { std::free(owned); }
  static char* get(size_t size) {
    void* found = std::aligned_alloc(64, (size + 127) / 64 * 64);
    if (found == nullptr) { throw std::runtime_error("out of memory"); }
    return static_cast<char*>(found);
  }
};
}  // namespace
"""


def _tidy(source: str) -> str:
    """A kernel without its includes and, if it divides no integers, without the check for that.

    The check goes through one global variable, for which threads would compete.
    """
    source = re.sub(r"^#include.*$", "", source, flags=re.MULTILINE)
    if not re.search(r"integer_div_by_zero|_integral|div_floor|mod_", source):
        source = re.sub(r"^.*inductor_cpu_.*integer_div_error.*$", "", source, flags=re.MULTILINE)
    return source.replace('extern "C"', "static").strip() + "\n"


def _last_touch(compiled: Kernels) -> dict[str, int]:
    """The place of the last instruction that touches each input, by any name it goes by."""
    origin = {name: name for name in compiled.inputs}
    last: dict[str, int] = {}
    for place, instruction in enumerate(compiled.instructions):
        names: Sequence[str] = ()
        match instruction:
            case View(name, old, _) | Rename(old, name):
                if old in origin:
                    origin[name] = origin[old]
            case Call(_, args, _):
                names = args
            case Product(_, a, b, bias, out):
                names = [matrix.buffer for matrix in (a, b, bias, out) if matrix is not None]
        last.update({origin[name]: place for name in names if name in origin})
    for matrix in compiled.outputs:
        if matrix is not None and matrix.buffer in origin:
            last[origin[matrix.buffer]] = len(compiled.instructions)
    return last


def _convolves(region: Region) -> bool:
    return any(
        [
            _convolves(item)
            if isinstance(item, Region)
            else isinstance(item, Primitive) and item.name.startswith("convolution")
            for item in region.body.items
        ]
    )


def _size(node: Node) -> int:
    value: Tensor = node.meta["val"]
    return value.numel() * value.element_size()


def _same(a: Node, b: Node) -> bool:
    one, other = a.meta["val"], b.meta["val"]
    return one.shape == other.shape and one.dtype == other.dtype


def _in_rows(matrix: Matrix) -> bool:
    step = 1
    for size, stride in zip(reversed(matrix.shape), reversed(matrix.stride), strict=True):
        if size != 1 and stride != step:
            return False
        step *= max(size, 1)
    return True


Located = tuple[str, Tensor]


def _threefry(operands: list[Located], results: dict[int, Located], options: dict[str, Any]) -> str:
    (key, _), *counters = operands
    counter = counters[0][0] if counters else "0"
    count = counters[0][1].numel() if counters else options["n"]
    out = [results[each][0] if each in results else "0" for each in (0, 1)]
    return (
        f"funcnet::threefry((const int64_t*)({key}), (const int32_t*)({counter}), "
        f"{options.get('start', 0)}, {count}, (int32_t*)({out[0]}), (int32_t*)({out[1]}));"
    )


def _sort(operands: list[Located], results: dict[int, Located], options: dict[str, Any]) -> str:
    x, value = operands[0]
    kind = _SORTED.get(value.dtype)
    if kind is None:
        raise UnsupportedError(f"a sort of {value.dtype}")
    out = [results[each][0] if each in results else "0" for each in (0, 1)]
    shape = tuple(value.shape) or (1,)
    axis = options.get("dim", -1) % len(shape)
    extents = f"{prod(shape[:axis])}, {shape[axis]}, {prod(shape[axis + 1 :])}"
    descending = "true" if options.get("descending", False) else "false"
    return (
        f"funcnet::sort<{kind}>((const {kind}*)({x}), ({kind}*)({out[0]}), "
        f"(int64_t*)({out[1]}), {extents}, {descending});"
    )


def _convolution(
    operands: list[Located], results: dict[int, Located], options: dict[str, Any]
) -> str:
    bias = _borrowed(operands[2]) if len(operands) == 3 else "{}"
    inputs = ", ".join([_borrowed(operands[0]), _borrowed(operands[1]), bias])
    return f"funcnet::convolution({inputs}, {_borrowed(results[0])}, {_window(options)});"


def _convolution_backward(
    operands: list[Located], results: dict[int, Located], options: dict[str, Any]
) -> str:
    inputs = ", ".join([_borrowed(operand) for operand in operands])
    out = ", ".join([_borrowed(results[each]) if each in results else "{}" for each in range(3)])
    return f"funcnet::convolution_backward({inputs}, {out}, {_window(options)});"


def _borrowed(located: Located) -> str:
    place, value = located
    kind = str(value.dtype).removeprefix("torch.")
    if kind not in ("float32", "float64", "bfloat16", "float16"):
        raise UnsupportedError(f"a convolution in {kind}")
    return f"{{{place}, {_list(value.shape)}, aoti_torch_dtype_{kind}()}}"


def _window(options: dict[str, Any]) -> str:
    lists = [_list(options[name]) for name in ("stride", "padding", "dilation", "output_padding")]
    transposed = "true" if options["transposed"] else "false"
    return f"{{{', '.join(lists)}, {transposed}, {options['groups']}}}"


def _list(numbers: Sequence[int]) -> str:
    return f"{{{', '.join(map(str, numbers))}}}"


_PRIMITIVES = {
    "threefry": _threefry,
    "threefry_at": _threefry,
    "sort": _sort,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
}


def _product(product: Product, where: dict[str, str], threads: int) -> str:
    kind = _TYPES[product.dtype]
    a, b, out = product.a, product.b, product.out
    *stack, m, k = a.shape
    n = b.shape[-1]
    if out.stride[-1] != 1 and n > 1:
        raise UnsupportedError(f"a product with strides {out.stride}")
    if 0 in (m, n) or 0 in stack:
        return ""
    bias: Matrix | None = None
    bias_strides: tuple[int, ...] = (0, 0)
    batch = stack[0] if stack else 1
    steps = [matrix.stride[0] if stack else 0 for matrix in (a, b, out)]
    if product.bias is not None:
        bias = product.bias
        shape, stride = bias.shape, bias.stride
        if len(shape) > 2 and stack:
            steps.append(stride[0] if shape[0] != 1 else 0)
            shape, stride = shape[1:], stride[1:]
        else:
            steps.append(0)
        padded = (
            *(0,) * (2 - len(shape)),
            *(0 if s == 1 else t for s, t in zip(shape, stride, strict=True)),
        )
        bias_strides = padded[-2:]
    pointers = [
        f"({kind}*)({where[matrix.buffer]}) + {matrix.offset}" if matrix else "nullptr"
        for matrix in (a, b, bias, out)
    ]
    strides = (*a.stride[-2:], *b.stride[-2:])
    large = m * n * k >= (_LARGE if threads == 1 else _LARGE_FOR_THREADS) or k > _LONG
    if large:
        numbers = f"a, {strides[0]}, {strides[1]}, b, {strides[2]}, {strides[3]}"
        call = (
            f"funcnet::Large<{kind}>::product({m}, {n}, {k}, {numbers}, bias, "
            f"{bias_strides[0]}, {bias_strides[1]}, c, {out.stride[-2]}, {threads});"
        )
    else:
        numbers = ", ".join(map(str, (m, n, k, *strides, out.stride[-2])))
        options = f"{'true' if bias else 'false'}, {bias_strides[0]}, {bias_strides[1]}"
        call = f"funcnet::gemm<{kind}, {numbers}, {options}>(a, b, bias, c);"
    names = ("const {0}* a = {1}", "const {0}* b = {1}", "const {0}* bias = {1}", "{0}* c = {1}")
    order = [0, 1, 3 if bias else None, 2]
    setup = []
    for name, pointer, step in zip(names, pointers, order, strict=True):
        shift = f" + s * {steps[step]}" if stack and step is not None and steps[step] else ""
        setup.append(name.format(kind, pointer) + shift + ";")
    inside = " ".join([*setup, "(void)bias;", call])
    if stack:
        return f"for (int64_t s = 0; s < {batch}; ++s) {{ {inside} }}"
    return f"{{ {inside} }}"
