"""scan: lax.scan's meaning, in a Python loop and in a compiled one."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

import funcnet as fn


def accumulate(carry, x):
    total, count = carry
    return (total + x, count + 1), {"sum": total * x, "count": count}


def by_hand(carry, xs):
    ys = []
    for x in xs:
        carry, y = accumulate(carry, x)
        ys.append(y)
    return carry, fn.tree.map(lambda *leaves: torch.stack(leaves), *ys)


def assert_equal(found, expected):
    for one, other in zip(fn.tree.leaves(found), fn.tree.leaves(expected), strict=True):
        torch.testing.assert_close(one, other)


START = (torch.zeros(3), torch.tensor(0))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.booleans())
def test_it_is_the_loop(length, reverse):
    xs = fn.random.normal(fn.key(length), (length, 3))
    carry, ys = fn.scan(accumulate, START, xs, reverse=reverse)
    expected_carry, expected_ys = by_hand(START, xs.flip(0) if reverse else xs)
    if reverse:
        expected_ys = fn.tree.map(lambda y: y.flip(0), expected_ys)
    assert_equal((carry, ys), (expected_carry, expected_ys))


@pytest.mark.parametrize(
    "options",
    [{}, {"unroll": 3}, {"unroll": True}, {"reverse": True}, {"reverse": True, "unroll": 3}],
)
def test_the_compiled_loop_equals_the_python_loop(options):
    xs = fn.random.normal(fn.key(0), (7, 3))
    run = fn.jit(lambda carry, xs: fn.scan(accumulate, carry, xs, **options))
    assert_equal(run(START, xs), fn.scan(accumulate, START, xs, **options))


@pytest.mark.cpu_only
def test_the_compiled_program_does_not_grow_with_the_length():
    def lines(length):
        run = fn.jit(lambda x: fn.scan(lambda c, _: (torch.sin(c) + 1, c), x, length=length))
        lowered = run.lower(torch.ones(4))
        assert lowered.why_not_one is None
        return len(lowered.code.splitlines())

    assert lines(3) == lines(3000)


@pytest.mark.parametrize("compiled", [False, True])
def test_no_iterations_give_the_carry_and_empty_ys(compiled):
    def run(carry, xs):
        return fn.scan(accumulate, carry, xs)

    carry, ys = (fn.jit(run) if compiled else run)(START, torch.zeros(0, 3))
    assert_equal(carry, START)
    assert ys["sum"].shape == (0, 3)
    assert ys["count"].shape == (0,)
    assert ys["count"].dtype == torch.int64


def test_a_length_without_xs():
    carry, ys = fn.scan(lambda c, x: (2 * c, None), torch.tensor(1), length=5)
    assert (carry, ys) == (torch.tensor(32), None)


def test_a_body_may_swap_and_drop_its_carries():
    def swap(carry, x):
        a, b, unused = carry
        return (b, a, torch.zeros(2)), (a, unused)

    start = (torch.ones(2), torch.full((2,), 2.0), torch.full((2,), 3.0))

    def run(*start):
        return fn.scan(swap, start, length=5)

    assert_equal(fn.jit(run)(*start), run(*start))
    assert_equal(fn.jit(run, donate=(0, 1, 2))(*[leaf.clone() for leaf in start]), run(*start))


def test_a_body_closes_over_what_is_outside_at_any_depth():
    weight = torch.full((3,), 0.5)

    def run(x, bias):
        shifted = x + 1

        def outer(total, row):
            def inner(part, value):
                return part + value * weight.sum() + bias, total + shifted[0]

            part, seen = fn.scan(inner, torch.zeros(()), row)
            return total + part, seen

        return fn.scan(outer, torch.zeros(()), shifted.unsqueeze(0).expand(4, 3))

    x, bias = torch.arange(3.0), torch.tensor(0.25)
    assert_equal(fn.jit(run)(x, bias), run(x, bias))


def test_it_composes_with_vmap_in_both_orders():
    xs = fn.random.normal(fn.key(0), (5, 3))
    starts = fn.random.normal(fn.key(1), (4, 3))

    def scan_of(start):
        return fn.scan(lambda c, x: (torch.tanh(c + x), c.sum()), start, xs)

    def scan_of_vmap(starts):
        step = fn.vmap(lambda c, x: (torch.tanh(c + x), c.sum()), in_axes=(0, None))
        return fn.scan(lambda c, x: step(c, x), starts, xs)

    expected = [scan_of(start) for start in starts]
    carry = torch.stack([each[0] for each in expected])
    ys = torch.stack([each[1] for each in expected])
    assert_equal(fn.vmap(scan_of)(starts), (carry, ys))
    assert_equal(fn.jit(fn.vmap(scan_of))(starts), (carry, ys))
    assert_equal(scan_of_vmap(starts), (carry, ys.T))
    assert_equal(fn.jit(scan_of_vmap)(starts), (carry, ys.T))


def test_a_whole_training_run_is_one_call():
    net = fn.serial(fn.linear(8), fn.batch_norm(), fn.dropout(0.2), fn.tanh(), fn.linear(1))
    optimizer = fn.sgd(0.1, 0.9)
    step = fn.train_step(net, fn.mse(), optimizer)
    x = fn.random.normal(fn.key(0), (50, 3))
    data = (x, x.sum(1, keepdim=True))

    def train(key):
        def epoch(state, key):
            state, metrics = fn.scan(step, state, fn.epoch_batches(key, data, 16))
            return state, metrics["loss"].mean()

        start = fn.init_train_state(net, optimizer, key, x)
        return fn.scan(epoch, start, fn.random.split(key, 3))

    eager, compiled = train(fn.key(3)), fn.jit(train)(fn.key(3))
    assert compiled[1].shape == (3,)
    assert_equal(compiled, eager)
    members = fn.jit(fn.vmap(train))(torch.stack([fn.key(3), fn.key(4)]))
    assert_equal(fn.tree.map(lambda leaf: leaf[0], members), eager)


def test_fori_counts():
    def run(x):
        return fn.fori(2, 6, lambda i, total: total + i * x, torch.zeros(2))

    assert_equal(run(torch.ones(2)), torch.full((2,), 14.0))
    assert_equal(fn.jit(run)(torch.ones(2)), torch.full((2,), 14.0))
    assert_equal(fn.fori(3, 1, lambda i, c: c + 1, torch.zeros(())), torch.zeros(()))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "expects xs or a length", lambda: fn.scan(accumulate, START)),
        (
            ValueError,
            "one number of iterations, got 2 of length, 3 of xs",
            lambda: fn.scan(accumulate, START, torch.ones(3, 3), length=2),
        ),
        (
            ValueError,
            "xs with a leading axis",
            lambda: fn.scan(accumulate, START, torch.tensor(1.0)),
        ),
        (
            ValueError,
            r"came in as float32 \(\) and went out as float32 \(1,\)",
            lambda: fn.scan(lambda c, x: (c.reshape(1), None), torch.tensor(0.0), length=2),
        ),
        (
            ValueError,
            "the carry must keep",
            lambda: fn.scan(lambda c, x: (c > 0, None), torch.tensor(0.0), length=2),
        ),
        (
            TypeError,
            r"must return \(carry, y\)",
            lambda: fn.scan(lambda c, x: c, torch.tensor(0.0), length=2),
        ),
        (
            ValueError,
            "unroll of at least 1",
            lambda: fn.scan(accumulate, START, torch.ones(3, 3), unroll=0),
        ),
    ],
)
def test_misuse_is_told(error, message, call):
    with pytest.raises(error, match=message):
        call()
    with pytest.raises(error, match=message):
        fn.jit(lambda x: (call(), x)[1])(torch.ones(1))
