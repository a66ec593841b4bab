"""The line on a terminal while a function compiles."""

import io
import re
import sys
import time

import pytest
import torch

import funcnet as fn
from funcnet.compiler import progress


class Terminal(io.StringIO):
    """Text that says it goes to a terminal."""

    def isatty(self):
        return True


def without_patience(monkeypatch):
    """A terminal on which all is shown."""
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    monkeypatch.setattr(progress, "_EVERY", 0.01)
    # In the test itself: pytest sets stderr anew after a fixture.
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    return terminal


def test_it_names_the_function_and_the_stage_and_says_how_long_it_took(monkeypatch):
    terminal = without_patience(monkeypatch)
    with progress.shown("step"):
        progress.stage("one thing")
        time.sleep(0.1)
        progress.stage("another")
        time.sleep(0.1)
    written = terminal.getvalue()
    assert "step compiles, 0 s: one thing" in written
    assert "step compiles, 0 s: another" in written
    assert re.search(r"\r\033\[Kstep loaded from the cache in 0\.\d s\n$", written)


def test_what_the_compiler_made_is_said_to_be_compiled(monkeypatch):
    terminal = without_patience(monkeypatch)
    with progress.shown("step"):
        progress.stage("g++ compiles 5 kB of C++")
        progress.stage("something else")
    assert re.search(r"step compiled in 0\.\d s\n$", terminal.getvalue())


def test_of_what_fails_no_line_stays(monkeypatch):
    terminal = without_patience(monkeypatch)

    def fail():
        with progress.shown("step"):
            time.sleep(0.05)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert terminal.getvalue().endswith("\r\033[K")


def test_it_shows_nothing_for_what_is_fast(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.shown("step"):
        pass
    assert sys.stderr.getvalue() == ""


def test_it_shows_nothing_elsewhere(monkeypatch):
    without_patience(monkeypatch)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.shown("step"):
        progress.stage("one thing")
        time.sleep(0.05)
    assert sys.stderr.getvalue() == ""


@pytest.mark.cpu_only
def test_jit_tells_its_stages(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNCNET_CACHE_DIR", str(tmp_path))
    stages = []
    token = progress._stage.set(stages)
    try:
        fn.jit(lambda x: torch.sin(x) + 1)(torch.ones(3))
    finally:
        progress._stage.reset(token)
    recording, kernels, compiler = stages
    assert recording == "recording its operators"
    assert "Inductor writes kernels" in kernels
    assert "kB of C++" in compiler
