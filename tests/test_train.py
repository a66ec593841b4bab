"""The training step: what it computes, from which key, and when it lets residuals go."""

import math
import subprocess
import sys
import weakref

import numpy as np
import optree
import pytest
import torch
from torch import nn

import funcnet as fn

F64 = torch.float64


def numbers(*shape, seed=0, dtype=F64):
    # Drawn on the CPU, so that the numbers are the same on any device.
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=F64, device="cpu")
    return drawn.to(torch.get_default_device(), dtype)


def batch_at(step, dtype=F64):
    x = numbers(8, 5, seed=2 * step, dtype=dtype)
    return x, numbers(8, 3, seed=2 * step + 1, dtype=dtype)


def assert_trees_equal(found, expected):
    assert optree.tree_structure(found) == optree.tree_structure(expected)
    for a, b in zip(optree.tree_leaves(found), optree.tree_leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def frozen(tree):
    return [(leaf, leaf._version, leaf.clone()) for leaf in optree.tree_leaves(tree)]


def assert_unchanged(before):
    for leaf, version, copy in before:
        assert leaf._version == version
        assert torch.equal(leaf, copy)


NETS = {
    "linear": lambda: fn.linear(3),
    "with state": lambda: fn.serial(fn.linear(6), fn.batch_norm(), fn.relu(), fn.linear(3)),
    "with a key": lambda: fn.serial(fn.linear(6), fn.dropout(0.5), fn.tanh(), fn.linear(3)),
    "nested": lambda: fn.serial(
        body=fn.residual(fn.serial(fn.linear(5), fn.dropout(0.2))),
        norm=fn.batch_norm(),
        out=fn.linear(3),
    ),
}
OPTIMIZERS = {
    "sgd": lambda: fn.sgd(0.1, momentum=0.9),
    "adamw": lambda: fn.adamw(lambda step: 0.1 * 0.5**step),
}
nets = pytest.mark.parametrize("make_net", NETS.values(), ids=NETS)
optimizers = pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


@nets
@optimizers
@pytest.mark.parametrize("check_finite", [False, True])
def test_step_equals_the_loop_written_by_hand(make_net, make_optimizer, check_finite):
    net, loss, optimizer, key = make_net(), fn.mse(), make_optimizer(), fn.key(7)
    step = fn.train_step(
        net, loss, optimizer, metrics={"mae": fn.mae().apply}, check_finite=check_finite
    )
    state = fn.init_train_state(net, optimizer, key, batch_at(0)[0])
    params, net_state = net.init(key, batch_at(0)[0])
    opt_state = optimizer.init_state(params)
    assert_trees_equal(tuple(state)[:3], (params, net_state, opt_state))
    for t in range(4):
        x, target = batch_at(t)
        before = frozen((state, x, target))
        state, metrics = step(state, (x, target))
        assert_unchanged(before)
        y, pullback, net_state = net.vjp(params, x, net_state, key=fn.fold_in(key, t), train=True)
        value, loss_pullback = loss.vjp(y, target)
        grads, _ = pullback(loss_pullback(), x=False)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = fn.apply_updates(params, updates)
        expected = {"loss": value, "mae": fn.mae().apply(y, target)}
        assert_trees_equal((tuple(state)[:3], metrics), ((params, net_state, opt_state), expected))
        assert (int(state.step), state.step.dtype, state.step.shape) == (t + 1, torch.int64, ())
        assert torch.equal(state.key, key)


def test_step_is_a_function_of_its_arguments_alone():
    net, optimizer = NETS["nested"](), OPTIMIZERS["adamw"]()
    step = fn.train_step(net, fn.mse(), optimizer)
    states = [fn.init_train_state(net, optimizer, fn.key(1), batch_at(0)[0])]
    generator = torch.random.get_rng_state()
    for t in range(3):
        states.append(step(states[-1], batch_at(t))[0])
    assert torch.equal(torch.random.get_rng_state(), generator)
    # Any state on the way is the whole run: go back to it, elsewhere, and go on.
    fresh = fn.train_step(NETS["nested"](), fn.mse(), OPTIMIZERS["adamw"]())
    leaves, treedef = optree.tree_flatten(states[1])
    state = treedef.unflatten([leaf.clone() for leaf in leaves])
    for t in (1, 2):
        state, _ = fresh(state, batch_at(t))
    assert_trees_equal(state, states[3])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_step_is_the_same_in_every_grad_mode_and_records_no_tape(mode):
    net, optimizer = NETS["with state"](), OPTIMIZERS["adamw"]()
    step = fn.train_step(net, fn.mse(), optimizer)
    start = fn.init_train_state(net, optimizer, fn.key(1), batch_at(0)[0])
    expected = step(start, batch_at(0))
    with mode():
        found = step(start, batch_at(0))
    assert_trees_equal(found, expected)
    assert not any(leaf.requires_grad for leaf in optree.tree_leaves(found))


PEERS = {
    "sgd": (
        fn.sgd(0.1, 0.9, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01),
    ),
    "adam": (fn.adam(0.01), lambda p: torch.optim.Adam(p, 0.01)),
    "adamw": (fn.adamw(0.01), lambda p: torch.optim.AdamW(p, 0.01)),
    "rmsprop": (fn.rmsprop(0.01), lambda p: torch.optim.RMSprop(p, 0.01)),
}


@pytest.mark.parametrize(("optimizer", "peer"), PEERS.values(), ids=PEERS)
@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_twenty_steps_equal_those_of_torch(optimizer, peer, kind):
    net = fn.serial(
        # A bias before a batch norm has a gradient of mere rounding, that Adam makes large.
        fn.linear(7, bias=False),
        fn.batch_norm(),
        fn.tanh(),
        fn.linear(4),
        fn.relu(),
        fn.linear(3),
    )
    torch_net = nn.Sequential(
        nn.Linear(5, 7, bias=False),
        nn.BatchNorm1d(7),
        nn.Tanh(),
        nn.Linear(7, 4),
        nn.ReLU(),
        nn.Linear(4, 3),
    ).double()
    losses = {
        "regression": (fn.mse(), nn.MSELoss()),
        "classification": (fn.cross_entropy(), nn.CrossEntropyLoss()),
    }
    loss, torch_loss = losses[kind]
    state = fn.init_train_state(net, optimizer, fn.key(3), batch_at(0)[0])
    dotted = fn.tree.to_dotted(state.params)
    torch_net.load_state_dict(dotted, strict=False)
    torch_optimizer = peer(torch_net.parameters())
    step = fn.train_step(net, loss, optimizer)
    for t in range(20):
        x, target = batch_at(t)
        if kind == "classification":
            target = target.argmax(1)
        state, metrics = step(state, (x, target))
        torch_optimizer.zero_grad()
        value = torch_loss(torch_net(x), target)
        value.backward()
        torch_optimizer.step()
        torch.testing.assert_close(metrics["loss"], value.detach(), rtol=1e-10, atol=1e-12)
    found = {**fn.tree.to_dotted(state.params), **fn.tree.to_dotted(state.state)}
    compared = 0
    for name, expected in torch_net.state_dict().items():
        if name in found:
            torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-11)
            compared += 1
    assert compared >= len(dotted) + 2


