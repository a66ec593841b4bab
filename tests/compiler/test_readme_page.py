"""The compiler's page shows what `lower` gives."""

import re
from pathlib import Path

import pytest
import torch

import funcnet as fn

pytestmark = pytest.mark.cpu_only

PAGE = Path(fn.__file__).parent / "compiler" / "README.md"


@pytest.fixture(scope="module")
def page():
    """The stages that the page shows, by name."""
    shown = re.findall(r"<!-- (\w+) -->\n```\w*\n(.*?)\n```", PAGE.read_text(), re.DOTALL)
    return dict(shown)


@pytest.fixture(scope="module")
def example(page):
    """What the page's Python defines, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    names = {}
    try:
        exec(page["python"], names)
    finally:
        torch.set_num_threads(before)
    return names


@pytest.mark.parametrize("stage", ["graph", "blocks", "buffers"])
def test_a_stage_is_as_shown(stage, page, example):
    assert getattr(example["lowered"], stage) == page[stage]


def test_the_code_ends_as_shown(page, example):
    assert example["lowered"].why_not_one is None
    assert example["lowered"].code.rstrip().endswith(page["code"])


def test_the_example_trains(example):
    w, batches = example["w"], example["batches"]
    expected = example["train"](w, batches)
    address = w.data_ptr()
    found = example["compiled"](w, batches)
    torch.testing.assert_close(found, expected)
    assert found[0].data_ptr() == address
    with pytest.raises(RuntimeError, match="donated"):
        _ = w + 1


def test_every_module_is_in_the_table():
    table = PAGE.read_text().partition("\n## ")[0]
    modules = {path.stem for path in PAGE.parent.glob("*.py")} - {"__init__"}
    assert [name for name in modules if f"`{name}`" not in table] == []
