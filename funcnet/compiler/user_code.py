"""Where in the user's own code an operator comes from, for errors and for what `lower` says."""

import ast
import functools
import linecache
import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import optree
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_FOLDERS = (
    Path(__file__).parents[1],
    *(Path(str(each.__file__)).parent for each in (torch, optree)),
)
_LIBRARIES = tuple([os.path.join(folder, "") for folder in _FOLDERS])
_STANDARD = os.path.join(os.path.dirname(os.__file__), "")
# What is installed lies in a folder within that of the standard library.
_INSTALLED = tuple(
    [os.path.join(_STANDARD, name, "") for name in ("site-packages", "dist-packages")]
)


class Line(NamedTuple):
    """A line of a file.

    >>> str(Line("train.py", 12, "return x.nonzero()"))
    'train.py:12: return x.nonzero()'
    """

    file: str
    number: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number}: {self.text}".removesuffix(": ")


@functools.cache
def is_library(file: str) -> bool:
    """Whether a file is torch's or funcnet's."""
    return file.startswith(_LIBRARIES)


@functools.cache
def is_users(file: str) -> bool:
    """Whether a file is neither torch's, nor funcnet's, nor of Python's standard library."""
    if is_library(file) or file.startswith("<frozen"):
        return False
    return file.startswith(_INSTALLED) or not file.startswith(_STANDARD)


def is_users_frame(frame: FrameType) -> bool:
    """Whether a function is the user's, and none that torch makes of a text."""
    return is_users(frame.f_code.co_filename) and "__name__" in frame.f_globals


def calling_frame() -> FrameType | None:
    """The user's function that is being run; None if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_users_frame(frame):
        frame = frame.f_back
    return frame


def calling_line() -> Line | None:
    """The line of the user's code that is being run; None if there is none."""
    frame = calling_frame()
    if frame is None:
        return None
    file, number = frame.f_code.co_filename, frame.f_lineno
    return Line(file, number, linecache.getline(file, number, frame.f_globals).strip())


def at_line() -> str:
    """The line of the user's code that is being run, for the end of an error's message."""
    line = calling_line()
    return f"\n  {line}" if line else ""


def enclosing(frame: FrameType) -> list[ast.AST]:
    """The expression that a function is computing, then what is around it, outwards.

    It is empty where there is no source, as for functions that `exec` made.
    """
    try:
        positions = [*frame.f_code.co_positions()][frame.f_lasti // 2]
        first, last, start, end = positions
        lines = linecache.getlines(frame.f_code.co_filename, frame.f_globals)
        tree = ast.parse("".join(lines))
    except (IndexError, SyntaxError, ValueError):
        return []
    if first is None or last is None or start is None or end is None:
        return []
    return _around(tree, (first, start), (last, end))


def _around(node: ast.AST, start: tuple[int, int], end: tuple[int, int]) -> list[ast.AST]:
    """The innermost node that has these two places in it, then what is around it."""
    for child in ast.iter_child_nodes(node):
        found = []
        if not hasattr(child, "lineno"):  # such as what stands for the arguments of a function
            inside = _around(child, start, end)
            found = inside if len(inside) > 1 else []
        elif _start(child) <= start and end <= _end(child):
            found = _around(child, start, end)
        if found:
            return [*found, node]
    return [node]


def _start(node: Any) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _end(node: Any) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset


_LINE, _ORIGIN = "funcnet_line", "funcnet_origin"


def note_line(line: Line | None, origin: fx.Node | None = None) -> None:
    """Note where the operators come from that were recorded since the last call."""
    mode = get_proxy_mode()
    for node in () if mode is None else reversed(mode.tracer.graph.nodes):
        if node.op in ("root", "placeholder") or _LINE in node.meta:
            break
        node.meta[_LINE], node.meta[_ORIGIN] = line, origin


def line_of(node: fx.Node) -> Line | None:
    """The line of the user's code from which an operator was recorded."""
    return node.meta.get(_LINE)


def origin_of(node: fx.Node) -> fx.Node | None:
    """The node of which this one was made when a graph was recorded again."""
    return node.meta.get(_ORIGIN)


class Rerecorded(fx.Interpreter):
    """Runs a graph again under ``make_fx``; what is recorded knows the line and the node before."""

    def run_node(self, node: fx.Node) -> object:
        result = super().run_node(node)
        note_line(line_of(node), node)
        return result
