import pytest
import torch
from hypothesis import given, settings, strategies as st
from layers.oracle import assert_near, check_against, check_module, randn, strided, transposed
from torch import nn
from torch.nn import functional as F

import funcnet as fn

CASES = {
    "defaults": ({"kernel_size": 2}, (2, 3, 6, 8)),
    "rest": ({"kernel_size": 3}, (2, 3, 7, 8)),
    "two sizes": ({"kernel_size": (3, 2)}, (2, 3, 7, 8)),
    "overlapping": ({"kernel_size": 3, "stride": 1}, (2, 3, 7, 8)),
    "two strides": ({"kernel_size": 3, "stride": (2, 1)}, (2, 3, 7, 8)),
    "gaps": ({"kernel_size": 2, "stride": 3}, (2, 3, 7, 8)),
    "padding": ({"kernel_size": 3, "padding": 1}, (2, 3, 7, 8)),
    "two paddings": ({"kernel_size": (4, 3), "padding": (2, 0), "stride": 1}, (2, 3, 7, 8)),
    "dilation": ({"kernel_size": 2, "dilation": 3, "stride": 1}, (2, 3, 7, 8)),
    "two dilations": ({"kernel_size": (2, 3), "dilation": (3, 2)}, (2, 3, 7, 8)),
    "ceil": ({"kernel_size": 3, "ceil_mode": True}, (2, 3, 7, 8)),
    "ceil, stride": ({"kernel_size": 2, "stride": 3, "ceil_mode": True}, (2, 3, 7, 8)),
    "ceil, padding, dilation": (
        {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2, "ceil_mode": True},
        (2, 3, 8, 9),
    ),
    "indices": ({"kernel_size": 2, "return_indices": True}, (2, 3, 6, 8)),
    "indices, overlapping": (
        {"kernel_size": 3, "stride": 1, "padding": 1, "return_indices": True}, (2, 3, 6, 8),
    ),
    "one image": ({"kernel_size": 2, "stride": 1}, (3, 6, 8)),
    "one image, indices": ({"kernel_size": 3, "return_indices": True}, (3, 6, 8)),
    "no images": ({"kernel_size": 2}, (0, 3, 6, 8)),
    "kernel of one": ({"kernel_size": 1}, (2, 3, 4, 4)),
    "kernel of the image's size": ({"kernel_size": (6, 8)}, (2, 3, 6, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_max_pool2d_is_torchs(name):
    options, shape = CASES[name]
    check_module(fn.max_pool2d(**options), nn.MaxPool2d(**options), randn(*shape))


@pytest.mark.parametrize("value", [0.0, float("-inf")])
@pytest.mark.parametrize("stride", [1, 3])
def test_max_pool2d_sends_the_gradient_of_a_tie_where_torch_does(stride, value):
    options = {"kernel_size": 3, "stride": stride, "padding": 1}
    x = torch.full((2, 3, 6, 6), value, dtype=torch.float64)
    check_module(fn.max_pool2d(**options), nn.MaxPool2d(**options), x)


def test_max_pool2d_passes_nan_on():
    x = randn(1, 2, 4, 4)
    x[0, 0, 1, 1] = float("nan")
    check_module(fn.max_pool2d(2), nn.MaxPool2d(2), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["defaults", "overlapping", "indices"])
def test_max_pool2d_computes_in_the_dtype_of_its_input(name, dtype):
    options, shape = CASES[name]
    check_module(fn.max_pool2d(**options), nn.MaxPool2d(**options), randn(*shape, dtype=dtype))


@pytest.mark.parametrize(
    "rearrange",
    [
        transposed,
        strided,
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x[..., :1].expand(x.shape),
    ],
    ids=["transposed", "strided", "channels_last", "expanded"],
)
def test_max_pool2d_takes_inputs_and_cotangents_that_are_not_contiguous(rearrange):
    x, dy = rearrange(randn(2, 3, 6, 6)), rearrange(randn(2, 3, 4, 4))
    check_module(fn.max_pool2d(3, 1), nn.MaxPool2d(3, 1), x, dy=dy)


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(2, 2, 1), (3, 1, 1), (2, 2, 2)])
def test_max_pool2d_is_its_formula(kernel, stride, dilation):
    def formula(params, x):
        extent = dilation * (kernel - 1) + 1
        windows = x.unfold(2, extent, stride).unfold(3, extent, stride)
        return windows[..., ::dilation, ::dilation].amax((-1, -2))

    layer = fn.max_pool2d(kernel, stride, dilation=dilation)
    check_against(formula, layer, {}, randn(2, 3, 7, 8))


@given(
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.none() | st.integers(1, 4),
    half=st.booleans(),
    ceil_mode=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_max_pool2d_is_torchs_at_any_size(size, kernel, stride, half, ceil_mode):
    options = {
        "kernel_size": kernel,
        "stride": stride,
        "padding": tuple(side // 2 for side in kernel) if half else 0,
        "ceil_mode": ceil_mode,
        "return_indices": True,
    }
    check_module(fn.max_pool2d(**options), nn.MaxPool2d(**options), randn(1, 2, *size))


def test_max_pool2d_returns_places_in_the_flattened_image():
    x = randn(2, 3, 5, 7)
    (y, indices), _ = fn.max_pool2d(3, 2, return_indices=True).apply({}, x)
    assert indices.dtype == torch.int64
    assert_near(x.flatten(-2).gather(-1, indices.flatten(-2)).reshape(y.shape), y)


def test_max_pool2d_with_indices_takes_no_cotangent_for_them():
    (y, indices), pullback, _ = fn.max_pool2d(2, return_indices=True).vjp({}, randn(2, 3, 6, 6))
    for dy in (y, (y, indices), (y, y), (y,)):
        with pytest.raises(ValueError, match=r"^max_pool2d: pullback expects "):
            pullback(dy)


def test_max_pool2d_works_before_a_linear_layer():
    net = fn.serial(fn.conv2d(4, 3), fn.relu(), fn.max_pool2d(2), fn.flatten(), fn.linear(3))
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )
    check_module(net, module, randn(5, 2, 6, 6))


MISUSES = {
    "rank 2": (fn.max_pool2d(2), randn(4, 4), ValueError,
        r"^max_pool2d: expects \(batch, channels, height, width\), got \(4, 4\)$"),
    "rank 5": (fn.max_pool2d(2), randn(1, 1, 1, 4, 4), ValueError,
        r"^max_pool2d: expects \(batch, channels, height, width\), got \(1, 1, 1, 4, 4\)$"),
    "integers": (fn.max_pool2d(2), torch.ones(1, 4, 4, dtype=torch.int64), TypeError,
        r"^max_pool2d: expects a floating-point tensor, got int64 \(1, 4, 4\)$"),
    "small image": (fn.max_pool2d(5), randn(1, 1, 4, 4), ValueError,
        r"^max_pool2d: does not fit float64 \(1, 1, 4, 4\): "),
    "too much padding": (fn.max_pool2d(2, padding=2), randn(1, 1, 4, 4), ValueError,
        r"^max_pool2d: does not fit float64 \(1, 1, 4, 4\): "),
}  # fmt: skip


@pytest.mark.parametrize("misuse", MISUSES)
def test_max_pool2d_refuses(misuse):
    layer, x, kind, message = MISUSES[misuse]
    for call in (layer.apply, layer.vjp):
        with pytest.raises(kind, match=message):
            call({}, x)


def test_max_pool2d_refuses_params():
    with pytest.raises(ValueError, match=r"^max_pool2d: expects params \[\], got \['weight'\]$"):
        fn.max_pool2d(2).apply({"weight": randn(1)}, randn(1, 4, 4))


@pytest.mark.parametrize("dy", [(2, 3, 1, 1), (2, 3, 6, 6), (3, 3, 3), (2, 3, 9), ()])
@pytest.mark.parametrize("return_indices", [False, True])
def test_max_pool2d_refuses_a_cotangent_of_another_shape_than_y(dy, return_indices):
    _, pullback, _ = fn.max_pool2d(2, return_indices=return_indices).vjp({}, randn(2, 3, 6, 6))
    message = r"^max_pool2d: pullback expects dy of shape \(2, 3, 3, 3\), got "
    with pytest.raises(ValueError, match=message):
        pullback((randn(*dy), None) if return_indices else randn(*dy))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 0}, r"^max_pool2d: kernel_size must be one or two ints >= 1, got 0$"),
        ({"kernel_size": 2, "stride": 0}, r"^max_pool2d: stride must be .* >= 1, got 0$"),
        ({"kernel_size": 2, "padding": -1}, r"^max_pool2d: padding must be .* >= 0, got -1$"),
        ({"kernel_size": 2, "dilation": 0}, r"^max_pool2d: dilation must be .* >= 1, got 0$"),
    ],
)
def test_max_pool2d_refuses_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        fn.max_pool2d(**options)


def test_max_pool2d_agrees_with_the_functional_form():
    x = randn(2, 3, 8, 8)
    y, _ = fn.max_pool2d(3, 2, 1).apply({}, x)
    assert_near(y, F.max_pool2d(x, 3, 2, 1))
