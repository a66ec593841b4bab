"""Optimizers against torch.optim: every option, purity, structure, transformations, bad input."""

import itertools

import optree
import pytest
import torch
from optimizers.tables import TABLES

import funcnet as fn

F64 = torch.float64
STEPS = 10


def numbers(*shape, seed=0, dtype=F64):
    # Drawn on the CPU, so that the numbers are the same on any device.
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=F64, device="cpu")
    return drawn.to(torch.get_default_device(), dtype)


def some_params(dtype=F64):
    return {
        "hidden": {"weight": numbers(3, 2, dtype=dtype), "bias": numbers(2, seed=1, dtype=dtype)},
        "scale": numbers(seed=2, dtype=dtype),
        "out": {"weight": numbers(2, 3, seed=3, dtype=dtype)},
    }


def grads_at(step, params):
    """Gradients that depend on the params, so that an error grows from step to step."""
    seeds = itertools.count(100 * (step + 1))
    return optree.tree_map(
        lambda p: (numbers(*p.shape, seed=next(seeds)) + 0.3 * p.double().sin()).to(p.dtype),
        params,
    )


def run(optimizer, params, steps=STEPS, grads_of=grads_at):
    opt_state = optimizer.init_state(params)
    for step in range(steps):
        updates, opt_state = optimizer.update(grads_of(step, params), opt_state, params)
        params = fn.apply_updates(params, updates)
    return params, opt_state


def run_torch(make, params, schedule=None):
    leaves, treedef = optree.tree_flatten(params)
    leaves = [torch.nn.Parameter(leaf.clone()) for leaf in leaves]
    optimizer = make(leaves)
    scheduler = schedule and torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    default = torch.get_default_dtype()
    for step in range(STEPS):
        current = treedef.unflatten([leaf.detach() for leaf in leaves])
        for leaf, grad in zip(leaves, optree.tree_leaves(grads_at(step, current)), strict=True):
            leaf.grad = grad
        torch.set_default_dtype(F64)  # that of the numbers in the state of NAdam and ASGD
        try:
            optimizer.step()
        finally:
            torch.set_default_dtype(default)
        if scheduler:
            scheduler.step()
    return treedef.unflatten([leaf.detach() for leaf in leaves])


def assert_trees_close(found, expected, rtol=1e-12, atol=1e-12):
    assert optree.tree_structure(found) == optree.tree_structure(expected)
    for a, b in zip(optree.tree_leaves(found), optree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def assert_trees_equal(found, expected):
    assert optree.tree_structure(found) == optree.tree_structure(expected)
    for a, b in zip(optree.tree_leaves(found), optree.tree_leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def combinations(**values):
    rows = [
        dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())
    ]
    return [row for row in rows if not row.get("nesterov") or nesterov_fits(row)]


def nesterov_fits(row):
    return row["momentum"] > 0 and row["dampening"] == 0


ADAM = {
    "betas": [(0.9, 0.999), (0.0, 0.5), (0.7, 0.0)],
    "eps": [1e-8, 1e-2],
    "weight_decay": [0.0, 0.1],
    "amsgrad": [False, True],
    "maximize": [False, True],
}
OPTIONS = {
    "sgd": combinations(
        momentum=[0.0, 0.5, 0.9],
        dampening=[0.0, 0.3, 1.5],
        weight_decay=[0.0, 0.1],
        nesterov=[False, True],
        maximize=[False, True],
    ),
    "adam": combinations(**ADAM),
    "adamw": combinations(**ADAM),
    "rmsprop": combinations(
        alpha=[0.99, 0.5],
        eps=[1e-8, 1e-2],
        weight_decay=[0.0, 0.1],
        momentum=[0.0, 0.9],
        centered=[False, True],
        maximize=[False, True],
    ),
}
PAIRS = {
    "sgd": (fn.sgd, torch.optim.SGD),
    "adam": (fn.adam, torch.optim.Adam),
    "adamw": (fn.adamw, torch.optim.AdamW),
    "rmsprop": (fn.rmsprop, torch.optim.RMSprop),
    "adamax": (fn.adamax, torch.optim.Adamax),
    "nadam": (fn.nadam, torch.optim.NAdam),
    "radam": (fn.radam, torch.optim.RAdam),
    "adagrad": (fn.adagrad, torch.optim.Adagrad),
    "adadelta": (fn.adadelta, torch.optim.Adadelta),
    "asgd": (fn.asgd, torch.optim.ASGD),
}


def case_name(value):
    if isinstance(value, dict):
        return " ".join(f"{k}={v}" for k, v in value.items()).replace(", ", ",")
    return None


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name, rows in OPTIONS.items() for options in rows],
    ids=case_name,
)
def test_ten_steps_equal_those_of_torch(name, options):
    ours, theirs = PAIRS[name]
    found, _ = run(ours(0.05, **options), some_params())
    expected = run_torch(lambda p: theirs(p, 0.05, foreach=False, **options), some_params())
    assert_trees_close(found, expected)