def test_key_of_a_step_is_the_runs_key_folded_with_the_step():
    net, optimizer = fn.serial(fn.dropout(0.5)), fn.sgd(0.1)
    step = fn.train_step(
        net, fn.mse(), optimizer, metrics={"seen": lambda prediction, target: prediction}
    )
    x = torch.ones(50, dtype=F64)
    state = fn.init_train_state(net, optimizer, fn.key(5), x)
    seen = []
    for t in range(3):
        state, metrics = step(state, (x, x))
        expected, _ = net.apply({}, x, key=fn.fold_in(fn.key(5), t), train=True)
        assert torch.equal(metrics["seen"], expected)
        seen.append(metrics["seen"])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    resumed = state._replace(step=torch.tensor(0))
    assert torch.equal(step(resumed, (x, x))[1]["seen"], seen[0])


def test_metrics_are_of_the_prediction_before_the_update():
    net, optimizer = fn.linear(3), fn.sgd(10.0)
    step = fn.train_step(
        net,
        fn.mse("sum"),
        optimizer,
        metrics={"mean": fn.mse().apply, "shape": lambda y, t: torch.tensor(y.shape)},
    )
    start = fn.init_train_state(net, optimizer, fn.key(0), batch_at(0)[0])
    x, target = batch_at(0)
    _, metrics = step(start, (x, target))
    y, _ = net.apply(start.params, x)
    assert list(metrics) == ["loss", "mean", "shape"]
    assert torch.equal(metrics["loss"], (y - target).square().sum())
    assert torch.equal(metrics["mean"], (y - target).square().mean())
    assert metrics["shape"].tolist() == [8, 3]


