"""jit: when it compiles, what it gives, what it does with donated memory, and what it refuses."""

import copy
import functools
import os
import pickle
import re
import subprocess
import sys
import threading

import pytest
import torch

import funcnet as fn
from funcnet.compiler.errors import NoCompilerError, UnsupportedError

NET = fn.serial(fn.linear(8), fn.relu(), fn.linear(2))
X = fn.random.normal(fn.key(1), (6, 3))
TARGET = fn.random.normal(fn.key(2), (6, 2))


def counted(function):
    """The function, and how often Python ran it: once a trace."""
    calls = []

    @functools.wraps(function)
    def run(*args, **kwargs):
        calls.append(None)
        return function(*args, **kwargs)

    return run, calls


def assert_same(found, expected):
    for one, other in zip(fn.tree.leaves(found), fn.tree.leaves(expected), strict=True):
        torch.testing.assert_close(one, other)


def training(optimizer):
    return fn.train_step(NET, fn.mse(), optimizer), fn.init_train_state(
        NET, optimizer, fn.key(0), X
    )


@pytest.mark.parametrize("optimizer", [fn.sgd(0.1), fn.adam(0.01)], ids=["sgd", "adam"])
@pytest.mark.parametrize("donate", [(), 0])
def test_a_jitted_step_trains_as_the_eager_one(optimizer, donate):
    step, state = training(optimizer)
    compiled, expected = fn.jit(step, donate=donate), state
    state = fn.tree.map(torch.clone, state)
    for _ in range(5):
        state, metrics = compiled(state, (X, TARGET))
        expected, expected_metrics = step(expected, (X, TARGET))
    assert_same((state, metrics), (expected, expected_metrics))
    assert type(state) is fn.TrainState


def test_another_value_needs_no_new_program_and_another_shape_needs_one():
    run, calls = counted(lambda x, rate: rate * x)
    compiled = fn.jit(run)
    for rate in range(1000):
        torch.testing.assert_close(compiled(X, rate / 1000), X * (rate / 1000))
    assert len(calls) == 1
    torch.testing.assert_close(compiled(X[:4], 0.5), X[:4] * 0.5)
    assert len(calls) == 2
    compiled(X, 0.5)
    compiled(X[:4], 0.5)
    assert len(calls) == 2
    assert compiled(X.double(), 0.5).dtype == torch.float64
    assert len(calls) == 3


def test_a_schedule_of_a_thousand_steps_compiles_once():
    run, calls = counted(
        lambda rate, state, batch: fn.train_step(NET, fn.mse(), fn.sgd(rate))(state, batch)
    )
    compiled = fn.jit(run)
    _, state = training(fn.sgd(0.1))
    expected = state
    for step in range(1000):
        rate = 0.1 * 0.99**step
        state, _ = compiled(rate, state, (X, TARGET))
        if step < 5:
            expected, _ = fn.train_step(NET, fn.mse(), fn.sgd(rate))(expected, (X, TARGET))
            assert_same(state, expected)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "x",
    [
        torch.tensor(1.5),
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.tensor(3, dtype=torch.int32),
        torch.arange(3),
        torch.arange(3.0, dtype=torch.float16),
        torch.tensor([True, False]),
        torch.tensor(True),
    ],
    ids=lambda x: f"{x.dtype} {x.dim()}",
)
@pytest.mark.parametrize("number", [0.5, 3, True])
def test_a_number_promotes_as_pythons_do(x, number):
    def run(x, number):
        return {
            "times": x * number,
            "over": x / (number + 1),
            "minus": 1 - number + x,
            "where": torch.where(x > 1, number, x),
            "of a list": x.reshape(-1)[:1] + number * 2,
        }

    found, expected = fn.jit(run)(x, number), run(x, number)
    assert fn.tree.map(lambda leaf: leaf.dtype, found) == fn.tree.map(
        lambda leaf: leaf.dtype, expected
    )
    assert_same(found, expected)


