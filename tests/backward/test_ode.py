"""neural_ode: its solutions against exact ones, its gradients against torch's autograd."""

from itertools import pairwise

import pytest
import torch

import funcnet as fn

DOUBLE = torch.float64
X = fn.random.normal(fn.key(1), (5, 3), DOUBLE)
MATRIX = fn.random.normal(fn.key(2), (3, 3), DOUBLE)
LINEAR = fn.linear(3, bias=False)
NET = fn.serial(fn.linear(8), fn.tanh(), fn.linear(3))


def by_hand(method, f, t, h, y):
    """A step, written out."""
    if method == "euler":
        return y + h * f(t, y)
    if method == "midpoint":
        return y + h * f(t + h / 2, y + h / 2 * f(t, y))
    if method == "rk4":
        k1 = f(t, y)
        k2 = f(t + h / 2, y + h / 2 * k1)
        k3 = f(t + h / 2, y + h / 2 * k2)
        k4 = f(t + h, y + h * k3)
        return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    k1 = f(t, y)
    k2 = f(t + h / 5, y + h * k1 / 5)
    k3 = f(t + 3 * h / 10, y + h * (3 * k1 + 9 * k2) / 40)
    k4 = f(t + 4 * h / 5, y + h * (44 / 45 * k1 - 56 / 15 * k2 + 32 / 9 * k3))
    k5 = f(
        t + 8 * h / 9,
        y + h * (19372 * k1 / 6561 - 25360 * k2 / 2187 + 64448 * k3 / 6561 - 212 * k4 / 729),
    )
    k6 = f(
        t + h,
        y
        + h
        * (
            9017 * k1 / 3168 - 355 * k2 / 33 + 46732 * k3 / 5247 + 49 * k4 / 176 - 5103 * k5 / 18656
        ),
    )
    return y + h * (
        35 / 384 * k1 + 500 / 1113 * k3 + 125 / 192 * k4 - 2187 / 6784 * k5 + 11 / 84 * k6
    )


def exact(t):
    """``y(t)`` of ``dy/dt = A y``."""
    return X @ torch.linalg.matrix_exp(MATRIX * t).T


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_a_method_has_its_order(method, order):
    def error(steps):
        net = fn.neural_ode(LINEAR, (0.0, 0.5), steps, method)
        return (net.apply({"weight": MATRIX}, X)[0] - exact(0.5)).norm()

    assert (error(40) / error(80)).log2() == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "dopri5"])
