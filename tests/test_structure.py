"""The package's structure: what may import what, and where PyTorch's private names may be."""

import ast
import re
from pathlib import Path

import pytest

import funcnet as fn

PACKAGE = Path(fn.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
# Each group may import from the ones before it, and within itself.
ORDER = [
    {
        "errors",
        "file_locks",
        "reference",
        "runtime",
        "tree",
        "draws",
        "random",
        "threefry",
        "constructors",
        "hints",
        "checks",
    },
    {"compiler"},
    {"deferred", "pullbacks", "training_types", "messages", "ranks"},
    {
        "core",
        "collectives",
        "control_flow",
        "debug",
        "indexing",
        "batch_axis",
        "global_forms",
        "parted_params",
    },
    {"initializers", "params", "lift"},
    {"combinators"},
    {"layers"},
    {"losses", "optimizers", "finite", "data", "metrics", "observing", "run_start", "train"},
    {"transforms"},
    {"backward"},
    {"checkpoint", "evaluation", "interop", "stopping", "summaries", "testing"},
    {"fitting", "fit_parts"},
    {"distributed"},
]


def part(name):
    """``layers`` for ``funcnet.layers.linear``."""
    return name.split(".")[1] if "." in name else name


def imports(path):
    """The parts of funcnet that a module imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "funcnet":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("funcnet."):
            yield part(node.module)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_imports_only_from_what_is_before_it(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "__init__":
        return
    rank = next(rank for rank, group in enumerate(ORDER) if own in group)
    allowed = set().union(*ORDER[: rank + 1])
    assert set(imports(path)) <= allowed


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_private_names_of_torch_are_in_the_compiler_and_in_runtime_only(path):
    if path.relative_to(PACKAGE).parts[0] in ("compiler", "runtime.py"):
        return
    private = re.findall(r"\b(?:torch|aten)(?:\.\w+)*\._[a-z]\w*", path.read_text())
    assert not private


def test_every_public_name_is_listed_once():
    listed = [
        alias.asname
        for node in ast.parse((PACKAGE / "__init__.py").read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert None not in listed
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_file_is_one_idea_long(path):
    if path == PACKAGE / "__init__.py":
        return  # the list of public names
    longest = 450 if path.relative_to(PACKAGE).parts[0] == "compiler" else 400
    assert len(path.read_text().splitlines()) <= longest
