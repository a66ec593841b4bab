"""while_loop, cond and switch: jax.lax's meaning, in Python and in compiled programs."""

import re

import pytest
import torch
from hypothesis import given, settings, strategies as st

import funcnet as fn
from funcnet.compiler.errors import UnsupportedError

X = fn.random.normal(fn.key(0), (4, 3))


def assert_equal(found, expected):
    for one, other in zip(fn.tree.leaves(found), fn.tree.leaves(expected), strict=True):
        torch.testing.assert_close(one, other)


def odd_part(n):
    """Without its factors of 2; a loop with another number of iterations for each n."""
    return fn.while_loop(lambda n: n % 2 == 0, lambda n: n // 2, n)


def odd_part_by_hand(n):
    while n % 2 == 0:
        n //= 2
    return n


def newton(a):
    """A square root, with several carries and a count."""

    def goes_on(carry):
        x, count = carry["x"], carry["count"]
        return ((x * x - a).abs() > 1e-4 * a) & (count < 50)

    def step(carry):
        return {"x": (carry["x"] + a / carry["x"]) / 2, "count": carry["count"] + 1}

    return fn.while_loop(goes_on, step, {"x": a, "count": 0})


def collatz(n):
    """A branch in a loop: the number of steps to 1."""

    def step(carry):
        n, count = carry
        return fn.cond(n % 2 == 0, lambda: n // 2, lambda: 3 * n + 1), count + 1

    return fn.while_loop(lambda carry: carry[0] != 1, step, (n, torch.tensor(0)))[1]


def loop_in_a_branch(x):
    """A while loop and a scan in branches, which close over what is outside."""
    total = x.sum()

    def grow():
        return fn.while_loop(lambda y: y.sum() < 10, lambda y: y + x.abs() + 0.1, x), total

    def run():
        carry, sums = fn.scan(lambda c, row: (torch.tanh(c + row), c.sum()), x, x.expand(3, 3))
        return carry, sums.sum() + total

    return fn.cond(total > 0, grow, run)


def branch_in_a_scan(x):
    """The carry changes in some iterations only, and the branches hold products."""
    w = torch.outer(x, x)

    def step(carry, i):
        carry = fn.switch(i % 3, [lambda: torch.tanh(w @ carry), lambda: carry, lambda: -carry])
        return carry, fn.cond(carry.sum() > 0, torch.sum, torch.prod, carry)

    return fn.scan(step, x, torch.arange(7))


def nested_branches(x):
    """A branch in a branch, and a loop whose condition is a branch."""
    inner = fn.cond(
        x[0] > 0, lambda: fn.cond(x[1] > 0, lambda: x + 1, lambda: x - 1), lambda: 2 * x
    )
    count, y = fn.while_loop(
        lambda c: fn.cond(c[0] < 3, lambda: True, lambda: (c[0] < 9) & (c[1].sum() < 5)),
        lambda c: (c[0] + 1, c[1] + inner.abs()),
        (torch.tensor(0), x),
    )
    return inner, count, y


def a_loop_in_a_loop(x):
    """A while loop in the body of another one, whose condition reads the outer carry."""

    def body(carry):
        total, limit = carry
        count = fn.while_loop(lambda c: c * c < limit, lambda c: c + 1, torch.tensor(0.0))
        return total + count, limit - 1 - x[0].abs()

    return fn.while_loop(lambda carry: carry[1] > 0, body, (torch.tensor(0.0), x.abs().sum() * 4))


def with_a_layer(x):
    """Layers in branches, rematerialised ones, with their pullbacks."""
    net = fn.remat(fn.serial(fn.linear(3), fn.tanh(), fn.linear(1)))
    params, _ = net.init(fn.key(1), x)

    def train():
        y, pullback, _ = net.vjp(params, x)
        return y, pullback(y)[0]

    return fn.cond(x.sum() > 0, train, lambda: (x[:1], params))


PROGRAMS = [
    loop_in_a_branch,
    branch_in_a_scan,
    nested_branches,
    a_loop_in_a_loop,
    with_a_layer,
    lambda x: newton(x[0].abs() + 0.1),
]
IDS = [getattr(each, "__name__", "program").replace("<lambda>", "newton") for each in PROGRAMS]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 10**6))
def test_it_is_the_python_loop(n):
    assert odd_part(torch.tensor(n)) == odd_part_by_hand(n)


