"""Transforms one by one, by their formulas, and chains of them."""

import optree
import pytest
import torch

import funcnet as fn
from funcnet import optimizers as opt

F64 = torch.float64


def numbers(*shape, seed=0):
    # Drawn on the CPU, so that the numbers are the same on any device.
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=F64, device="cpu")
    return drawn.to(torch.get_default_device())


P = {"a": {"w": numbers(3, 2)}, "b": numbers()}
G = {"a": {"w": numbers(3, 2, seed=1)}, "b": numbers(seed=2)}


def mapped(function, *trees):
    return optree.tree_map(function, *trees)


def assert_close(found, expected):
    assert optree.tree_structure(found) == optree.tree_structure(expected)
    for a, b in zip(optree.tree_leaves(found), optree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def once(transform, grads=G, params=P):
    return transform.update(grads, transform.init_state(params), params)[0]


FORMULAS = {
    "scale": (opt.scale(2.5), lambda g, p: 2.5 * g),
    "scale by a tensor": (opt.scale(torch.tensor(2.5)), lambda g, p: 2.5 * g),
    "scale by a negative": (opt.scale(-1.0), lambda g, p: -g),
    "scale by 0": (opt.scale(0.0), lambda g, p: 0 * g),
    "negate": (opt.negate(), lambda g, p: -g),
    "scale_by_sign": (opt.scale_by_sign(), lambda g, p: g.sign()),
    "add_decayed_weights": (opt.add_decayed_weights(0.3), lambda g, p: g + 0.3 * p),
    "add_decayed_weights 0": (opt.add_decayed_weights(0.0), lambda g, p: g),
    "scale_by_learning_rate": (opt.scale_by_learning_rate(0.3), lambda g, p: -0.3 * g),
    "rate as a tensor": (
        opt.scale_by_learning_rate(torch.tensor(0.3, dtype=F64)),
        lambda g, p: -0.3 * g,
    ),
    "rate as a function": (
        opt.scale_by_learning_rate(lambda step: 0.3 + step),
        lambda g, p: -torch.tensor(0.3).to(F64) * g,
    ),
    "first trace": (opt.trace(0.9), lambda g, p: g),
    "first trace, dampened": (opt.trace(0.9, 0.5), lambda g, p: g),
    "first trace, nesterov": (opt.trace(0.9, nesterov=True), lambda g, p: 1.9 * g),
    "first scale_by_adam": (opt.scale_by_adam(), lambda g, p: g / (g.abs() + 1e-8)),
    "first scale_by_adam, amsgrad": (
        opt.scale_by_adam((0.5, 0.9), 0.1, True),
        lambda g, p: g / (g.abs() + 0.1),
    ),
    "first scale_by_rms": (
        opt.scale_by_rms(0.75, 0.1),
        lambda g, p: g / (0.5 * g.abs() + 0.1),
    ),
    "first scale_by_rms, centered": (
        opt.scale_by_rms(0.75, 0.1, True),
        lambda g, p: g / ((0.25 * g**2 - (0.25 * g) ** 2).sqrt() + 0.1),
    ),
    "chain of none": (fn.chain(), lambda g, p: g),
    "chain of one": (fn.chain(opt.negate()), lambda g, p: -g),
    "chains within chains": (
        fn.chain(fn.chain(opt.negate(), opt.scale(2.0)), opt.add_decayed_weights(1.0)),
        lambda g, p: -2 * g + p,
    ),
}


@pytest.mark.parametrize(("transform", "formula"), FORMULAS.values(), ids=FORMULAS)
def test_first_update_is_its_formula(transform, formula):
    assert_close(once(transform), mapped(formula, G, P))


@pytest.mark.parametrize(("transform", "formula"), FORMULAS.values(), ids=FORMULAS)
def test_update_changes_nothing_and_works_on_empty_trees(transform, formula):
    state = transform.init_state(P)
    leaves = optree.tree_leaves((G, state, P))
    before = [(leaf, leaf._version, leaf.clone()) for leaf in leaves]
    for _ in range(2):
        transform.update(G, state, P)
    assert all(leaf._version == version for leaf, version, _ in before)
    assert all(torch.equal(leaf, copy) for leaf, _, copy in before)
    assert once(transform, {}, {}) == {}


def test_trace_is_a_decaying_sum():
    momentum = opt.trace(0.5)
    state = momentum.init_state(P)
    for expected in (1.0, 1.5, 1.75):
        updates, state = momentum.update(G, state, P)
        assert_close(updates, mapped(lambda g, e=expected: e * g, G))
    assert_close(state.trace, updates)
    assert state.step == 3


def test_dampening_leaves_the_first_gradient_whole():
    momentum = opt.trace(0.5, 0.25)
    state = momentum.init_state(P)
    for expected in (1.0, 0.5 + 0.75, 0.625 + 0.75):
        updates, state = momentum.update(G, state, P)
        assert_close(updates, mapped(lambda g, e=expected: e * g, G))


def test_adam_state_holds_the_running_means():
    adam = opt.scale_by_adam((0.5, 0.75), amsgrad=True)
    state = adam.init_state(P)
    _, state = adam.update(G, state, P)
    _, state = adam.update(mapped(torch.zeros_like, G), state, P)
    assert state.step == 2
    assert_close(state.mu, mapped(lambda g: 0.25 * g, G))
    assert_close(state.nu, mapped(lambda g: 0.75 * 0.25 * g**2, G))
    assert_close(state.nu_max, mapped(lambda g: 0.25 * g**2, G))
    assert opt.scale_by_adam().init_state(P).nu_max == ()


def test_rms_state_holds_the_running_means():
    rms = opt.scale_by_rms(0.75, centered=True)
    _, state = rms.update(G, rms.init_state(P), P)
    assert_close(state.nu, mapped(lambda g: 0.25 * g**2, G))
    assert_close(state.mu, mapped(lambda g: 0.25 * g, G))
    assert opt.scale_by_rms().init_state(P).mu == ()


def test_a_chain_runs_in_order():
    first = once(fn.chain(opt.scale(2.0), opt.add_decayed_weights(1.0)))
    assert_close(first, mapped(lambda g, p: 2 * g + p, G, P))
    second = once(fn.chain(opt.add_decayed_weights(1.0), opt.scale(2.0)))
    assert_close(second, mapped(lambda g, p: 2 * (g + p), G, P))
    signed = once(fn.chain(opt.scale_by_sign(), opt.scale(3.0)))
    assert_close(signed, mapped(lambda g: 3 * g.sign(), G))


def test_a_chain_gives_each_transform_its_own_state():
    optimizer = fn.chain(opt.trace(0.5), opt.negate(), second=opt.trace(0.25), last=fn.adam(0.1))
    state = optimizer.init_state(P)
    assert optimizer.name == "chain"
    assert list(state) == ["trace", "second", "last"]
    assert list(state["last"]) == ["scale_by_adam"]
    _, state = optimizer.update(G, state, P)
    alone, first = opt.trace(0.5).update(G, opt.trace(0.5).init_state(P), P)
    assert_close(state["trace"].trace, first.trace)
    assert_close(state["second"].trace, mapped(torch.neg, alone))


def test_an_option_shifts_no_other_entry_of_the_state():
    """A checkpoint's paths mean the same whatever is switched on beside them."""
    plain = fn.sgd(0.1, 0.9).init_state(P)
    more = fn.sgd(lambda step: 0.1, 0.9, weight_decay=0.1, maximize=True).init_state(P)
    assert list(plain) == ["trace"]
    assert list(more) == ["trace", "scale_by_learning_rate"]
    assert fn.sgd(0.1, weight_decay=0.1, maximize=True).init_state(P) == {}
    for rate in (0.1, lambda step: 0.1):
        assert "scale_by_adam" in fn.adam(rate, weight_decay=0.1).init_state(P)


def test_a_name_is_kept():
    assert fn.adamw().name == "adamw"
    assert opt.trace(0.9).name == "trace"
    edited = opt.trace(0.9)._replace(init_state=lambda params: {})
    assert edited.name == "trace"
    assert isinstance(edited, fn.Optimizer)
    assert list(fn.chain(fn.chain(opt.trace(0.9)), fn.sgd(0.1, 0.9)).init_state(P)) == [
        "chain",
        "sgd",
    ]


def count():
    def init_state(params):
        return torch.zeros(())

    def update(grads, opt_state, params):
        return grads, opt_state + 1

    return fn.Optimizer(init_state, update)


def test_an_optimizer_written_by_hand_can_be_chained():
    optimizer = fn.chain(count(), opt.negate())
    updates, state = optimizer.update(G, optimizer.init_state(P), P)
    assert_close(updates, mapped(torch.neg, G))
    assert state == {"count": 1}


def test_a_function_of_the_step_sees_the_number_of_updates_so_far():
    seen = []

    def schedule(step):
        seen.append(step)
        return 1.0

    transform = opt.scale_by_learning_rate(schedule)
    state = transform.init_state(P)
    for _ in range(3):
        _, state = transform.update(G, state, P)
    assert [(int(step), step.dtype, step.shape) for step in seen] == [
        (expected, torch.int64, ()) for expected in range(3)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1 / 3, torch.tensor(1 / 3), torch.tensor(1 / 3, dtype=F64)])
