"""The C++ text of a program: the kernels, and one function that runs the plan's statements.

It allocates nothing and makes no tensor: buffers are offsets into one workspace, arguments and
results are pointers, loops are loops, and products of small matrices are inline.
"""

import re
from collections.abc import Sequence

from funcnet.compiler.memory import Address
from funcnet.compiler.plan import Plan
from funcnet.compiler.statements import (
    Apply,
    Choose,
    Copy,
    Iterate,
    Launch,
    Nest,
    Repeat,
    Statement,
)


def program_text(plan: Plan) -> str:
    """The C++ program that a plan describes."""
    return _Writer(plan.threads).program(plan)


class _Writer:
    """Writes statements, and collects the kernels and the headers that they need."""

    def __init__(self, threads: int) -> None:
        # How many may run the statements that are being written.
        self._threads = threads
        self._names: dict[str, str] = {}
        self._headers: set[str] = set()

    def program(self, plan: Plan) -> str:
        lines = self._lines(plan.statements)
        includes = ["<torch/csrc/inductor/cpp_prefix.h>", '"headers/program.h"']
        includes += [f'"{header}"' for header in sorted(self._headers)]
        head = [f"#include {header}" for header in includes]
        kernels = [text.replace(" @(", f" {name}(") for text, name in self._names.items()]
        callback = []
        if plan.calls:
            # What the program is called with last.
            callback = [f"const auto callback = (funcnet::Callback)in[{plan.inputs}];"]
        run = [
            'extern "C" int funcnet_run(char** in, char** out) {',
            f"try {{ Workspace workspace({plan.workspace}); char* const w0 = workspace.start;",
            f"constexpr int threads = {plan.threads}; (void)threads;",
            *callback,
            *lines,
            "} catch (const std::exception& error) {",
            "  return fail(error.what());",
            '} catch (...) { return fail("unknown"); }',
            "return 0;",
            "}\n",
        ]
        # A blank line stands between parts and nowhere else: `build` compiles parts side by side.
        return "\n\n".join(["\n".join(head), *kernels, "\n".join(run)])

    def _lines(self, statements: Sequence[Statement]) -> list[str]:
        return [line for statement in statements for line in self._statement(statement)]

    def _statement(self, statement: Statement) -> list[str]:
        match statement:
            case Copy(to, source, size):
                return [f"std::memcpy({to}, {source}, {size});"]
            case Launch(name, source, arguments):
                given = [f"({c_type})({address})" for c_type, address in arguments]
                return [f"{self._kernel(name, source)}({', '.join(given)});"]
            case Apply(text, header):
                self._headers.add(header)
                return [text]
            case Iterate():
                return self._iterate(statement)
            case Nest():
                return ["{", *self._nest(statement), "}"]
            case Repeat():
                return self._repeat(statement)
            case Choose():
                return self._choose(statement)

    def _nest(self, nest: Nest) -> list[str]:
        return [_workspace(nest.base, nest.workspace), *self._lines(nest.body)]

    def _repeat(self, loop: Repeat) -> list[str]:
        condition, (base, workspace, entered) = self._nest(loop.condition), loop.entered
        once, body = self._lines(entered[:-1]), self._lines(entered[-1:])
        if once:
            once = [f"if ({loop.counter}) {{", *once, "}"]
        return [
            f"{{ {_workspace(base, workspace)}",
            f"for (bool {loop.counter} = true;; {loop.counter} = false) {{",
            *["{", *condition, "}"],
            f"if (!*(const bool*)({loop.holds})) {{ break; }}",
            *once,
            *body,
            "} }",
        ]

    def _choose(self, choice: Choose) -> list[str]:
        branches = [self._nest(branch) for branch in choice.branches]
        if choice.is_bool:
            yes, no = branches
            test = f"if (*(const bool*)({choice.selector})) {{"
            return [test, *yes, "} else {", *no, "}"]
        lines = [f"switch (*(const int64_t*)({choice.selector})) {{"]
        for number, branch in enumerate(branches[:-1]):
            lines += [f"case {number}: {{", *branch, "break; }"]
        return [*lines, "default: {", *branches[-1], "} }"]

    def _kernel(self, name: str, source: str) -> str:
        """The name of a kernel in the program, in which each text occurs once."""
        text = _tidy(source).replace(f" {name}(", " @(")
        return self._names.setdefault(text, f"kernel_{len(self._names)}")

    def _iterate(self, loop: Iterate) -> list[str]:
        counter, base = loop.counter, loop.base
        head = f"for (int64_t {counter} = 0; {counter} < {loop.length}; ++{counter}) {{"
        if loop.reverse:
            head = f"for (int64_t {counter} = {loop.length}; {counter}-- > 0;) {{"
        around, self._threads = self._threads, loop.threads
        body = self._lines(loop.body)
        if around != loop.threads:
            body.insert(0, f"constexpr int threads = {loop.threads}; (void)threads;")
        self._threads = around
        start = _sum(loop.workspace)
        if loop.workers == 1:
            return [f"{{ {_workspace(base, loop.workspace)}", head, *body, "} }"]
        return [
            "{ funcnet::Failure failure;",
            f"#pragma omp parallel for num_threads({loop.workers})",
            head,
            f"char* const {base} = {start} + omp_get_thread_num() * {loop.stride}; (void){base};",
            "try {",
            *body,
            "} catch (const std::exception& error) { failure.keep(error); } }",
            "failure.rethrow(); }",
        ]


def _sum(address: Address) -> str:
    """An address in a workspace without its parentheses, as the start of a sum."""
    return str(address)[1:-1]


def _workspace(base: str, address: Address) -> str:
    return f"char* const {base} = {_sum(address)}; (void){base};"


def _tidy(source: str) -> str:
    """A kernel without its includes and, if it divides no integers, without the check for that.

    The check goes through one global variable, for which threads would compete.
    """
    source = re.sub(r"^#include.*$", "", source, flags=re.MULTILINE)
    if not re.search(r"integer_div_by_zero|_integral|div_floor|mod_", source):
        source = re.sub(r"^.*inductor_cpu_.*integer_div_error.*$", "", source, flags=re.MULTILINE)
    # Called in hundreds of places, a kernel is compiled once.
    source = source.replace('extern "C"', "[[gnu::noinline]] static").strip()
    return re.sub(r"\n\s*\n", "\n", source)
