"""experts: against the sum written as loops, the capacity, the balance and its training."""

import pytest
import torch
from layers.oracle import assert_near, autograd, randn
from torch.nn import functional as F

import funcnet as fn

X = randn(2, 7, 4)
N = 5


def written_out(params, x, top_k, capacity=None):
    """The definition, token by token."""
    rows = x.reshape(-1, x.shape[-1])
    logits = F.linear(rows, params["router"]["weight"], params["router"]["bias"])
    best, choices = logits.topk(top_k)
    gates = best.softmax(-1)
    size = len(rows) if capacity is None else -int(-capacity * len(rows) * top_k // N)
    load = [0] * N
    output = [torch.zeros(3, dtype=x.dtype) for _ in rows]
    for choice in range(top_k):
        for token, row in enumerate(rows):
            expert = int(choices[token, choice])
            load[expert] += 1
            if load[expert] > size:
                continue
            own = [params["experts"][part][expert] for part in ("weight", "bias")]
            output[token] = output[token] + gates[token, choice] * F.linear(row, *own)
    share = torch.tensor(load, dtype=x.dtype) / (len(rows) * top_k)
    balance = N * (share * logits.softmax(-1).mean(0)).sum()
    return torch.stack(output).reshape(*x.shape[:-1], 3), {"balance": balance}


def made(top_k, capacity=None):
    layer = fn.experts(fn.linear(N), fn.linear(3), top_k, capacity, n=N)
    params, _ = layer.init(fn.key(1), X)
    return layer, params


@pytest.mark.parametrize("capacity", [None, 2.0, 0.5, 0.1])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_the_output_and_the_gradients_are_those_of_the_definition(top_k, capacity):
    layer, params = made(top_k, capacity)
    y, pullback, _ = layer.vjp(params, X)
    dy = (randn(2, 7, 3, seed=5), {"balance": randn(seed=6)})
    expected, dparams, dx = autograd(
        lambda params, x: written_out(params, x, top_k, capacity), params, X, dy
    )
    assert_near(y, expected)
    assert_near(pullback(dy), (dparams, dx))


def test_layers_by_name_and_by_position_and_stacked_are_the_same():
    layer, params = made(2)
    several = [fn.tree.map(lambda leaf, i=i: leaf[i], params["experts"]) for i in range(N)]
    expected = layer.apply(params, X)[0]
    for names, layers in (
        ([str(i) for i in range(N)], (fn.linear(3),) * N),
        (list("abcde"), dict.fromkeys("abcde", fn.linear(3))),
    ):
        apart = {"router": params["router"], "experts": dict(zip(names, several, strict=True))}
        assert_near(fn.experts(fn.linear(N), layers).apply(apart, X)[0], expected)


def test_rows_for_all_tokens_give_what_the_fewest_rows_give():
    layer, params = made(2)
    together = fn.vmap(lambda x: layer.apply(params, x)[0])(X[None])
    assert_near(fn.tree.map(lambda leaf: leaf[0], together), layer.apply(params, X)[0])
    held = []
    for capacity in (None, 1.0):
        _, pullback, _ = made(1, capacity)[0].vjp(params, X)
        held.append(pullback.residuals["experts"].residuals["saved"][0].shape)
    assert held[1] == (N, 3, 4)
    assert 3 <= held[0][1] < 14


def test_experts_of_one_choice_with_noise_keep_the_laws():
    expert = fn.serial(fn.linear(4), fn.tanh(), fn.dropout(0.2), fn.linear(2))
    fn.testing.check_layer(fn.experts(fn.linear(3), (expert,) * 3, top_k=1), X)


def test_no_tokens_are_no_error():
    layer, params = made(2)
    y, pullback, _ = layer.vjp(params, X[:0])
    assert y[0].shape == (0, 7, 3)
    assert y[1]["balance"] == 0
    assert pullback(y)[1].shape == (0, 7, 4)


def test_even_choices_have_balance_1():
    layer = fn.experts(fn.identity(), fn.linear(2), 1, n=4)
    params, _ = layer.init(fn.key(0), torch.eye(4))
    assert layer.apply(params, torch.eye(4))[0][1]["balance"] == 1.0
    assert layer.apply(params, torch.eye(4)[:1].expand(4, 4))[0][1]["balance"] > 1.5


def test_training_the_balance_evens_the_choices():
    x = randn(64, 4, dtype=torch.float32)
    model = fn.experts(fn.linear(N, bias_init=lopsided), fn.linear(3), 1, n=N)
    loss = fn.losses.auxiliary(fn.mse(), {"balance": 1.0})
    metrics = {"balance": lambda prediction, target: prediction[1]["balance"]}
    step = fn.train_step(model, loss, fn.adam(0.05), metrics=metrics)
    state = fn.init_train_state(model, fn.adam(0.05), fn.key(0), x)
    found = []
    for _ in range(60):
        state, measured = step(state, (x, torch.zeros(64, 3)))
        found.append(float(measured["balance"]))
    assert found[0] > 2.0
    assert found[-1] < 1.2


def lopsided(key, shape, dtype, device):
    return torch.tensor([3.0, 0, 0, 0, 0], dtype=dtype, device=device)


REFUSED = {
    r"top_k must be from 1 to 3": lambda: fn.experts(fn.linear(3), fn.linear(3), 4, n=3),
    r"capacity must be > 0": lambda: fn.experts(fn.linear(3), fn.linear(3), capacity=0.0, n=3),
    r"expects n, the number of copies": lambda: fn.experts(fn.linear(3), fn.linear(3)),
    r"got several and 2": lambda: fn.experts(fn.linear(2), (fn.linear(3),) * 2, n=2),
    r"a router with 3 logits for a token, got .*4": lambda: fn.experts(
        fn.linear(4), fn.linear(3), n=3
    ).init(fn.key(0), X),
    r"outputs of one shape": lambda: fn.experts(fn.linear(2), (fn.linear(3), fn.linear(4))).init(
        fn.key(0), X
    ),
    r"floating-point tensor": lambda: fn.experts(fn.linear(3), fn.linear(3), n=3).init(
        fn.key(0), X.long()
    ),
}


@pytest.mark.parametrize("match", REFUSED)
def test_what_does_not_fit_is_refused(match):
    with pytest.raises(ValueError, match=f"experts.*{match}"):
        REFUSED[match]()
    with pytest.raises(TypeError, match="experts: expects a layer, or a tuple or dict of some"):
        fn.experts(fn.linear(3), [fn.linear(3)])


def test_auxiliary_refuses():
    loss = fn.losses.auxiliary(fn.mse(), {"balance": 1.0})
    for prediction in (X, (X, {}), (X, {"balance": X}), (X, X)):
        with pytest.raises(ValueError, match=r"auxiliary: expects .* with the scalars"):
            loss.apply(prediction, X)
    with pytest.raises(ValueError, match="a loss with a scalar value"):
        fn.losses.auxiliary(fn.mse("none"), {}).apply((X, {}), X)
