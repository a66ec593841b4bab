"""Combinators that make a layer's params of others, and `repeat`."""

import pytest
import torch
from layers.oracle import assert_near, params_of, randn, randomize, state_of
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

import funcnet as fn

X = randn(5, 6)


def mlp():
    return fn.serial(fn.linear(4), fn.batch_norm(), fn.tanh(), fn.dropout(0.3), fn.linear(2))


def drawn(layer, x, seed=0):
    """Params and state in float64, all different."""
    params, state = layer.init(fn.key(seed), x)
    return fn.tree.map(
        lambda leaf: leaf + 0.1 * randn(*leaf.shape, seed=leaf.numel()), params
    ), state


def test_tie_is_torchs_shared_parameter():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 3), nn.Linear(3, 7)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(torch.tanh(self.embed(x)))

    module = randomize(Tied().double())
    net = fn.tie(
        fn.serial(embed=fn.embedding(7, 3), act=fn.tanh(), head=fn.linear(7)),
        {"head.weight": "embed.weight"},
    )
    params = params_of(module)  # torch names a shared parameter once, too
    x, dy = torch.tensor([[0, 6], [6, 2]]), randn(2, 2, 7)
    y, pullback, _ = net.vjp(params, x)
    expected = module(x)
    expected.backward(dy)
    assert_near(y, expected.detach())
    grads = {name: each.grad for name, each in module.named_parameters()}
    assert_near(fn.tree.to_dotted(pullback(dy)[0]), grads)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"4.wieght": "0.weight"}, "tie: no leaf has the path '4.wieght', only"),
        ({"4.weight": "7.weight"}, "tie: no leaf has the path '7.weight', only"),
        ({"4": "0"}, "tie: expects the path of a leaf, and '4' has"),
        ({"4.weight": "0.weight"}, "tie: expects leaves of one shape and dtype, '4.weight' is"),
    ],
)
def test_tie_refuses_leaves_that_are_not_there_or_differ(paths, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the message is compared
        fn.tie(mlp(), paths).init(fn.key(0), X)
    assert str(raised.value).startswith(message)


def test_tie_refuses_chains():
    with pytest.raises(ValueError, match=r"^tie: \['b'\] are tied to others themselves$"):
        fn.tie(mlp(), {"a": "b", "b": "c"})


def test_freeze_gives_the_plain_gradients_of_what_is_left():
    net = mlp()
    params, state = drawn(net, X)
    _, pullback, _ = net.vjp(params, X, state, key=fn.key(1))
    dy = randn(5, 2)
    grads, dx = pullback(dy)
    frozen_net = fn.freeze(net, ["0", "4.weight"])
    frozen, learned = fn.tree.partition({"0.weight", "0.bias", "4.weight"}.__contains__, params)
    own_state = {**state, "frozen": frozen}
    _, pullback, new_state = frozen_net.vjp(learned, X, own_state, key=fn.key(1))
    own_grads, own_dx = pullback(dy)
    plain = fn.tree.to_dotted(grads)
    assert_near(
        fn.tree.to_dotted(own_grads), {path: plain[path] for path in fn.tree.to_dotted(learned)}
    )
    assert_near(own_dx, dx)
    assert new_state["frozen"]["0"]["weight"] is frozen["0"]["weight"]
    assert_near(frozen_net.apply(learned, X, own_state)[0], net.apply(params, X, state)[0])


def test_freeze_starts_as_the_layer_does():
    params, state = fn.freeze(mlp(), lambda path: path.startswith("0")).init(fn.key(3), X)
    plain, plain_state = mlp().init(fn.key(3), X)
    assert_near(
        fn.tree.to_dotted(fn.tree.merge(state.pop("frozen"), params)), fn.tree.to_dotted(plain)
    )
    assert_near(state, plain_state)


def test_freeze_computes_no_gradient_of_what_is_frozen():
    def flops(net):
        x = torch.randn(8, 16)
        params, state = net.init(fn.key(0), x)
        y, pullback, _ = net.vjp(params, x, state)
        with FlopCounterMode(display=False) as counter:
            pullback(y)
        return counter.get_total_flops()

    net = fn.serial(fn.linear(16, bias=False), fn.tanh(), fn.linear(16, bias=False))
    product = 2 * 8 * 16 * 16
    assert flops(net) == 4 * product
    assert flops(fn.freeze(net, "0")) == 3 * product
    assert flops(fn.freeze(net, lambda path: True)) == 2 * product


def test_an_optimizer_never_sees_what_is_frozen():
    net = fn.freeze(mlp(), "0")
    optimizer = fn.adamw(0.1, weight_decay=0.5)
    state = fn.init_train_state(net, optimizer, fn.key(0), X)
    assert "0" not in state.params
    assert not [path for path in fn.tree.to_dotted(state.opt_state) if ".0.weight" in path]
    before = state.state["frozen"]["0"]["weight"].clone()
    state, _ = fn.train_step(net, fn.mse(), optimizer)(state, (X, randn(5, 2)))
    assert torch.equal(state.state["frozen"]["0"]["weight"], before)


def test_freeze_refuses_unknown_paths_and_frozen_params():
    with pytest.raises(ValueError, match=r"^freeze: no leaf has the path '9', only \['0.weight'"):
        fn.freeze(mlp(), ["0", "9"]).init(fn.key(0), X)
    with pytest.raises(ValueError, match=r"^serial\['a'\] freeze: no leaf is chosen of"):
        fn.serial(a=fn.freeze(mlp(), lambda path: False)).init(fn.key(0), X)
    net = fn.freeze(mlp(), "0")
    params, state = mlp().init(fn.key(0), X)
    with pytest.raises(ValueError, match=r"^freeze: expects params and state as of init, has no"):
        net.apply(params, X, state)
    with pytest.raises(ValueError, match=r"^freeze: params has \['0.weight', '0.bias'\], which do"):
        net.apply(params, X, {**state, "frozen": {}})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_cast_computes_in_the_dtype_and_gives_back_the_old_one(dtype):
    seen = []

    def watch(key, x):
        return {}

    def apply(params, x):
        seen.append(x.dtype)
        return x

    watched = fn.stateless(
        watch, apply, lambda params, x: (apply(params, x), fn.Pullback(same, {}))
    )
    net = fn.cast(fn.serial(fn.linear(4), watched, fn.batch_norm(), fn.relu()), dtype)
    x = torch.randn(8, 3)
    params, state = net.init(fn.key(0), x)
    assert {leaf.dtype for leaf in fn.tree.leaves(params)} == {torch.float32}
    seen.clear()
    y, pullback, new_state = net.vjp(params, x, state)
    grads, dx = pullback(torch.ones_like(y))
    assert seen == [dtype]
    kinds = {leaf.dtype for leaf in fn.tree.leaves((y, grads, dx))}
    assert kinds == {torch.float32}
    assert fn.tree.alike(new_state, state)


def same(residuals, dy, *, params, x):
    return ({} if params else None), dy if x else None


def test_cast_of_tokens_gives_the_parameters_dtype():
    net = fn.cast(fn.serial(fn.embedding(5, 3), fn.linear(2)), torch.bfloat16)
    tokens = torch.tensor([1, 4])
    params, _ = net.init(fn.key(0), tokens)
    y, pullback, _ = net.vjp(params, tokens)
    assert y.dtype == torch.float32
    assert pullback(y)[1] is None


def test_cast_refuses_integers():
    with pytest.raises(TypeError, match=r"^cast: expects a floating-point dtype, got torch.int32$"):
        fn.cast(fn.linear(1), torch.int32)


def test_lora_starts_as_the_layer_and_learns_low_rank_changes():
    net = fn.serial(fn.linear(8), fn.tanh(), fn.linear(3))
    adapted = fn.lora(net, rank=2, alpha=6.0)
    params, state = adapted.init(fn.key(0), X)
    plain, _ = net.init(fn.key(0), X)
    assert_near(adapted.apply(params, X, state)[0], net.apply(plain, X)[0])
    params = fn.tree.map(lambda leaf: randn(*leaf.shape, seed=leaf.numel()), params)
    own = params["0"]["weight"]
    changed = fn.tree.map(lambda leaf: leaf, plain)
    for name in ("0", "2"):
        own = params[name]["weight"]
        changed[name]["weight"] = plain[name]["weight"] + 3.0 * own["lora_B"] @ own["lora_A"]
    y, pullback, _ = adapted.vjp(params, X, state)
    expected, plain_pullback, _ = net.vjp(changed, X)
    assert_near(y, expected)
    dy = randn(5, 3)
    (grads, dx), (plain_grads, plain_dx) = pullback(dy), plain_pullback(dy)
    dweight = plain_grads["2"]["weight"]
    assert_near(grads["2"]["weight"]["lora_B"], 3.0 * dweight @ params["2"]["weight"]["lora_A"].T)
    assert_near(dx, plain_dx)


def test_lora_of_a_convolution_takes_it_as_a_matrix():
    x = randn(2, 3, 5, 5)
    params, _ = fn.lora(fn.conv2d(4, 3), 2, where="weight").init(fn.key(0), x)
    shapes = {path: tuple(leaf.shape) for path, leaf in fn.tree.to_dotted(params).items()}
    assert shapes == {"weight.lora_A": (2, 27), "weight.lora_B": (4, 2)}


def test_lora_computes_gradients_of_the_chosen_layers_alone():
    net = fn.serial(fn.linear(16, bias=False), fn.tanh(), fn.linear(16, bias=False))
    x = torch.randn(8, 16)
    adapted = fn.lora(net, 1, where="2")
    params, state = adapted.init(fn.key(0), x)
    y, pullback, _ = adapted.vjp(params, x, state)
    with FlopCounterMode(display=False) as counter:
        pullback(y, x=False)
    of_low_rank = 2 * 2 * 16 * 16
    assert counter.get_total_flops() <= 3 * 2 * 8 * 16 * 16 - 2 * 8 * 16 * 16 + of_low_rank


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("head", "lora: no leaf has the path 'head', only"),
        ("0.bias", "lora: '0.bias' is not a matrix, but float64 (4,)"),
        ("1", "lora: no chosen leaf is a matrix, of"),
        (lambda path: False, "lora: no leaf is chosen of"),
    ],
)
def test_lora_refuses_what_is_no_matrix(where, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the message is compared
        fn.lora(mlp(), where=where).init(fn.key(0), X)
    assert str(raised.value).startswith(message)


NORMALIZED = {
    "weight_norm": (fn.weight_norm, parametrizations.weight_norm, {}),
    "weight_norm of columns": (fn.weight_norm, parametrizations.weight_norm, {"dim": 1}),
    "weight_norm of the whole": (fn.weight_norm, parametrizations.weight_norm, {"dim": None}),
    "spectral_norm": (fn.spectral_norm, parametrizations.spectral_norm, {}),
    "spectral_norm of options": (
        fn.spectral_norm,
        parametrizations.spectral_norm,
        {"n_power_iterations": 3, "eps": 1e-6, "dim": 1},
    ),
}
MODULES = {
    "linear": (lambda: fn.linear(4), lambda: nn.Linear(6, 4), (5, 6)),
    "conv2d": (lambda: fn.conv2d(4, 2), lambda: nn.Conv2d(3, 4, 2), (2, 3, 5, 5)),
    "conv_transpose2d": (
        lambda: fn.conv_transpose2d(4, 2), lambda: nn.ConvTranspose2d(3, 4, 2), (2, 3, 4, 4),
    ),
    "bias": (lambda: fn.linear(4), lambda: nn.Linear(6, 4), (5, 6)),
}  # fmt: skip


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("name", NORMALIZED)
def test_weights_are_normalized_as_torchs_are(name, kind, train):
    combinator, parametrize, options = NORMALIZED[name]
    make, make_module, shape = MODULES[kind]
    leaf = "bias" if kind == "bias" else "weight"
    if leaf == "bias":  # of one dimension, whose slices have no direction
        options = {"dim": None} if name.startswith("weight") else {}
    module = parametrize(randomize(make_module().double()), leaf, **options).train(train)
    layer, x = combinator(make(), leaf, **options), randn(*shape)
    params, state = params_of(module), state_of(module)
    own_params, own_state = layer.init(fn.key(0), x)
    for own, theirs in ((own_params, params), (own_state, state)):
        own, theirs = fn.tree.to_dotted(own), fn.tree.to_dotted(theirs)
        assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in theirs.items()}
    y, pullback, new_state = layer.vjp(params, x, state, train=train)
    leaf_x = x.clone().requires_grad_()
    expected = module(leaf_x)
    dy = randn(*y.shape, seed=3)
    expected.backward(dy)
    assert_near(y, expected.detach())
    grads, dx = pullback(dy)
    theirs = {path: each.grad for path, each in module.named_parameters()}
    flat = fn.tree.to_dotted(grads)
    assert_near({path: flat[path] for path in theirs}, theirs)
    assert_near(dx, leaf_x.grad)
    assert_near(new_state, state_of(module))


