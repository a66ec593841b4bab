"""Why a function cannot be one program, as exceptions and warnings."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch


class UnsupportedError(Exception):
    """A graph that cannot be one C++ program, and why: it runs by `Staged` instead."""


class NoKernelError(UnsupportedError):
    """Operators of a graph for which there is no kernel: a program calls them through PyTorch."""

    def __init__(self, nodes: Sequence[Any], why: object) -> None:
        super().__init__(str(why))
        self.nodes = nodes


class UnknownTorchError(UnsupportedError):
    """Private functions of this PyTorch are not those that the compiler knows."""


class NoCompilerError(RuntimeError):
    """This machine has no C++ compiler."""


class BuildError(RuntimeError):
    """A program could not be compiled or loaded, and why."""


class UnsafeCacheError(RuntimeError):
    """Others could have written the programs in the cache folder, or could change them."""


_said: set[str] = set()


def say_once(what: str, why: object) -> None:
    """A warning that this process gives a single time."""
    if what not in _said:
        _said.add(what)
        warnings.warn(f"{what}: {why}", RuntimeWarning, stacklevel=2)


def say_unknown(instead: str, error: Exception) -> None:
    """Warn once that the compiler failed in a way that only another PyTorch explains."""
    say_once(
        f"jit: its compiler does not know PyTorch {torch.__version__}, so that {instead}",
        f"{type(error).__name__}: {error}",
    )
