"""with_rule and cotangent: what rules read and may give, and what laws layers say they break."""

import pytest
import torch

import funcnet as fn
from funcnet.testing import check_layer

X = fn.random.normal(fn.key(1), (4, 3), torch.float64)


def same_rule(residuals, dy, *, params, x):
    """The layer's own."""
    return fn.pull(residuals, "pullback", dy, params=params, x=x)


def zero_rule(residuals, dy, *, params, x):
    return None, torch.zeros_like(dy)


def twice(dy):
    return 2 * dy


def given_rule(residuals, dy, fault, *, params, x):
    """What a correct rule gives, or something with a fault."""
    dparams, dx = residuals["pullback"](dy)
    weight = dparams["weight"]
    return {
        "dx of another shape": (dparams, dx[:, :2]),
        "dx of another dtype": (dparams, dx.float()),
        "dx of None": (dparams, None),
        "dx of a tuple": (dparams, (dx, dx)),
        "a parameter too few": ({"weight": weight}, dx),
        "a parameter too many": ({**dparams, "scale": weight}, dx),
        "a transposed parameter": ({**dparams, "weight": weight.t()}, dx),
        "a parameter of another dtype": ({**dparams, "weight": weight.float()}, dx),
        "no dparams": (None, dx),
        "no pair": dparams,
    }[fault]


