"""Whole networks train as their twins in torch.nn do: ten steps, from the same state_dict."""

import pytest
import torch
from networks.training import CASES, error, train, train_twin

import funcnet as fn

pytestmark = pytest.mark.cpu_only


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_are_those_of_torch_eager_and_compiled(name):
    case = CASES[name]
    expected = train_twin(case, full=False)
    assert not torch.equal(expected.losses[0], expected.losses[-1])
    assert error(train(case, full=False), expected) <= 1e-8
    assert error(train(case, full=False, transform=fn.jit), expected) <= 1e-8
