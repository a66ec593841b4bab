"""The lift, used as a user would: optimizers from their papers' formulas, and `Leaves`."""

from typing import NamedTuple

import optree
import pytest
import torch

import funcnet as fn
from funcnet.optimizers import stateful, stateless, zero_step
from funcnet.optimizers.leaves import Leaves, sum_into

F64 = torch.float64


def numbers(*shape, seed=0):
    # Drawn on the CPU, so that the numbers are the same on any device.
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=F64, device="cpu")
    return drawn.to(torch.get_default_device())


class LionState(NamedTuple):
    m: fn.Tree


def scale_by_lion(b1=0.9, b2=0.99):
    def init(p):
        return LionState(torch.zeros_like(p))

    def update(g, state, p):
        direction = torch.sign(b1 * state.m + (1 - b1) * g)
        return direction, LionState(b2 * state.m + (1 - b2) * g)

    return stateful(init, update)


def lion(lr, weight_decay=0.1):
    return fn.chain(
        scale_by_lion(),
        fn.optimizers.add_decayed_weights(weight_decay),
        fn.optimizers.scale_by_learning_rate(lr),
    )


def lion_loop(w, gradients, lr=0.1, weight_decay=0.1, b1=0.9, b2=0.99):
    m = torch.zeros_like(w)
    for g in gradients:
        w = w - lr * ((b1 * m + (1 - b1) * g).sign() + weight_decay * w)
        m = b2 * m + (1 - b2) * g
    return w


class AdamaxState(NamedTuple):
    step: torch.Tensor
    m: fn.Tree
    u: fn.Tree


def scale_by_adamax(b1=0.9, b2=0.999, eps=1e-8):
    def init(p):
        return AdamaxState(zero_step(p), torch.zeros_like(p), torch.zeros_like(p))

    def update(g, state, p):
        step = state.step + 1
        m = b1 * state.m + (1 - b1) * g
        u = torch.maximum(b2 * state.u, g.abs() + eps)
        return m / (1 - b1 ** step.double()) / u, AdamaxState(step, m, u)

    return stateful(init, update)


class RpropState(NamedTuple):
    g: fn.Tree
    size: fn.Tree


def rprop(lr=1e-2, grow=1.2, shrink=0.5, least=1e-6, most=50.0):
    def init(p):
        return RpropState(torch.zeros_like(p), torch.full_like(p, lr))

    def update(g, state, p):
        agree = g * state.g
        factor = torch.where(agree > 0, grow, torch.where(agree < 0, shrink, torch.ones_like(g)))
        size = (state.size * factor).clamp(least, most)
        g = torch.where(agree < 0, 0.0, g)
        return -size * g.sign(), RpropState(g, size)

    return stateful(init, update)


def clip_by_global_norm(limit):
    def update(g, p):
        norm = sum(leaf.square().sum() for leaf in g) ** 0.5
        return g * (limit / (norm + 1e-6)).clamp(max=1.0)

    return stateless(update)


def scale_by_trust_ratio():
    """LAMB's: the norm of each leaf of the params, by that of its update."""

    def update(g, p):
        ratio = torch.linalg.vector_norm(p) / torch.linalg.vector_norm(g)
        return torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0) * g

    return stateless(update)


class AverageState(NamedTuple):
    mean: fn.Tree


def average_params(decay=0.9):
    """Leaves the updates as they are, and keeps a running mean of the params."""

    def update(g, state, p):
        return g, AverageState(torch.lerp(p + g, state.mean, decay))

    return stateful(lambda p: AverageState(p.clone()), update)


PARAMS = {"a": {"w": numbers(3, 2), "b": numbers(2, seed=1)}, "s": numbers(seed=2)}
LIFTED = {
    "lion": (lion(0.1), None),
    "adamax": (
        fn.chain(scale_by_adamax(), fn.optimizers.scale_by_learning_rate(0.1)),
        lambda p: torch.optim.Adamax(p, 0.1),
    ),
    "rprop": (rprop(), torch.optim.Rprop),
    "clipped": (fn.chain(clip_by_global_norm(0.5), fn.sgd(0.1)), None),
    "lamb": (
        fn.chain(
            fn.optimizers.scale_by_adam(),
            scale_by_trust_ratio(),
            fn.optimizers.scale_by_learning_rate(0.1),
        ),
        None,
    ),
    "averaged": (fn.chain(fn.sgd(0.1), average_params()), lambda p: torch.optim.SGD(p, 0.1)),
}


