"""The files of checkpoints: old or new, whole, whatever happens; several of one tree; of a run."""

import errno
import json
import math
import os
import resource
import signal
import stat
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

import funcnet as fn
from funcnet.checkpoint import files

pytestmark = pytest.mark.cpu_only

TREE = {"a": torch.arange(100.0), "b": {"c": torch.ones(7, 9), "d": torch.ones(3)}, "n": 1}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_same(a, b):
    assert fn.tree.flatten(a)[1] == fn.tree.flatten(b)[1]
    for one, other in zip(fn.tree.leaves(a), fn.tree.leaves(b), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_file_has_the_permissions_of_any_other_and_keeps_those_it_had(tmp_path):
    other, path = tmp_path / "other", tmp_path / "t"
    other.write_text("")
    fn.save(path, TREE)
    assert path.stat().st_mode == other.stat().st_mode
    path.chmod(0o640)
    fn.save(path, TREE)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_link_stays_a_link_and_folders_are_made(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "new" / "folder" / "t")
    fn.save(tmp_path / "link", TREE)
    assert (tmp_path / "link").is_symlink()
    assert_same(TREE, fn.load(tmp_path / "new" / "folder" / "t"))


def test_a_folder_is_not_replaced(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"save: .* is as it was before: Is a directory"):
        fn.save(tmp_path, TREE)
    with pytest.raises(IsADirectoryError):
        fn.load(tmp_path)


def test_a_file_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, f=function, n=name: calls.append(n) or f(*args))
    fn.save(tmp_path / "t", TREE)
    assert calls == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize(("max_shard_bytes", "count"), [(None, 0), (300, 0), (300, 1), (300, 2)])
