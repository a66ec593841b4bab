"""The net whose cotangents vanish: what is observed is what autograd has, and the run is shown."""

import re
import sys

import pytest
import torch
import vanishing as example
from torch import nn

import funcnet as fn

pytestmark = pytest.mark.cpu_only


@pytest.mark.parametrize("residual", [False, True])
def test_the_norms_are_those_of_autograd(residual):
    depth, net = 3, example.deep_net(3, residual)
    run = example.train(fn.key(0), net, 2)
    assert run.cotangents.shape == (2, depth)

    data = example.draw(fn.fold_in(fn.key(0), "data"), example.EXAMPLES)
    x = example.z_score(data.points)(data.points)
    params, _ = net.init(fn.fold_in(fn.key(0), "model"), x)
    hidden, outputs = nn.functional.linear(x, *params["first"].values()).requires_grad_(), []
    for weight, bias in zip(*params["blocks"]["linear"].values(), strict=True):
        outputs.append(nn.functional.linear(hidden, weight, bias).tanh())
        hidden = hidden + outputs[-1] if residual else outputs[-1]
    logits = nn.functional.linear(hidden, *params["last"].values())
    loss = nn.functional.cross_entropy(logits, data.labels)
    cotangents = torch.autograd.grad(loss, outputs)
    torch.testing.assert_close(run.loss[0], loss.detach())
    expected = torch.stack([each.norm() for each in outputs]).detach()
    torch.testing.assert_close(run.outputs[0], expected)
    torch.testing.assert_close(run.cotangents[0], torch.stack([each.norm() for each in cotangents]))


def test_without_skip_connections_cotangents_vanish_and_with_them_they_do_not():
    plain, residual = (
        example.decay(example.train(fn.key(1), example.deep_net(15, skips), 1))
        for skips in (False, True)
    )
    assert plain < 1e-2
    assert residual > 1


def test_a_run_prints_the_ratios_and_draws(monkeypatch, capsys, tmp_path):
    figure = tmp_path / "made" / "vanishing.png"
    options = ["--depth", "4", "--steps", "3", "--output", str(figure)]
    monkeypatch.setattr(sys, "argv", ["vanishing", *options])
    monkeypatch.setattr(fn, "jit", lambda f, static: f)  # it is compiled elsewhere
    example.main()
    printed = capsys.readouterr().out
    number = r"\d\.\de[+-]\d\d"
    found = re.findall(
        rf"^(\w+): loss .*, of that at the last: {number} to {number}$", printed, re.M
    )
    assert found == ["plain", "residual"]
    assert figure.read_bytes().startswith(b"\x89PNG")