def test_a_number_and_a_tensor_like_it_have_programs_of_their_own():
    run = fn.jit(lambda x, factor: x * factor)
    x = torch.tensor(1.5)
    for _ in range(2):
        assert run(x, 2.0).dtype == torch.float32
        assert run(x, torch.tensor(2.0, dtype=torch.float64)).dtype == torch.float64


def test_static_arguments_are_seen_by_value():
    run, calls = counted(lambda x, n, kind="sum": getattr(x.expand(n, *x.shape), kind)())
    compiled = fn.jit(run, static=(1, "kind"))
    x = torch.ones(3)
    assert compiled(x, 2) == 6
    assert compiled(x, 4) == 12
    assert compiled(x, 4, kind="mean") == 1
    assert compiled(x, 2) == 6
    assert len(calls) == 3
    assert fn.jit(run, static="n")(x, 5) == 15
    assert fn.jit(run, static="n")(x, n=5) == 15
    assert fn.jit(run, static=1)(x, n=5) == 15
    with pytest.raises(TypeError, match="must be hashable, got a list"):
        compiled(x, [1])


def test_what_it_closes_over_is_read_at_each_call():
    weight = torch.ones(3)
    compiled = fn.jit(lambda x: x * weight)
    torch.testing.assert_close(compiled(torch.ones(3)), torch.ones(3))
    weight.mul_(5)
    torch.testing.assert_close(compiled(torch.ones(3)), torch.full((3,), 5.0))
    transposed = torch.arange(6.0).reshape(2, 3).T
    torch.testing.assert_close(fn.jit(lambda x: x + transposed)(torch.zeros(3, 2)), transposed)


def test_inputs_may_lie_in_memory_in_any_way():
    compiled = fn.jit(lambda x, y: x @ y + x.sum())
    a, b = fn.random.normal(fn.key(0), (5, 4)), fn.random.normal(fn.key(1), (5, 3))
    torch.testing.assert_close(compiled(a.T, b), a.T @ b + a.sum())
    wide = fn.random.normal(fn.key(2), (4, 10))
    torch.testing.assert_close(compiled(wide[:, ::2], b), wide[:, ::2] @ b + wide[:, ::2].sum())
    scalar = torch.ones(()).expand(4, 5)
    torch.testing.assert_close(compiled(scalar, b), scalar @ b + scalar.sum())


@pytest.mark.parametrize("size", [0, 1])
def test_empty_and_single_batches(size):
    def step(w, x):
        return x @ w.T, (x @ w.T).sum(0), x.t() @ x

    w, x = torch.ones(4, 3), torch.ones(size, 3)
    assert_same(fn.jit(step)(w, x), step(w, x))


SIZES = [(1, 1, 1), (7, 33, 130), (64, 300, 17), (300, 257, 2100)]
FEW_ROWS = [(1, 257, 300), (4, 1030, 131), (3, 70, 2100)]


@pytest.mark.parametrize("shape", [*SIZES, *FEW_ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.cpu_only
def test_products_of_all_sizes_and_layouts(shape, dtype):
    m, n, k = shape
    a, b = (
        fn.random.normal(fn.key(each), size, dtype) for each, size in ((0, (m, k)), (1, (k, n)))
    )
    bias = fn.random.normal(fn.key(2), (n,), dtype)
    column = fn.random.normal(fn.key(3), (m, 1), dtype)

    def products(a, b, at, bt, bias, column):
        return (
            a @ b,
            at.T @ b,
            a @ bt.T,
            at.T @ bt.T,
            torch.addmm(bias, a, b),
            torch.addmm(column, at.T, bt.T),
            torch.cat([a @ b, a @ b], 1),
            torch.stack([a, a]) @ torch.stack([b, 2 * b]),
        )

    arguments = (a, b, a.T.contiguous(), b.T.contiguous(), bias, column)
    compiled = fn.jit(products)
    assert compiled.lower(*arguments).why_not_one is None
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {}
    for found, expected in zip(compiled(*arguments), products(*arguments), strict=True):
        torch.testing.assert_close(found, expected, **tolerance)


def test_nan_and_infinity_pass_through():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1.0])

    def run(x):
        return torch.relu(x), x.max(), torch.sort(x), x.exp(), x * 0

    for found, expected in zip(fn.tree.leaves(fn.jit(run)(x)), fn.tree.leaves(run(x)), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
        *(torch.int64, torch.int32, torch.bool),
    ],
)
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.cpu_only
def test_a_sort_is_torchs_stable_one(dtype, descending):
    x = fn.random.randint(fn.key(0), (4, 50, 3), -5, 5).to(dtype)

    def run(x):
        return torch.sort(x, dim=1, stable=True, descending=descending)

    assert fn.jit(run).lower(x).why_not_one is None
    for found, expected in zip(fn.jit(run)(x), run(x), strict=True):
        assert torch.equal(found, expected)


