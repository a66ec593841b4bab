"""Python numbers as arguments of jitted functions: what eager gives, or a refusal by name."""

import functools
import math
import operator
import tempfile

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st

import funcnet as fn
from funcnet.compiler.errors import UnsupportedError
from funcnet.compiler.numbers import NUMBERS, Arithmetic, TracedNumber
from funcnet.compiler.record import record
from funcnet.compiler.specs import input_spec

X = torch.tensor([-1.5, 0.0, 2.0])
NAMES = ("a", "b", "c")


def limited(function):
    """The function, for numbers of which the result does not fill the memory."""

    def run(a, b):
        if abs(a) > 2**64 or abs(b) > 64:
            raise OverflowError("too large for a test")
        return function(a, b)

    return run


BINARY = [
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv),
    *(operator.mod, limited(operator.pow), operator.and_, operator.or_, operator.xor),
    *(
        limited(operator.lshift),
        operator.rshift,
        operator.lt,
        operator.le,
        operator.eq,
        operator.ne,
        min,
        max,
    ),
    lambda a, b: divmod(a, b)[0],
    lambda a, b: divmod(a, b)[1],
    lambda a, b: a if a < b else b + 1,
]
UNARY = [
    *(operator.neg, operator.pos, abs, operator.invert, round, math.floor, math.ceil, math.trunc),
    lambda a: round(a, 1),
    lambda a: 1 if a else 2.0,
    lambda a: a * 2 if isinstance(a, int) else a / 2,
]
MEETS = [
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.lt),
    *(operator.eq, torch.add, torch.maximum, torch.remainder, torch.true_divide),
    lambda x, n: n - x,
    lambda x, n: n / x,
    lambda x, n: n**x,
    lambda x, n: torch.where(x > 0, n, x),
    lambda x, n: torch.where(x > 0, n, 1),
    lambda x, n: x.clamp(min=n),
    lambda x, n: torch.full((2,), n),
    lambda x, n: torch.full_like(x, n),
    lambda x, n: torch.tensor([n, 1.5]),
    lambda x, n: torch.as_tensor(n) * x,
    lambda x, n: torch.tensor(n) + 1,
    lambda x, n: x.clone().fill_(n),
    lambda x, n: x.clone().add_(n),
    lambda x, n: torch.add(x, x, alpha=n),
    lambda x, n: torch.nn.functional.leaky_relu(x, n),
    lambda x, n: x.masked_fill(x > 0, n),
    lambda x, n: torch.stack([x * n, x]),
    lambda x, n: fn.fori(0, 3, lambda i, c: c * 1.1, n),
    lambda x, n: fn.scan(lambda c, y: (c + y.sum().to(c.dtype), c), n, x)[1],
    lambda x, n: fn.vmap(lambda row: row * n)(x),
    lambda x, n: x * fn.vmap(lambda row: n)(x),
    lambda x, n: n,
]
DTYPES = [
    *(torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.uint8),
    torch.bool,
]
values = st.one_of(
    st.booleans(),
    st.integers(-6, 6),
    st.sampled_from([2**33, -(2**40), 300]),
    st.sampled_from([0.0, -0.0, 0.1, -1.5, 2.5, 1e-3, 0.999, math.inf, math.nan]),
)


def expressions(depth=3):
    """Functions of a dict of numbers, with a text to show."""
    leaf = st.one_of(
        st.sampled_from(NAMES).map(lambda name: (name, lambda n, name=name: n[name])),
        values.map(lambda value: (repr(value), lambda n, value=value: value)),
    )

    def more(inner):
        return st.one_of(
            st.tuples(st.sampled_from(range(len(UNARY))), inner).map(
                lambda t: (f"u{t[0]}({t[1][0]})", lambda n, t=t: UNARY[t[0]](t[1][1](n)))
            ),
            st.tuples(st.sampled_from(range(len(BINARY))), inner, inner).map(
                lambda t: (
                    f"b{t[0]}({t[1][0]}, {t[2][0]})",
                    lambda n, t=t: BINARY[t[0]](t[1][1](n), t[2][1](n)),
                )
            ),
        )

    return st.recursive(leaf, more, max_leaves=depth + 1)


def outcome(function, *args):
    """What a call gives, or the error that it raises."""
    try:
        return function(*args)
    except Exception as error:
        return error


def same_number(found, expected):
    return type(found) is type(expected) and repr(found) == repr(expected)


