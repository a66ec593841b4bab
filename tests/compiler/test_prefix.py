"""The header that is parsed once a machine."""

import subprocess
import time

import pytest
import torch

import funcnet as fn
from funcnet.compiler import build, cache, prefix
from funcnet.compiler.errors import BuildError

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(build._is_clang(tuple(build.compiler())), reason="of g++ alone"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache folder of its own, and a header that is parsed at once."""
    monkeypatch.setenv("FUNCNET_CACHE_DIR", str(tmp_path / "chosen"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(prefix, "_HEADER", "#include <cstdint>\n#define PARSED 1\n")
    monkeypatch.setattr(prefix, "_started", set())
    monkeypatch.setattr(prefix, "_refused", set())
    return tmp_path / "chosen"


def name_and_command():
    command = build.compiler()
    flags = build._flags(command, build._openmp(tuple(command)))
    return build._header(command, flags), [*command, *flags]


def compiles(flags, text):
    _, command = name_and_command()
    whole = [*command, *flags, "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(whole, input=text, text=True, capture_output=True).returncode == 0


def test_what_is_made_is_used(folder):
    name, command = name_and_command()
    assert prefix.flags(name) == []
    made = prefix.make(name, command)
    assert made.stat().st_mode & 0o777 == 0o600
    # What g++ reads is what was parsed: the text may have become another one.
    header = folder / f"{name}.h"
    header.write_text("#error not parsed\n")
    flags = prefix.flags(name)
    assert flags == ["-include", str(header)]
    assert compiles(flags, "static_assert(PARSED == 1);")
    assert [path.name for path in folder.glob(".*")] == []


def test_it_is_found_in_the_users_folder_too(folder, monkeypatch):
    name, command = name_and_command()
    with monkeypatch.context() as patch:
        patch.delenv("FUNCNET_CACHE_DIR")
        made = prefix.make(name, command)
    assert made.parent == folder.parent / "home" / "funcnet"
    assert prefix.flags(name) == ["-include", str(made.with_suffix(""))]


def test_what_others_can_write_is_not_used(folder):
    name, command = name_and_command()
    prefix.make(name, command).chmod(0o666)
    assert prefix.flags(name) == []


def test_a_program_has_it_made_and_the_next_one_uses_it(folder, monkeypatch):
    monkeypatch.delenv("FUNCNET_CACHE_DIR")
    folder = cache.cache_dir()
    commands = []
    built = build._built
    monkeypatch.setattr(
        build, "_built", lambda *args: commands.append(" ".join(args[1])) or built(*args)
    )
    x = torch.ones(3)
    fn.jit(lambda x: x + 1)(x)
    for _ in range(300):
        if [*folder.glob("*.gch")]:
            break
        time.sleep(0.1)
    assert torch.equal(fn.jit(lambda x: x + 2)(x), x + 2)
    assert ["-include" in command for command in commands] == [False, True]


def test_a_chosen_folder_gets_none_unasked(folder):
    name, command = name_and_command()
    prefix.make_later(name, command)
    assert prefix._started == set()


def test_a_broken_one_is_tried_once(folder):
    command = build.compiler()
    cache.keep("folder", b"")
    names = []
    for threads in (1, 2):
        parallel = build._ways(threads, tuple(command))[0]
        names.append(build._header(command, build._flags(command, parallel)))
        for suffix in (".h", ".h.gch"):
            path = folder / f"{names[-1]}{suffix}"
            path.write_text("#error broken\n")
            path.chmod(0o600)
    assert all(prefix.flags(name) for name in names)
    x = torch.ones(3)
    assert torch.equal(fn.jit(lambda x: x + 3)(x), x + 3)
    assert sorted([bool(prefix.flags(name)) for name in names]) == [False, True]


def test_an_error_of_the_compiler_leaves_nothing(folder, monkeypatch):
    monkeypatch.setattr(prefix, "_HEADER", "#error no\n")
    name, command = name_and_command()
    with pytest.raises(BuildError, match="no"):
        prefix.make(name, command)
    assert [*folder.glob("*.gch"), *folder.glob(".*")] == []


def test_two_processes_do_not_make_it_at_once(folder):
    name, command = name_and_command()
    cache.keep("folder", b"")
    (folder / f".{name}.part").touch()
    with pytest.raises(FileExistsError, match="another process"):
        prefix.make(name, command)
