"""The rows of a summary, and how they are printed: equal blocks once."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from funcnet.core import join_paths


class Row(NamedTuple):
    """What one layer holds and computes, sizes in bytes; of several copies together, if it has."""

    path: str
    layer: str
    output: str
    params: int = 0
    param_bytes: int = 0
    state_bytes: int = 0
    residual_bytes: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    copies: tuple[tuple[str, str, int], ...] = ()
    """The `repeat` and `stacked` that the layer is in: path, name and number of copies of each."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """The sizes and FLOPs, in the order of the columns."""
        return self[3:9]

    def with_numbers(self, numbers: Sequence[int]) -> "Row":
        """The row of other numbers."""
        return Row._make((*self[:3], *numbers, self.copies))


class Summary(NamedTuple):
    """The rows of a model's layers, in the order in which they run, and their total.

    It prints as a table. Equal consecutive blocks, and the copies of a `repeat`, stand there once,
    with the numbers of one of them, below a line with their paths and ``x`` their number.
    """

    rows: tuple[Row, ...]
    total: Row

    def __repr__(self) -> str:
        sizes = "params", "bytes", "state", "residuals"
        header = "path", "layer", "output", *sizes, "forward", "backward"
        body = [*_folded(list(self.rows), "", "", 0, 0), _cells(self.total, "total")]
        widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]

        def line(cells: Sequence[str]) -> str:
            aligned = [
                cell.ljust(width) if column < 3 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            return "  ".join(aligned).rstrip()

        rule = "  ".join("-" * width for width in widths)
        return "\n".join([line(header), rule, *map(line, body[:-1]), rule, line(body[-1])])


Cells = tuple[str, ...]
LONGEST = 16
"""Of the blocks that are looked for, in layers or parts of the model side by side."""


def _cells(row: Row, name: str, times: int = 1) -> Cells:
    layer = f"{row.layer} x {times}" if times > 1 else row.layer
    *sizes, forward, backward = row.numbers
    exact = [f"{size:,}" for size in sizes]
    return (name, layer, row.output, *exact, short(forward), short(backward))


def _heading(name: str, times: str) -> Cells:
    """The line above a block that stands for several."""
    return (name, times, *7 * [""])


def short(flops: int) -> str:
    """Three digits and a unit.

    >>> [short(flops) for flops in (0, 999, 9_950, 12_345_678, 999_999, 4 * 10**15)]
    ['0', '999', '9.95k', '12.3M', '1M', '4000T']
    """
    scaled, unit = float(flops), ""
    for larger in "kMGT":
        if float(f"{scaled:.3g}") < 1000:
            break
        scaled, unit = scaled / 1000, larger
    return f"{float(f'{scaled:.3g}'):.{6}g}{unit}"


def _folded(rows: list[Row], prefix: str, shown: str, depth: int, loops: int) -> list[Cells]:
    """The lines of the rows below a path.

    Args:
        rows: consecutive, all of paths at ``prefix`` or below.
        prefix: the path.
        shown: the path that is in the heading above; names are relative to it.
        depth: how far the lines are indented.
        loops: how many of each row's ``copies`` are in headings already.
    """
    indent = "  " * depth

    def name(path: str) -> str:
        return indent + (_below(path, shown) or "." * (depth > 0))

    lines: list[Cells] = []
    for loop, same in groupby(rows, lambda row: _loop(row, loops, prefix)):
        part = list(same)
        if loop is not None:
            _, kind, times = loop
            one = [row.with_numbers([number // times for number in row.numbers]) for row in part]
            lines.append(_heading(name(prefix), f"{kind} x {times}"))
            lines += _folded(one, prefix, prefix, depth + 1, loops + 1)
            continue
        named = groupby(part, lambda row: _below(row.path, prefix).split(".")[0])
        groups = [(each, list(of_name)) for each, of_name in named]
        forms = [_form(join_paths(prefix, each), of_name) for each, of_name in groups]
        place = 0
        while place < len(groups):
            length, times = _block(forms[place:])
            block = groups[place : place + length]
            first = join_paths(prefix, block[0][0])
            place += length * times
            if times > 1:
                through = f"{name(first)} - {groups[place - 1][0]}"
                if len(block[0][1]) == length == 1 and len(block[0][1][0].copies) == loops:
                    lines.append(_cells(block[0][1][0], through, times))
                    continue
                lines.append(_heading(through, f"x {times}"))
            above = (first if length == 1 else prefix) if times > 1 else shown
            for each, of_name in block:
                inside = depth + (times > 1)
                if each:
                    lines += _folded(of_name, join_paths(prefix, each), above, inside, loops)
                else:
                    lines += [_cells(row, name(row.path)) for row in of_name]
    return lines


def _loop(row: Row, loops: int, path: str) -> tuple[str, str, int] | None:
    """The `repeat` of this path in which the row is, if it is in one that has no heading yet."""
    return next((loop for loop in row.copies[loops : loops + 1] if loop[0] == path), None)


def _below(path: str, prefix: str) -> str:
    """A path without the part that leads to what it is in."""
    return path.removeprefix(prefix).removeprefix(".") if prefix else path


def _form(path: str, rows: list[Row]) -> tuple[Row, ...]:
    """What blocks that are shown as one have in common."""

    def relative(row: Row) -> Row:
        loops = [(_below(loop, path), kind, times) for loop, kind, times in row.copies]
        return row._replace(path=_below(row.path, path), copies=tuple(loops))

    return tuple([relative(row) for row in rows])


def _block(forms: list[tuple[Row, ...]]) -> tuple[int, int]:
    """The length of the block at the start, and how often it comes, that save the most lines."""
    best, most = (1, 1), 0
    for length in range(1, min(LONGEST, len(forms) // 2) + 1):
        times = 1
        while forms[times * length : (times + 1) * length] == forms[:length]:
            times += 1
        size = sum(map(len, forms[:length]))
        saved = size * (times - 1) - (size > 1)
        if saved > most and times > 1 and (size > 1 or times > 2):
            best, most = (length, times), saved
    return best
