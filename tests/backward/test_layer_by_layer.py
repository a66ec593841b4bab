"""Updates layer by layer: those of the chain with a clipped norm, in less memory."""

import math
import weakref

import pytest
import torch

import funcnet as fn

opt = fn.optimizers
KEY = fn.key(3)
WIDE = fn.random.normal(fn.key(1), (4, 40))
STEPS = fn.random.normal(fn.key(2), (5, 2, 8))
TOKENS = torch.tensor([[0, 3, 1], [4, 4, 2]])
NETS = {
    "few rows": (
        fn.serial(fn.linear(30), fn.tanh(), fn.residual(fn.linear(30, bias=False)), fn.linear(20)),
        WIDE,
    ),
    "many rows": (fn.serial(fn.linear(4), fn.layer_norm(), fn.gelu(), fn.linear(2)), WIDE),
    "tied": (
        fn.tie(
            fn.serial(embed=fn.embedding(6, 6), head=fn.linear(6, bias=False)),
            {"head.weight": "embed.weight"},
        ),
        TOKENS,
    ),
    "shared": (fn.shared(fn.linear(30)), (WIDE, WIDE + 1)),
    "repeat": (fn.repeat(fn.residual(fn.serial(fn.linear(40), fn.layer_norm())), 3), WIDE),
    "transformer": (fn.transformer_encoder_layer(2, 16, dropout=0.1), STEPS),
    "lstm": (fn.lstm(4, num_layers=2), STEPS),
    "conv": (
        fn.serial(fn.conv2d(4, 3), fn.batch_norm(), fn.relu()),
        fn.random.normal(KEY, (2, 3, 8, 8)),
    ),
    "bfloat16": (fn.cast(fn.serial(fn.linear(30), fn.linear(30)), torch.bfloat16), WIDE),
    "without params": (fn.tanh(), WIDE),
}
EVERY_NET = pytest.mark.parametrize("name", NETS)


def deferred_and_plain(net, x):
    """Params, their deferred gradients, and the gradients."""
    params, state = net.init(KEY, x)
    y, pullback, _ = net.vjp(params, x, state, key=KEY)
    dy = fn.tree.map(lambda leaf: torch.cos(leaf), y)
    return params, fn.defer(pullback)(dy, x=False)[0], pullback(dy, x=False)[0]


def norm_of(grads):
    """The norm of all leaves, by PyTorch."""
    leaves = [leaf.double().flatten() for leaf in fn.tree.leaves(grads)]
    return torch.cat([torch.zeros(1).double(), *leaves]).norm().float()


@EVERY_NET
def test_the_norm_is_that_of_the_gradients(name):
    _, deferred, grads = deferred_and_plain(*NETS[name])
    rtol = 1e-2 if name == "bfloat16" else 1e-5  # whose plain gradients are rounded
    torch.testing.assert_close(fn.gradient_norm(deferred), norm_of(grads), rtol=rtol, atol=1e-6)


def test_gradients_of_few_rows_are_not_made_for_their_norm(monkeypatch):
    _, deferred, _ = deferred_and_plain(*NETS["few rows"])
    monkeypatch.setattr("funcnet.backward.layer_by_layer.gradients", None)
    fn.gradient_norm(deferred)


def test_the_gradients_of_one_place_are_alive_at_a_time(monkeypatch):
    params, deferred, _ = deferred_and_plain(*NETS["few rows"])
    made, alive = [], []

    def watched(place):
        alive.append(sum(leaf() is not None for leaf in made))
        grads = fn.gradients(place)
        made.extend([weakref.ref(leaf) for leaf in fn.tree.leaves(grads)])
        return grads

    monkeypatch.setattr("funcnet.backward.layer_by_layer.gradients", watched)
    fn.clipped_update(fn.sgd(0.1), deferred, {}, params, 1.0, donate=True)
    assert alive == [0, 0, 0]


