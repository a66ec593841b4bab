"""Recurrent layers beside torch's packed sequences; dropout between layers; bad input."""

import pytest
import torch
from layers.oracle import assert_near, check_against, params_of, randn, randomize
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import funcnet as fn
from funcnet.core import map_layers

STEPS, BATCH, FEATURES, HIDDEN = 5, 4, 3, 2
LENGTHS = torch.tensor([3, 5, 1, 4])
KINDS = {
    "rnn": (fn.rnn, nn.RNN, {"nonlinearity": "relu"}),
    "gru": (fn.gru, nn.GRU, {}),
    "lstm": (fn.lstm, nn.LSTM, {}),
    "lstm with a projection": (fn.lstm, nn.LSTM, {"proj_size": 1}),
}


def states(kind, directions, seed=7):
    hidden = 1 if "projection" in kind else HIDDEN
    h = randn(directions, BATCH, hidden, seed=seed)
    return (h, randn(directions, BATCH, HIDDEN, seed=seed + 1)) if "lstm" in kind else h


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_give_what_torch_gives_for_packed_sequences(kind, batch_first):
    make, cls, options = KINDS[kind]
    for count, bidirectional in ((1, False), (1, True), (2, True)):
        options = options | {"batch_first": batch_first, "bidirectional": bidirectional}
        module = randomize(cls(FEATURES, HIDDEN, count, **options).double())

        def packed(params, x, module=module):
            given = pack_padded_sequence(x["input"], LENGTHS, batch_first, enforce_sorted=False)
            flat = fn.tree.to_dotted(params)
            y, last = torch.func.functional_call(module, flat, (given, x.get("hx")))
            return pad_packed_sequence(y, batch_first, total_length=STEPS)[0], last

        shape = (BATCH, STEPS, FEATURES) if batch_first else (STEPS, BATCH, FEATURES)
        x = {"input": randn(*shape), "lengths": LENGTHS}
        layer = make(HIDDEN, count, **options)
        check_against(packed, layer, params_of(module), x)
        x["hx"] = states(kind, count * (1 + bidirectional))
        check_against(packed, layer, params_of(module), x)


def test_lengths_may_be_int32_and_what_is_behind_them_does_not_matter():
    layer, x = fn.gru(HIDDEN, bidirectional=True), randn(STEPS, BATCH, FEATURES)
    params, _ = layer.init(fn.key(0), x)
    expected, pullback, _ = layer.vjp(params, {"input": x, "lengths": LENGTHS})
    behind = torch.arange(STEPS)[:, None] >= LENGTHS
    other = {"input": torch.where(behind[..., None], torch.nan, x), "lengths": LENGTHS.int()}
    y, other_pullback, _ = layer.vjp(params, other)
    assert_near(y, expected, 0.0)
    assert_near(other_pullback(y), pullback(expected), 0.0)


def test_a_length_of_0_is_an_error_eagerly_and_gives_the_first_state_under_vmap():
    layer = fn.lstm(HIDDEN)
    x = {"input": randn(STEPS, BATCH, FEATURES), "hx": states("lstm", 1)}
    params, _ = layer.init(fn.key(0), x)
    for wrong, found in (([3, 0, 1, 2], "0 to 3"), ([3, 1, 6, 2], "1 to 6")):
        with pytest.raises(ValueError, match=rf"^lstm: expects lengths in \[1, 5\], got {found}$"):
            layer.apply(params, x | {"lengths": torch.tensor(wrong)})

    def run(lengths):
        return layer.apply(params, x | {"lengths": lengths})[0]

    (output, (h, c)) = fn.vmap(run)(torch.tensor([[3, 0, 1, 2]]))
    assert output[0, :, 1].eq(0).all()
    assert torch.equal(h[0, :, 1], x["hx"][0][:, 1])
    assert torch.equal(c[0, :, 1], x["hx"][1][:, 1])


@pytest.mark.parametrize("kind", ["gru", "lstm with a projection"])
def test_a_jitted_layer_is_the_eager_one_with_weights_in_panels_too(kind):
    make, _, options = KINDS[kind]
    options = options | ({"proj_size": 64} if options.get("proj_size") else {})
    layer = make(128, bidirectional=True, **options)
    x = {"input": randn(3, 4, 5), "lengths": torch.tensor([3, 1, 2, 3])}
    params, _ = layer.init(fn.key(0), x)

    def run(params, x):
        y, pullback, _ = layer.vjp(params, x)
        return y, pullback(y)

    assert_near(fn.jit(run)(params, x), run(params, x), 1e-9)