def test_draws_are_the_eager_ones():
    def draws(key):
        return (
            fn.random.uniform(key, (70_000,)),
            fn.random.normal(key, (5,), torch.float64),
            fn.random.bits(fn.random.fold_in(key, "name"), (3, 4)),
            fn.random.permutation(key, 100),
            fn.random.split(fn.random.fold_in(key, torch.tensor(7)), 3),
            fn.random.categorical(key, torch.zeros(3, 4)),
            fn.random.randint(key, (5,), 0, 9),
        )

    found, expected = fn.jit(draws)(fn.key(5)), draws(fn.key(5))
    assert torch.equal(found[0], expected[0])
    assert_same(found, expected)
    for one, other in zip(found[2:], expected[2:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.cpu_only
def test_a_donated_argument_is_updated_in_place_and_then_gone():
    step, state = training(fn.adam(0.01))
    state = fn.tree.map(torch.clone, state)
    places = {leaf.data_ptr() for leaf in fn.tree.leaves((state.params, state.opt_state))}
    weight, key = state.params["0"]["weight"], state.key
    after, _ = fn.jit(step, donate=0)(state, (X, TARGET))
    assert {leaf.data_ptr() for leaf in fn.tree.leaves((after.params, after.opt_state))} == places
    for use in (lambda: weight + 1, lambda: weight.shape, lambda: step(state, (X, TARGET))):
        with pytest.raises(RuntimeError, match="was donated"):
            use()
    with pytest.raises(RuntimeError, match="was donated"):
        fn.jit(step, donate=0)(state, (X, TARGET))
    assert "donated" in repr(weight)
    # What came out as it went in is still there.
    assert after.key is key
    assert torch.equal(key, fn.key(0))


@pytest.mark.cpu_only
@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + 1,
        lambda x: x.shape,
        lambda x: x.data_ptr(),
        lambda x: x.numpy(),
        lambda x: x.tolist(),
        lambda x: copy.copy(x),
        lambda x: pickle.dumps(x),
        lambda x: torch.utils.dlpack.to_dlpack(x),
        lambda x: x.__dlpack__(),
        lambda x: torch.add(torch.ones(3), 1, out=x),
        lambda x: fn.jit(lambda x: x + 1)(x),
        lambda x: fn.jit(lambda y: y + x)(torch.ones(3)),
    ],
)
def test_every_use_of_a_donated_tensor_is_an_error(use):
    x = torch.ones(3)
    fn.jit(lambda x: x * 2, donate=0)(x)
    with pytest.raises(RuntimeError, match=r"was donated|Cannot access data pointer"):
        use(x)


def test_a_donated_tensor_can_be_shown_and_told_from_others():
    x = torch.ones(3)
    name, number = id(x), hash(x)
    (y,) = fn.jit(lambda x: (x * 2,), donate=0)(x)
    for text in (repr(x), str(x), f"{x}"):
        assert text == "<a tensor that was donated to a jitted function>"
    assert (id(x), hash(x)) == (name, number)
    assert {x: 1}[x] == 1
    # Its memory is out of reach of those who do not ask for its class.
    assert x.as_subclass(torch.Tensor).numel() == 0
    assert torch.equal(y, torch.full((3,), 2.0))


