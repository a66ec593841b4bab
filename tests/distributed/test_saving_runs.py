"""Checkpoints of train states: of each layout to any other, and to a single process."""

import os

import pytest
import torch

import funcnet as fn

HIDDEN = 5
X, TARGET = (fn.random.normal(fn.key(seed), (8, n), torch.float64) for seed, n in ((1, 3), (2, 2)))
MESHES = {"tensor": {"model": 2}, "pipeline": {"pipe": 2}}


def net(layout, mesh):
    hidden, out = fn.linear(HIDDEN), fn.linear(2)
    middle = fn.repeat(fn.linear(HIDDEN), 2)
    if layout == "tensor":
        hidden = fn.distributed.column_linear(HIDDEN, mesh, gather=True)
    if layout in ("sharded", "repeated"):
        hidden, out = [fn.distributed.sharded(layer, mesh) for layer in (hidden, out)]
    if layout == "sharded":
        middle = fn.distributed.sharded(middle, mesh)
    if layout == "repeated":
        middle = fn.repeat(fn.distributed.sharded(fn.linear(HIDDEN), mesh), 2)
    return fn.serial(hidden, fn.tanh(), middle, fn.tanh(), out)


def start(layout):
    """A layout's mesh, its first train state, how that is parted, and its step."""
    mesh = fn.distributed.mesh(**MESHES.get(layout, {}))
    model, adam = net(layout, mesh), fn.adam(0.01)
    if layout == "zero":
        optimizer = fn.chain(adam=fn.distributed.zero(adam, mesh))
    elif layout in ("plain", "tensor", "pipeline"):
        optimizer = fn.chain(fn.distributed.mean(mesh), adam)
    else:
        optimizer = fn.chain(adam=adam)
    if layout == "pipeline":
        state = fn.distributed.pipeline_state(model, optimizer, fn.key(0), X, mesh)
        step = fn.distributed.pipeline_step(model, fn.mse(), optimizer, mesh, micro_batches=2)
    else:
        state = fn.init_train_state(model, optimizer, fn.key(0), X)
        step = fn.train_step(model, fn.mse(), optimizer)
    placed = fn.distributed.state_placements(state, model, X)
    return mesh, state, placed, lambda state: step(state, fn.distributed.part((X, TARGET), mesh))[0]


def train(folder, layout):
    """Two steps from the beginning, or from the last checkpoint, which are saved."""
    mesh, state, placed, step = start(layout)
    if path := fn.distributed.latest(folder, mesh):
        state = fn.distributed.load(path, state, mesh, placed)
    for _ in range(2):
        state = step(state)
        fn.distributed.save_step(folder, state.step, state, mesh, placed, keep=1)


def alone(folder, steps):
    """The same steps in a single process."""
    optimizer = fn.chain(adam=fn.adam(0.01))
    model = fn.serial(
        fn.linear(HIDDEN), fn.tanh(), fn.repeat(fn.linear(HIDDEN), 2), fn.tanh(), fn.linear(2)
    )
    state = fn.init_train_state(model, optimizer, fn.key(0), X)
    step = fn.train_step(model, fn.mse(), optimizer)
    found = fn.load(fn.checkpoint.latest(folder), state)
    for _ in range(steps):
        state, _ = step(state, (X, TARGET))
    return state, found


def same_again(folder, layout):
    """What was saved, loaded in the same layout and saved again."""
    mesh, state, placed, _ = start(layout)
    state = fn.distributed.load(fn.distributed.latest(folder, mesh), state, mesh, placed)
    fn.distributed.save(os.path.join(folder, f"again {layout}"), state, mesh, placed)


LAYOUTS = ["plain", "zero", "sharded", "repeated", "tensor", "pipeline"]


def test_a_run_goes_on_in_other_layouts_and_on_other_ranks(two_ranks, four_ranks, tmp_path):
    steps = 0
    for ranks in (two_ranks, four_ranks):
        for layout in LAYOUTS:
            ranks(train, tmp_path, layout)
            steps += 2
    expected, found = alone(tmp_path, steps)
    assert found.step == steps
    assert not fn.tree.compare(found, expected, rtol=1e-11, atol=1e-13)
    assert len(fn.checkpoint.steps(tmp_path)) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_loads_and_saves_the_same_numbers(layout, two_ranks, four_ranks, tmp_path):
    two_ranks(train, tmp_path, "zero")
    _, found = alone(tmp_path, 0)
    four_ranks(same_again, tmp_path, layout)
    assert not fn.tree.compare(fn.load(tmp_path / f"again {layout}", found), found)
