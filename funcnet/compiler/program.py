"""The C++ text of a program: the kernels, and one function that runs the plan's statements.

It allocates nothing and makes no tensor: buffers are offsets into one workspace, arguments and
results are pointers, loops are loops, and products of small matrices are inline.
"""

import re
from collections.abc import Sequence

from funcnet.compiler.errors import UnsupportedError
from funcnet.compiler.instructions import Matrix
from funcnet.compiler.plan import Plan
from funcnet.compiler.primitives import C_TYPES
from funcnet.compiler.statements import Apply, Copy, Iterate, Launch, Multiply, Statement

# From this many multiplications on, blocks for the caches pay; to start threads pays earlier.
_LARGE = 1 << 22
_LARGE_FOR_THREADS = 1 << 20
# A panel of more rows than this would be too large for a thread's stack.
_LONG = 2048


def program_text(plan: Plan) -> str:
    """The C++ program that a plan describes."""
    return _Writer().program(plan)


class _Writer:
    """Writes statements, and collects the kernels and the headers that they need."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._headers: set[str] = set()

    def program(self, plan: Plan) -> str:
        lines = self._lines(plan.statements)
        includes = ["<torch/csrc/inductor/cpp_prefix.h>", '"headers/program.h"']
        includes += [f'"{header}"' for header in sorted(self._headers)]
        kernels = [text.replace(" @(", f" {name}(") for text, name in self._names.items()]
        return "\n".join(
            [
                *[f"#include {header}" for header in includes],
                *kernels,
                'extern "C" int funcnet_run(char** in, char** out) {',
                f"try {{ Workspace workspace({plan.workspace}); char* const w0 = workspace.start;",
                *lines,
                "} catch (const std::exception& error) {",
                "  return fail(error.what());",
                '} catch (...) { return fail("unknown"); }',
                "return 0;",
                "}\n",
            ]
        )

    def _lines(self, statements: Sequence[Statement]) -> list[str]:
        return [line for statement in statements for line in self._statement(statement)]

    def _statement(self, statement: Statement) -> list[str]:
        match statement:
            case Copy(to, source, size):
                return [f"std::memcpy({to}, {source}, {size});"]
            case Launch(name, source, arguments):
                given = [f"({c_type})({address})" for c_type, address in arguments]
                return [f"{self._kernel(name, source)}({', '.join(given)});"]
            case Multiply():
                return self._multiply(statement)
            case Apply(primitive, operands, results, options):
                self._headers.add(f"primitives/{primitive.header}")
                return [primitive.call(operands, results, options)]
            case Iterate():
                return self._iterate(statement)

    def _kernel(self, name: str, source: str) -> str:
        """The name of a kernel in the program, in which each text occurs once."""
        text = _tidy(source).replace(f" {name}(", " @(")
        return self._names.setdefault(text, f"kernel_{len(self._names)}")

    def _iterate(self, loop: Iterate) -> list[str]:
        counter, base = loop.counter, loop.base
        head = f"for (int64_t {counter} = 0; {counter} < {loop.length}; ++{counter}) {{"
        body = self._lines(loop.body)
        # The address without its parentheses, as the start of a sum.
        start = str(loop.workspace)[1:-1]
        if loop.threads == 1:
            return [f"{{ char* const {base} = {start}; (void){base};", head, *body, "} }"]
        return [
            "{ funcnet::Failure failure;",
            f"#pragma omp parallel for num_threads({loop.threads})",
            head,
            f"char* const {base} = {start} + omp_get_thread_num() * {loop.stride}; (void){base};",
            "try {",
            *body,
            "} catch (const std::exception& error) { failure.keep(error); } }",
            "failure.rethrow(); }",
        ]

    def _multiply(self, statement: Multiply) -> list[str]:
        product, where, threads = statement
        c_type = C_TYPES[product.dtype]
        a, b, bias, out = product.a, product.b, product.bias, product.out
        *stack, m, k = a.shape
        n = b.shape[-1]
        if out.stride[-1] != 1 and n > 1:
            raise UnsupportedError(f"a product with strides {out.stride}")
        if 0 in (m, n) or 0 in stack:
            return []
        bias_step, *bias_strides = _bias_strides(bias, bool(stack))
        strides = (*a.stride[-2:], *b.stride[-2:])
        if m * n * k >= (_LARGE if threads == 1 else _LARGE_FOR_THREADS) or k > _LONG:
            self._headers.add("headers/large.h")
            numbers = f"a, {strides[0]}, {strides[1]}, b, {strides[2]}, {strides[3]}"
            call = (
                f"funcnet::Large<{c_type}>::product({m}, {n}, {k}, {numbers}, bias, "
                f"{bias_strides[0]}, {bias_strides[1]}, c, {out.stride[-2]}, {threads});"
            )
        else:
            self._headers.add("headers/gemm.h")
            numbers = ", ".join(map(str, (m, n, k, *strides, out.stride[-2])))
            options = f"{'true' if bias else 'false'}, {bias_strides[0]}, {bias_strides[1]}"
            call = f"funcnet::gemm<{c_type}, {numbers}, {options}>(a, b, bias, c);"
        steps = [a.stride[0], b.stride[0], bias_step, out.stride[0]] if stack else [0] * 4
        setup = []
        for name, matrix, step in zip(
            ("a", "b", "bias", "c"), (a, b, bias, out), steps, strict=True
        ):
            constant = "" if name == "c" else "const "
            address = (
                f"({c_type}*)({where[matrix.buffer]}) + {matrix.offset}" if matrix else "nullptr"
            )
            shift = f" + s * {step}" if matrix and step else ""
            setup.append(f"{constant}{c_type}* {name} = {address}{shift};")
        inside = " ".join([*setup, "(void)bias;", call])
        if stack:
            return [f"for (int64_t s = 0; s < {stack[0]}; ++s) {{ {inside} }}"]
        return [f"{{ {inside} }}"]


def _bias_strides(bias: Matrix | None, in_stack: bool) -> tuple[int, int, int]:
    """The strides of a bias along a stack, rows and columns; 0 where it is broadcast."""
    if bias is None:
        return 0, 0, 0
    steps = [0 if size == 1 else step for size, step in zip(bias.shape, bias.stride, strict=True)]
    step = steps[0] if in_stack and len(steps) > 2 else 0
    rows, columns = [0, 0, *steps][-2:]
    return step, rows, columns


def _tidy(source: str) -> str:
    """A kernel without its includes and, if it divides no integers, without the check for that.

    The check goes through one global variable, for which threads would compete.
    """
    source = re.sub(r"^#include.*$", "", source, flags=re.MULTILINE)
    if not re.search(r"integer_div_by_zero|_integral|div_floor|mod_", source):
        source = re.sub(r"^.*inductor_cpu_.*integer_div_error.*$", "", source, flags=re.MULTILINE)
    return source.replace('extern "C"', "static").strip() + "\n"
