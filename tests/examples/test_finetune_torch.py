"""A PyTorch model that is fine-tuned in funcnet: what is learned, and what comes back."""

import finetune_torch as example
import pytest
import torch

import funcnet as fn

pytestmark = pytest.mark.cpu_only


def test_a_few_images_are_learned_and_the_module_predicts_what_the_layer_does(tmp_path):
    result = example.run(0, 4, 500, tmp_path / "digits.safetensors")
    assert result.tuned > result.inverted
    assert result.same
    assert result.difference < 1e-4


def test_the_stem_is_not_learned_and_the_head_learns_faster():
    torch.manual_seed(0)
    model = example.Digits().eval()
    data = example.Data(torch.rand(400, 1, 28, 28), torch.arange(400) % 10)
    before = fn.tree.map(torch.clone, dict(model.state_dict()))
    _, tuned = example.tune(model, data, 1, fn.key(0))
    after = fn.interop.to_state_dict(tuned.params, tuned.state)
    assert after.keys() == before.keys()
    moved = {key: (after[key] - before[key]).abs().max().item() for key in before}
    assert moved["stem.0.weight"] == moved["stem.1.bias"] == 0
    assert moved["stem.1.running_mean"] > 0
    assert 0 < moved["body.0.weight"] < moved["head.2.weight"]
