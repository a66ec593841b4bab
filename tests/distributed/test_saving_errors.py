"""A save that fails, or is killed, leaves the old checkpoint; an error of one rank is of all."""

import errno
import multiprocessing
import os
import random
import time

import pytest
import torch

import funcnet as fn
from distributed.ranks import free_port
from funcnet.checkpoint.files import locked
from funcnet.collectives import Split
from funcnet.distributed.checkpoints import saving


def state_of(number, mesh):
    """This rank's part of a state all of whose numbers are this one."""
    axis = fn.distributed.axis_of(mesh, "data")
    split = Split(axis, (9, 5), 0)
    tree = {
        "w": split.part(torch.full((9, 5), float(number))),
        "b": torch.full((3,), float(number)),
        "step": number,
    }
    return tree, {"w": (split,)}


def numbers(tree):
    return {float(each) for leaf in (tree["w"], tree["b"]) for each in leaf.flatten()} | {
        float(tree["step"])
    }


def told(function, *args):
    """The error of a function, as text."""
    try:
        function(*args)
    except Exception as error:
        number = f"[Errno {getattr(error, 'errno', None)}] "
        return f"{type(error).__name__}: {str(error).removeprefix(number)}"
    return "no error"


def save(path, number, fail=None, placed=True):
    mesh = fn.distributed.mesh()
    rank, synced = torch.distributed.get_rank(), saving.synced
    tree, splits = state_of(number, mesh)

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if fail == rank:
        saving.synced = full
    if fail == "index" and rank == 0:
        replaced, saving.replaced = saving.replaced, full
    if fail == "paths" and rank == 1:
        path = path.with_name("other")
    if fail == "shapes" and rank == 1:
        tree["b"] = tree["b"].double()
    if fail == "values":
        tree["step"] = rank
    if fail == "leaf" and rank == 1:
        tree["w"] = [object()]
    if fail == "parts":
        tree["w"] = tree["w"][1:]
    if fail == "unknown":
        splits = {"v": splits["w"]}
    try:
        return told(fn.distributed.save, path, tree, mesh, splits)
    finally:
        saving.synced = synced
        if fail == "index" and rank == 0:
            saving.replaced = replaced


