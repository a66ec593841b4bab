"""`fn.interop.autodiff`: a layer of any function, whose pullback is autograd's."""

import pytest
import torch
from layers import oracle
from torch import nn

import funcnet as fn

X = oracle.randn(4, 3, seed=1)
START = {"scale": torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)}


def scaled(params, x):
    return torch.special.i0e(params["scale"] * x)


def start(key, x):
    return {"scale": fn.random.normal(key, x.shape[-1:], x.dtype, device=x.device)}


@fn.declare
def declared(x):
    return {"scale": fn.Param((x.shape[-1],), fn.initializers.normal())}


def sorted_rows(x):
    return x.sort(-1).values * 2


def noisy_mean(params, x, state, key, train):
    y = x - state["mean"]
    if train:
        y = y * fn.random.uniform(key, x.shape, x.dtype, device=x.device)
        state = {"mean": 0.5 * state["mean"] + 0.5 * x.mean(0)}
    return y, state


@fn.declare
def noisy_start(x):
    return {"mean": fn.State((x.shape[-1],), fn.initializers.zeros())}


def several(params, x):
    y = params["scale"] * x["a"] + x["index"][:, None]
    return {"y": y, "index": x["index"] + 1}


LAYERS = {
    "params": (fn.interop.autodiff(scaled, start), X),
    "declared": (fn.interop.autodiff(scaled, declared), X),
    "no params": (fn.interop.autodiff(sorted_rows), X),
    "stateful": (fn.interop.autodiff(noisy_mean, noisy_start, stateful=True, keyed=True), X),
    "trees": (
        fn.interop.autodiff(several, lambda key, x: start(key, x["a"])),
        {"a": X, "index": torch.arange(4)},
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_it_keeps_the_laws(name):
    layer, x = LAYERS[name]
    fn.testing.check_layer(layer, x)


def test_it_trains_beside_other_layers_and_is_compiled():
    net = fn.serial(fn.interop.autodiff(scaled, declared), fn.linear(2))
    optimizer = fn.sgd(0.1)
    step = fn.train_step(net, fn.mse(), optimizer)
    state = fn.init_train_state(net, optimizer, fn.key(0), X)
    first, before = step(state, (X, X[:, :2]))
    assert step(first, (X, X[:, :2]))[1]["loss"] < before["loss"]
    layer = LAYERS["params"][0]

    def gradients(params, x):
        return layer.vjp(params, x)[1](x)

    oracle.assert_near(fn.jit(gradients)(START, X), gradients(START, X))


def test_half_of_its_pullback_can_be_asked_for():
    layer, x = LAYERS["params"]
    _, pullback, _ = layer.vjp(START, x)
    dparams, dx = pullback(X)
    assert pullback(X, x=False)[1] is None
    oracle.assert_near(pullback(X, x=False)[0], dparams)
    oracle.assert_near(pullback(X, params=False), (None, dx))


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda: fn.interop.autodiff(3), TypeError, "autodiff: expects a function"),
        (lambda: fn.interop.autodiff(scaled, 3), TypeError, "scaled: expects a function as init"),
        (lambda: fn.interop.autodiff(scaled, stateful=True), ValueError, "needs an init"),
        (lambda: fn.interop.autodiff(scaled, start, keyed=True), ValueError, "needs stateful"),
        (
            lambda: fn.interop.autodiff(lambda x: 3, name="three").apply({}, X),
            TypeError,
            "three: expects y of tensors, got int",
        ),
        (lambda: LAYERS["stateful"][0].vjp({}, X, {"mean": X[0]}), ValueError, "needs a key"),
        (lambda: LAYERS["declared"][0].vjp({}, X), ValueError, "expects params \\['scale'\\]"),
    ],
    ids=["no function", "no init", "stateful", "keyed", "no tensors", "no key", "no params"],
)
def test_bad_input_is_refused(call, error, told):
    with pytest.raises(error, match=told):
        call()


class Custom(nn.Module):
    """Control flow by values, a buffer that is written, noise, and a nested Sequential."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x, scale=2.0):
        self.calls += 1
        y = self.net(x)
        return self.drop(y * scale if y.sum() > -1e9 else y)


def test_an_unknown_module_is_a_layer_where_that_is_asked_for():
    module = oracle.randomize(nn.Sequential(nn.Linear(3, 3), Custom()).double())
    with pytest.raises(ValueError, match="'1' \\(Custom\\): "):
        fn.interop.from_module(module)
    layer, params, state = fn.interop.from_module(module, unknown="autodiff")
    assert set(fn.interop.to_state_dict(params, state)) == set(module.state_dict())
    y, pullback, new_state = layer.vjp(params, X, state, train=False)
    torch.testing.assert_close(y, module.eval()(X), rtol=1e-12, atol=1e-12)
    assert new_state["1"]["calls"] == state["1"]["calls"] + 1
    module(X).square().sum().backward()
    dparams, _ = pullback(2 * y)
    for name, leaf in fn.tree.to_dotted(dparams).items():
        torch.testing.assert_close(leaf, module.get_parameter(name).grad)

    before = torch.random.get_rng_state()
    one, _, trained = layer.vjp(params, X, state, key=fn.key(1), train=True)
    two, pullback, _ = layer.vjp(params, X, state, key=fn.key(1), train=True)
    assert torch.equal(one, two)
    assert not torch.equal(one, layer.vjp(params, X, state, key=fn.key(2), train=True)[0])
    assert torch.equal(before, torch.random.get_rng_state())
    assert trained["1"]["net"]["1"]["num_batches_tracked"] == 1
    dropped = pullback(torch.ones_like(two))[0]["1"]["net"]["1"]["bias"]
    torch.testing.assert_close(dropped, 2 * 2 * (two != 0).double().sum(0))
    with pytest.raises(ValueError, match="Custom: draws random numbers, and has no key"):
        layer.vjp(params, X, state, train=True)
