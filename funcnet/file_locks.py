"""Locks of files, between processes of one machine. A lock goes with its process."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

if sys.platform != "win32":
    import fcntl

CAN_LOCK = sys.platform != "win32"


def lock(file: IO[bytes], *, wait: bool = False) -> None:
    """Lock an open file until it is closed; nothing on Windows.

    Raises:
        BlockingIOError: another process has the lock, and this one does not ``wait``.
        OSError: the file system has no locks.
    """
    if sys.platform != "win32":
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """A block that one process at a time has to itself; the file is there as long.

    Where there are no locks, as on Windows, the block runs without one.

    Raises:
        BlockingIOError: another process is in it, and this one does not ``wait``.
        OSError: the file cannot be made.
    """
    while CAN_LOCK:
        with open(path, "ab") as file:
            try:
                lock(file, wait=wait)
            except BlockingIOError:
                raise
            except OSError:  # a file system without locks
                break
            if not _is_at(path, file):
                continue  # the one who had it has just removed it
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    path.unlink()
            return
    yield


def _is_at(path: Path, file: IO[bytes]) -> bool:
    try:
        return path.stat().st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False
