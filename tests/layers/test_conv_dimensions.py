"""Convolutions over one and three dimensions, and transposed ones, against torch.nn's."""

import warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st
from layers.oracle import check_module, randn, strided, transposed
from torch import nn

import funcnet as fn

SHAPES = {1: (2, 4, 9), 2: (2, 4, 7, 8), 3: (2, 4, 5, 6, 4)}
CONVOLUTIONS = {
    "defaults": {"kernel_size": 3},
    "stride and padding": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilation": {"kernel_size": 2, "dilation": 2},
    "groups": {"kernel_size": 3, "groups": 2, "bias": False},
    "same": {"kernel_size": 2, "padding": "same"},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 2, "padding": 3, "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": 3, "padding_mode": "circular", "stride": 2},
}
TRANSPOSES = {
    "defaults": {"kernel_size": 3},
    "stride": {"kernel_size": 2, "stride": 2},
    "stride and paddings": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 1},
    "more output padding than stride": {"kernel_size": 2, "dilation": 3, "output_padding": 2},
    "groups": {"kernel_size": 3, "groups": 2, "stride": 3},
    "no bias": {"kernel_size": 1, "bias": False},
}


def convolution(kind, dims, options):
    """The layer and torch's module of it, with 6 out channels, of 4."""
    name = {"conv": f"conv{dims}d", "transpose": f"conv_transpose{dims}d"}[kind]
    module = {"conv": f"Conv{dims}d", "transpose": f"ConvTranspose{dims}d"}[kind]
    return getattr(fn, name)(6, **options), getattr(nn, module)(4, 6, **options)


ALL = [("conv", name) for name in CONVOLUTIONS] + [("transpose", name) for name in TRANSPOSES]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("kind", "name"), ALL)
def test_a_convolution_is_torchs(kind, name, dims):
    options = (CONVOLUTIONS if kind == "conv" else TRANSPOSES)[name]
    with warnings.catch_warnings():
        # torch warns of a copy with "same" and even kernels.
        warnings.filterwarnings("ignore", "Using padding='same'", UserWarning)
        check_module(*convolution(kind, dims, options), randn(*SHAPES[dims]))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kind", ["conv", "transpose"])
def test_a_convolution_takes_one_example_an_empty_batch_and_any_strides(kind, dims):
    layer, module = convolution(kind, dims, {"kernel_size": 3, "padding": 1, "stride": 2})
    shape = SHAPES[dims]
    for x in (randn(*shape[1:]), randn(0, *shape[1:]), transposed(randn(*shape))):
        check_module(layer, module, x)
    check_module(layer, module, strided(randn(*shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("kind", ["conv", "transpose"])
def test_a_convolution_computes_in_the_dtype_of_its_input(kind, dims, dtype):
    check_module(*convolution(kind, dims, {"kernel_size": 2}), randn(*SHAPES[dims], dtype=dtype))


@given(
    size=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    output_padding=st.integers(0, 2),
)
@settings(max_examples=40, deadline=None)
def test_a_transposed_convolution_is_torchs_at_any_size(
    size, kernel, stride, dilation, output_padding
):
    options = {
        "kernel_size": kernel,
        "stride": stride,
        "dilation": dilation,
        "output_padding": min(output_padding, max(stride, dilation) - 1),
    }
    check_module(*convolution("transpose", 2, options), randn(1, 4, *size))


@pytest.mark.parametrize("size", [(13, 15), (14, 16)])
def test_a_transposed_convolution_reaches_an_output_size(size):
    x = randn(2, 4, 7, 8)
    module = nn.ConvTranspose2d(4, 6, 3, 2, 1).double()
    params = fn.tree.from_dotted({k: v.detach() for k, v in module.named_parameters()})
    y, pullback, _ = fn.conv_transpose2d(6, 3, 2, 1, output_size=size).vjp(params, x)
    torch.testing.assert_close(y, module(x, output_size=size).detach())
    assert pullback(y)[1].shape == x.shape


def test_options_by_position_are_torchs():
    x = randn(1, 4, 9)
    options = (3, 2, 1, 1, 2, False, 2)
    check_module(fn.conv_transpose1d(6, *options), nn.ConvTranspose1d(4, 6, *options), x)
    options = (3, 2, 1, 2, 2, False, "circular")
    check_module(fn.conv1d(6, *options), nn.Conv1d(4, 6, *options), x)


REFUSALS = {
    "channels that groups do not divide": (
        fn.conv_transpose1d(6, 3, groups=3), (1, 4, 5), ValueError,
        "conv_transpose1d: groups must divide channels, got 3, 4",
    ),
    "another rank": (
        fn.conv3d(6, 3), (1, 4), ValueError,
        "conv3d: expects (batch, channels, depth, height, width), got (1, 4)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_convolution_refuses(name):
    layer, shape, kind, message = REFUSALS[name]
    with pytest.raises(kind) as raised:
        layer.init(fn.key(0), randn(*shape))
    assert str(raised.value) == message


@pytest.mark.parametrize("size", [(10, 17), (13, 17), (11, 19)])
def test_a_transposed_convolution_refuses_a_size_that_no_input_gives(size):
    layer = fn.conv_transpose2d(6, 3, 2, output_size=size)
    with pytest.raises(ValueError, match=r"^conv_transpose2d: output_size must be from \(11, 17\)"):
        layer.init(fn.key(0), randn(1, 4, 5, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding_mode": "reflect"}, "padding_mode must be zeros, got 'reflect'"),
        ({"output_padding": -1}, "output_padding must be one or two ints >= 0, got -1"),
        ({"groups": 4}, "groups must divide out_channels, got 4, 6"),
        ({"stride": (1, 2, 3)}, "stride must be one or two ints >= 1, got (1, 2, 3)"),
    ],
)
def test_a_transposed_convolution_refuses_wrong_options(options, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the whole message is compared
        fn.conv_transpose2d(6, 3, **options)
    assert str(raised.value) == f"conv_transpose2d: {message}"


def test_output_padding_that_is_too_large_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^conv_transpose1d: does not fit float64 \(1, 4, 5\): "):
        fn.conv_transpose1d(6, 3, output_padding=1).apply(
            {"weight": randn(4, 6, 3), "bias": randn(6)}, randn(1, 4, 5)
        )


def test_a_wrong_call_names_the_constructor():
    with pytest.raises(TypeError, match=r"^conv1d: missing a required argument: 'kernel_size'$"):
        fn.conv1d(3)
    with pytest.raises(TypeError, match=r"^conv3d: got an unexpected keyword argument 'strides'$"):
        fn.conv3d(3, 3, strides=1)


def test_a_transposed_convolution_starts_within_torchs_bound():
    params, _ = fn.conv_transpose2d(8, (3, 5), groups=2).init(fn.key(0), torch.ones(1, 40, 9, 9))
    bound = (4 * 3 * 5) ** -0.5
    assert params["bias"].shape == (8,)
    for leaf in params.values():
        assert leaf.abs().max() <= bound
    assert params["weight"].abs().max() > 0.95 * bound
