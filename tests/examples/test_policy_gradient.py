"""Policy gradients: what a step earns, the gradient as autograd has it, and a short run."""

import re
import sys

import policy_gradient as example
import pytest
import torch
from torch import nn

import funcnet as fn

pytestmark = pytest.mark.cpu_only


def test_advantages_are_returns_less_those_of_the_carts_that_stand():
    reward = torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    found = example.advantages(reward, reward > 0)
    returns = [[3.0, 2, 1, 0], [4, 3, 2, 1], [1, 0, 0, 0]]
    averages = [8 / 3, 5 / 2, 3 / 2, 1]
    for row, values, rewards in zip(found, returns, reward, strict=True):
        expected = [
            (value - average) * bool(stands)
            for value, average, stands in zip(values, averages, rewards, strict=True)
        ]
        assert row.tolist() == pytest.approx(expected)


def test_no_cart_that_stands_is_no_advantage():
    zeros = torch.zeros(2, 3)
    assert torch.equal(example.advantages(zeros, zeros > 0), zeros)


def pushed():
    """The params, and 200 steps of four carts."""
    run = example.start(fn.key(0))
    carts = fn.tree.map(lambda leaf: leaf[:4], run.carts)
    keys = fn.random.split(fn.key(1), 4)
    after, seen = fn.vmap(example.push, in_axes=(None, 0, 0))(run.train.params, carts, keys)
    return run.train.params, carts, after, seen


def test_a_cart_is_pushed_until_it_falls_and_is_a_new_one_in_the_next_update():
    params, carts, after, seen = pushed()
    assert torch.equal(seen.observed[:, 0], carts.observed)
    assert seen.standing[:, 0].all()
    assert after.fallen.all()  # nobody stands for 200 steps by chance
    assert torch.equal(seen.reward, seen.standing.float())
    assert (seen.standing.long().diff(dim=1) <= 0).all()
    old = fn.tree.map(lambda leaf: leaf[0], after)
    _, again = example.push(params, old, fn.key(5))
    assert again.observed[0].abs().max() <= 0.05
    going = old._replace(fallen=torch.tensor(False), steps=torch.tensor(200))
    _, further = example.push(params, going, fn.key(5))
    assert torch.equal(further.observed[0], going.observed)


def test_the_gradient_is_that_of_autograd_through_the_objective():
    params, _, _, seen = pushed()
    advantage = example.advantages(seen.reward, seen.standing)
    grads = fn.tree.to_dotted(example.gradient(params, seen, advantage))

    twin = example.InPyTorch().policy
    twin.load_state_dict(fn.tree.to_dotted(params))
    log_p = twin(seen.observed).log_softmax(-1)
    chosen = log_p.gather(-1, seen.action.unsqueeze(-1)).squeeze(-1)
    (-advantage * chosen).sum().backward()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-4)


def test_the_twin_in_pytorch_does_the_same_update():
    torch.manual_seed(0)
    twin = example.InPyTorch()
    params = fn.tree.from_dotted({k: v.clone() for k, v in twin.policy.state_dict().items()})
    seen = twin.push()
    assert seen.reward.shape == (example.CARTS, example.STEPS)
    weight = example.advantages(seen.reward, seen.standing) / seen.standing.sum()
    grads = example.gradient(params, seen, weight)
    updates, _ = example.OPTIMIZER.update(grads, example.OPTIMIZER.init_state(params), params)

    twin.push = lambda: seen
    twin.update()
    expected = fn.tree.to_dotted(fn.apply_updates(params, updates))
    for name, p in twin.policy.named_parameters():
        assert not torch.equal(p, fn.tree.to_dotted(params)[name])
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-4, atol=1e-5)
    assert isinstance(twin.policy, nn.Sequential)


def test_a_short_run_learns_prints_rates_and_draws(monkeypatch, capsys, tmp_path):
    figure = tmp_path / "made" / "policy.png"
    monkeypatch.setattr(sys, "argv", ["policy_gradient", "--quick", "--output", str(figure)])
    example.main()
    printed = capsys.readouterr().out
    returns = [int(value) for value in re.findall(r"mean return (\d+)", printed)]
    assert len(returns) == 2
    assert 15 < returns[0] < returns[1]
    assert re.search(r"^not solved; \d+\.\d s with compilation$", printed, re.MULTILINE)
    assert re.search(r"\S+ in one program, \S+ in plain PyTorch; \d+ times as many\n", printed)
    assert figure.read_bytes().startswith(b"\x89PNG")
