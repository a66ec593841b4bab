"""fixed_point: the solution and its gradients, against algebra and torch's autograd."""

import pytest
import torch
from cases_implicit import EXACT, cell

import funcnet as fn
from funcnet.testing import check_layer

DOUBLE = torch.float64
X = fn.random.normal(fn.key(1), (5, 6), DOUBLE)


def affine(features=6):
    """``W z + x``, whose fixed point is that of a linear system."""
    return fn.serial(fn.parallel(fn.identity(), fn.linear(features, bias=False)), fn.add())


def weights(scale):
    drawn = fn.random.normal(fn.key(7), (6, 6), DOUBLE)
    return scale * drawn / torch.linalg.matrix_norm(drawn, 2)


def params_of(weight):
    return {"0": {"1": {"weight": weight}}}


@pytest.mark.parametrize("history", [0, 3])
def test_a_linear_fixed_point_is_that_of_the_linear_system(history):
    weight, net = weights(0.9), fn.fixed_point(affine(), history=history, **EXACT)
    z, pullback, state = net.vjp(params_of(weight), X)
    inverse = torch.linalg.inv(torch.eye(6, dtype=DOUBLE) - weight)
    torch.testing.assert_close(z, X @ inverse.T, rtol=1e-11, atol=1e-11)
    dy = X.cos()
    dparams, dx = pullback(dy)
    u = dy @ inverse
    torch.testing.assert_close(dx, u, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(dparams["0"]["1"]["weight"], u.T @ z, rtol=1e-11, atol=1e-11)
    assert state["fixed_point"]["converged"]


def test_anderson_acceleration_takes_fewer_iterations():
    def iterations(history):
        net = fn.fixed_point(affine(), history=history, tol=1e-8, max_iter=500)
        return net.apply(params_of(weights(0.95)), X)[1]["fixed_point"]["iterations"]

    plain, three, ten = map(iterations, (0, 3, 10))
    assert three < plain / 2
    # With as many changes as unknowns per example it is a direct solver of the system.
    assert ten < three


def test_the_gradients_are_those_of_autograd_through_the_unrolled_loop():
    f = fn.serial(
        fn.parallel(
            fn.linear(6), fn.serial(fn.layer_norm(), fn.linear(9), fn.gelu(), fn.linear(6))
        ),
        fn.add(),
        fn.tanh(),
    )
    net = fn.fixed_point(f, **EXACT)
    params, state = net.init(fn.key(2), X)
    params = fn.tree.map(lambda leaf: 0.8 * leaf, params)
    y, pullback, state = net.vjp(params, X, state)
    assert state["fixed_point"]["converged"]
    leaves, treedef = fn.tree.flatten((params, X))
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    free, x = treedef.unflatten(leaves)
    z = torch.zeros_like(X)
    for _ in range(200):
        z, _ = f.apply(free, (x, z))
    torch.testing.assert_close(y, z.detach(), rtol=1e-11, atol=1e-11)
    expected = torch.autograd.grad(z, leaves, X.sin())
    found = fn.tree.leaves(pullback(X.sin()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_only_the_fixed_point_is_kept():
    net = fn.fixed_point(cell(), tol=1e-6)
    params, state = net.init(fn.key(0), X)
    y, pullback, _ = net.vjp(params, X, state)
    kept = {id(leaf) for leaf in fn.tree.leaves(pullback)}
    assert kept == {id(leaf) for leaf in fn.tree.leaves((params, X, y))}


def test_it_stops_at_the_tolerance_and_says_how_it_went():
    net = fn.fixed_point(affine(), history=0, tol=1e-3, max_iter=100)
    found = net.apply(params_of(weights(0.5)), X)[1]["fixed_point"]
    assert 3 < found["iterations"] < 15
    assert 0 < found["residual"] <= 1e-3
    assert found["converged"]
    few = fn.fixed_point(affine(), history=0, tol=1e-3, max_iter=2)
    found = few.apply(params_of(weights(0.5)), X)[1]["fixed_point"]
    assert found["iterations"] == 2
    assert found["residual"] > 1e-3
    assert not found["converged"]


def test_one_that_does_not_converge_says_so_in_the_metrics_and_gives_no_gradients():
    net = fn.serial(core=fn.fixed_point(affine(), history=0), head=fn.linear(1))
    step = fn.train_step(net, fn.mse(), fn.sgd(0.1))
    start = fn.init_train_state(net, fn.sgd(0.1), fn.key(0), X)
    for scale, converges in ((0.5, True), (2.0, False)):
        params = {**start.params, "core": params_of(weights(scale))}
        after, metrics = step(start._replace(params=params), (X, X[:, :1]))
        for way in ("", "backward_"):
            assert metrics[f"core.{way}converged"] == converges
            assert (metrics[f"core.{way}residual"] <= 1e-5) == converges
            assert (metrics[f"core.{way}iterations"] < 50) == converges
        state = fn.solver_figures(after.state)
        assert [*state] == [
            f"core.fixed_point.{name}" for name in ("iterations", "residual", "converged")
        ]
        assert state["core.fixed_point.converged"] == converges
        assert state["core.fixed_point.iterations"] == metrics["core.iterations"]
        assert after.params["core"]["0"]["1"]["weight"].isfinite().all() == converges
        assert fn.tree.paths(after.params) == fn.tree.paths(start.params)
    checked = fn.train_step(net, fn.mse(), fn.sgd(0.1), check_finite=True)
    with pytest.raises(ValueError, match="core"):
        checked(start._replace(params=params), (X, X[:, :1]))


def test_the_backward_pass_has_a_tolerance_and_a_limit_of_its_own():
    params, dy = params_of(weights(0.9)), X.cos()

    def dx(**options):
        return fn.fixed_point(affine(), history=0, **options).vjp(params, X)[1](dy)[1]

    exact = dx(**EXACT)
    rough = dx(**EXACT | {"backward_tol": 1e-2})
    assert 1e-4 < (rough - exact).norm() / exact.norm() < 0.2
    short = dx(**EXACT | {"backward_max_iter": 2})
    assert short.isnan().all()
    kept = dx(**EXACT | {"backward_max_iter": 2}, limit=10.0)
    torch.testing.assert_close(kept, dy + (dy + dy @ weights(0.9)) @ weights(0.9))


def test_noise_within_is_one_draw_for_all_iterations():
    net = fn.fixed_point(cell(fn.dropout(0.5)), **EXACT)
    f = net.children[""]
    params, _ = net.init(fn.key(0), X)
    z, _ = net.apply(params, X, key=fn.key(3), train=True)
    again, _ = f.apply(params, (X, z), key=fn.key(3), train=True)
    torch.testing.assert_close(again, z, rtol=1e-12, atol=1e-12)
    other, _ = f.apply(params, (X, z), key=fn.key(4), train=True)
    assert not torch.allclose(other, z)


def test_the_state_of_f_is_that_of_one_evaluation():
    f = fn.serial(fn.parallel(fn.batch_norm(), fn.linear(6)), fn.add(), fn.tanh())
    net = fn.fixed_point(f, tol=1e-6)
    params, state = net.init(fn.key(0), X)
    _, after = net.apply(params, X, state, train=True)
    own = {name: part for name, part in state.items() if name != "fixed_point"}
    _, once = f.apply(params, (X, X), own, train=True)
    del after["fixed_point"]
    assert fn.tree.compare(after, once) is None


def test_z_may_be_a_tree():
    def both(pair):
        x, (a, b) = pair
        return (x + 0.5 * b.sin()).tanh(), 0.3 * a * b.cos()

    f = fn.interop.autodiff(both)
    net = fn.fixed_point(f, lambda x: (torch.zeros_like(x), torch.ones_like(x)), **EXACT)
    a, b = net.apply({}, X)[0]
    torch.testing.assert_close(both((X, (a, b))), (a, b), rtol=1e-12, atol=1e-12)
    check_layer(net, X, meta=False)


def test_a_recurrent_cell_has_a_fixed_point():
    check_layer(fn.fixed_point(fn.rnn_cell(6), **EXACT), X)


def test_a_batch_of_one_member_each_is_solved_by_itself_under_vmap():
    net = fn.fixed_point(affine(), history=0, tol=1e-6, max_iter=200)
    scales = (0.2, 0.6, 0.9)
    members = params_of(torch.stack([weights(scale) for scale in scales]))
    together = fn.vmap(lambda params: net.apply(params, X))(members)
    alone = [net.apply(params_of(weights(scale)), X) for scale in scales]
    assert (
        fn.tree.compare(together[1], fn.tree.map(lambda *a: torch.stack(a), *alone)[1], rtol=1e-6)
        is None
    )
    a, b, c = together[1]["fixed_point"]["iterations"]
    assert a < b < c


@pytest.mark.cpu_only
def test_under_jit_it_is_one_loop_that_ends_early():
    net = fn.serial(fn.linear(6), fn.fixed_point(cell(), tol=1e-6), fn.linear(1))
    optimizer = fn.adam(1e-2)
    step = fn.train_step(net, fn.mse(), optimizer)
    start = fn.init_train_state(net, optimizer, fn.key(0), X)
    batch = X, X[:, :1].sin()
    jitted, eager = fn.jit(step), start
    compiled = start
    for _ in range(3):
        eager, _ = step(eager, batch)
        compiled, _ = jitted(compiled, batch)
    assert fn.tree.compare(eager, compiled, rtol=1e-6, atol=1e-9) is None
    population = fn.jit(fn.vmap(step, in_axes=(0, None)))
    several = fn.tree.map(lambda leaf: torch.stack([leaf, leaf]), start)
    one, _ = step(start, batch)
    first = fn.tree.map(lambda leaf: leaf[1], population(several, batch)[0])
    assert fn.tree.compare(first, one, rtol=1e-6, atol=1e-9) is None


def test_it_trains_in_micro_batches():
    net = fn.serial(fn.linear(6), fn.fixed_point(cell(), **EXACT), fn.linear(1))
    optimizer = fn.sgd(0.1)
    batch = X[:4], X[:4, :1]
    start = fn.init_train_state(net, optimizer, fn.key(0), X)
    whole, _ = fn.train_step(net, fn.mse(), optimizer)(start, batch)
    parts, _ = fn.train_step(net, fn.mse(), optimizer, micro_batches=2)(start, batch)
    assert fn.tree.compare(whole.params, parts.params, rtol=1e-9, atol=1e-12) is None


ERRORS = {
    "tol must be above 0, got 0": lambda: fn.fixed_point(cell(), tol=0),
    "backward_tol must be above 0": lambda: fn.fixed_point(cell(), backward_tol=-1.0),
    "max_iter must be an integer >= 1": lambda: fn.fixed_point(cell(), max_iter=0),
    "history must be an integer >= 0": lambda: fn.fixed_point(cell(), history=-1),
    "damping must be above 0 and at most 1": lambda: fn.fixed_point(cell(), damping=1.5),
    "limit must be above 0": lambda: fn.fixed_point(cell(), limit=0),
}


@pytest.mark.parametrize("message", ERRORS)
def test_bad_options_are_refused(message):
    with pytest.raises(ValueError, match=f"^fixed_point: {message}"):
        ERRORS[message]()


def test_an_f_that_does_not_keep_the_shape_is_refused_with_its_path():
    f = fn.serial(fn.concat(), fn.linear(3))
    net = fn.serial(fn.linear(6), fn.fixed_point(f))
    wrong = r"\['1'\] fixed_point: f must keep the shape and dtype of z, float64 \(5, 6\), got"
    with pytest.raises(ValueError, match=wrong):
        net.init(fn.key(0), X)
    bare = fn.fixed_point(f)
    with pytest.raises(ValueError, match="fixed_point: f must keep"):
        bare.apply(f.init(fn.key(0), (X, X))[0], X)
    with pytest.raises(ValueError, match=r"floating-point tensors as z, got int64 .* give start"):
        net.children["1"].apply({}, torch.arange(3))
    with pytest.raises(TypeError, match="fixed_point: expects a Layer"):
        fn.fixed_point(torch.tanh)
    with pytest.raises(TypeError, match="start"):
        fn.fixed_point(cell(), 3)


def test_the_gradients_of_f_are_deferred_layer_by_layer():
    net = fn.serial(fn.linear(6), fn.fixed_point(cell(), **EXACT))
    params, state = net.init(fn.key(0), X)
    y, pullback, _ = net.vjp(params, X, state)
    deferred, dx = fn.defer(pullback)(y)
    assert [path for path, _ in deferred.terms()] == ["0", "1.0.1.0"]
    assert fn.tree.compare((fn.gradients(deferred), dx), pullback(y)) is None


def test_a_summary_counts_an_evaluation():
    row = fn.summary(fn.fixed_point(cell()), X).total
    assert row.residual_bytes == 2 * X.nbytes  # x and z
    assert row.forward_flops > 0


AROUND = {
    "repeat": lambda layer: fn.repeat(layer, 2),
    "remat": fn.remat,
    "shared": lambda layer: fn.serial(fn.fan_out(2), fn.shared(layer), fn.add()),
    "freeze": lambda layer: fn.freeze(layer, ["0.1.0.weight"]),
    "weight_norm": lambda layer: fn.weight_norm(layer, "0.1.0.weight"),
    "tie": lambda layer: fn.tie(fn.serial(layer, layer), {"1.0.1.0.weight": "0.0.1.0.weight"}),
    "observe": fn.observe,
    "neural_ode": lambda layer: fn.neural_ode(layer, (0.0, 1.0), 2, "euler"),
    "itself": lambda layer: fn.fixed_point(
        fn.serial(fn.parallel(fn.identity(), layer), fn.add(), fn.linear(6), fn.tanh())
    ),
}


@pytest.mark.parametrize("name", AROUND)
def test_its_figures_are_among_the_metrics_whatever_is_around_it(name):
    net = fn.serial(fn.linear(6), AROUND[name](fn.fixed_point(cell())))
    optimizer = fn.adam(1e-2)
    start = fn.init_train_state(net, optimizer, fn.key(0), X)
    for parts in (1, 5):
        step = fn.train_step(net, fn.mse(), optimizer, micro_batches=parts)
        state, metrics = step(start, (X, X))
        found = [each for path, each in metrics.items() if path.endswith(".backward_converged")]
        assert found
        assert all((each == 1).all() for each in found)
        assert fn.tree.alike(state, start)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_gradients_are_linear_in_cotangents_whose_squares_float32_has_not(size):
    weight, net = weights(0.9).float(), fn.fixed_point(affine())
    _, pullback, _ = net.vjp(params_of(weight), X.float())
    dy = X.float().cos()
    torch.testing.assert_close(pullback(size * dy)[1] / size, pullback(dy)[1])
    assert not pullback(0 * dy)[1].any()


def test_one_directly_within_another_is_refused():
    inner = fn.serial(fn.parallel(fn.add(), fn.linear(6)), fn.add(), fn.tanh())
    net = fn.fixed_point(fn.fixed_point(inner, lambda pair: torch.zeros_like(pair[0])))
    with pytest.raises(ValueError, match="fixed_point: f has state called 'fixed_point' at its t"):
        net.init(fn.key(0), X)
