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
            return torch.func.functional_call(working, flat, x if type(x) is tuple else (x,))

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


class Calls(nn.Module):
    """Submodules called as a function says."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def test_several_inputs_are_a_tuple_and_several_outputs_too():
    held(twins.VAE(5, 4, 3), randn(2, 5), randn(2, 3))
    layer, params, _ = fn.interop.from_module(twins.VAE(5, 4, 3).double())
    (logits, mean, _), _ = layer.apply(params, (randn(2, 5), randn(2, 3)))
    assert logits.shape == (2, 5)
    assert mean.shape == (2, 3)


def test_inputs_are_chosen_by_name():
    class Scaled(nn.Module):
        def forward(self, x, by=None, power=1):
            y = x**power
            return y if by is None else y * by

    one, _, _ = fn.interop.from_module(Scaled())
    assert torch.equal(one.apply({}, randn(2))[0], randn(2))
    two, _, _ = fn.interop.from_module(Scaled(), inputs=("by", "x"))
    assert torch.equal(two.apply({}, (randn(2), randn(2, seed=1)))[0], randn(2) * randn(2, seed=1))
    with pytest.raises(ValueError, match="takes \\['x', 'by', 'power'\\], not \\['z'\\]"):
        fn.interop.from_module(Scaled(), inputs=("z",))


def test_one_module_used_twice_is_one_layer():
    def both(self, x):
        return self.norm(self.body(self.norm(self.body(x))))

    module = Calls(both, body=nn.Linear(3, 3), norm=nn.BatchNorm1d(3))
    _, params, _ = held(module, randn(4, 3))
    assert list(fn.tree.to_dotted(params)) == [name for name, _ in module.named_parameters()]
    same = nn.Linear(3, 3)
    _, params, _ = held(nn.Sequential(same, nn.Tanh(), same), randn(4, 3))
    assert list(params) == ["0"]
    same = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    held(nn.Sequential(same, nn.Tanh(), same), randn(4, 3))


def test_tied_parameters_are_one():
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    module[2].weight = module[0].weight
    layer, params, _ = held(module, randn(4, 3))
    assert layer.name == "tie"
    assert sorted(fn.tree.to_dotted(params)) == ["0.bias", "0.weight", "2.bias"]


def test_parameters_without_a_gradient_are_frozen_and_unused_ones_kept():
    module = Calls(
        lambda self, x: self.body(x),
        body=nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)),
        aux=nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)),
    ).double()
    module.body[0].requires_grad_(False)
    module.extra = nn.Parameter(torch.ones(2, dtype=DOUBLE))
    layer, params, state = fn.interop.from_module(module)
    assert list(fn.tree.to_dotted(params)) == ["body.1.weight", "body.1.bias"]
    flat = fn.interop.to_state_dict(params, state)
    assert flat.keys() == module.state_dict().keys()
    y, pullback, state = layer.vjp(params, randn(4, 3), state)
    assert fn.tree.alike(pullback(y)[0], params)
    assert fn.interop.to_state_dict(params, state).keys() == flat.keys()
    torch.testing.assert_close(y, module(randn(4, 3)))


def test_a_step_of_training_is_that_of_torch_optim():
    module = oracle.randomize(twins.resnet18(4).double()).train()
    layer, params, state = fn.interop.from_module(module)
    x, target = randn(4, 3, 16, 16), torch.arange(4)
    optimizer = fn.sgd(0.01, momentum=0.9)
    theirs = torch.optim.SGD(module.parameters(), 0.01, momentum=0.9)
    step = fn.train_step(layer, fn.cross_entropy(), optimizer)
    start = torch.tensor(0)
    train_state = fn.TrainState(params, state, optimizer.init_state(params), fn.key(0), start)
    for _ in range(2):
        train_state, metrics = step(train_state, (x, target))
        theirs.zero_grad()
        loss = F.cross_entropy(module(x), target)
        loss.backward()
        theirs.step()
        torch.testing.assert_close(metrics["loss"], loss.detach(), rtol=1e-8, atol=0)
    flat = fn.interop.to_state_dict(train_state.params, train_state.state)
    for key, leaf in module.state_dict().items():
        torch.testing.assert_close(flat[key], leaf, rtol=1e-6, atol=1e-9)


def test_dropout_in_a_forward_follows_the_mode_and_the_key():
    def drops(self, x):
        return F.dropout(x, 0.5, self.training) + F.dropout(x, 0.25, training=self.training)

    layer, _, _ = fn.interop.from_module(Calls(drops))
    x = torch.ones(100, dtype=DOUBLE)
    assert torch.equal(layer.apply({}, x)[0], 2 * x)
    y, _ = layer.apply({}, x, key=fn.key(0), train=True)
    assert set(y.unique().tolist()) <= {0.0, 2.0, 1 / 0.75, 2 + 1 / 0.75}
    assert len(y.unique()) == 4
    fn.testing.check_layer(layer, x)
    with pytest.raises(ValueError, match="needs a key"):
        layer.apply({}, x, train=True)


def test_the_mode_decides_which_branch_runs():
    def heads(self, x):
        y = self.body(x)
        return (y, self.aux(y)) if self.training else y

    module = Calls(heads, body=nn.Linear(3, 3), aux=nn.Linear(3, 2))
    layer, _, _ = held(module, randn(4, 3))
    assert list(layer.init(fn.key(0), randn(4, 3))[0]) == ["body", "aux"]


def test_lists_and_dicts_of_modules_keep_their_paths():
    def run(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.heads["out"](x)

    blocks = nn.ModuleList([nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU())])
    module = Calls(run, blocks=blocks, heads=nn.ModuleDict({"out": nn.Linear(3, 2)}))
    layer, params, _ = held(module, randn(4, 3))
    names = [name for name, _ in module.named_parameters()]
    assert list(fn.tree.to_dotted(params)) == names
    made, _ = layer.init(fn.key(1), randn(4, 3))
    assert list(fn.tree.to_dotted(made)) == names
    frozen = fn.freeze(layer, "blocks.1")
    assert list(frozen.init(fn.key(1), randn(4, 3))[0]["blocks"]) == ["0"]
    assert "blocks.1" in str(fn.summary(layer, randn(4, 3)))


def test_buffers_that_forward_reads_are_state_and_those_that_are_not_saved_constants():
    module = Calls(lambda self, x: (x - self.mean) * self.scale + self.shift)
    module.register_buffer("mean", randn(3))
    module.register_buffer("scale", randn(3, seed=1), persistent=False)
    module.shift = nn.Parameter(randn(3, seed=2))
    _, params, state = held(module, randn(4, 3))
    assert (list(params), list(state)) == (["shift"], ["mean"])


def test_parametrizations_of_torch_that_are_here_keep_their_paths():
    made = nn.utils.parametrizations
    module = nn.Sequential(made.weight_norm(nn.Linear(3, 4)), made.spectral_norm(nn.Linear(4, 2)))
    module = module.double().eval()
    layer, params, state = fn.interop.from_module(module)
    assert set(fn.interop.to_state_dict(params, state)) == set(module.state_dict())
    torch.testing.assert_close(layer.apply(params, randn(5, 3), state)[0], module(randn(5, 3)))


def test_a_module_of_a_layer_is_the_layer_again():
    net = fn.serial(fn.linear(3), fn.batch_norm())
    inner = fn.interop.to_module(net, *net.init(fn.key(0), randn(4, 3)))
    module = Calls(lambda self, x: self.inner(x) + x, inner=inner)
    layer, params, state = fn.interop.from_module(module)
    torch.testing.assert_close(
        layer.apply(params, randn(4, 3), state, train=True)[0], module(randn(4, 3))
    )


def test_the_module_is_as_it_was():
    module = twins.unet(4).double().eval()
    before = copy.deepcopy(module)
    fn.interop.from_module(module)
    assert repr(module) == repr(before)
    assert not any(each.training for each in module.modules())
    for name, leaf in before.state_dict().items():
        assert torch.equal(module.state_dict()[name], leaf)
    assert vars(module).keys() == vars(before).keys()


def hooked():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].register_forward_hook(lambda *args: None)
    return module


def backward_hooked():
    module = nn.Sequential(nn.Linear(3, 3))
    module[0].register_full_backward_hook(lambda *args: None)
    return module


def hooked_gradient(register):
    module = nn.Sequential(nn.Linear(3, 3))
    getattr(module[0].weight, register)(lambda p: None)
    return module


def parametrized():
    module = nn.Sequential(nn.Linear(3, 3))
    nn.utils.parametrize.register_parametrization(module[0], "weight", nn.Tanh())
    return module


def mixed():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    module[1].eval()
    return module


def counted(self, x):
    self.calls += 1
    return x * self.calls


def counting():
    module = Calls(counted)
    module.register_buffer("calls", torch.zeros(()))
    return module


def skipped():
    body = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3))
    return Calls(lambda self, x: self.body(self.first(x)), first=nn.Linear(3, 3), body=body)


def darts():
    module = skipped()

    def run(self, x):
        y = self.first(x)
        return y + self.body(y)

    module.function = run
    return module


def shared_state():
    norm = nn.BatchNorm1d(3)
    return nn.Sequential(nn.Sequential(norm), nn.Sequential(norm))


BAD = {
    "a hook": (hooked, "'1' \\(Linear\\): has a forward hook, hooked"),
    "a hook on a gradient": (
        lambda: hooked_gradient("register_hook"),
        "'0' \\(Linear\\): has a hook on the gradient of weight",
    ),
    "a hook after a gradient": (
        lambda: hooked_gradient("register_post_accumulate_grad_hook"),
        "'0' \\(Linear\\): has a hook on the gradient of weight",
    ),
    "a backward hook": (backward_hooked, "'0' \\(Linear\\): has a backward hook"),
    "a parametrization": (parametrized, "'0' \\(ParametrizedLinear\\): .* parametrization Tanh"),
    "two modes": (mixed, "the module is in train mode, and \\['1'\\] are not"),
    "a buffer that is written": (counting, "'' \\(Calls\\): .*calls"),
    "x changed in place": (
        lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)),
        "'' \\(Sequential\\): changes its input in place",
    ),
    "a value that was changed in place": (darts, "uses first after it was changed in place"),
    "state at two places": (shared_state, "are one buffer"),
    "a class without a layer": (
        lambda: nn.Sequential(nn.CTCLoss(), nn.ModuleList([nn.Identity()])),
        "2 modules:\n  '0' \\(CTCLoss\\).*\n  '1' \\(ModuleList\\)",
    ),
    "several faults": (
        lambda: nn.Sequential(hooked(), nn.Softmax(None)),
        "2 modules:\n  '0.1' .*\n  '1' \\(Softmax\\): dim=None",
    ),
    "a dict of options": (
        lambda: Calls(lambda self, x: torch.fft.rfft(x)),
        "'' \\(Calls\\): calls fft_rfft",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_converted_is_named(name):
    made, told = BAD[name]
    with pytest.raises(ValueError, match=told):
        fn.interop.from_module(made())


def test_in_place_operations_on_a_value_of_its_own_are_none_of_a_layers_business():
    held(skipped(), randn(4, 3))


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match="expects an nn\\.Module, got Layer"):
        fn.interop.from_module(fn.relu())
    with pytest.raises(ValueError, match="unknown must be 'refuse' or 'autodiff'"):
        fn.interop.from_module(nn.ReLU(), unknown="guess")