def test_a_factor_is_not_rounded_to_half_precision(dtype, factor):
    grads = {"w": torch.tensor([3.0, 300.0, 1.0], dtype=dtype)}
    found = once(opt.scale(factor), grads, grads)["w"]
    assert found.dtype == dtype
    expected = (grads["w"].double() / 3).to(dtype)
    assert torch.equal(found, expected)


def test_apply_updates_adds_and_keeps_structure_and_dtype():
    assert_close(fn.apply_updates(P, G), mapped(torch.add, P, G))
    assert fn.apply_updates({}, {}) == {}
    half = {"w": torch.ones(2, dtype=torch.bfloat16)}
    assert fn.apply_updates(half, half)["w"].dtype == torch.bfloat16
    versions = [leaf._version for leaf in optree.tree_leaves((P, G))]
    fn.apply_updates(P, G)
    assert [leaf._version for leaf in optree.tree_leaves((P, G))] == versions


def test_apply_updates_of_another_dtype_keeps_that_of_params():
    params = {"w": torch.ones(2), "s": torch.ones(())}
    updates = mapped(torch.Tensor.double, params)
    added = fn.apply_updates(params, updates)
    assert {leaf.dtype for leaf in optree.tree_leaves(added)} == {torch.float32}


@pytest.mark.parametrize(
    ("names", "others"), [(("b", "a"), ("a", "b")), (("weight", "bias"), ("bias", "weight"))]
)
def test_the_order_of_names_is_that_of_the_params_given(names, others):
    """The order of a dict's names must not depend on what was updated before."""
    for order in (names, others, names):
        params = {name: numbers(2) for name in order}
        assert tuple(fn.apply_updates(params, params)) == order
        assert tuple(fn.sgd(0.1).update(params, {}, params)[0]) == order


