"""Every snippet in the README runs, and its commands name what is there."""

import re
from pathlib import Path

import pytest

import funcnet as fn

pytestmark = pytest.mark.cpu_only

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_the_snippets_run_one_after_another(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    assert len(blocks("python")) >= 5
    losses = []
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"README.md, snippet {number}", "exec"), namespace)
        losses.append(namespace["metrics"]["loss"])
    assert losses[0] < 0.2
    assert namespace["history"]["loss"][-1] < 0.3
    assert namespace["value"] < 0.5
    assert "total" in capsys.readouterr().out


def test_the_first_example_has_at_most_a_dozen_lines():
    first = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(first) <= 12


def test_the_commands_name_files_that_are_there():
    named = set(re.findall(r"(?:examples|tests)/[\w/]+\.(?:py|png)", README))
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def has(found, path):
    """Whether there is something at a dotted path below a module."""
    for part in path.split("."):
        found = getattr(found, part, None)
    return found is not None


def test_the_names_in_the_text_are_public():
    names = set(re.findall(r"`fn\.([A-Za-z_.]+)", README)) | {
        name for name in re.findall(r"`([a-z_0-9]+)`", README) if "_" in name
    }
    others = {"opt_state", "train_state", "from_dotted", "state_dict", "check_layer"}
    others |= {"check_loss", "check_optimizer"}
    places = (fn, fn.optimizers, fn.schedules, fn.metrics, fn.interop)
    assert [name for name in names - others if not any(has(place, name) for place in places)] == []
