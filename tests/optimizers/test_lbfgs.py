"""L-BFGS: torch.optim's numbers bit for bit, what a step keeps and refuses."""

import warnings

import pytest
import torch
from torch.testing._internal.common_optimizers import optim_db

import funcnet as fn

F64 = torch.float64
WOLFE = {"line_search_fn": "strong_wolfe"}
DATABASE = next(info for info in optim_db if info.optim_cls is torch.optim.LBFGS)
OPTIONS = [entry.kwargs for entry in DATABASE.optim_inputs_func(device="cpu", dtype=F64)] + [
    {**WOLFE, "history_size": 3, "max_iter": 7},
    {**WOLFE, "max_eval": 4},
    {**WOLFE, "lr": 0.1, "max_iter": 4},
    {**WOLFE, "max_iter": 1, "max_eval": 1},
    {"max_eval": 3, "lr": 0.05},
    {"lr": 0.05, "history_size": 2, "max_iter": 5},
    {**WOLFE, "tolerance_change": 0.1},
    {"lr": 0.02, "tolerance_grad": 1.0},
]


def together(leaves):
    return torch.cat([leaf.reshape(-1) for leaf in leaves])


def rosenbrock(leaves):
    x = together(leaves)
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def quadratic(leaves):
    x = together(leaves)
    return (torch.linspace(0.1, 10, x.numel(), dtype=x.dtype) * (x - 1) ** 2).sum()


def wavy(leaves):
    """Not convex, and lowest far from where it starts."""
    x = together(leaves)
    return (0.01 * (x - 20) ** 2 + torch.sin(3 * x)).sum()


OBJECTIVES = {f.__name__: f for f in (rosenbrock, quadratic, wavy)}


def value_and_grad(objective):
    def run(params):
        leaves, treedef = fn.tree.flatten(params)
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        with torch.enable_grad():
            value = objective(leaves)
            grads = torch.autograd.grad(value, leaves)
        return value.detach(), treedef.unflatten(grads)

    return run


def some_params(dtype=F64):
    numbers = fn.random.normal(fn.key(0), (5,), F64).to(dtype)
    return {"a": {"w": numbers[:4].view(2, 2).t()}, "b": numbers[4]}


