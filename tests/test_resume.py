"""A run that is killed goes on bit for bit; a sample of ``python -m tests.resume``."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu_only


def test_runs_that_are_killed_lose_nothing():
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "tests.resume", "--kills", "4"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    eager, jit, one, several = done.stdout.splitlines()
    assert eager.startswith("eager: killed 4 times, all 40 tensors are bit for bit")
    assert jit.startswith("jit: killed 4 times, all 40 tensors are bit for bit")
    assert "one file: killed 4 times during" in one
    assert "several files: killed 4 times during" in several
