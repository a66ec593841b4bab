"""A few programs of the fuzzer, so that it keeps working; `tests.fuzz` runs as many as wanted."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_random_programs_give_compiled_what_they_give_eagerly():
    command = [sys.executable, "-m", "tests.fuzz", "--seed", "0", "--programs", "6"]
    done = subprocess.run(
        [*command, "--minutes", "20"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 0: 6 programs" in done.stdout
