"""reversible: the gradients of plain residual pairs, from the last output alone."""

import pytest
import torch

import funcnet as fn

DOUBLE = torch.float64
X = tuple([fn.random.normal(fn.key(seed), (16, 8), DOUBLE) for seed in (1, 2)])


def block(width=8):
    return fn.serial(fn.layer_norm(), fn.linear(width), fn.tanh(), fn.dropout(0.3))


def plain_forward(run, x):
    x1, x2 = x
    for f, g in zip(run.names[::2], run.names[1::2], strict=True):
        x1 = x1 + run(f, x2)
        x2 = x2 + run(g, x1)
    return (x1, x2), {}


def plain_backward(pull, dy, residuals):
    dy1, dy2 = dy
    for g, f in zip(pull.names[::-2], pull.names[-2::-2], strict=True):
        dy1 = dy1 + pull(g, dy2)
        dy2 = dy2 + pull(f, dy1)
    return dy1, dy2


def plain(*pairs):
    """The same pairs, whose residuals are kept."""
    named = {
        f"{index}.{letter}": layer
        for index, pair in enumerate(pairs)
        for letter, layer in zip("fg", pair, strict=True)
    }
    return fn.combine("plain", named, plain_forward, plain_backward, dotted=True)


def assert_close(found, expected, **tolerance):
    assert fn.tree.paths(found) == fn.tree.paths(expected)
    for one, other in zip(fn.tree.leaves(found), fn.tree.leaves(expected), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


LAYERS = {
    "pairs": (fn.reversible((block(), block()), (block(), block())), X),
    "named, of two sizes": (
        fn.reversible(first=(fn.linear(8), fn.serial(fn.linear(6), fn.tanh()))),
        (X[0], X[1][:, :6]),
    ),
    "halves of a tensor": (fn.reversible((fn.linear(4), fn.linear(4)), dim=-1), X[0]),
    "convolutions": (
        fn.reversible(*[(fn.conv2d(2, 3, padding=1), fn.batch_norm())] * 2, dim=1),
        fn.random.normal(fn.key(3), (4, 4, 5, 5), DOUBLE),
    ),
    "no pairs": (fn.reversible(), X),
    "without params": (fn.reversible((fn.tanh(), fn.sigmoid())), X),
    "of trees": (
        fn.reversible((fn.parallel(fn.tanh(), fn.linear(8)), fn.parallel(fn.tanh(), fn.tanh()))),
        (X, X),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_it_keeps_the_laws(name):
    layer, x = LAYERS[name]
    fn.testing.check_layer(layer, x)


@pytest.mark.parametrize("halves", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("train", [True, False])
def test_it_is_plain_pairs_dropout_and_running_statistics_too(halves, train):
    pairs = [(block(), fn.serial(fn.batch_norm(), fn.linear(8), fn.dropout(0.2)))] * 6
    net, peer = fn.reversible(*pairs), plain(*pairs)
    params, state = net.init(fn.key(0), X)
    assert_close((params, state), peer.init(fn.key(0), X), rtol=0, atol=0)
    want = dict(zip(("params", "x"), halves, strict=True))
    y, pullback, after = net.vjp(params, X, state, key=fn.key(5), train=train)
    y2, pullback2, after2 = peer.vjp(params, X, state, key=fn.key(5), train=train)
    assert_close((y, after), (y2, after2), rtol=0, atol=0)
    found, expected = pullback(X, **want), pullback2(X, **want)
    assert [half is None for half in found] == [not wanted for wanted in halves]
    assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert_close(pullback(X, **want), found, rtol=0, atol=0)


def test_its_gradients_can_be_deferred():
    net = fn.reversible(*[(block(), fn.batch_norm())] * 3)
    params, state = net.init(fn.key(0), X)
    _, pullback, _ = net.vjp(params, X, state, key=fn.key(5))
    deferred, dx = fn.defer(pullback)(X)
    assert_close((fn.gradients(deferred), dx), pullback(X), rtol=0, atol=0)


def test_params_have_the_paths_of_the_pairs():
    net = fn.reversible((fn.linear(8), fn.tanh()), (fn.tanh(), fn.linear(8, bias=False)))
    params, _ = net.init(fn.key(0), X)
    assert list(fn.tree.to_dotted(params)) == ["0.f.weight", "0.f.bias", "1.g.weight"]
    assert repr(net) == "reversible((linear(8), tanh()), (tanh(), linear(8, bias=False)))"
    other = fn.map_layers(lambda path, layer: fn.relu() if path == "1.f" else layer, net)
    assert repr(other) == "reversible((linear(8), tanh()), (relu(), linear(8, bias=False)))"


def test_a_training_run_is_that_of_plain_pairs_eager_jitted_and_vmapped():
    def run(make, key):
        pairs = make(*[(block(), fn.serial(fn.linear(8), fn.batch_norm()))] * 3)
        net = fn.serial(fn.split(8), pairs, fn.concat(), fn.linear(2))
        x, target = torch.cat(X, -1), torch.zeros(16, 2, dtype=DOUBLE)
        optimizer = fn.sgd(0.05, 0.9)
        step = fn.train_step(net, fn.mse(), optimizer)
        state = fn.init_train_state(net, optimizer, key, x)
        return fn.scan(lambda state, _: step(state, (x, target)), state, length=4)

    expected = run(plain, fn.key(3))
    keys = torch.stack([fn.key(3), fn.key(4)])
    found = [
        run(fn.reversible, fn.key(3)),
        fn.jit(lambda key: run(fn.reversible, key))(fn.key(3)),
        fn.tree.map(lambda leaf: leaf[0], fn.vmap(lambda key: run(fn.reversible, key))(keys)),
    ]
    for one in found:
        for leaf, other in zip(fn.tree.leaves(one), fn.tree.leaves(expected), strict=True):
            torch.testing.assert_close(leaf, other)


def test_gradients_are_those_of_autograd_to_rounding_at_depth_64():
    net = fn.reversible(*[(block(), block())] * 64)
    for dtype, tolerance in ((DOUBLE, 1e-11), (torch.float32, 2e-3)):
        x = tuple([each.to(dtype) for each in X])
        params, _ = net.init(fn.key(0), x)
        _, pullback, _ = net.vjp(params, x, key=fn.key(1))
        flat = fn.tree.to_dotted(params)
        wanted = {path: leaf.clone().requires_grad_() for path, leaf in flat.items()}
        out, _ = net.apply(fn.tree.from_dotted(wanted), x, key=fn.key(1), train=True)
        torch.autograd.backward(out, x)
        for path, gradient in fn.tree.to_dotted(pullback(x)[0]).items():
            error = (gradient - wanted[path].grad).norm() / wanted[path].grad.norm()
            assert error < tolerance, path


def activations(depth):
    """Bytes of the residuals that are not params."""
    net = fn.reversible(*[(block(), block())] * depth)
    params, _ = net.init(fn.key(0), X)
    _, pullback, _ = net.vjp(params, X, key=fn.key(1))
    own = {id(leaf) for leaf in fn.tree.leaves(params)}
    kept = [leaf for leaf in fn.tree.leaves(pullback) if id(leaf) not in own]
    return sum([leaf.untyped_storage().nbytes() for leaf in kept])


def test_what_is_kept_is_the_same_at_any_depth():
    key = fn.key(0).untyped_storage().nbytes()
    assert activations(4) == activations(64) == 2 * X[0].untyped_storage().nbytes() + key


def workspace(depth, width=32, batch=4096):
    """Units of an activation that the compiled gradient needs beside arguments and results."""
    net = fn.reversible(*[(block(width), block(width))] * depth)
    x = torch.ones(batch, width), torch.ones(batch, width)
    params, _ = net.init(fn.key(0), x)

    def gradient(params, x, key):
        y, pullback, _ = net.vjp(params, x, key=key)
        return pullback(y, x=False)[0]

    code = fn.jit(gradient).lower(params, x, fn.key(0)).code
    return int(code.split("Workspace workspace(")[1].split(")")[0]) / x[0].nbytes


@pytest.mark.cpu_only
def test_the_compiler_keeps_no_early_activations():
    assert workspace(12) <= 1.05 * workspace(4)


def test_misuse_is_told():
    with pytest.raises(TypeError, match=r"reversible\['0'\] expects a pair of layers \(f, g\)"):
        fn.reversible(fn.linear(3))
    with pytest.raises(TypeError, match=r"reversible\['1'\] expects a pair of layers"):
        fn.reversible((fn.tanh(), fn.tanh()), (fn.tanh(),))
    with pytest.raises(TypeError, match=r"reversible\['0'\] g: expects a Layer"):
        fn.reversible((fn.tanh(), fn.linear))
    with pytest.raises(TypeError, match="by position or by name, not both"):
        fn.reversible((fn.tanh(), fn.tanh()), last=(fn.tanh(), fn.tanh()))
    with pytest.raises(TypeError, match="dim must be an int or None, got 'x'"):
        fn.reversible(dim="x")
    net = fn.reversible((fn.tanh(), fn.tanh()))
    with pytest.raises(TypeError, match=r"reversible: expects a tuple \(x1, x2\), got float64"):
        net.apply({}, X[0])
    with pytest.raises(TypeError, match="reversible: expects floating-point tensors"):
        net.apply({}, (torch.tensor([1]), torch.tensor([1])))
    halves = fn.reversible((fn.tanh(), fn.tanh()), dim=1)
    with pytest.raises(ValueError, match=r"two equal halves along dimension 1, got .*\(16, 7\)"):
        halves.apply({}, X[0][:, :7])


@pytest.mark.parametrize("function", ["init", "vjp"])
def test_a_pair_that_changes_shapes_is_told_by_path(function):
    net = fn.serial(first=fn.reversible((fn.tanh(), fn.tanh()), (fn.tanh(), fn.linear(4))))
    wrong = (
        r"serial\['first'\] reversible\['1.g'\] must keep the shape and dtype of the half that it "
        r"is added to, float64 \(16, 8\), got float64 \(16, 4\)"
    )
    params = {"first": {"1": {"g": {"weight": torch.ones(4, 8, dtype=DOUBLE)}}}}
    params["first"]["1"]["g"]["bias"] = torch.ones(4, dtype=DOUBLE)
    with pytest.raises(ValueError, match=wrong):
        net.init(fn.key(0), tuple(X)) if function == "init" else net.vjp(params, X)


def test_errors_inside_name_the_layer():
    net = fn.reversible((fn.tanh(), fn.linear(8)))
    params, _ = net.init(fn.key(0), X)
    with pytest.raises(ValueError, match=r"reversible\['0.g'\] linear: weight expects 8 features"):
        net.vjp(params, (X[0][:, :3], X[1][:, :3]))
