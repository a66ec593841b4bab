"""The population sweep: members are solo runs, and a run that was interrupted goes on."""

import population_sweep as sweep
import pytest
import torch

import funcnet as fn

pytestmark = pytest.mark.cpu_only


def test_a_member_is_its_solo_run():
    row = sweep.Row(100, "Tanh", 2, 3, 0, rates=(1e-3, 1e-4))
    result = sweep.train_row(row, lambda epochs: None)
    assert result.history.shape == (2, 2, 3, 2, 2)
    model = sweep.net(fn.tanh())
    key = fn.random.split(fn.key(0), 2)[1]
    run, progress = sweep.start(model, key, torch.tensor(1e-4))
    _, history = sweep.train(model, 100, run, progress, torch.arange(3))
    torch.testing.assert_close(result.history[1, 1], history, rtol=1e-3, atol=2e-3)


def test_what_is_measured_is_the_average_of_the_last_epochs():
    model = sweep.net(fn.relu())
    run, progress = sweep.start(model, fn.key(0), torch.tensor(1e-3))
    seen = []
    for epoch in range(3):
        progress, _ = sweep.train(model, 200, run, progress, torch.tensor([epoch]))
        seen.append(progress.state.params)
    expected = fn.tree.map(lambda *leaves: torch.stack(leaves).mean(0), *seen)
    for one, other in zip(fn.tree.leaves(progress.average), fn.tree.leaves(expected), strict=True):
        torch.testing.assert_close(one, other)


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.pt"
    rows = [sweep.Row(200, name, 1, 2, 0, rates=(1e-3,)) for name in ("ReLU", "Tanh")]

    def stopped(row, advance, train_row=sweep.train_row):
        if row.activation == "Tanh":
            raise KeyboardInterrupt
        return train_row(row, advance)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "train_row", stopped)
        with pytest.raises(KeyboardInterrupt):
            sweep.sweep(rows, path)
    kept = sweep.load(path)
    assert list(kept) == [repr(rows[0])]
    results = sweep.sweep(rows, path)
    assert "1 of 2 rows are taken from" in capsys.readouterr().out
    assert torch.equal(results[200, "ReLU"].history, kept[repr(rows[0])].history)
    assert len(sweep.load(path)) == 2
    other = [rows[0]._replace(seed=1)]
    assert not torch.equal(
        sweep.sweep(other, path)[200, "ReLU"].history, kept[repr(rows[0])].history
    )
