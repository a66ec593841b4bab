"""A fuzzer of `fn.jit`: random programs, compiled, must give what they give eagerly.

``python -m tests.fuzz --minutes 5 --seed 0`` from the root of the repository; ``--help`` has the
options. Program K of a seed depends on nothing else: ``--seed 0 --program K`` runs it alone.
Programs run in a child process, so that after a crash or a hang the parent knows which it was.
"""

import argparse
import math
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._inductor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import funcnet as fn
from funcnet.compiler import cache
from tests.fuzzing.programs import INGREDIENTS, Program, Statement, grow_program

# Seconds: for one compilation that hangs, and for the search for a smaller program.
_PATIENCE = 180.0
_SHRINKING = 90.0
_TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9}
# What only torch refuses: a view of an argument of another layout, which a compiled function makes
# contiguous.
_LENIENT = re.compile("view size is not compatible")
_REFUSAL = re.compile("reads the value|static=")
# What only jit refuses: a view of what vmap made, which lies in memory as its axes say, where
# torch.vmap leaves it as its batches were.
_OTHER_STRIDES = re.compile("Cannot view a tensor")
_EXACT = re.compile(
    r"aten\.(_?to_copy|add|sub|mul|neg|abs|sign|floor|ceil|round|trunc|relu|clamp|m(ax|in)imum|"
    r"a?m(ax|in)|where|cat|stack|clone|copy|fill|zeros|ones|full|empty|new|index|gather|scatter\.|"
    r"sort|flip|roll|masked|constant_pad|repeat|tril|arange|bitwise|logical|[egln][qet]\b)"
)


class Outcome(NamedTuple):
    """What came of a program: ``same``, ``refused``, ``skipped`` or ``wrong``."""

    kind: str
    calls: int
    what: str = ""
    detail: str = ""


class _Wrong(Exception):  # noqa: N818
    """A difference between the compiled and the eager function: in what, and how."""


