"""Files that are whole at any moment: written aside, synced, renamed."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from funcnet import file_locks
from funcnet.checkpoint.direct import Sink, opened

_BUFFER = 2**17
"""Small tensors are written together, great ones without a copy."""


def check_path(name: str, path: Any) -> None:
    """Raise TypeError, before anything is done, for what is no path."""
    if not isinstance(path, (str, os.PathLike)):
        got = type(path).__name__
        raise TypeError(f"{name}: expects a path as its first argument, got {got}")


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of ``path`` when all of it is on the disk.

    Whatever happens before leaves ``path`` as it was, and nothing beside it; a process that is
    killed leaves a file ``.NAME.*.part``, which the next one that writes here removes. The file has
    the permissions of the one that it replaces, or those of any new file.
    """
    path = Path(os.path.realpath(path))  # a link stays, as for any program that writes to it
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    _remove_left_behind(path)
    file, aside = _file_aside(path)
    try:
        with file:
            yield file
            with contextlib.suppress(OSError):
                os.chmod(aside, stat.S_IMODE(path.stat().st_mode))
            _sync(file)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def synced(path: Path) -> Iterator[Sink]:
    """A new file to write to, which is on the disk when it is closed."""
    with opened(path, _BUFFER) as file:
        yield file


def locked(path: Path) -> AbstractContextManager[None]:
    """A block that one process of those that share a folder has to itself, for ``path``.

    Raises:
        BlockingIOError: another one is in it.
    """
    return file_locks.locked(path.with_name(f"{_prefix(path)}lock"))


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if os.name == "nt":  # where a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system that cannot: its names are on the disk
            os.fsync(handle)
    finally:
        os.close(handle)


def _prefix(path: Path) -> str:
    return f".{path.name[:60]}."  # a name has at most 255 bytes


def _file_aside(path: Path) -> tuple[IO[bytes], Path]:
    """A new file, locked as long as it is open: the mark that its process lives."""
    while True:
        aside = path.with_name(f"{_prefix(path)}{os.urandom(4).hex()}.part")
        file = open(aside, "xb", buffering=_BUFFER)  # noqa: SIM115
        with contextlib.suppress(OSError):  # a file system without locks
            file_locks.lock(file)
        if aside.exists():  # else another process took it for one left behind, before the lock
            return file, aside
        file.close()


def _remove_left_behind(path: Path) -> None:
    """Remove what processes that were killed while they wrote ``path`` left behind."""
    if not file_locks.CAN_LOCK:
        return
    names = [name for name in os.listdir(path.parent) if name.startswith(_prefix(path))]
    for name in names:
        left = path.with_name(name)
        if left.suffix == ".part":
            with contextlib.suppress(OSError), open(left, "rb") as file:
                file_locks.lock(file)
                left.unlink()
