"""What came of the cases: a row for each class and source, and why a case is not a pass."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tests.parity.names import Unsupported

KINDS = ("pass", "unsupported", "fail")


class Outcome(NamedTuple):
    """What came of one case; why, in one line, and in full."""

    kind: str
    reason: str = ""
    detail: str = ""


def outcome(check: Callable[[], None]) -> Outcome:
    """What came of a check that raises where it fails."""
    try:
        check()
    except Unsupported as error:
        return Outcome("unsupported", str(error))
    except Exception as error:
        line, *_ = [*str(error).splitlines(), ""]
        told = line if isinstance(error, AssertionError) else f"{type(error).__name__}: {line}"
        return Outcome("fail", told or type(error).__name__, str(error))
    return Outcome("pass")


def group(reason: str) -> str:
    """Reasons that differ in their numbers alone are one."""
    return re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "#", reason)


class Report:
    """Counts the outcomes."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], Counter[str]] = {}
        self.reasons: dict[tuple[str, str], dict[tuple[str, str], list[str]]] = {}

    def add(self, name: str, source: str, what: str, found: Outcome) -> None:
        row = (name, source)
        self.counts.setdefault(row, Counter())[found.kind] += 1
        if found.kind != "pass":
            reasons = self.reasons.setdefault(row, {})
            place = (found.kind, group(found.reason))
            reasons.setdefault(place, []).append(f"{found.reason}\n      {what}")

    def lines(self, verbose: bool = False) -> Iterable[str]:
        """The rows, and below each its reasons with the first case of each, or all of them."""
        yield f"{'class':32}{'source':14}" + "".join([f"{kind:>12}" for kind in KINDS])
        for row, counts in self.counts.items():
            name, source = row
            yield f"{name:32}{source:14}" + "".join([f"{counts[kind]:12}" for kind in KINDS])
            for (kind, _), cases in self.reasons.get(row, {}).items():
                yield f"    {kind} {len(cases)}: {cases[0].splitlines()[0]}"
                if kind == "fail" or verbose:
                    yield from ["      " + case.splitlines()[-1].strip() for case in cases[:1]]
                if verbose:
                    yield from ["    " + case for case in cases[1:]]
        total = sum(self.counts.values(), Counter())
        yield f"{'total':46}" + "".join([f"{total[kind]:12}" for kind in KINDS])

    @property
    def failed(self) -> int:
        return sum([counts["fail"] for counts in self.counts.values()])