def test_a_full_disk_is_an_error_and_leaves_the_old_file(
    tmp_path, monkeypatch, max_shard_bytes, count
):
    path = tmp_path / "t.safetensors"
    fn.save(path, TREE, max_shard_bytes=max_shard_bytes)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    done = []

    def fail(number):
        done.append(number)
        if len(done) > count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)  # the last chance of a disk to say that it is full
    tree = fn.tree.map(lambda leaf: leaf + 1, TREE)
    with pytest.raises(OSError, match=r"save: .* is as it was before: No space left") as error:
        fn.save(path, tree, max_shard_bytes=max_shard_bytes)
    assert error.value.errno == errno.ENOSPC
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_a_file_over_the_limit_of_the_process_is_an_error_and_leaves_the_old_file(tmp_path):
    fn.save(tmp_path / "t", TREE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"save: .* is as it was before: File too large"):
            fn.save(tmp_path / "t", {"w": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert names(tmp_path) == ["t"]
    assert_same(TREE, fn.load(tmp_path / "t"))


def test_what_killed_processes_left_is_removed_and_what_is_being_written_is_not(tmp_path):
    path = tmp_path / "t"
    (tmp_path / ".t.0123abcd.part").write_text("left")
    (tmp_path / ".u.0123abcd.part").write_text("another's")
    with files.replaced(path) as file:
        file.write(b"slow")
        fn.save(path, TREE)
        assert len(names(tmp_path)) == 3
    assert path.read_bytes() == b"slow"
    assert names(tmp_path) == [".u.0123abcd.part", "t"]


def test_a_pipe_or_a_device_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match=r"load: .* or is no checkpoint: not a file"):
            fn.load(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        fn.load(tmp_path / "missing")


def test_shards_are_those_of_hugging_face(tmp_path):
    path = tmp_path / "model.safetensors"
    fn.save(path, TREE, max_shard_bytes=400)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 400 + 7 * 9 * 4 + 3 * 4
    assert {*index["weight_map"]} == {"a", "b.c", "b.d"}
    read = {}
    for name in {*index["weight_map"].values()}:
        shard = load_file(tmp_path / name)
        assert sum(leaf.nbytes for leaf in shard.values()) <= 400
        read |= shard
    assert_same({"a": TREE["a"], "b.c": TREE["b"]["c"], "b.d": TREE["b"]["d"]}, read)
    assert len(names(tmp_path)) == 3
    assert_same(TREE, fn.load(path, like=TREE))
    assert_same(TREE["b"], fn.load(tmp_path / "model.safetensors.index.json", at="b"))


def test_shards_of_other_programs_are_loaded(tmp_path):
    flat = {"a.w": torch.ones(2), "b.w": torch.zeros(3)}
    for name, tensor in flat.items():
        save_file({name: tensor}, tmp_path / f"model-{name}.safetensors")
    weight_map = {name: f"model-{name}.safetensors" for name in flat}
    index = {"metadata": {"total_size": 20}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(fn.tree.from_dotted(flat), fn.load(tmp_path / "model.safetensors"))


def test_one_form_takes_the_place_of_the_other(tmp_path):
    path = tmp_path / "t.safetensors"
    (tmp_path / "t-00001-of-00002.safetensors").write_text("of another program")
    for number, limit in enumerate([None, 300, 30, None, 300]):
        tree = fn.tree.map(lambda leaf, n=number: leaf + n, TREE)
        fn.save(path, tree, max_shard_bytes=limit)
        assert_same(tree, fn.load(path))
        shards = 1 if limit is None else 1 + (2 if limit == 300 else 3)
        assert len(names(tmp_path)) == 1 + shards


def test_bytes_that_changed_are_found_by_their_checksum(tmp_path):
    path = tmp_path / "t"
    for checksum in (False, True):
        fn.save(path, {"a": torch.arange(64.0), "b": torch.zeros(64)}, checksum=checksum)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        if checksum:
            with pytest.raises(ValueError, match="the bytes of 'b' are not those that were saved"):
                fn.load(path)
            assert_same(torch.arange(64.0), fn.load(path, at="a"))
        else:
            fn.load(path)


def test_the_last_and_the_best_checkpoints_are_kept(tmp_path):
    scores = [None, 0.5, 0.2, 0.4, math.nan, 0.3, 0.2, 0.6]
    for step, score in enumerate(scores):
        limit = 300 if step % 3 else None
        path = fn.checkpoint.save_step(
            tmp_path, step * 10, TREE | {"n": step}, keep=2, score=score, max_shard_bytes=limit
        )
        assert fn.checkpoint.latest(tmp_path) == path
        assert_same(TREE | {"n": step}, fn.load(path))
    assert [*fn.checkpoint.steps(tmp_path)] == [20, 60, 70]
    assert fn.load(fn.checkpoint.best(tmp_path))["n"] == 2
    assert len(names(tmp_path)) == 3 + 1 + 3
    fn.checkpoint.save_step(tmp_path, torch.tensor(80), TREE, keep=None)
    assert [*fn.checkpoint.steps(tmp_path)] == [20, 60, 70, 80]


def test_checkpoints_that_are_not_whole_are_ignored(tmp_path):
    assert fn.checkpoint.latest(tmp_path) is None
    assert fn.checkpoint.best(tmp_path / "missing") is None
    first = fn.checkpoint.save_step(tmp_path, 1, TREE, score=torch.tensor(0.1))
    second = fn.checkpoint.save_step(tmp_path, 2, TREE, score=0.05)
    second.write_bytes(second.read_bytes()[:-1])
    third = fn.checkpoint.save_step(tmp_path, 3, TREE, max_shard_bytes=100)
    next(tmp_path.glob("*-of-*")).unlink()
    (tmp_path / "step_x.safetensors").write_text("of somebody")
    assert third.with_name(f"{third.name}.index.json").exists()
    assert fn.checkpoint.latest(tmp_path) == fn.checkpoint.best(tmp_path) == first


def test_a_folder_of_another_run_is_refused(tmp_path):
    fn.checkpoint.save_step(tmp_path, 30, TREE)
    with pytest.raises(ValueError, match=r"save_step: .* has the later step 30, of another run"):
        fn.checkpoint.save_step(tmp_path, 10, TREE)
    for options, message in (({"step": -1}, "step must"), ({"step": 40, "keep": 0}, "keep must")):
        with pytest.raises(ValueError, match=f"save_step: {message}"):
            fn.checkpoint.save_step(tmp_path, tree=TREE, **options)


def test_a_checkpoint_on_a_disk_of_its_own_that_is_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("only root can mount a disk")
    try:
        fn.save(disk / "t", TREE)
        with pytest.raises(OSError, match="No space left on device"):
            fn.save(disk / "t", {"w": torch.zeros(2**19)})
        assert names(disk) == ["t"]
        assert_same(TREE, fn.load(disk / "t"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
