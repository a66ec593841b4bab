"""Early stopping and best-so-far as values."""

import math

import pytest
import torch
from hypothesis import given, strategies as st

import funcnet as fn

VALUES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, math.nan, math.inf]), max_size=20)


def by_hand(values, patience, min_delta, mode):
    """Keras' rule."""
    best, wait, stop = (math.inf if mode == "min" else -math.inf), 0, False
    for value in values:
        better = value < best - min_delta if mode == "min" else value > best + min_delta
        best, wait = (value, 0) if better else (best, wait + 1)
        stop = stop or wait >= patience
    return best, wait, stop


@given(VALUES, st.integers(1, 4), st.sampled_from([0.0, 0.5]), st.sampled_from(["min", "max"]))
def test_it_is_the_rule_by_hand(values, patience, min_delta, mode):
    stopping = fn.early_stopping(patience, min_delta, mode)
    state = stopping.init()
    for value in values:
        state = stopping.update(state, torch.tensor(value))
    assert tuple(each.item() for each in state) == by_hand(values, patience, min_delta, mode)


def test_under_jit_scan_and_vmap_it_is_the_same():
    stopping, keeping = fn.early_stopping(2), fn.best_so_far("max")
    values = torch.tensor([[3.0, 1.0, 2.0, 2.0], [1.0, 2.0, 3.0, 0.5]])

    def run(values):
        def body(carry, value):
            state, best = carry
            return (stopping.update(state, value), keeping.update(best, value, {"w": value})), None

        start = stopping.init(), keeping.init({"w": torch.tensor(-1.0)})
        return fn.scan(body, start, values)[0]

    for found in (fn.vmap(run)(values), fn.vmap(fn.jit(run))(values)):
        state, best = found
        assert state.best.tolist() == [1.0, 0.5]
        assert state.stop.tolist() == [True, True]
        assert best.tree["w"].tolist() == best.value.tolist() == [3.0, 3.0]


def test_best_so_far_keeps_the_tree_of_the_best_value():
    keeping = fn.best_so_far()
    best = keeping.init({"w": torch.zeros(2), "n": torch.tensor(0)})
    for n, value in enumerate([math.nan, 3.0, 1.0, 1.0, 2.0, math.nan], 1):
        best = keeping.update(
            best, torch.tensor(value), {"w": torch.full((2,), value), "n": torch.tensor(n)}
        )
    assert (best.value.item(), best.tree["n"].item()) == (1.0, 3)
    assert best.tree["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("patience must be an integer >= 1, got 0", lambda: fn.early_stopping(0)),
        ("min_delta must be >= 0, got -1", lambda: fn.early_stopping(min_delta=-1)),
        (
            "early_stopping: mode must be 'min' or 'max', got 'up'",
            lambda: fn.early_stopping(mode="up"),
        ),
        ("best_so_far: mode must be 'min' or 'max', got 0", lambda: fn.best_so_far(0)),
    ],
)
def test_misuse_is_told(message, make):
    with pytest.raises(ValueError, match=message):
        make()
