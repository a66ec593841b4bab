"""Each class of torch.nn, by PyTorch's samples and our own: from a module to a layer and back."""

import copy

import pytest
import torch
from layers import oracle
from torch import nn

import funcnet as fn
from funcnet.interop.classes import NAMES
from tests.parity import exceptions, names, reference
from tests.parity.compare import _is_noise, _quiet, _tolerance, agree
from tests.parity.exceptions import WRONG_GRADIENTS
from tests.parity.runs import some
from tests.parity.samples import OWN_CASES, TORCH, samples_of

pytestmark = pytest.mark.cpu_only
EACH = 3
"""How many of our own samples a class is held to."""
LAZY = [name for name in dir(nn) if name.startswith("Lazy") and name != "LazyModuleMixin"]
CLASSES = [name for name in NAMES if hasattr(nn, name)]


class Called(nn.Module):
    """A module called with the inputs of a sample, which are parts of one x."""

    def __init__(self, module, sample):
        super().__init__()
        self.module = module
        self.names, self.number, self.options = sample.names, len(sample.inputs), sample.options
        self.missing = [each is None for each in sample.inputs]

    def forward(self, x):
        if self.names:
            return self.module(**{name: x[name] for name in self.names}, **self.options)
        if self.number == 1:
            return self.module(x, **self.options)
        parts = [None if self.missing[i] else x[i] for i in range(self.number)]
        return self.module(*parts, **self.options)


def samples(name):
    """Some of the samples of a class that torch computes."""
    own = samples_of(name, [torch.float64])
    chosen = [*some(own[OWN_CASES], EACH), *some(own[TORCH], 1)]
    for sample in chosen:
        module = reference.module_of(sample)
        try:
            reference.forward(copy.deepcopy(module), sample)
        except (RuntimeError, ValueError, AssertionError, IndexError):
            continue
        yield sample._replace(inputs=tuple(reference.inputs_of(sample))), module


def x_of(sample):
    if sample.names:
        return dict(zip(sample.names, sample.inputs, strict=True))
    return sample.inputs[0] if len(sample.inputs) == 1 else sample.inputs


def has_wrong_gradient(sample):
    given = ["", *names.options(sample.cls, sample.args, sample.kwargs)]
    return any((sample.cls.__name__, each) in WRONG_GRADIENTS for each in given)


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_becomes_its_layer_and_a_module_again(name):
    with _quiet():
        for sample, module in samples(name):
            check(sample, module)


def check(sample, module):
    x, key = x_of(sample), fn.key(0)
    layer, params, state = fn.interop.from_module(Called(module, sample).train(sample.train))
    y, pullback, new_state = layer.vjp(params, x, state, key=key, train=sample.train)
    dy = oracle.cotangent(y)
    dparams, dx = pullback(dy)
    back = fn.interop.to_module(layer, params, state).train(sample.train)
    theirs = {key: leaf for key, leaf in module.state_dict().items() if not key.startswith("_")}
    assert {f"module.{key}" for key in theirs} == set(back.state_dict())
    if _is_noise(sample, module):
        return
    expected = reference.results(module, sample, reference.outputs(dy))
    given = "".join(str(sample))
    agree(f"y of {given}", expected["y"], reference.outputs(y), _tolerance(sample))
    if not has_wrong_gradient(sample):
        agree(f"dparams of {given}", expected["dparams"], dparams.get("module", {}), 1e-6, dy)
        by_input = [dx[n] for n in sample.names] if sample.names else dx
        by_input = by_input if len(sample.inputs) > 1 or sample.names else (dx,)
        agree(f"dx of {given}", expected["dx"], tuple(by_input or ()), 1e-6, dy)
    new = fn.tree.to_dotted(expected["state"])
    for key, leaf in fn.tree.to_dotted(new_state.get("module", {})).items():
        torch.testing.assert_close(leaf, new[key])
    through = back(x)
    agree(f"the module of {given}", reference.outputs(y), reference.outputs(through), 1e-12)


@pytest.mark.parametrize("name", LAZY)
def test_a_lazy_class_is_refused_until_it_was_called(name):
    kind = getattr(nn, name)
    arguments = {"LazyLinear": (3,)}.get(name, () if "Norm" in name else (3, 1))
    with pytest.raises(ValueError, match="call it once"):
        fn.interop.from_module(kind(*arguments))


def test_every_class_of_torch_with_a_layer_is_in_the_table():
    missing = [
        name
        for name in dir(nn.modules)
        if exceptions.computes(name)
        and not names.is_loss(getattr(nn.modules, name))
        and not name.startswith("Lazy")
        and hasattr(fn, names.snake_case(name))
        and name not in NAMES
    ]
    # A head with a loss is none of a layer's: its target is an argument.
    assert missing == ["AdaptiveLogSoftmaxWithLoss", "LinearCrossEntropyLoss"]
