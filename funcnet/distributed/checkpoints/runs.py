"""The checkpoints of a run, and one file for other programs."""

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funcnet.checkpoint import safetensors
from funcnet.checkpoint.files import check_path, replaced
from funcnet.checkpoint.folder import RunFolder, latest as newest, remove_old, step_path
from funcnet.checkpoint.loading import explained, open_checkpoint
from funcnet.checkpoint.parted import Stored
from funcnet.checkpoint.regions import Range, piece_of
from funcnet.checkpoint.saving import check_size, unchanged
from funcnet.checkpoint.shards import remove_shards
from funcnet.checkpoint.structure import encode
from funcnet.distributed.checkpoints.agreement import everyone
from funcnet.distributed.checkpoints.loading import load
from funcnet.distributed.checkpoints.saving import write
from funcnet.distributed.processes.start import Mesh
from funcnet.parted_params import Splits

_NUMBERS = 2**22
"""How many numbers of a tensor are copied at once."""


def save_step(
    folder: str | os.PathLike[str],
    step: int | Tensor,
    tree: Any,
    mesh: Mesh,
    placed: Mapping[str, Splits] | None = None,
    *,
    keep: int | None = 3,
    score: float | Tensor | None = None,
) -> Path:
    """`save` as one of a run's checkpoints, and then remove those that are not to be kept.

    `funcnet.checkpoint.steps` and `funcnet.checkpoint.best` know them, as they do those of
    `funcnet.checkpoint.save_step`; `latest` is for all ranks.

    Args:
        folder: of this run alone, and one that all ranks share.
        step, keep, score: as for `funcnet.checkpoint.save_step`, and the same on all ranks.
        tree, mesh, placed: as for `save`.

    Returns:
        The path of the checkpoint, for `load`.

    Raises:
        as `save`.
        ValueError: there is a checkpoint of a later step, which is another run's.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for step in range(5):
    ...         _ = save_step(folder, step, {"step": torch.tensor(step)}, {"data": 1}, keep=2)
    ...     [*fn.checkpoint.steps(folder)], latest(folder, {"data": 1}).name
    ([3, 4], 'step_0000000004.safetensors')
    """
    ranks = everyone(mesh)
    first = ranks.place == 0

    def check() -> tuple[Path, str]:
        check_path("save_step", folder)
        path = step_path("save_step", folder, step, keep, there=first)
        return path, path.name

    def remove() -> tuple[None, None]:
        if first:
            remove_old(path.parent, keep)
        return None, None

    path, _ = ranks.agree("save_step", check)
    value = None if score is None else float(score)
    write("save_step", path, tree, mesh, placed, value)
    ranks.agree("save_step", remove)
    return path


def latest(folder: str | os.PathLike[str], mesh: Mesh) -> Path | None:
    """The path of the last whole checkpoint of `save_step`; None if there is none.

    One rank looks, and all have its answer: they go on from the same step.

    >>> latest("a/new/run", {"data": 1}) is None
    True
    """
    ranks = everyone(mesh)

    def look() -> tuple[None, str | None]:
        check_path("latest", folder)
        found = newest(folder) if ranks.place == 0 else None
        return None, None if found is None else found.name

    _, names = ranks.agree("latest", look)
    return None if names[0] is None else Path(folder) / names[0]


def run_folder(
    folder: str | os.PathLike[str], mesh: Mesh, placed: Mapping[str, Splits]
) -> RunFolder:
    """The checkpoints of a run on several ranks, for `funcnet.fit`.

        fn.fit(step, state, batches, checkpoint=fn.distributed.run_folder("run", mesh, placed))

    They are those of `save_step`: another number of ranks, another layout or a single process can
    go on from them. Each rank writes its parts of the train state; the history and the values of
    early stopping are the first rank's, and all ranks have them after ``resume=True``.

    Args:
        folder: of this run alone, and one that all ranks share.
        mesh: of all ranks of the run. Runs that have nothing to do with one another, each of one
            process in a folder of its own, have ``{"data": 1}``.
        placed: how the leaves of the train state are parted, as `state_placements` gives it.

    Raises:
        as `save_step`, `latest` and `load`.

    >>> import tempfile
    >>> net, x, mesh = fn.linear(1), torch.ones(4, 2), {"data": 1}
    >>> optimizer = fn.distributed.zero(fn.adam(), mesh)
    >>> start = fn.init_train_state(net, optimizer, fn.key(0), x)
    >>> placed = fn.distributed.state_placements(start, net, x)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     state, _ = fn.fit(
    ...         fn.train_step(net, fn.mse(), optimizer), start, [(x, torch.ones(4, 1))], epochs=3,
    ...         checkpoint=run_folder(folder, mesh, placed),
    ...     )
    ...     [*fn.checkpoint.steps(folder)]
    [1, 2, 3]
    """
    first = everyone(mesh).place == 0

    def save(
        step: int | Tensor, tree: Mapping[str, Any], *, keep: int | None, score: float | None
    ) -> Path:
        own = tree if first else {name: tree[name] for name in tree if name not in _FIRST}
        below = {f"train_state.{path}": splits for path, splits in placed.items()}
        return save_step(folder, step, own, mesh, below, keep=keep, score=score)

    def read(path: Path, like: Any, *, at: str) -> Any:
        return load(path, like, mesh, placed if at == "train_state" else {}, at=at)

    return RunFolder(partial(latest, folder, mesh), save, read)


_FIRST = ("history", "early_stopping")
"""What the first rank alone writes of a run: losses may be of a rank's own part of the batch."""


def export(checkpoint: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Write one safetensors file of a checkpoint in several, whatever the ranks that saved it.

    It needs one process and little memory: some numbers are copied at a time.
    `funcnet.load`, and any program that knows the format, read the file.

    Args:
        checkpoint: as `save` was given it.
        path: the file, which is written as `funcnet.save` does.

    Raises:
        ValueError: no checkpoint, or a damaged one.
        OSError, such as of a full disk.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fn.distributed.save(f"{folder}/run", {"w": torch.ones(2)}, {"data": 1})
    ...     fn.distributed.export(f"{folder}/run", f"{folder}/net.safetensors")
    ...     fn.load(f"{folder}/net.safetensors")
    {'w': tensor([1., 1.])}
    """
    check_path("export", checkpoint)
    check_path("export", path)
    source, target = Path(checkpoint), Path(path)
    tensors, structure = open_checkpoint(source)

    def numbers(name: str) -> Iterator[Tensor]:
        with explained(source):
            yield from _in_turn(tensors[name])

    text = encode(structure)
    check_size(tensors, text)
    try:
        with replaced(target) as file:
            layout = {name: _on_meta(stored) for name, stored in tensors.items()}
            safetensors.write(file, layout, {"format": "pt", "funcnet": text}, numbers)
        remove_shards(target, kept=())
    except OSError as error:
        raise unchanged("export", target, error) from error


def _on_meta(stored: Stored) -> Tensor:
    """A tensor of the dtype and shape that the file has."""
    made = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
    return torch.view_as_real(made) if made.is_complex() and made.itemsize == 16 else made


def _in_turn(stored: Stored) -> Iterator[Tensor]:
    """All numbers of a tensor, some at a time."""
    whole = piece_of(stored.shape, (), ())
    for begin in range(0, whole.length, _NUMBERS):
        end = min(begin + _NUMBERS, whole.length)
        yield stored.read(whole._replace(outer=Range(begin, end, end - begin)))
