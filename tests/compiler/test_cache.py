"""Programs on disk: what is damaged is made anew, and a disk that fails costs no result."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import funcnet as fn
from funcnet.compiler import build, cache

pytestmark = pytest.mark.cpu_only

X = torch.arange(6.0).reshape(2, 3)


def function(x):
    return x * 3 + 1


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache folder."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("FUNCNET_CACHE_DIR", str(folder))
    monkeypatch.setattr(cache, "_said", set())
    return folder


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The name and the bytes of a real program."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUNCNET_CACHE_DIR", str(tmp_path_factory.mktemp("whole")))
        fn.jit(function)(X)
        (library,) = cache.cache_dir().glob("*.so")
        return library.name, library.read_bytes()


def works():
    """A jitted function gives its result, whatever lies in the cache."""
    torch.testing.assert_close(fn.jit(function)(X), function(X))


def compiles(monkeypatch):
    """A list with an entry for each compilation."""
    calls = []
    compile_one = build._compile
    monkeypatch.setattr(build, "_compile", lambda *args: calls.append(None) or compile_one(*args))
    return calls


def test_every_cut_of_a_program_is_noticed(folder, program):
    name, whole = program
    path = folder / name
    path.write_bytes(whole)
    assert cache.find(name) == path
    for cut in range(64):
        path.write_bytes(whole[: len(whole) * cut // 64])
        assert cache.find(name) is None
    for place in range(0, len(whole), max(len(whole) // 64, 1)):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(bytes(changed))
        assert cache.find(name) is None


def cut(path, whole):
    path.write_bytes(whole[:8000])


def head_and_zeros(path, whole):
    path.write_bytes(whole[:4096] + bytes(len(whole) - 4096))


def zeros(path, whole):
    path.write_bytes(bytes(len(whole)))


def foreign(path, whole):
    path.write_text("not a program")


def another_library(path, whole):
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    path.unlink(missing_ok=True)
    cache.keep(path.name, library.read_bytes())


def directory(path, whole):
    path.unlink(missing_ok=True)
    path.mkdir()


def writable_by_others(path, whole):
    path.write_bytes(whole)
    path.chmod(0o666)


@pytest.mark.parametrize(
    "damage",
    [cut, head_and_zeros, zeros, foreign, another_library, directory, writable_by_others],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_program_is_made_anew(damage, folder, program, monkeypatch):
    name, whole = program
    damage(folder / name, whole)
    calls = compiles(monkeypatch)
    works()
    assert len(calls) == 1
    works()
    assert len(calls) == 1
    assert cache.find(name) is not None


def no_folder(folder, monkeypatch):
    (folder.parent / "file").write_text("")
    monkeypatch.setenv("FUNCNET_CACHE_DIR", str(folder.parent / "file" / "cache"))


def full_disk(folder, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)


def no_right(folder, monkeypatch):
    def fail(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache.tempfile, "mkstemp", fail)


def open_to_others(folder, monkeypatch):
    folder.chmod(0o777)


def full_of_others(folder, monkeypatch):
    # The folder has the name of the program, and is not empty.
    monkeypatch.setattr(build, "fingerprint", lambda *parts: "same")
    monkeypatch.setattr("funcnet.compiler.compiled.fingerprint", lambda *parts: "same")
    (folder / "same.so").mkdir()
    (folder / "same.so" / "file").write_text("")


@pytest.mark.parametrize(
    "trouble",
    [no_folder, full_disk, no_right, open_to_others, full_of_others],
    ids=lambda trouble: trouble.__name__,
)
def test_where_programs_cannot_be_kept_it_says_so_once_and_works(trouble, folder, monkeypatch):
    trouble(folder, monkeypatch)

    def twice():
        works()
        works()

    with pytest.warns(RuntimeWarning, match="compiled programs cannot be kept in") as found:
        twice()
    assert len(found) == 1
    assert not [*folder.glob(".*")]
    assert not [path for path in folder.glob("*.so") if path.is_file()]


def test_a_program_in_a_folder_that_others_can_write_to_is_not_loaded(folder, program):
    name, whole = program
    (folder / name).write_bytes(whole)
    (folder / name).chmod(0o600)
    assert cache.find(name) is not None
    folder.chmod(0o777)
    assert cache.find(name) is None


def test_parts_that_a_killed_process_left_are_removed_when_they_are_old(folder):
    old, new = folder / ".a.part", folder / ".b.part"
    for path in (old, new):
        path.write_text("")
    os.utime(old, (0, 0))
    cache.keep("kept", b"")
    assert not old.exists()
    assert new.exists()


SLOW = """
import os, sys, torch, funcnet as fn
print("start", flush=True)
fn.jit(lambda x: x * 3 + 1)(torch.ones(3))
"""


def test_what_a_killed_compilation_left_is_removed_by_the_next(tmp_path, monkeypatch):
    compiler = tmp_path / "slow"
    compiler.write_text("#!/bin/sh\ncase $1 in --version|-v) exec g++ $1;; esac\nsleep 60\n")
    compiler.chmod(0o755)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = os.environ | {
        "TMPDIR": str(temporary),
        "FUNCNET_CACHE_DIR": str(tmp_path / "cache"),
        "CXX": str(compiler),
    }
    with subprocess.Popen([sys.executable, "-c", SLOW], env=environment) as process:
        for _ in range(600):
            if [*temporary.glob("funcnet-*/program.cpp")]:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    assert [*temporary.glob("funcnet-*")]
    monkeypatch.setattr(build.tempfile, "tempdir", str(temporary))
    with build._folder() as folder:
        assert [*temporary.glob("funcnet-*")] == [folder]
    assert not [*temporary.iterdir()]


def test_old_folders_of_other_machines_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    old, new = tmp_path / "funcnet-other-1-abc", tmp_path / "funcnet-other-2-abc"
    for path in (old, new):
        path.mkdir()
    os.utime(old, (0, 0))
    with build._folder():
        pass
    assert [*tmp_path.iterdir()] == [new]


@pytest.mark.parametrize("command", ["g++ -O1", "env g++"])
def test_cxx_may_be_a_command_with_arguments(command, folder, monkeypatch):
    monkeypatch.setenv("CXX", command)
    works()
    assert [*folder.glob("*.so")]


@pytest.mark.parametrize("command", ["/bin/true", "/bin/false", "g++ --no-such-flag"])
def test_where_no_program_can_be_made_it_says_so_once_and_runs_eagerly(
    command, folder, monkeypatch
):
    monkeypatch.setenv("CXX", command)
    compiled, given = fn.jit(function, donate=0), X.clone()

    def twice():
        torch.testing.assert_close(compiled(given), function(X))
        torch.testing.assert_close(fn.jit(function)(X), function(X))

    with pytest.warns(RuntimeWarning, match="functions run eagerly, as no program") as found:
        twice()
    assert len(found) == 1
    assert not [*folder.iterdir()]
    torch.testing.assert_close(given, X)
    assert "failed" in compiled.lower(X).why_not_one


def test_a_warning_that_is_an_error_loses_nothing(folder, monkeypatch):
    no_folder(folder, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            works()
        works()
