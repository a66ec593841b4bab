"""The named optimizers: options as tensors, their limits, Adam's kernel, averages, Sophia."""

import importlib
import math

import pytest
import torch
from optimizers.test_laws import TREES, assert_close, grads_at, layout, numbers, trajectory, tree_of

import funcnet as fn
from funcnet import optimizers as opt
from funcnet.core import Box
from funcnet.optimizers import adam_kernel
from funcnet.optimizers.lift import step_params

F64 = torch.float64

ADAM = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
OPTIONS = {
    "sgd": {"lr": 0.05, "momentum": 0.8, "dampening": 0.2, "weight_decay": 0.1},
    "adam": ADAM,
    "adamw": ADAM,
    "adamax": ADAM,
    "nadam": {**ADAM, "momentum_decay": 0.01},
    "radam": {**ADAM, "betas": (0.8, 0.5)},
    "rmsprop": {"lr": 0.05, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1, "momentum": 0.5},
    "adagrad": {
        "lr": 0.05,
        "lr_decay": 0.1,
        "weight_decay": 0.1,
        "initial_accumulator_value": 0.3,
        "eps": 1e-3,
    },
    "adadelta": {"lr": 0.5, "rho": 0.8, "eps": 1e-3, "weight_decay": 0.1},
    "rprop": {"lr": 0.05, "etas": (0.3, 1.4), "step_sizes": (0.02, 0.06)},
    "asgd": {"lr": 0.05, "lambd": 0.1, "alpha": 0.5, "t0": 1.0, "weight_decay": 0.1},
    "signsgd": {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.1},
    "lion": {"lr": 0.05, "betas": (0.7, 0.9), "weight_decay": 0.1},
    "lamb": ADAM,
    "lars": {
        "lr": 0.5,
        "weight_decay": 0.1,
        "trust_coefficient": 0.1,
        "eps": 0.01,
        "momentum": 0.5,
    },
    "schedule_free_sgd": {"lr": 0.05, "b1": 0.8, "weight_decay": 0.1, "weight_lr_power": 1.5},
    "schedule_free_adamw": {**ADAM, "weight_lr_power": 1.5},
    "sophia": {**ADAM, "gamma": 0.1, "clip_threshold": 0.7},
}
"""All options that are numbers, of every named optimizer."""
named = pytest.mark.parametrize("name", OPTIONS)


def scaled(options, factor):
    return {
        option: tuple([factor * each for each in value])
        if isinstance(value, tuple)
        else factor * value
        for option, value in options.items()
    }


@named
def test_every_number_may_be_a_tensor_that_differs_among_the_members_of_a_population(name):
    def run(options):
        return trajectory(getattr(fn, name)(**options), tree_of(zeros=False))

    members = [OPTIONS[name], scaled(OPTIONS[name], 0.99)]
    alone = [run(options) for options in members]
    together = fn.tree.map(lambda *leaves: torch.stack(leaves), *alone)
    stacked = fn.tree.map(lambda *values: torch.tensor(values, dtype=F64), *members)
    assert_close(fn.vmap(run)(stacked), together)


@named
def test_injected_options_are_the_options(name):
    """The state has other entries where a tensor of 0 switches on what 0 switches off."""
    constructor, options = getattr(fn, name), OPTIONS[name]
    injected = fn.optimizers.inject_hyperparams(constructor)(**options)
    found, state = trajectory(injected, tree_of())
    expected, inner = trajectory(constructor(**options), tree_of())
    assert_close(found, expected)
    assert_close(state.inner, inner)
    assert state.hyperparams.keys() == options.keys()


@named
def test_numbers_that_are_tensors_change_no_dtype(name):
    """Of a 0-d leaf of half precision times a 0-d float64 tensor, PyTorch makes a float64."""
    options = fn.tree.map(lambda value: torch.tensor(value, dtype=F64), OPTIONS[name])
    params = TREES["of several dtypes"]
    found, state = trajectory(getattr(fn, name)(**options), params)
    optimizer = getattr(fn, name)(**OPTIONS[name])
    assert layout(found[-1]) == layout(params)
    assert layout(state) == layout(optimizer.init_state(params))
    assert layout(getattr(fn, name)(**options).init_state(params)) == layout(state)


def names_of_numbers():
    for name, options in OPTIONS.items():
        for option, value in options.items():
            if isinstance(value, tuple):
                yield from ((name, option, position) for position in (0, 1))
            else:
                yield name, option, None


@pytest.mark.parametrize("bad", [-0.1, math.nan], ids=["negative", "nan"])
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["number", "tensor"])
@pytest.mark.parametrize(("name", "option", "position"), list(names_of_numbers()))
@pytest.mark.cpu_only
def test_a_bad_number_is_refused_by_name(name, option, position, bad, kind):
    if (option, bad) == ("dampening", -0.1):
        return
    value = kind(bad)
    if position is not None:
        pair = list(OPTIONS[name][option])
        pair[position] = value
        value = tuple(pair)
    with pytest.raises(ValueError, match=option):
        getattr(fn, name)(**{**OPTIONS[name], option: value})


