"""A line on the terminal while a function compiles for seconds; nothing anywhere else."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar

_PATIENCE = 1.0
"""Seconds before there is a line."""

_EVERY = 0.2

_stage: ContextVar[list[str] | None] = ContextVar("_stage", default=None)


def stage(what: str) -> None:
    """Say what is being done now."""
    if (said := _stage.get()) is not None:
        said[:] = [what]


@contextlib.contextmanager
def shown(name: str) -> Iterator[None]:
    """Show how long the function of this name has been compiling, and at what stage it is."""
    terminal = sys.stderr
    if terminal is None or not terminal.isatty():
        yield
        return
    start, done, said = time.monotonic(), threading.Event(), [""]

    def show() -> None:
        patience, is_shown = _PATIENCE, False
        while not done.wait(patience):
            seconds = time.monotonic() - start
            # To the start of the line, and clear it.
            terminal.write(f"\r\033[K{name} compiles, {seconds:.0f} s: {said[0]}")
            terminal.flush()
            patience, is_shown = _EVERY, True
        if is_shown:
            terminal.write("\r\033[K")
            terminal.flush()

    thread = threading.Thread(target=show, name="funcnet-progress", daemon=True)
    thread.start()
    token = _stage.set(said)
    try:
        yield
    finally:
        _stage.reset(token)
        done.set()
        thread.join()
