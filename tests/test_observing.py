"""observe: figures as by hooks of torch's, of the same training, under every transformation."""

import pytest
import torch
from torch import nn

import funcnet as fn
from funcnet.testing import check_layer

DOUBLE = torch.float64
X = fn.random.normal(fn.key(1), (6, 5), DOUBLE)
TARGET = fn.random.normal(fn.key(2), (6, 2), DOUBLE)
IMAGES = fn.random.normal(fn.key(3), (4, 3, 6, 6), DOUBLE)
NET = fn.serial(fn.linear(4), fn.relu(), fn.linear(2))
NAMES = ("y_norm", "y_mean", "y_zeros", "dy_norm", "dy_mean", "dy_zeros")


def step_of(model, x, target, optimizer=None, **options):
    """What one step gives from the first state of a run."""
    optimizer = optimizer or fn.adam(0.1)
    state = fn.init_train_state(model, optimizer, fn.key(0), x)
    return fn.train_step(model, fn.mse(), optimizer, **options)(state, (x, target))


def figures_of(metrics):
    """The figures alone, without the loss."""
    return {name: figure for name, figure in metrics.items() if name.endswith(NAMES)}


def assert_equal(found, expected, rtol=1e-5):
    assert found.keys() == expected.keys()
    for name, figure in found.items():
        torch.testing.assert_close(figure, expected[name], rtol=rtol, atol=1e-7, msg=name)


def test_figures_are_those_of_hooks_of_torch():
    inner = fn.serial(fn.conv2d(2, 3), fn.tanh())
    net = fn.serial(fn.conv2d(4, 3), fn.relu(), inner, fn.flatten(), fn.linear(2))
    state = fn.init_train_state(net, fn.sgd(0.1), fn.key(0), IMAGES)
    target = TARGET[:4]
    _, metrics = step_of(fn.observe(net), IMAGES, target, fn.sgd(0.1))

    twin = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 2, 3), nn.Tanh()),
        nn.Flatten(),
        nn.Linear(8, 2),
    ).double()
    twin.load_state_dict(fn.tree.to_dotted(state.params))
    seen = {}

    def told(name, values):
        (values,) = values if isinstance(values, tuple) else (values,)
        values = values.detach().float()
        seen[f"{name}_norm"], seen[f"{name}_mean"] = values.norm(), values.mean()
        seen[f"{name}_zeros"] = (values == 0).float().mean()

    for path, module in twin.named_modules():
        if not [*module.children()]:
            module.register_forward_hook(lambda _, __, y, path=path: told(f"{path}.y", y))
            module.register_full_backward_hook(lambda _, __, dy, path=path: told(f"{path}.dy", dy))
    nn.functional.mse_loss(twin(IMAGES.clone().requires_grad_()), target).backward()
    assert len(seen) == 6 * 6
    assert 0.2 < seen["1.y_zeros"] < 0.8
    assert_equal(figures_of(metrics), seen)


