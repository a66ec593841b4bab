"""Positions: against their definitions, a cache against the whole sequence, what they refuse."""

import math

import pytest
import torch
from layers.oracle import assert_near, randn

import funcnet as fn

X = randn(2, 3, 5, 8)
PLACES = torch.tensor([[3, 0, 2, 5, 1], [1, 1, 4, 2, 0]])


def test_sinusoids_are_those_of_the_paper():
    table = fn.sinusoidal_positions().apply({}, torch.zeros(4, 6, dtype=torch.float64))[0]
    for position in range(4):
        for pair in range(3):
            angle = position / 10000 ** (2 * pair / 6)
            assert math.isclose(table[position, 2 * pair], math.sin(angle), abs_tol=1e-12)
            assert math.isclose(table[position, 2 * pair + 1], math.cos(angle))


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotation_is_a_product_with_a_complex_number(interleaved):
    y = fn.rotate(X, interleaved=interleaved, dim=6)
    first, second = ((0, 2, 4), (1, 3, 5)) if interleaved else ((0, 1, 2), (3, 4, 5))
    pairs = torch.complex(X[..., first], X[..., second])
    angles = torch.arange(5.0)[:, None].double() * 10000.0 ** (-torch.arange(3).double() / 3)
    expected = pairs * torch.polar(torch.ones_like(angles), angles)
    assert_near(y[..., first], expected.real)
    assert_near(y[..., second], expected.imag)
    assert torch.equal(y[..., 6:], X[..., 6:])


def test_products_of_rotated_vectors_depend_on_the_difference_of_positions():
    query, key = randn(1, 8, seed=1), randn(1, 8, seed=2)
    products = [
        (fn.rotate(query, torch.tensor([p + 3])) * fn.rotate(key, torch.tensor([p]))).sum()
        for p in (0, 7, 100)
    ]
    assert_near(torch.stack(products), products[0].expand(3))


def test_scaling_stretches_the_slowest_rotation_alone():
    pairs = torch.zeros(1, 8, dtype=torch.float64)
    pairs[0, :4] = 1.0
    at = torch.tensor([1])
    plain, scaled = (fn.rotate(pairs, at, scale=scale)[0] for scale in (1.0, 8.0))
    angles = [torch.atan2(y[4:], y[:4]) for y in (plain, scaled)]
    assert_near(angles[1][0], angles[0][0])
    assert_near(angles[1][3], angles[0][3] / 8)
    assert torch.equal(fn.rotate(X[..., :2], scale=8.0), fn.rotate(X[..., :2]))


@pytest.mark.parametrize(
    "layer",
    [fn.learned_positions(6), fn.sinusoidal_positions(), fn.rotary(), fn.alibi(3)],
    ids=lambda layer: layer.name,
)
def test_given_positions_are_those_of_each_member_of_the_batch(layer):
    params, _ = layer.init(fn.key(0), X)
    y, pullback, _ = layer.vjp(params, (X, PLACES))
    dy = randn(*y.shape, seed=3)
    dparams, (dx, nothing) = pullback(dy)
    assert nothing is None
    each = [layer.vjp(params, (X[i : i + 1], PLACES[i])) for i in range(2)]
    assert_near(y, torch.cat([one[0] for one in each]))
    grads = [one[1](dy[i : i + 1]) for i, one in enumerate(each)]
    assert_near(dx, torch.cat([grad[1][0] for grad in grads]))
    assert_near(dparams, fn.tree.map(torch.add, grads[0][0], grads[1][0]))
    in_order = layer.apply(params, X)[0]
    seq = torch.arange(3, 8) if layer.name == "alibi" else torch.arange(5)
    if layer.name == "alibi":
        in_order, seq = layer.apply(params, X[..., 3:, :])[0], torch.arange(6, 8)
        assert_near(layer.apply(params, (X[..., 3:, :], seq))[0], in_order)
    else:
        assert_near(layer.apply(params, (X, seq))[0], in_order)


def test_the_first_positions_have_the_gradient_of_given_ones():
    layer = fn.learned_positions(7)
    params, _ = layer.init(fn.key(0), X)
    _, pullback, _ = layer.vjp(params, X)
    _, given, _ = layer.vjp(params, (X, torch.arange(5)))
    dy = randn(*X.shape, seed=3)
    assert_near(pullback(dy)[0], given(dy)[0])
    assert pullback(dy)[0]["weight"][5:].abs().sum() == 0


