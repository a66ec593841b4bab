"""Which operators make a segment, and that equal segments are compiled once."""

import re

import pytest
import torch

import funcnet as fn
from funcnet.compiler import build, segments as compiler_segments
from funcnet.compiler.loops import barrier

pytestmark = pytest.mark.cpu_only


@pytest.fixture
def segments(monkeypatch, tmp_path):
    """Compiles a function from nothing; gives the segments that Inductor saw, as text."""
    monkeypatch.setenv("FUNCNET_CACHE_DIR", str(tmp_path))
    seen = []
    kernels = compiler_segments.kernels_or_missing
    monkeypatch.setattr(
        compiler_segments,
        "kernels_or_missing",
        lambda segment, *rest: seen.append(str(segment)) or kernels(segment, *rest),
    )

    def compile_(function, *args):
        seen.clear()
        compiled = fn.jit(function)
        compiled(*args)
        return list(seen)

    return compile_


def blocks_of(count):
    layer = fn.residual(fn.serial(fn.linear(4), fn.tanh()))
    net = fn.serial(*[layer] * count, fn.linear(2))
    optimizer = fn.adam(0.1)
    x, t = torch.ones(3, 4), torch.zeros(3, dtype=torch.int64)
    state = fn.init_train_state(net, optimizer, fn.key(0), x)
    return fn.train_step(net, fn.cross_entropy(), optimizer), state, (x, t)


def test_equal_layers_are_compiled_once(segments):
    assert len(segments(*blocks_of(9))) == len(segments(*blocks_of(3)))


def test_a_sum_is_made_where_its_operand_is(segments):
    def function(x, w, v):
        y = torch.tanh(x @ w)
        z = y @ v
        return z + 1, y.square().sum(0)

    x = torch.ones(3, 3)
    first, second = segments(function, x, x, x)
    assert "tanh" in first
    assert "sum" in first
    assert "sum" not in second


def test_an_update_is_made_where_its_gradient_is(segments):
    def function(w, v, x):
        a, b = x.T @ (x @ w), x.T @ (x @ v)
        return w - 0.1 * a, v - 0.1 * b

    x = torch.ones(3, 3)
    # Both are the same.
    assert len(segments(function, x, x, x)) == 1
    text = fn.jit(function).lower(x, x, x).blocks
    first, second = (index for index, line in enumerate(text.splitlines()) if "segment" in line)
    assert [line for line in text.splitlines()[first:second] if "aten::mm" in line]


@pytest.mark.parametrize(
    "optimizer", [fn.sgd(0.1, 0.9), fn.adam(0.1), fn.adamw(0.1), fn.rmsprop(0.1)], ids=repr
)
def test_a_donated_step_never_has_all_gradients(optimizer):
    net, x = fn.serial(*[fn.linear(64)] * 12), torch.ones(2, 64)
    state = fn.init_train_state(net, optimizer, fn.key(0), x)
    step = fn.jit(fn.train_step(net, fn.mse(), optimizer), donate=0)
    (workspace,) = re.findall(r"Workspace workspace\((\d+)\)", step.lower(state, (x, x)).code)
    assert int(workspace) < 4 * fn.tree.bytes(state.params) / 12


def test_a_reduction_stays_behind_a_barrier():
    def function(x):
        again, product = barrier([x, x @ x])
        return again.tanh().sum(0), product

    text = fn.jit(function).lower(torch.ones(3, 3)).blocks
    assert text.index("aten::mm") < text.index("aten.tanh") < text.index("aten.sum")


def test_operators_that_share_no_tensor_are_apart(segments):
    found = segments(lambda x, y: (x.sin(), y.cos()), torch.ones(3), torch.ones(3))
    assert [("sin" in each, "cos" in each) for each in found] == [(True, False), (False, True)]


def test_kernels_of_a_large_program_are_compiled_side_by_side(monkeypatch, tmp_path):
    monkeypatch.setenv("FUNCNET_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_TEXT", 100)
    monkeypatch.setattr(build, "_processors", lambda: 3)
    step, state, batch = blocks_of(2)
    expected = step(state, batch)
    sources = build._sources(fn.jit(step).lower(state, batch).code, 3)
    assert len(sources) == 3
    assert sum(source.count("funcnet_run") for source in sources) == 1
    torch.testing.assert_close(fn.jit(step)(state, batch), expected)


def test_a_product_without_elements_leaves_no_gap_in_the_text():
    def function(x):
        return x.T @ x, x @ x.T

    x = torch.ones(2, 0)
    compiled = fn.jit(function)
    lowered = compiled.lower(x)
    assert lowered.why_not_one is None
    head, run = lowered.code.split("\n\n")
    assert "#include" in head
    assert "funcnet_run" in run
    torch.testing.assert_close(compiled(x), function(x))