def test_a_metric_may_not_be_called_loss():
    with pytest.raises(ValueError, match="'loss'"):
        fn.train_step(fn.linear(3), fn.mse(), fn.sgd(0.1), metrics={"loss": fn.mse().apply})


@pytest.mark.parametrize("net", [fn.relu(), fn.serial(fn.tanh()), fn.serial()])
@optimizers
def test_a_net_without_params_takes_a_step(net, make_optimizer):
    optimizer = make_optimizer()
    x = numbers(4, 3)
    state = fn.init_train_state(net, optimizer, fn.key(0), x)
    state, metrics = fn.train_step(net, fn.mse(), optimizer)(state, (x, x))
    assert state.params == {}
    assert int(state.step) == 1
    assert torch.equal(metrics["loss"], (net.apply({}, x)[0] - x).square().mean())


def test_vmap_over_train_states_equals_the_loop():
    net = fn.serial(fn.linear(6, bias=False), fn.batch_norm(), fn.dropout(0.3), fn.linear(3))
    optimizer = fn.adam(0.01)
    step = fn.train_step(net, fn.mse(), optimizer)
    keys = torch.stack([fn.key(seed) for seed in range(3)])
    members = [fn.init_train_state(net, optimizer, key, batch_at(0)[0]) for key in keys]
    many = optree.tree_map(lambda *leaves: torch.stack(leaves), *members)
    for t in range(3):
        many, metrics = torch.vmap(step, (0, None))(many, batch_at(t))
        rows = [step(member, batch_at(t)) for member in members]
        members = [row[0] for row in rows]
        for i, (_, alone) in enumerate(rows):
            torch.testing.assert_close(metrics["loss"][i], alone["loss"], rtol=1e-11, atol=1e-13)
    for i, member in enumerate(members):
        for row, leaf in zip(optree.tree_leaves(many), optree.tree_leaves(member), strict=True):
            torch.testing.assert_close(row[i], leaf, rtol=1e-10, atol=1e-12)


def test_inputs_may_be_trees():
    net = fn.serial(
        ends=fn.parallel(a=fn.linear(3), b=fn.embedding(4, 3, dtype=F64)),
        sum=fn.stateless(lambda key, x: {}, add_named, add_named_vjp),
    )
    optimizer = fn.sgd(0.1)
    x = {"a": numbers(8, 5), "b": torch.arange(8) % 3}
    state = fn.init_train_state(net, optimizer, fn.key(0), x)
    new, metrics = fn.train_step(net, fn.mse(), optimizer)(state, (x, numbers(8, 3)))
    for name, end in new.params["ends"].items():
        assert not torch.equal(end["weight"], state.params["ends"][name]["weight"])
    embedded = (new.params["ends"]["b"]["weight"], state.params["ends"]["b"]["weight"])
    assert torch.equal(embedded[0][3], embedded[1][3])
    y, _ = net.apply(state.params, x)
    assert torch.equal(metrics["loss"], (y - numbers(8, 3)).square().mean())


def add_named(params, x):
    return x["a"] + x["b"]


def add_named_rule(residuals, dy, *, params, x):
    return ({} if params else None), ({"a": dy, "b": dy} if x else None)


def add_named_vjp(params, x):
    return add_named(params, x), fn.Pullback(add_named_rule, {})