def test_donated_memory_must_not_be_shared():
    compiled = fn.jit(lambda p, q: (p["a"] + q, p["b"] * q), donate=0)
    x = torch.ones(4)
    with pytest.raises(
        ValueError, match=r"argument 0 at 'a' is donated and shares memory with argument 1:"
    ):
        compiled({"a": x, "b": torch.ones(4)}, x)
    with pytest.raises(ValueError, match=r"shares memory"):
        compiled({"a": x, "b": x[:4]}, torch.ones(4))
    buffer = torch.ones(6)
    with pytest.raises(ValueError, match="shares memory"):
        compiled({"a": buffer[:4], "b": torch.ones(4)}, buffer[2:])
    a, b = compiled({"a": x, "b": torch.ones(4)}, torch.ones(4))
    torch.testing.assert_close((a, b), (torch.full((4,), 2.0), torch.ones(4)))


@pytest.mark.cpu_only
def test_donated_values_that_trade_places():
    compiled = fn.jit(lambda a, b, c: (b, a + c, a, b * 2), donate=(0, 1))
    a, b, c = torch.ones(3), torch.full((3,), 2.0), torch.full((3,), 3.0)
    found = compiled(a.clone(), b.clone(), c)
    assert_same(found, (b, a + c, a, b * 2))


@pytest.mark.cpu_only
def test_a_result_takes_the_memory_of_what_it_is_computed_from_in_any_order():
    optimizer = fn.adam(0.1)
    params = {"a": torch.ones(3), "b": torch.zeros(3)}

    def update(grads, opt_state, params):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return fn.apply_updates(params, updates), opt_state

    opt_state = optimizer.init_state(params)
    expected = update({"a": torch.ones(3), "b": torch.ones(3)}, opt_state, params)
    before = [leaf.data_ptr() for leaf in fn.tree.leaves((params, opt_state))]
    compiled = fn.jit(update, donate=(1, 2))
    found = compiled({"a": torch.ones(3), "b": torch.ones(3)}, opt_state, params)
    assert [leaf.data_ptr() for leaf in fn.tree.leaves(found)] == before
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_it_works_in_every_grad_mode(mode):
    step, state = training(fn.sgd(0.1))
    expected, _ = step(state, (X, TARGET))
    compiled = fn.jit(step)
    with mode():
        found, _ = compiled(state, (X, TARGET))
        again, _ = compiled(found, (X, TARGET))
        wanting = fn.tree.map(lambda leaf: leaf.clone().requires_grad_(), state.params)
        traced_with_grad, _ = compiled(state._replace(params=wanting), (X, TARGET))
    assert_same(found, expected)
    assert_same(traced_with_grad, expected)
    assert not any(leaf.requires_grad for leaf in fn.tree.leaves((found, again, traced_with_grad)))


def test_inside_another_transformation_it_is_the_function_itself():
    square = fn.jit(lambda x: (x**2).sum())
    x = torch.arange(3.0)
    torch.testing.assert_close(torch.func.grad(square)(x), 2 * x)
    torch.testing.assert_close(fn.vmap(square)(torch.stack([x, 2 * x])), torch.tensor([5.0, 20.0]))
    torch.testing.assert_close(fn.jit(lambda x: square(x) + square(2 * x))(x), torch.tensor(25.0))
    assert fn.jit(lambda x: x + 1)(torch.ones(2, device="meta")).is_meta


def test_a_pullback_is_an_argument_and_a_result():
    forward = fn.jit(lambda params, x: NET.vjp(params, x)[:2])
    backward = fn.jit(lambda pullback, dy: pullback(dy))
    params, _ = NET.init(fn.key(0), X)
    y, pullback = forward(params, X)
    expected_y, expected_pullback, _ = NET.vjp(params, X)
    assert_same(y, expected_y)
    assert_same(backward(pullback, TARGET), expected_pullback(TARGET))