class _Jitter(TorchDispatchMode):
    """Changes floating-point numbers by about an ulp, as another order of a sum would."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def _nudged(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_meta:
            return value
        noise = torch.randint(-2, 3, value.shape, generator=self._generator).to(value.dtype)
        return value * (1 + noise * torch.finfo(value.dtype).eps)

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        schema = operator._schema
        alias = any([each.alias_info is not None for each in [*schema.arguments, *schema.returns]])
        if alias or operator.namespace != "aten" or _EXACT.match(str(operator)):
            return operator(*args, **(kwargs or {}))
        with torch.utils._python_dispatch._disable_current_modes():
            args = fn.tree.map(self._nudged, args)
            return fn.tree.map(self._nudged, operator(*args, **(kwargs or {})))


def compare(where: str, found: Any, expected: Any, nudged: list[Any]) -> None:
    """Raise where a result differs from the eager one by more than rounding may explain.

    ``nudged`` are eager results with other rounding errors: what differs among them may differ.
    """
    if isinstance(expected, (bool, int, float)):
        _compare_numbers(where, found, expected)
    elif isinstance(expected, Tensor):
        _compare_tensors(where, found, expected, nudged)
    elif type(found) is not type(expected):
        raise _Wrong("structure", f"{where}: {type(found).__name__}, not {type(expected).__name__}")
    elif isinstance(expected, dict):
        if list(found) != list(expected):
            same = set(found) == set(expected)
            raise _Wrong(
                "order of a dict" if same else "structure",
                f"{where}: the keys are {list(found)}, not {list(expected)}",
            )
        for name in expected:
            rest = [each[name] for each in nudged]
            compare(f"{where}[{name!r}]", found[name], expected[name], rest)
    elif isinstance(expected, (tuple, list)):
        if len(found) != len(expected):
            raise _Wrong("structure", f"{where}: {len(found)} entries, not {len(expected)}")
        for place, pair in enumerate(zip(found, expected, strict=True)):
            compare(f"{where}[{place}]", *pair, [each[place] for each in nudged])


def _compare_numbers(where: str, found: Any, expected: Any) -> None:
    dtypes = {bool: torch.bool, int: torch.int64, float: torch.float64}
    if isinstance(found, Tensor) and (found.dim() or found.dtype != dtypes[type(expected)]):
        raise _Wrong("dtype", f"{where}: {fn.tree.describe(found)}, not {expected!r}")
    if not isinstance(found, Tensor) and type(found) is not type(expected):
        raise _Wrong("dtype", f"{where}: {found!r}, not {expected!r}")
    if not math.isclose(found, expected, rel_tol=1e-12) and not (
        math.isnan(found) and math.isnan(expected)
    ):
        raise _Wrong("number", f"{where}: {found!r}, not {expected!r}")


def _compare_tensors(where: str, found: Any, expected: Tensor, nudged: list[Tensor]) -> None:
    if not isinstance(found, Tensor):
        raise _Wrong("structure", f"{where}: {type(found).__name__}, not a tensor")
    if fn.tree.describe(found) != fn.tree.describe(expected):
        kinds = (fn.tree.describe(found), fn.tree.describe(expected))
        raise _Wrong("shape or dtype", f"{where}: {kinds[0]}, not {kinds[1]}")
    if expected.is_floating_point():
        tolerance = _TOLERANCE.get(expected.dtype, 1e-2)
        spread = torch.zeros_like(expected)
        for each in nudged:
            spread = torch.maximum(spread, (each - expected).abs().nan_to_num(math.inf))
        near = (found - expected).abs() <= tolerance * (1 + expected.abs()) + 20 * spread
        right = near | (found == expected) | (found.isnan() & expected.isnan()) | spread.isinf()
    else:
        right = found == expected
        for each in nudged:
            right = right | (each != expected)
    if not right.all():
        count = int((~right).sum())
        raise _Wrong(
            "values",
            f"{where}: {count} of {right.numel()} values of {fn.tree.describe(expected)}\n"
            f"jit:   {found.detach().flatten()[:12]}\neager: {expected.detach().flatten()[:12]}",
        )


def _call(function: Callable[..., Any], args: list[Any]) -> tuple[Any, Exception | None]:
    try:
        return function(*args), None
    except Exception as error:
        return None, error


def check(program: Program) -> Outcome:
    """Call a program eagerly and compiled, some times, and compare."""
    calls = skipped = 0
    try:
        env = program.namespace()
        compiled = fn.jit(env["f"], donate=program.donate)
        held = {name: env[name] for name in program.captured}
        kept: list[tuple[Tensor, Tensor]] = []
        for call in range(program.calls):
            if call:
                _change(program, held, call)
            before = fn.tree.map(lambda each: each.detach().clone(), held)
            given, clean = program.arguments(call), program.arguments(call)
            with torch.no_grad():
                expected, refusal = _call(env["f"], given)
            if not _unchanged(given, clean) or not _unchanged(held, before):
                raise RuntimeError(
                    f"the fuzzer grew a function that is not pure:\n{program.text()}"
                )
            given = program.arguments(call)
            leaves = fn.tree.leaves(given)
            with torch.set_grad_enabled(program.with_grad):
                found, error = _call(compiled, given)
            calls += 1
            if error is not None:
                if refusal is not None:
                    skipped += 1
                    continue
                named = program.numeric and isinstance(error, TypeError)
                if (named and _REFUSAL.search(str(error))) or _OTHER_STRIDES.match(str(error)):
                    return Outcome("refused", calls)
                told = "".join(traceback.format_exception(error)[-3:])
                raise _Wrong(f"raises {type(error).__name__}", told)
            if refusal is not None:
                if _LENIENT.search(str(refusal)):
                    continue
                raise _Wrong("does not raise", f"eager: {type(refusal).__name__}: {refusal}")
            _check_memory(program, given, clean, found, leaves)
            if not _unchanged(held, before):
                raise _Wrong("writes", "a tensor that the function closes over changed")
            _compare_all(program, env, call, found, expected)
            own = {id(each) for each in [*leaves, *held.values()]}
            memory = {each.untyped_storage().data_ptr() for each in held.values()}
            for each in fn.tree.leaves(found):
                fresh = isinstance(each, Tensor) and id(each) not in own
                if fresh and each.untyped_storage().data_ptr() not in memory:
                    kept.append((each, each.clone()))
        for each, then in kept:
            if not torch.equal(each.nan_to_num(), then.nan_to_num()):
                raise _Wrong("a result changed", "a later call changed a result of an earlier one")
    except _Wrong as wrong:
        return Outcome("wrong", calls, *wrong.args)
    return Outcome("skipped" if skipped == program.calls else "same", calls)


def _compare_all(program: Program, env: dict, call: int, found: Any, expected: Any) -> None:
    try:
        compare("result", found, expected, [])
    except _Wrong as wrong:
        if wrong.args[0] != "values":
            raise
        nudged = []
        for seed in range(6):
            with torch.no_grad(), _Jitter(seed):
                nudged.append(env["f"](*program.arguments(call)))
        compare("result", found, expected, nudged)


def _change(program: Program, held: dict[str, Tensor], call: int) -> None:
    """Give captured tensors other values: a compiled function must read them."""
    with torch.no_grad():
        for name, tensor in held.items():
            tensor.copy_(program.captured[name].make(program.rng(f"{name} {call}")))


def _unchanged(tree: Any, before: Any) -> bool:
    pairs = zip(fn.tree.leaves(tree), fn.tree.leaves(before), strict=True)
    return all([a.equal(b) if isinstance(a, Tensor) else a == b for a, b in pairs])


def _check_memory(
    program: Program, given: list[Any], clean: list[Any], found: Any, leaves: list[Any]
) -> None:
    """Arguments are as they were, but for donated ones, which are gone."""
    returned = {id(each) for each in fn.tree.leaves(found)}
    donated = {
        id(each)
        for place in program.donate
        for each in fn.tree.leaves(given[place])
        if isinstance(each, Tensor) and id(each) not in returned
    }
    for place, (each, was) in enumerate(zip(leaves, fn.tree.leaves(clean), strict=True)):
        if id(each) not in donated:
            if not _unchanged([each], [was]):
                raise _Wrong("writes", f"leaf {place} of the arguments changed")
            continue
        try:
            each + 1
        except RuntimeError:
            continue
        raise _Wrong("donation", f"leaf {place} of the arguments was donated and can be used")


def _positions(statements: list[Statement]) -> int:
    return sum([1 + _positions(each.body) for each in statements])


def _dropped(statements: list[Statement], position: int) -> list[Statement]:
    """The statements without one, counted with those inside before it."""
    kept = []
    for each in statements:
        inside = _positions(each.body)
        if 0 < position <= inside:
            each = replace(each, body=_dropped(each.body, position - 1))
        if position != 0:
            kept.append(each)
        position -= 1 + inside
    return kept


def _defined(text: str) -> set[str]:
    """The names to which a program assigns."""
    targets = re.findall(r"^ *(\w+(?:, \w+)*) = ", text, re.MULTILINE)
    return {name for each in targets for name in each.split(", ")}


def _used(program: Program) -> Program:
    """The program without definitions that nothing reads."""
    for position in reversed(range(_positions(program.statements))):
        rest = replace(program, statements=_dropped(program.statements, position))
        text = rest.text()
        gone = _defined(program.text()) - _defined(text)
        if gone and not gone & set(re.findall(r"\w+", text)):
            return _used(rest)
    return program


def _smaller(program: Program) -> Iterator[Program]:
    """Programs that are a bit smaller."""
    if len(program.outputs) > 1:
        for output in program.outputs:
            yield _used(replace(program, outputs=[output]))
        for place in range(len(program.outputs)):
            rest = program.outputs[:place] + program.outputs[place + 1 :]
            yield _used(replace(program, outputs=rest))
    if program.donate:
        yield replace(program, donate=())
    if program.calls > 1:
        yield replace(program, calls=program.calls - 1)
    for position in reversed(range(_positions(program.statements))):
        yield _used(replace(program, statements=_dropped(program.statements, position)))


def shrink(
    program: Program, outcome: Outcome, alive: Callable[[], None]
) -> tuple[Program, Outcome]:
    """A smaller program that goes wrong in the same way, as far as it is found in time."""
    deadline = time.monotonic() + _SHRINKING
    while True:
        for candidate in _smaller(program):
            if time.monotonic() > deadline:
                return program, outcome
            alive()
            found = check(candidate)
            if (found.kind, found.what) == ("wrong", outcome.what):
                program, outcome = candidate, found
                break
        else:
            return program, outcome


def run_program(
    seed: int, number: int, without: frozenset[str], alive: Callable[[str], None]
) -> tuple[Outcome, str]:
    """Grow a program and check it: what came of it, and a report if it went wrong."""
    program = grow_program(seed, number, without)
    alive(program.text())
    outcome = check(program)
    if outcome.kind != "wrong":
        return outcome, ""
    small, found = shrink(program, outcome, lambda: alive(program.text()))
    report = f"seed {seed} program {number}: {found.what}\n{small.text()}\n{found.detail}\n"
    return outcome, report


def _work(connection: Any, options: argparse.Namespace, start: int, deadline: float) -> None:
    """The child process: programs from ``start`` on, told one by one."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    # Inductor takes minutes for the segments of a program in stages: those are interpreted.
    torch._inductor.compile = lambda graph, inputs: graph
    for number in range(start, options.stop):
        if time.time() > deadline:
            break
        alive = lambda text, number=number: connection.send(("at", number, text))  # noqa: E731
        alive("")
        outcome, report = run_program(options.seed, number, frozenset(options.without), alive)
        connection.send(("done", number, outcome[:2], report))
    connection.send(("end",))


