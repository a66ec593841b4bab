"""The population sweep: members are solo runs, choices are fair, interrupted sweeps go on."""

import population_sweep as sweep
import pytest
import reports
import torch

import funcnet as fn

pytestmark = pytest.mark.cpu_only


def member(row, rate, repetition):
    """The run and its progress before the first step."""
    index = row.rates.index(rate) * (sweep.CHOOSING + row.repetitions) + repetition
    return fn.tree.map(lambda leaf: leaf[index], sweep.start(row))


def test_a_member_is_its_solo_run():
    row = sweep.Row(100, "Tanh", 1, 3, 0, rates=(1e-3, 1e-4), windows=(1, 2))
    result = sweep.train_row(row, lambda epochs: None)
    runs = sweep.CHOOSING + 1
    assert result.loss.shape == result.error.shape == (2, 2, 2, runs, 1)
    _, measured = sweep.train(row, *member(row, 1e-4, 2), torch.arange(3))
    loss, error = result.loss[:, 1, :, 2, 0], result.error[:, 1, :, 2, 0]
    torch.testing.assert_close(loss.T * reports.POINTS, measured.loss, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(error.T, measured.error, rtol=1e-3, atol=2e-3)


def test_windows_are_of_the_last_parameters_and_of_means():
    row = sweep.Row(200, "ReLU", 1, 3, 0, rates=(1e-3,), windows=(1, 2, 3))
    run, progress = member(row, 1e-3, 0)
    seen = []
    for epoch in range(3):
        progress, measured = sweep.train(row, run, progress, torch.tensor([epoch]))
        seen.append(progress.state.params)

    def expected(first, second, third):
        return torch.stack(
            [third, ((first + second) / 2 + third) / 2, (first + second + third) / 3]
        )

    averages = fn.tree.map(expected, *seen)
    for one, other in zip(fn.tree.leaves(progress.averages), fn.tree.leaves(averages), strict=True):
        torch.testing.assert_close(one, other)
    last = reports.measure_all(row.recipe(), run, progress.state.params)
    torch.testing.assert_close(measured.loss[0], last.loss)


def test_rate_and_window_are_chosen_by_repetitions_that_are_not_reported():
    loss = torch.ones(2, 3, 2, sweep.CHOOSING + 4, 5)
    loss[sweep.TEST, 1, 0, : sweep.CHOOSING, -1] = 0.5
    loss[sweep.TEST, 0, 1, : sweep.CHOOSING, -1] = torch.nan
    loss[sweep.TRAIN, 2, 1] = 0  # of the training points
    loss[sweep.TEST, 2, 1, sweep.CHOOSING :] = 0  # of the repetitions that are reported
    loss[sweep.TEST, 2, 1, : sweep.CHOOSING, :-1] = 0  # before the last epoch
    result = sweep.Result(loss, loss, 0.0)
    assert result.chosen() == (1, 0)
    assert result.reported(result.loss, 2, 1).shape == (2, 4, 5)
    assert (result.reported(result.loss, 1, 0) == 1).all()


def test_the_table_has_both_accuracies(capsys):
    error = torch.full((2, 5, len(sweep.WINDOWS), sweep.CHOOSING + 2, 1), 0.5)
    loss = torch.ones_like(error)
    loss[:, 1, 3] = 0.1
    error[:, 1, 3] = 0.1
    error[:, 1, 0] = 0.2
    sweep.print_results({(200, "ReLU"): sweep.Result(loss, error, 0.0)})
    printed = capsys.readouterr().out
    assert "0.001  100" in printed
    assert "90.00 ± 0.00" in printed
    assert "80.00 ± 0.00" in printed
    assert "1 of 1 rows reach the report's test accuracy, 1 with the last parameters" in printed
    sweep.print_results({(200, "ReLU"): sweep.Result(loss, error, 0.0)}, compared=False)
    printed = capsys.readouterr().out
    assert "90.00 ± 0.00" in printed
    assert "not compared with the report, whose runs took 500 epochs" in printed
    assert not any(word in printed for word in ("FAIL", "pass", "  report", "rows reach"))


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.safetensors"
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
    assert torch.equal(results[200, "ReLU"].loss, kept[repr(rows[0])].loss)
    assert len(sweep.load(path)) == 2
    other = [rows[0]._replace(seed=1)]
    assert not torch.equal(sweep.sweep(other, path)[200, "ReLU"].loss, kept[repr(rows[0])].loss)