def test_spectral_norm_starts_with_the_largest_singular_value():
    params, state = fn.spectral_norm(fn.linear(8, bias=False)).init(fn.key(1), randn(2, 6))
    y, _ = fn.spectral_norm(fn.linear(8, bias=False)).apply(params, torch.eye(6).double(), state)
    assert abs(float(torch.linalg.matrix_norm(y, 2)) - 1) < 0.05


def test_weight_norm_starts_as_the_layer():
    x = randn(2, 6)
    params, _ = fn.linear(8).init(fn.key(1), x)
    own, _ = fn.weight_norm(fn.linear(8)).init(fn.key(1), x)
    assert_near(fn.weight_norm(fn.linear(8)).apply(own, x)[0], fn.linear(8).apply(params, x)[0])


@pytest.mark.parametrize("combinator", [fn.weight_norm, fn.spectral_norm])
def test_normalized_weights_need_the_path_of_a_leaf(combinator):
    name = combinator.__name__
    with pytest.raises(ValueError, match=rf"^{name}: no leaf has the path 'weight', only"):
        combinator(mlp()).init(fn.key(0), X)
    with pytest.raises(ValueError, match=rf"^{name}: dim must be a dimension of the weight"):
        combinator(fn.linear(3), dim=2).init(fn.key(0), X)


