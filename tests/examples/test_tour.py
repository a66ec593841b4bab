"""The notebook: it runs from top to bottom, and its outputs are those of its cells."""

import base64
import json
import re
from pathlib import Path

import notebooks
import pytest

pytestmark = pytest.mark.cpu_only

PATH = Path(__file__).parent.parent.parent / "examples" / "tour.ipynb"
TOUR = notebooks.read(PATH)
CODE = [cell for cell in TOUR["cells"] if cell["cell_type"] == "code"]


def texts(cell):
    """What a cell printed and gave, but for its figures."""
    return [
        "".join(output.get("text") or output["data"].get("text/plain", ""))
        for output in cell["outputs"]
    ]


def test_it_runs_from_top_to_bottom_and_gives_the_outputs_that_it_shows():
    run, names = notebooks.run(TOUR)
    again = [cell for cell in run["cells"] if cell["cell_type"] == "code"]
    for shown, cell in zip(CODE, again, strict=True):
        if "time" not in cell["metadata"].get("tags", []):
            # An output that clears a line on the terminal is empty.
            assert [*filter(None, texts(shown))] == [*filter(None, texts(cell))]
    assert (names["losses"][:, -1] < 0.2).all()
    assert any("image/png" in output.get("data", {}) for output in again[-1]["outputs"])


def test_it_is_a_notebook_of_version_4_5():
    assert set(TOUR) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (TOUR["nbformat"], TOUR["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in TOUR["cells"]]
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    for cell in TOUR["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            keys |= {"execution_count", "outputs"}
        assert set(cell) == keys
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))


def test_it_is_small_and_says_nothing_of_a_machine():
    text = PATH.read_text()
    assert text == json.dumps(TOUR, indent=1, sort_keys=True) + "\n"
    assert len(text) < 200_000
    assert re.findall(r"/(?:tmp|home|root|Users)/", text) == []
    figures = [o for cell in CODE for o in cell["outputs"] if "image/png" in o.get("data", {})]
    assert all(base64.b64decode(o["data"]["image/png"])[:4] == b"\x89PNG" for o in figures)
    assert figures
