"""A run that is killed goes on bit for bit; a sample of ``python -m tests.resume``."""

import re
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
    assert re.match(r"eager: killed 4 times, all \d+ tensors are bit for bit", eager)
    assert re.match(r"jit: killed 4 times, all \d+ tensors are bit for bit", jit)
    assert "one file: killed 4 times during" in one
    assert "several files: killed 4 times during" in several