def block():
    return fn.serial(fn.linear(6, bias=False), fn.batch_norm(), fn.tanh(), fn.dropout(0.2))


def stacked(params):
    return fn.tree.map(lambda *leaves: torch.stack(leaves), *params.values())


@pytest.mark.parametrize("compiled", [False, True])
def test_repeat_is_serial_of_copies(compiled):
    chain, loop = fn.serial(*[block()] * 3), fn.repeat(block(), 3)
    params, state = chain.init(fn.key(0), X)
    own_params, own_state = loop.init(fn.key(0), X)
    assert_near(own_params, stacked(params), 0.0)

    def run(net, params, state):
        y, pullback, state = net.vjp(params, X, state, key=fn.key(5))
        return y, pullback(torch.ones_like(y)), state

    expected = run(chain, params, state)
    call = (
        fn.jit(lambda params, state: run(loop, params, state))
        if compiled
        else (lambda params, state: run(loop, params, state))
    )
    y, (grads, dx), new_state = call(own_params, own_state)
    assert_near(y, expected[0])
    assert_near(grads, stacked(expected[1][0]))
    assert_near(dx, expected[1][1])
    assert_near(new_state, stacked(expected[2]))


def test_repeat_compiles_its_layer_once():
    loop = fn.repeat(fn.residual(fn.linear(6)), 50)
    params, _ = loop.init(fn.key(0), X)

    def step(params):
        y, pullback, _ = loop.vjp(params, X)
        return pullback(y)[0]

    assert fn.jit(step).lower(params).graph.count("scan of 50 iterations") == 2


