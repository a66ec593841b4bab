"""What a layer, a loss or an optimizer shows of itself: the call of its constructor."""

import copy
import functools
import pickle

import optree
import pytest
import torch
from cases import COMBINATORS, LAYERS, LOSSES, OPTIMIZERS

import funcnet as fn

NAMES = {**vars(fn.losses), **vars(fn.optimizers), **vars(fn), "torch": torch, "inf": torch.inf}


def half(x):
    return x / 2


def half_derivative(x):
    return torch.full_like(x, 0.5)


def noise(std, *, clip=None):
    def forward(params, x, state, key, train):
        raise NotImplementedError

    return fn.stateful(lambda key, x: ({}, {}), forward, keyed=True)


def gated(gate, value):
    def forward(run, x):
        return run("gate", x) * run("value", x), {}

    return fn.combine("gated", {"gate": gate, "value": value}, forward, half)


def mlp(width):
    return fn.serial(fn.linear(width), fn.relu())


def alternating(depth):
    return [layer for width in range(depth) for layer in (fn.linear(width), fn.relu())]


SHOWN = [
    (fn.serial(fn.linear(25), fn.tanh(), fn.linear(2)), "serial(linear(25), tanh(), linear(2))"),
    (fn.adam(1e-3), "adam(lr=0.001)"),
    (fn.adam(), "adam()"),
    (fn.sgd(0.1, 0.9, nesterov=True), "sgd(lr=0.1, momentum=0.9, nesterov=True)"),
    (fn.cross_entropy(), "cross_entropy()"),
    (fn.cross_entropy(label_smoothing=0.1), "cross_entropy(label_smoothing=0.1)"),
    (fn.mse("sum"), "mse(reduction='sum')"),
    (fn.linear(out_features=3, bias=False), "linear(3, bias=False)"),
    (fn.conv2d(8, 3, padding="same"), "conv2d(8, 3, padding='same')"),
    (fn.gelu("tanh"), "gelu(approximate='tanh')"),
    (
        fn.serial(hidden=fn.linear(25), out=fn.linear(2)),
        "serial(hidden=linear(25), out=linear(2))",
    ),
    (fn.serial(), "serial()"),
    (
        fn.branch(fn.relu(), fn.residual(fn.tanh())),
        "branch(relu(), residual(tanh()))",
    ),
    (fn.repeat(fn.linear(3), 4), "repeat(linear(3), 4)"),
    (
        fn.transformer_encoder(fn.transformer_encoder_layer(4, dim_feedforward=32), 6),
        "transformer_encoder(transformer_encoder_layer(4, dim_feedforward=32), 6)",
    ),
    (
        fn.chain(fn.optimizers.clip_by_global_norm(1.0), fn.adamw(1e-4)),
        "chain(clip_by_global_norm(1.0), adamw(lr=0.0001))",
    ),
    (
        fn.linear(3, weight_init=fn.initializers.uniform(-1, 1)),
        "linear(3, weight_init=uniform(...))",
    ),
    (fn.adam(fn.schedules.cosine(0.1, 10)), "adam(lr=cosine(...))"),
    (fn.adam(lambda step: 0.1), "adam(lr=<lambda>)"),
    (fn.sgd(torch.tensor(0.1)), "sgd(lr=float32 ())"),
    (fn.bce(weight=torch.ones(6)), "bce(weight=float32 (6,))"),
    (fn.elementwise(half, half_derivative), "half()"),
    (noise(0.1), "noise(0.1)"),
    (noise(std=0.1, clip=(1, torch.float16)), "noise(0.1, clip=(1, torch.float16))"),
    (noise(functools.partial(half, 2)), "noise(half)"),
    (noise(object()), "noise(object)"),
    (noise([1, {"a": 2}]), "noise([1, {'a': 2}])"),
    (gated(fn.linear(2), mlp(2)), "gated(linear(2), serial(linear(2), relu()))"),
    (fn.Layer(half, half, half), "half()"),
    (fn.Layer(half, half, half, name="block", children={"a": fn.relu()}), "block(a=relu())"),
    (fn.Loss(half, half), "half()"),
    (fn.Optimizer(half, half), "half()"),
]