SOME = {
    "sgd": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    "adam": {"weight_decay": 0.1},
    "adamw": {"amsgrad": True},
    "rmsprop": {"momentum": 0.9, "centered": True, "weight_decay": 0.1},
    "adamax": {"weight_decay": 0.1},
    "nadam": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "radam": {"betas": (0.9, 0.6), "weight_decay": 0.1, "decoupled_weight_decay": True},
    "adagrad": {"lr_decay": 0.1, "weight_decay": 0.1},
    "adadelta": {"rho": 0.8, "weight_decay": 0.1},
    "asgd": {"lambd": 0.1, "alpha": 0.5, "t0": 2, "weight_decay": 0.1},
}


@pytest.mark.parametrize("options", [{}, SOME], ids=["plain", "options"])
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(
    "rate",
    [0.0, 0.05, 1, torch.tensor(0.05, dtype=F64), torch.tensor(0.05), lambda step: 0.05],
    ids=["0.0", "0.05", "1", "float64 tensor", "float32 tensor", "function"],
)
def test_a_rate_is_a_number_a_tensor_or_a_function(name, options, rate):
    ours, theirs = PAIRS[name]
    options = options.get(name, {})
    value = rate(0) if callable(rate) else float(rate)
    expected = run_torch(lambda p: theirs(p, value, foreach=False, **options), some_params())
    assert_trees_close(run(ours(rate, **options), some_params())[0], expected)


