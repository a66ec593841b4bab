"""The physics-informed net: the exact solution solves the equation, and the loss is PyTorch's."""

import math
import re
import sys

import pinn as example
import pytest
import torch

import funcnet as fn

pytestmark = pytest.mark.cpu_only

DOUBLE = torch.float64


def test_the_exact_solution_solves_the_equation():
    x, t = torch.linspace(-0.95, 0.95, 20, dtype=DOUBLE), torch.full((20,), 0.3, dtype=DOUBLE)
    one = torch.ones_like(x)

    def by_x(x):
        return fn.jvp(lambda x: example.exact(x, t), (x,), (one,))

    (u, u_x), (_, u_xx) = fn.jvp(by_x, (x,), (one,))
    _, u_t = fn.jvp(lambda t: example.exact(x, t), (t,), (one,))
    torch.testing.assert_close(u_t + u * u_x, example.NU * u_xx, rtol=1e-6, atol=1e-8)
    soon = example.exact(x, torch.full_like(x, 1e-7))
    torch.testing.assert_close(soon, -torch.sin(math.pi * x), rtol=1e-5, atol=1e-6)


def test_the_loss_and_its_gradient_are_those_by_autograd():
    params, _ = example.net.init(fn.key(0), torch.zeros(1, 2, dtype=DOUBLE))
    batch = fn.tree.map(torch.Tensor.double, example.draw(fn.key(1), 50, 20))
    value, grads = example.value_and_grad(params, batch)
    peer = example.InPyTorch(1)
    peer.net.double().load_state_dict(fn.tree.to_dotted(params))
    expected = peer.loss(batch)
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        fn.tree.to_dotted(grads), {name: p.grad for name, p in peer.net.named_parameters()}
    )


def test_points_are_where_they_should_be():
    points, (known, u) = example.draw(fn.key(3))
    assert points.shape == (example.POINTS, 2)
    low, high = points.aminmax(dim=0)
    torch.testing.assert_close(low, torch.tensor([-1.0, 0.0]), rtol=0, atol=0.05)
    torch.testing.assert_close(high, torch.tensor([1.0, 1.0]), rtol=0, atol=0.05)
    start, edge = known.split(example.KNOWN // 2)
    assert (start[:, 1] == 0).all()
    assert (edge[:, 0].abs() == 1).all()
    assert edge[:, 1].min() >= 0
    torch.testing.assert_close(u[: len(start)], -torch.sin(math.pi * start[:, 0]))


def test_a_short_run_prints_errors_and_draws(tmp_path, monkeypatch, capsys):
    figure = tmp_path / "made" / "pinn.png"
    monkeypatch.setattr(sys, "argv", ["pinn.py", "--quick", "--output", str(figure)])
    example.main()
    printed = capsys.readouterr().out
    errors = [float(each) for each in re.findall(r"relative L2 error (\S+)", printed)]
    assert len(errors) == example.CHUNKS
    assert errors[-1] < errors[0] < 1.5
    assert "in plain PyTorch" in printed
    assert figure.read_bytes().startswith(b"\x89PNG")
