"""remat: the same layer with fewer residuals, whose second run nothing undoes."""

import pytest
import torch

import funcnet as fn

X = fn.random.normal(fn.key(0), (16, 8))


def block():
    return fn.serial(fn.linear(8), fn.batch_norm(), fn.tanh(), fn.dropout(0.3))


def mlp(wrap, depth=6, width=64):
    blocks = [fn.serial(fn.linear(width), fn.tanh(), fn.linear(width)) for _ in range(depth)]
    return fn.serial(*[wrap(each) for each in blocks])


def numbers(pullback):
    return sum({leaf.data_ptr(): leaf.numel() for leaf in fn.tree.leaves(pullback)}.values())


@pytest.mark.parametrize("policy", [None, ["0"], lambda path, layer: path == "2"])
@pytest.mark.parametrize("halves", [(True, True), (True, False), (False, True)])
def test_it_is_the_layer_bit_for_bit(policy, halves):
    plain, again = block(), fn.remat(block(), policy)
    params, state = plain.init(fn.key(1), X)
    assert fn.tree.to_dotted(again.init(fn.key(1), X)[0]).keys() == fn.tree.to_dotted(params).keys()
    y, pullback, after = plain.vjp(params, X, state, key=fn.key(2))
    y2, pullback2, after2 = again.vjp(params, X, state, key=fn.key(2))
    want = dict(zip(("params", "x"), halves, strict=True))
    expected, found = pullback(torch.ones_like(y), **want), pullback2(torch.ones_like(y), **want)
    for one, other in zip(
        fn.tree.leaves((y, after, expected)), fn.tree.leaves((y2, after2, found)), strict=True
    ):
        assert torch.equal(one, other)
    assert [half is None for half in found] == [not wanted for wanted in halves]


def test_only_inputs_are_kept():
    plain, again = mlp(lambda layer: layer), mlp(fn.remat)
    x = torch.ones(128, 64)
    params, _ = plain.init(fn.key(0), x)
    kept = numbers(plain.vjp(params, x)[1])
    kept_again = numbers(again.vjp(params, x)[1])
    held = sum(leaf.numel() for leaf in fn.tree.leaves(params))
    assert kept_again - held == 6 * x.numel()
    assert kept - held >= 11 * x.numel()


def test_a_policy_keeps_what_it_names():
    net = fn.serial(fn.linear(8), fn.tanh(), fn.linear(8), fn.tanh(), fn.linear(8))
    params, _ = net.init(fn.key(0), X)

    def calls(policy):
        runs = []

        def counting(path, layer):
            if path in ("", "remat"):
                return layer

            def apply(params, x, state={}, **options):  # noqa: B006
                runs.append(path)
                return layer.apply(params, x, state, **options)

            def vjp(params, x, state={}, **options):  # noqa: B006
                runs.append(path)
                return layer.vjp(params, x, state, **options)

            return fn.Layer(layer.init, apply, vjp)

        y, pullback, _ = fn.remat(fn.map_layers(counting, net), policy).vjp(params, X)
        pullback(torch.ones_like(y))
        return sorted(runs)

    assert calls(None) == sorted(2 * ["0", "1", "2", "3", "4"])
    assert calls(["1"]) == sorted(["1", *2 * ["0", "2", "3", "4"]])
    assert calls(lambda path, layer: True) == ["0", "1", "2", "3", "4"]


def test_a_training_run_is_the_same_eager_jitted_and_vmapped():
    plain = fn.serial(block(), block(), fn.linear(2))
    again = fn.serial(fn.remat(block()), fn.remat(block(), policy=["0"]), fn.linear(2))
    target = torch.zeros(16, 2)

    def run(net, key):
        optimizer = fn.sgd(0.05, 0.9)
        step = fn.train_step(net, fn.mse(), optimizer)
        state = fn.init_train_state(net, optimizer, key, X)
        return fn.scan(lambda state, _: step(state, (X, target)), state, length=4)

    expected = run(plain, fn.key(3))
    keys = torch.stack([fn.key(3), fn.key(4)])
    found = [
        run(again, fn.key(3)),
        fn.jit(lambda key: run(again, key))(fn.key(3)),
        fn.tree.map(lambda leaf: leaf[0], fn.vmap(lambda key: run(again, key))(keys)),
        fn.tree.map(lambda leaf: leaf[0], fn.jit(fn.vmap(lambda key: run(again, key)))(keys)),
    ]
    for one in found:
        for leaf, other in zip(fn.tree.leaves(one), fn.tree.leaves(expected), strict=True):
            torch.testing.assert_close(leaf, other)


def workspace(wrap):
    """The bytes that the compiled backward pass needs beside arguments and results."""
    net = mlp(wrap)
    x = torch.ones(512, 64)
    params, _ = net.init(fn.key(0), x)

    def gradient(params, x):
        y, pullback, _ = net.vjp(params, x)
        return pullback(y, x=False)[0]

    code = fn.jit(gradient).lower(params, x).code
    return int(code.split("Workspace workspace(")[1].split(")")[0]) / (4 * x.numel())


@pytest.mark.cpu_only
def test_the_compiler_does_not_undo_it():
    plain, again = workspace(lambda layer: layer), workspace(fn.remat)
    # 6 blocks of 2 residuals each, against 6 inputs and one block's work.
    assert plain > 11
    assert again < 10


def test_misuse_is_told():
    with pytest.raises(TypeError, match="expects a Layer, got the function "):
        fn.remat(fn.linear)
    with pytest.raises(ValueError, match="policy names '7', which no layer is"):
        fn.remat(block(), policy=["7"])
    with pytest.raises(TypeError, match="collection of paths"):
        fn.remat(block(), policy="0")


def test_errors_inside_name_the_layer():
    net = fn.serial(first=fn.remat(fn.serial(fn.linear(4))), second=fn.linear(2))
    params, _ = net.init(fn.key(0), X)
    with pytest.raises((ValueError, TypeError), match=r"serial\['first'\].*serial\['0'\]"):
        net.vjp(params, X[:, :3])
