"""Checkpoints of several files: their names, and what is removed when another one takes over."""

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path


def index_of(path: Path) -> Path:
    """``run.safetensors.index.json`` for ``run.safetensors``."""
    return path.with_name(f"{path.name}.index.json")


def new_save() -> str:
    """What the names of the files of one save have in common."""
    return os.urandom(4).hex()


def shard_paths(path: Path, count: int, save: str | None = None) -> list[Path]:
    """New files for the parts of ``path``: none that the index there now names."""
    save = save or new_save()
    return [
        path.with_name(f"{path.stem}-{save}-{number:05}-of-{count:05}{path.suffix}")
        for number in range(1, count + 1)
    ]


def remove_shards(path: Path, kept: Iterable[Path]) -> None:
    """Remove the parts of ``path`` from before and, if no part is kept, its index.

    Of a save that was killed as well. A file that another program wrote has no such name.
    """
    kept = [*kept]
    if not kept:
        with contextlib.suppress(OSError):
            index_of(path).unlink()
    for part in old_shards(path, kept):
        with contextlib.suppress(OSError):
            part.unlink()


def old_shards(path: Path, kept: Iterable[Path]) -> list[Path]:
    """The parts of ``path`` that are there, but for those that are kept."""
    names = {part.name for part in kept}
    stem, suffix = re.escape(path.stem), re.escape(path.suffix)
    part = re.compile(rf"{stem}-[0-9a-f]{{8}}-\d{{5,}}-of-\d{{5,}}{suffix}")
    with contextlib.suppress(OSError):
        there = os.listdir(path.parent)
        return [path.with_name(n) for n in there if part.fullmatch(n) and n not in names]
    return []