@settings(max_examples=30, deadline=None)
@given(st.integers(-5, 9), st.floats(-3, 3))
def test_it_is_the_python_branch(index, value):
    x = torch.tensor(value)
    functions = [torch.sin, torch.square, torch.neg]
    chosen = functions[min(max(index, 0), 2)](x)
    assert_equal(fn.switch(index, functions, x), chosen)
    assert_equal(fn.switch(torch.tensor(index), functions, x), chosen)
    assert_equal(fn.cond(x > 0, torch.sin, torch.neg, x), x.sin() if value > 0 else -x)
    assert_equal(fn.cond(value > 0, torch.sin, torch.neg, x), x.sin() if value > 0 else -x)


@pytest.mark.parametrize("program", PROGRAMS, ids=IDS)
def test_programs_give_the_same_eagerly_compiled_and_mapped(program):
    expected = fn.tree.map(lambda *each: torch.stack(each), *[program(x) for x in X])
    assert_equal(fn.vmap(program)(X), expected)
    both = fn.jit(lambda x: (program(x[0]), fn.vmap(program)(x)))
    assert_equal(both(X), (program(X[0]), expected))


def test_members_have_their_own_number_of_iterations():
    n = torch.tensor([[12, 7, 64], [1, 40, 6]])
    expected = torch.tensor([[3, 7, 1], [1, 5, 3]])
    assert_equal(torch.vmap(torch.vmap(odd_part))(n), expected)
    assert_equal(fn.jit(fn.vmap(fn.vmap(odd_part)))(n), expected)
    steps = torch.tensor([[9, 16, 6], [0, 8, 8]])
    assert_equal(fn.vmap(fn.vmap(collatz))(n), steps)
    assert_equal(fn.jit(fn.vmap(fn.vmap(collatz)))(n), steps)


@pytest.fixture
def staged(monkeypatch, tmp_path):
    """Programs are run step by step, as those of other devices are."""

    def refuse(*args):
        raise UnsupportedError("for this test")

    monkeypatch.setenv("FUNCNET_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.compile", lambda graph, inputs: graph)
    monkeypatch.setattr("funcnet.compiler.compiled.Plan", refuse)


@pytest.mark.cpu_only
@pytest.mark.usefixtures("staged")
@pytest.mark.parametrize("program", PROGRAMS, ids=IDS)
def test_a_staged_program_gives_the_same(program):
    run = fn.jit(lambda x: (program(x[0]), fn.vmap(program)(x)))
    assert run.lower(X).why_not_one == "for this test"
    for x in (X, -X):
        assert_equal(run(x), (program(x[0]), fn.vmap(program)(x)))


def test_no_iteration_gives_the_carry():
    run = fn.jit(lambda x: fn.while_loop(lambda x: x.sum() < 0, lambda x: x + 1, x))
    x = torch.ones(3)
    found = run(x)
    assert_equal(found, x)
    assert found.data_ptr() != x.data_ptr()


def fails(x):
    """Raises when it is run, though not when it is traced."""
    return x[torch.full((3,), 1000) + x[:3].long()]


@pytest.mark.cpu_only
def test_what_is_not_taken_is_not_run():
    closed_over = torch.ones(3)

    def run(x, flag):
        first = fn.cond(flag, lambda: fails(closed_over).sum(), lambda: closed_over.sum())
        second = fn.switch(flag.long(), [lambda x: x, fails, fails], x)
        third = fn.while_loop(lambda y: flag & (y.sum() < 9), lambda y: y + fails(closed_over), x)
        return first, second, third

    compiled = fn.jit(run)
    assert_equal(
        compiled(torch.ones(3), torch.tensor(False)), (3 * X.new_ones(()), *[X.new_ones(3)] * 2)
    )
    mapped = fn.jit(fn.vmap(run))
    flags = torch.tensor([False, False])
    assert mapped(torch.ones(2, 3), flags)[0].tolist() == [3, 3]
    with pytest.raises(RuntimeError, match="index"):
        compiled(torch.ones(3), torch.tensor(True))
    with pytest.raises(RuntimeError, match="index"):
        mapped(torch.ones(2, 3), torch.tensor([False, True]))