BAD = {
    "betas of one number": (lambda: fn.lion(betas=0.9), "scale_by_lion: betas must be two numbers"),
    "beta of 1": (lambda: fn.nadam(betas=(1.0, 0.9)), r"betas\[0\] must be below 1, got 1.0"),
    "vector": (lambda: fn.adagrad(eps=torch.ones(2)), "adagrad: eps must be a 0-d tensor"),
    "etas": (lambda: fn.rprop(etas=(1.5, 1.2)), r"etas\[0\] < 1 < etas\[1\]"),
    "rho": (lambda: fn.adadelta(rho=1.5), "rho must be <= 1, got 1.5"),
    "y = z": (lambda: fn.schedule_free_adamw(betas=(0.0, 0.9)), r"b1 must be in \(0, 1\], got 0"),
    "warm-up": (lambda: fn.schedule_free_sgd(warmup_steps=-1), "warmup_steps must be an integer"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rprop_takes_no_schedule():
    with pytest.raises(TypeError, match="first step size"):
        fn.rprop(lambda step: 0.1)


def test_a_schedule_is_checked_at_every_step():
    optimizer = fn.asgd(lambda step: torch.ones(2))
    with pytest.raises(ValueError, match=r"asgd.*lr must be a 0-d tensor"):
        trajectory(optimizer, tree_of())


RATES = {
    "number": 0.05,
    "int": 1,
    "tensor": torch.tensor(0.05, dtype=F64),
    "schedule": lambda step: 0.05 / (1.0 + step.double()),
    "schedule of numbers": lambda step: 0.05,
}


@pytest.fixture
def kernel_calls(monkeypatch):
    calls, kernel = [], adam_kernel.fused_adamw_

    def counted(*args, **options):
        calls.append(options)
        kernel(*args, **options)

    monkeypatch.setattr(adam_kernel, "fused_adamw_", counted)
    return calls


@pytest.mark.cpu_only
@pytest.mark.parametrize("donated", [False, True])
@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_by_pytorchs_kernel_is_its_formula(
    rate, injected, donated, amsgrad, kernel_calls, monkeypatch
):
    def run():
        make = opt.inject_hyperparams(fn.adamw) if injected else fn.adamw
        optimizer = make(rate, (0.8, 0.9), 1e-3, 0.1, amsgrad)
        params = {"w": numbers(3, 2), "s": numbers(seed=1)}
        state = optimizer.init_state(params)
        for step in range(4):
            grads = Box([grads_at(step, params)])
            params, state = step_params(optimizer, grads, state, params, donated)
        return params, state

    found = run()
    assert len(kernel_calls) == 4
    module = importlib.import_module("funcnet.optimizers.adam")  # the name is the function's
    monkeypatch.setattr(module, "kernel_takes", lambda *trees: False)
    assert_close(found, run())
    assert len(kernel_calls) == 4


@pytest.mark.cpu_only
def test_clipping_and_a_schedule_leave_adamw_to_the_kernel(kernel_calls):
    optimizer = fn.chain(opt.clip_by_global_norm(1.0), fn.adamw(RATES["schedule"]))
    trajectory(optimizer, {"w": numbers(3, 2)})
    assert len(kernel_calls) == 3


def test_a_learning_rate_of_adam_can_be_learned():
    """The kernel, which has no derivative, is left where the rate needs a gradient."""
    params, grads = {"w": numbers(3)}, {"w": numbers(3, seed=1)}

    def moved(rate):
        optimizer = fn.adamw(rate)
        return optimizer.update(grads, optimizer.init_state(params), params)[0]["w"].sum()

    slope = torch.func.grad(moved)(torch.tensor(0.1, dtype=F64))
    rate = torch.tensor(0.1, dtype=F64, requires_grad=True)
    (by_tape,) = torch.autograd.grad(moved(rate), rate)
    torch.testing.assert_close(slope, 10.0 * moved(0.1))
    torch.testing.assert_close(by_tape, slope)


def gradient_of_quadratic(params):
    return {"w": CURVATURE @ params["w"]}


CURVATURE = torch.tensor([[3.0, 0.5, -0.2], [0.5, 2.0, 0.1], [-0.2, 0.1, 5.0]], dtype=F64)


def test_hutchinsons_estimate_has_the_diagonal_for_its_mean():
    params = {"w": numbers(3)}
    keys = fn.random.split(fn.key(0), 4000)
    found = fn.vmap(lambda key: opt.hutchinson(key, gradient_of_quadratic, params))(keys)
    torch.testing.assert_close(found["w"].mean(0), CURVATURE.diag(), rtol=0.02, atol=0.0)


def test_hutchinson_by_differences_is_hutchinson_by_a_product_with_the_hessian():
    params = {"w": numbers(3), "v": numbers(2, 2, seed=1)}

    def gradient(params):
        return {"w": params["w"] ** 3, "v": params["v"].exp() + params["w"].sum()}

    def hvp(params, direction):
        return torch.func.jvp(gradient, (params,), (direction,))[1]

    exact = opt.hutchinson(fn.key(3), gradient, params, hvp=hvp)
    assert_close(opt.hutchinson(fn.key(3), gradient, params), exact, 1e-8, 1e-8)
    wide = opt.hutchinson(fn.key(3), gradient, params, distance=1e-4)
    assert_close(wide, exact, 1e-6, 1e-6)
    with pytest.raises(ValueError, match="distance must be above 0"):
        opt.hutchinson(fn.key(3), gradient, params, distance=0.0)


def test_sophia_with_hessians_finds_the_minimum_that_an_ill_conditioned_quadratic_has():
    diagonal = torch.tensor([1e-3, 1.0, 1e3], dtype=F64)

    def gradient(params):
        return {"w": diagonal * (params["w"] - 1.0)}

    optimizer = fn.sophia(0.05, (0.5, 0.5), 1e-12, 0.0, gamma=1.0)
    params = {"w": torch.zeros(3, dtype=F64)}
    state = optimizer.init_state(params)
    for step in range(300):
        updates, state = optimizer.update(gradient(params), state, params)
        if step % 10 == 0:
            estimate = opt.hutchinson(fn.random.fold_in(fn.key(0), step), gradient, params)
            state = opt.refresh_hessian(state, estimate)
        params = fn.apply_updates(params, updates)
    torch.testing.assert_close(params["w"], torch.ones(3, dtype=F64), rtol=1e-3, atol=0.0)


def test_the_hessian_is_refreshed_wherever_sophia_is_in_the_state():
    optimizer = fn.chain(opt.clip_by_global_norm(1.0), inner=fn.sophia(betas=(0.9, 0.75)))
    params = {"w": torch.zeros(2)}
    state = optimizer.init_state(params)
    after = fn.jit(opt.refresh_hessian)(state, {"w": torch.tensor([4.0, 8.0])})
    assert after["inner"]["scale_by_sophia"].hessian["w"].tolist() == [1.0, 2.0]
    assert state["inner"]["scale_by_sophia"].hessian["w"].tolist() == [0.0, 0.0]


def test_an_estimate_for_another_optimizer_or_of_other_params_is_refused():
    params = {"w": torch.zeros(2)}
    with pytest.raises(ValueError, match="expects Sophia's state"):
        opt.refresh_hessian(fn.adam().init_state(params), params)
    state = fn.sophia().init_state(params)
    with pytest.raises(ValueError, match=r"estimate: the tree has no leaf 'w'"):
        opt.refresh_hessian(state, {"v": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"expects shape \(2,\) at 'w'"):
        opt.refresh_hessian(state, {"w": torch.zeros(1)})


@pytest.mark.parametrize("b1", [0.5, 0.9, 1.0])
def test_the_average_of_schedule_free_is_the_mean_of_z(b1):
    """With the weights of a rate that rises, in the formulas of the paper's first algorithm."""
    rates, power = [0.1, 0.2, 0.4, 0.4, 0.4], 2.0
    optimizer = fn.schedule_free(
        fn.sgd(lambda step: torch.tensor(rates, dtype=F64)[step]),
        lambda step: torch.tensor(rates, dtype=F64)[step - 1],
        b1,
        power,
    )
    params = {"w": numbers(3)}
    state = optimizer.init_state(params)
    z = x = y = params["w"]
    total = 0.0
    for step, rate in enumerate(rates):
        updates, state = optimizer.update(grads_at(step, {"w": y}), state, params)
        z = z - rate * grads_at(step, {"w": y})["w"]
        total += rate**power
        x = torch.lerp(x, z, rate**power / total)
        y = (1.0 - b1) * z + b1 * x
        params = fn.apply_updates(params, updates)
        torch.testing.assert_close(params["w"], y, rtol=1e-13, atol=1e-14)
        average = state["average_schedule_free"].eval_params(params)["w"]
        torch.testing.assert_close(average, x, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_params_for_evaluation_have_the_dtypes_of_the_params(dtype):
    params = {"w": numbers(3).to(dtype)}
    for optimizer in (fn.schedule_free_adamw(), fn.asgd(t0=0)):
        updates, state = optimizer.update(params, optimizer.init_state(params), params)
        after = fn.apply_updates(params, updates)
        (average,) = [s for s in state.values() if hasattr(s, "eval_params")]
        assert average.eval_params(after)["w"].dtype == dtype
