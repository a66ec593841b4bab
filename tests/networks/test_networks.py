"""Whole networks train as their twins in torch.nn do: ten steps, from the same state_dict."""

import pytest
import torch
from networks import nets
from networks.training import CASES, error, start_of, train, train_twin

import funcnet as fn

pytestmark = pytest.mark.cpu_only


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_are_those_of_torch_eager_and_compiled(name):
    case = CASES[name]
    expected = train_twin(case, full=False)
    for path, start in start_of(case, full=False)[1].named_parameters():
        assert not torch.equal(start, expected.params[path])
    assert error(train(case, full=False), expected) <= 1e-8
    assert error(train(case, full=False, transform=fn.jit), expected) <= 1e-8


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nets.basic_block(3, 1, False), (2, 3, 4, 4)),
        (nets.basic_block(4, 2, True), (2, 3, 4, 4)),
        (nets.level(2, fn.conv2d(3, 1)), (2, 2, 4, 4)),
        (nets.vae(5, 4, 3), (2, 5)),
    ],
    ids=["block", "projecting block", "level", "vae"],
)
def test_layers_with_a_data_flow_of_their_own_keep_the_laws(layer, shape):
    fn.testing.check_layer(layer, randn(*shape))


def test_the_sample_of_a_code_keeps_the_laws():
    fn.testing.check_layer(nets.sample(), (randn(2, 3), randn(2, 3)))


def test_the_loss_of_the_vae_keeps_the_laws():
    fn.testing.check_loss(
        nets.elbo(), (randn(2, 5), randn(2, 3), randn(2, 3)), randn(2, 5).sigmoid()
    )
