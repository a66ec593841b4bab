"""The sample inputs that PyTorch tests its own norms and activations with: ours give the same."""

import pytest
import torch
from layers.oracle import check_module
from torch import nn
from torch.testing._internal.common_modules import module_db

import funcnet as fn

# From the arguments of the module of torch to ours, where they are not the same.
NORMS = {
    **{f"BatchNorm{n}d": (fn.batch_norm, 0) for n in (1, 2, 3)},
    "GroupNorm": (fn.group_norm, 1),
    "InstanceNorm1d": (fn.instance_norm1d, 0),
    "InstanceNorm2d": (fn.instance_norm2d, 0),
    "InstanceNorm3d": (fn.instance_norm3d, 0),
    "LocalResponseNorm": (fn.local_response_norm, None),
    "LayerNorm": (fn.layer_norm, None),
    "RMSNorm": (fn.rms_norm, None),
}
"""The constructor, and the position of the number of channels, which ours has not."""

SNAKE_CASE = {"LeakyReLU": "leaky_relu", "LogSoftmax": "log_softmax"}
ACTIVATIONS = {
    name: (getattr(fn, SNAKE_CASE.get(name, name.lower())), None)
    for name in nn.modules.activation.__all__
    if name != "MultiheadAttention"
}
LAYERS = NORMS | ACTIVATIONS
INFOS = {info.module_cls.__name__: info for info in module_db}


def samples(name, dtype, train):
    """``(layer, module, x)`` of each sample."""
    info = INFOS[name]
    make, channels = LAYERS[name]
    for sample in info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=train
    ):
        args, options = sample.constructor_input.args, sample.constructor_input.kwargs
        own = [arg for position, arg in enumerate(args) if position != channels]
        (x,) = sample.forward_input.args
        yield make(*own, **options), info.module_cls(*args, **options), x


@pytest.mark.cpu_only
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", sorted(set(LAYERS) & set(INFOS)))
def test_layer_is_torchs_on_torchs_samples(name, dtype, train):
    seen = 0
    for layer, module, x in samples(name, dtype, train):
        check_module(layer, module, x, train=train)
        seen += 1
    assert seen


def test_the_norms_and_activations_that_torch_has_no_samples_of_are_known():
    assert set(LAYERS) - set(INFOS) == {"Hardsigmoid", "RReLU"}
    of_torch = {name for name in INFOS if "Norm" in name or name in nn.modules.activation.__all__}
    assert of_torch - set(LAYERS) == {"MultiheadAttention"}
