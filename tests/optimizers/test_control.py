"""Optimizers around others: accumulate, apply_if_finite, lookahead; noise and averages."""

import math

import pytest
import torch

import funcnet as fn
from funcnet import optimizers as opt

F64 = torch.float64
PARAMS = {"a": {"w": torch.tensor([[1.0, -2.0]], dtype=F64)}, "b": torch.tensor(0.5, dtype=F64)}


def grads_at(step, like=PARAMS):
    keys = fn.random.fold_in(fn.key(1), step)
    return fn.tree.map(lambda leaf: fn.random.normal(keys, leaf.shape, F64).to(leaf.dtype), like)


def run(optimizer, grads, params=PARAMS):
    """The params after each update, and the last state."""
    state, after = optimizer.init_state(params), []
    for each in grads:
        updates, state = optimizer.update(each, state, params)
        params = fn.apply_updates(params, updates)
        after.append(params)
    return after, state


def unreadable(monkeypatch):
    """As on a GPU: no value can be read for free."""
    monkeypatch.setattr("funcnet.runtime.read", lambda tensor: None)


def assert_close(found, expected, rtol=1e-13):
    leaves, others = fn.tree.flatten(found), fn.tree.flatten(expected)
    assert leaves[1] == others[1]
    for one, other in zip(leaves[0], others[0], strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-15, equal_nan=True)


def equal(found, expected):
    pairs = zip(fn.tree.leaves(found), fn.tree.leaves(expected), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


either_way = pytest.mark.parametrize("readable", [True, False])


@either_way
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("make", [lambda: fn.sgd(0.1, 0.9), lambda: fn.adamw(0.1)])
def test_accumulate_is_one_update_by_the_mean_of_k(k, make, readable, monkeypatch):
    grads = [grads_at(step) for step in range(4 * k)]
    means = [
        fn.tree.map(lambda *each: sum(each) / k, *grads[start : start + k])
        for start in range(0, len(grads), k)
    ]
    expected, inner = run(make(), means)
    if not readable:
        unreadable(monkeypatch)
    found, state = run(opt.accumulate(make(), k), grads)
    assert equal(found[k - 1 :: k], expected)
    assert equal(state.inner, inner)
    assert state.step == 0
    assert not any(leaf.any() for leaf in fn.tree.leaves(state.total))


@either_way
def test_between_updates_accumulate_changes_neither_params_nor_the_inner_state(
    readable, monkeypatch
):
    if not readable:
        unreadable(monkeypatch)
    optimizer = opt.accumulate(fn.adamw(0.1), 3)
    start = optimizer.init_state(PARAMS)
    found, state = run(optimizer, [grads_at(0), grads_at(1)])
    assert equal(found[-1], PARAMS)
    assert equal(state.inner, start.inner)
    assert state.step == 2
    assert equal(state.total, fn.tree.map(torch.add, grads_at(0), grads_at(1)))


def test_accumulate_sums_half_precision_in_float32():
    params = {"w": torch.zeros(1, dtype=torch.bfloat16)}
    grads = [{"w": torch.full((1,), value, dtype=torch.bfloat16)} for value in (256.0, 1.0, 1.0)]
    found, state = run(opt.accumulate(fn.sgd(1.0), 3), grads, params)
    assert state.total["w"].dtype == torch.float32
    assert found[-1]["w"] == -torch.tensor(86.0, dtype=torch.bfloat16)


BAD = fn.tree.map(lambda leaf: leaf / 0, {**PARAMS, "b": torch.zeros((), dtype=F64)})


@either_way
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_apply_if_finite_skips_what_is_not(value, readable, monkeypatch):
    bad = {"a": {"w": torch.tensor([[1.0, value]], dtype=F64)}, "b": PARAMS["b"]}
    expected, inner = run(fn.adam(0.1), [grads_at(0), grads_at(1)])
    if not readable:
        unreadable(monkeypatch)
    optimizer = opt.apply_if_finite(fn.adam(0.1), 2)
    found, state = run(optimizer, [grads_at(0), bad, bad, grads_at(1)])
    assert equal(found, [expected[0], expected[0], expected[0], expected[1]])
    assert equal(state.inner, inner)
    assert (state.notfinite_count, state.total_notfinite, state.last_finite) == (0, 2, True)


@either_way
def test_apply_if_finite_gives_up_after_too_many_in_a_row(readable, monkeypatch):
    if not readable:
        unreadable(monkeypatch)
    optimizer = opt.apply_if_finite(fn.sgd(0.1), 2)
    found, state = run(optimizer, [BAD] * 3)
    assert equal(found[1], PARAMS)
    assert not any(leaf.isfinite().any() for leaf in fn.tree.leaves(found[2]))
    assert (state.notfinite_count, state.total_notfinite, state.last_finite) == (3, 3, False)


@either_way
@pytest.mark.parametrize(("k", "alpha"), [(1, 0.5), (3, 0.5), (3, 1.0), (2, 0.0)])
def test_lookahead_is_its_plain_loop(k, alpha, readable, monkeypatch):
    slow = fast = PARAMS
    inner = fn.sgd(0.1, 0.9)
    state, expected = inner.init_state(PARAMS), []
    for step in range(7):
        updates, state = inner.update(grads_at(step), state, fast)
        fast = fn.apply_updates(fast, updates)
        if (step + 1) % k == 0:
            slow = fast = fn.tree.map(lambda s, f: s + alpha * (f - s), slow, fast)
        expected.append(fast)
    if not readable:
        unreadable(monkeypatch)
    optimizer = opt.lookahead(inner, k, alpha)
    found, after = run(optimizer, [grads_at(step) for step in range(7)])
    assert_close(found, expected)
    assert_close(after.slow, slow)
    assert_close(after.inner, state)
    assert after.eval_params(found[-1]) is after.slow


def test_ema_is_a_running_mean():
    grads = [grads_at(step)["b"] for step in range(5)]
    mean = torch.zeros((), dtype=F64)
    for debias in (True, False):
        transform = opt.ema(0.8, debias)
        state, mean = transform.init_state(PARAMS), 0.0
        for step, g in enumerate(grads, 1):
            updates, state = transform.update({**PARAMS, "b": g}, state, PARAMS)
            mean = 0.8 * mean + 0.2 * g
            expected = mean / (1 - 0.8**step) if debias else mean
            torch.testing.assert_close(updates["b"], expected, rtol=1e-13, atol=0)
            torch.testing.assert_close(state.ema["b"], mean, rtol=1e-13, atol=0)


def test_noise_has_the_variance_of_its_paper():
    params = {"w": torch.zeros(20_000, dtype=F64), "v": torch.zeros(20_000, dtype=F64)}
    noisy = opt.add_noise(0.04, 0.55, fn.key(5))
    state, drawn = noisy.init_state(params), []
    for step in range(1, 4):
        updates, state = noisy.update(params, state, params)
        deviation = math.sqrt(0.04 / step**0.55)
        for leaf in updates.values():
            assert abs(leaf.mean()) < 0.05 * deviation
            assert abs(leaf.std() / deviation - 1) < 0.03
        drawn += [leaf / deviation for leaf in updates.values()]
    correlations = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn), dtype=F64)
    assert correlations.abs().max() < 0.05


