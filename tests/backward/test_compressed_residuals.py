"""compressed: the same forward pass, whose residuals take less memory."""

import gc
import threading
import weakref

import pytest
import torch

import funcnet as fn
from funcnet.backward.memory.compressed_residuals import decompressed
from funcnet.backward.memory.storage import decode, encode

X = fn.random.normal(fn.key(0), (64, 32))


def net():
    return fn.serial(
        fn.linear(32), fn.layer_norm(), fn.relu(), fn.residual(fn.linear(32)), fn.tanh(),
        fn.linear(32), fn.batch_norm(), fn.dropout(0.2), fn.linear(4),
    )  # fmt: skip


def kept_bytes(layer, params, x=X, **options):
    """The bytes of the residuals that are not params, each once."""
    _, pullback, _ = layer.vjp(params, x, **options)
    own = {id(leaf) for leaf in fn.tree.leaves(params)}
    storages = {
        leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
        for leaf in fn.tree.leaves(pullback)
        if id(leaf) not in own
    }
    return sum(storages.values())


def relative_error(found, expected):
    pairs = zip(fn.tree.leaves(found), fn.tree.leaves(expected), strict=True)
    differences = [((a - b).square().sum(), b.square().sum()) for a, b in pairs]
    error, size = [sum(each) for each in zip(*differences, strict=True)]
    return float((error / size).sqrt())


FORMS = ["int8", "bfloat16", "float16", "bit", torch.device("cpu"), lambda path, name, x: None]
ERRORS = dict(zip(map(str, FORMS), (0.02, 0.005, 0.001, 0.0, 0.0, 0.0), strict=True))


@pytest.mark.parametrize("form", FORMS, ids=["int8", "bfloat16", "float16", "bit", "cpu", "none"])
@pytest.mark.parametrize("train", [True, False])
def test_the_forward_pass_is_unchanged_and_the_gradients_are_near(form, train):
    plain, small = net(), fn.compressed(net(), form)
    params, state = small.init(fn.key(1), X)
    y, pullback, after = plain.vjp(params, X, state, key=fn.key(2), train=train)
    y2, pullback2, after2 = small.vjp(params, X, state, key=fn.key(2), train=train)
    for one, other in zip(fn.tree.leaves((y2, after2)), fn.tree.leaves((y, after)), strict=True):
        assert torch.equal(one, other)
    expected, found = pullback(y), pullback2(y)
    assert relative_error(found, expected) <= ERRORS[str(form)]
    assert relative_error(pullback2(y), found) == 0
    assert pullback2(y, params=False)[0] is None
    assert pullback2(y, x=False)[1] is None


@pytest.mark.parametrize("form", ["bit", torch.device("cpu")])
def test_exact_forms_keep_the_laws(form):
    for layer in (fn.relu(), fn.relu6(), fn.hardtanh(-0.5, 0.7), fn.dropout(0.3), net()):
        fn.testing.check_layer(fn.compressed(layer, form), X[:5, :32])


@pytest.mark.parametrize("form", ["int8", "bfloat16"])
def test_params_and_state_are_kept_as_they_are(form):
    params, state = net().init(fn.key(1), X)
    small = fn.compressed(net(), form)
    _, pullback, _ = small.vjp(params, X, state, key=fn.key(2), train=False)
    found = {id(leaf) for leaf in fn.tree.leaves(pullback)}
    names = ("0.weight", "1.weight", "3.weight", "5.weight", "6.weight", "8.weight")
    flat = fn.tree.to_dotted(params)
    assert all([id(flat[name]) in found for name in names])
    assert id(state["6"]["running_mean"]) in found


def test_a_tensor_that_two_layers_keep_is_stored_once():
    layers = fn.serial(fn.tanh(), fn.linear(32), fn.tanh(), fn.linear(32))
    params, _ = layers.init(fn.key(1), X)
    one = X.numel() * (1 + 4 / 128)
    assert kept_bytes(fn.compressed(layers), params) == 2 * one
    both = fn.branch(fn.linear(32), fn.linear(32))
    params, _ = both.init(fn.key(1), X)
    assert kept_bytes(fn.compressed(both), params, key=fn.key(3)) == one


