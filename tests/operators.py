"""PyTorch's operator database under `fn.jit`: compiled, each operator gives what it gives eagerly.

``python -m tests.operators 40 0`` draws forty operators by the seed 0, and ``python -m
tests.operators all`` takes all of them; ``--help`` has the options. Each runs on samples of
``torch.testing._internal.common_methods_invocations.op_db``. A line says what came of it:

    pass     compiled into one program, and equal
    called   equal, but the program calls an operator of PyTorch's instead of compiled code
    staged   equal, but not one program
    refused  jit says that it does not compile it, and funcnet/compiler/OPERATORS.md says why
    skipped  PyTorch itself refuses the sample
    refused? refused, and the page does not say so
    wrong    another value, shape or dtype
    crashed  an error that is no refusal, or the end of the process, or no end in time

The exit code is 1 if there is one of the last three. Operators run in child processes, several in
one compiled function where that goes, because compiling takes longest.
"""

import argparse
import contextlib
import hashlib
import itertools
import multiprocessing
import random
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import funcnet as fn
from funcnet import tree

REFUSED = Path(fn.__file__).parent / "compiler" / "OPERATORS.md"
FLOATS = (torch.float32, torch.float64, torch.bfloat16)
OTHERS = (torch.int64, torch.bool, torch.complex64)
BAD = ("refused?", "wrong", "crashed")
KINDS = ("pass", "called", "staged", "refused", "skipped", *BAD)

# Relative and absolute: where a compiled sum is taken in another order, the last bits differ.
_TOLERANCES = {
    torch.float64: (1e-7, 1e-9),
    torch.float32: (2e-4, 2e-5),
    torch.complex64: (2e-4, 2e-5),
    torch.bfloat16: (3.2e-2, 2e-2),
}
# Results that are not values of the input, of which only shape and dtype are compared.
NO_VALUES = {
    **dict.fromkeys(("empty", "empty_like", "new_empty"), "memory as it was found"),
    **dict.fromkeys(("new_empty_strided", "empty_strided", "empty_permuted"), "likewise"),
}
# Samples looked at of each operator.
_SAMPLES = 40


class Case(NamedTuple):
    """A sample of an operator, by the index of the sample."""

    name: str
    dtype: torch.dtype
    sample: int

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')} #{self.sample}"


class Found(NamedTuple):
    """What came of a case."""

    kind: str
    what: str = ""


class _Prepared(NamedTuple):
    """A case as a function of its tensors, with what it gives eagerly."""

    function: Callable[..., Any]
    tensors: list[Tensor]
    expected: Any


def database() -> dict[str, Any]:
    """The operators of PyTorch's database, by name."""
    from torch.testing._internal.common_methods_invocations import op_db

    named = {}
    for op in op_db:
        named[f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name] = op
    return named


def cases(
    names: Sequence[str], dtypes: Sequence[torch.dtype], samples: int, seed: int
) -> Iterator[Case]:
    """Samples of each operator in the dtypes that it takes."""
    named = database()
    for name in names:
        for dtype in dtypes:
            if dtype in named[name].supported_dtypes("cpu"):
                drawn = random.Random(f"{seed} {name} {dtype}").sample(range(_SAMPLES), samples)
                yield from [Case(name, dtype, index) for index in drawn]


def refused_by_page() -> dict[str, str]:
    """The operators that are refused, and why, as the page has them.

    A row of its tables holds a reason and, in backticks, the operators.
    """
    found = {}
    for line in REFUSED.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) > 1:
            found.update(dict.fromkeys(re.findall(r"`([\w.]+)`", cells[0]), cells[1]))
    return found


def _file(case: Case) -> str:
    return f"<{case}>"


