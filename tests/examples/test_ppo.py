"""PPO: its loss and derivative, the advantages, when carts start anew, its twin, a short run."""

import re
import sys

import cartpole
import ppo as example
import pytest
import torch

import funcnet as fn
from funcnet.testing import check_loss

pytestmark = pytest.mark.cpu_only


def outputs(n, dtype=torch.float32):
    """What a model says, and what it is compared with, some of whose ratios are clipped."""
    keys = fn.random.split(fn.key(0), 5)
    logits, value, old, advantage, wanted = [
        fn.random.normal(key, shape, dtype)
        for key, shape in zip(keys, [(n, 2), (n,), (n, 2), (n,), (n,)], strict=True)
    ]
    action = torch.arange(n) % 2
    log_p = old.log_softmax(-1).gather(-1, action[:, None]).squeeze(-1)
    prediction = {"policy": logits, "value": value}
    return prediction, example.Target(action, log_p, advantage, wanted)


def test_the_loss_keeps_the_laws():
    prediction, target = outputs(12, torch.float64)
    log_p = prediction["policy"].log_softmax(-1).gather(-1, target.action[:, None]).squeeze(-1)
    ratio = (log_p - target.log_p).exp()
    clipped = torch.where(target.advantage > 0, ratio > 1.2, ratio < 0.8)
    assert 0 < clipped.sum() < 12
    check_loss(example.objective(), prediction, target)


def test_an_example_that_is_clipped_moves_no_policy():
    action, zero = torch.tensor([1]), torch.zeros(1)
    prediction = {"policy": torch.zeros(1, 2), "value": zero}
    # It is as likely again as it was, and better than expected: enough.
    target = example.Target(action, torch.tensor([0.25]).log(), torch.ones(1), zero)
    value, pullback = example.objective().vjp(prediction, target)
    assert torch.equal(pullback()["policy"], torch.zeros(1, 2))
    assert value == pytest.approx(-1.2 - 0.01 * torch.tensor(2.0).log().item())
    worse = target._replace(advantage=-torch.ones(1))
    _, pullback = example.objective().vjp(prediction, worse)
    torch.testing.assert_close(pullback()["policy"], torch.tensor([[-1.0, 1.0]]))


def test_advantages_are_discounted_errors_until_a_fall():
    reward, value = torch.tensor([1.0, 1, 1, 1]), torch.tensor([0.5, 0.25, 2, 1])
    fallen = torch.tensor([False, True, False, False])
    nothing = torch.zeros(4)
    seen = example.Seen(nothing, nothing, nothing, value, reward, fallen)
    d = [1 + 0.99 * 0.25 - 0.5, 1 - 0.25, 1 + 0.99 * 1 - 2, 1 + 0.99 * 3 - 1]
    decay = 0.99 * 0.95
    expected = [d[0] + decay * d[1], d[1], d[2] + decay * d[3], d[3]]
    found = example.advantages(seen, torch.tensor(3.0))
    torch.testing.assert_close(found, torch.tensor(expected))


def test_carts_start_anew_after_a_fall_and_between_windows_at_the_limit():
    optimizer = example.make_optimizer(10)
    params = example.start(optimizer, fn.key(0)).train.params
    late = cartpole.reset(fn.key(1))._replace(steps=torch.tensor(495))
    after, seen = example.push(params, late, fn.key(2))
    first = int(seen.fallen.long().argmax())
    assert first > 5  # the limit is passed before the first fall
    assert seen.reward.eq(1).all()
    falls = seen.fallen.nonzero().flatten()
    starts = seen.observed[falls[falls < example.STEPS - 1] + 1]
    assert starts.abs().max() <= 0.05
    assert not torch.equal(seen.observed[1:], seen.observed[:-1])
    assert after.steps == example.STEPS - 1 - falls[-1]

    over = late._replace(observed=torch.full((4,), 0.1), steps=torch.tensor(500))
    _, seen = example.push(params, over, fn.key(2))
    assert seen.observed[0].abs().max() <= 0.05
    said, _ = example.MODEL.apply(params, seen.observed)
    torch.testing.assert_close(seen.value, said["value"])
    log_p = said["policy"].log_softmax(-1).gather(-1, seen.action[:, None]).squeeze(-1)
    torch.testing.assert_close(seen.log_p, log_p)


def test_the_twin_in_pytorch_has_the_same_loss_gradients_and_advantages():
    torch.manual_seed(0)
    twin = example.InPyTorch(10)
    params = {
        "policy": fn.tree.from_dotted(dict(twin.policy.state_dict())),
        "value": {"0": fn.tree.from_dotted(dict(twin.value.state_dict()))},
    }
    seen, last_value = twin.push()
    assert seen.reward.shape == (example.STEPS, example.CARTS)
    advantage = twin.advantages(seen, last_value)
    torch.testing.assert_close(example.advantages(seen, last_value), advantage)

    target = example.Target(seen.action, seen.log_p - 0.1, advantage, advantage + seen.value)
    observed, target = seen.observed.flatten(0, 1), fn.tree.map(torch.flatten, target)
    f = fn.value_and_grad(example.MODEL, example.objective())
    value, grads, _ = f(params, (observed, target))
    expected = twin.loss(observed, target)
    torch.testing.assert_close(value, expected.detach())
    expected.backward()
    for name, tower, found in (
        ("policy", twin.policy, grads["policy"]),
        ("value", twin.value, grads["value"]["0"]),
    ):
        for path, p in tower.named_parameters():
            g = fn.tree.to_dotted(found)[path]
            torch.testing.assert_close(g, p.grad, rtol=1e-3, atol=1e-5, msg=f"{name} {path}")
    before = [p.detach().clone() for p in twin.params]
    twin.update()
    assert not any(map(torch.equal, before, twin.params))


def test_a_short_run_learns_prints_rates_and_draws(monkeypatch, capsys, tmp_path):
    figure = tmp_path / "made" / "ppo.png"
    monkeypatch.setattr(sys, "argv", ["ppo", "--quick", "--output", str(figure)])
    example.main()
    printed = capsys.readouterr().out
    medians = [
        int(value) for value in re.findall(r"mean return of the seeds, median (\d+)", printed)
    ]
    assert len(medians) == 2
    assert min(medians) > 60
    assert re.search(r"^\d of 2 seeds solved it; \d+\.\d s with compilation$", printed, re.M)
    assert re.search(r"\S+ in plain PyTorch; \d+ times as many\n", printed)
    assert figure.read_bytes().startswith(b"\x89PNG")
