"""The example of several processes: each layout has the numbers of a single process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu_only

PROGRAM = Path(__file__).parents[2] / "examples" / "distributed.py"
OPTIONS = ["--small", "--steps", "4", "--eager", "--device", "cpu"]


def bits(command):
    """What a run ends at."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, *command], env=env, capture_output=True, text=True, timeout=200, check=True
    )
    return float(re.search(r": ([0-9.]+) bits per character", found.stdout)[1])


@pytest.fixture(scope="module")
def alone():
    return bits([str(PROGRAM), *OPTIONS])


@pytest.mark.parametrize("layout", ["zero", "sharded", "tensor"])
def test_a_layout_has_the_numbers_of_one_process(alone, layout):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert abs(bits([*launcher, str(PROGRAM), *OPTIONS, "--layout", layout]) - alone) < 1e-4


def test_a_run_goes_on(alone, tmp_path):
    more = [*OPTIONS, "--checkpoint", str(tmp_path)]
    bits([str(PROGRAM), *more[:2], "2", *more[3:]])
    assert bits([str(PROGRAM), *more]) == alone
