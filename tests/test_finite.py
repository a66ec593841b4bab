"""check_finite: the same model, that names the first layer to give a NaN or an infinity."""

import math

import optree
import pytest
import torch

import funcnet as fn
from funcnet.finite import require_finite

F64 = torch.float64


def numbers(*shape, seed=0):
    # Drawn on the CPU, so that the numbers are the same on any device.
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=F64, device="cpu")
    return drawn.to(torch.get_default_device())


NETS = {
    "linear": fn.linear(3),
    "serial": fn.serial(fn.linear(3), fn.batch_norm(), fn.relu(), fn.dropout(0.5)),
    "residual": fn.residual(fn.serial(fn.linear(5), fn.tanh())),
    "branch": fn.serial(fn.branch(fn.linear(5), fn.relu()), fn.add()),
    "embedding": fn.embedding(10, 3),
    "shared": fn.serial(fn.fan_out(2), fn.shared(fn.linear(3)), fn.add()),
    "empty": fn.serial(),
}


def input_of(name):
    return torch.arange(8) if name == "embedding" else numbers(8, 5)


def assert_trees_equal(found, expected):
    assert optree.tree_structure(found) == optree.tree_structure(expected)
    for a, b in zip(optree.tree_leaves(found), optree.tree_leaves(expected), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("train", [True, False])
def test_a_finite_model_is_unchanged(name, train):
    net, x, key = NETS[name], input_of(name), fn.key(1)
    checked = fn.detect_nonfinite(net)
    params, state = net.init(key, x)
    assert_trees_equal(checked.init(key, x), (params, state))
    assert_trees_equal(
        checked.apply(params, x, state, key=key, train=train),
        net.apply(params, x, state, key=key, train=train),
    )
    y, pullback, new_state = checked.vjp(params, x, state, key=key, train=train)
    expected_y, expected, expected_state = net.vjp(params, x, state, key=key, train=train)
    assert_trees_equal((y, new_state), (expected_y, expected_state))
    dy = optree.tree_map(torch.ones_like, y)
    for ask in ({}, {"params": False}, {"x": False}):
        assert_trees_equal(pullback(dy, **ask), expected(dy, **ask))


def test_checked_model_has_the_name_and_the_children_of_the_model():
    net = fn.serial(a=fn.linear(3), b=fn.residual(fn.relu()))
    assert repr(fn.detect_nonfinite(net)) == repr(net)
    assert repr(fn.detect_nonfinite(fn.detect_nonfinite(net))) == repr(net)


def test_checked_pullback_is_a_pytree_of_the_residuals():
    net = fn.serial(fn.linear(3), fn.tanh())
    x = numbers(4, 5)
    params, _ = net.init(fn.key(0), x)
    checked, plain = (model.vjp(params, x)[1] for model in (fn.detect_nonfinite(net), net))
    assert len(optree.tree_leaves(checked)) == len(optree.tree_leaves(plain))
    copy = optree.tree_map(torch.clone, checked)
    assert_trees_equal(copy(numbers(4, 3)), plain(numbers(4, 3)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("call", ["apply", "vjp"])
def test_a_bad_input_is_named_with_its_count(value, call):
    net = fn.detect_nonfinite(fn.serial(fn.identity(), fn.relu()))
    x = torch.tensor([1.0, value, 2.0, value])
    with pytest.raises(
        ValueError, match=r"^serial\['0'\] identity: x is not finite: 2 of 4 values$"
    ):
        getattr(net, call)({}, x)


@pytest.mark.parametrize("call", ["apply", "vjp"])
def test_the_layer_that_overflows_is_named_and_not_those_after_it(call):
    net = fn.detect_nonfinite(
        fn.serial(first=fn.linear(3), deep=fn.serial(fn.relu(), fn.linear(2)), last=fn.linear(1))
    )
    x = torch.full((4, 5), 1e30)
    params, _ = net.init(fn.key(0), x)
    params["deep"]["1"]["weight"] = torch.full((2, 3), 1e20)
    params["first"]["weight"] = torch.ones(3, 5)
    with pytest.raises(
        ValueError,
        match=r"^serial\['deep'\] serial\['1'\] linear: output is not finite: 8 of 8 values$",
    ):
        getattr(net, call)(params, x)


@pytest.mark.parametrize("call", ["apply", "vjp"])
def test_bad_params_are_named(call):
    net = fn.detect_nonfinite(fn.serial(fn.linear(3)))
    x = numbers(4, 5)
    params, _ = net.init(fn.key(0), x)
    params["0"]["bias"][1] = math.nan
    with pytest.raises(
        ValueError, match=r"^serial\['0'\] linear: params is not finite: 1 of 3 values$"
    ):
        getattr(net, call)(params, x)


def test_a_bad_cotangent_is_named_where_it_enters():
    net = fn.detect_nonfinite(fn.serial(fn.linear(3), fn.tanh()))
    x = numbers(4, 5)
    params, _ = net.init(fn.key(0), x)
    _, pullback, _ = net.vjp(params, x)
    with pytest.raises(ValueError, match=r"^serial\['1'\] tanh: dy is not finite: 12 of 12"):
        pullback(torch.full((4, 3), math.nan, dtype=F64))


def test_a_cotangent_that_overflows_on_its_way_back_is_named_where_it_does():
    net = fn.detect_nonfinite(fn.serial(fn.relu(), fn.linear(3), fn.identity()))
    x = torch.zeros(4, 5)
    params, _ = net.init(fn.key(0), x)
    params["1"]["weight"] = torch.full((3, 5), 1e30)
    _, pullback, _ = net.vjp(params, x)
    with pytest.raises(ValueError, match=r"^serial\['1'\] linear: dx is not finite: 20 of 20"):
        pullback(torch.full((4, 3), 1e30))


@pytest.mark.parametrize(
    "net",
    [
        fn.residual(fn.linear(5)),
        fn.serial(fn.fan_out(2), fn.shared(fn.linear(5)), fn.add()),
        fn.parallel(fn.linear(5)),
    ],
    ids=["residual", "shared", "parallel"],
)
def test_layers_within_every_combinator_are_checked(net):
    x = numbers(4, 5)
    if "parallel" in repr(net):
        x = (x,)
    checked = fn.detect_nonfinite(net)
    params, _ = net.init(fn.key(0), x)
    broken = optree.tree_map(lambda leaf: leaf * math.inf, params)
    with pytest.raises(ValueError, match="linear: params is not finite"):
        checked.apply(broken, x)


@pytest.mark.parametrize(
    ("values", "count"),
    [
        (torch.tensor([1.0, math.nan]), "1 of 2"),
        (torch.tensor(math.inf), "1 of 1"),
        ({"a": torch.ones(2), "b": (torch.ones(1), torch.tensor([math.nan] * 3))}, "3 of 3"),
        (torch.tensor([complex(0, math.inf), 0j]), "1 of 2"),
        (torch.tensor([math.nan], dtype=torch.bfloat16), "1 of 1"),
        (torch.tensor([math.inf], dtype=torch.float16), "1 of 1"),
    ],
)
def test_require_finite_counts_what_is_not(values, count):
    with pytest.raises(ValueError, match=f"^here: it is not finite: {count} values$"):
        require_finite("here", "it", values)


@pytest.mark.parametrize(
    "values",
    [
        torch.ones(3),
        torch.tensor([1, 2]),
        torch.tensor([True]),
        torch.tensor([torch.finfo(torch.float64).max], dtype=F64),
        torch.zeros(0),
        torch.ones(3, device="meta"),
        None,
        {},
        (torch.ones(2), {"a": None}),
    ],
)
def test_require_finite_lets_finite_values_integers_and_meta_tensors_pass(values):
    assert require_finite("here", "it", values) is None


def test_checked_layer_under_vmap_says_that_it_is_for_eager_mode():
    checked = fn.detect_nonfinite(fn.serial(fn.relu()))
    with pytest.raises(TypeError, match=r"serial\['0'\] .*eager"):
        torch.vmap(lambda x: checked.apply({}, x)[0])(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (fn.residual(fn.identity()), "residual: output is not finite"),
        (fn.serial(a=fn.residual(fn.identity())), r"serial\['a'\] residual: output is not finite"),
    ],
)
def test_a_combinators_own_overflow_is_named(net, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        fn.detect_nonfinite(net).apply({}, torch.full((2,), 3e38))