SCHEDULES = {
    "number": lambda step: 0.5 ** float(step),
    "tensor": lambda step: 0.5**step,
    "float64": lambda step: 1.0 / (1.0 + torch.as_tensor(step).to(F64)),
    "warmup": lambda step: min(1.0, (float(step) + 1) / 4),
    "integer": lambda step: 1 if step < 5 else 0,
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", SOME)
def test_a_function_of_the_step_equals_lambda_lr(name, schedule):
    ours, theirs = PAIRS[name]
    expected = run_torch(
        lambda p: theirs(p, 1.0, foreach=False, **SOME[name]),
        some_params(),
        lambda step: float(schedule(step)),
    )
    found, opt_state = run(ours(schedule, **SOME[name]), some_params())
    # 0.5**step of an int64 tensor is a float32, exactly.
    assert_trees_close(found, expected)
    counts = [leaf for leaf in optree.tree_leaves(opt_state) if leaf.dtype == torch.int64]
    assert counts
    assert all(count == STEPS for count in counts)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_signsgd_is_its_formula(momentum, weight_decay, maximize):
    optimizer = fn.signsgd(0.05, momentum, weight_decay, maximize=maximize)
    found, _ = run(optimizer, {"w": numbers(4, 3)})
    w, b = numbers(4, 3), torch.zeros(4, 3, dtype=F64)
    for step in range(STEPS):
        g = grads_at(step, {"w": w})["w"] * (-1 if maximize else 1)
        b = momentum * b + (1 - momentum) * g
        w = w - 0.05 * (b.sign() + weight_decay * w)
    torch.testing.assert_close(found["w"], w, rtol=1e-12, atol=1e-12)


OPTIMIZERS = {
    name: case.make
    for table in ("cases_torch", "cases_optax")
    for name, case in TABLES[table].items()
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


@optimizers
def test_two_trees_can_take_turns_with_one_optimizer(make):
    optimizer = make(0.1)
    trees = [some_params(), {"w": numbers(5)}, {"w": {"v": numbers(5)}}, {}, some_params()]
    states = [optimizer.init_state(params) for params in trees]
    for params, state in zip(trees, states, strict=True):
        alone = make(0.1)
        expected = alone.update(params, alone.init_state(params), params)
        assert_trees_equal(optimizer.update(params, state, params), expected)


MIXED = {
    "a": numbers(3, dtype=torch.bfloat16),
    "b": {"c": numbers(2, 2, dtype=torch.float32), "d": numbers(dtype=torch.bfloat16)},
    "e": numbers(dtype=torch.float32),
    "f": numbers(4, dtype=F64),
    "g": numbers(dtype=torch.float16),
    "h": numbers(0, 3, dtype=torch.float32),
}


@optimizers
def test_mixed_dtypes_are_near_to_float64(make):
    params = {name: MIXED[name] for name in "aefg"}
    found, _ = run(make(0.01), params, 3)
    expected, _ = run(make(0.01), optree.tree_map(torch.Tensor.double, params), 3)
    for name, leaf in found.items():
        eps = torch.finfo(leaf.dtype).eps
        torch.testing.assert_close(leaf.double(), expected[name], rtol=8 * eps, atol=8 * eps)


@optimizers
def test_grads_and_params_may_order_their_names_differently(make):
    def reversed_names(tree):
        if not isinstance(tree, dict):
            return tree
        return {name: reversed_names(tree[name]) for name in reversed(tree)}

    optimizer = make(0.1)
    expected, _ = run(optimizer, some_params())
    found, _ = run(make(0.1), some_params(), STEPS, lambda t, p: reversed_names(grads_at(t, p)))
    assert_trees_equal(found, expected)
    found, _ = run(make(0.1), reversed_names(some_params()), 1, lambda t, p: some_params())
    expected, _ = run(optimizer, some_params(), 1, lambda t, p: some_params())
    assert_trees_equal(found, expected)


LAYOUTS = {
    "transposed": lambda g: g.t().contiguous().t(),
    "strided": lambda g: torch.stack([g, g + 1], -1)[..., 0],
    "offset": lambda g: torch.cat([g.new_ones(1), g.flatten()])[1:].reshape(g.shape),
    "one row for all": lambda g: g[:1].clone().expand_as(g),
    "one number for all": lambda g: g[0, 0].clone().expand_as(g),
}


@optimizers
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_memory_layout_of_grads_and_params_does_not_matter(make, layout, dtype):
    def dense(tree):
        return optree.tree_map(torch.Tensor.contiguous, tree)

    def grads_of(step, _params):
        g = numbers(5, 4, seed=step, dtype=dtype)
        # What a gradient is laid out like changes from step to step.
        return {"w": layout(g) if step % 2 else g}

    params = {"w": layout(numbers(5, 4, seed=50, dtype=dtype))}
    expected = run(make(0.1), dense(params), 4, lambda t, p: dense(grads_of(t, p)))
    tolerance = 64 * torch.finfo(dtype).eps
    for start, grads in (
        (dense(params), grads_of),
        (params, grads_of),
        (params, lambda t, p: dense(grads_of(t, p))),
    ):
        assert_trees_close(run(make(0.1), start, 4, grads), expected, tolerance, tolerance)


def population(*trees):
    return optree.tree_map(lambda *leaves: torch.stack(leaves), *trees)


@optimizers
def test_vmap_over_grads_alone_equals_the_loop(make):
    optimizer, params = make(0.1), some_params()
    grads = [grads_at(step, params) for step in range(3)]
    opt_state = optimizer.init_state(params)
    updates, _ = torch.vmap(optimizer.update, (0, None, None))(
        population(*grads), opt_state, params
    )
    alone = [optimizer.update(g, opt_state, params) for g in grads]
    assert_trees_close(updates, population(*[u for u, _ in alone]), 1e-13, 1e-14)


def directional_difference(function, at, along, step=1e-6):
    return (function(at + step * along) - function(at - step * along)) / (2 * step)


@optimizers
@pytest.mark.parametrize("of", ["grads", "params"])
@pytest.mark.parametrize("how", ["torch.func.grad", "torch.func.jvp", "autograd"])
def test_an_update_can_be_differentiated(make, of, how):
    """As meta-learning does; the optimizer itself records no tape."""
    optimizer, params = make(0.1), {"w": numbers(4), "v": numbers(3)}
    params, opt_state = run(optimizer, params, 2)
    grads, along = {"w": numbers(4, seed=7), "v": numbers(3, seed=8)}, numbers(4, seed=9)

    def objective(value):
        trees = {"grads": grads, "params": params}
        trees[of] = {**trees[of], "w": value}
        updates, _ = optimizer.update(trees["grads"], opt_state, trees["params"])
        moved = fn.apply_updates(trees["params"], updates)
        return moved["w"].square().sum() + moved["v"].square().sum()

    at = {"grads": grads, "params": params}[of]["w"]
    expected = directional_difference(objective, at, along)
    if how == "torch.func.grad":
        found = torch.func.grad(objective)(at) @ along
    elif how == "torch.func.jvp":
        found = torch.func.jvp(objective, (at,), (along,))[1]
    else:
        leaf = at.clone().requires_grad_()
        found = torch.autograd.grad(objective(leaf), leaf)[0] @ along
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@optimizers
def test_state_is_a_pytree_that_moves_a_run_elsewhere(make):
    expected = run(make(0.1), some_params(), 4)
    optimizer = make(0.1)
    params, opt_state = run(optimizer, some_params(), 2)
    leaves, treedef = optree.tree_flatten(opt_state)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    resumed = treedef.unflatten([leaf.clone() for leaf in leaves])
    fresh = make(0.1)
    for step in (2, 3):
        updates, resumed = fresh.update(grads_at(step, params), resumed, params)
        params = fn.apply_updates(params, updates)
    assert_trees_equal((params, resumed), expected)
    meta = optree.tree_map(lambda leaf: leaf.to("meta"), some_params())
    updates, _ = optimizer.update(meta, optimizer.init_state(meta), meta)
    assert all(leaf.device.type == "meta" for leaf in optree.tree_leaves(updates))


@pytest.mark.parametrize("gradient", [1.0, 0.1, 3e-3, 123.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_centered_rmsprop_stays_finite_for_a_constant_gradient(gradient, dtype):
    # E[g^2] - E[g]^2 goes to 0 and may be rounded to below it.
    optimizer = fn.rmsprop(1e-3, 0.9, 1e-8, centered=True)
    constant = {"w": torch.full((3,), gradient, dtype=dtype)}
    found, _ = run(optimizer, constant, 600, lambda t, p: constant)
    parameter = torch.nn.Parameter(constant["w"].clone())
    peer = torch.optim.RMSprop([parameter], 1e-3, 0.9, 1e-8, centered=True, foreach=False)
    for _ in range(600):
        parameter.grad = constant["w"]
        peer.step()
    if parameter.isfinite().all():
        assert found["w"].isfinite().all()


@pytest.mark.parametrize("constructor", [fn.adam, fn.adamw])
@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, -0.1), (0.9, 1.5)])
def test_betas_outside_0_to_1_are_refused(constructor, betas):
    position = 0 if not 0 <= betas[0] < 1 else 1
    with pytest.raises(ValueError, match=rf"betas\[{position}\] .*got {betas[position]}"):
        constructor(betas=betas)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "dampening": 0.1}, {"dampening": 0.1}])