def test_trees_come_back_as_they_are():
    def run(x):
        return {"b": (x, None), "a": [x + 1, {"c": 2}], "n": 1.5}

    found = fn.jit(run)(X)
    assert list(found) == ["b", "a", "n"]
    assert found["b"][0] is X
    assert found["b"][1] is None
    assert found["a"][1]["c"] == 2
    assert found["n"].dtype == torch.float64


def test_writes_to_tensors_of_its_own_are_allowed():
    def run(x):
        y = x * 1
        y[0] = 7
        y[1:] += 1
        y.view(-1).mul_(2)
        z = y.to(torch.int64)
        z &= 3
        return y, z

    assert_same(fn.jit(run)(X), run(X))


OUTSIDE = torch.zeros(3)


@pytest.mark.parametrize(
    ("error", "message", "function", "arguments"),
    [
        (TypeError, "reads the value", lambda x: x if x.sum() > 0 else -x, (X,)),
        (TypeError, "reads the value", lambda x, n: x[: int(n)], (X, 2)),
        (TypeError, "reads the value", lambda x: x.tolist(), (X,)),
        (ValueError, "writes in place to argument 0", lambda x: x.add_(1), (X,)),
        (ValueError, "to a tensor it closes over", lambda x: OUTSIDE.add_(1) + x, (X,)),
        (ValueError, "to a tensor it closes over", lambda x: OUTSIDE.add_(x), (X,)),
        (ValueError, "torch's generator", lambda x: x + torch.rand(3), (X,)),
        (TypeError, "got 'text' as argument 0 at '1'", lambda x: x[0], ((X, "text"),)),
        (TypeError, "returns tensors and numbers, got 'text'", lambda x: "text", (X,)),
        (ValueError, "linear: ", lambda x: NET.apply(NET.init(fn.key(0), X)[0], x), (X[:, :2],)),
    ],
)
def test_misuse_is_told(error, message, function, arguments):
    with pytest.raises(error, match=message):
        fn.jit(function)(*arguments)
    torch.testing.assert_close(OUTSIDE, torch.zeros(3))


def test_options_are_checked():
    with pytest.raises(TypeError, match="donate expects positions"):
        fn.jit(abs, donate="x")
    with pytest.raises(TypeError, match="static expects"):
        fn.jit(abs, static=(1.5,))
    with pytest.raises(ValueError, match="cannot be donated and static"):
        fn.jit(abs, donate=0, static=0)
    with pytest.raises(ValueError, match=r"donate=\(3,\), but there are 1 positional"):
        fn.jit(lambda x: x + 1, donate=3)(X)


@pytest.mark.cpu_only
def test_lower_shows_the_graph_and_the_code():
    step, state = training(fn.sgd(0.1))
    lowered = fn.jit(step).lower(state, (X, TARGET))
    assert "aten.addmm" in lowered.graph
    assert "funcnet::product<float, true, 1, 6, 8, 3" in lowered.code
    assert lowered.why_not_one is None


def test_threads_do_not_disturb_each_other():
    step, state = training(fn.adam(0.01))
    compiled = fn.jit(step)
    expected, _ = compiled(state, (X, TARGET))
    wrong = []

    def work():
        for _ in range(200):
            found, _ = compiled(state, (X, TARGET))
            if not torch.equal(found.params["0"]["weight"], expected.params["0"]["weight"]):
                wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.cpu_only
def test_without_a_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiled = fn.jit(lambda x: x + 41)
    with pytest.raises(NoCompilerError, match=r"found no no-such-compiler: install g\+\+"):
        compiled(X)
    monkeypatch.delenv("CXX")
    torch.testing.assert_close(compiled(X), X + 41)


PROGRAM = """
import sys, torch, funcnet as fn
step = fn.train_step(fn.linear(2), fn.mse(), fn.sgd(0.1))
state = fn.init_train_state(fn.linear(2), fn.sgd(0.1), fn.key(0), torch.ones(4, 3))
fn.jit(step)(state, (torch.ones(4, 3), torch.zeros(4, 2)))
print("torch._inductor.graph" in sys.modules)
"""