@EVERY_NET
def test_the_places_together_are_the_whole(name):
    params, deferred, grads = deferred_and_plain(*NETS[name])
    found = {}
    for path, place in deferred.places():
        for leaf_path, leaf in fn.tree.to_dotted(fn.gradients(place)).items():
            found[f"{path}.{leaf_path}" if path else leaf_path] = leaf
    plain = fn.tree.to_dotted(grads)
    assert found.keys() == plain.keys() == fn.tree.to_dotted(params).keys()
    assert all(torch.equal(found[path], leaf) for path, leaf in plain.items())


def test_a_place_is_a_layer_or_several_that_depend_on_each_other():
    def paths(name):
        return [path for path, _ in deferred_and_plain(*NETS[name])[1].places()]

    assert paths("few rows") == ["0", "2", "3"]
    assert paths("tied") == paths("repeat") == paths("shared") == [""]


OPTIMIZERS = {
    "sgd": lambda: fn.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": lambda: fn.adamw(opt.schedules.cosine_decay(0.1, 5), weight_decay=0.1),
    "adafactor": lambda: fn.adafactor(0.1),
    "average": lambda: opt.params_ema(fn.adam(0.1), 0.9),
}


def run_both(net, x, optimizer, max_norm, steps=3, way=lambda step: step, **options):
    """The train states after some steps of the chain, and of the step by layer."""
    target = torch.ones_like(net.apply(*net.init(KEY, x)[:1], x, net.init(KEY, x)[1], key=KEY)[0])
    chain = fn.chain(clip=opt.clip_by_global_norm(max_norm), rest=optimizer)
    plain, layered = [fn.init_train_state(net, each, KEY, x) for each in (chain, optimizer)]
    plain_step = way(fn.train_step(net, fn.mse(), chain))
    layered_step = way(fn.clipped_train_step(net, fn.mse(), optimizer, max_norm, **options))
    for _ in range(steps):
        plain, expected = plain_step(plain, (x, target))
        layered, found = layered_step(layered, (x, target))
    torch.testing.assert_close(expected["loss"], found["loss"])
    return plain, layered, found


