"""`masked` and `partition`: which leaves, what state, and what is refused."""

import pytest
import torch

import funcnet as fn
from funcnet import optimizers as opt

F64 = torch.float64


def numbers(*shape, seed=0):
    return fn.random.normal(fn.key(seed), shape, F64)


PARAMS = {
    "body": {
        "0": {"weight": numbers(3, 2), "bias": numbers(3, seed=1)},
        "1": {"weight": numbers(2, 3, seed=2), "bias": numbers(2, seed=3)},
    },
    "head": {"weight": numbers(1, 2, seed=4)},
}
GRADS = fn.tree.map(torch.cos, PARAMS)
PATHS = list(fn.tree.to_dotted(PARAMS))


def once(optimizer, grads=GRADS, params=PARAMS):
    return fn.tree.to_dotted(optimizer.update(grads, optimizer.init_state(params), params)[0])


WHERE = {
    "a layer": ("body", lambda path: path.startswith("body.")),
    "a leaf": ("head.weight", lambda path: path == "head.weight"),
    "several": (["body.0", "head"], lambda path: not path.startswith("body.1")),
    "a function": (lambda path: path.endswith("bias"), lambda path: path.endswith("bias")),
    "all": (lambda path: True, lambda path: True),
}


@pytest.mark.parametrize(("where", "meant"), WHERE.values(), ids=WHERE)
def test_a_mask_means_what_it_means_for_freeze(where, meant):
    found, grads = once(opt.masked(fn.sgd(0.5), where)), fn.tree.to_dotted(GRADS)
    assert list(found) == PATHS
    for path, update in found.items():
        assert torch.equal(update, -0.5 * grads[path] if meant(path) else grads[path])


def test_the_state_is_that_of_the_leaves_that_are_meant():
    biases = opt.masked(fn.adam(0.1), lambda path: path.endswith("bias"))
    state = biases.init_state(PARAMS)
    expected = {"body": {"0": {"bias"}, "1": {"bias"}}}
    mean = state["scale_by_adam"].mu
    assert {name: {each: {*leaf} for each, leaf in mean[name].items()} for name in mean} == expected
    parts = opt.partition(
        {"plain": fn.sgd(0.1), "momentum": fn.sgd(0.1, 0.9), "adam": fn.adam(0.1)},
        {"plain": "body.0", "momentum": "body.1", "adam": "head"},
    )
    state = parts.init_state(PARAMS)
    assert list(state) == ["momentum", "adam"]
    assert fn.tree.to_dotted(state["momentum"]["trace"].trace).keys() == {
        "body.1.weight",
        "body.1.bias",
    }


def test_a_partition_is_each_optimizer_on_its_own_leaves():
    rates = {"body.0": 0.1, "body.1": 0.2, "head": 0.0}
    optimizer = opt.partition(
        {path: fn.sgd(rate) for path, rate in rates.items()}, {path: path for path in rates}
    )
    grads = fn.tree.to_dotted(GRADS)
    for path, update in once(optimizer).items():
        rate = rates[path.rsplit(".", 1)[0]]
        assert torch.equal(update, -rate * grads[path])


def test_a_part_can_stay_as_it_is():
    frozen = opt.partition(
        {"learns": fn.adamw(0.1), "stays": opt.set_to_zero()},
        {"learns": "head", "stays": "body"},
    )
    updates = once(frozen, fn.tree.map(lambda leaf: leaf / 0, GRADS))
    assert all(not updates[path].any() for path in PATHS if path.startswith("body"))


def test_a_rule_that_is_a_function_may_match_no_leaf():
    optimizer = opt.partition(
        {"all": fn.sgd(0.1), "none": fn.adam(0.1)},
        {"all": lambda path: True, "none": lambda path: False},
    )
    assert once(optimizer).keys() == {*PATHS}


def test_a_weight_decay_may_spare_the_biases():
    found = once(opt.add_decayed_weights(0.1, mask=lambda path: not path.endswith("bias")))
    params, grads = fn.tree.to_dotted(PARAMS), fn.tree.to_dotted(GRADS)
    for path, update in found.items():
        expected = grads[path] if path.endswith("bias") else grads[path] + 0.1 * params[path]
        torch.testing.assert_close(update, expected, rtol=1e-15, atol=0)
    assert opt.add_decayed_weights(0.1, "head").name == "add_decayed_weights"