def main() -> int:
    """Run programs until time is up; 1 if one of them went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--program", type=int, help="run this program alone")
    parser.add_argument("--programs", type=int, default=10**9, help="stop after so many")
    parser.add_argument("--without", nargs="*", default=[], choices=INGREDIENTS)
    parser.add_argument("--verbose", action="store_true", help="print each program")
    options = parser.parse_args()
    start = options.program or 0
    options.stop = start + (options.programs if options.program is None else 1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FUNCNET_CACHE_DIR"] = folder
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(folder, "inductor")
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
        tally, started = Counter(), time.time()
        deadline = started + 60 * options.minutes
        while start is not None and start < options.stop and time.time() < deadline:
            start = _supervise(options, start, deadline, tally)
        called = Counter([name for path in Path(folder).glob("*.cpp") for name in _called(path)])
    print(
        f"seed {options.seed}: {tally['programs']} programs, {tally['calls']} calls of compiled "
        f"functions, {tally['refused']} refused, {tally['skipped']} skipped, {tally['wrong']} wrong"
    )
    if options.verbose:
        print(f"{tally['programs'] / (time.time() - started) * 60:.1f} programs a minute")
        print(f"programs that call operators, by operator: {dict(called)}")
    return int(tally["wrong"] > 0)


def _called(path: Path) -> set[str]:
    """The operators that a program calls through PyTorch."""
    first = (cache.content(path) or b"\n").decode().splitlines()[0]
    return {re.sub(r"_\d+$", "", name) for name in first.removeprefix("// called:").split()}


def _supervise(
    options: argparse.Namespace, start: int, deadline: float, tally: Counter
) -> int | None:
    """Run a child process; where to go on if it died or hung."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(there, options, start, deadline))
    child.start()
    there.close()
    number, text = start, ""
    ending = ""
    while not ending:
        try:
            message = here.recv() if here.poll(_PATIENCE) else ("hangs",)
        except EOFError:
            child.join()
            message = ("ends", child.exitcode)
        match message:
            case ("at", number, text):
                pass
            case ("done", number, (kind, calls), report):
                tally.update({"programs": 1, "calls": calls, kind: 1})
                if report:
                    print(report, flush=True)
                if options.verbose:
                    print(f"program {number}: {kind}", flush=True)
            case ("end",):
                child.join()
                return None
            case ("hangs",):
                child.kill()
                child.join()
                ending = f"hangs for {_PATIENCE:.0f} s"
            case ("ends", code):
                ending = f"ends the process with code {code}"
    tally.update({"programs": 1, "wrong": 1})
    print(f"seed {options.seed} program {number}: {ending}\n{text}\n", flush=True)
    return number + 1


if __name__ == "__main__":
    sys.exit(main())
