"""Paddings and windows against torch.nn's."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from layers.oracle import check_module, randn, strided, transposed
from torch import nn

import funcnet as fn

SHAPES = {1: (2, 3, 5), 2: (2, 3, 5, 4), 3: (2, 3, 4, 5, 3)}
KINDS = {
    "reflection": "ReflectionPad",
    "replication": "ReplicationPad",
    "circular": "CircularPad",
    "zero": "ZeroPad",
}
SIDES = {
    "one number": lambda dims: 2,
    "each side": lambda dims: (1, 2, 0, 1, 2, 1)[: 2 * dims],
    "none": lambda dims: 0,
    "cropped": lambda dims: (-1, 2, 1, -1, -1, -1)[: 2 * dims],
}


def pair_of(kind, dims, padding):
    name = f"{kind}_pad{dims}d"
    return getattr(fn, name)(padding), getattr(nn, f"{KINDS[kind]}{dims}d")(padding)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_padding_is_torchs(kind, dims, sides):
    layer, module = pair_of(kind, dims, SIDES[sides](dims))
    for x in (randn(*SHAPES[dims]), randn(*SHAPES[dims][1:]), strided(randn(*SHAPES[dims]))):
        check_module(layer, module, x)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_constant_padding_is_torchs(dims):
    sides = (1, -1, 2, 0, 0, 1)[: 2 * dims]
    layer = getattr(fn, f"constant_pad{dims}d")(sides, 3.5)
    module = getattr(nn, f"ConstantPad{dims}d")(sides, 3.5)
    for x in (randn(*SHAPES[dims]), randn(*SHAPES[dims][-dims:]), transposed(randn(*SHAPES[dims]))):
        check_module(layer, module, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_padding_computes_in_the_dtype_of_its_input(kind, dtype):
    check_module(*pair_of(kind, 2, (1, 2, 2, 1)), randn(2, 3, 4, 4, dtype=dtype))


def test_a_padding_of_integers_has_no_cotangent():
    y, pullback, _ = fn.zero_pad1d(1).vjp({}, torch.ones(1, 1, 2, dtype=torch.int64))
    assert y.tolist() == [[[0, 1, 1, 0]]]
    assert pullback(None)[1] is None


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (fn.reflection_pad1d(5), randn(1, 1, 5), r"^reflection_pad1d: does not fit float64"),
        (fn.circular_pad2d(5), randn(1, 4, 4), r"^circular_pad2d: does not fit float64"),
        (fn.zero_pad1d(-3), randn(1, 1, 5), r"^zero_pad1d: does not fit float64"),
        (fn.replication_pad3d(1), randn(4, 4), r"^replication_pad3d: expects \(batch, channels"),
    ],
)
def test_a_padding_refuses_an_x_that_does_not_fit(layer, x, message):
    with pytest.raises(ValueError, match=message):
        layer.apply({}, x)


def test_a_padding_refuses_another_number_of_sides():
    with pytest.raises(ValueError, match=r"^zero_pad2d: padding must be one int or 4 ints, got"):
        fn.zero_pad2d((1, 2))


WINDOWS = {
    "defaults": {"kernel_size": 2},
    "oblong": {"kernel_size": (2, 3)},
    "all": {"kernel_size": (2, 3), "dilation": (2, 1), "padding": (1, 2), "stride": (2, 1)},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WINDOWS)
def test_unfold_and_fold_are_torchs(name, dtype):
    options = WINDOWS[name]
    x = randn(2, 3, 7, 6, dtype=dtype)
    for image in (x, x[0], transposed(x), x[:0]):
        check_module(fn.unfold(**options), nn.Unfold(**options), image)
    columns = nn.Unfold(**options)(x)
    for each in (columns, columns[0], strided(columns)):
        check_module(fn.fold((7, 6), **options), nn.Fold((7, 6), **options), each)


@given(
    size=st.tuples(st.integers(3, 8), st.integers(3, 8)),
    options=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(0, 2), st.integers(1, 3)),
)
@settings(max_examples=30, deadline=None)
def test_unfold_is_torchs_at_any_size(size, options):
    check_module(fn.unfold(*options), nn.Unfold(*options), randn(1, 2, *size))


def test_windows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"^unfold: does not fit float64 \(1, 2, 3, 3\)"):
        fn.unfold(5).apply({}, randn(1, 2, 3, 3))
    with pytest.raises(ValueError, match=r"^fold: expects last dimensions \(channels \* 4, 4\)"):
        fn.fold(3, 2).apply({}, randn(1, 4, 5))