@pytest.mark.cpu_only
def test_a_carry_has_the_donated_memory():
    def run(state):
        def body(state):
            x, count = state
            return fn.cond(count % 2 == 0, lambda: x * 2, lambda: x), count + 1

        return fn.while_loop(lambda state: state[1] < 5, body, state)

    state = (torch.ones(1000), torch.tensor(0))
    expected, addresses = run(state), [leaf.data_ptr() for leaf in state]
    compiled = fn.jit(run, donate=0)
    buffers = compiled.lower(state).buffers
    found = compiled(state)
    assert_equal(found, expected)
    assert [leaf.data_ptr() for leaf in found] == addresses
    # Neither branch copies, nor has memory of its own.
    assert max([int(size) for size in re.findall(r"a workspace w\d+ of (\d+)", buffers)]) < 1000
    assert "memcpy" not in compiled.lower((torch.ones(1000), torch.tensor(0))).code


@pytest.mark.cpu_only
def test_a_branch_that_gives_what_it_was_given_copies_nothing():
    def run(state, flag):
        return fn.cond(flag, lambda: torch.tanh(state) @ state, lambda: state)

    state = torch.eye(20)
    compiled = fn.jit(run, donate=0)
    code = compiled.lower(state, torch.tensor(False)).code
    assert "memcpy" not in code.partition("} else {")[2]
    for flag in (True, False):
        state = torch.eye(20)
        expected, address = run(state.clone(), torch.tensor(flag)), state.data_ptr()
        found = compiled(state, torch.tensor(flag))
        assert_equal(found, expected)
        assert found.data_ptr() == address


def test_a_number_that_a_jitted_function_is_given_chooses_at_run_time():
    run = fn.jit(lambda x, n: fn.cond(n > 2, torch.sin, torch.cos, x))
    for n in (1, 3):
        assert_equal(run(X, n), X.sin() if n > 2 else X.cos())


def test_torch_vmap_inside_a_jitted_function_has_one_loop_for_all_members():
    n = torch.tensor([[12, 7, 64], [1, 40, 6]])

    def doubled(limit):
        """What is carried is the same for all members at first."""
        start = (torch.tensor(0), torch.ones(2))
        return fn.while_loop(lambda c: c[0] < limit, lambda c: (c[0] + 1, 2 * c[1]), start)

    def run(n):
        return (
            torch.vmap(torch.vmap(odd_part))(n),
            fn.vmap(torch.vmap(doubled))(n),
            torch.vmap(lambda n: fn.cond(n[0] > 9, lambda: n + 1, lambda: n - 1))(n),
        )

    compiled = fn.jit(run)
    assert_equal(compiled(n), run(n))
    assert compiled(n)[1][1][0, :, 0].tolist() == [2.0**12, 2.0**7, 2.0**64]


def test_a_derivative_of_a_compiled_while_loop_is_refused():
    run = fn.jit(torch.func.grad(lambda x: fn.while_loop(lambda x: x < 9, lambda x: 2 * x, x)))
    with pytest.raises(ValueError, match=r"unrolling it.* use scan or fori, or leave jit out"):
        run(torch.tensor(1.0))


def test_a_derivative_of_a_compiled_branch_is_its_own():
    run = fn.jit(torch.func.grad(lambda x: fn.cond(x < 9, torch.square, torch.neg, x)))
    assert [run(torch.tensor(x)).item() for x in (3.0, 10.0)] == [6.0, -1.0]


@pytest.mark.cpu_only
def test_a_branch_prints_when_it_is_taken(capfd):
    def run(x):
        fn.cond(x > 0, lambda: fn.debug_print("positive: {x}", x=x), lambda: None)
        return fn.while_loop(lambda x: x < 2, lambda x: (fn.debug_print("{x}", x=x), x + 1)[1], x)

    compiled = fn.jit(run)
    assert compiled(torch.tensor(-1)) == 2
    assert compiled(torch.tensor(5)) == 5
    assert capfd.readouterr().out.split("\n")[:-1] == ["-1", "0", "1", "positive: 5"]


def test_fori_counts_to_a_number_that_is_known_at_run_time():
    def run(x, n):
        return fn.fori(1, n, lambda i, total: total + i * x, torch.zeros(2))

    compiled = fn.jit(run)
    for n in (0, 3, torch.tensor(4)):
        total = sum(range(1, int(n)))
        assert_equal(run(torch.ones(2), n), torch.full((2,), float(total)))
        assert_equal(compiled(torch.ones(2), n), torch.full((2,), float(total)))