@pytest.mark.parametrize(
    ("objective", "dtype"),
    [
        ("rosenbrock", F64),
        ("quadratic", F64),
        ("wavy", F64),
        ("rosenbrock", torch.float32),
        ("wavy", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_twenty_steps_are_those_of_torch_bit_for_bit(options, objective, dtype):
    objective, params = OBJECTIVES[objective], some_params(dtype)
    # torch's own refuses gradients that are not contiguous.
    copies = [leaf.clone(memory_format=torch.contiguous_format) for leaf in fn.tree.leaves(params)]
    leaves = [torch.nn.Parameter(copy) for copy in copies]
    peer, minimizer = torch.optim.LBFGS(leaves, **options), fn.lbfgs(**options)
    state = minimizer.init_state(params)

    def closure():
        peer.zero_grad()
        value = objective(leaves)
        value.backward()
        return value

    for _ in range(20):
        with warnings.catch_warnings(action="ignore"):
            before = peer.step(closure)
        params, state, value = minimizer.step(value_and_grad(objective), state, params)
        assert torch.equal(value, before) or value.isnan()
        for found, expected in zip(fn.tree.leaves(params), leaves, strict=True):
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected.detach(), rtol=0, atol=0, equal_nan=True)
    counts = peer.state[leaves[0]]
    assert (state.evaluations, state.iterations) == (counts["func_evals"], counts["n_iter"])


@pytest.mark.parametrize("objective", ["rosenbrock", "quadratic"])
def test_it_finds_the_minimum(objective):
    params, minimizer = some_params(), fn.lbfgs(max_iter=100, **WOLFE)
    state = minimizer.init_state(params)
    for _ in range(2):
        params, state, _ = minimizer.step(value_and_grad(OBJECTIVES[objective]), state, params)
    torch.testing.assert_close(
        together(fn.tree.leaves(params)), torch.ones(5, dtype=F64), rtol=0, atol=1e-4
    )


def test_a_step_is_pure_and_its_state_is_all_there_is():
    objective, minimizer = value_and_grad(rosenbrock), fn.lbfgs(max_iter=3, history_size=4, **WOLFE)
    params = some_params()
    state = minimizer.init_state(params)
    for _ in range(4):
        given = fn.tree.leaves((state, params))
        before = [(leaf, leaf._version, leaf.clone()) for leaf in given]
        once, again = [minimizer.step(objective, state, params) for _ in range(2)]
        for one, other in zip(fn.tree.leaves(once), fn.tree.leaves(again), strict=True):
            assert torch.equal(one, other)
        assert all(leaf._version == version for leaf, version, _ in before)
        assert all(torch.equal(leaf, copy) for leaf, _, copy in before)
        assert fn.tree.alike(once[1], state)
        assert fn.tree.alike(once[0], params)
        params, state, _ = once


def test_leaves_of_several_dtypes_and_none_and_no_leaves():
    params = {"a": torch.zeros(3), "b": torch.zeros((), dtype=F64), "c": torch.zeros(0, 2)}

    def objective(params):
        a, b = params["a"] - 1, params["b"] - 2
        grads = {"a": 2 * a, "b": 2 * b, "c": params["c"]}
        return (a**2).sum() + b**2, grads

    minimizer = fn.lbfgs(**WOLFE)
    found, _, _ = minimizer.step(objective, minimizer.init_state(params), params)
    assert fn.tree.alike(found, params)
    torch.testing.assert_close(found["a"], torch.ones(3))
    torch.testing.assert_close(found["b"], torch.tensor(2.0, dtype=F64))

    found, state, value = minimizer.step(
        lambda params: (torch.tensor(3.0), {}), minimizer.init_state({}), {}
    )
    assert (found, value, state.evaluations) == ({}, 3.0, 1)


def test_the_objective_may_be_compiled():
    x, target = torch.linspace(-1, 1, 20)[:, None], torch.linspace(-1, 1, 20)[:, None] ** 2
    net = fn.serial(fn.linear(8), fn.tanh(), fn.linear(1))
    params, _ = net.init(fn.key(0), x)
    objective = fn.jit(lambda p: fn.value_and_grad(net, fn.mse())(p, (x, target))[:2])
    minimizer = fn.lbfgs(max_iter=50, **WOLFE)
    params, _, before = minimizer.step(objective, minimizer.init_state(params), params)
    assert objective(params)[0] < 1e-2 * before


P = {"w": torch.ones(2)}


def bowl(params):
    return (params["w"] ** 2).sum(), {"w": 2 * params["w"]}


def stepped(params=P, objective=bowl, state=None, **options):
    minimizer = fn.lbfgs(**options)
    state = minimizer.init_state(P) if state is None else state
    return minimizer.step(objective, state, params)


BAD = {
    "rate below 0": (lambda: fn.lbfgs(-1.0), ValueError, "lbfgs: lr"),
    "rate of shape (1,)": (lambda: fn.lbfgs(torch.ones(1)), ValueError, "0-d tensor"),
    "no iterations": (lambda: fn.lbfgs(max_iter=0), ValueError, "max_iter"),
    "no history": (lambda: fn.lbfgs(history_size=0), ValueError, "history_size"),
    "tolerance": (lambda: fn.lbfgs(tolerance_grad=-1.0), ValueError, "tolerance_grad"),
    "another search": (lambda: fn.lbfgs(line_search_fn="armijo"), ValueError, "strong_wolfe"),
    "state of another": (lambda: stepped(state={}), TypeError, "lbfgs: expects the state Lbfgs"),
    "state of other params": (
        lambda: stepped(state=fn.lbfgs().init_state({"w": torch.ones(3)})),
        ValueError,
        r"expects a history of shape \(100, 2\) .*got \(100, 3\)",
    ),
    "state of another history": (
        lambda: stepped(state=fn.lbfgs(history_size=3).init_state(P)),
        ValueError,
        r"history",
    ),
    "a value for each": (
        lambda: stepped(objective=lambda p: (p["w"], p)),
        ValueError,
        r"lbfgs: expects a scalar value, got float32 \(2,\)",
    ),
    "gradients of others": (
        lambda: stepped(objective=lambda p: (p["w"].sum(), {"b": p["w"]})),
        ValueError,
        "lbfgs: grads: .*'w'",
    ),
    "under jit": (lambda: fn.jit(stepped)(P), TypeError, "lbfgs: a step branches on values"),
    "under vmap": (
        lambda: fn.vmap(stepped)({"w": torch.ones(3, 2)}),
        TypeError,
        "lbfgs: a step branches on values",
    ),
}


@pytest.mark.parametrize(("call", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