@pytest.mark.cpu_only
def test_programs_are_kept_on_disk_for_other_processes(tmp_path):
    def run():
        environment = os.environ | {"FUNCNET_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    # Inductor, which takes long to import, is needed only once.
    assert run() == "True"
    assert sorted([path.suffix for path in tmp_path.iterdir()]) == [".cpp", ".so"]
    assert run() == "False"
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.cpu_only
def test_a_broken_file_on_disk_is_made_anew(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def run(x):
        return x * 3

    monkeypatch.setenv("FUNCNET_CACHE_DIR", str(whole))
    fn.jit(run)(X)
    cut.mkdir()
    for path in whole.iterdir():
        (cut / path.name).write_bytes(path.read_bytes()[:100])
    monkeypatch.setenv("FUNCNET_CACHE_DIR", str(cut))
    torch.testing.assert_close(fn.jit(run)(X), run(X))
    for path in whole.iterdir():
        assert (cut / path.name).read_bytes() == path.read_bytes()


@pytest.fixture
def interpreted(monkeypatch):
    """Staged programs whose segments are not compiled: for the logic of the stages."""
    monkeypatch.setattr("torch._inductor.compile", lambda graph, inputs: graph)
    monkeypatch.setattr("funcnet.compiler.compiled.Plan", refuse)


def refuse(*args):
    raise UnsupportedError("for this test")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.cpu_only
def test_a_staged_program_gives_the_same(monkeypatch, tmp_path):
    monkeypatch.setenv("FUNCNET_CACHE_DIR", str(tmp_path))
    net = fn.remat(fn.serial(fn.linear(4), fn.batch_norm(), fn.dropout(0.2), fn.linear(1)))
    step = fn.train_step(net, fn.mse(), fn.sgd(0.1, 0.9))
    data = (X, X.sum(1, keepdim=True))

    def train(key, scale):
        def epoch(state, key):
            batches = fn.epoch_batches(key, (data[0] * scale, data[1]), 2)
            state, metrics = fn.scan(step, state, batches)
            return state, (metrics["loss"], scale)

        start = fn.init_train_state(net, fn.sgd(0.1, 0.9), key, X)
        return fn.scan(epoch, start, fn.random.split(key, 2))

    keys = fn.random.split(fn.key(3), 4).reshape(2, 2, 2)
    scales = torch.tensor([1.0, 2.0])
    nested = fn.vmap(fn.vmap(train, in_axes=(0, None)), in_axes=(0, 0))
    compiled = fn.jit(nested)
    assert compiled.lower(keys, scales).why_not_one == "for this test"
    assert_same(compiled(keys, scales), nested(keys, scales))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.cpu_only
def test_a_staged_population_views_memory_of_other_layouts(monkeypatch, tmp_path):
    monkeypatch.setenv("FUNCNET_CACHE_DIR", str(tmp_path))
    net = fn.serial(fn.embedding(5, 3), fn.flatten(), fn.linear(2))
    tokens = torch.tensor([[0, 3], [4, 4], [1, 2]])

    def run(key):
        params, _ = net.init(key, tokens)
        y, pullback, _ = net.vjp(params, tokens)
        return y, pullback(y)

    keys = fn.random.split(fn.key(0), 3)
    assert_same(fn.jit(fn.vmap(run))(keys), fn.vmap(run)(keys))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.cpu_only
@pytest.mark.parametrize("unroll", [1, 2])
def test_a_staged_scan_in_reverse_gives_the_same(unroll, monkeypatch, tmp_path):
    monkeypatch.setenv("FUNCNET_CACHE_DIR", str(tmp_path))

    def run(xs):
        def body(carry, x):
            return torch.sin(carry) + x, (carry * x, x)

        return fn.scan(body, torch.zeros(3), xs, reverse=True, unroll=unroll)

    xs = fn.random.normal(fn.key(0), (2, 5, 3))
    assert_same(fn.jit(run)(xs[0]), run(xs[0]))
    assert_same(fn.jit(fn.vmap(run))(xs), fn.vmap(run)(xs))


def test_views_of_what_it_closes_over_and_of_results():
    weight = fn.random.normal(fn.key(0), (4, 3))
    turned = fn.random.normal(fn.key(1), (3, 4)).T

    def run(x):
        y = (x @ weight.T).T + 1
        sums = fn.vmap(lambda row: (row @ weight.T, row @ turned.T, y[:, 0] + 1, weight))(x)
        z = y.T
        total, _ = fn.scan(lambda c, row: (c + row, None), torch.zeros(4), z)
        return y, z, z.reshape(-1), sums, total, y[1:3], weight[1], x.T

    assert_same(fn.jit(run)(X), run(X))


def sorted_twice(x):
    first = fn.scan(lambda c, _: (c + 1, None), x, length=3)[0]
    second = fn.scan(lambda c, _: (c * 1.1, None), first, length=3)[0]
    return torch.sort(second, 0, descending=True).values, second


BIG = torch.arange(12.0).reshape(4, 3)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: torch.sort(x.t()).values * 2, (4, 3)),
        (lambda x: torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), WEIGHT).relu(), (2, 5, 6, 3)),
        (lambda x: (fn.scan(lambda c, r: (c + r, c), x, PART)[0], PART[1], PART[1:]), (3,)),
        (sorted_twice, (4, 3)),
        (
            lambda x: fn.vmap(lambda r: torch.cat([r, r * 2]))(x[:2]).reshape(4, 3),
            (4, 3),
        ),
        (
            lambda x: (
                fn.vmap(lambda r: fn.scan(lambda a, b: (a + b, None), r[0], r)[0])(x),
                x + 1,
            )[1],
            (4, 3),
        ),
    ],
)
def test_memory_that_a_fuzzer_found_mistaken(function, shape):
    x = fn.random.normal(fn.key(0), shape)
    expected = function(x)
    assert_same(fn.jit(function)(x), expected)
    assert_same(fn.jit(function, donate=0)(x.clone()), expected)