FAULTS = {
    0: "OSError: save: rank 0: {} is as it was before: No space left on device",
    1: "OSError: save: rank 1: {} is as it was before: No space left on device",
    "index": "OSError: save: rank 0: {} is as it was before: No space left on device",
    "paths": "ValueError: save: the ranks have different paths: ['other', 'run']",
    "shapes": "ValueError: save: rank 0 has F32 (3,) at 'b', rank 1 has F64 (3,)",
    "values": "ValueError: save: 'step' is 0 on a rank, and 1 on rank 1",
    "leaf": "ValueError: save: rank 1: `placed` has ['w'], which the tree has not",
    "parts": "ValueError: save: 'w' expects a part of shape (5, 5), got (4, 5)",
    "unknown": "ValueError: save: `placed` has ['v'], which the tree has not",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_on_one_rank_is_an_error_on_all(fault, two_ranks, tmp_path):
    path = tmp_path / "run"
    assert two_ranks(save, path, 1) == ["no error"] * 2
    before = sorted(os.listdir(tmp_path))
    found = two_ranks(save, path, 2, fault)
    assert found[0] == found[1]
    assert found[0].startswith(FAULTS[fault].format(path))
    assert numbers(fn.load(path)) == {1.0}
    if fault != "index":  # of which it is not known whether it is there
        assert sorted(os.listdir(tmp_path)) == before
    assert two_ranks(save, path, 3) == ["no error"] * 2
    assert numbers(fn.load(path)) == {3.0}
    assert len(os.listdir(tmp_path)) == len(before)


def test_two_saves_at_once_are_refused(two_ranks, tmp_path):
    with locked(tmp_path / "run"):
        found = two_ranks(save, tmp_path / "run", 1)
    text = "is as it was before: another process is saving it now"
    assert found == [f"BlockingIOError: save: rank 0: {tmp_path / 'run'} {text}"] * 2
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made(two_ranks, tmp_path):
    (tmp_path / "file").write_text("")
    first, second = two_ranks(save, tmp_path / "file" / "run", 1)
    assert first == second
    assert "rank 0: " in first
    assert "is as it was before" in first


def load(path, change):
    mesh = fn.distributed.mesh()
    like, placed = state_of(0, mesh)
    if change == "missing":
        like["c"] = torch.ones(2)
    if change == "more":
        del like["b"]
    if change == "shape":
        placed = {"w": (Split(placed["w"][0].axis, (10, 5), 0),)}
    if change == "dtype":
        like["w"] = like["w"].double()
    if change == "kind":
        like["step"] = torch.tensor(1)
    if change == "rank" and torch.distributed.get_rank() == 1:
        like["b"] = torch.ones(4)
    return told(fn.distributed.load, path, like, mesh, placed)


LIKE = {
    "missing": "c: not in the file, expected float32 (2,)",
    "more": "b: float32 (3,) in the file, not expected",
    "shape": "w: float32 (9, 5) in the file, expected float32 (10, 5)",
    "dtype": "w: float32 (9, 5) in the file, expected float64 (9, 5)",
    "kind": "step: int in the file, expected int64 ()",
    "rank": "b: float32 (3,) in the file, expected float32 (4,)",
}


@pytest.mark.parametrize("change", LIKE)
def test_a_checkpoint_of_other_layers_is_an_error_on_all_ranks(change, two_ranks, tmp_path):
    path = tmp_path / "run"
    two_ranks(save, path, 1)
    found = two_ranks(load, path, change)
    message = f"ValueError: load: {path} is not like the tree `like`, a leaf differs:\n  "
    assert found == [message + LIKE[change]] * 2


def test_a_checkpoint_that_is_not_there_or_not_whole(two_ranks, tmp_path):
    found = two_ranks(load, tmp_path / "run", "")
    assert found[0] == found[1]
    assert found[0].startswith("FileNotFoundError: load: No such file")
    two_ranks(save, tmp_path / "run", 1)
    parts = sorted(tmp_path.glob("run-*"))
    parts[1].write_bytes(parts[1].read_bytes()[:-1])
    found = two_ranks(load, tmp_path / "run", "")
    assert found[0] == found[1]
    assert f"{tmp_path / 'run'} is damaged, or is no checkpoint: {parts[1].name}" in found[0]
    with pytest.raises(ValueError, match="is damaged"):
        fn.load(tmp_path / "run")


def steps(folder, score=None):
    mesh = fn.distributed.mesh()
    assert fn.distributed.latest(folder, mesh) is None
    for step in range(1, 6):
        tree, placed = state_of(step, mesh)
        path = fn.distributed.save_step(
            folder, torch.tensor(step), tree, mesh, placed, keep=2, score=abs(step - 2)
        )
        assert fn.distributed.latest(folder, mesh) == path
    found = fn.distributed.load(path, tree, mesh, placed)
    return told(fn.distributed.save_step, folder, 4, tree, mesh, placed), numbers(found)


def test_the_last_checkpoints_of_a_run_and_the_best_are_kept(two_ranks, tmp_path):
    later = f"ValueError: save_step: rank 0: {tmp_path} has the later step 5, of another run"
    for message, found in two_ranks(steps, tmp_path):
        assert message.startswith(later)
        assert found <= {0.0, 5.0}
    assert [*fn.checkpoint.steps(tmp_path)] == [2, 4, 5]
    assert fn.checkpoint.best(tmp_path).name == "step_0000000002.safetensors"
    assert len(os.listdir(tmp_path)) == 9
    fn.checkpoint.save_step(tmp_path, 6, {}, keep=1)
    assert [*fn.checkpoint.steps(tmp_path)] == [2, 6]
    assert len(os.listdir(tmp_path)) == 4


def save_on_and_on(rank, port, path, pipe):
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", **address)
    fn.distributed.initialize(device="cpu", timeout=20)
    mesh = fn.distributed.mesh()
    number = 0
    while True:
        number += 1
        fn.distributed.save(path, *reversed_(state_of(number, mesh), mesh))
        pipe.send(number)


def reversed_(pair, mesh):
    tree, placed = pair
    return tree, mesh, placed


@pytest.mark.parametrize("seed", range(6))
def test_a_rank_that_is_killed_leaves_the_old_or_the_new_checkpoint(seed, tmp_path):
    rng = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["funcnet", "torch.distributed"])
    pipes, port, path = [context.Pipe() for _ in range(2)], free_port(), tmp_path / "run"
    ranks = [
        context.Process(target=save_on_and_on, args=(rank, port, path, pipes[rank][1]), daemon=True)
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    try:
        done = pipes[0][0].recv()
        while done < 3:
            done = pipes[0][0].recv()
        time.sleep(rng.random() * 0.05)
        killed = rng.randrange(2)
        ranks[killed].kill()
        ranks[1 - killed].join(30)
        assert ranks[1 - killed].exitcode == 1  # an error, and in time
    finally:
        for process in ranks:
            process.kill()
            process.join()
    while pipes[0][0].poll():
        done = pipes[0][0].recv()
    tree = fn.load(path)
    assert len(numbers(tree)) == 1
    assert tree["step"] in (done, done + 1)
    # The next one that saves here removes what was left.
    fn.distributed.save(path, tree, {"data": 1})
    assert sorted(name.split("-")[0] for name in os.listdir(tmp_path)) == [
        "run",
        "run.index.json",
    ]