def test_dropout_is_between_layers_with_a_mask_of_its_own_for_each():
    x = randn(STEPS, BATCH, FEATURES)
    layer, key = fn.gru(6, 3, dropout=0.4), fn.key(3)
    params, _ = layer.init(fn.key(0), x)
    ones = [fn.gru(6) for _ in range(3)]
    y, last = x, []
    for index, one in enumerate(ones):
        own = {f"{name[:-1]}0": leaf for name, leaf in params.items() if name[-1] == str(index)}
        (y, h), _ = one.apply(own, y)
        last.append(h)
        if index < 2:
            y, _ = fn.dropout(0.4).apply({}, y, key=fn.fold_in(key, index), train=True)
    assert_near(layer.apply(params, x, key=key, train=True)[0], (y, torch.cat(last)), 0.0)
    plain = fn.gru(6, 3).apply(params, x)[0]
    assert_near(layer.apply(params, x, key=key)[0], plain, 0.0)
    with pytest.raises(ValueError, match=r"^gru: needs a key when train=True"):
        layer.vjp(params, x)
    assert not fn.gru(6, dropout=0.4).takes_key


def test_the_first_values_are_uniform_by_the_hidden_size():
    params, _ = fn.lstm(64, 2).init(fn.key(0), torch.ones(1, 1, 100))
    for leaf in params.values():
        assert 0.115 < leaf.abs().max() <= 64**-0.5
    assert fn.lstm(3, dtype=torch.float64).init(fn.key(0), randn(2, 4).float())[0][
        "weight_hh_l0"
    ].dtype == (torch.float64)


def test_one_layer_of_cells_is_the_layer():
    x, (h, c) = randn(STEPS, BATCH, FEATURES), states("lstm", 1)
    layer, cell = fn.lstm(HIDDEN), fn.lstm_cell(HIDDEN)
    params, _ = layer.init(fn.key(0), x)
    own = {name.removesuffix("_l0"): leaf for name, leaf in params.items()}
    state = h[0], c[0]
    for step in x:
        state, _ = cell.apply(own, (step, state))
    assert_near(layer.apply(params, (x, (h, c)))[0][1], tuple(s[None] for s in state))


X = randn(STEPS, BATCH, FEATURES)
H = randn(1, BATCH, HIDDEN)
FAULTS = [
    (
        fn.gru,
        torch.ones(3),
        ValueError,
        r"gru: expects an input \(steps, batch, features\) or",
    ),
    (fn.gru, X[:0], ValueError, r"gru: expects at least one step, got \(0, 4, 3\)"),
    (fn.gru, X.long(), TypeError, "gru: expects a floating-point input, got int64"),
    (fn.gru, (X, H, H), TypeError, r"gru: expects a tensor, a tuple \(input, hx\) or a dict with"),
    (fn.gru, {"hx": H}, TypeError, "gru: expects a tensor, a tuple"),
    (fn.gru, {"input": X, "length": LENGTHS}, TypeError, "gru: expects a tensor, a tuple"),
    (
        fn.gru,
        (X, H[:, :2]),
        ValueError,
        r"gru: expects h_0 of shape \(1, 4, 2\) beside an",
    ),
    (fn.gru, (X, (H, H)), TypeError, "gru: expects a tensor as hx, got"),
    (fn.lstm, (X, H), TypeError, r"lstm: expects a tuple \(h_0, c_0\) as hx, got float64"),
    (fn.lstm, (X, (H, H[..., :1])), ValueError, r"lstm: expects c_0 of shape \(1, 4, 2\)"),
    (fn.rnn, (X, H.float()), TypeError, "rnn: h_0 is torch.float32, the input is torch.float64"),
    (
        fn.rnn,
        {"input": X, "lengths": LENGTHS[:2]},
        ValueError,
        r"rnn: expects lengths of shape",
    ),
    (
        fn.rnn,
        {"input": X, "lengths": LENGTHS / 2},
        TypeError,
        "rnn: expects int32 or int64 lengths",
    ),
    (
        fn.rnn,
        {"input": X[:, 0], "lengths": LENGTHS},
        ValueError,
        "rnn: expects lengths beside",
    ),
    (
        fn.rnn_cell,
        X,
        ValueError,
        r"rnn_cell: expects an input \(batch, features\)",
    ),
    (fn.gru_cell, (X[0], H), ValueError, r"gru_cell: expects h of shape \(4, 2\)"),
    (fn.lstm_cell, (X[0], H[0]), TypeError, r"lstm_cell: expects a tuple \(h, c\) as hx"),
    (fn.lstm_cell, {"input": X[0], "lengths": LENGTHS}, TypeError, "lstm_cell: expects a tensor"),
]