@pytest.mark.parametrize(
    "make", [lambda **o: fn.learned_positions(6, **o), fn.sinusoidal_positions]
)
def test_token_by_token_with_a_cache_is_the_whole_sequence(make):
    whole, layer = make(), make(cache=True)
    params, state = layer.init(fn.key(0), X)
    expected = whole.apply(params, X)[0]
    found, compiled = [], fn.jit(layer.apply)
    for start, stop in ((0, 2), (2, 3), (3, 5)):
        piece, before = X[..., start:stop, :], state
        y, state = layer.apply(params, piece, state)
        found.append(y)
        if stop - start == 2:
            assert_near(compiled(params, piece, before), (y, state))
    assert_near(torch.cat(found, -2), expected)
    assert state["length"] == 5


def test_beyond_the_table_is_an_error_or_not_a_number():
    layer = fn.learned_positions(6, cache=True)
    params, state = layer.init(fn.key(0), X)
    _, state = layer.apply(params, X, state)
    with pytest.raises(ValueError, match=r"\[0, 6\), got positions from 5 to 9"):
        layer.apply(params, X, state)
    y, after = fn.vmap(lambda state: layer.apply(params, X, state))(
        {"length": state["length"][None]}
    )
    assert y[..., :1, :].isfinite().all()
    assert y[..., 1:, :].isnan().all()
    assert after["length"].tolist() == [10]
    layer = fn.serial(place=fn.learned_positions(4))
    with pytest.raises(ValueError, match=r"serial\['place'\] learned_positions: expects positions"):
        layer.init(fn.key(0), X)
    layer = fn.learned_positions(6)
    with pytest.raises(ValueError, match=r"\[0, 6\), got positions from -1 to 4"):
        layer.apply({"weight": params["weight"]}, (X, PLACES - 1))


def test_alibi_has_the_slopes_and_biases_of_the_paper():
    layer = fn.alibi(8)
    scores = layer.apply({}, torch.zeros(8, 4, 4))[0]
    assert scores[0, 3].tolist() == [-1.5, -1.0, -0.5, 0.0]
    assert scores[:, 1, 0].tolist() == [-(2.0**-i) for i in range(1, 9)]
    twelve = fn.alibi_bias(12, torch.tensor([1]), torch.tensor([0]))
    more = [-(2.0 ** -(i / 2)) for i in (1, 3, 5, 7)]
    expected = torch.tensor([-(2.0**-i) for i in range(1, 9)] + more)
    torch.testing.assert_close(twelve.flatten(), expected)
    decoded = layer.apply({}, torch.zeros(8, 1, 4))[0]
    assert torch.equal(decoded, scores[:, 3:])


REFUSED = {
    "learned_positions: .*got": lambda: fn.learned_positions(0),
    "base must be > 0": lambda: fn.sinusoidal_positions(0.0),
    "scale must be > 0": lambda: fn.rotary(scale=0.0),
    "dim must be even": lambda: fn.rotary(dim=3),
    "heads must be > 0": lambda: fn.alibi(0),
    r"rotary: expects an even number of features": lambda: fn.rotary().apply({}, X[..., :5]),
    r"rotary: expects at least 10 features": lambda: fn.rotary(dim=10).apply({}, X),
    r"scores of shape \(\*, 4, L, S\)": lambda: fn.alibi(4).apply({}, X),
    r"expects \(..., seq, features\), got \(3,\)": lambda: fn.rotary().apply({}, torch.ones(3)),
    r"positions of shape \(seq,\) or \(batch, seq\)": lambda: fn.rotary().apply({}, (X, PLACES.T)),
    "expects x alone": lambda: fn.sinusoidal_positions(cache=True).apply(
        {}, (X, PLACES), {"length": torch.tensor(0)}
    ),
}


@pytest.mark.parametrize("match", REFUSED)
def test_what_does_not_fit_is_refused(match):
    with pytest.raises(ValueError, match=match):
        REFUSED[match]()


def test_positions_are_integers():
    with pytest.raises(TypeError, match="rotary: expects int32 or int64 positions"):
        fn.rotary().apply({}, (X, PLACES.double()))
    with pytest.raises(TypeError, match="rotary: expects a floating-point tensor"):
        fn.rotary().apply({}, PLACES)