def require_close(plain, layered):
    assert layered.step == plain.step
    expected = {"params": plain.params, "opt": plain.opt_state["rest"], "state": plain.state}
    found = {"params": layered.params, "opt": layered.opt_state, "state": layered.state}
    for one, other in zip(fn.tree.leaves(expected), fn.tree.leaves(found), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("max_norm", [0.05, math.inf])
@pytest.mark.parametrize("donate", [False, True])
def test_a_step_is_that_of_the_chain(optimizer, max_norm, donate):
    plain, layered, found = run_both(
        *NETS["few rows"], OPTIMIZERS[optimizer](), max_norm, donate=donate
    )
    require_close(plain, layered)
    assert list(found) == ["loss", "grad_norm"]


@pytest.mark.parametrize("name", ["tied", "repeat", "transformer", "conv", "many rows"])
def test_a_step_of_any_net_is_that_of_the_chain(name):
    net, x = NETS[name]
    require_close(*run_both(net, x, fn.sgd(0.1, momentum=0.9), 0.05)[:2])


@pytest.mark.cpu_only
def test_a_compiled_step_is_that_of_the_chain():
    net, x = NETS["few rows"]
    plain, layered, _ = run_both(
        net, x, fn.adam(0.1), 0.05, way=lambda step: fn.jit(step, donate=0)
    )
    require_close(plain, layered)


def test_a_member_of_a_population_is_its_solo_run():
    net, x = NETS["few rows"]
    step = fn.clipped_train_step(net, fn.mse(), fn.adam(0.1), 0.05)
    keys, batch = fn.random.split(KEY, 3), (x, torch.ones(4, 20))

    def run(key):
        return step(fn.init_train_state(net, fn.adam(0.1), key, x), batch)[0].params

    together = fn.vmap(run)(keys)
    for index, key in enumerate(keys):
        for leaf, other in zip(fn.tree.leaves(together), fn.tree.leaves(run(key)), strict=True):
            torch.testing.assert_close(leaf[index], other)


@pytest.mark.parametrize(
    "optimizer",
    [
        fn.chain(opt.clip_by_global_norm(1.0), fn.sgd(0.1)),
        opt.normalize(),
        opt.masked(fn.sgd(0.1), "0"),
        opt.params_ema(opt.apply_if_finite(fn.sgd(0.1), 2), 0.9),
        opt.dynamic_loss_scale(fn.sgd(0.1)),
    ],
    ids=lambda optimizer: optimizer.name,
)
def test_an_optimizer_that_needs_all_leaves_is_refused(optimizer):
    params, deferred, _ = deferred_and_plain(*NETS["many rows"])
    with pytest.raises(
        ValueError, match="clipped_update: expects an optimizer that can update one"
    ):
        fn.clipped_update(optimizer, deferred, {}, params, 1.0)
    with pytest.raises(ValueError, match="clipped_train_step: expects an optimizer"):
        fn.clipped_train_step(fn.linear(1), fn.mse(), optimizer, 1.0)


def test_an_optimizer_that_does_not_say_that_it_needs_all_leaves_breaks_a_law():
    def bounded(g, p):
        return g / (1.0 + sum([leaf.square().sum() for leaf in g]))

    silent = opt.stateless(bounded, name="silent")
    with pytest.raises(AssertionError, match="leaves updated alone"):
        fn.testing.check_optimizer(silent, {"a": torch.ones(2), "b": torch.ones(2)}, alone=True)


def test_gradients_of_other_params_are_refused():
    params, deferred, _ = deferred_and_plain(*NETS["many rows"])
    fewer = {name: leaf for name, leaf in params.items() if name != "0"}
    with pytest.raises(ValueError, match=r"params have no \['0.bias', '0.weight'\]"):
        fn.clipped_update(fn.sgd(0.1), deferred, {}, fewer, 1.0)
    more = {**params, "9": params["0"]}
    with pytest.raises(ValueError, match=r"no gradients of \['9.bias', '9.weight'\]"):
        fn.clipped_update(fn.sgd(0.1), deferred, {}, more, 1.0)
    with pytest.raises(ValueError, match="max_norm must be >= 0"):
        fn.clipped_update(fn.sgd(0.1), deferred, {}, params, -1.0)
    with pytest.raises(TypeError, match="gradient_norm: expects a Deferred"):
        fn.gradient_norm(params)


@pytest.mark.parametrize("features", [3, 300])
def test_the_norm_of_examples_is_refused(features):
    net, x = fn.linear(features), torch.ones(4, features)
    params, _ = net.init(fn.key(0), x)
    _, deferred, _ = fn.defer_examples(net, fn.mse())(params, (x, x))
    with pytest.raises(ValueError, match="finished by vmap"):
        fn.gradient_norm(deferred)


@pytest.mark.parametrize("shape", [(300,), (0, 300), (2, 0, 300), (1, 2, 300)])
def test_the_norm_of_a_linear_layer_is_that_of_any_number_of_rows(shape):
    x = fn.random.normal(fn.key(2), shape)
    _, deferred, plain = deferred_and_plain(fn.linear(200), x)
    torch.testing.assert_close(fn.gradient_norm(deferred), norm_of(plain))


def test_a_metric_in_the_place_of_the_norm_is_refused():
    with pytest.raises(ValueError, match="clipped_train_step: the metric 'grad_norm' is there"):
        fn.clipped_train_step(
            fn.linear(1), fn.mse(), fn.sgd(0.1), 1.0, metrics={"grad_norm": fn.mse()}
        )


def test_a_norm_by_products_of_rows_that_cancel_is_right():
    net = fn.linear(300, bias=False)
    x = 100 + 0.005 * fn.random.normal(fn.key(0), (5, 400))
    params, _ = net.init(fn.key(1), x)
    _, pullback, _ = net.vjp(params, x)
    dy = 10 * fn.random.normal(fn.key(2), (5, 300))
    dy = dy - dy.mean(0)
    deferred, _ = fn.defer(pullback)(dy)
    expected = (dy.double().mT @ x.double()).norm()
    torch.testing.assert_close(fn.gradient_norm(deferred).double(), expected, rtol=1e-4, atol=0.0)
