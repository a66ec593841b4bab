"""`jvp` and `hvp`: what torch.func and autograd give, in every transformation, and their errors."""

import pytest
import torch

import funcnet as fn

DOUBLE = torch.float64
X = fn.random.normal(fn.key(1), (6, 3), DOUBLE)
V = fn.random.normal(fn.key(2), (6, 3), DOUBLE)
TOKENS = torch.tensor([0, 2, 1, 2, 0, 1])


def test_a_jvp_of_trees_is_torchs_of_their_leaves():
    def f(first, x):
        return {"a": first["w"].sin() * x, "b": (first["b"].sum(), x.exp())}

    first, tangent = {"w": X, "b": V[0]}, {"w": V, "b": X[1]}
    out, along = fn.jvp(f, (first, V), (tangent, X))
    expected = torch.func.jvp(f, (first, V), (tangent, X))
    torch.testing.assert_close((out, along), expected, rtol=0, atol=0)


def test_what_has_no_tangent_is_held_fixed():
    def f(params, x, tokens):
        return params["w"] * x, tokens, params["b"][tokens].sum(), x.detach()

    params = {"w": X, "b": V[:, 0]}
    out, along = fn.jvp(f, (params, V, TOKENS), ({"w": V, "b": None}, None, None))
    torch.testing.assert_close(along[0], V * V)
    assert torch.equal(out[1], TOKENS)
    assert along[1] is None
    assert along[2] == 0
    assert (along[3] == 0).all()


def test_aux_is_not_derived():
    def f(x):
        return x.square(), {"mean": x.mean(), "count": 3}

    out, along, aux = fn.jvp(f, (X,), (V,), has_aux=True)
    torch.testing.assert_close((out, along), (X * X, 2 * X * V))
    assert aux["count"] == 3
    assert aux["mean"] == X.mean()
    assert (along + aux["mean"]).isfinite().all()


NET = fn.serial(fn.linear(4), fn.tanh(), fn.linear(1))
PARAMS, _ = NET.init(fn.key(0), X)


def second(x, v):
    """The derivative of the gradient by x, along v, and that of its sum of squares by x."""

    def slope(x):
        y, pullback, _ = NET.vjp(PARAMS, x)
        return pullback(torch.ones_like(y), params=False)[1]

    def squares(x):
        return fn.jvp(slope, (x,), (v,))[1].square().sum()

    return fn.jvp(slope, (x,), (v,)), fn.jvp(squares, (x,), (v,)), torch.func.grad(squares)(x)


def test_jvp_is_the_same_in_every_transformation():
    expected = second(X, V)

    def of_rows(x, v):
        return fn.vmap(lambda x, v: second(x[None], v[None]))(x, v)

    def of_steps(x, v):
        return fn.scan(lambda carry, each: (carry, second(*each)), None, (x[None], v[None]))[1]

    def run(x, v):
        return second(x, v), of_rows(x, v), of_steps(x, v)

    plain, rows, steps = run(X, V)
    compiled = fn.jit(run)
    assert compiled.lower(X, V).why_not_one is None
    torch.testing.assert_close(compiled(X, V), (plain, rows, steps))
    torch.testing.assert_close(rows[0][1][:, 0], expected[0][1])
    torch.testing.assert_close(rows[2][:, 0], expected[2])
    torch.testing.assert_close(steps[2][0], expected[2])


def test_a_direction_without_memory_of_its_own_is_compiled():
    def run(x):
        along = torch.tensor([1.0, 0.0, 0.0], dtype=DOUBLE).expand_as(x)
        return fn.jvp(lambda x: NET.apply(PARAMS, x)[0], (x,), (along,))

    compiled = fn.jit(run)
    assert not compiled.lower(X).called
    torch.testing.assert_close(compiled(X), run(X))


def test_a_jvp_and_a_pullback_are_transposes():
    y, pullback, _ = NET.vjp(PARAMS, X)
    _, along = fn.jvp(lambda x: NET.apply(PARAMS, x)[0], (X,), (V,))
    dy = torch.cos(y)
    torch.testing.assert_close((along * dy).sum(), (pullback(dy)[1] * V).sum())