def test_derivatives_go_through_what_was_run():
    def f(x):
        x = fn.while_loop(lambda x: x < 10, lambda x: x * x + 0.5, x)
        return fn.cond(x > 20, torch.sin, torch.square, x)

    x = torch.tensor([1.5, 20.0, 1.0])
    expected = torch.stack([torch.func.grad(f)(each) for each in x])
    assert_equal(torch.vmap(torch.func.grad(f))(x), expected)
    assert_equal(torch.func.grad(lambda x: torch.vmap(f)(x).sum())(x), expected)
    leaf = x[0].clone().requires_grad_()
    f(leaf).backward()
    assert_equal(leaf.grad, expected[0])


DIFFER = "one structure, with the same shapes and dtypes: {} gives {}, {} gives {}"


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "cond: expects on_true to be a function", lambda x: fn.cond(True, x, x)),
        (
            TypeError,
            "while_loop: expects body to be a function",
            lambda x: fn.while_loop(lambda x: True, x, x),
        ),
        (
            TypeError,
            r"switch: expects branches\[1\] to be a function",
            lambda x: fn.switch(0, [torch.sin, 3], x),
        ),
        (
            ValueError,
            r"cond: expects a predicate that is a 0-d tensor or a bool, got float32 \(2,\)",
            lambda x: fn.cond(x, torch.sin, torch.cos, x),
        ),
        (
            TypeError,
            "cond: expects a predicate that is a 0-d tensor or a bool, got",
            lambda x: fn.cond(None, torch.sin, torch.cos, x),
        ),
        (
            ValueError,
            r"while_loop: expects the condition to give a 0-d tensor or a bool, got bool \(2,\)",
            lambda x: fn.while_loop(lambda x: x < 9, lambda x: x, x),
        ),
        (
            ValueError,
            r"while_loop: the carry must keep .* as float32 \(2,\) and went out as bool \(2,\)",
            lambda x: fn.while_loop(lambda x: True, lambda x: x > 0, x),
        ),
        (ValueError, "at least one branch", lambda x: fn.switch(0, [])),
        (TypeError, "an integer index, got", lambda x: fn.switch(0.5, [torch.sin, torch.cos], x)),
        (ValueError, "a 0-d index, got", lambda x: fn.switch(x.long(), [torch.sin, torch.cos], x)),
    ],
)
def test_misuse_is_told(error, message, call):
    with pytest.raises(error, match=message):
        call(torch.ones(2))
    with pytest.raises(error, match=message):
        fn.jit(lambda x: (call(x), x)[1])(torch.ones(2))


@pytest.mark.parametrize(
    ("given", "branches"),
    [
        (("float32 (2,)", "bool (2,)"), (lambda x: x, lambda x: x > 0)),
        (("float32 (2,)", "float32 ()"), (lambda x: x, torch.sum)),
        (("float32 (2,)", "(float32 (2,))"), (lambda x: x, lambda x: (x,))),
    ],
)
def test_branches_that_differ_are_told(given, branches):
    def of_cond(x):
        return fn.cond(x[0] > 0, *branches, x)

    def of_switch(x):
        return fn.switch(x[0].long(), [branches[0], *branches], x)

    for names, call in (
        (["on_true", "on_false"], of_cond),
        (["branches[0]", "branches[2]"], of_switch),
    ):
        message = re.escape(DIFFER.format(names[0], given[0], names[1], given[1]))
        with pytest.raises(ValueError, match=message):
            fn.jit(call)(torch.ones(2))
        with pytest.raises(ValueError, match=message):
            torch.vmap(call)(torch.ones(3, 2))


def test_a_value_does_not_leave_its_body():
    def run(x):
        kept = []
        return fn.while_loop(lambda y: y[0] < 9, lambda y: kept.append(y + 1) or y * 2, x), kept[0]

    with pytest.raises(ValueError, match="used outside it"):
        fn.jit(run)(torch.ones(2))


def test_a_view_that_is_first_read_in_a_branch_after_a_write_is_there_for_all():
    def run(x, flag):
        y = x * 2
        row, column = y[0], y[:, 1]
        y.add_(1)  # row and column are made anew where they are read
        first = fn.cond(flag, lambda: row.sin(), lambda: row + column.sum())
        return first, row * 3, fn.scan(lambda c, v: (c + v, c), column.sum(), row)

    x = torch.arange(6.0).reshape(2, 3)
    compiled = fn.jit(run)
    for flag in (True, False):
        torch.testing.assert_close(
            compiled(x, torch.tensor(flag)), run(x, torch.tensor(flag)), rtol=1e-6, atol=1e-6
        )
