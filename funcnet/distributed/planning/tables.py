"""Plans in print."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from funcnet.distributed.planning.planned import Plan


def size(count: float) -> str:
    """Bytes with three digits and a unit.

    >>> size(0), size(999), size(33_554_432), size(26_825_356_288)
    ('0', '999 B', '33.6 MB', '26.8 GB')
    """
    return _scaled(count, ("B", "kB", "MB", "GB", "TB", "PB"), 1000.0)


def duration(seconds: float) -> str:
    """Seconds with three digits and a unit.

    >>> duration(0), duration(2.5e-5), duration(0.034), duration(12.0)
    ('0', '25 us', '34 ms', '12 s')
    """
    return _scaled(seconds * 1e9, ("ns", "us", "ms", "s"), 1000.0)


def _scaled(value: float, units: Sequence[str], factor: float) -> str:
    if not value:
        return "0"
    place = 0
    while place < len(units) - 1 and float(f"{value:.3g}") >= factor:
        value, place = value / factor, place + 1
    return f"{float(f'{value:.3g}'):.6g} {units[place]}"


def layout(mesh: Mapping[str, int]) -> str:
    """The sizes of a mesh.

    >>> layout({"pipe": 2, "data": 4})
    'pipe=2 x data=4'
    """
    return " x ".join([f"{name}={count}" for name, count in mesh.items()])


def aligned(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """The lines of a table, whose first row is its header and whose first columns are words.

    >>> aligned([("a", "b"), ("xyz", "10")], 1)
    ['a     b', '---  --', 'xyz  10']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    header, *body = [line(row) for row in rows]
    return [header, "  ".join(["-" * width for width in widths]), *body]


def plan_table(plan: "Plan") -> str:
    """The memory of each stage's ranks, what they communicate, and the time of a step."""
    parts = "1 micro-batch" if plan.micro_batches == 1 else f"{plan.micro_batches} micro-batches"
    schedule = f", {plan.schedule}" if len(plan.stages) > 1 else ""
    tables = [_memory_table(plan), _traffic_table(plan), _times_table(plan)]
    return "\n\n".join(
        [
            f"{layout(plan.mesh)}, {parts}{schedule}",
            *["\n".join(lines) for lines in tables if lines],
            f"{plan.utilization:.1%} of the FLOPs of {plan.ranks} devices",
        ]
    )


def _memory_table(plan: "Plan") -> list[str]:
    """A line for each stage, or for several of the same sizes."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for number, stage in enumerate(plan.stages):
        sizes = tuple([size(count) for count in (*stage.memory, stage.memory.peak)])
        alike.setdefault(sizes, []).append(str(number))
    header = ("stage", *plan.stages[0].memory._fields, "peak")
    return aligned([header, *[(", ".join(names), *sizes) for sizes, names in alike.items()]], 1)


def _traffic_table(plan: "Plan") -> list[str]:
    rows = [("collective", "axis", "ranks", "calls", "bytes", "sent")]
    for kind, axis, ranks, calls, whole in plan.traffic:
        sent = plan.traffic[len(rows) - 1].sent
        rows.append((kind, axis, str(ranks), str(calls), size(whole), size(sent)))
    return aligned(rows, 2) if plan.traffic else []


def _times_table(plan: "Plan") -> list[str]:
    rows = [("a step", "time", "part")]
    for name, time in plan.times.items():
        rows.append((name, duration(time), f"{time / plan.seconds:.1%}"))
    rows.append(("all", duration(plan.seconds), ""))
    return aligned(rows, 1)