ERRORS = [
    (lambda: fn.jvp(3, (X,), (V,)), TypeError, "jvp: expects a function"),
    (lambda: fn.jvp(torch.sin, X, V), TypeError, "jvp: expects a tuple of primals"),
    (lambda: fn.jvp(torch.sin, (X,), (V, V)), ValueError, "1 primals and 2"),
    (lambda: fn.jvp(torch.sin, (X,), (None,)), ValueError, "a tangent that is not None"),
    (lambda: fn.jvp(torch.sin, (X,), (V[:2],)), ValueError, r"at '0' a tangent like"),
    (lambda: fn.jvp(torch.sin, (X,), (V.float(),)), TypeError, "a tangent like"),
    (lambda: fn.jvp(torch.sin, ({"a": X},), ({"b": X},)), ValueError, "tangent 0 is no tree like"),
    (lambda: fn.jvp(torch.sin, ({"a": X},), ({"a": 1.0},)), TypeError, r"at '0.a' a tangent"),
    (lambda: fn.jvp(lambda x: x, (TOKENS,), (TOKENS,)), TypeError, "expects None at '0'"),
    (lambda: fn.jvp(torch.argmax, (X,), (V,)), TypeError, "no floating-point tensor"),
    (lambda: fn.jvp(torch.sin, (X,), (V,), has_aux=True), TypeError, r"a pair, \(out, aux\)"),
    (lambda: fn.hvp(NET, fn.mse())(PARAMS, (X, X[:, :1]), {}), ValueError, "hvp: v: the tree has"),
    (lambda: fn.hvp(torch.sin, fn.mse()), TypeError, "expects a Layer"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_wrong_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


NETS = {
    "tanh": (NET, fn.mse(), X, X[:, :1].sin()),
    "state and noise": (
        fn.serial(fn.linear(4), fn.batch_norm(), fn.gelu(), fn.dropout(0.3), fn.linear(3)),
        fn.cross_entropy(),
        X,
        TOKENS,
    ),
    "tied and repeated": (
        fn.serial(
            fn.tie(
                fn.serial(
                    embed=fn.embedding(5, 3, dtype=DOUBLE),
                    body=fn.repeat(fn.serial(fn.linear(3), fn.tanh()), 2),
                    head=fn.linear(5, bias=False),
                ),
                {"head.weight": "embed.weight"},
            ),
        ),
        fn.cross_entropy(),
        TOKENS,
        TOKENS,
    ),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("train", [True, False])
def test_hvp_is_autograds_of_the_gradient_through_apply(name, train):
    net, loss, x, target = NETS[name]
    params, state = net.init(fn.key(0), x)
    v = fn.tree.map(lambda leaf: torch.sin(7 * leaf + 1), params)
    options = {"state": state, "key": fn.key(5), "train": train}
    found = fn.hvp(net, loss)(params, (x, target), v, **options)

    def total(params):
        return loss.apply(net.apply(params, x, **options)[0], target)

    expected = torch.func.jvp(torch.func.grad(total), (params,), (v,))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_hvp_runs_under_jit_and_for_many_directions_under_vmap():
    net, loss, x, target = NETS["state and noise"]
    params, state = net.init(fn.key(0), x)
    leaves, treedef = fn.tree.flatten(params)
    keys = fn.random.split(fn.key(3), 4)
    product = fn.hvp(net, loss)

    def run(keys):
        def along(key):
            v = treedef.unflatten([fn.random.normal(key, p.shape, p.dtype) for p in leaves])
            return product(params, (x, target), v, state, key=fn.key(5))

        return fn.vmap(along)(keys)

    torch.testing.assert_close(fn.jit(run)(keys), run(keys))


def test_norms_are_compiled_where_x_alone_moves():
    images = fn.random.normal(fn.key(4), (3, 4, 5), DOUBLE)
    layers = fn.layer_norm(), fn.group_norm(2), fn.batch_norm()
    made = [layer.init(fn.key(0), images) for layer in layers]

    def run(x):
        def norms(x):
            return [
                layer.apply(params, x, state, train=True)[0].tanh()
                for layer, (params, state) in zip(layers, made, strict=True)
            ]

        return fn.jvp(norms, (x,), (x.sin(),))

    torch.testing.assert_close(fn.jit(run)(images), run(images))