def test_repeat_takes_trees_and_keeps_the_params_out_of_the_residuals():
    pair = fn.parallel(fn.linear(6), fn.identity())
    loop = fn.repeat(pair, 4)
    x = (X, randn(5, 2))
    params, _ = loop.init(fn.key(0), x)
    fn.testing.check_layer(loop, x)
    y, pullback, _ = loop.vjp(params, x)
    assert fn.tree.alike(y, x)
    # Those of linear are its input and its weight, which is stacked already.
    assert [tuple(leaf.shape) for leaf in pullback.residuals["saved"]] == [(4, 5, 6)]
    assert pullback.residuals["params"] is params


def test_repeat_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"^repeat expects a y like x, x is float64 \(5, 6\), y"):
        fn.repeat(fn.linear(3), 2).init(fn.key(0), X)
    with pytest.raises(ValueError, match=r"^repeat: n must be an int of at least 1, got 0$"):
        fn.repeat(fn.tanh(), 0)
    layer = fn.repeat(fn.linear(6), 2)
    params, _ = fn.repeat(fn.linear(6), 3).init(fn.key(0), X)
    with pytest.raises(ValueError, match=r"^repeat: params 'weight' expects a first dimension"):
        layer.apply(params, X)
    params, _ = layer.init(fn.key(0), X)
    with pytest.raises(ValueError, match=r"^repeat linear: weight expects 6 features"):
        layer.apply(params, X[:, :5])


@pytest.mark.parametrize("segments", [1, 2, 3, 5])
def test_checkpointed_is_the_serial(segments):
    net = mlp()
    params, state = drawn(net, X)
    expected = net.vjp(params, X, state, key=fn.key(1))
    got = fn.checkpointed(net, segments).vjp(params, X, state, key=fn.key(1))
    dy = randn(5, 2)
    assert_near((got[0], got[1](dy), got[2]), (expected[0], expected[1](dy), expected[2]), 0.0)


def test_checkpointed_refuses_more_runs_than_layers():
    with pytest.raises(ValueError, match=r"^checkpointed: segments must be from 1 to 5, the"):
        fn.checkpointed(mlp(), 6)
    with pytest.raises(TypeError, match=r"^checkpointed: expects a serial, got linear\(2\)$"):
        fn.checkpointed(fn.linear(2), 1)
