"""A layer's formula and PyTorch's kernel for it agree."""

import pytest
import torch
from cases import COMBINATORS, LAYERS

import funcnet as fn
from funcnet import lift, runtime
from funcnet.testing import check_layer

LAYERS_WITH_KERNELS = {
    "adaptive_avg_pool", "adaptive_max_pool", "attention", "avg_pool", "batch_norm", "celu",
    "convolution", "cross_entropy", "elu", "embedding", "embedding_bag", "fractional_max_pool",
    "gelu", "glu", "group_norm", "hardsigmoid", "hardswish", "hardtanh", "layer_norm",
    "leaky_relu", "log_softmax", "logsigmoid", "masked", "max_pool", "mish", "norm", "prelu",
    "relu", "relu6", "resample", "rms_norm", "running_norm", "selu", "shrink", "sigmoid", "silu",
    "softmax", "softmin", "softplus", "tanh", "threshold",
}  # fmt: skip


@pytest.fixture
def used(monkeypatch):
    """Records the formulas whose kernels run."""
    formulas = set()

    def recorded(formula, kernel):
        def run(*args, **options):
            formulas.add(formula)
            return kernel(*args, **options)

        return run

    for formula, kernel in list(lift.KERNELS.items()):
        monkeypatch.setitem(lift.KERNELS, formula, recorded(formula, kernel))
    return formulas


def tolerance(name):
    """PyTorch's kernel of hardsigmoid multiplies by 1/6 in float32, whatever the dtype."""
    return 1e-7 if name.startswith("hardsigmoid") else 1e-10


def results(layer, x, train):
    params, state = layer.init(fn.key(0), x)
    y, pullback, _ = layer.vjp(params, x, state, key=fn.key(1), train=train)
    dy = fn.tree.map(
        lambda leaf: (
            fn.random.normal(fn.key(2), leaf.shape, leaf.dtype)
            if leaf.is_floating_point()
            else None
        ),
        y,
    )
    return pullback(dy)


def test_each_kernel_is_used_by_a_layer_of_the_table(used):
    for layer, x in (LAYERS | COMBINATORS).values():
        results(layer, x, train=True)
        results(layer, x, train=False)
    assert used == set(lift.KERNELS)
    assert {formula.__name__.rpartition("_")[0] for formula in used} == LAYERS_WITH_KERNELS


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("train", [True, False])
def test_the_formula_gives_what_the_kernel_gives(name, train, monkeypatch):
    layer, x = LAYERS[name]
    expected = results(layer, x, train)
    monkeypatch.setattr(lift, "KERNELS", {})
    got = results(layer, x, train)
    for one, other in zip(fn.tree.leaves(got), fn.tree.leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance(name), atol=1e-12)


@pytest.mark.parametrize("name", [name for name in LAYERS if not LAYERS[name][0].children])
def test_the_laws_hold_without_kernels(name, monkeypatch):
    monkeypatch.setattr(lift, "KERNELS", {})
    check_layer(*LAYERS[name], rtol=tolerance(name))


def test_a_kernel_is_not_used_where_a_derivative_is_taken_of_it(used):
    _, pullback, _ = fn.silu().vjp({}, torch.ones(2))
    torch.func.grad(lambda dy: pullback(dy)[1].sum())(torch.ones(2))
    pullback(torch.ones(2, requires_grad=True))
    torch.func.vmap(torch.func.grad(lambda dy: pullback(dy)[1].sum()))(torch.ones(3, 2))
    assert not used
    torch.func.vmap(lambda dy: pullback(dy)[1])(torch.ones(3, 2))
    assert used


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gelu", "layer_norm", "batch_norm", "conv2d", "silu", "softmax"])
def test_the_formula_has_the_kernels_dtypes_in_half_precision(name, half, monkeypatch):
    layer = fn.conv2d(3, 3) if name == "conv2d" else getattr(fn, name)()
    x = fn.random.normal(fn.key(0), (2, 4, 5, 5)).to(half)
    expected = results(layer, x, True)
    monkeypatch.setattr(lift, "KERNELS", {})
    got = results(layer, x, True)
    assert [leaf.dtype for leaf in fn.tree.leaves(got)] == [
        leaf.dtype for leaf in fn.tree.leaves(expected)
    ]
    for one, other in zip(fn.tree.leaves(got), fn.tree.leaves(expected), strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=0.1, atol=0.15)


def test_is_differentiated_knows_grad_and_jvp_from_vmap():
    seen = []

    def f(x):
        seen.append(runtime.is_differentiated(x))
        return x.sum()

    f(torch.ones(2))
    torch.vmap(f)(torch.ones(2, 2))
    torch.func.grad(f)(torch.ones(2))
    torch.func.jvp(f, (torch.ones(2),), (torch.ones(2),))
    torch.vmap(torch.func.grad(f))(torch.ones(2, 2))
    f(torch.ones(2, requires_grad=True))
    assert seen == [False, False, True, True, True, True]