@pytest.mark.parametrize(("made", "shown"), SHOWN, ids=[shown for _, shown in SHOWN])
def test_what_was_asked_for_is_shown(made, shown):
    assert repr(made) == shown


def test_a_constructor_within_a_function_shows_its_arguments_by_position():
    def scaled(factor, bias):
        def forward(params, x, state, key, train):
            raise NotImplementedError

        return fn.stateful(lambda key, x: ({}, {}), forward)

    assert repr(scaled(0.5, bias=True)) == "scaled(0.5, True)"


LONG = [
    (
        fn.serial(
            *[layer for _ in range(20) for layer in (fn.linear(64), fn.relu())], fn.linear(2)
        ),
        "serial(20 x (linear(64), relu()), linear(2))",
    ),
    (fn.serial(*[fn.linear(64) for _ in range(30)]), "serial(30 x linear(64))"),
    (
        fn.serial(*alternating(12)),
        "serial(linear(0), relu(), linear(1), relu(), linear(2), relu(), linear(3), relu(), "
        "... 16 more)",
    ),
    (
        fn.serial(**{f"layer{index}": fn.linear(index) for index in range(12)}),
        f"serial({', '.join(f'layer{index}=linear({index})' for index in range(8))}, ... 4 more)",
    ),
]


@pytest.mark.parametrize(("net", "shown"), LONG, ids=["groups", "run", "many", "named"])
def test_a_long_net_is_folded(net, shown):
    assert repr(net) == shown


def test_a_deep_net_is_not_shown_to_its_depth():
    net = fn.serial(*alternating(4))
    for _ in range(7):
        net = fn.serial(*[fn.serial(net, fn.linear(size)) for size in range(2)])
    assert len(repr(net)) < 2000
    assert "serial(...)" in repr(net)


CASES = {
    **{name: layer for name, (layer, _) in (LAYERS | COMBINATORS).items()},
    **{f"loss {name}": each[0] for name, each in LOSSES.items()},
    **{f"optimizer {name}": each[0] for name, each in OPTIMIZERS.items()},
}


def test_what_is_shown_makes_the_same():
    plain = (
        "_rule",
        "halved",
        "gaussian",
        "wide",
        "_relu(relu",
        "float",
        "<lambda>",
        "(...)",
        "Linear",
        "neg()",
        "... ",
    )
    checked = 0
    for name, made in CASES.items():
        shown = repr(made)
        assert " at 0x" not in shown, name
        if not any(part in shown for part in plain):
            assert repr(eval(shown, NAMES)) == shown, name
            checked += 1
    assert checked > 450


def test_another_model_of_the_same_shows_its_own_children():
    net = fn.serial(a=fn.relu(), b=fn.repeat(fn.relu(), 3))
    other = fn.map_layers(lambda path, layer: fn.tanh() if layer.name == "relu" else layer, net)
    assert repr(other) == "serial(a=tanh(), b=repeat(tanh(), 3))"
    assert repr(fn.map_layers(lambda path, layer: layer, other)) == repr(other)
    attention = fn.multihead_attention(2)
    renamed = fn.map_layers(
        lambda path, layer: fn.linear(9) if path == "out_proj" else layer, attention
    )
    assert "out_proj=linear(9)" in repr(renamed)


def test_copies_and_wrapped_layers_show_the_same():
    net = fn.serial(fn.linear(2), fn.tanh())
    assert repr(copy.deepcopy(fn.linear(2))) == "linear(2)"
    assert repr(fn.linear(2)._replace(vjp=half)) == "linear(2)"
    assert repr(fn.mse()._replace(vjp=half)) == "mse()"
    assert repr(fn.sgd(0.1)._replace(update=half)) == "sgd(lr=0.1)"
    assert repr(fn.wrap(net, lambda layer: layer)) == repr(net)
    assert repr(pickle.loads(pickle.dumps(fn.Loss(half, half)))) == "half()"


def test_what_is_shown_is_no_part_of_a_value():
    layer = fn.linear(2)
    again = fn.Layer(*layer, name="other")
    assert layer == again
    assert hash(layer) == hash(again)
    assert optree.tree_structure(layer) == optree.tree_structure(again)
    assert len(layer) == 3
