import optree
import pytest
import torch
from hypothesis import given, settings, strategies as st
from layers.oracle import assert_near, check_against, check_module, cotangent, randn, transposed
from torch import nn

import funcnet as fn

MODULES = {
    "identity": (fn.identity(), nn.Identity(), (3, 4)),
    "flatten": (fn.flatten(), nn.Flatten(), (3, 2, 4, 5)),
    "flatten a matrix": (fn.flatten(), nn.Flatten(), (3, 4)),
    "flatten all": (fn.flatten(0), nn.Flatten(0), (3, 2, 4, 5)),
    "flatten the first two": (fn.flatten(0, 1), nn.Flatten(0, 1), (3, 2, 4, 5)),
    "flatten from the end": (fn.flatten(-3, -2), nn.Flatten(-3, -2), (3, 2, 4, 5)),
    "flatten an empty batch": (fn.flatten(), nn.Flatten(), (0, 2, 4)),
    "flatten a scalar": (fn.flatten(0), nn.Flatten(0), ()),
    "unflatten": (fn.unflatten(1, (2, 3)), nn.Unflatten(1, (2, 3)), (4, 6, 5)),
    "unflatten the last": (fn.unflatten(-1, (3, -1)), nn.Unflatten(-1, (3, -1)), (4, 6)),
    "unflatten by a list": (fn.unflatten(0, [2, 2]), nn.Unflatten(0, (2, 2)), (4, 6)),
    "unflatten an empty batch": (fn.unflatten(1, (2, 3)), nn.Unflatten(1, (2, 3)), (0, 6)),
}

FUNCTIONS = {
    "reshape": (fn.reshape(6, 4), lambda x: x.reshape(6, 4), (2, 3, 4)),
    "reshape by -1": (fn.reshape(-1, 2), lambda x: x.reshape(-1, 2), (2, 3, 4)),
    "reshape to a scalar": (fn.reshape(), lambda x: x.reshape(()), (1, 1)),
    "reshape a scalar": (fn.reshape(1, 1), lambda x: x.reshape(1, 1), ()),
    "reshape nothing": (fn.reshape(3, 0), lambda x: x.reshape(3, 0), (0, 2)),
    "permute": (fn.permute(2, 0, 1), lambda x: x.permute(2, 0, 1), (2, 3, 4)),
    "permute from the end": (fn.permute(-1, 0, -2), lambda x: x.permute(-1, 0, -2), (2, 3, 4)),
    "permute four": (fn.permute(3, 0, 2, 1), lambda x: x.permute(3, 0, 2, 1), (2, 3, 4, 5)),
    "permute nothing": (fn.permute(), lambda x: x, ()),
    "select": (fn.select(2), lambda x: x[..., 2], (2, 3, 4)),
    "select the last": (fn.select(-1), lambda x: x[..., -1], (2, 3, 4)),
    "select of the first dimension": (fn.select(1, 0), lambda x: x[1], (2, 3, 4)),
    "select from within": (fn.select(-2, dim=-2), lambda x: x[:, -2], (2, 3, 4)),
    "select of a vector": (fn.select(0), lambda x: x[0], (3,)),
    "select a slice": (fn.select(slice(1, 3)), lambda x: x[..., 1:3], (2, 3, 4)),
    "select a slice of rows": (fn.select(slice(0, 1), 0), lambda x: x[0:1], (2, 3, 4)),
    "select without a start": (fn.select(slice(2)), lambda x: x[..., :2], (2, 4)),
    "select without a stop": (fn.select(slice(2, None)), lambda x: x[..., 2:], (2, 4)),
    "select from the end": (fn.select(slice(-3, -1)), lambda x: x[..., -3:-1], (2, 4)),
    "select past the end": (fn.select(slice(2, 9)), lambda x: x[..., 2:9], (2, 4)),
    "select nothing": (fn.select(slice(3, 1)), lambda x: x[..., 3:1], (2, 4)),
    "select beyond": (fn.select(slice(7, 9)), lambda x: x[..., 7:9], (2, 4)),
    "select all": (fn.select(slice(None), 1), lambda x: x, (2, 3, 4)),
    "split": (fn.split(2), lambda x: x.split(2, -1), (3, 4)),
    "split with a rest": (fn.split(3), lambda x: x.split(3, -1), (3, 4)),
    "split in sections": (fn.split([1, 0, 3]), lambda x: x.split([1, 0, 3], -1), (3, 4)),
    "split rows": (fn.split((1, 2), dim=0), lambda x: x.split([1, 2], 0), (3, 4)),
    "split in one": (fn.split(9), lambda x: x.split(9, -1), (3, 4)),
    "split within": (fn.split(2, -2), lambda x: x.split(2, -2), (2, 5, 3)),
}


