"""The test suite on versions of torch, each in a fresh virtual environment of its own.

``python -m tests.versions 2.13.0 2.15.0 -- -x tests/optimizers`` from the root of the repository.
What follows ``--`` goes to pytest; without it the whole suite runs, about ten minutes a version.
On Linux pip installs CUDA libraries with torch, so that an environment takes 6 GB; an environment
is removed before the next one is made, unless ``--folder`` says where to keep it. The tests run on
the CPU.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
_CLOSING = re.compile(r"\d+ (passed|failed|errors?|skipped|deselected)\b|no tests ran")


class Outcome(NamedTuple):
    """What came of one version: whether all tests passed, and pytest's closing line."""

    version: str
    passed: bool
    closing: str


def requirements(project: dict[str, Any]) -> list[str]:
    """What the suite needs beside torch, from pyproject's ``project`` table.

    The range of torch is left out: a version is tried before the range admits it.

    >>> extras = {"dev": ["pytest", "funcnet[io]"], "io": ["safetensors"], "bench": ["jax"]}
    >>> requirements({"dependencies": ["torch>=2", "optree"], "optional-dependencies": extras})
    ['optree', 'pytest', 'safetensors']
    """
    found = []
    pending = [*project["dependencies"], "funcnet[dev]"]
    while pending:
        requirement = pending.pop(0)
        if own := re.fullmatch(r"funcnet\[(.*)\]", requirement):
            for extra in own[1].split(","):
                pending += project["optional-dependencies"][extra]
        elif re.match(r"[\w.-]+", requirement)[0] != "torch":
            found.append(requirement)
    return found


def closing_line(output: str) -> str:
    """The last line in which pytest says what passed and what failed.

    >>> closing_line("..F\\n===== 1 failed, 2 passed in 0.10s =====\\n")
    '1 failed, 2 passed in 0.10s'
    """
    lines = [line.strip("= ") for line in output.splitlines() if _CLOSING.search(line)]
    return lines[-1] if lines else "pytest said nothing"


def run_suite(version: str, folder: Path, pytest_args: Sequence[str]) -> Outcome:
    """Make an environment with this version of torch in ``folder``, and run the suite in it."""
    print(f"\ntorch {version} in {folder}", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    install = [python, "-m", "pip", "install", "--quiet"]
    for what in [[f"torch=={version}", *requirements(project)], ["--no-deps", "-e", ROOT]]:
        if subprocess.run([*install, *what], check=False).returncode:
            return Outcome(version, False, "could not be installed")
    # No compiled program of another run is found again.
    caches = {
        "FUNCNET_CACHE_DIR": str(folder / "cache" / "funcnet"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache" / "inductor"),
    }
    output = ""
    with subprocess.Popen(
        [python, "-m", "pytest", "-p", "no:cacheprovider", *pytest_args],
        cwd=ROOT,
        env={**os.environ, **caches},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            output += line
    return Outcome(version, process.returncode == 0, closing_line(output))


@contextmanager
def folder_for(version: str, folder: Path | None) -> Iterator[Path]:
    """A folder in the one given, or a temporary one that is removed afterwards."""
    if folder is not None:
        yield folder.resolve() / version
        return
    with tempfile.TemporaryDirectory(prefix=f"funcnet-torch-{version}-") as temporary:
        yield Path(temporary)


def main(arguments: Sequence[str]) -> int:
    """Run the suite on each version; 0 if all tests passed on all."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.versions", usage="%(prog)s [options] VERSION... [-- PYTEST_ARGS...]"
    )
    parser.add_argument("versions", nargs="+", metavar="VERSION", help="of torch, such as 2.13.0")
    parser.add_argument("--folder", type=Path, help="where the environments are made and kept")
    own = list(arguments)
    pytest_args: list[str] = []
    if "--" in own:
        own, pytest_args = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    outcomes = []
    for version in options.versions:
        with folder_for(version, options.folder) as folder:
            outcomes.append(run_suite(version, folder, pytest_args))
    width = max(len(each.version) for each in outcomes)
    print()
    for version, passed, closing in outcomes:
        print(f"torch {version:{width}}  {'passed' if passed else 'FAILED'}  {closing}")
    return 0 if all(each.passed for each in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
