"""On a PyTorch whose private functions differ: it is said once, and results stay right."""

import sys

import pytest
import torch
import torch._inductor.graph

import funcnet as fn
from funcnet.compiler import errors
from funcnet.compiler.primitives import PRIMITIVES

pytestmark = pytest.mark.cpu_only

X = torch.arange(6.0).reshape(2, 3)
KNOWS_NOT = "does not know PyTorch " + torch.__version__.partition("+")[0]


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """An empty cache folder, and nothing said yet."""
    monkeypatch.setenv("FUNCNET_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(errors, "_said", set())


@pytest.fixture
def interpreted(monkeypatch):
    """The staged path without compilers."""
    monkeypatch.setattr("torch._inductor.compile", lambda graph, inputs: graph)


def functions():
    """Two functions, with a loop and a product."""
    return [
        lambda x: fn.scan(lambda c, row: (c * 0.5 + row, c.sum()), torch.zeros(3), x),
        lambda x: torch.addmm(x[0, :2], x, x.T @ x[:, :2]).relu(),
    ]


def check():
    """Each function twice, and what it says of itself."""
    reasons = []
    for function in functions():
        compiled = fn.jit(function)
        for _ in range(2):
            torch.testing.assert_close(compiled(X), function(X))
        reasons.append(compiled.lower(X).why_not_one)
    return reasons


def no_scheduler(monkeypatch):
    monkeypatch.delattr(torch._inductor.graph.GraphLowering, "_update_scheduler")


def no_wrapper(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._inductor.codegen.cpp_wrapper_cpu", None)


def other_arguments(monkeypatch):
    monkeypatch.setattr(torch._inductor.graph.GraphLowering, "__init__", lambda self, graph: None)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("change", "error"),
    [(no_scheduler, "AttributeError"), (no_wrapper, "Error"), (other_arguments, "TypeError")],
)
def test_functions_run_in_segments(change, error, monkeypatch, tmp_path):
    change(monkeypatch)
    with pytest.warns(RuntimeWarning, match=f"{KNOWS_NOT}.*segments.*{error}") as said:
        reasons = check()
    assert len(said) == 1
    assert all([error in reason for reason in reasons])
    # Nothing is kept: the next process, or PyTorch, may do better.
    assert not [*tmp_path.iterdir()]


def test_functions_run_eagerly_where_segments_fail_as_well(monkeypatch):
    no_scheduler(monkeypatch)

    def fail(graph, inputs):
        raise TypeError("compile() got an unexpected keyword argument")

    monkeypatch.setattr("torch._inductor.compile", fail)
    with pytest.warns(RuntimeWarning) as said:
        check()
    assert len(said) == 2
    assert "segments" in str(said[0].message)
    assert "eagerly" in str(said[1].message)
    assert KNOWS_NOT in str(said[1].message)


def test_an_operator_that_is_not_known_is_called(monkeypatch):
    # Left to Inductor, a product is a call of an operator.
    for name in ("mm", "addmm"):
        monkeypatch.delitem(PRIMITIVES, f"aten::{name}")
    assert check() == [None, None]
    assert "aten::addmm" in fn.jit(functions()[1]).lower(X).called[-1]


def test_functions_run_eagerly_where_the_compiler_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "funcnet.compiler.dispatch", None)
    with pytest.warns(RuntimeWarning, match=f"{KNOWS_NOT}.*eagerly") as said:
        compiled = [fn.jit(function) for function in functions()]
    assert len(said) == 1
    for one, function in zip(compiled, functions(), strict=True):
        torch.testing.assert_close(one(X), function(X))
    with pytest.raises(RuntimeError, match="functions run eagerly"):
        compiled[0].lower(X)