@pytest.mark.parametrize("name", MODULES)
def test_shape_layer_is_torchs(name):
    layer, module, shape = MODULES[name]
    check_module(layer, module, randn(*shape))


@pytest.mark.parametrize("rearrange", [lambda x: x, transposed])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_shape_layer_is_torchs_function(name, rearrange):
    layer, function, shape = FUNCTIONS[name]
    check_against(lambda params, x: function(x), layer, {}, rearrange(randn(*shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*MODULES, *FUNCTIONS])
def test_shape_layer_moves_values_of_any_dtype_exactly(name, dtype):
    layer, function, shape = {**MODULES, **FUNCTIONS}[name]
    x = randn(*shape, dtype=dtype)
    check_against(lambda params, x: function(x), layer, {}, x, tolerance=0.0)


@pytest.mark.parametrize("name", [*MODULES, *FUNCTIONS])
def test_shape_layer_gives_an_integer_input_no_cotangent(name):
    layer, function, shape = {**MODULES, **FUNCTIONS}[name]
    x = torch.arange(randn(*shape).numel()).reshape(shape)
    y, pullback, _ = layer.vjp({}, x)
    assert_near(y, function(x))
    dy = optree.tree_map(lambda _: None, y)
    assert pullback(dy) == ({}, None)
    assert pullback(dy, x=False) == ({}, None)


CONCATS = {
    "last": (-1, [(2, 3), (2, 1), (2, 4)]),
    "rows": (0, [(2, 3), (1, 3)]),
    "within": (1, [(2, 1, 4), (2, 2, 4)]),
    "within from the end": (-2, [(2, 1, 4), (2, 2, 4)]),
    "one": (-1, [(2, 3)]),
    "with an empty one": (-1, [(2, 3), (2, 0)]),
    "empty batches": (-1, [(0, 3), (0, 2)]),
    "vectors": (0, [(3,), (2,)]),
}


@pytest.mark.parametrize("name", CONCATS)
def test_concat_is_torchs_cat(name):
    dim, shapes = CONCATS[name]
    x = tuple(randn(*shape, seed=seed) for seed, shape in enumerate(shapes))
    check_against(lambda params, x: torch.cat(x, dim), fn.concat(dim), {}, x)
    x = tuple(transposed(part) for part in x)
    check_against(lambda params, x: torch.cat(x, dim), fn.concat(dim), {}, x)


def test_concat_concatenates_the_last_dimension_by_default():
    assert fn.concat().apply({}, (randn(2, 3), randn(2, 1)))[0].shape == (2, 4)


def test_concat_gives_integers_no_cotangent():
    x = (torch.arange(3), torch.arange(2))
    y, pullback, _ = fn.concat().vjp({}, x)
    assert y.tolist() == [0, 1, 2, 0, 1]
    assert pullback(None) == ({}, (None, None))


def test_concat_of_two_dtypes_promotes_as_torch_and_gives_each_its_own_in_the_gradient():
    x = (randn(2, 3, dtype=torch.float32), randn(2, 1))
    check_against(lambda params, x: torch.cat(x, -1), fn.concat(), {}, x)


def test_concat_of_numbers_and_integers_gives_only_the_numbers_a_cotangent():
    x = (randn(2, 3), torch.arange(2).reshape(2, 1))
    check_against(lambda params, x: torch.cat(x, -1), fn.concat(), {}, x)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_concat_is_the_inverse_of_split_forwards_and_backwards(shape, data):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    cuts = sorted(data.draw(st.lists(st.integers(0, shape[dim]), max_size=3)))
    sizes = [stop - start for start, stop in zip([0, *cuts], [*cuts, shape[dim]], strict=True)]
    x = randn(*shape)
    net = fn.serial(fn.split(sizes, dim), fn.concat(dim))
    y, pullback, _ = net.vjp({}, x)
    assert_near(y, x, 0.0)
    dy = cotangent(y)
    assert_near(pullback(dy), ({}, dy), 0.0)


@given(st.lists(st.integers(0, 4), max_size=5), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_permute_moves_the_gradient_back(shape, random):
    dims = list(range(len(shape)))
    random.shuffle(dims)
    layer = fn.permute(*(dim - len(shape) * random.getrandbits(1) for dim in dims))
    check_against(lambda params, x: x.permute(dims), layer, {}, randn(*shape), tolerance=0.0)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_flatten_is_the_inverse_of_unflatten_and_both_are_reshapes(shape, data):
    start = data.draw(st.integers(0, len(shape) - 1))
    stop = data.draw(st.integers(start, len(shape) - 1))
    x = randn(*shape)
    net = fn.serial(fn.flatten(start, stop), fn.unflatten(start, shape[start : stop + 1]))
    y, pullback, _ = net.vjp({}, x)
    assert_near(y, x, 0.0)
    assert_near(pullback(y), ({}, x), 0.0)
    flat, _ = fn.flatten(start, stop).apply({}, x)
    assert_near(fn.reshape(*flat.shape).apply({}, x)[0], flat, 0.0)


def test_identity_passes_any_tree():
    x = ({"a": randn(2)}, (randn(3), torch.arange(2)))
    y, pullback, _ = fn.identity().vjp({}, x)
    assert_near(y, x, 0.0)
    dy = ({"a": randn(2, seed=1)}, (randn(3, seed=1), None))
    assert_near(pullback(dy), ({}, dy), 0.0)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (fn.flatten(), randn(3)),
        (fn.flatten(2), randn(3, 4)),
        (fn.unflatten(1, (2, 2)), randn(3, 6)),
        (fn.unflatten(3, (2, 2)), randn(3, 4)),
        (fn.reshape(5, 2), randn(3, 4)),
        (fn.permute(1, 0), randn(3, 4, 5)),
        (fn.permute(1, 0), randn(3)),
        (fn.select(4), randn(3, 4)),
        (fn.select(-5), randn(3, 4)),
        (fn.select(0, 2), randn(3, 4)),
        (fn.select(slice(1, 2), 2), randn(3, 4)),
        (fn.select(0), randn(3, 0)),
        (fn.split([1, 2]), randn(3, 4)),
        (fn.split(2, 3), randn(3, 4)),
        (fn.concat(), (randn(2, 3), randn(3, 3))),
        (fn.concat(2), (randn(2, 3), randn(2, 3))),
        (fn.concat(), ()),
        (fn.flatten(), (randn(3, 4),)),
        (fn.permute(0), {"a": randn(3)}),
        (fn.split(1), (randn(3, 4),)),
    ],
)
def test_shape_layer_names_itself_when_x_does_not_fit(layer, x):
    for call in (layer.apply, layer.vjp):
        with pytest.raises(ValueError, match=f"^{layer.name}: does not fit "):
            call({}, x)