PART = BIG[1:]
WEIGHT = fn.random.normal(fn.key(7), (4, 3, 3, 3))


def test_remat_of_a_view_with_an_offset():
    layer = fn.remat(fn.serial(fn.conv2d(4, 3), fn.relu()))
    images = fn.random.normal(fn.key(0), (3, 2, 3, 8, 8))
    params, _ = layer.init(fn.key(1), images[0])

    def run(params, images):
        y, pullback, _ = layer.vjp(params, images[1])
        return pullback(y * 2)

    assert_same(fn.jit(run)(params, images), run(params, images))


def test_the_default_dtype_is_part_of_the_program():
    def run(i):
        return i / 2, torch.ones(3) * i.sum()

    compiled, i = fn.jit(run), torch.arange(5)
    compiled(i)
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(compiled(i), run(i))
        assert_same(fn.jit(run)(i), run(i))
        assert compiled(i)[0].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.cpu_only
def test_donated_memory_is_not_that_of_a_captured_tensor():
    held = torch.ones(3)
    with pytest.raises(ValueError, match="with a tensor that the function closes over"):
        fn.jit(lambda x: x * 2 + held.flip(0), donate=0)(held[:])


@pytest.mark.usefixtures("two_threads")
def test_a_population_of_convolutions_on_two_threads():
    layer = fn.conv2d(4, 3)
    x = fn.random.normal(fn.key(0), (3, 8, 3, 8, 8))
    params, _ = layer.init(fn.key(1), x[0])

    def run(a):
        y, pullback, _ = layer.vjp(params, a)
        return pullback(y)

    assert_same(fn.jit(fn.vmap(run))(x), fn.vmap(run)(x))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (fn.max_pool2d(3, stride=1), fn.random.normal(fn.key(0), (64, 8, 16, 16))),
        (fn.embedding(3, 64), fn.random.randint(fn.key(0), (1 << 14,), 0, 3)),
    ],
    ids=["max_pool2d", "embedding"],
)
@pytest.mark.cpu_only
def test_two_threads_add_up_in_one_order(layer, x):
    params, _ = layer.init(fn.key(1), x)

    def run(x, dy):
        return layer.vjp(params, x)[1](dy)

    dy = fn.random.normal(fn.key(2), tuple(layer.apply(params, x)[0].shape))
    compiled = fn.jit(run)
    assert compiled.lower(x, dy).why_not_one is None
    first = compiled(x, dy)
    assert_same(first, run(x, dy))
    for _ in range(20):
        again = compiled(x, dy)
        for one, other in zip(fn.tree.leaves(first), fn.tree.leaves(again), strict=True):
            assert torch.equal(one, other)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.cpu_only