@pytest.mark.parametrize(("optimizer", "reference"), LIFTED.values(), ids=LIFTED)
def test_an_optimizer_of_a_users_keeps_the_laws(optimizer, reference):
    fn.testing.check_optimizer(optimizer, PARAMS, reference=reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", LIFTED)
def test_updates_and_state_keep_their_dtypes(name, dtype):
    optimizer, _ = LIFTED[name]
    params = {**fn.tree.map(lambda leaf: leaf.to(dtype), PARAMS), "double": numbers(2)}
    state = optimizer.init_state(params)
    updates, after = optimizer.update(params, state, params)
    for found, like in ((updates, params), (after, state)):
        assert optree.tree_structure(found) == optree.tree_structure(like)
        dtypes = [leaf.dtype for leaf in fn.tree.leaves(like)]
        assert [leaf.dtype for leaf in fn.tree.leaves(found)] == dtypes


def test_state_may_have_a_dtype_of_its_own():
    def init(p):
        return LionState(torch.zeros_like(p, dtype=torch.float32))

    def update(g, state, p):
        m = state.m + g
        return m, LionState(m)

    params = {"w": torch.ones(2, dtype=torch.bfloat16)}
    sums = stateful(init, update)
    updates, state = sums.update(params, sums.init_state(params), params)
    assert (updates["w"].dtype, state.m["w"].dtype) == (torch.bfloat16, torch.float32)


def test_lion_is_its_plain_loop():
    gradients = [numbers(3, 2, seed=step) for step in range(8)]
    optimizer, params = lion(0.1), {"w": numbers(3, 2, seed=9), "other": numbers(4)}
    state = optimizer.init_state(params)
    for g in gradients:
        updates, state = optimizer.update({"w": g, "other": params["other"]}, state, params)
        params = fn.apply_updates(params, updates)
    expected = lion_loop(numbers(3, 2, seed=9), gradients)
    torch.testing.assert_close(params["w"], expected, rtol=1e-13, atol=1e-15)


def test_lion_under_jit_is_the_eager_one():
    model, x = fn.linear(2), numbers(8, 3)
    step = fn.train_step(model, fn.mse(), lion(0.01))
    start = fn.init_train_state(model, lion(0.01), fn.key(0), x)
    found, _ = fn.jit(step)(start, (x, numbers(8, 2)))
    expected, _ = step(start, (x, numbers(8, 2)))
    for one, other in zip(fn.tree.leaves(found), fn.tree.leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_clipping_bounds_the_norm_of_the_whole_tree():
    clip = clip_by_global_norm(0.5)
    updates, _ = clip.update(PARAMS, {}, PARAMS)
    norm = torch.cat([leaf.flatten() for leaf in fn.tree.leaves(updates)]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.5, dtype=F64), rtol=1e-5, atol=0)


A, B = [numbers(3, 2), numbers()], [numbers(3, 2, seed=1).exp(), numbers(seed=2).exp()]
S = torch.tensor(0.7)
OPERATIONS = {
    "a + b": lambda a, b: a + b,
    "a - b": lambda a, b: a - b,
    "a * b": lambda a, b: a * b,
    "a / b": lambda a, b: a / b,
    "-a": lambda a, b: -a,
    "2 + a": lambda a, b: 2 + a,
    "2 - a": lambda a, b: 2 - a,
    "2 * a": lambda a, b: 2 * a,
    "2 / b": lambda a, b: 2 / b,
    "a - 2": lambda a, b: a - 2,
    "a / 2": lambda a, b: a / 2,
    "b ** 2": lambda a, b: b**2,
    "b ** 0.5": lambda a, b: b**0.5,
    "a > b": lambda a, b: a > b,
    "a < 0": lambda a, b: a < 0,
    "a >= b": lambda a, b: a >= b,
    "a <= 0": lambda a, b: a <= 0,
    "(a > 0) & (b > 1)": lambda a, b: (a > 0) & (b > 1),
    "s + a": lambda a, b: S + a,
    "s - a": lambda a, b: S - a,
    "s * a": lambda a, b: S * a,
    "s / b": lambda a, b: S / b,
    "a - s": lambda a, b: a - S,
    "a / s": lambda a, b: a / S,
    "a > s": lambda a, b: a > S,
    "a.abs()": lambda a, b: a.abs(),
    "a.clamp(-1, 1)": lambda a, b: a.clamp(-1, 1),
    "a.clamp(max=b)": lambda a, b: a.clamp(max=b),
    "lerp by name": lambda a, b: torch.lerp(a, end=b, weight=0.3),
    "sqrt": lambda a, b: torch.sqrt(b),
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "mul": lambda a, b: torch.mul(2.0, b),
    "pow": lambda a, b: torch.pow(2.0, a),
    "maximum": lambda a, b: torch.maximum(a, b),
    "maximum of s": lambda a, b: torch.maximum(a, S.double()),
    "addcmul": lambda a, b: torch.addcmul(a, b, b, value=0.3),
    "lerp by s": lambda a, b: torch.lerp(a, b, S.double()),
    "lerp by s, by name": lambda a, b: torch.lerp(a, b, weight=S.double()),
    "add s b": lambda a, b: torch.add(a, b, alpha=S),
    "addcmul by s": lambda a, b: torch.addcmul(a, b, b, value=S),
    "addcdiv by s": lambda a, b: torch.addcdiv(a, b, b, value=S),
    "where": lambda a, b: torch.where(a > 0, a, b),
    "where of one condition": lambda a, b: torch.where(S > 0, a, b),
    "functional": lambda a, b: torch.nn.functional.softplus(a),
    "norms": lambda a, b: torch.linalg.vector_norm(a),
}


@pytest.mark.parametrize("vmapped", [False, True])
@pytest.mark.parametrize("function", OPERATIONS.values(), ids=OPERATIONS)
def test_leaves_compute_as_tensors_do(function, vmapped):
    def by_leaves(a, b):
        return list(function(Leaves(a), Leaves(b)))

    def one_by_one(a, b):
        return [function(x, y) for x, y in zip(a, b, strict=True)]

    a, b = A, B
    if vmapped:
        a, b = ([torch.stack([leaf, leaf + 1]) for leaf in leaves] for leaves in (A, B))
        by_leaves, one_by_one = torch.vmap(by_leaves), torch.vmap(one_by_one)
    for found, expected in zip(by_leaves(a, b), one_by_one(a, b), strict=True):
        assert found.shape == expected.shape
        # A 0-d float32 tensor is rounded to nothing less than the leaf's dtype.
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-15)


