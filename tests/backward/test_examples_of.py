"""Gradients of single examples against torch.func, on every layer that has params."""

from functools import partial

import cases
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import funcnet as fn
from funcnet.backward.per_example.examples_of import formed_rule, formed_where_small
from funcnet.backward.per_example.factors import Products, Rows

KEY = fn.key(5)


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
    compare(*NETS[name], 1e-9 if name.startswith(ITERATIVE) else 2e-12)


def compare(layer, x, double=2e-12):
    deferred, expected = deferred_of(layer, x)
    require_close = partial(close, double=double)
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


DOUBLE = torch.float64
TOKENS = torch.tensor([[0, 3, 3, 1, 0], [4, 4, 2, 2, 2], [5, 1, 0, 3, 4]])
STEPS = fn.random.normal(fn.key(3), (3, 7, 4), DOUBLE)
WIDE = fn.serial(fn.linear(40), fn.tanh(), fn.linear(30))
# Several uses of one layer, inner products in all of them, and copies of layers in loops.
TWICE = {
    "one linear layer three times": (fn.repeat(fn.linear(4), 3), STEPS),
    "shared": (fn.serial(fn.fan_out(2), fn.shared(fn.linear(40)), fn.concat(), WIDE), STEPS),
    "shared nets": (fn.serial(fn.fan_out(3), fn.shared(WIDE), fn.concat()), STEPS),
    "shared convolutions": (
        fn.serial(fn.fan_out(2), fn.shared(fn.conv1d(3, 2)), fn.concat()),
        STEPS,
    ),
    "embedding and head are one": (
        fn.tie(
            fn.serial(
                embed=fn.embedding(6, 8, dtype=DOUBLE),
                mix=fn.gru(8),
                y=fn.item(0),
                head=fn.linear(6, bias=False),
            ),
            {"head.weight": "embed.weight"},
        ),
        TOKENS,
    ),
    "two embeddings and head": (
        fn.tie(
            fn.serial(
                copies=fn.fan_out(2),
                both=fn.parallel(
                    fn.embedding(6, 8, dtype=DOUBLE), fn.embedding(6, 8, dtype=DOUBLE)
                ),
                y=fn.add(),
                head=fn.linear(6, bias=False),
            ),
            {"head.weight": "both.0.weight", "both.1.weight": "both.0.weight"},
        ),
        TOKENS,
    ),
    "stacks of embeddings": (
        fn.serial(
            fn.reshape(1, -1),
            fn.fan_out(2),
            fn.concat(0),
            fn.stacked(fn.embedding(6, 3, dtype=DOUBLE), 2),
        ),
        TOKENS,
    ),
    "stacks of stacks of embeddings": (
        fn.serial(
            fn.reshape(3, 1, -1),
            fn.fan_out(2),
            fn.concat(1),
            fn.stacked(fn.stacked(fn.embedding(60, 3, dtype=DOUBLE), 2), 3),
        ),
        TOKENS,
    ),
    "no tokens": (fn.embedding(6, 3, dtype=DOUBLE), TOKENS[:, :0]),
    "remat": (fn.remat(fn.serial(fn.linear(6), fn.dropout(0.5), fn.linear(3))), STEPS),
    "lora": (fn.lora(WIDE, 2), STEPS),
    "repeated weight_norm": (fn.repeat(fn.weight_norm(fn.linear(4)), 2), STEPS),
    "lstm": (fn.lstm(4, num_layers=2, bidirectional=True, proj_size=2), STEPS),
    "cast": (fn.cast(fn.serial(fn.linear(4)), DOUBLE), STEPS),
}


@pytest.mark.parametrize("name", TWICE)
def test_the_same_where_params_are_used_twice_or_made_of_others(name):
    compare(*TWICE[name])


def norms_and_sums(net, params, x, weights):
    def run(params, x, weights):
        f = fn.defer_examples(net, fn.mse())
        y = net.apply(params, x)[0]
        _, deferred, _ = f(params, (x, torch.zeros_like(y)))
        found = fn.example_norms(deferred, by="leaf")
        return found, fn.gradients(fn.weighted(deferred, weights))

    return run(params, x, weights), fn.jit(run)(params, x, weights)


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", ["repeated", "tied"])
def test_under_jit_they_are_the_same(name):
    net, x = {
        "repeated": (fn.repeat(fn.serial(fn.linear(4), fn.tanh()), 2), STEPS),
        "tied": TWICE["embedding and head are one"],
    }[name]
    params, _ = net.init(KEY, x)
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=DOUBLE)
    eager, compiled = norms_and_sums(net, params, x, weights)
    for one, other in zip(eager, compiled, strict=True):
        close(one, other)


def flops(function):
    with FlopCounterMode(display=False) as counted:
        function()
    return counted.get_total_flops()


@pytest.mark.parametrize(("positions", "formed"), [((), False), ((7,), False), ((64,), True)])
def test_norms_take_gram_matrices_where_they_are_cheaper(positions, formed):
    x = torch.ones(5, *positions, 40)
    net = fn.linear(40, bias=False)
    params, _ = net.init(KEY, x)
    _, deferred, _ = fn.defer_examples(net, fn.mse())(params, (x, x))
    t = positions[0] if positions else 1
    forming = 2 * 5 * t * 40 * 40
    grams = 0 if t == 1 else 2 * 5 * t * t * 80
    assert flops(lambda: fn.example_norms(deferred)) == (forming if formed else grams)
    # The sum is one product, as of an ordinary backward pass.
    assert flops(lambda: fn.gradients(fn.weighted(deferred, torch.ones(5)))) == forming


