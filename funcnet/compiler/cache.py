"""Compiled programs on disk, for other processes: whole, or not at all.

A file ends with the SHA-256 of all that stands before it, is written aside, and renamed when the
disk has it. What is cut, overwritten or in the wrong place does not match and is made anew. Nothing
is loaded that somebody else could have written.
"""

import contextlib
import hashlib
import os
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_DIGEST = hashlib.sha256().digest_size
_HOUR = 60 * 60
_said: set[str] = set()


def cache_dir() -> Path:
    """Where compiled programs are kept: ``FUNCNET_CACHE_DIR``, or the user's cache folder."""
    if chosen := os.environ.get("FUNCNET_CACHE_DIR"):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "funcnet"


def find(name: str) -> Path | None:
    """The file of this name, if it is there, whole, and no one else can write to it."""
    with contextlib.suppress(OSError, RuntimeError):
        path = cache_dir() / name
        if _is_ours(path.parent) and _is_ours(path) and content(path) is not None:
            return path
    return None


def content(path: Path) -> bytes | None:
    """What was kept in a file; None if it is not whole."""
    found = path.read_bytes()
    kept, digest = found[:-_DIGEST], found[-_DIGEST:]
    return kept if hashlib.sha256(kept).digest() == digest else None


def keep(name: str, kept: bytes) -> Path | None:
    """Write a file; None, and once a warning that says why, where that cannot be done."""
    try:
        path = cache_dir() / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(path.parent):
            raise PermissionError(f"others can write to it: chmod go-w {path.parent}")
        with _written_aside(path) as file:
            file.write(kept + hashlib.sha256(kept).digest())
    except (OSError, RuntimeError) as error:
        say_once(
            f"jit: compiled programs cannot be kept in {_name_of_folder()}, so that each process "
            "compiles them again; name another folder in FUNCNET_CACHE_DIR",
            error,
        )
        return None
    return path


@contextlib.contextmanager
def _written_aside(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name when all of it is on the disk."""
    for left in path.parent.glob(".*.part"):
        # A process that was killed while it wrote left it behind.
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _HOUR:
                left.unlink()
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.is_dir():
            path.rmdir()
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise


def _is_ours(path: Path) -> bool:
    """Whether a file or folder is this user's, or root's, and nobody else can write to it."""
    if not hasattr(os, "geteuid"):  # Windows
        return path.exists()
    found = path.stat()
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return found.st_uid in (os.geteuid(), 0) and not others


def _name_of_folder() -> str:
    try:
        return str(cache_dir())
    except RuntimeError:  # this user has no home
        return "the user's cache folder"


def say_once(what: str, why: object) -> None:
    """A warning that this process gives a single time."""
    if what not in _said:
        _said.add(what)
        warnings.warn(f"{what}: {why}", RuntimeWarning, stacklevel=2)