def test_an_index_out_of_range_is_an_error():
    rows, tokens = fn.random.normal(fn.key(0), (10, 64)), torch.zeros(5000, dtype=torch.int64)
    pick = fn.jit(lambda rows, tokens: rows[tokens].sum(1))
    wrong = tokens.clone()
    wrong[4000] = 10
    for _ in range(3):
        with pytest.raises(RuntimeError, match="out of bounds: expected 0 <= index < 10"):
            pick(rows, wrong)
        torch.testing.assert_close(pick(rows, tokens), rows[tokens].sum(1))

    given = rows.clone()
    add = fn.jit(lambda rows, tokens: rows + rows[tokens].sum(0), donate=0)
    with pytest.raises(RuntimeError, match="what was donated is lost"):
        add(given, wrong)
    with pytest.raises(RuntimeError, match="donated"):
        _ = given + 1


@pytest.mark.cpu_only
def test_memory_goes_with_its_last_reader():
    layers = [layer for _ in range(8) for layer in (fn.linear(64), fn.relu())][:-1]
    blocks = [fn.remat(fn.serial(*layers[start : start + 4])) for start in range(0, 16, 4)]
    x = torch.zeros(512, 64)
    # In activations: seven and two cotangents; three, two of a block and its cotangent.
    for net, expected in ((fn.serial(*layers), 9), (fn.serial(*blocks), 6)):
        step = fn.train_step(net, fn.mse(), fn.sgd(0.1))
        start = fn.init_train_state(net, fn.sgd(0.1), fn.key(0), x)
        code = fn.jit(step, donate=0).lower(start, (x, x)).code
        (workspace,) = re.findall(r"Workspace workspace\((\d+)\)", code)
        gradients = 2 * 64 * 64 * 4
        assert int(workspace) <= expected * 512 * 64 * 4 + gradients + 4096


@pytest.mark.cpu_only
def test_lower_shows_which_values_share_memory():
    def run(w, xs):
        w = fn.scan(lambda w, x: (w * x, w.sum()), w, xs)[0]
        return torch.sort(w, 0).values, xs

    lowered = fn.jit(run, donate=0).lower(X, X[:4, :1].clone())
    assert "scan of 4 iterations, 1 carried" in lowered.blocks
    assert "primitive aten::sort" in lowered.blocks
    first, *rest = lowered.buffers.splitlines()
    assert first == "in[0]: float32[6, 3], argument 0; donated, becomes output 0"
    assert "output 1 is in[1]" in rest
    (workspace,) = re.findall(r"Workspace workspace\((\d+)\)", lowered.code)
    assert f"a workspace w0 of {workspace} bytes" in lowered.buffers
    assert re.search(r"^loop 1, scan of 4 iterations, 1 carried, ", lowered.buffers, re.M)
    # The carry starts in the donated argument, and each slice is read where it is.
    assert re.search(r"in\[0\]: getitem, then mul", lowered.buffers)
    assert re.search(r"\(in\[1\] \+ i1 \* 4\): getitem_1", lowered.buffers)


@pytest.mark.cpu_only
def test_lower_of_a_function_that_does_nothing():
    lowered = fn.jit(lambda x: x).lower(X)
    assert "no statements" in lowered.buffers
    assert "output 0 is in[0]" in lowered.buffers
