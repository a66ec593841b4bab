"""The header that each program includes, parsed once a machine.

It is PyTorch's vectors and what these include, 200,000 lines. g++ takes 1.4 s to parse them, and
0.2 s to load what it has parsed: a file of 150 MB, made in 4 s. ``python -m funcnet.compiler``
makes it; so does a process that has compiled a program, at the lowest priority, while it goes on,
unless FUNCNET_CACHE_DIR names another cache folder.
"""

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from funcnet.compiler import cache
from funcnet.compiler.errors import BuildError

_HEADER = "#include <torch/csrc/inductor/cpp_prefix.h>\n"
_MINUTE = 60
_MONTH = 30 * 24 * 60 * _MINUTE
_started: set[str] = set()
_refused: set[str] = set()


def flags(name: str) -> list[str]:
    """The flags with which g++ loads the header of this name, if it is there."""
    for folder in cache.folders() if name and name not in _refused else []:
        header = folder / f"{name}.h"
        if cache.is_own(header) and cache.is_own(_parsed(header)):
            with contextlib.suppress(OSError):
                os.utime(_parsed(header))
            return ["-include", str(header)]
    return []


def refuse(name: str) -> None:
    """Have this process do without a header with which g++ failed."""
    _refused.add(name)


def make(name: str, command: Sequence[str]) -> Path:
    """Have g++, called so, parse the header.

    Raises:
        BuildError: g++ failed.
        OSError: it cannot be kept.
    """
    header = cache.cache_dir() / f"{name}.h"
    with _parsing(header, command) as process:
        _, said = process.communicate()
        if process.returncode:
            raise BuildError(f"{command[0]} failed:\n{said.strip()[-2000:]}")
    return _parsed(header)


def make_later(name: str, command: Sequence[str]) -> None:
    """Have it made while this process goes on; what is not done at its end is given up.

    Only in the user's cache folder: one that was chosen gets no 150 MB unasked.
    """
    if name in _started or cache.is_chosen():
        return
    _started.add(name)

    def work() -> None:
        with contextlib.suppress(OSError, BuildError):
            make(name, command)

    threading.Thread(target=work, name="funcnet-prefix", daemon=True).start()


@contextlib.contextmanager
def _parsing(header: Path, command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Write the header, and what g++ made of it when it is done."""
    # As `cache` names what is not whole yet, and removes it if its process was killed.
    part = header.parent / f".{header.stem}.part"
    if part.exists() and time.time() - part.stat().st_mtime < _MINUTE:
        raise FileExistsError(f"another process is making {header}")
    for old in header.parent.glob("prefix-*.gch"):
        if time.time() - old.stat().st_mtime > _MONTH:
            old.unlink()
    header.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    header.write_text(_HEADER)
    part.touch(mode=0o600)
    nice = [found, "-n", "19"] if (found := shutil.which("nice")) else []
    whole = [*nice, *command, "-x", "c++-header", str(header), "-o", str(part)]
    # A group of its own, so that what g++ starts ends with it.
    process = subprocess.Popen(
        whole,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def end() -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        part.unlink(missing_ok=True)

    atexit.register(end)
    try:
        yield process
        part.chmod(0o600)
        os.replace(part, _parsed(header))
    finally:
        atexit.unregister(end)
        end()


def _parsed(header: Path) -> Path:
    """Where g++ looks for what it has parsed."""
    return header.with_suffix(".h.gch")