def _prepare(case: Case) -> _Prepared:
    op = database()[case.name]
    # The same sample whatever else is drawn.
    torch.manual_seed(int(hashlib.sha256(case.name.encode()).hexdigest()[:8], 16))
    made = op.sample_inputs("cpu", case.dtype, requires_grad=False)
    samples = [*itertools.islice(made, _SAMPLES)]
    sample = samples[case.sample % len(samples)]
    leaves, treedef = tree.flatten((sample.input, tuple(sample.args), dict(sample.kwargs)))
    indices = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    # The line that an operator comes from, in the text that `lower` gives, names the case.
    text = "lambda op, x, args, kwargs: op(x, *args, **kwargs)"
    call = eval(compile(text, _file(case), "eval"))

    def function(*tensors: Tensor) -> Any:
        given = [*leaves]
        for index, tensor in zip(indices, tensors, strict=True):
            given[index] = tensor
        return call(op, *treedef.unflatten(given))

    # No two arguments are the same tensor, and none is written.
    tensors = [leaves[index].detach() for index in indices]
    with torch.no_grad():
        expected = function(*[tensor.clone() for tensor in tensors])
    return _Prepared(function, tensors, expected)


def _differences(name: str, actual: Any, expected: Any) -> str:
    """How results differ; nothing if they do not."""
    ours, theirs = tree.leaves(actual), tree.leaves(expected)
    if len(ours) != len(theirs):
        return f"{len(ours)} results, expected {len(theirs)}"
    for one, other in zip(ours, theirs, strict=True):
        if not isinstance(other, Tensor):
            other = torch.tensor(other)
            one = one if isinstance(one, Tensor) else torch.tensor(one)
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            found = f"{one.dtype} {tuple(one.shape)}, expected {other.dtype} {tuple(other.shape)}"
            return found.replace("torch.", "")
        if name in NO_VALUES:
            continue
        rtol, atol = _TOLERANCES.get(other.dtype, (1e-7, 0.0))
        try:
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol, equal_nan=True)
        except AssertionError as error:
            return " ".join(str(error).split())[:300]
    return ""


def _run(prepared: Sequence[_Prepared]) -> tuple[list[Any], Any]:
    """The results of some cases, compiled into one program, and what it lowers to."""

    def function(given: list[list[Tensor]]) -> list[Any]:
        return [each.function(*tensors) for each, tensors in zip(prepared, given, strict=True)]

    compiled = fn.jit(function)
    given = [each.tensors for each in prepared]
    before = [[tensor.clone() for tensor in tensors] for tensors in given]
    results = compiled(given)
    changed = _differences("", given, before)
    assert not changed, f"an argument was changed: {changed}"
    return results, compiled.lower(given)


def _judged(case: Case, prepared: _Prepared, result: Any, lowered: Any) -> Found:
    """What came of a case, in a program of it and perhaps others."""
    if differs := _differences(case.name, result, prepared.expected):
        return Found("wrong", differs)
    if lowered.why_not_one is not None:
        return Found("staged", " ".join(lowered.why_not_one.split())[:160])
    called = [text.partition(",")[0] for text in lowered.called if f"for {_file(case)}" in text]
    return Found("called", " ".join(called)) if called else Found("pass")


