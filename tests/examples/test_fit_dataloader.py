"""The example of a DataLoader: it trains, goes on where it was, and is short."""

import io
import tokenize
from pathlib import Path

import pytest
from examples.test_examples import EXAMPLES, output_of

import funcnet as fn

pytestmark = pytest.mark.cpu_only


def test_it_trains_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ("--images", 500, "--workers", 1, "--checkpoint", folder)
    assert "test accuracy" in output_of("fit_dataloader", "--epochs", 1, *options)
    assert list(fn.checkpoint.steps(folder)) == [8]
    output_of("fit_dataloader", "--epochs", 2, *options)
    assert list(fn.checkpoint.steps(folder)) == [8, 16]


def test_it_has_forty_lines_of_code() -> None:
    source = (EXAMPLES / "fit_dataloader.py").read_text()
    body = source.split('"""', 2)[2]
    kinds = tokenize.generate_tokens(io.StringIO(body).readline)
    ignored = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    code = {token.start[0] for token in kinds if token.type not in ignored}
    assert len(code) <= 40