def test_what_each_form_takes():
    layers = fn.serial(fn.linear(32), fn.layer_norm(), fn.relu(), fn.dropout(0.1))
    params, _ = layers.init(fn.key(1), X)
    size, statistics = X.numel(), 2 * 64 * 4
    expected = {
        "int8": 2 * size * (1 + 4 / 128) + 2 * size / 8,
        "bfloat16": 2 * size * 2 + 2 * size / 8,
        "bit": 2 * size * 4 + 2 * size / 8,
    }
    for form, wanted in expected.items():
        found = kept_bytes(fn.compressed(layers, form), params, key=fn.key(2))
        assert found == wanted + statistics, form


def test_activations_go_as_the_layers_return():
    alive = []

    def watched(path, layer):
        if layer.name != "linear":
            return layer

        def vjp(params, x, state={}, **options):  # noqa: B006
            alive.append(weakref.ref(x))
            return layer.vjp(params, x, state, **options)

        return fn.wrap(layer, lambda layer: layer._replace(vjp=vjp))

    layers = fn.serial(*[each for _ in range(4) for each in (fn.tanh(), fn.linear(32))])
    params, _ = layers.init(fn.key(1), X)
    small = fn.compressed(fn.map_layers(watched, layers))
    _, pullback, _ = small.vjp(params, X)
    gc.collect()
    assert [each() is None for each in alive] == [True] * 4
    assert pullback(X)[1].shape == X.shape


def test_choose_sees_each_residual_and_decides():
    seen = []

    def choose(path, name, x):
        seen.append((path, name, tuple(x.shape)))
        return "bfloat16" if path == "1" and name == "x" else None

    layers = fn.serial(fn.linear(8), fn.layer_norm(), fn.relu())
    params, _ = layers.init(fn.key(1), X)
    _, pullback, _ = fn.compressed(layers, choose).vjp(params, X)
    assert seen == [
        ("0", "x", (64, 32)),
        *[("1", name, (64, size)) for name, size in (("mean", 1), ("rstd", 1), ("x", 8))],
        ("2", "y", (64, 8)),
    ]
    halves = [leaf.shape for leaf in fn.tree.leaves(pullback) if leaf.dtype == torch.bfloat16]
    assert halves == [(64, 8)]


