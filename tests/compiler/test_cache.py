"""Programs on disk: what is damaged is made anew, and a disk that fails costs no result."""

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import funcnet as fn
from funcnet.compiler import build, cache, errors
from funcnet.compiler.errors import UnsafeCacheError

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
    monkeypatch.setattr(errors, "_said", set())
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


def full_of_others(folder, monkeypatch):
    # The folder has the name of the program, and is not empty.
    monkeypatch.setattr(build, "library_key", lambda text, threads: "same")
    (folder / "same.so").mkdir()
    (folder / "same.so" / "file").write_text("")


@pytest.mark.parametrize(
    "trouble",
    [no_folder, full_disk, no_right, full_of_others],
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
    assert not [*folder.glob(".*.part")]
    assert not [path for path in folder.glob("*.so") if path.is_file()]


def test_a_program_in_a_folder_that_others_can_write_to_is_not_loaded(folder, program):
    name, whole = program
    (folder / name).write_bytes(whole)
    (folder / name).chmod(0o600)
    assert cache.find(name) is not None
    for mode in (0o777, 0o770, 0o702):
        folder.chmod(mode)
        with pytest.raises(UnsafeCacheError, match=f"chmod go-w {folder}`, or name .*_CACHE_DIR"):
            works()
        with pytest.raises(UnsafeCacheError, match="others can write"):
            cache.keep("kept", b"")
    assert [path.name for path in folder.iterdir()] == [name]
    folder.chmod(0o755)
    works()


def test_a_program_in_a_folder_of_someone_else_is_not_loaded(folder, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    monkeypatch.setattr(cache, "_ROOT", -1)
    with pytest.raises(UnsafeCacheError, match=r"belongs to another user, .*FUNCNET_CACHE_DIR"):
        works()
    assert not [*folder.iterdir()]


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


def test_a_killed_compilation_leaves_nothing_behind(tmp_path):
    compiler = tmp_path / "slow"
    compiler.write_text("#!/bin/sh\ncase $1 in --version|-v) exec g++ $1;; esac\nsleep 20\n")
    compiler.chmod(0o755)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = os.environ | {
        "TMPDIR": str(temporary),
        "FUNCNET_CACHE_DIR": str(tmp_path / "cache"),
        # An empty folder that Inductor makes when it is imported.
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "CXX": str(compiler),
    }

    def wait_until(condition):
        for _ in range(1200):
            if condition():
                return
            time.sleep(0.1)
        raise AssertionError(f"{[*temporary.rglob('*')]}")

    with subprocess.Popen([sys.executable, "-c", SLOW], env=environment) as process:
        wait_until(lambda: [*temporary.glob("funcnet-*/program.cpp")])
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: not [*temporary.glob("funcnet-*")])
    assert not [*(tmp_path / "cache").glob("*.so")]


def test_folders_of_dead_processes_are_removed_by_the_next_compilation(tmp_path, monkeypatch):
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    with subprocess.Popen(["true"]) as ended:
        pass
    dead, alive = (
        tmp_path / f"funcnet-{platform.node()}-{number}-abc" for number in (ended.pid, os.getpid())
    )
    for path in (dead, alive):
        path.mkdir()
    with build._folder() as folder:
        assert sorted(tmp_path.iterdir()) == sorted([alive, folder])
    assert [*tmp_path.iterdir()] == [alive]


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
    assert not [*folder.glob("*.so")]
    torch.testing.assert_close(given, X)
    assert "failed" in compiled.lower(X).why_not_one


def test_a_warning_that_is_an_error_loses_nothing(folder, monkeypatch):
    no_folder(folder, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            works()
        works()


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """A copy of the compiler's code, which the keys are made of, to be edited."""
    copy = tmp_path / "compiler"
    shutil.copytree(build._HERE, copy)
    monkeypatch.setattr(build, "_HERE", copy)
    return copy


def keys():
    return build.text_key("graph"), build.library_key("text", 1)


def test_the_keys_hash_what_programs_are_made_of_and_nothing_else(own_code, monkeypatch):
    before = keys()

    def changed(path):
        whole = path.read_text()
        path.write_text(whole + "\n")
        found = [one != other for one, other in zip(keys(), before, strict=True)]
        path.write_text(whole)
        assert keys() == before
        return found

    for name in ("README.md", "staged.py", "cache.py", "dispatch.py", "build.py"):
        assert changed(own_code / name) == [False, False], name
    for name in ("record.py", "blocks.py", "plan.py", "program.py", "inductor.py"):
        assert changed(own_code / name) == [True, False], name
    assert changed(own_code / "primitives" / "sort.py") == [True, False]
    for header in own_code.glob("**/*.h"):
        assert changed(header) == [False, True], header
    assert len([*own_code.glob("**/*.h")]) >= 7
    assert build.library_key("another text", 1) != before[1]
    assert build.text_key("another graph") != before[0]
    for what, value in (("CXX", "g++ -O1"), ("CXX", "g++ -g")):
        monkeypatch.setenv(what, value)
        assert all([one != other for one, other in zip(keys(), before, strict=True)])
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-g"))
    assert keys()[1] != before[1]
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert keys()[0] != before[0]


def test_the_code_that_keys_leave_out_makes_no_programs():
    folder = build._HERE
    left_out = {Path(name).stem for name in build._NO_WRITERS} - {"__init__"}
    assert {name for name in left_out if (folder / f"{name}.py").exists()} == left_out
    for path in folder.glob("**/*.py"):
        if path.name not in build._NO_WRITERS:
            imported = set(re.findall(r"^from funcnet\.compiler\.(\w+)", path.read_text(), re.M))
            # Exceptions, checks that refuse, what is shown while they work or fail, and the name
            # of the compiler, which is hashed.
            told = {"errors", "escaped", "signature", "progress", "build", "reads"}
            told |= {"user_code", "tracebacks"}
            assert imported & left_out <= told, path.name


def test_a_text_is_compiled_without_inductor_and_a_library_loaded_without_a_compiler(
    folder, monkeypatch
):
    works()
    (text,), (library,) = folder.glob("*.cpp"), folder.glob("*.so")
    kept = text.read_bytes(), library.read_bytes()
    calls = compiles(monkeypatch)
    text.unlink()
    works()
    assert (text.read_bytes(), calls) == (kept[0], [])

    def refuse(*args):
        raise AssertionError("the text is on disk")

    monkeypatch.setattr("funcnet.compiler.compiled.program_text", refuse)
    works()
    assert calls == []
    library.unlink()
    works()
    assert len(calls) == 1
    assert cache.find(library.name) == library


COMPILING = """
import torch, funcnet as fn
from funcnet.compiler import build
compile_one = build._compile
build._compile = lambda *args: print("compiles") or compile_one(*args)
fn.jit(lambda x: (x * 3).sin().sum())(torch.arange(6.0))
"""


def test_of_processes_that_want_a_program_at_once_one_compiles_it(folder):
    started = [
        subprocess.Popen([sys.executable, "-c", COMPILING], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert "".join(said).split() == ["compiles"]


def test_a_process_that_is_killed_while_it_compiles_keeps_nobody_waiting(folder):
    slow = COMPILING.replace("compiles", "begins").replace(
        'print("begins")', 'print("begins", flush=True) or __import__("time").sleep(60)'
    )
    with subprocess.Popen(
        [sys.executable, "-c", slow], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "begins\n"
        process.kill()
    found = subprocess.run(
        [sys.executable, "-c", COMPILING], stdout=subprocess.PIPE, text=True, timeout=120
    )
    assert found.stdout == "compiles\n"
