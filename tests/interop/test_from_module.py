"""`fn.interop.from_module`: what a module gives, a layer gives, with the same gradients."""

import copy

import pytest
import torch
from layers import oracle
from networks import transformer_twins, twins
from torch import nn
from torch.nn import functional as F

import funcnet as fn

DOUBLE = torch.float64


def randn(*shape, seed=0):
    return oracle.randn(*shape, seed=seed)


def held(module, *inputs, train=True, tolerance=1e-10, **options):
    """The layer of a module, held to it: outputs, gradients and new state in both modes."""
    module = oracle.randomize(module.double())
    x = inputs[0] if len(inputs) == 1 else inputs
    layer, params, state = fn.interop.from_module(module, **options)
    keys = set(fn.interop.to_state_dict(params, state))
    assert keys <= set(module.state_dict())
    for mode in (False, True) if train else (False,):
        working = copy.deepcopy(module).train(mode)
        given = dict(module.named_parameters())

        def function(params, x, working=working, given=given):
            flat = {k: v for k, v in fn.tree.to_dotted(params).items() if k in given}
            y = torch.func.functional_call(working, flat, x if type(x) is tuple else (x,))
            return y

        y, pullback, new_state = layer.vjp(params, x, state, key=fn.key(0), train=mode)
        applied, _ = layer.apply(params, x, state, key=fn.key(0), train=mode)
        dy = oracle.cotangent(y)
        expected = oracle.autograd(function, params, x, dy)
        oracle.assert_near((y, *pullback(dy)), expected, tolerance)
        oracle.assert_near(applied, y, 0.0)
        assert pullback(dy, x=False)[1] is None
        assert pullback(dy, params=False)[0] is None
        theirs = {k: v for k, v in working.state_dict().items() if k in keys}
        if mode:
            ours = fn.interop.to_state_dict(params, new_state)
            assert ours.keys() == theirs.keys()
            for key, leaf in theirs.items():
                torch.testing.assert_close(ours[key], leaf, rtol=tolerance, atol=tolerance)
    return layer, params, state


NETS = {
    "lenet": (twins.lenet, lambda: randn(2, 1, 28, 28)),
    "resnet18": (lambda: twins.resnet18(4), lambda: randn(2, 3, 16, 16)),
    "unet": (lambda: twins.unet(4), lambda: randn(2, 3, 16, 16)),
    "mobilenet": (lambda: twins.mobilenet(4), lambda: randn(2, 3, 16, 16)),
    "gpt": (
        lambda: transformer_twins.LanguageModel(
            vocabulary=11, width=8, heads=2, layers=2, length=6
        ),
        lambda: torch.arange(12).reshape(2, 6) % 11,
    ),
    "vit": (lambda: transformer_twins.vit(8, 8, 2, 2), lambda: randn(2, 3, 32, 32)),
}


@pytest.mark.parametrize("name", NETS)
def test_a_network_gives_what_its_module_gives(name):
    made, x = NETS[name]
    if name == "vit":
        module = transformer_twins.vit(4, 8, 2, 2)
        held(module, x())
    else:
        held(made(), x())
