"""Gradients of single examples against torch.func, on every layer that has params."""

from functools import partial

import cases
import pytest
import torch

import funcnet as fn

KEY = fn.key(5)

# Of these the first axis of x is not that of examples, or there is none.
NO_EXAMPLES = {"linear of a vector"}


def batch_of(x, count=3):
    """Examples that differ from each other, each like x: the axis of examples is a new one."""
    return fn.tree.map(lambda leaf: varied(leaf, count), x)


def varied(leaf, count):
    if leaf.is_floating_point():
        noise = fn.random.normal(KEY, (count, *leaf.shape), leaf.dtype)
        return leaf + 0.3 * noise
    return torch.stack([leaf.roll(shift) for shift in range(count)])


def has_params(layer, x):
    return bool(fn.tree.leaves(layer.init(KEY, x)[0]))


TABLE = {**cases.LAYERS, **cases.COMBINATORS}
NETS = {
    name: (layer, x)
    for name, (layer, x) in TABLE.items()
    if not layer.mixes_examples and name not in cases.EAGER_ONLY and has_params(layer, x)
    # What is weighted is dy, of which the gradients are linear functions.
    if name != "with_rule that reads all"
}


# What iterates to a tolerance is as exact as that.
ITERATIVE = ("fixed_point",)


def deferred_of(layer, x):
    """The Deferred of examples, each of them all of what the table has, and what autograd gives.

    Of a layer that is meant to give other gradients than the derivative, those of its pullback.
    """
    params, state = layer.init(KEY, x)
    params = fn.tree.map(lambda leaf: leaf + 0.1 * noise_like(leaf), params)
    batch, keys = batch_of(x), fn.random.split(KEY, 3)

    def one(x, key):
        y, pullback, _ = layer.vjp(params, x, state, key=key)
        return fn.defer(pullback)(cotangent(y), x=False)[0]

    def own(params, x, key):
        y, pullback, _ = layer.vjp(params, x, state, key=key)
        return pullback(cotangent(y), x=False)[0]

    def scalar(params, x, key):
        y, _ = layer.apply(params, x, state, key=key, train=True)
        pairs = zip(fn.tree.leaves(y), fn.tree.leaves(cotangent(y)), strict=True)
        return sum([(leaf * dy).sum() for leaf, dy in pairs if leaf.is_floating_point()])

    reference = own if layer.breaks else torch.func.grad(scalar)
    expected = fn.vmap(reference, (None, 0, 0))(params, batch, keys)
    return fn.vmap(one)(batch, keys), expected


def noise_like(leaf):
    return fn.random.normal(fn.key(11), leaf.shape, leaf.dtype)


def cotangent(y):
    def one(leaf):
        return fn.random.normal(fn.key(9), leaf.shape, leaf.dtype)

    return fn.tree.map(lambda leaf: one(leaf) if leaf.is_floating_point() else None, y)


def close(expected, found, double=2e-12):
    assert fn.tree.paths(expected) == fn.tree.paths(found)
    for path, leaf in fn.tree.to_dotted(expected).items():
        other = fn.tree.to_dotted(found)[path]
        assert leaf.shape == other.shape
        if leaf.numel():
            most = double if leaf.dtype == torch.float64 else 2e-6
            assert (other - leaf).abs().max() <= most * leaf.abs().max().clamp_min(1e-3), path


@pytest.mark.parametrize("name", NETS)
def test_gradients_norms_and_weighted_sums_are_those_of_torch_func(name):
    deferred, expected = deferred_of(*NETS[name])
    require_close = partial(close, double=1e-9 if name.startswith(ITERATIVE) else 2e-12)
    found = fn.example_gradients(deferred)
    require_close(expected, found)
    norms = fn.tree.map(lambda leaf: leaf.reshape(len(leaf), -1).norm(dim=1), expected)
    require_close(norms, fn.example_norms(deferred, by="leaf"))
    total = torch.stack(fn.tree.leaves(norms)).norm(dim=0)
    require_close(total, fn.example_norms(deferred))
    layers = torch.stack([*fn.example_norms(deferred, by="layer").values()])
    require_close(total, layers.norm(dim=0))
    weights = torch.tensor([0.5, -2.0, 3.0], dtype=total.dtype)
    sums = fn.tree.map(lambda leaf: torch.tensordot(weights, leaf, 1), expected)
    require_close(sums, fn.gradients(fn.weighted(deferred, weights)))
