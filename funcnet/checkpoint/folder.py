"""A folder with the last checkpoints of a run, and the best one."""

import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from funcnet.checkpoint.loading import load, open_checkpoint
from funcnet.checkpoint.saving import write
from funcnet.checkpoint.shards import remove_shards
from funcnet.checkpoint.structure import Structure
from funcnet.errors import require


class RunFolder(NamedTuple):
    """A folder of a run's checkpoints, as `funcnet.fit` writes and reads it: three functions.

    `run_folder` makes it for one process, `funcnet.distributed.run_folder` for several.

    >>> run_folder("a/new/run").latest() is None
    True
    """

    latest: Callable[[], Path | None]
    """``latest() -> path`` of the last whole checkpoint; None if there is none."""

    save: Callable[..., Path]
    """``save(step, tree, *, keep, score) -> path``, as `save_step`. The tree is a dict, with the
    train state at "train_state"."""

    load: Callable[..., Any]
    """``load(path, like, *, at) -> tree``, as `load`, of one entry of the dict that was saved."""


_NAME = re.compile(r"step_(\d+)\.safetensors(?:\.index\.json)?")


def save_step(
    folder: str | os.PathLike[str],
    step: int | Tensor,
    tree: Any,
    *,
    keep: int | None = 3,
    score: float | Tensor | None = None,
    max_shard_bytes: int | None = None,
    checksum: bool = False,
) -> Path:
    """`save` as one of a run's checkpoints, and then remove those that are not to be kept.

    Args:
        folder: of this run alone. It is made if it is not there.
        step: the number of the step, which names the file.
        tree: what is saved, such as the train state.
        keep: how many of the last ones are kept, beside the best; None for all.
        score: the less, the better, such as the loss on validation data. It is saved too.
        max_shard_bytes, checksum: as in `save`.

    Returns:
        The path of the checkpoint, for `load`.

    Raises:
        as `save`.
        ValueError: there is a checkpoint of a later step, which is another run's.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for step, loss in enumerate([0.5, 0.1, 0.4, 0.3]):
    ...         _ = fn.checkpoint.save_step(folder, step, {}, keep=2, score=loss)
    ...     [*fn.checkpoint.steps(folder)], fn.checkpoint.best(folder).name
    ([1, 2, 3], 'step_0000000001.safetensors')
    """
    path = step_path("save_step", folder, step, keep)
    score = None if score is None else float(score)
    write(path, tree, max_shard_bytes=max_shard_bytes, checksum=checksum, score=score)
    remove_old(path.parent, keep)
    return path


def run_folder(folder: str | os.PathLike[str]) -> RunFolder:
    """The checkpoints of a run of one process.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = run_folder(folder)
    ...     path = run.save(3, {"train_state": torch.ones(2)}, keep=1, score=None)
    ...     run.load(path, torch.zeros(2), at="train_state")
    tensor([1., 1.])
    """
    return RunFolder(partial(latest, folder), partial(save_step, folder), load)


def step_path(
    name: str,
    folder: str | os.PathLike[str],
    step: int | Tensor,
    keep: int | None,
    *,
    there: bool = True,
) -> Path:
    """The path of a step's checkpoint, after what `save_step` is given is checked.

    ``there``: whether to look into the folder.
    """
    folder, step = Path(folder), int(step)
    require(step >= 0, f"{name}: step must be >= 0, got {step}")
    require(keep is None or keep >= 1, f"{name}: keep must be >= 1, got {keep}")
    later = [other for other in steps(folder) if other > step] if there else []
    require(
        not later,
        f"{name}: {folder} has the later step {later and later[-1]}, of another run: take "
        "another folder, or remove it",
    )
    return folder / f"step_{step:010}.safetensors"


def remove_old(folder: Path, keep: int | None) -> None:
    """Remove the checkpoints but for the last ones, and the best."""
    there = steps(folder)
    kept = {*list(there)[-(keep or 0) :], _best(there)}
    for other, old in there.items():
        if other not in kept:
            old.unlink(missing_ok=True)
            remove_shards(old, kept=())


def steps(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """The paths of the checkpoints of `save_step`, by step, the last one last.

    What is cut, or not complete, is left out.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for step in (10, 20):
    ...         _ = fn.checkpoint.save_step(folder, step, {}, score=step)
    ...     {step: path.name for step, path in fn.checkpoint.steps(folder).items()}
    {10: 'step_0000000010.safetensors', 20: 'step_0000000020.safetensors'}
    """
    folder = Path(folder)
    names = os.listdir(folder) if folder.is_dir() else []
    found = {int(match[1]) for match in map(_NAME.fullmatch, names) if match}
    paths = {step: folder / f"step_{step:010}.safetensors" for step in sorted(found)}
    return {step: path for step, path in paths.items() if _structure(path) is not None}


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The path of the last whole checkpoint of `save_step`; None if there is none.

    >>> fn.checkpoint.latest("a/new/run") is None
    True
    """
    return next(reversed(steps(folder).values()), None)


def best(folder: str | os.PathLike[str]) -> Path | None:
    """The path of the checkpoint of `save_step` with the least score; None if none has one.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for step, loss in enumerate([0.5, 0.1, 0.4]):
    ...         _ = fn.checkpoint.save_step(folder, step, {}, score=loss)
    ...     fn.checkpoint.best(folder).name
    'step_0000000001.safetensors'
    """
    there = steps(folder)
    step = _best(there)
    return None if step is None else there[step]


def _best(there: dict[int, Path]) -> int | None:
    scores = {
        step: structure.score for step, path in there.items() if (structure := _structure(path))
    }
    known = {step: s for step, s in scores.items() if s is not None and not math.isnan(s)}
    return min(known, key=lambda step: known[step], default=None)


def _structure(path: Path) -> Structure | None:
    """What a checkpoint has beside its tensors; None if it is not whole, or not there."""
    try:
        return open_checkpoint(path)[1]
    except (OSError, ValueError):
        return None