@nets
@pytest.mark.parametrize("train", [True, False])
def test_value_and_grad_is_that_of_autograd(make_net, train):
    net, key = make_net(), fn.key(2)
    x, target = batch_at(0)
    params, state = net.init(key, x)
    f = fn.value_and_grad(net, fn.mse())
    value, grads, new_state = f(params, (x, target), state, key=key, train=train)
    leaves, treedef = optree.tree_flatten(params)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    y, expected_state = net.apply(treedef.unflatten(leaves), x, state, key=key, train=train)
    expected = nn.functional.mse_loss(y, target)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    found, found_treedef = optree.tree_flatten(grads)
    assert found_treedef == treedef
    for gradient, theirs in zip(found, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(gradient, theirs, rtol=1e-10, atol=1e-12)
    for a, b in zip(optree.tree_leaves(new_state), optree.tree_leaves(expected_state), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=0)


def test_value_and_grad_trains_by_default_and_says_that_it_needs_a_key():
    net = fn.serial(fn.linear(3), fn.dropout(0.5))
    params, _ = net.init(fn.key(0), batch_at(0)[0])
    with pytest.raises(ValueError, match=r"serial\['1'\] dropout: needs a key"):
        fn.value_and_grad(net, fn.mse())(params, batch_at(0))
    fn.value_and_grad(net, fn.mse())(params, batch_at(0), train=False)


def dividing_rule(residuals, dy, *, params, x):
    return ({} if params else None), (dy / 0.0 if x else None)


def passes_infinity_back():
    """``y = x``, whose rule divides the cotangent by 0."""

    def vjp(params, x):
        return x, fn.Pullback(dividing_rule, {})

    return fn.stateless(lambda key, x: {}, lambda params, x: x, vjp, name="divider")


def with_params_rule(residuals, dy, *, params, x):
    return ({"w": dy.sum() * math.inf} if params else None), (dy if x else None)


def gives_infinite_dparams():
    def vjp(params, x):
        return x + params["w"], fn.Pullback(with_params_rule, {})

    return fn.stateless(
        lambda key, x: {"w": torch.zeros((), dtype=x.dtype)},
        lambda params, x: x + params["w"],
        vjp,
        name="shift",
    )


def no_rule(residuals, dy, *, params, x):
    raise AssertionError("the forward pass fails before this is called")


def function(f, name):
    return fn.stateless(
        lambda key, x: {},
        lambda params, x: f(x),
        lambda params, x: (f(x), fn.Pullback(no_rule, {})),
        name=name,
    )


NONFINITE = {
    "output": (
        fn.serial(fn.linear(3), function(torch.log, "log"), fn.linear(3)),
        r"serial\['1'\] log: output is not finite: \d+ of 24 values",
    ),
    "output, named and nested": (
        fn.serial(body=fn.serial(first=fn.linear(3), log=function(torch.log, "log"))),
        r"serial\['body'\] serial\['log'\] log: output is not finite",
    ),
    "output in a residual": (
        fn.serial(skip=fn.residual(function(torch.log, "log"))),
        r"serial\['skip'\] residual log: output is not finite",
    ),
    "output in a branch": (
        fn.serial(
            lift=fn.linear(3), both=fn.branch(fn.relu(), function(torch.log, "log")), sum=fn.add()
        ),
        r"serial\['both'\] branch\['1'\] log: output is not finite",
    ),
    "cotangent": (
        fn.serial(fn.linear(3), passes_infinity_back(), fn.linear(3)),
        r"serial\['1'\] divider: dx is not finite: 24 of 24 values",
    ),
    "cotangent in a branch": (
        fn.serial(
            lift=fn.linear(3), both=fn.branch(fn.relu(), passes_infinity_back()), sum=fn.add()
        ),
        r"serial\['both'\] branch\['1'\] divider: dx is not finite",
    ),
    "gradient": (
        fn.serial(fn.linear(3), gives_infinite_dparams()),
        r"serial\['1'\] shift: dparams is not finite: 1 of 1 values",
    ),
}


@pytest.mark.parametrize(("net", "match"), NONFINITE.values(), ids=NONFINITE)
def test_check_finite_names_the_path_of_the_first_layer_at_fault(net, match):
    x, target = batch_at(0)
    optimizer = fn.sgd(0.1)
    state = fn.init_train_state(net, optimizer, fn.key(0), x)
    if "residual" in match:
        target = x
    with pytest.raises(ValueError, match=f"^{match}"):
        fn.train_step(net, fn.mse(), optimizer, check_finite=True)(state, (x, target))
    with pytest.raises(ValueError, match=f"^{match}"):
        fn.value_and_grad(net, fn.mse(), check_finite=True)(
            state.params, (x, target), key=fn.key(0)
        )


NAN_LOSS = fn.Loss(
    lambda y, t: y.sum() * math.nan,
    lambda y, t: (y.sum() * math.nan, fn.LossPullback(lambda residuals, d: d, {})),
)


def infinite_rule(residuals, dvalue):
    return torch.full_like(residuals["y"], math.inf)


INFINITE_GRADIENT = fn.Loss(
    lambda y, t: y.sum(), lambda y, t: (y.sum(), fn.LossPullback(infinite_rule, {"y": y}))
)


@pytest.mark.parametrize(
    ("loss", "target", "match"),
    [
        (NAN_LOSS, 0.0, "loss: value is not finite: 1 of 1 values"),
        (fn.mse(), math.inf, "loss: value is not finite"),
        (INFINITE_GRADIENT, 0.0, "loss: dprediction is not finite: 24 of 24 values"),
    ],
)
def test_check_finite_names_the_loss(loss, target, match):
    net, optimizer = fn.linear(3), fn.sgd(0.1)
    x = batch_at(0)[0]
    state = fn.init_train_state(net, optimizer, fn.key(0), x)
    step = fn.train_step(net, loss, optimizer, check_finite=True)
    with pytest.raises(ValueError, match=match):
        step(state, (x, torch.full((8, 3), target, dtype=F64)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "params"])
def test_check_finite_names_the_layer_that_gets_a_bad_input_or_bad_params(value, where):
    net, optimizer = fn.serial(fn.linear(3), fn.relu()), fn.sgd(0.1)
    x, target = batch_at(0)
    state = fn.init_train_state(net, optimizer, fn.key(0), x)
    if where == "x":
        x[1, 2] = value
    else:
        state.params["0"]["weight"][1, 2] = value
    step = fn.train_step(net, fn.mse(), optimizer, check_finite=True)
    with pytest.raises(ValueError, match=rf"serial\['0'\] linear: {where} is not finite: 1 of"):
        step(state, (x, target))


def test_without_check_finite_nan_passes_through():
    net, optimizer = fn.linear(3), fn.sgd(0.1)
    x, target = batch_at(0)
    state = fn.init_train_state(net, optimizer, fn.key(0), x)
    state, metrics = fn.train_step(net, fn.mse(), optimizer)(state, (x * math.nan, target))
    assert metrics["loss"].isnan()
    assert state.params["weight"].isnan().all()


class Watch:
    """Layers that leave a residual each, and look in their rules at which of all still live."""

    def __init__(self):
        self.residuals = {}
        self.alive = {}

    def layer(self, name):
        def rule(residuals, dy, *, params, x):
            alive = {
                other for other, reference in self.residuals.items() if reference() is not None
            }
            self.alive[name] = alive
            gradient = {"scale": (dy * residuals["copy"]).sum()} if params else None
            return gradient, dy * residuals["scale"] if x else None

        def vjp(params, x):
            copy = x.clone()
            self.residuals[name] = weakref.ref(copy)
            return x * params["scale"], fn.Pullback(rule, {"copy": copy, **params})

        return fn.stateless(
            lambda key, x: {"scale": torch.ones((), dtype=x.dtype)},
            lambda params, x: x * params["scale"],
            vjp,
            name=name,
        )


def watched(kind):
    """A net of the watched layers a, b, c, d, and those that may live when each rule runs."""
    watch = Watch()
    a, b, c, d = (watch.layer(name) for name in "abcd")
    in_turn = {"d": {"a", "b", "c", "d"}, "c": {"a", "b", "c"}, "b": {"a", "b"}, "a": {"a"}}
    nets = {
        "serial": lambda: fn.serial(a, b, c, d),
        "nested serial": lambda: fn.serial(fn.serial(a, b), fn.serial(c, fn.serial(d))),
        "residual": lambda: fn.serial(a, fn.residual(fn.serial(b, c)), fn.residual(d)),
        "with other layers": lambda: fn.serial(a, fn.tanh(), b, fn.linear(3), c, fn.relu(), d),
        "guarded": lambda: fn.detect_nonfinite(fn.serial(a, fn.serial(b, c), d)),
    }
    return watch, nets[kind](), in_turn


KINDS = ["serial", "nested serial", "residual", "with other layers", "guarded"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("check_finite", [False, True])
def test_residuals_go_layer_by_layer_during_the_backward_pass(kind, check_finite):
    watch, net, expected = watched(kind)
    optimizer, x = fn.sgd(0.1), numbers(4, 3)
    state = fn.init_train_state(net, optimizer, fn.key(0), x)
    fn.train_step(net, fn.mse(), optimizer, check_finite=check_finite)(state, (x, x))
    assert watch.alive == expected
    assert not any(reference() is not None for reference in watch.residuals.values())


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_grad_lets_residuals_go_layer_by_layer(kind):
    watch, net, expected = watched(kind)
    x = numbers(4, 3)
    params, _ = net.init(fn.key(0), x)
    fn.value_and_grad(net, fn.mse())(params, (x, x))
    assert watch.alive == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_pullback_that_is_kept_keeps_its_residuals_and_gives_the_same_again(kind):
    watch, net, _ = watched(kind)
    x = numbers(4, 3)
    params, _ = net.init(fn.key(0), x)
    _, pullback, _ = net.vjp(params, x)
    residuals = frozen(pullback)
    first = pullback(x)
    assert watch.alive == {name: set("abcd") for name in "abcd"}
    assert_trees_equal(pullback(x), first)
    assert_unchanged(residuals)
    del pullback, residuals
    assert not any(reference() is not None for reference in watch.residuals.values())


X, TARGET = batch_at(0)


@pytest.mark.parametrize(
    ("batch", "error"),
    [
        ((X,), ValueError),
        ((X, TARGET, TARGET), ValueError),
        ((), ValueError),
        (None, (ValueError, TypeError)),
        (3, (ValueError, TypeError)),
        (X, (ValueError, TypeError)),
        (X[:2], (ValueError, TypeError)),
        ({"x": X, "target": TARGET}, (ValueError, TypeError)),
    ],
    ids=["one", "three", "none", "None", "int", "tensor", "tensor of two rows", "dict"],
)
def test_a_batch_that_is_not_a_pair_is_refused(batch, error):
    net, optimizer = fn.linear(3), fn.sgd(0.1)
    state = fn.init_train_state(net, optimizer, fn.key(0), X)
    step = fn.train_step(net, fn.mse(), optimizer)
    with pytest.raises(error, match=r"expects a batch \(x, target\)"):
        step(state, batch)


def test_errors_of_the_net_and_the_loss_pass_through_with_their_paths():
    net, optimizer = fn.serial(fn.linear(4), fn.linear(3)), fn.sgd(0.1)
    state = fn.init_train_state(net, optimizer, fn.key(0), X)
    step = fn.train_step(net, fn.mse(), optimizer)
    with pytest.raises(ValueError, match=r"serial\['0'\] linear: weight expects 5 features"):
        step(state, (X[:, :4], TARGET))
    with pytest.raises(ValueError, match="mse: expects a target of the prediction's shape"):
        step(state, (X, TARGET[:, :1]))
    with pytest.raises(TypeError, match="mse: expects a target of dtype"):
        step(state, (X, TARGET.float()))


def test_what_is_not_made_by_a_constructor_is_refused_with_a_hint():
    net, loss, optimizer = fn.linear(2), fn.mse(), fn.sgd(0.1)
    with pytest.raises(TypeError, match=r"^train_step: expects a Loss as loss, .*call it"):
        fn.train_step(net, fn.mse, optimizer)
    with pytest.raises(TypeError, match=r"^train_step: expects an Optimizer as optimizer"):
        fn.train_step(net, optimizer, loss)
    with pytest.raises(TypeError, match=r"^init_train_state: expects a Layer as model"):
        fn.init_train_state(fn.linear, optimizer, fn.key(0), torch.ones(1, 2))
    with pytest.raises(TypeError, match=r"metric 'acc': .* got accuracy; call it"):
        fn.train_step(net, loss, optimizer, metrics={"acc": fn.metrics.accuracy})


def test_what_is_pytorchs_is_refused_with_what_to_take():
    net, loss, optimizer, module = fn.linear(2), fn.mse(), fn.sgd(0.1), torch.nn.Linear(2, 2)
    adam = torch.optim.Adam(module.parameters())
    with pytest.raises(TypeError, match=r"a Layer as model, got a torch.nn.Linear; use fn.lin"):
        fn.train_step(module, loss, optimizer)
    for its in (torch.nn.MSELoss(), torch.nn.functional.mse_loss):
        with pytest.raises(TypeError, match=r"a Loss as loss, got .*; use fn.mse"):
            fn.train_step(net, its, optimizer)
    with pytest.raises(TypeError, match=r"an Optimizer as optimizer, got a torch.optim.Adam; use"):
        fn.train_step(net, loss, adam)


def test_what_is_no_train_state_is_refused():
    net, optimizer = fn.linear(2), fn.sgd(0.1)
    params, _ = net.init(fn.key(0), X)
    with pytest.raises(TypeError, match=r"a step expects a TrainState and a batch, .*; got a dict"):
        fn.train_step(net, fn.mse(), optimizer)(params, (X, TARGET))


def test_the_example_input_may_be_an_array():
    state = fn.init_train_state(fn.linear(2), fn.sgd(0.1), fn.key(0), np.ones((3, 5), np.float32))
    assert state.params["weight"].shape == (2, 5)


def test_a_run_may_begin_with_params_that_are_given():
    net, optimizer = fn.serial(fn.linear(2), fn.batch_norm()), fn.sgd(0.1)
    params, state = net.init(fn.key(3), X)
    start = fn.init_train_state(net, optimizer, fn.key(0), params=params, state=state)
    assert_trees_equal(start.params, params)
    assert_trees_equal(start.state, state)
    with pytest.raises(TypeError, match="init_train_state: needs an example input x, or params"):
        fn.init_train_state(net, optimizer, fn.key(0))
    start = fn.init_train_state(net, optimizer, fn.key(3), X, state=state)
    assert_trees_equal(start.params, params)


def test_a_loss_without_a_reduction_is_none_to_train_on():
    net, optimizer = fn.linear(3), fn.sgd(0.1)
    state = fn.init_train_state(net, optimizer, fn.key(0), X)
    target = torch.zeros(X.shape[0], 3, dtype=X.dtype)
    with pytest.raises(ValueError, match=r"loss: expects a scalar .*; pass reduction='mean'"):
        fn.train_step(net, fn.mse(reduction="none"), optimizer)(state, (X, target))


def test_a_batch_on_another_device_is_an_error_with_the_path():
    net, optimizer = fn.serial(fn.linear(3)), fn.sgd(0.1)
    state = fn.init_train_state(net, optimizer, fn.key(0), X)
    with pytest.raises(RuntimeError, match="device") as error:
        fn.train_step(net, fn.mse(), optimizer)(state, (X.to("meta"), TARGET))
    assert "serial['0']" in error.value.__notes__[0]


def test_a_loss_is_a_metric():
    net, optimizer = fn.linear(2), fn.sgd(0.1)
    x, target = torch.ones(3, 2), torch.zeros(3, 2)
    state = fn.init_train_state(net, optimizer, fn.key(0), x)
    _, metrics = fn.train_step(net, fn.mse(), optimizer, metrics={"mae": fn.mae()})(
        state, (x, target)
    )
    y, _ = net.apply(state.params, x)
    torch.testing.assert_close(metrics["mae"], y.abs().mean())


@pytest.mark.cpu_only
def test_a_run_resumes_bit_for_bit_in_another_process(tmp_path):
    program = """
import sys, torch, funcnet as fn
net = fn.serial(fn.linear(4), fn.batch_norm(), fn.relu(), fn.dropout(0.2), fn.linear(2))
optimizer = fn.adam(0.01)
step = fn.train_step(net, fn.mse(), optimizer)
x, target = fn.random.normal(fn.key(1), (8, 3)), fn.random.normal(fn.key(2), (8, 2))
path, steps, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resume"
state = fn.init_train_state(net, optimizer, fn.key(0), x)
if resume:
    state = torch.load(path, weights_only=False)
for _ in range(steps):
    state, metrics = step(state, (x, target))
torch.save(state, path)
"""
    runs = {"whole": [("6", "new")], "parts": [("2", "new"), ("4", "resume")]}
    for name, parts in runs.items():
        for steps, how in parts:
            command = [sys.executable, "-c", program, str(tmp_path / name), steps, how]
            subprocess.run(command, check=True, capture_output=True)
    whole, parts = (torch.load(tmp_path / name, weights_only=False) for name in runs)
    assert whole.step == 6
    for one, other in zip(fn.tree.leaves(whole), fn.tree.leaves(parts), strict=True):
        assert torch.equal(one, other)


def test_a_train_state_does_not_follow_the_default_device():
    with torch.device("meta"):
        state = fn.init_train_state(
            fn.linear(2), fn.sgd(0.1), fn.key(0, device="cpu"), torch.ones(1, 2, device="cpu")
        )
    assert {leaf.device.type for leaf in fn.tree.leaves(state)} == {"cpu"}


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "rmsprop"])
def test_a_donating_step_gives_what_the_plain_one_gives(optimizer):
    make = {
        "adamw": lambda: fn.adamw(0.1),
        "adam": lambda: fn.adam(0.1, weight_decay=0.1, amsgrad=True),
        "sgd": lambda: fn.sgd(0.1, 0.9, nesterov=True, weight_decay=0.1),
        "rmsprop": lambda: fn.rmsprop(0.1, momentum=0.9, centered=True),
    }[optimizer]()
    # A bias before batch_norm has a gradient of 0, of which Adam would see the rounding alone.
    net = fn.serial(fn.linear(4, bias=False), fn.batch_norm(), fn.tanh(), fn.linear(2))
    x, target = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    plain, donated = [fn.init_train_state(net, make, fn.key(0), x) for _ in range(2)]
    for _ in range(4):
        plain, _ = fn.train_step(net, fn.mse(), make)(plain, (x, target))
        donated, _ = fn.train_step(net, fn.mse(), make, donate=True)(donated, (x, target))
    for one, other in zip(fn.tree.leaves(donated), fn.tree.leaves(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_a_donating_step_writes_to_the_state_that_it_is_given():
    net, x = fn.linear(2), torch.randn(8, 3)
    state = fn.init_train_state(net, fn.adamw(0.1), fn.key(0), x)
    kept = state.params["weight"].clone()
    step = fn.train_step(net, fn.mse(), fn.adamw(0.1), donate=True)
    after, _ = step(state, (x, torch.randn(8, 2)))
    assert after.params["weight"].data_ptr() == state.params["weight"].data_ptr()
    assert not torch.equal(state.params["weight"], kept)


def test_a_plain_step_changes_nothing_that_it_is_given():
    net, x = fn.linear(2), torch.randn(8, 3)
    for optimizer in (fn.adamw(0.1), fn.sgd(0.1, 0.9, weight_decay=0.1)):
        state = fn.init_train_state(net, optimizer, fn.key(0), x)
        before = [leaf._version for leaf in fn.tree.leaves(state)]
        fn.train_step(net, fn.mse(), optimizer)(state, (x, torch.randn(8, 2)))
        assert [leaf._version for leaf in fn.tree.leaves(state)] == before


@pytest.mark.parametrize("again", [lambda leaf: leaf, lambda leaf: leaf.view(3, 3)])
@pytest.mark.parametrize("optimizer", [fn.sgd(0.1), fn.adamw(0.1)], ids=["sgd", "adamw"])
def test_a_parameter_that_is_two_leaves_is_not_written_to(optimizer, again):
    net = fn.serial(fn.linear(3, bias=False), fn.linear(3, bias=False))
    x, target = torch.randn(8, 3), torch.randn(8, 3)
    results = []
    for donate in (False, True):
        state = fn.init_train_state(net, optimizer, fn.key(0), x)
        state.params["1"]["weight"] = again(state.params["0"]["weight"])
        step = fn.train_step(net, fn.mse(), optimizer, donate=donate)
        results.append(step(state, (x, target))[0].params)
    for one, other in zip(*map(fn.tree.leaves, results), strict=True):
        assert torch.equal(one, other)