MODELS = {
    "serial": (NET, X),
    "recurrent": (fn.serial(fn.lstm(3), fn.item(0)), IMAGES[0]),
    "attention": (fn.transformer_encoder_layer(2, 12), IMAGES[0]),
    "tokens": (fn.serial(fn.embedding(5, 3, dtype=DOUBLE), fn.linear(3)), torch.tensor([1, 2])),
    "state and noise": (fn.serial(fn.linear(3), fn.batch_norm(), fn.dropout(0.2)), X),
    "remat": (fn.remat(fn.serial(fn.linear(3), fn.tanh())), X),
    "remat of a part": (fn.remat(fn.serial(fn.linear(3), fn.tanh(), fn.linear(2)), ["1"]), X),
    "repeat": (fn.repeat(fn.serial(fn.linear(5), fn.tanh()), 3), X),
    "stacked": (fn.stacked(fn.serial(fn.linear(5), fn.tanh()), 6), X),
    "frozen leaf": (fn.freeze(fn.serial(fn.linear(3), fn.linear(2)), "0.weight"), X),
    "frozen layer": (fn.freeze(fn.serial(fn.linear(3), fn.linear(2)), "0"), X),
    "weight_norm": (fn.serial(fn.weight_norm(fn.linear(3))), X),
    "tie": (fn.tie(fn.serial(fn.linear(5), fn.linear(5)), {"1.weight": "0.weight"}), X),
    "experts": (fn.serial(fn.experts(fn.linear(4), fn.linear(3), n=4), fn.item(0)), X),
    "feedback": (fn.feedback_alignment(NET), X),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_run_is_the_same_whether_it_is_observed(name):
    model, x = MODELS[name]
    params, state = model.init(fn.key(0), x)
    y, _ = model.apply(params, x, state)
    plain, expected = step_of(model, x, torch.zeros_like(y))
    observed, metrics = step_of(fn.observe(model), x, torch.zeros_like(y))
    assert fn.tree.flatten(plain)[1] == fn.tree.flatten(observed)[1]
    for one, other in zip(fn.tree.leaves(plain), fn.tree.leaves(observed), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(metrics["loss"], expected["loss"])
    figures = figures_of(metrics)
    assert figures
    assert len(figures) == len(metrics) - 1
    assert all(figure.isfinite().all() for figure in figures.values())
    # Of what a frozen layer gives is told nothing, as it has no gradient to tell it by.
    told = {figure.partition(".")[0] for figure in figures}
    assert ("0" in told) == (name not in ("attention", "frozen layer"))


@pytest.mark.parametrize("name", ["serial", "state and noise", "remat", "repeat", "feedback"])
def test_an_observed_model_keeps_the_laws(name):
    model, x = MODELS[name]
    observed = fn.observe(model)
    assert repr(observed) == repr(model)
    check_layer(observed, x)


def test_figures_of_copies_are_those_of_the_copies_one_by_one():
    copies = fn.serial(*[fn.serial(fn.linear(5), fn.tanh()) for _ in range(3)])
    loop = fn.repeat(fn.serial(fn.linear(5), fn.tanh()), 3)
    _, expected = step_of(fn.observe(copies), X, X)
    _, metrics = step_of(fn.observe(loop), X, X)
    for name in ("0.y_norm", "1.dy_norm", "1.y_mean"):
        one_by_one = torch.stack([expected[f"{copy}.{name}"] for copy in range(3)])
        torch.testing.assert_close(metrics[name], one_by_one)


def test_figures_of_a_shared_layer_are_those_of_all_its_uses():
    net = fn.serial(fn.shared(fn.linear(2)), fn.add())
    both = torch.cat([X, X.flip(0)])
    params, _ = net.init(fn.key(0), (X, X))
    y, _ = fn.linear(2).apply(params["0"], both)
    _, metrics = step_of(fn.observe(net), (X, X.flip(0)), TARGET)
    torch.testing.assert_close(metrics["0.y_norm"], y.float().norm())
    torch.testing.assert_close(metrics["0.y_mean"], y.float().mean())


def test_the_figures_of_a_batch_in_parts_are_those_of_the_batch():
    observed = fn.observe(NET)
    _, expected = step_of(observed, X, TARGET)
    for donate in (False, True):
        _, metrics = step_of(observed, X, TARGET, micro_batches=3, donate=donate)
        assert_equal(metrics, expected)


def test_with_a_loss_scale_the_figures_are_those_without():
    x, target = X.float(), TARGET.float()
    scaled = fn.optimizers.dynamic_loss_scale(fn.sgd(0.1))
    _, metrics = step_of(fn.observe(NET), x, target, scaled)
    _, expected = step_of(fn.observe(NET), x, target, fn.sgd(0.1))
    assert_equal(figures_of(metrics), figures_of(expected))


def test_in_lower_precision_figures_are_in_float32():
    _, metrics = step_of(fn.observe(fn.cast(NET, torch.bfloat16)), X.float(), TARGET.float())
    _, expected = step_of(fn.observe(NET), X.float(), TARGET.float())
    figures = figures_of(metrics)
    assert {figure.dtype for figure in figures.values()} == {torch.float32}
    for name in ("0.y_norm", "2.dy_norm", "1.y_zeros"):
        torch.testing.assert_close(figures[name], expected[name], rtol=0.05, atol=0.05)


def test_under_jit_scan_and_vmap_each_member_has_the_figures_of_its_solo_run():
    observed, optimizer = fn.observe(NET), fn.sgd(0.1)
    step = fn.train_step(observed, fn.mse(), optimizer)

    def run(key):
        state = fn.init_train_state(observed, optimizer, key, X)
        return fn.scan(lambda state, _: step(state, (X, TARGET)), state, length=4)[1]

    keys = fn.random.split(fn.key(5), 2)
    together = fn.jit(fn.vmap(run))(keys)
    alone = [run(key) for key in keys]
    assert together["1.dy_zeros"].shape == (2, 4)
    expected = {name: torch.stack([each[name] for each in alone]) for name in alone[0]}
    assert_equal(together, expected)


def test_only_chosen_layers_are_observed():
    _, metrics = step_of(fn.observe(NET, "1"), X, TARGET)
    assert {name.rpartition(".")[0] for name in metrics} == {"", "1"}
    _, metrics = step_of(fn.observe(NET, lambda path: path > "0"), X, TARGET)
    assert {name.rpartition(".")[0] for name in metrics} == {"", "1", "2"}
    within = fn.serial(fn.tanh(), fn.observe(fn.linear(2)))
    _, metrics = step_of(within, X, TARGET)
    assert "1.dy_norm" in metrics


def test_a_layer_alone_has_figures_without_a_path():
    _, metrics = step_of(fn.observe(fn.linear(2)), X, TARGET)
    assert {*metrics} == {"loss", *NAMES}


def test_metrics_and_checks_go_with_figures():
    observed = fn.observe(NET)
    _, metrics = step_of(observed, X, TARGET, metrics={"mae": fn.mae()}, check_finite=True)
    assert {"mae", "loss", "0.y_norm"} <= metrics.keys()
    _, history = fn.fit(
        fn.train_step(observed, fn.mse(), fn.sgd(0.1)),
        fn.init_train_state(observed, fn.sgd(0.1), fn.key(0), X),
        [(X, TARGET)] * 3,
        progress=False,
    )
    assert history["1.y_zeros"].shape == (3,)


def test_outside_of_a_step_nothing_is_told():
    observed = fn.observe(NET)
    params, _ = observed.init(fn.key(0), X)
    _, grads, _ = fn.value_and_grad(observed, fn.mse())(params, (X, TARGET))
    fn.tree.check_same_structure(params, grads, "grads")
    _, pullback, _ = observed.vjp(params, X)
    plain = NET.vjp(params, X)[1]
    assert fn.tree.bytes(pullback) == fn.tree.bytes(plain)


def test_a_step_with_updates_of_zero_observes_alone():
    optimizer = fn.optimizers.set_to_zero()
    after, metrics = step_of(fn.observe(NET), X, TARGET, optimizer)
    first = fn.init_train_state(NET, optimizer, fn.key(0), X)
    for one, other in zip(fn.tree.leaves(after.params), fn.tree.leaves(first.params), strict=True):
        assert torch.equal(one, other)
    assert metrics["0.dy_norm"] > 0


def test_a_model_that_tells_nothing_is_refused():
    with pytest.raises(ValueError, match=r"^observe: where chooses none of the layers of serial\("):
        fn.observe(NET, "7")
    with pytest.raises(TypeError, match=r"^observe: expects a Layer"):
        fn.observe(torch.tanh)
    frozen = fn.observe(fn.freeze(fn.serial(fn.linear(2)), "*"))
    with pytest.raises(ValueError, match=r"^observe: all layers that are observed are frozen"):
        step_of(frozen, X, TARGET)