@given(expressions(), st.tuples(values, values, values), st.tuples(values, values, values))
@settings(
    max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
def test_recorded_arithmetic_is_pythons(expression, first, second):
    text, function = expression
    arithmetic = Arithmetic(first, NAMES)
    expected = outcome(function, dict(zip(NAMES, first, strict=True)))
    found = outcome(function, dict(zip(NAMES, arithmetic.given, strict=True)))
    if isinstance(expected, Exception):
        assert isinstance(found, (type(expected), TypeError)), text
        return
    if isinstance(found, Exception):
        # A complex number, say: refused by name.
        assert "the number" in str(found), text
        return
    if not isinstance(found, TracedNumber):
        assert same_number(found, expected), text
        return
    assert same_number(found._value, expected), text
    assert isinstance(found, type(expected)), text
    arithmetic.inputs[found._index] = 0
    if [*map(type, first)] == [*map(type, second)]:
        again = outcome(arithmetic.again, second)
        expected = outcome(function, dict(zip(NAMES, second, strict=True)))
        if again is None:  # the function is traced anew
            return
        if isinstance(again, Exception):
            assert type(again) is type(expected), text
        else:
            assert same_number(again[0], expected), text


@pytest.fixture
def interpreted():
    """Programs of which no segment is compiled, so that many can be tried."""

    def refuse(*args):
        raise UnsupportedError("for this test")

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("FUNCNET_CACHE_DIR", folder)
        patch.setattr("torch._inductor.compile", lambda graph, inputs: graph)
        patch.setattr("funcnet.compiler.compiled.Plan", refuse)
        yield


def function_of(expression, meets, dtype):
    def run(x, a, b, c):
        return MEETS[meets](x.to(dtype), expression[1]({"a": a, "b": b, "c": c}))

    return run


@pytest.mark.usefixtures("interpreted")
@given(
    expressions(2),
    st.sampled_from(range(len(MEETS))),
    st.sampled_from(DTYPES),
    st.tuples(values, values, values),
    st.tuples(values, values, values),
)
@settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
def test_a_function_of_numbers_and_a_tensor_equals_the_eager_one(
    expression, meets, dtype, first, second
):
    run = function_of(expression, meets, dtype)
    compiled = fn.jit(run)
    for numbers in (first, second, first):
        what = f"{expression[0]} {meets} {dtype} {numbers}"
        expected, found = outcome(run, X, *numbers), outcome(compiled, X, *numbers)
        if isinstance(found, Exception) and not isinstance(expected, Exception):
            assert "the number" in str(found) or "too large" in str(found), f"{what}: {found!r}"
        else:
            assert_same(found, expected, what)


def assert_same(found, expected, what):
    if isinstance(expected, Exception):
        assert isinstance(found, Exception), f"{what}: {found!r} where eager has {expected!r}"
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, what
        torch.testing.assert_close(
            found, expected, equal_nan=True, msg=lambda text: f"{what}: {text}"
        )
    else:
        assert same_number(found.item(), expected), what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_compiled_functions_of_numbers_equal_the_eager_ones(dtype):
    def refused(run):
        arithmetic = Arithmetic((2.5, 3, 1), NAMES)
        recorded = outcome(
            record, lambda x: [run(x, *arithmetic.given)], [input_spec(X)], arithmetic
        )
        return isinstance(recorded, Exception)

    # The last one gives the number itself, which is no tensor.
    runs = [
        function_of(("", lambda n: n["a"] * n["b"] - n["c"]), meets, dtype)
        for meets in range(len(MEETS) - 1)
    ]
    taken = [run for run in runs if not refused(run)]
    assert len(taken) > 20
    together = fn.jit(lambda x, *numbers: [run(x, *numbers) for run in taken])
    for numbers in ((2.5, 3, 1), (-0.75, 2, 1)):
        for run, found in zip(taken, together(X, *numbers), strict=True):
            assert_same(found, run(X, *numbers), f"{dtype} {numbers}")


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (lambda x, n: x * 10**-n, (X, 3)),
        (lambda x, a, b: x * (a + b), (X, True, True)),
        (lambda x, n: x * (n / 3), (X.double(), 1)),
        (lambda x, t: x / (1 - 0.999**t), (X.double(), 1)),
        (lambda x, n: x * ~n, (X, 3)),
        (lambda x, n: x * -n, (X, True)),
        (lambda x, a, b: x * (a - b), (X, True, False)),
        (lambda x, n: x * round(n), (X, 2.5)),
        (lambda x, n: x * divmod(n, 0.1)[0], (X, 1.0)),
        (lambda x, n: x * (n // 0.1), (X, 1.0)),
        (lambda x, n: x * (n * n) if n < 2**40 else x, (X, 2**20)),
        (lambda k, p: fn.random.bernoulli(k, p, (64,)), (fn.key(0), 0.5)),
        (lambda k, a, b: fn.random.uniform(k, (64,), minval=a, maxval=b), (fn.key(0), -1, 2.5)),
        (lambda k, n: fn.random.normal(fn.random.fold_in(k, n), (4,)), (fn.key(0), 7)),
        (lambda seed: fn.random.bits(fn.key(seed), (4,)), (2**32 + 5,)),
        (lambda n: fn.fori(0, 3, lambda i, c: c * 1.1, n), (0.5,)),
        (lambda n: fn.scan(lambda c, x: (c + x, n), n, X)[1], (0.5,)),
        (lambda n: torch.stack([torch.as_tensor(n), torch.tensor(1.0)]), (0.5,)),
        (lambda x, p: fn.dropout(p).apply({}, x, key=fn.key(0), train=True)[0], (X, 0.25)),
        (lambda x, n: x**n, (torch.tensor([-math.inf, -0.0]), 0.5)),
        (lambda x, n: f"{n:.2f}" == "0.50" and x * 2, (X, 0.5)),
        (lambda x, b: x * 2 if b is True else x, (X, True)),
        (lambda x, n: torch.tensor([n, 0.1], dtype=torch.float64), (X, 0.3)),
        (lambda x, n: torch.full((2,), n, dtype=torch.int32), (X, 3)),
    ],
)
def test_what_a_hunt_found(function, arguments):
    found, expected = fn.jit(function)(*arguments), function(*arguments)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


WHERE = torch.tensor([0, 2])
FORMULAS = [
    lambda x, n: torch.add(x, x, alpha=n),
    lambda x, n: torch.sub(x, x + 1, alpha=n),
    lambda x, n: x.clone().add_(x, alpha=n),
    lambda x, n: torch.rsub(x, x + 1, alpha=n),
    lambda x, n: torch.addcmul(x, x, x, value=n),
    lambda x, n: torch.addcdiv(x, x, x + 3, value=n),
    lambda x, n: x.clone().addcmul_(x, x, value=n),
    lambda x, n: torch.lerp(x, x + 1, n),
    lambda x, n: F.pad(x, (1, 2), value=n),
    lambda x, n: F.pad(x[None], (1, 0, 0, 1), "constant", n),
    lambda x, n: F.leaky_relu(x, n),
    lambda x, n: F.elu(x, n),
    lambda x, n: F.celu(x, n),
    lambda x, n: F.softplus(x, beta=n),
    lambda x, n: F.softplus(x, threshold=n),
    lambda x, n: F.hardtanh(x, -1.0, n),
    lambda x, n: F.hardshrink(x, n),
    lambda x, n: F.softshrink(x, n),
    lambda x, n: F.threshold(x, n, 0.25),
    lambda x, n: F.threshold(x, 0.25, n),
    lambda x, n: torch.clamp(x, max=n),
    lambda x, n: x.clamp_min(n),
    lambda x, n: x.clone().clamp_(-n, n),
    lambda x, n: torch.full_like(x, n),
    lambda x, n: x.new_full((2,), n),
    lambda x, n: x.new_tensor([n, 1]),
    lambda x, n: torch.scalar_tensor(n),
    lambda x, n: torch.linspace(0.0, n, 5),
    lambda x, n: torch.linspace(n, 3, 4, dtype=torch.float64),
    lambda x, n: torch.logspace(0, n, 4),
    lambda x, n: x.nan_to_num(n, n + 1, n + 2),
    lambda x, n: torch.quantile(x.nan_to_num(0.0), n / 4),
    lambda x, n: torch.isclose(x, x + 0.7, rtol=n, atol=0.1),
    lambda x, n: torch.logit(x.nan_to_num(0.0).abs() / 4, n / 8),
    lambda x, n: torch.addmm(x[:2], x[:2, None], x[None, :2], alpha=n),
    lambda x, n: torch.addmm(x[:2], x[:2, None], x[None, :2], beta=n, alpha=0.5),
    lambda x, n: torch.addmv(x, torch.eye(len(x)), x, alpha=n),
    lambda x, n: torch.addr(x[None], x[:1], x, alpha=n),
    lambda x, n: torch.baddbmm(x[None, None, :2], x[None, :2, None], x[None, None, :2], beta=n),
    lambda x, n: torch.addbmm(x[:2], x[None, :2, None], x[None, None, :2], alpha=n),
    lambda x, n: x.index_add(0, WHERE, x[:2], alpha=n),
    lambda x, n: x.index_fill(0, WHERE, n),
    lambda x, n: x.scatter(0, WHERE, n),
    lambda x, n: x.clone().index_fill_(0, WHERE, n),
    lambda x, n: written(x, 0, n),
    lambda x, n: written(x, WHERE, n),
    lambda x, n: written(x, x > 0, n),
    lambda x, n: x // n,
    lambda x, n: n // (x.abs() + 1),
    lambda x, n: F.huber_loss(x, x + 1, delta=n),
    lambda x, n: F.huber_loss(x, x + 1, reduction="none", delta=n),
    lambda x, n: F.smooth_l1_loss(x, 2 * x, beta=n),
    lambda x, n: F.smooth_l1_loss(x, 2 * x, reduction="sum", beta=n),
]


def written(x, index, n):
    y = x.clone()
    y[index] = n
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_that_torch_takes_as_no_tensors_are_traced_by_formulas(dtype):
    x = torch.tensor([-1.5, 0.0, 2.0, 0.7, math.nan, math.inf]).to(dtype)
    for which, function in enumerate(FORMULAS):
        for first, second in ((0.5, 1.75), (2, 3)):
            if isinstance(outcome(function, x, first), Exception):
                continue
            arithmetic = Arithmetic((first,), ["n"])
            function_of_x = functools.partial(lambda x, f, n: [f(x, n)], f=function)
            recorded = record(
                functools.partial(function_of_x, n=arithmetic.given[0]), [input_spec(x)], arithmetic
            )
            inputs = arithmetic.again((second,))
            assert inputs, which
            numbers = [torch.tensor(each, dtype=NUMBERS[type(each)]) for each in inputs]
            run = torch.fx.Interpreter(torch.fx.GraphModule({}, recorded.graph)).run
            (found,), expected = run(x, *recorded.captured, *numbers), function(x, second)
            tolerance = {"rtol": 8e-3, "atol": 8e-3} if dtype == torch.bfloat16 else {}
            torch.testing.assert_close(
                found,
                expected,
                equal_nan=True,
                msg=lambda text, which=which: f"{which}: {text}",
                **tolerance,
            )


@pytest.mark.parametrize(
    ("error", "message", "function", "number"),
    [
        (TypeError, r"the number argument 1 is needed as an int", lambda x, n: x[: int(n)], 2),
        (TypeError, r"the number argument 1 is needed as an int", lambda x, n: x[:n], 2),
        (TypeError, r"argument 1 is needed as a float", lambda x, n: x * math.sin(n), 2.0),
        (TypeError, r"argument 1 is hashed", lambda x, n: x * {1: 2}[n], 1),
        (
            TypeError,
            r"argument 1 goes to layer_norm",
            lambda x, n: F.layer_norm(x, (3,), eps=n),
            0.1,
        ),
        (
            TypeError,
            r"argument 1 goes to arange, .* name it in static=\n",
            lambda x, n: torch.arange(n),
            2,
        ),
        (TypeError, r"static=\n  .*test_numbers.py:\d+: .*x\[:n\]", lambda x, n: x[:n], 2),
        (TypeError, r"argument 1 becomes a complex", lambda x, n: x * n**0.5, -2),
        (TypeError, r"argument 1 goes to full", lambda x, n: torch.full((n,), 2.0), 2),
        (TypeError, r"argument 1 is asked for its is_integer", lambda x, n: n.is_integer(), 2.0),
        (TypeError, r"argument 1 goes to mul_", lambda x, n: x.long().mul_(n), 0.5),
        (TypeError, r"argument 1 goes to where", lambda x, n: torch.where(x > 0, x.byte(), n), 300),
        (OverflowError, "too big", lambda x, n: x * (n * n), 2**33),
        (ZeroDivisionError, "division", lambda x, n: x * (1 / n), 0),
        (RuntimeError, "negative integer powers", lambda x, n: x.long() ** n, -1),
        (RuntimeError, "negative integer powers", lambda x, n: x.long() ** -2, 1),
    ],
)
def test_numbers_that_are_refused(error, message, function, number):
    with pytest.raises(error, match=message):
        fn.jit(function)(X, number)


def test_a_number_of_a_tree_is_named():
    with pytest.raises(TypeError, match=r"the number argument 0 at 'size' is needed as an int"):
        fn.jit(lambda options: X[: options["size"]])({"size": 2})


def test_an_error_of_python_comes_from_later_calls_too():
    compiled = fn.jit(lambda x, n: x * (1 / n))
    torch.testing.assert_close(compiled(X, 2), X / 2)
    with pytest.raises(ZeroDivisionError):
        compiled(X, 0)
    compiled = fn.jit(lambda x, n: x.long() ** n)
    torch.testing.assert_close(compiled(X, 5), X.long() ** 5)
    with pytest.raises(RuntimeError, match="negative integer powers"):
        compiled(X, -5)


@pytest.mark.parametrize("order", [(0, 4, 0), (4, 0, 4)])
def test_an_error_that_the_function_catches(order):
    def run(x, n):
        try:
            y = 1 / n
        except ZeroDivisionError:
            y = 0.5
        return x * y

    compiled = fn.jit(run)
    for n in order:
        torch.testing.assert_close(compiled(X, n), run(X, n))


def test_a_branch_is_traced_once_each_way():
    calls = []

    def run(x, n):
        calls.append(None)
        return x * n if n > 2 else x

    compiled = fn.jit(run)
    for n in (1, 2, 3, 4, 1, 5, 0):
        torch.testing.assert_close(compiled(X, n), X * n if n > 2 else X)
    assert len(calls) == 2


def test_another_value_of_another_type_is_traced_anew():
    compiled = fn.jit(lambda x, n: x.long() * 10**n)
    for n in (2, 0, -1, 3, -2):
        found, expected = compiled(X, n), X.long() * 10**n
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected)


