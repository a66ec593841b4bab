"""The lifts and `declare`: what somebody who writes a layer or a combinator meets."""

import pickle

import pytest
import torch

import funcnet as fn
from funcnet.testing import check_layer

X = fn.random.normal(fn.key(0), (5, 3), torch.float64)


def pass_rule(residuals, dy, *, params, x):
    return ({} if params else None), dy if x else None


def counted(keyed=False):
    @fn.declare
    def init(x):
        return {"seen": fn.State((), fn.initializers.zeros(), torch.int64)}

    def forward(params, x, state, key, train):
        y = x
        if keyed and train:
            y = x + fn.random.normal(key, x.shape, x.dtype, device=x.device)
        return y, fn.Pullback(pass_rule, {}), {"seen": state["seen"] + 1}

    return fn.stateful(init, forward, keyed=keyed)


@pytest.mark.parametrize("keyed", [False, True])
def test_a_lifted_layer_with_state_keeps_the_laws(keyed):
    check_layer(counted(keyed), X, jit=True)
    check_layer(fn.serial(fn.linear(4), counted(keyed), fn.tanh()), X)


def test_what_a_lifted_layer_is_called_and_takes():
    assert repr(counted()) == "counted()"
    assert [counted(keyed).takes_key for keyed in (False, True)] == [False, True]
    assert counted()._replace(vjp=None).name == "counted"


def test_a_layer_that_draws_noise_asks_for_a_key_when_it_trains():
    net = fn.serial(noisy=counted(keyed=True))
    _, state = net.init(fn.key(0), X)
    net.apply({}, X, state)
    with pytest.raises(ValueError, match=r"serial\['noisy'\] counted: needs a key when train=True"):
        net.apply({}, X, state, train=True)


def test_a_pullback_that_a_layer_returns_again_and_again_is_not_written_to():
    constant = fn.Pullback(pass_rule, {})
    layer = fn.stateless(lambda key, x: {}, lambda p, x: x, lambda p, x: (x, constant), name="same")
    _, wide, _ = layer.vjp({}, X)
    _, narrow, _ = layer.vjp({}, X[:, :1])
    assert torch.equal(wide(X)[1], X)
    assert torch.equal(narrow(X[:, :1])[1], X[:, :1])
    assert constant.expected is None


def test_apply_can_be_given_and_else_is_forward_without_its_pullback():
    def forward(params, x, state, key, train):
        return 2 * x, fn.Pullback(pass_rule, {}), state

    def apply(params, x, state, key, train):
        return 3 * x, state

    init = fn.declare(lambda x: {})
    assert torch.equal(fn.stateful(init, forward).apply({}, X)[0], 2 * X)
    assert torch.equal(fn.stateful(init, forward, apply=apply).apply({}, X)[0], 3 * X)


@pytest.mark.parametrize(
    ("params", "state", "x", "error", "message"),
    [
        ({}, {"mean": X[0]}, X[:, :2], ValueError, "mean expects 3 features"),
        ({}, {}, X, ValueError, r"center: expects state \['mean'\], got \[\]"),
        ({"mean": X[0]}, {}, X, ValueError, r"expects params \[\], got \['mean'\]"),
        ({"w": X}, {"mean": X[0]}, X, ValueError, r"expects params \[\], got \['w'\]"),
        ({}, {"mean": X[0].float()}, X, TypeError, "mean is torch.float32, x is torch.float64"),
        ({}, {"mean": X}, X, ValueError, r"expects a mean of shape \(3,\), got \(5, 3\)"),
        ({}, {"mean": 3.0}, X, TypeError, "expects a tensor as mean, got float"),
        (X, {"mean": X[0]}, X, TypeError, "expects a dict of params, got float64"),
    ],
)
def test_arguments_that_are_not_as_declared_are_refused(params, state, x, error, message):
    @fn.declare
    def init(x):
        of_x = (0, "{} features")
        return {"mean": fn.State(x.shape[-1:], fn.initializers.zeros(), of_x=of_x)}

    def forward(params, x, state, key, train):
        return x - state["mean"], fn.Pullback(pass_rule, {}), state

    layer = fn.stateful(init, forward, name="center")
    with pytest.raises(error, match=message):
        layer.apply(params, x, state)
    with pytest.raises(error, match=message):
        layer.vjp(params, x, state)


def test_a_declaration_follows_each_x():
    layer = fn.linear(2)
    params, _ = layer.init(fn.key(0), X)
    layer.apply(params, X)
    with pytest.raises(ValueError, match="weight expects 3 features"):
        layer.apply(params, X[:, :2])
    layer.apply(params, X)
    with pytest.raises(TypeError, match=r"weight is torch.float64, x is torch.float32"):
        layer.apply(params, X.float())
    wide = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    layer.apply(wide, X[:, :2].float())


def twice(x):
    return 2 * x


