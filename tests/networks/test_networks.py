"""Whole networks train as their twins in torch.nn do: ten steps, from the same state_dict."""

import pytest
import torch
from networks import gpt2, nets, transformers
from networks.training import CASES, error, start_of, train, train_twin

import funcnet as fn

pytestmark = pytest.mark.cpu_only
# ``python -m tests.networks`` compiles all of them.
COMPILED = ("lenet", "tagger", "gpt", "transformer")


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_are_those_of_torch_eager_and_compiled(name):
    case = CASES[name]
    expected = train_twin(case, full=False)
    for path, start in start_of(case, full=False)[1].named_parameters():
        assert not torch.equal(start, expected.params[path])
    assert error(train(case, full=False), expected) <= 1e-8
    if name in COMPILED:
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
        (transformers.positions(4), (2, 3, 5)),
        (transformers.class_token(), (2, 3, 5)),
    ],
    ids=["block", "projecting block", "level", "vae", "positions", "class token"],
)
def test_layers_with_a_data_flow_of_their_own_keep_the_laws(layer, shape):
    fn.testing.check_layer(layer, randn(*shape))


def test_the_sample_of_a_code_keeps_the_laws():
    fn.testing.check_layer(nets.sample(), (randn(2, 3), randn(2, 3)))


def test_the_loss_of_the_vae_keeps_the_laws():
    fn.testing.check_loss(
        nets.elbo(), (randn(2, 5), randn(2, 3), randn(2, 3)), randn(2, 5).sigmoid()
    )


def test_the_transformer_of_tokens_keeps_the_laws():
    x = {
        "src": torch.tensor([[0, 3, 4]]),
        "tgt": torch.tensor([[2, 3]]),
        "padding": torch.tensor([[False, False, True]]),
    }
    fn.testing.check_layer(transformers.translator(5, 4, 2, 1, 3), x, modes=(True,))


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_gpt2_has_the_logits_and_gradients_that_it_has_in_transformers(dtype, within):
    pytest.importorskip("transformers", reason="the package transformers is not installed")
    sizes = {"vocab_size": 50, "n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 20}
    assert max(gpt2.errors(dtype, **sizes).values()) < within
