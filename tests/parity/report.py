"""What came of the cases: a row for each class and source, and why a case is not a pass."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tests.parity.names import Unsupported

KINDS = ("pass", "unsupported", "fail")


HEADER = f"{'class':32}{'source':14}" + "".join([f"{kind:>12}" for kind in KINDS])


class Outcome(NamedTuple):
    """What came of one case, and why, in one line."""

    kind: str
    reason: str = ""


class Told(NamedTuple):
    """A case that is not a pass, and why."""

    what: str
    reason: str


def outcome(check: Callable[[], None]) -> Outcome:
    """What came of a check that raises where it fails."""
    try:
        check()
    except Unsupported as error:
        return Outcome("unsupported", str(error))
    except Exception as error:
        line, *_ = [*str(error).splitlines(), ""]
        told = line if isinstance(error, AssertionError) else f"{type(error).__name__}: {line}"
        return Outcome("fail", told or type(error).__name__)
    return Outcome("pass")


def group(reason: str) -> str:
    """Reasons that differ in their numbers alone are one."""
    return re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "#", reason)


def _line(name: str, source: str, counts: Counter[str]) -> str:
    return f"{name:32}{source:14}" + "".join([f"{counts[kind]:12}" for kind in KINDS])


class Report:
    """Counts the outcomes."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], Counter[str]] = {}
        self.reasons: dict[tuple[str, str], dict[tuple[str, str], list[Told]]] = {}

    def add(self, name: str, source: str, what: str, found: Outcome) -> None:
        row = (name, source)
        self.counts.setdefault(row, Counter())[found.kind] += 1
        if found.kind != "pass":
            reasons = self.reasons.setdefault(row, {})
            place = (found.kind, group(found.reason))
            reasons.setdefault(place, []).append(Told(what, found.reason))

    def lines(self, name: str, verbose: bool = False) -> Iterator[str]:
        """The rows of a class; below each the reasons, with the first case of each or all."""
        for row, counts in self.counts.items():
            if row[0] != name:
                continue
            yield _line(*row, counts)
            for (kind, _), cases in self.reasons.get(row, {}).items():
                yield f"    {kind} {len(cases)}: {cases[0].reason}"
                told = cases if verbose else cases[:1]
                if verbose or kind == "fail":
                    yield from [f"        {case.what}: {case.reason}" for case in told]

    def total(self) -> str:
        return _line("total", "", sum(self.counts.values(), Counter()))

    @property
    def failed(self) -> int:
        return sum([counts["fail"] for counts in self.counts.values()])