def test_an_activation_of_ones_own():
    square = fn.elementwise(torch.square, twice)
    check_layer(square, X, jit=True)
    check_layer(fn.elementwise(torch.exp, torch.clone, saves="y"), X)
    assert repr(square) == "square()"
    _, pullback, _ = fn.elementwise(torch.sin, torch.cos).vjp({}, X)
    restored = pickle.loads(pickle.dumps(fn.tanh().vjp({}, X)[1]))
    torch.testing.assert_close(restored(X)[1], fn.tanh().vjp({}, X)[1](X)[1])
    with pytest.raises(ValueError, match="saves must be 'x' or 'y', got 'z'"):
        fn.elementwise(torch.sin, torch.cos, saves="z")
    assert pullback(X)[0] == {}


def test_an_elementwise_layer_with_a_wrong_derivative_is_found():
    with pytest.raises(AssertionError, match="derivative"):
        check_layer(fn.elementwise(torch.sin, torch.sin), X)


def roll_backward(dy, shift):
    return dy.roll(-shift, -1)


def test_a_layer_of_x_alone():
    layer = fn.parameterless(lambda x: (x.roll(1, -1), {}, (1,)), roll_backward, name="roll")
    check_layer(layer, X)
    with pytest.raises(ValueError, match=r"^roll: does not fit float64 \(\)"):
        layer.apply({}, X[0, 0])
    with pytest.raises(TypeError, match=r"^roll: expects a floating-point tensor, got int64"):
        layer.apply({}, torch.ones(2, dtype=torch.int64))


def chain_forward(run, x):
    return run("b", run("a", x)), {}


def forgetful_backward(pull, dy, residuals):
    return pull("b", dy)


def test_a_combinator_that_forgets_a_child_is_an_error():
    net = fn.combine(
        "forgetful", {"a": fn.linear(3), "b": fn.linear(3)}, chain_forward, forgetful_backward
    )
    params, _ = net.init(fn.key(0), X)
    y, pullback, _ = net.vjp(params, X)
    with pytest.raises(ValueError, match=r"forgetful: backward pulls no cotangent through \['a'\]"):
        pullback(y)


def test_a_child_that_is_not_there_or_runs_twice_is_an_error():
    net = fn.combine("net", {"a": fn.relu()}, chain_forward, forgetful_backward)
    with pytest.raises(ValueError, match=r"no child is called 'b', only \['a'\]"):
        net.apply({}, X)
    again = fn.combine("twice", {"a": fn.relu()}, twice_forward, forgetful_backward)
    with pytest.raises(ValueError, match=r"twice\['a'\] runs twice"):
        again.vjp({}, X)


def twice_forward(run, x):
    return run("a", run("a", x)), {}


def tied_forward(run, x):
    return run("a", run("a", x, use=0), use=1), {}


def tied_backward(pull, dy, residuals):
    return pull("a", pull("a", dy, use=1), use=0, needed=pull.x)


def late_forward(run, x):
    return run("a", run("a", x, use=5), use=3), {}


def late_backward(pull, dy, residuals):
    return pull("a", pull("a", dy, use=3), use=5, needed=pull.x)


@pytest.mark.parametrize(
    "flow", [(tied_forward, tied_backward), (late_forward, late_backward)], ids=["0, 1", "5, 3"]
)
def test_a_child_with_two_uses_sums_its_gradients_and_passes_its_state_on(flow):
    body = fn.serial(fn.linear(3), counted(), fn.dropout(0.2))
    net = fn.combine("tied", {"a": body}, *flow)
    check_layer(net, X)
    params, state = net.init(fn.key(0), X)
    assert list(params) == ["a"]
    _, state = net.apply(params, X, state)
    assert state["a"]["1"]["seen"] == 2


def test_a_combinator_of_ones_own_is_transparent():
    net = fn.combine(
        "chain", {"a": fn.linear(3), "b": fn.serial(fn.tanh(), fn.linear(2))},
        chain_forward, chain_backward,
    )  # fmt: skip
    check_layer(net, X, jit=True)
    paths = []
    again = fn.map_layers(lambda path, layer: paths.append(path) or layer, net)
    assert paths == ["a", "b.0", "b.1", "b", ""]
    assert repr(again) == repr(net)
    assert [row.path for row in fn.summary(net, X).rows] == ["a", "b.0", "b.1"]
    params, _ = net.init(fn.key(0), X)
    for policy in (None, ["a"], ["b.0"]):
        kept = fn.remat(net, policy)
        check_layer(kept, X)
        torch.testing.assert_close(kept.apply(params, X)[0], net.apply(params, X)[0])
    broken = {**params, "a": {**params["a"], "bias": torch.full((3,), torch.nan).double()}}
    with pytest.raises(ValueError, match=r"chain\['a'\] linear: params is not finite"):
        fn.detect_nonfinite(net).apply(broken, X)


def chain_backward(pull, dy, residuals):
    return pull("a", pull("b", dy), needed=pull.x)