ALL = {
    "scale": opt.scale(1.7),
    "scale by a tensor": opt.scale(torch.tensor(1.7)),
    "negate": opt.negate(),
    "scale_by_sign": opt.scale_by_sign(),
    "add_decayed_weights": opt.add_decayed_weights(0.3),
    "scale_by_learning_rate": opt.scale_by_learning_rate(0.3),
    "rate as a function": opt.scale_by_learning_rate(lambda step: 0.3 + step),
    "trace": opt.trace(0.9, 0.3),
    "trace, nesterov": opt.trace(0.9, nesterov=True),
    "scale_by_adam": opt.scale_by_adam(),
    "scale_by_adam, amsgrad": opt.scale_by_adam(amsgrad=True),
    "scale_by_rms": opt.scale_by_rms(),
    "scale_by_rms, centered": opt.scale_by_rms(centered=True),
    "adam": fn.adam(0.1),
    "chain": fn.chain(opt.negate(), opt.trace(0.9)),
}


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("after", [opt.scale(1 / 3), opt.scale_by_learning_rate(1 / 3)])
@pytest.mark.parametrize("transform", ALL.values(), ids=ALL)
def test_a_chain_is_bit_for_bit_one_transform_and_then_the_other(transform, after, dtype):
    p, g = (mapped(lambda leaf: leaf.to(dtype), tree) for tree in (P, G))
    together = fn.chain(transform, after=after)
    state, alone = together.init_state(p), transform.init_state(p)
    for _ in range(3):
        found, state = together.update(g, state, p)
        updates, alone = transform.update(g, alone, p)
        expected, _ = after.update(updates, after.init_state(p), p)
        for one, other in zip(optree.tree_leaves(found), optree.tree_leaves(expected), strict=True):
            assert torch.equal(one, other)