COMBINATIONS = {
    "remat": lambda block: fn.serial(fn.remat(block), block),
    "residual": lambda block: fn.serial(
        fn.residual(block), fn.fan_out(2), fn.shared(block), fn.add()
    ),
    "repeat": lambda block: fn.repeat(block, 3),
    "reversible": lambda block: fn.reversible((block, block), dim=0),
    "tie": lambda block: fn.tie(fn.serial(block, block), {"1.0.weight": "0.0.weight"}),
    "cast": lambda block: fn.cast(block, torch.float64),
    "freeze": lambda block: fn.freeze(fn.serial(block, block), ["0"]),
    "twice": lambda block: fn.compressed(block, "bfloat16"),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_it_works_around_combinators(name):
    block = fn.serial(fn.linear(32), fn.layer_norm(), fn.relu(), fn.dropout(0.1))
    plain = COMBINATIONS[name](block)
    params, state = plain.init(fn.key(1), X)
    y, pullback, _ = plain.vjp(params, X, state, key=fn.key(2))
    for form, error in (("int8", 0.02), ("bit", 1e-6)):
        y2, pullback2, _ = fn.compressed(plain, form).vjp(params, X, state, key=fn.key(2))
        assert torch.equal(y, y2)
        assert relative_error(pullback2(y), pullback(y)) < error


def test_a_training_step_is_the_same_eager_jitted_vmapped_and_scanned():
    layers = fn.serial(fn.linear(32), fn.layer_norm(), fn.relu(), fn.dropout(0.1), fn.linear(2))
    optimizer, target = fn.sgd(0.1, 0.9), torch.zeros(64, 2)

    def run(model, key, steps=3):
        step = fn.train_step(model, fn.mse(), optimizer)
        state = fn.init_train_state(model, optimizer, key, X)
        return fn.scan(lambda state, _: step(state, (X, target)), state, length=steps)[0].params

    small = fn.compressed(layers)
    expected, start = run(layers, fn.key(3)), run(layers, fn.key(3), 1)
    eager = run(small, fn.key(3))
    assert relative_error(eager, expected) < 1e-3 < relative_error(eager, start)
    keys = torch.stack([fn.key(3), fn.key(4)])
    jitted = fn.jit(fn.vmap(lambda key: run(small, key)))(keys)
    for found in (jitted, fn.vmap(lambda key: run(small, key))(keys)):
        solo = fn.tree.map(lambda leaf: leaf[0], found)
        assert relative_error(solo, eager) < 1e-4


def test_a_donated_compiled_step_and_gradients_of_examples():
    pairs = fn.reversible(*[(fn.tanh(), fn.linear(16))] * 2, dim=-1)
    small = fn.compressed(fn.serial(pairs, fn.linear(8), fn.layer_norm(), fn.relu()))
    optimizer, target = fn.adam(1e-2), torch.zeros(64, 8)
    step = fn.train_step(small, fn.mse(), optimizer)
    start = [fn.init_train_state(small, optimizer, fn.key(3), X) for _ in range(2)]
    for each in range(2):
        take = fn.jit(step, donate=0) if each else step
        for _ in range(3):
            start[each], _ = take(start[each], (X, target))
    assert relative_error(start[1].params, start[0].params) < 1e-4

    params = start[0].params
    plain = fn.serial(pairs, fn.linear(8), fn.layer_norm(), fn.relu())
    found, expected = [
        fn.example_norms(fn.defer_examples(each, fn.mse())(params, (X, target))[1])
        for each in (small, plain)
    ]
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


def workspace(form, depth=12, width=64, batch=1024):
    """Units of an activation that the compiled gradient needs beside arguments and results."""
    layers = [each for _ in range(depth) for each in (fn.linear(width), fn.layer_norm(), fn.relu())]
    plain = fn.serial(*layers)
    small = plain if form is None else fn.compressed(plain, form)
    x = torch.ones(batch, width)
    params, _ = plain.init(fn.key(0), x)

    def gradient(params, x, key):
        y, pullback, _ = small.vjp(params, x, key=key)
        return pullback(y, x=False)[0]

    code = fn.jit(gradient).lower(params, x, fn.key(0)).code
    return int(code.split("Workspace workspace(")[1].split(")")[0]) / x.nbytes


@pytest.mark.cpu_only
def test_the_compiler_keeps_what_is_stored_alone():
    plain, small = workspace(None), workspace("int8")
    assert plain > 20
    assert small < 0.5 * plain


def test_a_stored_value_has_the_right_mean():
    x = fn.random.normal(fn.key(1), (4, 128))
    keys = fn.random.split(fn.key(2), 2000)
    decoded = fn.vmap(lambda key: decode(*encode(x, "int8", key)))(keys)
    scale = x.abs().amax(-1, keepdim=True) / 127
    assert ((decoded - x).abs() <= 1.001 * scale).all()
    # A rounding error has a standard deviation of at most half a step.
    assert ((decoded.mean(0) - x).abs() < 5 * scale / 2 / 2000**0.5).all()
    nearest = decode(*encode(x, "int8", None))
    assert ((nearest - x).abs() <= 0.501 * scale).all()


def test_a_gradient_that_is_linear_in_what_is_stored_has_the_right_mean():
    layer = fn.linear(3, bias=False)
    params, _ = layer.init(fn.key(1), X)
    _, pullback, _ = layer.vjp(params, X)
    dy = fn.random.normal(fn.key(5), (64, 3))

    def gradient(key):
        _, pullback, _ = fn.compressed(layer).vjp(params, X, key=key)
        return pullback(dy, x=False)[0]["weight"]

    found = fn.vmap(gradient)(fn.random.split(fn.key(6), 2000))
    bias = found.mean(0) - pullback(dy)[0]["weight"]
    assert (bias.abs() < 5 * found.std(0) / 2000**0.5).all()


@pytest.mark.parametrize("shape", [(1,), (7,), (128,), (131,), (3, 257), (5, 6), (2, 3, 4, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("key", [None, fn.key(3)], ids=["nearest", "stochastic"])
def test_int8_of_any_shape_and_dtype(shape, dtype, key):
    x = fn.random.normal(fn.key(1), shape).to(dtype)
    stored, told = encode(x, "int8", key)
    again = decode(stored, told)
    assert (again.shape, again.dtype) == (x.shape, dtype)
    assert (again - x).abs().max() <= x.abs().max() * (0.013 if dtype == torch.bfloat16 else 0.008)
    assert sum([each.nbytes for each in stored.values()]) <= x.numel() + 128 + 64
    member = {name: each[0] for name, each in fn.vmap(lambda x: encode(x, "int8", key)[0])(
        torch.stack([x, x])).items()}  # fmt: skip
    assert all([torch.equal(member[name], stored[name]) for name in stored])


@pytest.mark.parametrize("x", [torch.zeros(130), torch.full((4,), 1e-38), torch.tensor(3.0)])
def test_int8_of_zeros_of_the_tiniest_and_of_one(x):
    again = decode(*encode(x, "int8", fn.key(0)))
    torch.testing.assert_close(again, x, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("shape", [(1,), (8,), (13,), (3, 5, 7)])
def test_bits_are_exact(shape):
    mask = fn.random.bernoulli(fn.key(1), 0.4, shape)
    stored, told = encode(mask, "bit", None)
    assert stored["bits"].numel() == -(-mask.numel() // 8)
    assert torch.equal(decode(stored, told), mask)


def test_relu_by_a_bit_is_relu_for_nan_and_infinities_too():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, 2.0, -1.0])
    dy = torch.tensor([1.0, 2.0, torch.inf, torch.nan, torch.inf, 6.0, 7.0, 8.0])
    expected = fn.relu().vjp({}, x)[1](dy)[1]
    found = fn.compressed(fn.relu(), "bit").vjp({}, x)[1](dy)[1]
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_values_that_are_not_finite_are_told_or_give_nan(value):
    layers = fn.serial(first=fn.tanh(), head=fn.linear(4))
    small = fn.compressed(layers)
    params, _ = layers.init(fn.key(1), X)
    x = X.clone()
    x[3, 5] = value
    head = fn.compressed(fn.serial(head=fn.linear(4)))
    own = {"head": params["head"]}
    wrong = r"serial\['head'\] linear: 'x': int8 expects finite values, got 1 of 2048 that are not"
    with pytest.raises(ValueError, match=wrong):
        head.vjp(own, x)
    assert fn.compressed(fn.serial(head=fn.linear(4)), "bfloat16").vjp(own, x)[0].shape == (64, 4)
    _, pullback, _ = small.vjp(params, X)  # the error left nothing behind
    assert fn.tree.leaves(pullback(torch.ones(64, 4)))[0].isfinite().all()

    def gradient(x):
        y, pullback, _ = head.vjp(own, x)
        return pullback(torch.ones_like(y))[0]["head"]

    for transform in (fn.jit, lambda f: lambda x: fn.tree.map(lambda g: g[0], fn.vmap(f)(x[None]))):
        found = transform(gradient)(x)
        # The block of 128 values is that of four rows; each feature is in it.
        assert found["weight"].isnan().all()
        assert found["bias"].isfinite().all()


def test_second_derivatives_are_those_of_the_model():
    layers = fn.serial(fn.linear(8), fn.tanh(), fn.linear(1))
    x = X[:4, :3]
    params, _ = layers.init(fn.key(1), x)

    def penalty(model):
        def norm(params):
            _, pullback, _ = model.vjp(params, x)
            return pullback(torch.ones(4, 1))[1].square().sum()

        return torch.func.grad(norm)(params)

    assert relative_error(penalty(fn.compressed(layers)), penalty(layers)) < 1e-6


def test_a_deferred_gradient_keeps_what_is_stored():
    layers = fn.serial(fn.linear(32), fn.relu(), fn.linear(32, bias=False), fn.layer_norm())
    params, _ = layers.init(fn.key(1), X)
    _, pullback, _ = fn.compressed(layers).vjp(params, X, key=fn.key(2))
    expected = pullback(X)
    deferred, dx = fn.defer(pullback)(X)
    assert torch.equal(dx, expected[1])
    assert relative_error(fn.gradients(deferred), expected[0]) == 0
    assert fn.defer(pullback)(X, x=False)[1] is None
    found = {id(leaf) for leaf in fn.tree.leaves(deferred)}
    assert not found & {id(params[name]["weight"]) for name in ("0", "2")}
    stored = [leaf for leaf in fn.tree.leaves(deferred) if leaf.dtype == torch.int8]
    assert sum([leaf.numel() for leaf in stored]) == 3 * X.numel()


def test_a_pullback_can_be_decompressed():
    layers = fn.serial(fn.linear(32), fn.tanh(), fn.relu())
    params, _ = layers.init(fn.key(1), X)
    _, plain, _ = layers.vjp(params, X)
    _, pullback, _ = fn.compressed(layers, "bfloat16").vjp(params, X)
    again = fn.map_pullbacks(lambda path, each: decompressed(each), pullback)
    assert relative_error(again(X), pullback(X)) == 0
    assert [each.residuals.keys() for each in again.residuals.values()] == [
        {"x", "weight"}, {"y"}, {"mask"},
    ]  # fmt: skip
    torch.testing.assert_close(again.residuals["0"].residuals["x"], X, rtol=0.01, atol=0)
    for one in plain.residuals.values():
        assert decompressed(one) is one


def test_calls_of_several_threads_do_not_meet():
    layers = fn.serial(*[fn.linear(32), fn.tanh()] * 4)
    small = fn.compressed(layers)
    params, _ = layers.init(fn.key(1), X)
    found = {}

    def work(seed):
        x = fn.random.normal(fn.key(seed), (64, 32))
        for _ in range(5):
            _, pullback, _ = small.vjp(params, x, key=fn.key(seed))
            found[seed] = pullback(X)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    [each.start() for each in threads]
    [each.join() for each in threads]
    for seed, grads in found.items():
        x = fn.random.normal(fn.key(seed), (64, 32))
        again = small.vjp(params, x, key=fn.key(seed))[1](X)
        assert relative_error(grads, again) == 0


def test_it_shows_and_is_rebuilt_as_the_model():
    small = fn.compressed(fn.serial(fn.linear(3), fn.relu()), "bfloat16")
    assert repr(small) == "compressed(serial(linear(3), relu()), choose='bfloat16')"
    other = fn.map_layers(lambda path, layer: fn.tanh() if path == "1" else layer, small)
    assert repr(other) == "compressed(serial(linear(3), tanh()), choose='bfloat16')"
    assert kept_bytes(other, other.init(fn.key(0), X)[0]) == 2 * (X.numel() + 64 * 3)


def test_misuse_is_told():
    with pytest.raises(TypeError, match="compressed: expects a Layer"):
        fn.compressed(fn.linear)
    with pytest.raises(ValueError, match=r"compressed: choose expects 'int8', .* got 'int4'"):
        fn.compressed(fn.relu(), "int4")
    wrong = fn.compressed(fn.serial(fn.linear(4)), lambda path, name, x: "int2")
    params, _ = wrong.init(fn.key(0), X)
    with pytest.raises(ValueError, match=r"serial\['0'\] linear: choose\('0', 'x', ...\) expects"):
        wrong.vjp(params, X)
    bits = fn.compressed(fn.serial(fn.linear(4)), lambda path, name, x: "bit")
    with pytest.raises(ValueError, match=r"serial\['0'\] linear: 'bit' is for a boolean tensor"):
        bits.vjp(params, X)
