"""The autoencoder: K-FAC is ahead of Adam after few steps; curves are read as they are drawn."""

import kfac_autoencoder as example
import pytest
import torch

import funcnet as fn

pytestmark = pytest.mark.cpu_only


def test_the_images_are_at_half_their_side_and_each_is_in_one_set():
    images, test = example.load(fn.key(0))
    assert images.shape == (4000, 196)
    assert test.shape == (1000, 196)
    assert images.min() >= 0
    assert images.max() <= 1


def test_drawn_pixels_are_as_likely_as_the_net_says():
    logits = torch.tensor([-2.0, 0.0, 3.0]).expand(20000, 3)
    found = example.draw(fn.key(0), logits)
    assert {*found.unique().tolist()} == {0.0, 1.0}
    torch.testing.assert_close(found.mean(0), logits[0].sigmoid(), rtol=0, atol=0.02)


def test_the_first_step_at_which_the_mean_of_an_epoch_is_below():
    losses = torch.cat([torch.full((8,), 4.0), torch.full((8,), 2.0), torch.full((8,), 1.0)])
    assert example.first_below(losses, 4.0) == 8
    assert example.first_below(losses, 2.0) == 16
    assert example.first_below(losses, 0.5) is None


def test_the_best_rate_is_that_of_the_least_loss_at_the_end():
    def run(last):
        losses = torch.full((16,), last)
        return example.Run(losses, losses, 0.0, {})

    runs = {"kfac": run(1.0), "adam 1": run(3.0), "adam 2": run(2.0), "adam 3": run(torch.nan)}
    assert example.best_adam(runs)[0] == "adam 2"


def test_kfac_is_ahead_after_few_steps_and_both_are_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fn, "jit", lambda function: function)  # compiling takes longer
    monkeypatch.setattr(example, "RATES", (1e-2,))
    example.main(["--steps", "40", "--output", str(tmp_path / "kfac.png")])
    header, kfac, adam, wrote = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["train", "test"]
    assert float(kfac.split()[1]) < float(adam.split()[2])
    assert wrote.startswith("wrote")