FAULTS = {
    "dx of another shape": (ValueError, r"expects dx of shape \(4, 3\), got \(4, 2\)"),
    "dx of another dtype": (TypeError, r"expects dx of torch.float64, got float32 \(4, 3\)"),
    "dx of None": (TypeError, "expects dx to be a tensor, got None"),
    "dx of a tuple": (TypeError, r"expects dx to be a tensor, got \(float64 \(4, 3\), float64"),
    "a parameter too few": (ValueError, r"expects dparams like \{'weight': .*, got \{'weight': "),
    "a parameter too many": (ValueError, r"expects dparams like .*, got .*'scale'"),
    "a transposed parameter": (
        ValueError,
        r"expects dparams weight of shape \(2, 3\), got \(3, 2\)",
    ),
    "a parameter of another dtype": (TypeError, "expects dparams weight of torch.float64, got"),
    "no dparams": (ValueError, "expects dparams like .*, got NoneType"),
    "no pair": (TypeError, r"expects the rule to give \(dparams, dx\), got \{'weight'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rule_that_gives_something_else_is_named_by_its_path(fault):
    net = fn.serial(fn.tanh(), fn.serial(head=fn.with_rule(fn.linear(2), given_rule, fault)))
    params, _ = net.init(fn.key(0), X)
    y, pullback, _ = net.vjp(params, X)
    kind, message = FAULTS[fault]
    with pytest.raises(kind, match=rf"^serial\['1'\] serial\['head'\] with_rule: {message}"):
        pullback(torch.ones_like(y))


def test_what_was_not_asked_for_is_neither_checked_nor_given():
    layer = fn.with_rule(fn.linear(2), given_rule, "dx of another shape")
    params, _ = layer.init(fn.key(0), X)
    y, pullback, _ = layer.vjp(params, X)
    dparams, dx = pullback(torch.ones_like(y), x=False)
    assert dx is None
    assert dparams.keys() == {"weight", "bias"}


def test_an_error_in_a_rule_has_the_path():
    net = fn.serial(fn.with_rule(fn.linear(2), zero_rule, "surplus"))
    params, _ = net.init(fn.key(0), X)
    y, pullback, _ = net.vjp(params, X)
    with pytest.raises(TypeError, match=r"^serial\['0'\] with_rule: zero_rule\(\) takes 2"):
        pullback(torch.ones_like(y))


def test_a_rule_that_is_the_derivative_keeps_every_law():
    layer = fn.with_rule(fn.serial(fn.linear(2), fn.batch_norm()), same_rule, breaks=())
    assert not layer.breaks
    check_layer(layer, X)


def test_a_rule_that_does_not_say_that_it_breaks_a_law_is_found():
    layer = fn.with_rule(fn.tanh(), zero_rule, reads=(), breaks=())
    with pytest.raises(AssertionError, match=r"with_rule \(train=True\): derivative: "):
        check_layer(layer, X)
    nonlinear = fn.cotangent(torch.square)
    with pytest.raises(AssertionError, match=r"cotangent \(train=True\): linear: "):
        check_layer(nonlinear, X)


def test_a_rule_that_does_not_read_the_pullback_needs_no_vjp():
    def refuse(*args, **options):
        raise NotImplementedError

    layer = fn.tanh()
    ruled = fn.with_rule(fn.Layer(layer.init, layer.apply, refuse), zero_rule, reads=())
    y, pullback, _ = ruled.vjp({}, X)
    assert torch.equal(y, X.tanh())
    assert fn.tree.leaves(pullback) == []


def own(key, params, x):
    return {"feedback": fn.random.normal(key, params["weight"].shape, x.dtype)}


def test_a_rules_own_tensors_are_state_that_stays_as_it_is():
    layer = fn.with_rule(fn.linear(2), same_rule, init=own)
    params, state = layer.init(fn.key(0), X)
    assert torch.equal(params["weight"], fn.linear(2).init(fn.key(0), X)[0]["weight"])
    assert {*fn.tree.to_dotted(state)} == {"rule.feedback"}
    optimizer = fn.adamw(0.1, weight_decay=0.5)
    step = fn.train_step(layer, fn.mse(), optimizer)
    before = fn.init_train_state(layer, optimizer, fn.key(0), X)
    after, _ = step(before, (X, X[:, :2]))
    assert torch.equal(after.state["rule"]["feedback"], state["rule"]["feedback"])
    assert not torch.equal(after.params["weight"], before.params["weight"])


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: fn.with_rule(torch.tanh, same_rule), TypeError, "^with_rule: expects a Layer"),
        (lambda: fn.with_rule(fn.tanh(), None), TypeError, "^with_rule: rule: expects a function"),
        (
            lambda: fn.with_rule(fn.tanh(), same_rule, reads=("z",)),
            ValueError,
            r"^with_rule: reads may have \['pullback', .*, got \['z'\]",
        ),
        (
            lambda: fn.with_rule(fn.tanh(), same_rule, breaks="pure"),
            ValueError,
            r"^with_rule: breaks may have \['derivative', 'linear'\], got \['pure'\]",
        ),
        (lambda: fn.cotangent(3), TypeError, "^cotangent: function: expects a function, got"),
        (
            lambda: fn.cotangent(twice, reads=("params",)),
            ValueError,
            r"^cotangent: reads may have \['x', 'key'\], got \['params'\]",
        ),
    ],
)
def test_a_bad_argument_is_refused_when_the_layer_is_made(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize(
    ("init", "kind", "message"),
    [
        (lambda key, params, x: x, TypeError, "expects init to give a dict of tensors, got float"),
        (lambda key, params, x: {"x": x}, ValueError, r"init gives \['x'\], names that residuals"),
    ],
)
def test_a_bad_init_of_a_rule_is_refused(init, kind, message):
    layer = fn.with_rule(fn.linear(2), same_rule, init=init)
    with pytest.raises(kind, match=f"^with_rule: {message}"):
        layer.init(fn.key(0), X)


def test_state_of_another_form_is_refused():
    layer = fn.with_rule(fn.linear(2), same_rule, init=own)
    params, _ = layer.init(fn.key(0), X)
    with pytest.raises(ValueError, match="with_rule: expects state as of init, got"):
        layer.vjp(params, X)
    with pytest.raises(ValueError, match="has state of its own called 'rule'"):
        fn.with_rule(layer, same_rule, init=own).init(fn.key(0), X)


def test_a_model_breaks_what_one_of_its_layers_breaks():
    stop, clip = fn.stop_gradient(), fn.clip_cotangent(1.0)
    both = frozenset({"derivative", "linear"})
    assert fn.serial(fn.linear(3), fn.tanh()).breaks == frozenset()
    for make in (
        lambda layer: fn.serial(fn.linear(3), layer),
        lambda layer: fn.serial(fn.residual(layer), fn.linear(3)),
        lambda layer: fn.remat(fn.serial(layer)),
        lambda layer: fn.repeat(layer, 2),
        lambda layer: fn.freeze(fn.serial(fn.linear(3), layer), "0"),
        lambda layer: fn.cast(fn.serial(layer), torch.float64),
        lambda layer: fn.detect_nonfinite(fn.serial(layer)),
        lambda layer: fn.map_layers(lambda path, each: each, fn.serial(layer)),
        lambda layer: fn.with_rule(layer, same_rule, breaks=()),
        lambda layer: layer._replace(),
    ):
        assert make(stop).breaks == {"derivative"}
        assert make(clip).breaks == both
        assert not make(fn.tanh()).breaks


def test_layers_with_rules_can_be_frozen_in_part():
    net = fn.with_rule(fn.serial(fn.linear(3), fn.tanh(), fn.linear(2)), same_rule, breaks=())
    frozen = fn.freeze(net, "0.weight")
    check_layer(frozen, X)
    params, _ = frozen.init(fn.key(0), X)
    assert {*fn.tree.to_dotted(params)} == {"0.bias", "2.weight", "2.bias"}


class Twice(torch.autograd.Function):
    """What `twice` does, as one writes it in PyTorch."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


def test_a_cotangent_is_changed_as_by_a_function_of_autograd():
    net = fn.serial(fn.linear(3), fn.cotangent(twice), fn.tanh(), fn.linear(2))
    params, _ = net.init(fn.key(0), X)
    y, pullback, _ = net.vjp(params, X)
    dy = fn.random.normal(fn.key(2), y.shape, y.dtype)
    dparams, dx = pullback(dy)

    leaves = fn.tree.map(lambda leaf: leaf.clone().requires_grad_(), (params, X))
    own, x = leaves
    hidden = torch.nn.functional.linear(x, own["0"]["weight"], own["0"]["bias"])
    hidden = Twice.apply(hidden).tanh()
    torch.nn.functional.linear(hidden, own["3"]["weight"], own["3"]["bias"]).backward(dy)
    torch.testing.assert_close(dx, x.grad, rtol=1e-12, atol=0)
    for path, leaf in fn.tree.to_dotted(own).items():
        found = fn.tree.to_dotted(dparams)[path]
        torch.testing.assert_close(found, leaf.grad, rtol=1e-12, atol=1e-15)


def test_in_a_compiled_scanned_population_of_steps_each_equals_its_solo_run():
    net = fn.serial(
        fn.with_rule(fn.linear(3), same_rule, init=own),
        fn.noise_cotangent(0.1),
        fn.tanh(),
        fn.clip_cotangent(0.01),
        fn.linear(2),
    )
    optimizer = fn.sgd(0.1)
    step = fn.train_step(net, fn.mse(), optimizer)

    def run(key):
        state = fn.init_train_state(net, optimizer, key, X)
        return fn.scan(lambda state, _: step(state, (X, X[:, :2])), state, length=3)

    keys = fn.random.split(fn.key(5), 2)
    together = fn.jit(fn.vmap(run))(keys)
    alone = fn.tree.map(lambda *leaves: torch.stack(leaves), *[run(key) for key in keys])
    for found, expected in zip(fn.tree.leaves(together), fn.tree.leaves(alone), strict=True):
        torch.testing.assert_close(found, expected)


@fn.defers
def twice_rule(residuals, dy, *, params, x):
    """The layer's own pullback of twice dy, which it hands on as it is."""
    return fn.pull(residuals, "pullback", 2 * dy, params=params, x=x)


def test_gradients_by_other_rules_can_be_deferred():
    net = fn.serial(
        fn.with_rule(fn.linear(4), same_rule),
        fn.reverse_gradient(),
        fn.with_rule(fn.serial(fn.linear(3), fn.tanh(), fn.linear(2)), twice_rule),
        *fn.feedback_alignment(fn.serial(fn.tanh(), fn.linear(2))).children.values(),
    )
    params, state = net.init(fn.key(0), X)
    y, pullback, _ = net.vjp(params, X, state)
    dy = fn.random.normal(fn.key(1), y.shape, y.dtype)
    deferred, dx = fn.defer(pullback)(dy)
    expected, expected_dx = pullback(dy)
    assert torch.equal(dx, expected_dx)
    found = fn.tree.to_dotted(fn.gradients(deferred))
    for path, leaf in fn.tree.to_dotted(expected).items():
        assert torch.equal(found[path], leaf)
    # A rule that hands on what it gets is looked through, another one is a leaf.
    assert [path for path, _ in deferred.terms()] == ["0", "2.0", "2.2", "4"]


def test_examples_mixed_by_a_rule_are_refused_in_a_private_step():
    step = fn.private_value_and_grad(fn.serial(fn.linear(2), fn.tanh()), fn.mse(), 1.0, 0.0)
    params, _ = fn.linear(2).init(fn.key(0), X)
    step({"0": params}, (X, X[:, :2]), key=fn.key(0))
    assert fn.clip_cotangent(1.0).mixes_examples
    assert fn.with_rule(fn.batch_norm(), same_rule).mixes_examples
    assert not fn.reverse_gradient().mixes_examples
    net = fn.serial(fn.linear(2), fn.clip_cotangent(1.0))
    with pytest.raises(ValueError, match="clip_cotangent"):
        fn.private_value_and_grad(net, fn.mse(), 1.0, 0.0)({"0": params}, (X, X[:, :2]))


def reads_x_rule(residuals, dy, *, params, x):
    return None, dy * residuals["x"]


def test_a_name_alone_may_be_given():
    net = fn.with_rule(fn.relu(), reads_x_rule, reads="x", breaks="derivative")
    assert net.breaks == {"derivative"}
    _, pullback, _ = fn.with_rule(fn.relu(), same_rule, reads="pullback").vjp({}, X)
    assert torch.equal(pullback(X)[1], X.relu())


def test_a_rule_that_reads_what_it_did_not_ask_for_is_named():
    net = fn.serial(fn.with_rule(fn.relu(), reads_x_rule))
    _, pullback, _ = net.vjp({}, torch.ones(2))
    with pytest.raises(ValueError, match=r"serial\['0'\] with_rule: the rule has no 'x' among"):
        pullback(torch.ones(2))
