"""The range of torch that pyproject declares, and the program that tries versions of it."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import versions

pytestmark = pytest.mark.cpu_only

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_torch_has_a_floor_and_a_ceiling():
    (declared,) = [each for each in PROJECT["dependencies"] if re.match(r"torch\b", each)]
    found = re.fullmatch(r"torch>=2\.(\d+),<2\.(\d+)", declared)
    assert found is not None, declared
    assert int(found[1]) < int(found[2])


def test_an_environment_gets_all_that_the_suite_needs_but_another_torch():
    needed = [re.match(r"[\w-]+", each)[0] for each in versions.requirements(PROJECT)]
    assert {"optree", "pytest", "hypothesis", "safetensors", "matplotlib"} <= {*needed}
    assert "torch" not in needed
    assert "funcnet" not in needed


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("== 3 passed, 1 warning in 0.1s ==\n", "3 passed, 1 warning in 0.1s"),
        ("1 failed, 2 passed in 3.00s\nsome warning\n", "1 failed, 2 passed in 3.00s"),
        ("== no tests ran in 0.01s ==\n", "no tests ran in 0.01s"),
        ("== 2 errors in 0.5s ==\n", "2 errors in 0.5s"),
        ("Segmentation fault\n", "pytest said nothing"),
    ],
)
def test_the_closing_line_is_pytests_last(output, line):
    assert versions.closing_line(output) == line


def test_a_version_that_is_not_to_be_had_is_a_failure(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "tests.versions", "0.0.0", "--folder", tmp_path],
        cwd=ROOT,
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "torch 0.0.0  FAILED  could not be installed"
