"""Reversed, stopped, clipped and noised cotangents, and straight-through: against autograd."""

import pytest
import torch
from torch.nn import functional as F

import funcnet as fn

X = fn.random.normal(fn.key(1), (4, 3), torch.float64)
DY = fn.random.normal(fn.key(2), (4, 3), torch.float64)


class Reversal(torch.autograd.Function):
    """The gradient reversal layer as published."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return -ctx.scale * dy, None


class Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, dy):
        return dy


class Spike(torch.autograd.Function):
    """A spike, with the derivative of a fast sigmoid (Zenke and Ganguli 2018)."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return dy / (10 * x.abs() + 1) ** 2


def spike(x, slope):
    return (x > 0).to(x.dtype)


def fast_sigmoid(x, slope):
    return (slope * x.abs() + 1).square().reciprocal()


CASES = {
    "reverse_gradient": (fn.reverse_gradient(0.3), lambda x: Reversal.apply(x, 0.3)),
    "stop_gradient": (fn.stop_gradient(), lambda x: x.detach() + 0 * x),
    "straight_through": (fn.straight_through(torch.round), Rounding.apply),
    "straight_through of a surrogate": (
        fn.straight_through(spike, fast_sigmoid, options=(10.0,)),
        Spike.apply,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_is_that_of_a_function_of_autograd_within_a_net(name):
    layer, function = CASES[name]
    net = fn.serial(fn.linear(3), layer, fn.linear(3))
    params, _ = net.init(fn.key(0), X)
    y, pullback, _ = net.vjp(params, X)
    dparams, dx = pullback(DY)

    own, x = fn.tree.map(lambda leaf: leaf.clone().requires_grad_(), (params, X))
    hidden = function(F.linear(x, own["0"]["weight"], own["0"]["bias"]))
    expected = F.linear(hidden, own["2"]["weight"], own["2"]["bias"])
    expected.backward(DY)
    torch.testing.assert_close(y, expected.detach(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(dx, x.grad, rtol=1e-12, atol=1e-15)
    for path, leaf in fn.tree.to_dotted(own).items():
        found = fn.tree.to_dotted(dparams)[path]
        torch.testing.assert_close(found, leaf.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("max_norm", [0.1, 3.0, 1e6])
def test_a_cotangent_is_clipped_as_torch_clips_a_gradient(max_norm):
    layer = fn.clip_cotangent(max_norm)
    _, pullback, _ = layer.vjp({}, (X, X))
    _, found = pullback((DY, 2 * DY))
    grads = [DY.clone().requires_grad_() for _ in range(2)]
    grads[0].grad, grads[1].grad = DY.clone(), 2 * DY
    torch.nn.utils.clip_grad_norm_(grads, max_norm)
    for ours, theirs in zip(found, grads, strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-4, atol=0)
    assert fn.tree.global_norm(found) <= max_norm * (1 + 1e-12)
    if max_norm == 1e6:
        assert torch.equal(found[0], DY)


def test_the_clipped_cotangent_of_zero_is_zero():
    _, pullback, _ = fn.clip_cotangent(1.0).vjp({}, X)
    assert torch.equal(pullback(torch.zeros_like(X))[1], torch.zeros_like(X))


def test_noise_has_its_deviation_is_of_the_key_and_of_training_alone():
    layer, x = fn.noise_cotangent(0.5), torch.zeros(100, 100)
    dy = torch.ones_like(x)

    def noise(key):
        return layer.vjp({}, x, key=key)[1](dy)[1] - dy

    first, again, other = noise(fn.key(0)), noise(fn.key(0)), noise(fn.key(1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert abs(first.std().item() - 0.5) < 0.01
    assert abs(first.mean().item()) < 0.02
    assert torch.equal(layer.vjp({}, x, train=False)[1](dy)[1], dy)
    with pytest.raises(ValueError, match=r"^noise_cotangent: needs a key when train=True"):
        layer.vjp({}, x)
    pair = layer.vjp({}, (x, x), key=fn.key(0))[1]((dy, dy))[1]
    assert not torch.equal(*pair)


def test_a_domain_classifier_behind_a_reversal_leaves_features_that_do_not_tell_domains():
    # The label is the sign of the first number, the domain that of the second.
    x = fn.random.normal(fn.key(0), (256, 2))
    label, domain = (x > 0).long().unbind(1)
    heads = fn.branch(label=fn.linear(2), domain=fn.serial(fn.reverse_gradient(), fn.linear(2)))
    net = fn.serial(features=fn.linear(1, bias=False), heads=heads)
    one = fn.cross_entropy()

    def both():
        def vjp(prediction, target):
            parts = {name: one.vjp(prediction[name], target[name]) for name in prediction}
            total = sum(value for value, _ in parts.values())
            return total, fn.LossPullback(both_rule, {name: p for name, (_, p) in parts.items()})

        return fn.Loss(lambda prediction, target: vjp(prediction, target)[0], vjp)

    optimizer = fn.sgd(0.2)
    step = fn.train_step(net, both(), optimizer)
    state = fn.init_train_state(net, optimizer, fn.key(3), x)
    start = state.params["features"]["weight"]
    assert start[0, 1].abs() > 0.1
    for _ in range(200):
        state, _ = step(state, (x, {"label": label, "domain": domain}))
    weight = state.params["features"]["weight"]
    assert weight[0, 0].abs() > 1
    assert weight[0, 1].abs() < 0.1 * weight[0, 0].abs()


def both_rule(residuals, dvalue):
    return {name: pullback(dvalue) for name, pullback in residuals.items()}


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: fn.reverse_gradient("1"), ValueError, "^reverse_gradient: expects a number"),
        (lambda: fn.clip_cotangent(0), ValueError, "^clip_cotangent: max_norm must be a number > "),
        (lambda: fn.noise_cotangent(-1), ValueError, "^noise_cotangent: std must be a number >= "),
        (lambda: fn.straight_through(1), TypeError, "^straight_through: function: expects a fun"),
        (
            lambda: fn.straight_through(torch.sign, 1),
            TypeError,
            "^straight_through: derivative: expects a fun",
        ),
    ],
)
def test_a_bad_argument_is_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
