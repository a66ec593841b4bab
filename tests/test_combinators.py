import re

import optree
import pytest
import torch
from hypothesis import given, settings, strategies as st
from layers.oracle import assert_near, check_against, check_module, cotangent, params_of, randn
from torch import nn
from torch.nn import functional as F

import funcnet as fn

X = randn(5, 3)
KEY = fn.key(3)


def affine(params, x):
    return F.linear(x, params["weight"], params.get("bias"))


def message_of(call, *args, **kwargs):
    """The type and the message of the error that a call raises."""
    with pytest.raises(Exception) as raised:  # noqa: PT011 - the caller compares both
        call(*args, **kwargs)
    return type(raised.value), str(raised.value)


SEQUENTIALS = {
    "layers": (
        fn.serial(fn.linear(4), fn.tanh(), fn.linear(2)),
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
    ),
    "nested": (
        fn.serial(fn.serial(fn.linear(4), fn.serial(fn.gelu(), fn.linear(4))), fn.linear(2)),
        nn.Sequential(
            nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.GELU(), nn.Linear(4, 4))),
            nn.Linear(4, 2),
        ),
    ),
    "empty children": (
        fn.serial(fn.serial(), fn.linear(4), fn.serial(fn.serial(), fn.silu()), fn.identity()),
        nn.Sequential(
            nn.Sequential(), nn.Linear(3, 4), nn.Sequential(nn.Sequential(), nn.SiLU()),
            nn.Identity(),
        ),
    ),
    "one": (fn.serial(fn.linear(4)), nn.Sequential(nn.Linear(3, 4))),
    "state deep inside": (
        fn.serial(fn.linear(4), fn.serial(fn.relu(), fn.serial(fn.batch_norm())), fn.batch_norm()),
        nn.Sequential(
            nn.Linear(3, 4),
            nn.Sequential(nn.ReLU(), nn.Sequential(nn.BatchNorm1d(4))),
            nn.BatchNorm1d(4),
        ),
    ),
    "shapes": (
        fn.serial(
            fn.unflatten(1, (1, 3, 1)), fn.conv2d(2, 3, padding=1), fn.prelu(2), fn.flatten(),
            fn.layer_norm(), fn.linear(2),
        ),
        nn.Sequential(
            nn.Unflatten(1, (1, 3, 1)), nn.Conv2d(1, 2, 3, padding=1), nn.PReLU(2), nn.Flatten(),
            nn.LayerNorm(6), nn.Linear(6, 2),
        ),
    ),
    "thirteen": (
        fn.serial(*[fn.linear(3), fn.tanh()] * 6, fn.linear(2)),
        nn.Sequential(
            *[make() for _ in range(6) for make in (lambda: nn.Linear(3, 3), nn.Tanh)],
            nn.Linear(3, 2),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", SEQUENTIALS)
def test_serial_has_sequentials_values_gradients_and_dotted_paths(name, train):
    check_module(*SEQUENTIALS[name], X, train=train)


@pytest.mark.parametrize("shape", [(3,), (2, 4, 3), (0, 3)])
def test_serial_keeps_leading_dimensions(shape):
    check_module(*SEQUENTIALS["nested"], randn(*shape))


def test_serial_of_nothing_is_the_identity():
    check_module(fn.serial(), nn.Sequential(), X)
    x = {"a": randn(2), "b": (randn(1), torch.arange(2))}
    assert fn.serial().init(KEY, x) == ({}, {})
    y, pullback, state = fn.serial().vjp({}, x)
    assert_near((y, state), (x, {}), 0.0)
    dy = {"a": randn(2, seed=1), "b": (randn(1, seed=1), None)}
    assert_near(pullback(dy), ({}, dy), 0.0)


def test_serial_names_children():
    named = fn.serial(hidden=fn.linear(4), act=fn.relu(), head=fn.serial(out=fn.linear(2)))
    params, state = named.init(KEY, X)
    assert state == {}
    assert list(fn.tree.to_dotted(params)) == [
        "hidden.weight", "hidden.bias", "head.out.weight", "head.out.bias",
    ]  # fmt: skip

    def function(params, x):
        return affine(params["head"]["out"], affine(params["hidden"], x).relu())

    check_against(function, named, params, X)


def test_serial_leaves_out_children_without_params_and_state():
    net = fn.serial(fn.relu(), fn.serial(fn.relu()), fn.linear(2), fn.dropout(0.5))
    params, state = net.init(KEY, X)
    assert (list(params), state) == (["2"], {})
    y, pullback, state = net.vjp(params, X, key=KEY)
    assert state == {}
    assert list(pullback(cotangent(y))[0]) == ["2"]


@pytest.mark.parametrize("frozen", ["0", "2", "4"])
def test_serial_asks_for_no_more_gradients_than_it_needs(frozen):
    asked = {}

    def rule(residuals, dy, name, *, params, x):
        asked[name] = (params, x)
        return ({"w": dy.sum()} if params else None), dy if x else None

    def spy(name):
        return fn.stateless(
            lambda key, x: {"w": x.new_zeros(())},
            lambda params, x: x + params["w"],
            lambda params, x: (x + params["w"], fn.Pullback(rule, {}, (name,))),
        )

    net = fn.serial(spy("0"), fn.tanh(), spy("2"), fn.tanh(), spy("4"))
    params, _ = net.init(KEY, X)
    y, pullback, _ = net.vjp(params, X)
    pullback(y)
    assert asked == {"0": (True, True), "2": (True, True), "4": (True, True)}
    asked.clear()
    dparams, dx = pullback(y, x=False)
    assert asked == {"0": (True, False), "2": (True, True), "4": (True, True)}
    assert (list(dparams), dx) == (["0", "2", "4"], None)
    asked.clear()
    pullback(y, params=False)
    assert asked == {"0": (False, True), "2": (False, True), "4": (False, True)}
    asked.clear()
    assert pullback(y, params=False, x=False) == (None, None)
    assert asked == {}


def test_serial_stops_at_the_first_layer_that_learns():
    asked = []

    def rule(residuals, dy, *, params, x):
        asked.append((params, x))
        return ({} if params else None), dy if x else None

    spy = fn.stateless(
        lambda key, x: {}, lambda params, x: x, lambda params, x: (x, fn.Pullback(rule, {}))
    )
    net = fn.serial(spy, fn.linear(2), spy)
    params, _ = net.init(KEY, X)
    y, pullback, _ = net.vjp(params, X)
    dparams, dx = pullback(y, x=False)
    assert asked == [(False, True)]
    assert (list(dparams), dx) == (["1"], None)


def test_parallel_applies_each_layer_to_its_own_input():
    net = fn.parallel(fn.linear(2), fn.tanh(), fn.linear(4, bias=False))
    x = (randn(5, 3), randn(2, 2), randn(7, seed=2))
    params, _ = net.init(KEY, x)
    assert list(fn.tree.to_dotted(params)) == ["0.weight", "0.bias", "2.weight"]

    def function(params, x):
        return affine(params["0"], x[0]), x[1].tanh(), affine(params["2"], x[2])

    check_against(function, net, params, x)


def test_parallel_of_named_layers_takes_a_dict_or_a_tuple():
    net = fn.parallel(b=fn.linear(2), a=fn.tanh())
    x = {"a": randn(2, 2), "b": randn(5, 3)}
    params, _ = net.init(KEY, x)

    check_against(
        lambda params, x: {"a": x["a"].tanh(), "b": affine(params["b"], x["b"])}, net, params, x
    )
    check_against(
        lambda params, x: (affine(params["b"], x[0]), x[1].tanh()), net, params, (x["b"], x["a"])
    )


def test_branch_applies_all_layers_to_one_input_and_sums_their_gradients():
    net = fn.branch(fn.linear(2), fn.identity(), fn.serial(fn.tanh(), fn.linear(4)))
    params, _ = net.init(KEY, X)
    assert list(fn.tree.to_dotted(params)) == ["0.weight", "0.bias", "2.1.weight", "2.1.bias"]

    def function(params, x):
        return affine(params["0"], x), x, affine(params["2"]["1"], x.tanh())

    check_against(function, net, params, X)


def test_branch_of_named_layers_returns_a_dict():
    net = fn.branch(value=fn.linear(1), advantage=fn.linear(4))
    params, _ = net.init(KEY, X)

    def function(params, x):
        return {name: affine(params[name], x) for name in ("value", "advantage")}

    check_against(function, net, params, X)


def test_branch_of_a_tree_sums_the_gradients_leaf_by_leaf():
    net = fn.branch(fn.add(), fn.multiply(), fn.concat())
    x = (randn(2, 3), randn(2, 3, seed=1))
    check_against(lambda params, x: (x[0] + x[1], x[0] * x[1], torch.cat(x, -1)), net, {}, x)


def test_side_by_side_layers_may_be_none():
    for net, x in ((fn.parallel(), ()), (fn.branch(), X)):
        params, _ = net.init(KEY, x)
        y, pullback, _ = net.vjp(params, x)
        assert (params, y) == ({}, ())
        assert pullback((), params=False, x=False) == (None, None)
    assert fn.parallel().vjp({}, ())[1](()) == ({}, ())


@pytest.mark.parametrize("kind", [fn.parallel, fn.branch])
def test_side_by_side_layers_may_be_more_than_ten(kind):
    net = kind(*[fn.linear(1 + width) for width in range(12)])
    x = tuple(randn(2, 3, seed=seed) for seed in range(12)) if kind is fn.parallel else X
    params, _ = net.init(KEY, x)

    def function(params, x):
        pieces = x if isinstance(x, tuple) else (x,) * 12
        return tuple(affine(params[str(i)], piece) for i, piece in enumerate(pieces))

    check_against(function, net, params, x)


@pytest.mark.parametrize(
    ("join", "function"),
    [
        (fn.add(), lambda a, b: a + b),
        (fn.multiply(), lambda a, b: a * b),
        (fn.concat(), lambda a, b: torch.cat((a, b), -1)),
    ],
)
def test_two_towers_are_joined(join, function):
    net = fn.serial(fn.branch(fn.linear(4), fn.serial(fn.linear(4), fn.sigmoid())), join)
    params, _ = net.init(KEY, X)

    def towers(params, x):
        inner = params["0"]
        return function(affine(inner["0"], x), affine(inner["1"]["0"], x).sigmoid())

    check_against(towers, net, params, X)


def test_fan_out_feeds_parallel_as_branch_does():
    children = (fn.linear(2), fn.tanh(), fn.serial(fn.linear(3), fn.relu()))
    branched = fn.branch(*children)
    params, _ = branched.init(KEY, X)
    y, pullback, _ = branched.vjp(params, X)
    fanned = fn.serial(fn.fan_out(3), fn.parallel(*children))
    other, other_pullback, _ = fanned.vjp({"1": params}, X)
    assert_near(other, y, 0.0)
    dparams, dx = pullback(cotangent(y))
    assert_near(other_pullback(cotangent(y)), ({"1": dparams}, dx))


def test_residual_adds_its_input():
    net = fn.residual(fn.serial(fn.linear(6), fn.tanh(), fn.linear(3)))
    params, _ = net.init(KEY, X)
    assert list(fn.tree.to_dotted(params)) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    check_against(lambda p, x: x + affine(p["2"], affine(p["0"], x).tanh()), net, params, X)


def test_residual_of_a_tree_adds_leaf_by_leaf():
    net = fn.residual(fn.parallel(a=fn.linear(3), b=fn.parallel(fn.tanh(), fn.relu())))
    x = {"a": X, "b": (randn(2), randn(4))}
    params, _ = net.init(KEY, x)

    def function(params, x):
        a, (b, c) = x["a"], x["b"]
        return {"a": a + affine(params["a"], a), "b": (b + b.tanh(), c + c.relu())}

    check_against(function, net, params, x)


def test_residual_of_residuals_is_nested():
    net = fn.residual(fn.residual(fn.tanh()))
    check_against(lambda params, x: 2 * x + x.tanh(), net, {}, X)


def test_residual_keeps_its_layers_state_and_key():
    net = fn.serial(block=fn.residual(fn.serial(fn.batch_norm(), fn.dropout(0.5))))
    params, state = net.init(KEY, X)
    y, _, new_state = net.vjp(params, X, state, key=KEY)
    assert list(fn.tree.to_dotted(new_state)) == list(fn.tree.to_dotted(state))
    assert int(new_state["block"]["0"]["num_batches_tracked"]) == 1
    inner = fn.serial(fn.batch_norm(), fn.dropout(0.5))
    expected, _ = inner.apply(
        params["block"], X, state["block"], key=fn.fold_in(KEY, "block"), train=True
    )
    assert_near(y, X + expected, 0.0)


def test_shared_gradient_is_the_sum_over_the_uses():
    tower = fn.serial(fn.linear(4), fn.tanh(), fn.linear(2))
    net = fn.serial(fn.shared(tower), fn.multiply())
    x = (randn(5, 3), randn(5, 3, seed=1))
    params, _ = net.init(KEY, x)
    assert list(fn.tree.to_dotted(params)) == ["0.0.weight", "0.0.bias", "0.2.weight", "0.2.bias"]

    def tower_of(params, x):
        return affine(params["2"], affine(params["0"], x).tanh())

    check_against(lambda p, x: tower_of(p["0"], x[0]) * tower_of(p["0"], x[1]), net, params, x)

    dys = (randn(5, 2, seed=5), randn(5, 2, seed=6))
    _, pullback, _ = fn.shared(tower).vjp(params["0"], x)
    alone = [tower.vjp(params["0"], own)[1](dy)[0] for own, dy in zip(x, dys, strict=True)]
    assert_near(pullback(dys)[0], fn.tree.map(torch.add, *alone))


@pytest.mark.parametrize("uses", [1, 2, 3, 12])
def test_shared_applies_one_layer_to_any_number_of_inputs(uses):
    net = fn.shared(fn.linear(2))
    x = tuple(randn(1 + seed, 3, seed=seed) for seed in range(uses))
    params, _ = net.init(KEY, x)
    check_against(lambda p, x: tuple(affine(p, own) for own in x), net, params, x)


def test_shared_without_params_has_none():
    net = fn.shared(fn.tanh())
    check_against(lambda params, x: tuple(own.tanh() for own in x), net, {}, (X, X))


def test_shared_embeddings_sum_their_gradients_and_give_the_indices_none():
    net = fn.shared(fn.embedding(5, 2, dtype=torch.float64))
    x = (torch.tensor([0, 1, 1]), torch.tensor([[4], [1]]))
    params, _ = net.init(KEY, x)
    check_against(
        lambda params, x: tuple(params["weight"][own] for own in x), net, params, x
    )  # fmt: skip


def test_shared_passes_state_from_one_use_to_the_next():
    net = fn.shared(fn.batch_norm())
    x = (randn(5, 3), 2 * randn(6, 3, seed=1) + 1)
    params, state = net.init(KEY, x)
    module = nn.BatchNorm1d(3).double()
    expected = tuple(module(own) for own in x)
    y, new_state = net.apply(params, x, state, train=True)
    assert_near(y, fn.tree.map(torch.Tensor.detach, expected))
    assert_near(fn.tree.to_dotted(new_state), dict(module.named_buffers()))


def test_shared_dropout_draws_anew_for_each_use():
    x = torch.ones(100)
    (first, second), _ = fn.shared(fn.dropout(0.5)).apply({}, (x, x), key=KEY, train=True)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("make", "n"),
    [
        (lambda: fn.shared(fn.linear(2)), 12),
        (lambda: fn.parallel(*[fn.linear(2) for _ in range(12)]), 12),
        (lambda: fn.parallel(**{name: fn.linear(2) for name in "zyxabc"}), 6),
    ],
)
def test_pullback_that_went_through_optree_gives_the_same(make, n):
    net = make()
    x = tuple(randn(2, 3, seed=seed) for seed in range(n))
    params, _ = net.init(KEY, x)
    _, pullback, _ = net.vjp(params, x)
    dy = tuple(randn(2, 2, seed=20 + seed) for seed in range(n))
    assert_near(optree.tree_map(torch.clone, pullback)(dy), pullback(dy), 0.0)


def test_pullback_of_a_net_that_went_through_optree_gives_the_same():
    net = SEQUENTIALS["thirteen"][0]
    params, _ = net.init(KEY, X)
    y, pullback, _ = net.vjp(params, X)
    leaves, treedef = optree.tree_flatten(pullback)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    assert_near(optree.tree_unflatten(treedef, leaves)(y), pullback(y), 0.0)


def test_pullback_can_be_called_twice():
    net = fn.branch(fn.residual(fn.linear(3)), fn.serial(fn.dropout(0.5), fn.batch_norm()))
    params, state = net.init(KEY, X)
    y, pullback, _ = net.vjp(params, X, state, key=KEY)
    first = pullback(cotangent(y))
    assert_near(pullback(cotangent(y)), first, 0.0)


# Layers from integers to numbers: what comes before an embedding gets None for a cotangent.
TOKENS = {
    "reshape": (
        fn.serial(fn.reshape(6), fn.embedding(9, 2, dtype=torch.float64)),
        lambda p, x: p["1"]["weight"][x.reshape(6)],
    ),
    "flatten": (
        fn.serial(fn.flatten(0), fn.embedding(9, 2, dtype=torch.float64)),
        lambda p, x: p["1"]["weight"][x.flatten()],
    ),
    "permute": (
        fn.serial(fn.permute(1, 0), fn.embedding(9, 2, dtype=torch.float64)),
        lambda p, x: p["1"]["weight"][x.T],
    ),
    "select": (
        fn.serial(fn.select(0), fn.embedding(9, 2, dtype=torch.float64)),
        lambda p, x: p["1"]["weight"][x[:, 0]],
    ),
    "identity": (
        fn.serial(fn.identity(), fn.embedding(9, 2, dtype=torch.float64)),
        lambda p, x: p["1"]["weight"][x],
    ),
    "split and two tables": (
        fn.serial(
            fn.split(1),
            fn.parallel(
                fn.serial(fn.flatten(0), fn.embedding(9, 2, dtype=torch.float64)),
                fn.serial(fn.flatten(0), fn.embedding(9, 3, dtype=torch.float64)),
            ),
            fn.concat(),
        ),
        lambda p, x: torch.cat(
            [p["1"][n]["1"]["weight"][x[:, i]] for i, n in enumerate(("0", "1"))], -1
        ),
    ),
    "concat": (
        fn.serial(fn.fan_out(2), fn.concat(), fn.embedding(9, 2, dtype=torch.float64)),
        lambda p, x: p["2"]["weight"][torch.cat((x, x), -1)],
    ),
    "branch and concat": (
        fn.serial(
            fn.branch(fn.identity(), fn.flatten(0)),
            fn.parallel(fn.flatten(0), fn.identity()),
            fn.concat(),
            fn.embedding(9, 2, dtype=torch.float64),
        ),
        lambda p, x: p["3"]["weight"][torch.cat((x.flatten(), x.flatten()))],
    ),
    "split and concat": (
        fn.serial(fn.split(1), fn.concat(0), fn.embedding(9, 2, dtype=torch.float64)),
        lambda p, x: p["2"]["weight"][torch.cat((x[:, :1], x[:, 1:]))],
    ),
    "two tables of one input": (
        fn.serial(
            fn.branch(
                fn.embedding(9, 2, dtype=torch.float64), fn.embedding(9, 2, dtype=torch.float64)
            ),
            fn.add(),
        ),
        lambda p, x: p["0"]["0"]["weight"][x] + p["0"]["1"]["weight"][x],
    ),
    "fan_out": (
        fn.serial(
            fn.fan_out(2),
            fn.shared(fn.embedding(9, 2, dtype=torch.float64)),
            fn.multiply(),
        ),
        lambda p, x: p["1"]["weight"][x].square(),
    ),
}


@pytest.mark.parametrize("name", TOKENS)
def test_layers_before_an_embedding_get_and_give_no_cotangent(name):
    net, function = TOKENS[name]
    x = torch.tensor([[0, 8], [3, 3], [3, 1]])
    params, _ = net.init(KEY, x)
    check_against(function, net, params, x)


def test_parallel_of_numbers_and_indices_gives_only_the_numbers_a_cotangent():
    x = {"number": X, "word": torch.tensor([0, 3, 3])}
    net = fn.parallel(number=fn.linear(2), word=fn.embedding(4, 2, dtype=torch.float64))
    params, _ = net.init(KEY, x)
    assert params["word"]["weight"].dtype == torch.float64

    def function(params, x):
        return {
            "number": affine(params["number"], x["number"]),
            "word": params["word"]["weight"][x["word"]],
        }

    check_against(function, net, params, x)


def test_max_pool2d_with_indices_may_be_followed_by_a_layer_for_each():
    net = fn.serial(
        fn.max_pool2d(2, return_indices=True),
        fn.parallel(fn.flatten(), fn.embedding(36, 2, dtype=torch.float64)),
    )
    x = randn(2, 1, 6, 6)
    params, _ = net.init(KEY, x)

    def function(params, x):
        y, indices = F.max_pool2d(x, 2, return_indices=True)
        return y.flatten(1), params["1"]["1"]["weight"][indices]

    check_against(function, net, params, x)


NOISE = fn.dropout(0.5)


def noise_of(net, name, x=None):
    """The mask of the dropout called ``name``, which is the last layer that is not the identity."""
    x = torch.ones(64) if x is None else x
    params, state = net.init(KEY, x)
    return net.apply(params, x, state, key=KEY, train=True)[0] != 0


def test_inserting_a_layer_changes_no_other_layers_noise():
    alone = noise_of(fn.serial(drop=NOISE), "drop")
    for net in (
        fn.serial(before=fn.softplus(), drop=NOISE),
        fn.serial(drop=NOISE, after=fn.identity()),
        fn.serial(before=fn.residual(fn.softplus()), drop=NOISE, after=fn.serial()),
    ):
        assert torch.equal(noise_of(net, "drop"), alone)
    assert not torch.equal(noise_of(fn.serial(other=NOISE), "other"), alone)


def test_layers_draw_different_noise():
    x = torch.ones(64)
    masks = fn.branch(a=NOISE, b=NOISE, c=fn.serial(a=NOISE)).apply({}, x, key=KEY, train=True)[0]
    found = [tuple(mask.tolist()) for mask in masks.values()]
    assert len(set(found)) == 3


@pytest.mark.parametrize("kind", ["serial", "branch", "parallel"])
def test_a_childs_key_is_folded_by_its_name(kind):
    x = torch.ones(64)
    expected, _ = NOISE.apply({}, x, key=fn.fold_in(KEY, "drop"), train=True)
    net = getattr(fn, kind)(drop=NOISE)
    y, _ = net.apply({}, {"drop": x} if kind == "parallel" else x, key=KEY, train=True)
    assert torch.equal(y if kind == "serial" else y["drop"], expected)
    z, _, _ = net.vjp({}, {"drop": x} if kind == "parallel" else x, key=KEY)
    assert torch.equal(z if kind == "serial" else z["drop"], expected)


def test_a_childs_params_depend_on_its_name_and_not_on_its_neighbours():
    alone = fn.serial(out=fn.linear(2)).init(KEY, X)[0]["out"]
    among = fn.serial(first=fn.linear(3), out=fn.linear(2), last=fn.linear(4)).init(KEY, X)[0]
    assert_near(among["out"], alone, 0.0)
    assert not torch.equal(
        fn.serial(fn.linear(3), fn.linear(3)).init(KEY, X)[0]["0"]["weight"],
        fn.serial(fn.linear(3), fn.linear(3)).init(KEY, X)[0]["1"]["weight"],
    )
    side = fn.parallel(first=fn.relu(), out=fn.linear(2)).init(KEY, {"first": X, "out": X})[0]
    assert_near(side["out"], alone, 0.0)


def test_state_of_nested_combinators_is_sparse_and_returned_by_every_mode():
    net = fn.serial(
        fn.branch(a=fn.batch_norm(), b=fn.serial(fn.linear(3), fn.residual(fn.batch_norm()))),
        fn.parallel(a=fn.identity(), b=fn.batch_norm(track_running_stats=False)),
    )
    params, state = net.init(KEY, X)
    assert list(state) == ["0"]
    assert {path.rpartition(".")[0] for path in fn.tree.to_dotted(state)} == {"0.a", "0.b.1"}
    _, trained = net.apply(params, X, state, train=True)
    _, _, same = net.vjp(params, X, state)
    assert_near(same, trained, 0.0)
    assert optree.tree_structure(trained) == optree.tree_structure(state)
    assert int(trained["0"]["b"]["1"]["num_batches_tracked"]) == 1
    _, kept = net.apply(params, X, trained)
    assert_near(kept, trained, 0.0)


def test_a_layer_of_ones_own_is_a_child_like_any_other():
    def init(key, x):
        return {"w": x.new_full((), 2.0)}, {"calls": torch.zeros((), dtype=torch.int64)}

    def apply(params, x, state, *, key=None, train=False):
        return params["w"] * x, {"calls": state["calls"] + 1}

    def rule(residuals, dy, *, params, x):
        dparams = {"w": (dy * residuals["x"]).sum()} if params else None
        return dparams, dy * residuals["w"] if x else None

    def vjp(params, x, state, *, key=None, train=True):
        y, state = apply(params, x, state)
        return y, fn.Pullback(rule, {"x": x, "w": params["w"]}), state

    own = fn.Layer(init, apply, vjp)
    net = fn.serial(fn.linear(2), own, fn.branch(own, own), fn.add())
    params, state = net.init(KEY, X)

    def function(params, x):
        y = affine(params["0"], x) * params["1"]["w"]
        return y * params["2"]["0"]["w"] + y * params["2"]["1"]["w"]

    state = check_against(function, net, params, X, state)
    assert {path: int(leaf) for path, leaf in fn.tree.to_dotted(state).items()} == {
        "1.calls": 1, "2.0.calls": 1, "2.1.calls": 1,
    }  # fmt: skip


def test_a_replaced_function_of_a_layer_is_used_within_a_net():
    doubled = fn.tanh()._replace(apply=lambda params, x, state={}, **_: (2 * x, {}))
    assert_near(fn.serial(doubled).apply({}, X)[0], 2 * X, 0.0)


def test_init_of_a_net_works_on_the_meta_device_and_runs_nothing():
    net = fn.serial(
        fn.conv2d(8, 3, padding="same"), fn.batch_norm(), fn.relu(), fn.max_pool2d(2),
        fn.dropout(0.5), fn.flatten(), fn.branch(fn.linear(9), fn.linear(5)), fn.concat(),
    )  # fmt: skip
    params, state = net.init(KEY, torch.empty(4, 3, 8, 8, device="meta"))
    assert all(leaf.is_meta for leaf in optree.tree_leaves((params, state)))
    real, _ = net.init(KEY, torch.full((4, 3, 8, 8), float("nan")))
    assert fn.tree.map(lambda leaf: leaf.shape, params) == fn.tree.map(
        lambda leaf: leaf.shape, real
    )
    other, _ = net.init(KEY, torch.ones(1, 3, 8, 8))
    assert_near(real, other, 0.0)


NET = fn.serial(hidden=fn.linear(25), act=fn.relu(), head=fn.linear(2))
NET_PARAMS, _ = NET.init(KEY, randn(4, 3))
DEEP = fn.serial(fn.relu(), fn.branch(left=fn.serial(fn.linear(25), fn.linear(2)), right=fn.relu()))
DEEP_PARAMS, _ = DEEP.init(KEY, randn(4, 3))
BAD_HEAD = {**NET_PARAMS, "act": {}, "head": {"weight": randn(2, 30), "bias": randn(2)}}
WIDE = fn.serial(hidden=fn.linear(30), head=fn.linear(2))
WIDE_PARAMS = {**WIDE.init(KEY, randn(100, 3))[0], "head": NET_PARAMS["head"]}

MISUSES = {
    "the example of the design": (
        lambda: WIDE.apply(WIDE_PARAMS, randn(100, 3)), ValueError,
        "serial['head'] linear: weight expects 25 features in the last dimension, got (100, 30)",
    ),
    "the same in vjp": (
        lambda: WIDE.vjp(WIDE_PARAMS, randn(100, 3)), ValueError,
        "serial['head'] linear: weight expects 25 features in the last dimension, got (100, 30)",
    ),
    "the first layer": (
        lambda: NET.apply(NET_PARAMS, randn(4, 5)), ValueError,
        "serial['hidden'] linear: weight expects 3 features in the last dimension, got (4, 5)",
    ),
    "a nested layer": (
        lambda: DEEP.apply(DEEP_PARAMS, randn(4, 5)), ValueError,
        "serial['1'] branch['left'] serial['0'] linear: weight expects 3 features in the last "
        "dimension, got (4, 5)",
    ),
    "a nested layer in vjp": (
        lambda: DEEP.vjp(DEEP_PARAMS, randn(4, 5)), ValueError,
        "serial['1'] branch['left'] serial['0'] linear: weight expects 3 features in the last "
        "dimension, got (4, 5)",
    ),
    "a nested layer in init": (
        lambda: fn.serial(fn.residual(fn.serial(a=fn.parallel(fn.conv2d(2, 3))))).init(KEY, (X,)),
        ValueError,
        "serial['0'] residual serial['a'] parallel['0'] conv2d: expects "
        "(batch, channels, height, width), got (5, 3)",
    ),
    "a layer in shared": (
        lambda: fn.shared(fn.linear(25)).apply(NET_PARAMS["hidden"], (randn(4, 3), randn(4, 5))),
        ValueError,
        "shared[1] linear: weight expects 3 features in the last dimension, got (4, 5)",
    ),
    "integers": (
        lambda: NET.apply(NET_PARAMS, torch.ones(4, 3, dtype=torch.int64)), TypeError,
        "serial['hidden'] linear: expects a floating-point tensor, got int64 (4, 3)",
    ),
    "integers in init": (
        lambda: NET.init(KEY, torch.ones(4, 3, dtype=torch.int64)), TypeError,
        "serial['hidden'] linear: expects a floating-point tensor, got int64 (4, 3)",
    ),
    "rank": (
        lambda: fn.serial(fn.relu(), fn.conv2d(2, 3)).init(KEY, X), ValueError,
        "serial['1'] conv2d: expects (batch, channels, height, width), got (5, 3)",
    ),
    "params of another model": (
        lambda: NET.apply({"0": {}, "1": {}}, X), ValueError,
        "serial: params has ['0', '1'], but the layers are ['hidden', 'act', 'head']",
    ),
    "params of a single layer": (
        lambda: NET.vjp(NET_PARAMS["hidden"], X), ValueError,
        "serial: params has ['bias', 'weight'], but the layers are ['hidden', 'act', 'head']",
    ),
    "params of another nested model": (
        lambda: DEEP.apply({"1": {"left": {"0": {}, "7": {}}}}, X), ValueError,
        "serial['1'] branch['left'] serial: params has ['7'], but the layers are ['0', '1']",
    ),
    "params of another branch": (
        lambda: fn.branch(fn.relu()).apply({"1": {}}, X), ValueError,
        "branch: params has ['1'], but the layers are ['0']",
    ),
    "no params": (
        lambda: NET.apply({}, X), ValueError,
        "serial['hidden'] linear: expects params ['bias', 'weight'], got []",
    ),
    "params for a layer without": (
        lambda: NET.apply({**NET_PARAMS, "act": {"weight": X}}, X), ValueError,
        "serial['act'] relu: expects params [], got ['weight']",
    ),
    "state of another model": (
        lambda: NET.apply(NET_PARAMS, X, {"norm": {}}), ValueError,
        "serial: state has ['norm'], but the layers are ['hidden', 'act', 'head']",
    ),
    "state for a layer without": (
        lambda: NET.vjp(NET_PARAMS, X, {"act": {"seen": X}}), ValueError,
        "serial['act'] relu: has no state, got state with ['seen']",
    ),
    "state left out": (
        lambda: fn.serial(norm=fn.batch_norm(affine=False)).apply({}, X), ValueError,
        "serial['norm'] batch_norm: expects state "
        "['num_batches_tracked', 'running_mean', 'running_var'], got []",
    ),
    "layers by position and by name": (
        lambda: fn.serial(fn.relu(), drop=fn.dropout()), TypeError,
        "serial: expects layers by position or by name, not both",
    ),
    "dropout without a key": (
        lambda: fn.serial(a=fn.relu(), drop=fn.dropout(0.5)).apply({}, X, train=True), ValueError,
        "serial['drop'] dropout: needs a key when train=True, got None; pass key=fn.key(...)",
    ),
    "nested dropout without a key": (
        lambda: fn.serial(fn.residual(fn.serial(fn.dropout(0.5)))).vjp({}, X), ValueError,
        "serial['0'] residual serial['0'] dropout: needs a key when train=True, got None; "
        "pass key=fn.key(...)",
    ),
    "a child that is a constructor": (
        lambda: fn.serial(fn.linear(2), fn.relu), TypeError,
        "serial['1']: expects a Layer, got the function relu; call it, as in fn.relu(...)",
    ),
    "a child that is a module class": (
        lambda: fn.parallel(a=nn.ReLU), TypeError,
        "parallel['a']: expects a Layer, got the class torch.nn.ReLU; use fn.relu, or make a layer "
        "of it by fn.interop.from_module",
    ),
    "a child that is a number": (
        lambda: fn.branch(3), TypeError,
        "branch['0']: expects a Layer, got int; a layer is made by a constructor, such as "
        "fn.linear(3)",
    ),
    "a child that is a list": (
        lambda: fn.serial([fn.relu()]), TypeError,
        "serial['0']: expects a Layer, got a list of layers; write serial(*layers)",
    ),
    "a child that is None": (
        lambda: fn.serial(fn.relu(), None), TypeError,
        "serial['1']: expects a Layer, got None; does the function that makes it return it?",
    ),
    "a child of residual": (
        lambda: fn.residual(fn.relu), TypeError,
        "residual: expects a Layer, got the function relu; call it, as in fn.relu(...)",
    ),
    "a child of shared": (
        lambda: fn.shared(3), TypeError,
        "shared: expects a Layer, got int; a layer is made by a constructor, such as fn.linear(3)",
    ),
    "a name with a dot": (
        lambda: fn.serial(**{"a.b": fn.relu()}), ValueError,
        "serial: a name must not be empty or have a dot, got 'a.b'",
    ),
    "no name": (
        lambda: fn.branch(**{"": fn.relu()}), ValueError,
        "branch: a name must not be empty or have a dot, got ''",
    ),
    "a residual of another shape": (
        lambda: fn.residual(fn.linear(2)).apply(
            {"weight": randn(2, 3), "bias": randn(2)}, randn(5, 3)), ValueError,
        "residual: the layer must keep the shape and dtype float64 (5, 3), got float64 (5, 2)",
    ),
    "a residual that would broadcast": (
        lambda: fn.serial(fn.residual(fn.select(slice(0, 1)))).vjp({}, X), ValueError,
        "serial['0'] residual: the layer must keep the shape and dtype float64 (5, 3), "
        "got float64 (5, 1)",
    ),
    "a residual of another tree": (
        lambda: fn.residual(fn.fan_out(2)).apply({}, randn(2)), ValueError,
        "residual: the layer must keep the shape and dtype float64 (2,), "
        "got (float64 (2,), float64 (2,))",
    ),
    "too few inputs": (
        lambda: fn.parallel(fn.relu(), fn.relu()).apply({}, (X,)), ValueError,
        "parallel: x expects a tuple of 2, got a tuple of 1",
    ),
    "one input for many": (
        lambda: fn.parallel(fn.relu(), fn.relu()).vjp({}, X), ValueError,
        "parallel: x expects a tuple of 2, got float64 (5, 3)",
    ),
    "other names": (
        lambda: fn.parallel(a=fn.relu(), b=fn.relu()).apply({}, {"a": X, "c": X}), ValueError,
        "parallel: x expects a dict with ['a', 'b'], got ['a', 'c']",
    ),
    "a dict for layers by position": (
        lambda: fn.parallel(fn.relu()).apply({}, {"0": X}), ValueError,
        "parallel: x expects a tuple of 1, got {'0': float64 (5, 3)}",
    ),
    "a tensor for layers by name": (
        lambda: fn.parallel(a=fn.relu()).apply({}, X), ValueError,
        "parallel: x expects a dict with ['a'], got float64 (5, 3)",
    ),
    "a cotangent that is no tuple": (
        lambda: fn.branch(fn.relu(), fn.relu()).vjp({}, X)[1](X), ValueError,
        "branch: pullback expects a tuple of 2, got float64 (5, 3)",
    ),
    "a cotangent of other names": (
        lambda: fn.branch(a=fn.relu()).vjp({}, X)[1]({"b": X}), ValueError,
        "branch: pullback expects a dict of 1, got {'b': float64 (5, 3)}",
    ),
    "a cotangent of another shape": (
        lambda: NET.vjp(NET_PARAMS, X)[1](randn(4, 2)),
        ValueError,
        "serial: pullback expects dy of shape (5, 2), got (4, 2)",
    ),
    "a cotangent of another shape, nested": (
        lambda: fn.serial(fn.branch(fn.relu())).vjp({}, X)[1]((randn(4, 2),)), ValueError,
        "serial: pullback expects dy of shape (5, 3), got (float64 (4, 2))",
    ),
    "shared without inputs": (
        lambda: fn.shared(fn.relu()).apply({}, ()), ValueError,
        "shared: expects a tuple of inputs, got ()",
    ),
    "shared of a tensor": (
        lambda: fn.shared(fn.relu()).init(KEY, X), ValueError,
        "shared: expects a tuple of inputs, got float64 (5, 3)",
    ),
    "a cotangent for another number of uses": (
        lambda: fn.shared(fn.relu()).vjp({}, (X, X))[1]((X,)), ValueError,
        "shared: pullback expects a tuple of 2, got (float64 (5, 3))",
    ),
}  # fmt: skip


@pytest.mark.parametrize("misuse", MISUSES)
def test_combinator_names_the_path_of_what_is_wrong(misuse):
    call, kind, message = MISUSES[misuse]
    assert message_of(call) == (kind, message)


@pytest.mark.parametrize(
    "params",
    [{"hidden": torch.ones(2, 2)}, {"hidden": None}, None, [], torch.ones(3)],
    ids=["a tensor for a child", "None for a child", "None", "list", "tensor"],
)
def test_params_that_are_no_dict_are_refused(params):
    for call in (NET.apply, NET.vjp):
        kind, message = message_of(call, params, X)
        assert kind in (ValueError, TypeError)
        assert re.match(r"serial(: |\['hidden'\] )", message)


@pytest.mark.parametrize("key", [3, torch.zeros(2), torch.zeros(3, dtype=torch.int64), "key"])
def test_what_is_no_key_is_refused(key):
    net = fn.serial(drop=fn.dropout(0.5))
    for call in (lambda: net.init(key, X), lambda: net.apply({}, X, key=key, train=True)):
        kind, message = message_of(call)
        assert kind is TypeError
        assert message.startswith("serial")
        assert "a key, " in message
        assert "such as fn.key(" in message


def boom_rule(residuals, dy, *, params, x):
    raise ValueError("boom: a fault of the rule")


def boom():
    """A layer whose rule fails, after the shape of its cotangent was found right."""
    return fn.stateless(
        lambda key, x: {},
        lambda params, x: x,
        lambda params, x: (x, fn.Pullback(boom_rule, {})),
    )


@pytest.mark.parametrize(
    ("net", "x", "path"),
    [
        (fn.serial(fn.relu(), boom()), X, "serial['1']"),
        (fn.serial(fn.branch(a=boom()), fn.identity()), X, "serial['0'] branch['a']"),
        (fn.parallel(fn.relu(), boom()), (X, X), "parallel['1']"),
        (fn.residual(boom()), X, "residual"),
        (fn.serial(a=fn.residual(fn.serial(boom()))), X, "serial['a'] residual serial['0']"),
        (fn.shared(boom()), (X, X), "shared[0]"),
        (fn.serial(a=fn.shared(boom())), (X,), "serial['a'] shared[0]"),
    ],
)
def test_a_pullback_names_the_path_of_the_rule_that_failed(net, x, path):
    y, pullback, _ = net.vjp({}, x)
    assert message_of(pullback, y) == (ValueError, f"{path} boom: a fault of the rule")


WIDTHS = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(st.lists(st.integers(0, 3), max_size=3), WIDTHS)
@settings(max_examples=30, deadline=None)
def test_serial_keeps_leading_dimensions_at_any_width(leading, widths):
    net = fn.serial(*[fn.linear(width) for width in widths])
    module = nn.Sequential(
        *[nn.Linear(n, m) for n, m in zip([3, *widths], widths, strict=False)]
    ).double()
    x = randn(*leading, 3)
    y, pullback, _ = net.vjp(params_of(module), x)
    assert_near(y, module(x).detach())
    assert pullback(y)[1].shape == x.shape


@given(WIDTHS)
@settings(max_examples=30, deadline=None)
def test_split_parallel_concat_is_block_diagonal(widths):
    sizes = [width + 1 for width in widths]
    net = fn.serial(
        fn.split(sizes),
        fn.parallel(*[fn.linear(width, bias=False) for width in widths]),
        fn.concat(),
    )
    x = randn(3, sum(sizes))
    params, _ = net.init(KEY, x)
    blocks = torch.block_diag(*[child["weight"] for child in params["1"].values()])
    y, pullback, _ = net.vjp(params, x)
    assert_near(y, x @ blocks.T)
    dy = cotangent(y)
    assert_near(pullback(dy, params=False)[1], dy @ blocks)


def test_a_model_with_attention_can_be_walked_frozen_and_rematerialised():
    block = fn.transformer_encoder_layer(2, 8, batch_first=True, is_causal=True)
    net, x = fn.serial(block, fn.linear(3)), torch.ones(2, 5, 4)
    paths = []
    walked = fn.map_layers(lambda path, layer: paths.append(path) or layer, net)
    assert {"0.self_attn", "0.self_attn.out_proj", "0.linear1", "1"} <= set(paths)
    params, state = net.init(fn.key(0), x)
    y, _, _ = net.vjp(params, x, state, key=fn.key(1))
    tuned = fn.freeze(walked, "0.self_attn.in_proj_*")
    learned, frozen = tuned.init(fn.key(0), x)
    assert set(frozen["frozen"]["0"]["self_attn"]) == {"in_proj_weight", "in_proj_bias"}
    _, pullback, _ = tuned.vjp(learned, x, frozen, key=fn.key(1))
    assert fn.tree.alike(pullback(y)[0], learned)
    kept = fn.remat(net, policy=["0.self_attn.out_proj", "1"])
    torch.testing.assert_close(kept.vjp(params, x, state, key=fn.key(1))[0], y)
    assert repr(net) == repr(walked)