@pytest.mark.parametrize("at_all", [False, True])
def test_the_gradients_are_those_of_autograd_through_the_steps(method, at_all):
    times = [0.0, 0.4, 1.5] if at_all else [0.0, 1.5]
    t = torch.tensor(times, dtype=DOUBLE) if at_all else tuple(times)
    net = fn.neural_ode(NET, t, 4 if method != "dopri5" else 100, method)
    params, state = net.init(fn.key(0), X)
    y, pullback, state = net.vjp(params, X, state)
    if method == "dopri5":
        kept = pullback.residuals["steps"]
        assert len(kept["t"]) == state["neural_ode"]["steps"]
        taken = [*zip(kept["t"].tolist(), kept["h"].tolist(), kept["next"] > 0, strict=True)]
    else:
        taken = [
            (start + n * (end - start) / 4, (end - start) / 4, n == 3)
            for start, end in pairwise(times)
            for n in range(4)
        ]
    leaves, treedef = fn.tree.flatten((params, X))
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    free, x = treedef.unflatten(leaves)
    ys, z = [x], x
    for start, h, ends in taken:
        z = by_hand(method, lambda t, y: NET.apply(free, y)[0], start, h, z)
        ys += [z] if ends else []
    expected = torch.stack(ys) if at_all else z
    torch.testing.assert_close(y, expected.detach(), rtol=1e-12, atol=1e-12)
    dy = y.cos()
    found = fn.tree.leaves(pullback(dy))
    for one, other in zip(found, torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_dopri5_is_as_exact_as_it_is_told_to_be():
    steps = []
    for tolerance in (1e-3, 1e-6, 1e-9):
        net = fn.neural_ode(LINEAR, (0.0, 2.0), 500, "dopri5", rtol=tolerance, atol=tolerance)
        y, state = net.apply({"weight": MATRIX}, X)
        error = (y - exact(2.0)).norm() / exact(2.0).norm()
        assert error < 30 * tolerance
        figures = state["neural_ode"]
        assert figures["finished"]
        assert figures["reached"] == 2.0
        steps.append(int(figures["steps"]))
    assert steps == sorted(set(steps))


def test_y_at_all_times_is_that_of_integration_up_to_each():
    times = torch.tensor([0.0, 0.5, 0.7])
    for method, options in (("rk4", {}), ("dopri5", {"rtol": 1e-9, "atol": 1e-9})):
        net = fn.neural_ode(LINEAR, times, 100, method, **options)
        ys, _ = net.apply({"weight": MATRIX}, X)
        assert torch.equal(ys[0], X)
        for t, y in zip(times.tolist(), ys, strict=True):
            torch.testing.assert_close(y, exact(t), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_f_may_take_the_time(method):
    # dy/dt = -2 t y, whose solution is exp(-t^2) y(0)
    f = fn.interop.autodiff(lambda pair: -2 * pair[0] * pair[1])
    net = fn.neural_ode(f, (0.5, 1.5), 60, method, takes_time=True, rtol=1e-9, atol=1e-9)
    y, pullback, _ = net.vjp({}, X)
    factor = torch.tensor(0.25 - 2.25, dtype=DOUBLE).exp()
    torch.testing.assert_close(y, factor * X, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pullback(X)[1], factor * X, rtol=1e-6, atol=1e-6)


def test_y_may_be_a_tree():
    # A pendulum: q' = p, p' = -sin q, whose energy stays.
    f = fn.interop.autodiff(lambda y: {"q": y["p"], "p": -y["q"].sin()})
    start = {"q": X, "p": X.flip(0)}

    def energy(y):
        return y["p"].square() / 2 - y["q"].cos()

    for method in ("rk4", "dopri5"):
        net = fn.neural_ode(f, (0.0, 3.0), 200, method, rtol=1e-8, atol=1e-8)
        y, pullback, _ = net.vjp({}, start)
        torch.testing.assert_close(energy(y), energy(start), rtol=1e-5, atol=1e-5)
        assert fn.tree.alike(pullback(y)[1], start)


def test_fewer_ys_are_kept_at_the_same_result():
    params, _ = NET.init(fn.key(0), X)
    expected = None
    for keep in (1, 2, 4, 8):
        net = fn.neural_ode(NET, (0.0, 1.0), 8, keep=keep)
        y, pullback, _ = net.vjp(params, X)
        assert fn.tree.count(pullback) == fn.tree.count(params) + 8 // keep * X.numel()
        results = y, pullback(y)
        expected = results if expected is None else expected
        assert fn.tree.compare(results, expected) is None


def test_too_few_steps_give_nan_and_say_so():
    net = fn.serial(fn.identity(), fn.neural_ode(LINEAR, (0.0, 2.0), 3, "dopri5"))
    y, state = net.apply({"1": {"weight": 10 * MATRIX}}, X)
    assert y.isnan().all()
    figures = fn.solver_figures(state)
    assert [*figures] == [
        f"1.neural_ode.{name}" for name in ("steps", "rejected", "reached", "finished")
    ]
    assert not figures["1.neural_ode.finished"]
    assert figures["1.neural_ode.steps"] + figures["1.neural_ode.rejected"] == 3
    assert 0 < figures["1.neural_ode.reached"] < 2


def test_an_f_that_gives_nan_ends():
    f = fn.interop.autodiff(lambda y: (1 - y).sqrt())  # NaN beyond 1
    net = fn.neural_ode(f, (0.0, 5.0), 50, "dopri5")
    y, state = net.apply({}, torch.full((1,), 2.0))
    assert y.isnan().all()
    assert not state["neural_ode"]["finished"]
    assert state["neural_ode"]["rejected"] == 50


def test_each_member_has_steps_of_its_own_under_vmap():
    net = fn.neural_ode(LINEAR, torch.tensor([0.0, 0.5, 1.0]), 200, "dopri5")

    def run(scale):
        y, pullback, state = net.vjp({"weight": scale * MATRIX}, X)
        return y, pullback(y.cos()), state

    scales = torch.tensor([0.1, 1.0, 4.0], dtype=DOUBLE)
    together = fn.vmap(run)(scales)
    alone = fn.tree.map(lambda *each: torch.stack(each), *[run(scale) for scale in scales])
    assert fn.tree.compare(together, alone, rtol=1e-9, atol=1e-12) is None
    a, b, c = together[2]["neural_ode"]["steps"]
    assert a < b < c


def test_noise_and_state_within():
    f = fn.serial(fn.linear(3), fn.batch_norm(), fn.dropout(0.5), fn.tanh())
    net = fn.neural_ode(f, (0.0, 1.0), 2, "euler")
    params, state = net.init(fn.key(0), X)
    y, after = net.apply(params, X, state, key=fn.key(5), train=True)
    middle = X + 0.5 * f.apply(params, X, state, key=fn.key(5), train=True)[0]
    k, last = f.apply(params, middle, state, key=fn.key(5), train=True)
    torch.testing.assert_close(y, middle + 0.5 * k)
    assert fn.tree.compare(after, last, rtol=1e-12) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_y_keeps_its_dtype(method, dtype):
    net = fn.neural_ode(LINEAR, (0.0, 0.5), 30, method, rtol=1e-2, atol=1e-2)
    y, pullback, _ = net.vjp({"weight": MATRIX.to(dtype)}, X.to(dtype))
    dparams, dx = pullback(y)
    assert y.dtype == dx.dtype == dparams["weight"].dtype == dtype
    torch.testing.assert_close(y.double(), exact(0.5), rtol=0.1, atol=0.1)


@pytest.mark.cpu_only
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_a_compiled_step_trains_as_the_eager_one(method):
    net = fn.serial(fn.neural_ode(NET, (0.0, 1.0), 20, method), fn.linear(1))
    optimizer = fn.adam(1e-2)
    step = fn.train_step(net, fn.mse(), optimizer)
    start = fn.init_train_state(net, optimizer, fn.key(0), X)
    batch = X, X[:, :1].sin()
    eager = compiled = start
    jitted = fn.jit(step)
    for _ in range(3):
        eager, _ = step(eager, batch)
        compiled, _ = jitted(compiled, batch)
    assert fn.tree.compare(eager, compiled, rtol=1e-6, atol=1e-9) is None
    several = fn.tree.map(lambda leaf: torch.stack([leaf, leaf]), start)
    one, _ = step(start, batch)
    population = fn.jit(fn.vmap(step, in_axes=(0, None)))
    first = fn.tree.map(lambda leaf: leaf[1], population(several, batch)[0])
    assert fn.tree.compare(first, one, rtol=1e-6, atol=1e-9) is None


def test_a_fixed_point_may_be_within():
    cell = fn.serial(fn.parallel(fn.linear(3), fn.linear(3)), fn.add(), fn.tanh())
    net = fn.neural_ode(fn.fixed_point(cell, tol=1e-12), (0.0, 1.0), 2, "midpoint")
    params, state = net.init(fn.key(0), X)
    y, pullback, state = net.vjp(params, X, state)
    assert state["fixed_point"]["converged"]
    expected = torch.func.vjp(lambda *arguments: net.apply(*arguments, state)[0], params, X)[1](y)
    assert fn.tree.compare(pullback(y), expected, rtol=1e-8, atol=1e-10) is None


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_a_summary_can_be_made_of_it(method):
    assert fn.summary(fn.neural_ode(NET, (0.0, 1.0), 3, method), X).total.backward_flops > 0


ERRORS = {
    "t must increase, got (1.0, 0.0)": {"t": (1, 0)},
    "t must increase, got (0.0, 1.0, 1.0)": {"t": torch.tensor([0.0, 1.0, 1.0])},
    "t must be a pair of numbers or a 1-d tensor of times, got (0, 1, 2)": {"t": (0, 1, 2)},
    "t must be a pair of numbers or a 1-d tensor of times, got 1.5": {"t": 1.5},
    "t must be a pair of numbers or a 1-d tensor of times, got float32 ()": {
        "t": torch.tensor(1.0)
    },
    "steps must be an integer >= 1, got 0": {"steps": 0},
    "method must be one of ['euler', 'midpoint', 'rk4', 'dopri5'], got 'rk5'": {"method": "rk5"},
    "keep must divide steps, got 3 and 4": {"keep": 3},
    "keep is not for 'dopri5', got 2": {"keep": 2, "method": "dopri5"},
    "rtol must be at least 0, got -1": {"rtol": -1},
    "rtol or atol must be above 0": {"rtol": 0, "atol": 0},
}


@pytest.mark.parametrize("message", ERRORS)
def test_bad_options_are_refused(message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        fn.neural_ode(NET, **{"t": (0.0, 1.0), "steps": 4} | ERRORS[message])
    assert str(caught.value) == f"neural_ode: {message}"


def test_an_f_that_does_not_keep_the_shape_is_refused_with_its_path():
    wrong = fn.neural_ode(fn.linear(4), (0.0, 1.0), 2)
    message = r"neural_ode: f must keep the shape and dtype of y, float64 \(5, 3\), got"
    with pytest.raises(ValueError, match=rf"serial\['ode'\] {message}"):
        fn.serial(ode=wrong).init(fn.key(0), X)
    params, _ = fn.linear(4).init(fn.key(0), X)
    with pytest.raises(ValueError, match=message):
        wrong.apply(params, X)
    with pytest.raises(TypeError, match="neural_ode: expects floating-point tensors as x, got int"):
        wrong.apply(params, torch.arange(3))
    with pytest.raises(TypeError, match="neural_ode: expects a Layer"):
        fn.neural_ode(torch.tanh, (0.0, 1.0), 2)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_some_of_its_params_may_be_frozen(method):
    net = fn.neural_ode(NET, (0.0, 1.0), 40, method)
    params, _ = net.init(fn.key(0), X)
    frozen, learned = fn.tree.partition(lambda path: path.startswith("0."), params)
    _, pullback, _ = net.vjp(params, X)
    dparams, dx = pullback(X)
    _, pullback, _ = fn.freeze(net, "0").vjp(learned, X, {"frozen": frozen})
    some, same_dx = pullback(X)
    torch.testing.assert_close(some, {"2": dparams["2"]})
    torch.testing.assert_close(same_dx, dx)


def test_a_lora_of_it_learns():
    net = fn.lora(fn.neural_ode(fn.serial(fn.linear(3), fn.tanh()), (0.0, 1.0), 4), rank=2)
    fn.testing.check_layer(net, X)


def test_one_directly_within_another_is_refused():
    net = fn.neural_ode(fn.neural_ode(LINEAR, (0.0, 1.0), 9, "dopri5"), (0.0, 1.0), 9, "dopri5")
    with pytest.raises(ValueError, match="neural_ode: f has state called 'neural_ode' at its top"):
        net.init(fn.key(0), X)
    with pytest.raises(ValueError, match="t must be finite"):
        fn.neural_ode(LINEAR, (0.0, float("inf")), 4)
