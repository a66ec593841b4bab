"""Kronecker factors: those of the examples' gradients, by torch.func."""

import pytest
import torch
from torch.func import grad, vmap

import funcnet as fn
from funcnet.backward.curvature.kronecker import linear_rows

KEY = fn.key(5)
X = fn.random.normal(fn.key(1), (6, 5), torch.float64)
NET = fn.serial(fn.linear(4), fn.tanh(), fn.linear(3, bias=False))
DY = fn.random.normal(fn.key(2), (6, 3), torch.float64)


def deferred_of(net, x, dy):
    """Params and the deferred gradients of the mean over the examples."""
    params, state = net.init(KEY, x)
    _, pullback, _ = net.vjp(params, x, state)
    return params, fn.defer(pullback)(dy / len(x))[0]


def example_gradients(net, params, x, dy):
    """Those of each example, by torch.func."""

    def value(params, x, dy):
        return (net.apply(params, x[None])[0][0] * dy).sum()

    return vmap(grad(value), in_dims=(None, 0, 0))(params, x, dy)


def test_factors_are_means_over_examples():
    params, deferred = deferred_of(NET, X, DY)
    found = fn.kronecker_factors(deferred)
    assert list(found) == ["0", "2"]
    hidden = torch.tanh(X @ params["0"]["weight"].mT + params["0"]["bias"])
    below = (DY @ params["2"]["weight"]) * (1 - hidden**2)
    ones = torch.ones(6, 1, dtype=X.dtype)
    expected = {"0": (torch.cat([X, ones], 1), below), "2": (hidden, DY)}
    for path, (x, dy) in expected.items():
        torch.testing.assert_close(found[path].inputs, x.mT @ x / 6)
        torch.testing.assert_close(found[path].outputs, dy.mT @ dy / 6)


def test_of_one_example_the_product_of_the_factors_is_the_block_of_the_fisher_matrix():
    params, deferred = deferred_of(NET, X[:1], DY[:1])
    grads = example_gradients(NET, params, X[:1], DY[:1])
    for path, (a, g) in fn.kronecker_factors(deferred).items():
        layer = {name: leaf[0] for name, leaf in grads[path].items()}
        bias = [layer["bias"][:, None]] if "bias" in layer else []
        flat = torch.cat([layer["weight"], *bias], 1).flatten()
        torch.testing.assert_close(torch.kron(g, a), torch.outer(flat, flat))


@pytest.mark.parametrize("shape", [(6, 5), (6, 7, 5)])
@pytest.mark.parametrize("uses", [1, 2])
def test_slopes_are_inner_products_with_the_examples_gradients(shape, uses):
    net = fn.linear(3) if uses == 1 else fn.serial(fn.shared(fn.linear(3)), fn.add())
    one = fn.random.normal(fn.key(3), shape, torch.float64)
    x = one if uses == 1 else (one, one.cos())
    dy = fn.random.normal(fn.key(4), (*shape[:-1], 3), torch.float64)
    params, state = net.init(KEY, x)
    _, pullback, _ = net.vjp(params, x, state)
    deferred, _ = fn.defer(pullback)(dy / 6)
    ((path, rows),) = linear_rows(deferred).items()
    layer = params if uses == 1 else params["0"]
    direction = fn.random.normal(fn.key(9), (3, 6), torch.float64)
    found = torch.stack([each.slopes(direction) for each in rows]).sum(0)

    def value(layer, x, dy):
        outputs = [torch.nn.functional.linear(each, layer["weight"], layer["bias"]) for each in x]
        return (sum(outputs) * dy).sum()

    pieces = (one,) if uses == 1 else x
    grads = vmap(grad(value), in_dims=(None, 0, 0))(dict(layer), pieces, dy)
    whole = torch.cat([grads["weight"], grads["bias"][..., None]], -1)
    torch.testing.assert_close(found, (whole * direction).sum((1, 2)))
    assert len(rows) == uses
    assert path == ("" if uses == 1 else "0")


def test_other_layers_have_no_factors():
    net = fn.serial(fn.embedding(4, 5), fn.layer_norm(), fn.linear(2))
    _, deferred = deferred_of(net, torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2, 2))
    assert list(fn.kronecker_factors(deferred)) == ["2"]
    with pytest.raises(ValueError, match=r"linear_rows: expects linear layers, not .* \['0'"):
        linear_rows(deferred, ["0", "2"])


def test_what_is_not_deferred_or_has_no_examples_first_is_refused():
    with pytest.raises(TypeError, match="kronecker_factors: expects a Deferred"):
        fn.kronecker_factors({})
    _, deferred = deferred_of(fn.linear(2), torch.ones(5), torch.ones(2))
    with pytest.raises(ValueError, match="expects the examples in the first dimension"):
        fn.kronecker_factors(deferred)