@pytest.mark.parametrize(("make", "x", "error", "message"), FAULTS)
def test_bad_input_is_refused_by_name(make, x, error, message):
    layer = make(HIDDEN)
    with pytest.raises(error, match=f"^{message}"):
        layer.init(fn.key(0), x)
    params, _ = layer.init(fn.key(0), X[0] if "cell" in layer.name else X)
    with pytest.raises(error, match=rf"^serial\['0'\] {message}"):
        fn.serial(layer).apply({"0": params}, x)


def test_params_for_other_features_are_refused():
    for layer, x in ((fn.rnn(HIDDEN), X), (fn.lstm_cell(HIDDEN), (X[0], (H[0], H[0])))):
        params, _ = layer.init(fn.key(0), x)
        wider = fn.tree.map(lambda leaf: torch.cat([leaf, leaf], -1), x)
        wider = wider if isinstance(x, torch.Tensor) else (wider[0], x[1])
        with pytest.raises(ValueError, match=r"weight_ih(_l0)? expects 3 features of the input"):
            layer.apply(params, wider)


OPTIONS = [
    (lambda: fn.rnn(0), ValueError, "rnn: hidden_size must be > 0, got 0"),
    (lambda: fn.gru(2.0), ValueError, "gru: hidden_size must be > 0, got 2.0"),
    (lambda: fn.gru(2, 0), ValueError, "gru: num_layers must be > 0, got 0"),
    (lambda: fn.gru(2, 1, 1), TypeError, "gru: bias must be True or False, got 1"),
    (lambda: fn.gru(2, batch_first=0), TypeError, "gru: batch_first must be True or False, got 0"),
    (lambda: fn.gru(2, bidirectional=2), TypeError, "gru: bidirectional must be True or False"),
    (lambda: fn.lstm(2, dropout=1.5), ValueError, r"lstm: dropout must be in \[0, 1\], got 1.5"),
    (lambda: fn.lstm(2, dropout=True), ValueError, r"lstm: dropout must be in \[0, 1\], got True"),
    (
        lambda: fn.lstm(2, proj_size=2),
        ValueError,
        r"lstm: proj_size must be in \[0, hidden",
    ),
    (lambda: fn.lstm(2, proj_size=-1), ValueError, "lstm: proj_size must be in"),
    (lambda: fn.rnn(2, 1, "sine"), ValueError, "rnn: nonlinearity must be 'tanh' or 'relu', got"),
    (lambda: fn.rnn_cell(2, True, "x"), ValueError, "rnn_cell: nonlinearity must be 'tanh' or 're"),
    (lambda: fn.lstm_cell(2, 3), TypeError, "lstm_cell: bias must be True or False, got 3"),
]


@pytest.mark.parametrize(("make", "error", "message"), OPTIONS)
def test_bad_options_are_refused_by_name(make, error, message):
    with pytest.raises(error, match=f"^{message}"):
        make()


def test_item_takes_one_and_refuses_what_is_not_there():
    net = fn.serial(fn.gru(HIDDEN), fn.item(1))
    params, _ = net.init(fn.key(0), X)
    assert_near(net.apply(params, X)[0], fn.gru(HIDDEN).apply(params["0"], X)[0][1], 0.0)
    with pytest.raises(ValueError, match=r"^item: expects a tuple with 2, got \(float64 "):
        fn.item(2).apply({}, (X, X))
    with pytest.raises(ValueError, match=r"^item: expects a dict with 'a', got float64"):
        fn.item("a").apply({}, X)


def test_a_recurrent_layer_is_one_layer_of_a_model():
    paths = []
    net = fn.serial(fn.lstm(HIDDEN, 2), fn.item(0))
    map_layers(lambda path, layer: paths.append((path, layer.name)) or layer, net)
    assert paths == [("0", "lstm"), ("1", "item"), ("", "serial")]
