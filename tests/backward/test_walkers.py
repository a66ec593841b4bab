"""What visits the pullbacks of a model."""

import pytest
import torch

import funcnet as fn

X = fn.random.normal(fn.key(1), (4, 6))
NET = fn.serial(
    first=fn.linear(6),
    body=fn.residual(fn.serial(fn.tanh(), fn.linear(6))),
    twice=fn.serial(fn.fan_out(2), fn.shared(fn.linear(3)), fn.add()),
)
LEAVES = ["first", "body.0", "body.1", "twice.0", "twice.1", "twice.1", "twice.2"]


def doubled_rule(residuals, dy, *, params, x):
    return fn.pull(residuals, "", fn.tree.map(lambda leaf: 2 * leaf, dy), params=params, x=x)


def doubled(path, pullback):
    """The pullback of one layer, from twice the cotangent."""
    return fn.Pullback(doubled_rule, {"": pullback}) if path == "body.1" else pullback


def run(net, visit=None):
    params, _ = net.init(fn.key(0), X)
    y, pullback, _ = net.vjp(params, X)
    return (visit or (lambda pullback: pullback))(pullback)(torch.ones_like(y))


def test_each_leaf_layer_is_visited_with_its_path():
    found = []
    run(fn.with_pullbacks(NET, lambda path, each: found.append(path) or each))
    assert found == LEAVES
    again = []
    run(NET, lambda whole: fn.map_pullbacks(lambda path, p: again.append(path) or p, whole))
    assert sorted(again) == sorted(LEAVES)


def test_both_walkers_replace_a_pullback():
    early = run(fn.with_pullbacks(NET, doubled))
    late = run(NET, lambda pullback: fn.map_pullbacks(doubled, pullback))
    plain = run(NET)
    for one, other in zip(fn.tree.leaves(early), fn.tree.leaves(late), strict=True):
        assert torch.equal(one, other)
    same = early[0]["body"]["1"]["weight"], 2 * plain[0]["body"]["1"]["weight"]
    torch.testing.assert_close(*same)
    assert not torch.equal(early[1], plain[1])


def test_a_rematerialized_layer_is_visited_in_the_backward_pass():
    found = []
    net = fn.with_pullbacks(fn.remat(NET), lambda path, each: found.append(path) or each)
    params, _ = net.init(fn.key(0), X)
    y, pullback, _ = net.vjp(params, X)
    assert found == []
    pullback(y)
    assert found == LEAVES


def test_the_model_keeps_its_repr_and_the_laws():
    net = fn.serial(fn.linear(3), fn.dropout(0.5), fn.tanh())
    walked = fn.with_pullbacks(net, lambda path, pullback: pullback)
    assert repr(walked) == repr(net)
    fn.testing.check_layer(walked, X)


def test_deferral_goes_through_a_replaced_pullback():
    net = fn.with_pullbacks(NET, doubled)
    params, _ = net.init(fn.key(0), X)
    y, pullback, _ = net.vjp(params, X)
    dparams, _ = pullback(y)
    found = fn.gradients(fn.defer(pullback)(y)[0])
    for one, other in zip(fn.tree.leaves(dparams), fn.tree.leaves(found), strict=True):
        assert torch.equal(one, other)


def test_what_is_no_pullback_is_refused_by_path():
    with pytest.raises(TypeError, match=r"with_pullbacks: what the function gives at 'body.1'"):
        run(fn.with_pullbacks(NET, lambda path, each: None if path == "body.1" else each))
    with pytest.raises(TypeError, match="map_pullbacks: expects a Pullback"):
        fn.map_pullbacks(doubled, NET)
    with pytest.raises(TypeError, match="map_pullbacks: expects a function"):
        fn.map_pullbacks(NET, None)
