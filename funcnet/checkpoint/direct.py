"""Files that are written past the system's cache of files.

Of a checkpoint nothing is read soon. Two processes that write 512 MB each, and wait for the disk,
take 0.7 of the time so, here, and as much memory less:
python -m tests.benchmarks.distributed_checkpoints
"""

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_SIZE = 2**23
"""Of the memory from which the disk takes bytes, which has to lie at a multiple of its blocks."""

_BLOCK = 2**12


class Sink(Protocol):
    """What bytes are written to."""

    def write(self, data: Any, /) -> Any:
        """Take all of the bytes."""


@contextlib.contextmanager
def opened(path: Path, buffering: int) -> Iterator[Sink]:
    """A new file to write to, which is on the disk when it is closed.

    Where the system cannot write past its cache, it is written as any file is.
    """
    handle = _open_direct(path)
    if handle is None:
        with open(path, "xb", buffering=buffering) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        return
    try:
        direct = _Direct(handle)
        yield direct
        direct.finish()
        os.fsync(handle)
    finally:
        os.close(handle)


def _open_direct(path: Path) -> int | None:
    flag = getattr(os, "O_DIRECT", 0)
    if not flag or fcntl is None:
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | flag, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        with contextlib.suppress(FileNotFoundError):  # that a file system may leave
            path.unlink()
        return None


class _Direct:
    def __init__(self, handle: int) -> None:
        self._handle, self._memory, self._filled = handle, mmap.mmap(-1, _SIZE), 0

    def write(self, data: Any, /) -> None:
        left = memoryview(data).cast("B")
        while left:
            count = min(len(left), _SIZE - self._filled)
            self._memory[self._filled : self._filled + count] = left[:count]
            self._filled, left = self._filled + count, left[count:]
            if self._filled == _SIZE:
                self._put(0, _SIZE)
                self._filled = 0

    def finish(self) -> None:
        """Write what is left: blocks, and then what is no whole one as any file's bytes."""
        blocks = self._filled // _BLOCK * _BLOCK
        self._put(0, blocks)
        flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
        fcntl.fcntl(self._handle, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._put(blocks, self._filled)

    def _put(self, begin: int, end: int) -> None:
        with memoryview(self._memory) as memory:
            while begin < end:
                begin += os.write(self._handle, memory[begin:end])
