"""Compiled programs on disk, for other processes: whole, or not at all.

A file ends with the SHA-256 of what comes before, is written under another name, and renamed when
the disk has it. One that is cut or overwritten does not match and is made anew. Programs are only
loaded from a folder, and from files, that no other user can write to.
"""

import contextlib
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from funcnet.compiler.errors import UnsafeCacheError, say_once
from funcnet.file_locks import locked

_DIGEST = hashlib.sha256().digest_size
_HOUR = 60 * 60
_ROOT = 0


def cache_dir() -> Path:
    """Where compiled programs are kept: ``FUNCNET_CACHE_DIR``, or the user's cache folder."""
    if chosen := os.environ.get("FUNCNET_CACHE_DIR"):
        return Path(chosen)
    return _users()


def is_chosen() -> bool:
    """Whether `cache_dir` is named in ``FUNCNET_CACHE_DIR``."""
    return bool(os.environ.get("FUNCNET_CACHE_DIR"))


def _users() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "funcnet"


def folders() -> list[Path]:
    """Where to look for what serves all programs: `cache_dir`, then the user's cache folder."""
    found: list[Path] = []
    with contextlib.suppress(RuntimeError):  # this user has no home
        found.append(cache_dir())
        found.append(_users())
    return found


def is_own(path: Path) -> bool:
    """Whether a file is there, and no one else can write to it or to its folder."""
    try:
        return not _others(path) and not _others(path.parent)
    except OSError:
        return False


def find(name: str) -> Path | None:
    """The file of this name, if it is there, whole, and no one else can write to it.

    Raises:
        UnsafeCacheError: others can write to the folder.
    """
    try:
        path = cache_dir() / name
    except RuntimeError:  # this user has no home
        return None
    with contextlib.suppress(OSError):
        _check_folder(path.parent)
        if not _others(path) and content(path) is not None:
            return path
    return None


def content(path: Path) -> bytes | None:
    """What was kept in a file; None if it is not whole."""
    found = path.read_bytes()
    kept, digest = found[:-_DIGEST], found[-_DIGEST:]
    return kept if hashlib.sha256(kept).digest() == digest else None


def find_text(name: str) -> str | None:
    """The text that was kept under this name, as `find` finds it."""
    path = find(name)
    return None if path is None else (content(path) or b"").decode()


def keep(name: str, kept: bytes) -> Path | None:
    """Write a file; None, and once a warning that says why, where that cannot be done.

    Raises:
        UnsafeCacheError: others can write to the folder.
    """
    folder = "the user's cache folder"
    try:
        path = cache_dir() / name
        folder = str(path.parent)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_folder(path.parent)
        with _written_aside(path) as file:
            file.write(kept + hashlib.sha256(kept).digest())
    except UnsafeCacheError:
        raise
    except (OSError, RuntimeError) as error:
        say_once(
            f"jit: compiled programs cannot be kept in {folder}, so that each process compiles "
            "them again; name another folder in FUNCNET_CACHE_DIR",
            error,
        )
        return None
    return path


@contextlib.contextmanager
def alone(key: str) -> Iterator[None]:
    """Wait until no other process makes what has this key: the ranks of a machine all want it.

    Where there is no folder to lock a file in, each makes its own.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, RuntimeError):
            folder = cache_dir()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _others(folder):
                stack.enter_context(locked(folder / f".{key}.lock", wait=True))
        yield


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


def _check_folder(folder: Path) -> None:
    """Raise UnsafeCacheError for a folder that others can write to, and say what to do."""
    found = _others(folder)
    if not found:
        return
    mend = f"run `chmod go-w {folder}`" if found == "others can write to it" else "do not use it"
    raise UnsafeCacheError(
        f"jit: compiled programs are not loaded from {folder}, because {found}: {mend}, or name "
        "a folder of your own in the environment variable FUNCNET_CACHE_DIR"
    )


def _others(path: Path) -> str:
    """Who else can write to a file or folder, as the end of a sentence; empty if nobody can.

    What root owns counts as the user's own.
    """
    found = path.stat()
    if not hasattr(os, "geteuid"):  # Windows
        return ""
    if found.st_uid not in (os.geteuid(), _ROOT):
        return f"it belongs to another user, number {found.st_uid}"
    return "others can write to it" if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else ""
