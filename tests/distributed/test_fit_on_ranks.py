"""`fit` on several ranks: its checkpoints are of all of them, and a run goes on bit for bit."""

import pytest
import torch

import funcnet as fn

D = fn.distributed
X = fn.random.normal(fn.key(1), (32, 6), torch.float64)
TARGET = 2.0 * X[:, :3]


def run_of(kind):
    mesh = D.mesh()
    hidden, optimizer = fn.linear(7), fn.adam(1e-2)
    if kind == "sharded":
        hidden = D.sharded(hidden, mesh)
        optimizer = fn.chain(D.mean(mesh), optimizer)
    else:
        optimizer = D.zero(optimizer, mesh)
    net = fn.serial(hidden, fn.tanh(), fn.linear(3))
    start = fn.init_train_state(net, optimizer, fn.key(0), X)
    source = fn.batches((X, TARGET), 8)

    def own(key, step):
        return D.part(source(key, step), mesh)

    step = fn.train_step(net, fn.mse(), optimizer)
    return mesh, net, start, step, own


def resumed(folder, kind):
    mesh, net, start, step, own = run_of(kind)
    checkpoint = D.run_folder(folder, mesh, D.state_placements(start, net, X))
    stopping = {"early_stopping": {"same": fn.early_stopping(patience=100)}}

    def counted(state, batch):
        state, metrics = step(state, batch)
        return state, metrics | {"same": 1.0 / state.step}

    full, whole = fn.fit(counted, start, own, steps=12, **stopping)
    fn.fit(counted, start, own, steps=6, every=4, checkpoint=checkpoint, **stopping)
    with pytest.raises(ValueError, match="checkpoints of another run, the last step_0000000006"):
        fn.fit(counted, start, own, steps=12, checkpoint=checkpoint, **stopping)
    again, history = fn.fit(
        counted, start, own, steps=12, checkpoint=checkpoint, resume=True, **stopping
    )
    for expected, found in zip(fn.tree.leaves(full), fn.tree.leaves(again), strict=True):
        assert torch.equal(expected, found)
    return whole["loss"], history["loss"]


@pytest.mark.parametrize("kind", ["zero", "sharded"])
def test_a_run_on_ranks_goes_on_bit_for_bit(two_ranks, tmp_path, kind):
    (whole, history), (other, after) = two_ranks(resumed, str(tmp_path / "run"), kind)
    assert torch.equal(history, whole)
    assert torch.equal(after, torch.cat((whole[:6], other[6:])))


def test_a_single_process_goes_on_with_the_run_of_ranks(two_ranks, tmp_path):
    two_ranks(resumed, str(tmp_path / "run"), "sharded")
    net, mesh = fn.serial(fn.linear(7), fn.tanh(), fn.linear(3)), {"data": 1}
    optimizer = fn.chain(D.mean(mesh), fn.adam(1e-2))
    start = fn.init_train_state(net, optimizer, fn.key(0), X)
    step, source = fn.train_step(net, fn.mse(), optimizer), fn.batches((X, TARGET), 8)
    expected, _ = fn.fit(step, start, source, steps=14)
    found, history = fn.fit(step, start, source, steps=14, checkpoint=tmp_path / "run", resume=True)
    assert len(history["loss"]) == 14
    for one, other in zip(fn.tree.leaves(expected), fn.tree.leaves(found), strict=True):
        torch.testing.assert_close(one, other)


def refused(folder):
    _, _, start, step, own = run_of("zero")
    with pytest.raises(ValueError, match=r"fit: .* there are 2, .*fn\.distributed\.run_folder\("):
        fn.fit(step, start, own, steps=1, checkpoint=folder)


def test_a_folder_of_one_process_is_refused(two_ranks, tmp_path):
    two_ranks(refused, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def saved_alone(folder):
    start = run_of("zero")[2]
    message = r"save: a ZeroState has this rank's parts alone, of 2 ranks; use fn\.distributed"
    with pytest.raises(ValueError, match=message):
        fn.save(f"{folder}/state", start)
    with pytest.raises(ValueError, match=message):
        fn.checkpoint.save_step(folder, 0, start.opt_state)


def test_one_ranks_part_of_zeros_state_is_not_saved_alone(two_ranks, tmp_path):
    two_ranks(saved_alone, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