def test_one_optimizer_is_for_any_params_in_turn():
    optimizer = opt.masked(fn.sgd(0.5), lambda path: path.endswith("weight"))
    others = {"weight": numbers(2), "z": {"bias": numbers(1)}}
    for params in (PARAMS, others, PARAMS, {}, {"weight": numbers(2)}):
        grads = fn.tree.map(torch.cos, params)
        for path, update in once(optimizer, grads, params).items():
            factor = -0.5 if path.endswith("weight") else 1.0
            assert torch.equal(update, factor * fn.tree.to_dotted(grads)[path])


def test_the_order_of_names_is_that_of_the_params():
    for names in (("b", "a"), ("a", "b")):
        params = {name: {"weight": numbers(1), "bias": numbers(1)} for name in names}
        parts = opt.partition({"one": fn.sgd(0.1), "two": fn.sgd(0.2)}, {"one": "a", "two": "b"})
        assert tuple(parts.update(params, {}, params)[0]) == names


def by_hand():
    """An optimizer that knows nothing of leaves."""

    def update(grads, opt_state, params):
        return fn.tree.map(lambda g, p: -p, grads, params), opt_state + 1

    return fn.Optimizer(lambda params: torch.zeros(()), update)


def test_an_optimizer_written_by_hand_sees_the_tree_of_its_leaves():
    masked = opt.masked(by_hand(), "head")
    updates, state = masked.update(GRADS, masked.init_state(PARAMS), PARAMS)
    assert torch.equal(updates["head"]["weight"], -PARAMS["head"]["weight"])
    assert updates["body"]["0"]["bias"] is GRADS["body"]["0"]["bias"]
    assert state == 1


def partitioned(rules):
    return opt.partition({label: fn.sgd(0.1, 0.9) for label in rules}, rules)


REFUSED = {
    "a mask that fits nothing": (
        lambda: opt.masked(fn.sgd(0.1), lambda path: "lora" in path).init_state(PARAMS),
        ValueError,
        r"masked: no leaf is chosen of \['body.0.weight', ",
    ),
    "a path of no leaf": (
        lambda: once(opt.add_decayed_weights(0.1, ["head", "tail"])),
        ValueError,
        r"add_decayed_weights: no leaf has the path 'tail', only \['body.0.weight', ",
    ),
    "a leaf without a rule": (
        lambda: partitioned({"one": "body.0", "two": "head"}).init_state(PARAMS),
        ValueError,
        r"partition: no rule of \['one', 'two'\] matches the leaf 'body.1.weight'; exactly one",
    ),
    "a leaf of two rules": (
        lambda: partitioned({"one": "body", "two": lambda path: True}).init_state(PARAMS),
        ValueError,
        r"partition: the rules \['one', 'two'\] match the leaf 'body.0.weight'; exactly one must",
    ),
    "a rule for a path of no leaf": (
        lambda: partitioned({"one": "body", "two": "tail"}).init_state(PARAMS),
        ValueError,
        "partition: no leaf has the path 'tail'",
    ),
    "params that the rules do not fit": (
        lambda: partitioned({"one": "body", "two": "head"}).update(
            {"w": numbers(2)}, {}, {"w": numbers(2)}
        ),
        ValueError,
        "partition: no leaf has the path 'body'",
    ),
    "a rule without an optimizer": (
        lambda: opt.partition({"one": fn.sgd(0.1)}, {"one": "body", "other": "head"}),
        ValueError,
        r"expects an optimizer and a rule for each label of \['other'\]",
    ),
    "an optimizer without a rule": (
        lambda: opt.partition({"one": fn.sgd(0.1), "other": fn.sgd(0.1)}, {"one": "body"}),
        ValueError,
        r"expects an optimizer and a rule for each label of \['other'\]",
    ),
    "a constructor": (
        lambda: opt.partition({"one": fn.sgd}, {"one": "body"}),
        TypeError,
        "partition: expects an Optimizer, got the function sgd; call it, as in",
    ),
    "the state of another partition": (
        lambda: partitioned({"one": "body", "two": "head"}).update(GRADS, {"three": {}}, PARAMS),
        ValueError,
        r"partition: expects a dict of the states of \['one', 'two'\], got \['three'\]",
    ),
    "a state of other leaves": (
        lambda: partitioned({"one": "body", "two": "head"}).update(
            GRADS, partitioned({"one": "head", "two": "body"}).init_state(PARAMS), PARAMS
        ),
        ValueError,
        r"partition\['one'\] sgd\['trace'\] trace: state.trace: the tree has no leaf 'body.0.bias'",
    ),
    "gradients of other params": (
        lambda: once(opt.masked(fn.sgd(0.1), "head"), {"head": GRADS["head"]}),
        ValueError,
        "masked: grads: the tree has no leaf 'body.0.bias'",
    ),
}


@pytest.mark.parametrize(("call", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
