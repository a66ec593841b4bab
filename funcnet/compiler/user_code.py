"""Where in the user's own code an operator comes from, for errors and for what `lower` says."""

import functools
import linecache
import os
import sys
import sysconfig
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import optree
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode

_FOLDERS = (
    Path(__file__).parents[1],
    *(Path(str(each.__file__)).parent for each in (torch, optree)),
)
_LIBRARIES = tuple([os.path.join(folder, "") for folder in _FOLDERS])
_STANDARD = os.path.join(sysconfig.get_path("stdlib"), "")
# These lie in the folder of the standard library.
_PACKAGES = tuple([os.path.join(sysconfig.get_path(name), "") for name in ("purelib", "platlib")])


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
def is_users(file: str) -> bool:
    """Whether a file is neither torch's, nor funcnet's, nor of Python's standard library."""
    if file.startswith(_LIBRARIES) or file.startswith("<frozen"):
        return False
    return file.startswith(_PACKAGES) or not file.startswith(_STANDARD)


def calling_line() -> Line | None:
    """The line of the user's code that is being run; None if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return None
    file, number = frame.f_code.co_filename, frame.f_lineno
    return Line(file, number, linecache.getline(file, number, frame.f_globals).strip())


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