def test_later_calls_with_other_numbers_are_recognized_and_others_are_not():
    reads = []

    def run(x, options, flag):
        y = x * options["rate"] if flag else -x
        return y + 1 if options["n"] > 2 else y

    compiled = fn.jit(run)
    read = compiled._dispatcher._read
    compiled._dispatcher._read = lambda *args: reads.append(args) or read(*args)
    calls = [
        *[(0.5, 3, True), (0.25, 3, True), (math.nan, 7, True), (math.inf, 2**40, True)],
        *[(2, 3, True), (0.5, 1, True), (0.5, 0, True), (0.5, 3, False), (0.75, 9, False)],
    ]
    seen = []
    for rate, n, flag in calls:
        options = {"rate": rate, "n": n}
        expected, before = run(X, options, flag), len(reads)
        found = compiled(X, options, flag)
        seen.append(len(reads) - before)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    # Another type, another branch and another bool are looked up.
    assert seen == [1, 0, 0, 0, 1, 1, 0, 1, 0]


def test_numpys_numbers_count_as_pythons():
    numpy = pytest.importorskip("numpy")
    compiled = fn.jit(lambda x, a, b, c: x * a + b if c is True else -x)
    for numbers in ((0.5, 2, True), (0.25, 3, True), (0.5, 2, False)):
        a, b, c = numpy.float64(numbers[0]), numpy.int64(numbers[1]), numpy.bool_(numbers[2])
        torch.testing.assert_close(compiled(X, a, b, c), compiled(X, *numbers))


@pytest.mark.parametrize(("first", "second"), [(2, 7), (0.5, 0.25)])
def test_a_tensor_is_subtracted_from_a_number(first, second):
    for x in (torch.tensor(3.0), torch.tensor([1, 2]), torch.tensor([3.0], dtype=torch.bfloat16)):
        arithmetic = Arithmetic((first,), ["n"])
        function = functools.partial(lambda x, n: [n - x], n=arithmetic.given[0])
        recorded = record(function, [input_spec(x)], arithmetic)
        inputs = arithmetic.again((second,))
        numbers = [torch.tensor(each, dtype=NUMBERS[type(each)]) for each in inputs]
        run = torch.fx.Interpreter(torch.fx.GraphModule({}, recorded.graph)).run
        torch.testing.assert_close(run(x, *recorded.captured, *numbers)[0], second - x)
