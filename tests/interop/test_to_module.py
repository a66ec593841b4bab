"""`fn.interop.to_module`: a layer in a model, a training loop and the tools of PyTorch."""

import copy
import pickle

import pytest
import torch
from layers import oracle
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import funcnet as fn

pytestmark = pytest.mark.cpu_only
X = oracle.randn(5, 3, seed=1)
IMAGE = oracle.randn(3, 2, 6, 6, seed=2)


def net():
    return fn.serial(fn.linear(4), fn.batch_norm(), fn.tanh(), fn.linear(2))


def twin():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()


def module_of(layer, x):
    return fn.interop.to_module(layer, *layer.init(fn.key(0), x))


def pair():
    ours, theirs = module_of(net(), X), twin()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_training_it_with_torch_optim_is_training_the_twin():
    ours, theirs = pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for step in range(5):
            optimizer.zero_grad()
            model(X + step).square().mean().backward()
            optimizer.step()
    for key, leaf in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], leaf, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.eval()(X), theirs.eval()(X))
    torch.testing.assert_close(ours(X), ours(X), rtol=0, atol=0)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (net(), X),
        (fn.serial(fn.conv2d(3, 3, padding=1), fn.gelu(), fn.avg_pool2d(2), fn.flatten()), IMAGE),
        (fn.serial(fn.layer_norm(), fn.residual(fn.linear(3)), fn.softmax()), X),
        (fn.transformer_encoder_layer(1, 4, dropout=0.0, activation="gelu"), X[None]),
    ],
    ids=["mlp", "convolution", "residual", "transformer"],
)
def test_its_first_and_second_derivatives_are_those_of_its_function(layer, x, train):
    module = module_of(layer, x).train(train)
    x = x[:2].clone().requires_grad_()
    names = [name for name, _ in module.named_parameters()]

    def function(x, *leaves):
        buffers = {key: leaf.clone() for key, leaf in module.named_buffers()}
        given = dict(zip(names, leaves, strict=True))
        return torch.func.functional_call(module, {**given, **buffers}, (x,))

    leaves = [leaf.detach().clone().requires_grad_() for leaf in module.parameters()]
    assert gradcheck(function, (x, *leaves), fast_mode=True)
    assert gradgradcheck(function, (x, *leaves), fast_mode=True, atol=1e-4)


def test_it_runs_under_torch_func():
    ours, theirs = [each.eval() for each in pair()]

    def loss(model):
        def value(params, x):
            return torch.func.functional_call(model, params, (x,)).square().sum()

        return value

    params = [{k: v.detach() for k, v in each.named_parameters()} for each in (ours, theirs)]
    xs = torch.stack([X, X + 1])
    for transform in (
        lambda f: lambda p, x: torch.func.grad(f)(p, x[0]),
        lambda f: torch.func.vmap(torch.func.grad(f), (None, 0)),
        lambda f: lambda p, x: torch.func.hessian(f, argnums=1)(p, x[0, :1]),
        lambda f: lambda p, x: torch.func.jacrev(torch.func.grad(f, argnums=1), 1)(p, x[0, :1]),
    ):
        got, expected = [
            transform(loss(model))(given, xs)
            for model, given in zip((ours, theirs), params, strict=True)
        ]
        oracle.assert_near(got, expected, 1e-9)


def test_noise_follows_the_seed_of_torch_and_stops_in_eval_mode():
    module = module_of(fn.serial(fn.linear(50), fn.dropout(0.5)), X)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, second = module(X), module(X)
        torch.manual_seed(3)
        assert torch.equal(module(X), first)
    assert not torch.equal(first, second)
    assert torch.equal(module.eval()(X), module(X))


def test_a_tuple_or_dict_x_are_several_arguments():
    layer = fn.parallel(a=fn.linear(2), b=fn.relu())
    x = {"a": X, "b": X}
    params, state = layer.init(fn.key(0), x)
    module = fn.interop.to_module(layer, params, state)
    y = layer.apply(params, x)[0]
    oracle.assert_near(module(a=X, b=X), y)
    oracle.assert_near(module(x), y)
    both = fn.interop.to_module(fn.add(), {})
    assert torch.equal(both(X, X), 2 * X)
    with pytest.raises(TypeError, match="expects x by position or its parts by name"):
        both()
    with pytest.raises(TypeError, match="add: expects tensors, got"):
        both(X, 3)


def test_integers_and_parts_that_are_not_used_have_no_gradient():
    layer = fn.serial(fn.embedding(5, 3, dtype=torch.float64), fn.lstm(4))
    tokens = torch.tensor([[0, 1], [2, 3]])
    module = module_of(layer, tokens)
    _, (_, c) = module(tokens)
    c.sum().backward()
    assert all(leaf.grad is not None for leaf in module.parameters())


def test_frozen_leaves_are_parameters_that_need_no_gradient():
    layer = fn.freeze(net(), "0")
    params, state = layer.init(fn.key(0), X)
    module = fn.interop.to_module(layer, params, state)
    needs = {name: leaf.requires_grad for name, leaf in module.named_parameters()}
    assert needs == {name: not name.startswith("0.") for name in needs}
    assert set(module.state_dict()) == set(twin().state_dict())
    module(X).sum().backward()
    assert module.get_parameter("0.weight").grad is None
    again, params_again, state_again = fn.interop.from_module(module)
    assert again.name == "freeze"
    oracle.assert_near(params_again, params)
    assert not torch.equal(state_again["1"]["running_mean"], state["1"]["running_mean"])


def test_it_is_part_of_other_modules_copied_and_compiled():
    model = nn.Sequential(module_of(net(), X), nn.ReLU())
    twice = copy.deepcopy(model)
    model(X).sum().backward()
    assert twice[0].get_parameter("0.weight").grad is None
    expected = twice.eval()(X)
    compiled = torch.compile(twice, backend="eager")
    torch.testing.assert_close(compiled(X), expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), expected)
    with torch.inference_mode():
        torch.testing.assert_close(twice(X), expected)
    layer, params, _ = fn.interop.from_module(model)
    assert repr(layer).startswith("serial(serial(linear(")
    assert list(fn.tree.to_dotted(params)) == [name for name, _ in model.named_parameters()]


def test_it_cannot_be_pickled_and_says_so():
    with pytest.raises(TypeError, match="cannot be pickled: a layer is made of functions"):
        pickle.dumps(module_of(net(), X))


def test_distributed_data_parallel_trains_it(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch has no torch.distributed")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ours, theirs = pair()
        module = nn.parallel.DistributedDataParallel(ours)
        for model in (module, theirs):
            for _ in range(2):
                model(X).square().sum().backward()
        torch.testing.assert_close(
            ours.get_parameter("0.weight").grad, theirs.get_parameter("0.weight").grad
        )
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ((fn.linear, {}), TypeError, "to_module: expects a Layer"),
        ((fn.relu(), {"forward": X}), ValueError, "nn.Module has an attribute 'forward'"),
        ((fn.relu(), {"0": {"": X}}), ValueError, "rename the layer"),
        ((fn.relu(), {"a": [X]}), TypeError, "expects a nested dict of tensors"),
        ((fn.relu(), {"a": X}, {"a": X}), ValueError, "have one key, 'a'"),
    ],
    ids=["no layer", "a method's name", "an empty name", "a list", "one key"],
)
def test_what_cannot_be_a_module_is_refused(arguments, error, told):
    with pytest.raises(error, match=told):
        fn.interop.to_module(*arguments)
