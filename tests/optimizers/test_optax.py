"""Optimizers that torch.optim lacks, against optax, by tests/data/optax_updates.json."""

import json
from pathlib import Path

import pytest
import torch

import funcnet as fn
from funcnet import optimizers as opt

EXPECTED = json.loads((Path(__file__).parents[1] / "data/optax_updates.json").read_text())


def falling(step):
    return 0.1 / (1.0 + step.double())


OURS = {
    "lion": lambda: fn.lion(0.01),
    "lion options": lambda: fn.lion(falling, (0.7, 0.9), 0.1),
    "lamb": lambda: fn.lamb(0.01),
    "lamb options": lambda: fn.lamb(falling, (0.8, 0.9), 1e-3, 0.1),
    "lars": lambda: fn.lars(0.1),
    "lars options": lambda: fn.lars(falling, 0.1, 0.02, 0.01, 0.8, True),
    "trust ratio": lambda: fn.chain(opt.scale_by_trust_ratio(1.9, 0.5, 0.1), opt.scale(-0.1)),
    "schedule-free sgd": lambda: fn.schedule_free_sgd(0.1),
    "schedule-free sgd options": lambda: fn.schedule_free_sgd(0.1, 4, 0.8, 0.1, 1.0),
    "schedule-free adamw": lambda: fn.schedule_free_adamw(0.1),
    "schedule-free adamw options": lambda: fn.schedule_free_adamw(
        0.1, 5, (0.95, 0.9), 1e-3, 0.1, 1.5
    ),
    "schedule-free momentum": lambda: fn.schedule_free(rms_inside(0.05), 0.05, 0.7),
    "schedule-free schedule": lambda: fn.schedule_free(fn.sgd(falling), falling, 0.9),
    "sophia": lambda: fn.sophia(0.01),
    "sophia options": lambda: fn.sophia(falling, (0.8, 0.9), 1e-2, 0.1, 0.05, 0.5),
    "sophia without a limit": lambda: fn.sophia(0.01, eps=0.1, gamma=0.1, clip_threshold=None),
}


def rms_inside(lr):
    """optax.rmsprop's own formula: eps is under the root, and the decay another."""

    def update(g, state, p):
        v = 0.9 * state.nu + 0.1 * g * g
        return -lr * g / torch.sqrt(v + 1e-8), opt.RmsState(v, ())

    return opt.stateful(lambda p: opt.RmsState(torch.zeros_like(p), ()), update)


def tensors(tree):
    return {name: torch.tensor(leaf, dtype=torch.float64) for name, leaf in tree.items()}


def gradients(step, params):
    return fn.tree.map(lambda p: torch.sin(3.0 * p + step) + 0.1 * p, params)


def hessian(step, params):
    return fn.tree.map(lambda p: 50.0 * torch.cos(p + step) + 20.0, params)


@pytest.mark.parametrize("name", OURS)
def test_steps_are_those_of_optax(name):
    optimizer, params = OURS[name](), tensors(EXPECTED["params"])
    state = optimizer.init_state(params)
    for step, expected in enumerate(EXPECTED[name]):
        updates, state = optimizer.update(gradients(step, params), state, params)
        if "sophia" in name and step % 3 == 0:
            state = opt.refresh_hessian(state, hessian(step, params))
        params = fn.apply_updates(params, updates)
        torch.testing.assert_close(params, tensors(expected["params"]), rtol=1e-12, atol=1e-13)
        if "eval" in expected:
            average = state["average_schedule_free"].eval_params(params)
            torch.testing.assert_close(average, tensors(expected["eval"]), rtol=1e-11, atol=1e-12)


def test_every_vector_is_compared():
    assert EXPECTED.keys() == {"optax", "params", *OURS}