def test_nesterov_needs_momentum_without_dampening(options):
    with pytest.raises(ValueError, match="nesterov"):
        fn.sgd(0.1, nesterov=True, **options)


@pytest.mark.parametrize("name", [*PAIRS, "signsgd", "lion", "lamb", "lars", "sophia", "rprop"])
@pytest.mark.parametrize(
    ("rate", "error"),
    [
        # Elsewhere a rate is not read: that would wait for the device.
        pytest.param(torch.tensor(-0.1), ValueError, marks=pytest.mark.cpu_only),
        (torch.tensor([0.1, 0.2]), ValueError),
        (torch.tensor([0.1]), ValueError),
        ("0.1", TypeError),
        (None, TypeError),
    ],
    ids=["negative tensor", "two rates", "1-d tensor", "str", "None"],
)
def test_a_bad_rate_is_refused(name, rate, error):
    with pytest.raises(error, match="lr"):
        getattr(fn, name)(rate)


GOOD = {"a": {"w": numbers(3)}, "b": numbers(2)}
MISFITS = {
    "missing": ({"a": {"w": numbers(3)}}, "'b'"),
    "extra": ({"a": {"w": numbers(3), "v": numbers(3)}, "b": numbers(2)}, "'a.v'"),
    "renamed": ({"a": {"v": numbers(3)}, "b": numbers(2)}, "'a.v'"),
    "deeper": ({"a": {"w": {"x": numbers(3)}}, "b": numbers(2)}, "'a.w.x'"),
    "shallower": ({"a": numbers(3), "b": numbers(2)}, "'a"),
    "a tuple": ({"a": {"w": (numbers(3),)}, "b": numbers(2)}, "'a.w"),
    "None": ({"a": {"w": None}, "b": numbers(2)}, "'a.w"),
    "empty": ({}, "'a.w'"),
}


@optimizers
@pytest.mark.parametrize(("grads", "path"), MISFITS.values(), ids=MISFITS)
def test_grads_of_another_structure_are_refused_with_the_path(make, grads, path):
    optimizer = make(0.1)

    def step():
        updates, _ = optimizer.update(grads, optimizer.init_state(GOOD), GOOD)
        fn.apply_updates(GOOD, updates)

    with pytest.raises(ValueError, match=path):
        step()


@optimizers
@pytest.mark.parametrize("shape", [(2, 3), (1,), (), (4,), (3, 1)])
def test_grads_of_another_shape_are_refused_and_never_broadcast(make, shape):
    optimizer = make(0.1)
    grads = {"a": {"w": numbers(*shape)}, "b": numbers(2)}

    def step():
        updates, _ = optimizer.update(grads, optimizer.init_state(GOOD), GOOD)
        fn.apply_updates(GOOD, updates)

    with pytest.raises(ValueError, match=r"a\.w"):
        step()


@optimizers
def test_state_of_another_optimizer_is_refused(make):
    other = fn.chain(velocity=fn.optimizers.trace(0.9))
    with pytest.raises(
        ValueError, match=r"expects a dict of the states of|has no state.*'velocity'"
    ):
        make(0.1).update(GOOD, other.init_state(GOOD), GOOD)