def test_noise_is_of_the_key_and_the_path():
    one, other = opt.add_noise(0.1, 0.5, fn.key(1)), opt.add_noise(0.1, 0.5, fn.key(2))
    zeros = fn.tree.map(torch.zeros_like, PARAMS)
    drawn = one.update(zeros, one.init_state(zeros), zeros)[0]
    assert equal(drawn, one.update(zeros, one.init_state(zeros), zeros)[0])
    assert not equal(
        drawn, other.update(zeros, one.init_state(zeros)._replace(key=fn.key(2)), zeros)[0]
    )
    more = {**zeros, "another": torch.zeros(3)}
    assert torch.equal(one.update(more, one.init_state(more), more)[0]["b"], drawn["b"])


def test_the_state_has_a_key_of_its_own():
    """So that a compiled step to which the state is donated leaves the caller's key."""
    key = fn.key(1)
    state = opt.add_noise(0.1, 0.5, key).init_state(PARAMS)
    assert state.key.data_ptr() != key.data_ptr()


REFUSED = {
    "k of 0": (lambda: opt.accumulate(fn.sgd(0.1), 0), ValueError, "accumulate: k must be an int"),
    "k of 1.5": (lambda: opt.lookahead(fn.sgd(0.1), 1.5), ValueError, "lookahead: k must be an in"),
    "alpha": (lambda: opt.lookahead(fn.sgd(0.1), 2, -1.0), ValueError, "alpha must be >= 0"),
    "errors": (
        lambda: opt.apply_if_finite(fn.sgd(0.1), -1),
        ValueError,
        "max_consecutive_errors must be an integer >= 0",
    ),
    "a constructor": (
        lambda: opt.accumulate(fn.sgd, 2),
        TypeError,
        "accumulate: expects an Optimizer, got the function sgd; call it, as in",
    ),
    "eta": (lambda: opt.add_noise(-1.0, 0.5, fn.key(0)), ValueError, "eta must be >= 0"),
    "no key": (lambda: opt.add_noise(1.0, 0.5, torch.ones(3)), (TypeError, ValueError), "key"),
    "decay of 1": (lambda: opt.ema(1.0), ValueError, "ema: decay must be below 1"),
    "another's state": (
        lambda: opt.lookahead(fn.sgd(0.1)).update(PARAMS, {}, PARAMS),
        TypeError,
        r"lookahead: expects the state LookaheadState\(step, slow, inner\), got \{\}",
    ),
    "an inner state": (
        lambda: opt.accumulate(fn.sgd(0.1, 0.9), 1).update(
            PARAMS, opt.accumulate(fn.sgd(0.1, 0.9), 1).init_state({}), PARAMS
        ),
        ValueError,
        "accumulate: state.total: the tree has no leaf 'a.w'",
    ),
    "an error within": (
        lambda: fn.chain(careful=opt.apply_if_finite(fn.chain(first=fn.sgd(0.1, 0.9)), 1)).update(
            PARAMS,
            {"careful": opt.apply_if_finite(fn.sgd(0.1), 1).init_state(PARAMS)},
            PARAMS,
        ),
        TypeError,
        r"chain\['careful'\] apply_if_finite chain\['first'\] sgd\['trace'\] trace: expects the st",
    ),
}


@pytest.mark.parametrize(("call", "error", "match"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