def _refusal(case: Case, error: Exception) -> Found:
    """What an error is: a refusal is one of jit's own."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if not (isinstance(error, (TypeError, ValueError)) and str(error).startswith("jit")):
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return Found("crashed", f"{text} ({Path(frame.filename).name}:{frame.lineno})")
    expected = refused_by_page().get(case.name)
    return Found("refused", expected) if expected else Found("refused?", text)


def outcomes(batch: Sequence[Case]) -> Iterator[tuple[Case, Found]]:
    """What comes of each case; those that pass are compiled together."""
    ready: list[tuple[Case, _Prepared]] = []
    for case in batch:
        try:
            ready.append((case, _prepare(case)))
        except Exception as error:
            yield case, Found("skipped", f"{type(error).__name__}: {str(error)[:100]}")
    page = refused_by_page()
    yield from _together([each for each in ready if each[0].name not in page])
    for each in ready:
        if each[0].name in page:
            yield from _together([each])


def _together(ready: Sequence[tuple[Case, _Prepared]]) -> Iterator[tuple[Case, Found]]:
    """What comes of cases in one program; by halves where one of them has none."""
    if not ready:
        return
    try:
        results, lowered = _run([prepared for _, prepared in ready])
    except Exception as error:
        if len(ready) == 1:
            yield ready[0][0], _refusal(ready[0][0], error)
            return
        results, lowered = [], None
    if len(ready) > 1 and (lowered is None or lowered.why_not_one is not None):
        yield from _together(ready[: len(ready) // 2])
        yield from _together(ready[len(ready) // 2 :])
        return
    for (case, prepared), result in zip(ready, results, strict=True):
        yield case, _judged(case, prepared, result, lowered)


def _work(receive: Any, send: Any, others: Sequence[Any]) -> None:
    """A child process: takes batches and sends outcomes, one by one, and None after each batch."""
    # Without its copies of the parent's ends it finds out when the parent is gone.
    for end in others:
        end.close()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            for outcome in outcomes(receive.recv()):
                send.send(outcome)
            send.send(None)


class _Child:
    """A child process, started again after its end."""

    def __init__(self) -> None:
        self._process: Any = None

    def outcomes(self, batch: Sequence[Case], patience: float) -> Iterator[tuple[Case, Found]]:
        """What comes of the cases of a batch, each alone if the process ends on them together."""
        left = [*batch]
        self._start()
        self._to.send(batch)
        reason = ""
        while True:
            try:
                if not self._from.poll(patience):
                    reason = f"no end in {patience:.0f} s"
                    break
                outcome = self._from.recv()
            except (EOFError, OSError):
                self._process.join(5)
                reason = f"the process ended with {self._process.exitcode}"
                break
            if outcome is None:
                return
            left.remove(outcome[0])
            yield outcome
        self.stop()
        if len(batch) == 1:
            yield batch[0], Found("crashed", reason)
            return
        for case in left:
            yield from self.outcomes([case], patience)

    def _start(self) -> None:
        if self._process is not None and self._process.is_alive():
            return
        context = multiprocessing.get_context("fork")
        receive, self._to = context.Pipe(duplex=False)
        self._from, send = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_work, args=(receive, send, (self._to, self._from)), daemon=True
        )
        self._process.start()
        receive.close()
        send.close()

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def _selected(options: argparse.Namespace) -> list[str]:
    names = [*database()]
    if options.only:
        unknown = sorted(set(options.only) - set(names))
        if unknown:
            raise SystemExit(f"operators: the database has no {', '.join(unknown)}")
        return [*options.only]
    if options.number == "all":
        found = names
    else:
        found = random.Random(options.seed).sample(names, min(int(options.number), len(names)))
    if options.slice:
        which, count = map(int, options.slice.split("/"))
        found = found[which::count]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("number", nargs="?", default="40", help="how many operators, or all")
    parser.add_argument("seed", nargs="?", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these operators")
    parser.add_argument(
        "--dtype",
        nargs="+",
        help="float32 float64 bfloat16 int64 bool complex64; floats and others",
    )
    parser.add_argument("--samples", type=int, default=1, help="samples of each operator and dtype")
    parser.add_argument("--slice", metavar="K/N", help="every Nth operator, from the Kth")
    parser.add_argument("--seconds", type=float, help="begin no operator after so long")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds for one operator")
    parser.add_argument("--together", type=int, default=8, help="operators in one function")
    parser.add_argument("--quiet", action="store_true", help="print no line for what passes")
    options = parser.parse_args(arguments)
    groups = {"floats": FLOATS, "others": OTHERS}
    dtypes = [
        dtype
        for name in options.dtype or ["floats"]
        for dtype in groups.get(name) or (getattr(torch, name),)
    ]
    deadline = time.monotonic() + (options.seconds or float("inf"))
    counts: dict[torch.dtype, Counter[str]] = {dtype: Counter() for dtype in dtypes}
    child = _Child()
    drawn = [*cases(_selected(options), dtypes, options.samples, options.seed)]
    left_out = 0
    try:
        for start in range(0, len(drawn), options.together):
            batch = drawn[start : start + options.together]
            if time.monotonic() > deadline:
                left_out += len(batch)
                continue
            for case, found in child.outcomes(batch, options.patience):
                counts[case.dtype][found.kind] += 1
                if found.kind != "pass" or not options.quiet:
                    print(f"{found.kind:9}{case}  {found.what}", flush=True)
    finally:
        child.stop()
    for dtype, counted in counts.items():
        listed = ", ".join(f"{counted[kind]} {kind}" for kind in KINDS if counted[kind])
        print(f"{str(dtype).removeprefix('torch.')}: {listed or 'none'}")
    if left_out:
        print(f"{left_out} samples were left out: the time was up")
    return int(any(counted[kind] for counted in counts.values() for kind in BAD))


if __name__ == "__main__":
    sys.exit(main())
