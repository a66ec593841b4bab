"""Derivatives of derivatives: through pullbacks, running statistics and whole training steps."""

import pytest
import torch

import funcnet as fn

DOUBLE = torch.float64
X = fn.random.normal(fn.key(1), (6, 2), DOUBLE)
TARGET = fn.random.normal(fn.key(2), (6, 2), DOUBLE)


def numeric(function, x, step=1e-6):
    """The gradient of a scalar function by central differences."""
    flat = x.flatten()
    found = torch.empty_like(flat)
    for place in range(len(flat)):
        move = torch.zeros_like(flat)
        move[place] = step
        ahead, behind = (function((flat + s * move).reshape(x.shape)) for s in (1, -1))
        found[place] = (ahead - behind) / (2 * step)
    return found.reshape(x.shape)


def test_running_statistics_have_the_derivative_of_the_batchs():
    norm = fn.batch_norm(affine=False)
    _, state = norm.init(fn.key(0), X)

    def total(x):
        _, new = norm.apply({}, x, state, train=True)
        return new["running_mean"].sum() + new["running_var"].square().sum()

    torch.testing.assert_close(torch.func.grad(total)(X), numeric(total, X), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("affine", [True, False])
def test_evaluation_has_a_derivative_by_the_running_statistics(name, affine):
    norm = fn.batch_norm(affine=affine)
    params, state = norm.init(fn.key(0), X)

    def total(leaf):
        return norm.apply(params, X, {**state, name: leaf})[0].sin().sum()

    start = state[name] + 0.3
    torch.testing.assert_close(
        torch.func.grad(total)(start), numeric(total, start), rtol=1e-6, atol=1e-8
    )


OPTIMIZERS = {
    "sgd": fn.sgd,
    "momentum": lambda lr: fn.sgd(lr, 0.9, nesterov=True),
    "adam": lambda lr: fn.adam(lr, eps=1e-3),
    "amsgrad": lambda lr: fn.adamw(lr, amsgrad=True),
    "rmsprop": fn.rmsprop,
}


def after_three_steps(make, params, lr):
    """The loss after three steps of a net with dead units, batch norm and unused features."""
    net = fn.serial(fn.linear(3), fn.batch_norm(), fn.relu(), fn.linear(2))
    optimizer = make(lr)
    _, state = net.init(fn.key(0), X)
    step = fn.train_step(net, fn.mse(), optimizer)
    zero = torch.zeros((), dtype=torch.int64)
    run = fn.TrainState(params, state, optimizer.init_state(params), fn.key(0), zero)
    for _ in range(3):
        run, _ = step(run, (X, TARGET))
    y, _ = net.apply(run.params, X, run.state)
    return fn.mse().apply(y, TARGET)


def start():
    net = fn.serial(fn.linear(3), fn.batch_norm(), fn.relu(), fn.linear(2))
    params, _ = net.init(fn.key(0), X)
    # One unit never fires: its gradients are exactly 0.
    params["1"] = {**params["1"], "bias": torch.tensor([0.1, -50.0, 0.2], dtype=DOUBLE)}
    return params


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loss_after_training_has_a_derivative_by_the_first_params(name):
    params = start()

    def total(weight):
        first = {**params, "3": {**params["3"], "weight": weight}}
        return after_three_steps(OPTIMIZERS[name], first, 0.01)

    weight = params["3"]["weight"]
    torch.testing.assert_close(
        torch.func.grad(total)(weight), numeric(total, weight), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("tape", [True, False], ids=["autograd", "torch.func"])
def test_a_loss_after_training_has_a_derivative_by_the_learning_rate(name, tape):
    def total(lr):
        return after_three_steps(OPTIMIZERS[name], start(), lr)

    lr = torch.tensor(0.01, dtype=DOUBLE)
    if tape:
        leaf = lr.clone().requires_grad_()
        (found,) = torch.autograd.grad(total(leaf), leaf)
    else:
        found = torch.func.grad(total)(lr)
    torch.testing.assert_close(found, numeric(total, lr), rtol=1e-4, atol=1e-6)


SMOOTH = ["tanh", "sigmoid", "gelu", "silu", "elu", "softplus", "softsign", "mish", "logsigmoid"]


@pytest.mark.parametrize("name", [*SMOOTH, "softmax", "log_softmax", "glu"])
def test_an_activations_pullback_has_a_derivative(name):
    layer = getattr(fn, name)()

    def total(x):
        y, pullback, _ = layer.vjp({}, x)
        return pullback(y.cos().detach())[1].sin().sum()

    def held(x):
        y, _ = layer.apply({}, X)
        return layer.vjp({}, x)[1](y.cos())[1].sin().sum()

    torch.testing.assert_close(torch.func.grad(held)(X), numeric(held, X), rtol=1e-5, atol=1e-7)
    assert torch.func.grad(total)(X).isfinite().all()


def test_huber_has_a_second_derivative_in_forward_mode():
    def gradient(y):
        return torch.func.grad(lambda y: fn.huber("sum").apply(y, TARGET))(y)

    _, second = torch.func.jvp(gradient, (TARGET + 0.5,), (torch.ones_like(TARGET),))
    torch.testing.assert_close(second, torch.ones_like(TARGET))