BAD = {
    "chain state": (
        lambda: fn.chain(opt.negate()).update(G, (), P),
        ValueError,
        r"chain: expects a dict of the states of \['negate'\], got .*tuple",
    ),
    "chain state of others": (
        lambda: fn.chain(opt.negate(), opt.trace(0.9)).update(G, {"velocity": {}}, P),
        ValueError,
        r"chain: expects a dict of the states of \['negate', 'trace'\], got \['velocity'\]",
    ),
    "chain state without an entry": (
        lambda: fn.sgd(0.1, 0.9).update(G, {}, P),
        TypeError,
        r"sgd\['trace'\] trace: expects the state TraceState\(trace, step\), got \{\}",
    ),
    "state of a nested chain": (
        lambda: fn.chain(first=fn.adam(0.1)).update(G, {"first": {"scale_by_adam": (1,)}}, P),
        TypeError,
        r"chain\['first'\] adam\['scale_by_adam'\] scale_by_adam: expects the state AdamState",
    ),
    "state for a transform without": (
        lambda: opt.negate().update(G, {"trace": P}, P),
        ValueError,
        "negate: has no state, got",
    ),
    "two of one name": (
        lambda: fn.chain(opt.trace(0.9), opt.trace(0.5)),
        ValueError,
        "chain: two are named 'trace'",
    ),
    "a constructor": (
        lambda: fn.chain(opt.negate),
        TypeError,
        "got the function negate; call it, as in",
    ),
    "rate below 0": (lambda: opt.scale_by_learning_rate(-1.0), ValueError, "lr must be >= 0"),
    "rate of shape (1,)": (
        lambda: opt.scale_by_learning_rate(torch.ones(1)),
        ValueError,
        r"0-d tensor, got \(1,\)",
    ),
    "function that gives rates of shape (2,)": (
        lambda: once(opt.scale_by_learning_rate(lambda step: torch.ones(2))),
        ValueError,
        r"0-d tensor, got \(2,\)",
    ),
    "the same within chains": (
        lambda: once(fn.chain(whole=fn.sgd(lambda step: torch.ones(2)))),
        ValueError,
        r"chain\['whole'\] sgd\['scale_by_learning_rate'\] scale_by_learning_rate: lr must be",
    ),
    "rate that is NaN": (lambda: fn.sgd(torch.nan), ValueError, "sgd: lr must be >= 0, got nan"),
    "rate that is a negative tensor": (
        lambda: opt.scale_by_learning_rate(torch.tensor(-0.1)),
        ValueError,
        "lr must be >= 0, got -0.1",
    ),
    "decay below 0": (lambda: opt.add_decayed_weights(-1.0), ValueError, "weight_decay"),
    "momentum below 0": (lambda: opt.trace(-0.5), ValueError, "momentum"),
    "nesterov without momentum": (lambda: opt.trace(0.0, nesterov=True), ValueError, "nesterov"),
    "nesterov dampened": (lambda: opt.trace(0.5, 0.5, True), ValueError, "nesterov"),
    "beta of 1": (lambda: opt.scale_by_adam((0.9, 1.0)), ValueError, r"betas\[1\]"),
    "adam eps below 0": (lambda: opt.scale_by_adam(eps=-1.0), ValueError, "eps"),
    "rms alpha below 0": (lambda: opt.scale_by_rms(-0.1), ValueError, "alpha"),
    "rms eps below 0": (lambda: opt.scale_by_rms(eps=-0.1), ValueError, "eps"),
    "updates of another structure": (
        lambda: fn.apply_updates(P, {"a": {"w": numbers(3, 2)}}),
        ValueError,
        "apply_updates: updates: the tree has no leaf 'b'",
    ),
    "updates of a deeper structure": (
        lambda: fn.apply_updates(P, {"a": {"w": {"x": numbers(3, 2)}}, "b": numbers()}),
        ValueError,
        "updates: .*'a.w",
    ),
    "updates of another shape": (
        lambda: fn.apply_updates(P, {"a": {"w": numbers(2)}, "b": numbers()}),
        ValueError,
        "updates: .*a.w",
    ),
    "params of another structure": (
        lambda: opt.add_decayed_weights(0.1).update(G, {}, {"a": {"w": numbers(3, 2)}}),
        ValueError,
        "add_decayed_weights: grads: the tree has 'b', which was not expected",
    ),
    "state of another structure": (
        lambda: opt.trace(0.9).update(G, opt.trace(0.9).init_state({"b": numbers()}), P),
        ValueError,
        "trace: state.trace: .*'a.w'",
    ),
    "adam's state of another structure": (
        lambda: opt.scale_by_adam().update(G, opt.scale_by_adam().init_state({}), P),
        ValueError,
        "scale_by_adam: state.mu: .*'a.w'",
    ),
    "rms's state of another structure": (
        lambda: opt.scale_by_rms().update(G, opt.scale_by_rms().init_state({}), P),
        ValueError,
        "scale_by_rms: state.nu: .*'a.w'",
    ),
}


@pytest.mark.parametrize(("call", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
