"""A line on the terminal while a function compiles for seconds, and one that says how long it took.

There is nothing of what takes less than a second, and nothing where no terminal is.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar

_PATIENCE = 1.0
"""Seconds before there is a line."""

_EVERY = 0.2

BUILDS = "of C++"
"""How the stages end in which the C++ compiler runs."""

_stage: ContextVar[list[str] | None] = ContextVar("_stage", default=None)


def stage(what: str) -> None:
    """Say what is being done now."""
    if (said := _stage.get()) is not None:
        said.append(what)


@contextlib.contextmanager
def shown(name: str) -> Iterator[None]:
    """Show how long the function of this name has been compiling, and at what stage it is.

    When it is done, a line stays that says how long it took, and whether the program was on disk.
    """
    terminal = sys.stderr
    if terminal is None or not terminal.isatty():
        yield
        return
    start, done, said = time.monotonic(), threading.Event(), [""]

    def write(what: str) -> None:
        # To the start of the line, and clear it.
        terminal.write(f"\r\033[K{what}")
        terminal.flush()

    def show() -> None:
        patience = _PATIENCE
        while not done.wait(patience):
            write(f"{name} compiles, {time.monotonic() - start:.0f} s: {said[-1]}")
            patience = _EVERY

    thread = threading.Thread(target=show, name="funcnet-progress", daemon=True)
    thread.start()
    token = _stage.set(said)
    last = ""
    try:
        yield
        was_kept = not any([what.endswith(BUILDS) for what in said])
        verb = "loaded from the cache" if was_kept else "compiled"
        last = f"{name} {verb} in {time.monotonic() - start:.1f} s\n"
    finally:
        _stage.reset(token)
        done.set()
        thread.join()
        if time.monotonic() - start >= _PATIENCE:
            write(last)