NUMBER_OPTIONS = {
    "add": lambda a, b, s: a.add(b, alpha=s),
    "sub": lambda a, b, s: a.sub(b, alpha=s),
    "addcmul": lambda a, b, s: a.addcmul(b, b, value=s),
    "addcdiv": lambda a, b, s: a.addcdiv(b, b, value=s),
    "lerp": lambda a, b, s: torch.lerp(a, b, s),
    "sum_into": lambda a, b, s: sum_into(a, b, s),
    "sum_into, fresh": lambda a, b, s: sum_into(2.0 * a, b, s),
}


@pytest.mark.parametrize("function", NUMBER_OPTIONS.values(), ids=NUMBER_OPTIONS)
def test_an_option_that_is_a_number_may_be_a_tensor_that_nothing_can_read(function):
    def run(s):
        return list(function(Leaves(A), Leaves(B), s))

    expected = run(0.3)
    rates = torch.tensor([0.1, 0.3], dtype=F64)
    for found in (run(rates[1]), [leaf[1] for leaf in torch.vmap(run)(rates)]):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-15)
    slope = torch.func.grad(lambda s: sum(leaf.sum() for leaf in run(s)))(rates[1])
    near = [sum(leaf.sum() for leaf in run(s)) for s in (0.3 + 1e-6, 0.3 - 1e-6)]
    torch.testing.assert_close(slope, (near[0] - near[1]) / 2e-6, rtol=1e-6, atol=1e-8)


def test_assignment_with_an_operator_changes_no_leaf():
    a = before = Leaves([torch.ones(2)])
    a += 1.0
    a *= 3.0
    assert next(iter(before)).tolist() == [1.0, 1.0]
    assert next(iter(a)).tolist() == [6.0, 6.0]


@pytest.mark.parametrize("name", ["add_", "shape", "misspelled"])
def test_what_leaves_do_not_have_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=f"leaves have no '{name}'"):
        getattr(Leaves([torch.ones(2)]), name)


def test_a_formula_without_the_new_state_is_refused():
    forgot = stateful(lambda p: LionState(torch.zeros_like(p)), lambda g, state, p: g, name="lost")
    with pytest.raises(TypeError, match=r"lost: the formula must give \(updates, LionState\)"):
        forgot.update(PARAMS, forgot.init_state(PARAMS), PARAMS)