def test_concat_refuses_what_is_no_tuple():
    with pytest.raises(
        TypeError, match=r"^concat: expects a tuple of tensors, got float64 \(2, 3\)$"
    ):
        fn.concat().apply({}, randn(2, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fn.permute(0, 0), r"^permute: expects every dimension once, got \(0, 0\)$"),
        (lambda: fn.permute(0, 2), r"^permute: expects every dimension once, got \(0, 2\)$"),
        (lambda: fn.select(slice(0, 4, 2)), r"^select: expects a slice with step 1, got slice"),
    ],
)
def test_shape_layer_refuses_wrong_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", [*MODULES, *FUNCTIONS])
def test_shape_layer_refuses_params(name):
    layer, _, shape = {**MODULES, **FUNCTIONS}[name]
    with pytest.raises(ValueError, match=rf"^{layer.name}: expects params \[\], got \['w'\]$"):
        layer.apply({"w": randn(1)}, randn(*shape))


@pytest.mark.parametrize(
    ("layer", "x", "dy"),
    [
        (fn.flatten(), randn(2, 3, 4), randn(12, 2)),
        (fn.unflatten(1, (2, 3)), randn(4, 6), randn(4, 6)),
        (fn.reshape(6), randn(2, 3), randn(2, 3)),
        (fn.permute(1, 0), randn(2, 3), randn(2, 3)),
        (fn.permute(1, 0), randn(2, 3), randn(3, 2, 1)),
        (fn.select(0), randn(2, 3), randn(2, 1)),
        (fn.select(0), randn(2, 3), randn(2, 3)),
        (fn.select(slice(0, 2)), randn(2, 3), randn(4)),
        (fn.select(slice(0, 2)), randn(2, 3), randn(2, 1)),
        (fn.split(1), randn(3, 2), (randn(3, 1), randn(3, 2))),
        (fn.split(1), randn(3, 2), (randn(3, 2),)),
        (fn.split(1), randn(3, 2), (randn(3, 1),)),
        (fn.split(1), randn(3, 2), randn(3, 2)),
        (fn.concat(), (randn(3, 1), randn(3, 2)), randn(3, 4)),
        (fn.concat(), (randn(3, 1), randn(3, 2)), randn(3, 2)),
        (fn.concat(), (randn(3, 1), randn(3, 2)), randn(1, 3)),
    ],
)
def test_shape_layer_refuses_a_cotangent_of_another_shape_than_y(layer, x, dy):
    _, pullback, _ = layer.vjp({}, x)
    with pytest.raises(ValueError, match=f"^{layer.name}: pullback expects "):
        pullback(dy)