def test_half_precision_has_norms_in_float32():
    x = torch.full((2, 8), 1e-4, dtype=torch.float16)
    net = fn.linear(8)
    params, _ = net.init(KEY, x)
    f = fn.defer_examples(net, fn.mse("sum"))
    _, deferred, _ = f(params, (x, net.apply(params, x)[0] + 1e-3))
    norms = fn.example_norms(deferred)
    assert norms.dtype == torch.float32
    assert bool((norms > 0).all())


def test_the_norm_of_tied_weights_that_cancel_is_a_number():
    index = torch.tensor([[3, 7, 7], [1, 0, 3]])
    x, dy = fn.random.normal(KEY, (2, 3, 4)), torch.zeros(2, 3, 50)
    dy.scatter_(2, index[..., None], 1000.0)
    both = Products(dy, x, (50, 4)) + Rows(index, -1000.0 * x, (50, 4))
    assert both.squares().sqrt().isfinite().all()


def test_without_params_the_norms_are_zero():
    x = torch.ones(4, 3)
    _, deferred, _ = fn.defer_examples(fn.tanh(), fn.mse())({}, (x, x))
    assert torch.equal(fn.example_norms(deferred), torch.zeros(4))


def test_weights_by_layer_are_those_of_each():
    params, _ = WIDE.init(KEY, STEPS)
    f = fn.defer_examples(WIDE, fn.mse())
    _, deferred, _ = f(params, (STEPS, torch.zeros(3, 7, 30, dtype=DOUBLE)))
    assert list(fn.example_norms(deferred, by="layer")) == ["0", "2"]
    one, other = torch.ones(3, dtype=DOUBLE), torch.tensor([0.0, 1.0, -1.0], dtype=DOUBLE)
    found = fn.gradients(fn.weighted(deferred, {"0": one, "2": other}))
    close(fn.gradients(fn.weighted(deferred, one))["0"], found["0"])
    close(fn.gradients(fn.weighted(deferred, other))["2"], found["2"])


def test_what_is_not_of_examples_is_refused():
    x = torch.ones(4, 3)
    params, _ = WIDE.init(KEY, x)
    y, pullback, _ = WIDE.vjp(params, x)
    whole, _ = fn.defer(pullback)(y)
    for function in (fn.example_gradients, fn.example_norms):
        with pytest.raises(ValueError, match=f"{function.__name__}: .* that of a whole batch"):
            function(whole)
        with pytest.raises(TypeError, match=f"{function.__name__}: expects a Deferred"):
            function(params)
    _, deferred, _ = fn.defer_examples(WIDE, fn.mse())(params, (x, y))
    with pytest.raises(ValueError, match="that of a whole batch"):
        fn.example_norms(fn.weighted(deferred, torch.ones(4)))
    with pytest.raises(ValueError, match=r"by must be one of .* got 'param'"):
        fn.example_norms(deferred, by="param")
    with pytest.raises(ValueError, match=r"weights of shape \(4,\), .* got \(3,\)"):
        fn.weighted(deferred, torch.ones(3))
    with pytest.raises(ValueError, match=r"expects weights of \['0', '2'\], got \['0'\]"):
        fn.weighted(deferred, {"0": torch.ones(4)})
    with pytest.raises(TypeError, match="expects tensors as weights"):
        fn.weighted(deferred, 2.0)
    with pytest.raises(ValueError, match="one of no layers"):
        fn.example_norms(fn.defer_examples(fn.serial(), fn.mse())({}, (x, x))[1])
    with pytest.raises(ValueError, match="its deferred gradient was made for dy"):
        fn.gradients(deferred)


def test_a_layer_of_the_users_needs_no_formula():
    def scale_rule(residuals, dy, *, params, x):
        dparams = {"scale": (dy * residuals["x"]).sum()} if params else None
        return dparams, dy * residuals["scale"] if x else None

    def init(x):
        return {"scale": fn.Param((), fn.initializers.ones())}

    def vjp(params, x):
        return x * params["scale"], fn.Pullback(scale_rule, {"x": x, **params})

    layer = fn.stateless(fn.declare(init), lambda params, x: x * params["scale"], vjp, name="scale")
    compare(fn.serial(fn.linear(3), layer), STEPS)


def test_small_gradients_are_formed_once_for_norm_and_sum():
    x = fn.random.normal(KEY, (5, 64, 16))
    net = fn.serial(fn.linear(8), fn.tanh(), fn.repeat(fn.linear(8), 2))
    params, _ = net.init(KEY, x)
    _, deferred, _ = fn.defer_examples(net, fn.mse())(params, (x, torch.zeros(5, 64, 8)))
    formed = formed_where_small(deferred)
    assert formed.parts["0"].rule is formed_rule
    assert formed.parts["2"].rule is deferred.parts["2"].rule
    torch.testing.assert_close(fn.example_norms(deferred), fn.example_norms(formed))
    weights = torch.arange(5.0)
    expected, found = (fn.gradients(fn.weighted(each, weights)) for each in (deferred, formed))
    torch.testing.assert_close(expected, found)
    assert flops(lambda: fn.gradients(fn.weighted(formed.parts["0"], weights))) < 2 * 5 * 200
