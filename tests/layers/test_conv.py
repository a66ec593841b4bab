import warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st
from layers.oracle import assert_near, check_against, check_module, randn, strided, transposed
from torch import nn
from torch.nn import functional as F

import funcnet as fn

# (options, input shape); out_channels is 6
CASES = {
    "defaults": ({"kernel_size": 3}, (2, 4, 7, 8)),
    "kernel of one": ({"kernel_size": 1}, (2, 4, 7, 8)),
    "oblong kernel": ({"kernel_size": (2, 5)}, (2, 4, 7, 8)),
    "stride": ({"kernel_size": 3, "stride": 2}, (2, 4, 7, 8)),
    "two strides": ({"kernel_size": 3, "stride": (3, 1)}, (2, 4, 7, 8)),
    "stride that leaves a rest": ({"kernel_size": 2, "stride": 3}, (2, 4, 7, 9)),
    "padding": ({"kernel_size": 3, "padding": 1}, (2, 4, 7, 8)),
    "two paddings": ({"kernel_size": 3, "padding": (2, 0)}, (2, 4, 7, 8)),
    "padding wider than the kernel": ({"kernel_size": 2, "padding": 4}, (2, 4, 3, 3)),
    "dilation": ({"kernel_size": 3, "dilation": 2}, (2, 4, 7, 8)),
    "two dilations": ({"kernel_size": (2, 3), "dilation": (3, 1)}, (2, 4, 7, 8)),
    "groups": ({"kernel_size": 3, "groups": 2}, (2, 4, 7, 8)),
    "depthwise": ({"kernel_size": 3, "groups": 3}, (2, 3, 7, 8)),
    "no bias": ({"kernel_size": 3, "bias": False}, (2, 4, 7, 8)),
    "valid": ({"kernel_size": 3, "padding": "valid", "stride": 2}, (2, 4, 7, 8)),
    "same": ({"kernel_size": 3, "padding": "same"}, (2, 4, 7, 8)),
    "same, dilated": ({"kernel_size": 3, "padding": "same", "dilation": (2, 3)}, (2, 4, 7, 8)),
    "same, even": ({"kernel_size": 4, "padding": "same"}, (2, 4, 7, 8)),
    "same, one even": ({"kernel_size": (2, 3), "padding": "same"}, (2, 4, 7, 8)),
    "same, other even": ({"kernel_size": (3, 2), "padding": "same"}, (2, 4, 7, 8)),
    "same, even, dilated": (
        {"kernel_size": (2, 4), "padding": "same", "dilation": (3, 1)}, (2, 4, 7, 8),
    ),
    "same, even, even dilation": (
        {"kernel_size": 2, "padding": "same", "dilation": 2}, (2, 4, 7, 8),
    ),
    "one image": ({"kernel_size": 3, "padding": 1, "stride": 2}, (4, 7, 8)),
    "one image, same, even": ({"kernel_size": 2, "padding": "same"}, (4, 7, 8)),
    "no images": ({"kernel_size": 3}, (0, 4, 7, 8)),
    "no images, groups": ({"kernel_size": 3, "groups": 2, "bias": False}, (0, 4, 7, 8)),
    "kernel of the image's size": ({"kernel_size": (7, 8)}, (2, 4, 7, 8)),
    "all at once": (
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2),
         "groups": 2, "bias": False},
        (3, 4, 9, 8),
    ),
}  # fmt: skip

EDGE_CASES = {
    "padding": ({"kernel_size": 3, "padding": 1}, (2, 4, 5, 6)),
    "two paddings": ({"kernel_size": 3, "padding": (2, 0)}, (2, 4, 5, 6)),
    "other two paddings": ({"kernel_size": 3, "padding": (0, 3)}, (2, 4, 5, 6)),
    "widest": ({"kernel_size": 3, "padding": (4, 5), "stride": 2}, (2, 4, 5, 6)),
    "none": ({"kernel_size": 3}, (2, 4, 5, 6)),
    "valid": ({"kernel_size": 3, "padding": "valid"}, (2, 4, 5, 6)),
    "same": ({"kernel_size": 3, "padding": "same"}, (2, 4, 5, 6)),
    "same, even": ({"kernel_size": (4, 2), "padding": "same"}, (2, 4, 5, 6)),
    "same, dilated": ({"kernel_size": (2, 3), "padding": "same", "dilation": 3}, (2, 4, 5, 6)),
    "one image": ({"kernel_size": 3, "padding": (2, 1)}, (4, 5, 6)),
    "groups, stride, no bias": (
        {"kernel_size": 3, "padding": 2, "groups": 2, "stride": (1, 2), "bias": False},
        (2, 4, 5, 6),
    ),
}


def pair_of(options, channels):
    with warnings.catch_warnings():
        # torch warns that padding an even kernel evenly takes a copy.
        warnings.simplefilter("ignore")
        return fn.conv2d(6, **options), nn.Conv2d(channels, 6, **options)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CASES)
def test_conv2d_is_torchs(name):
    options, shape = CASES[name]
    check_module(*pair_of(options, shape[-3]), randn(*shape))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("name", EDGE_CASES)
def test_conv2d_pads_with_what_is_at_the_edges_as_torch_does(name, mode):
    options, shape = EDGE_CASES[name]
    check_module(*pair_of({**options, "padding_mode": mode}, 4), randn(*shape))


@pytest.mark.parametrize("mode", ["replicate", "circular"])
def test_conv2d_pads_by_a_whole_image_and_an_image_of_one_pixel(mode):
    for shape, padding in (((2, 4, 3, 2), (3, 2)), ((2, 4, 1, 1), 1)):
        options = {"kernel_size": 3, "padding": padding, "padding_mode": mode}
        check_module(*pair_of(options, 4), randn(*shape))


def test_conv2d_replicates_an_edge_further_than_the_image_is_wide():
    options = {"kernel_size": 3, "padding": (5, 7), "padding_mode": "replicate"}
    check_module(*pair_of(options, 4), randn(2, 4, 3, 2))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_conv2d_takes_an_empty_batch_in_every_padding_mode(mode):
    options = {"kernel_size": 3, "padding": 1, "padding_mode": mode}
    x = randn(0, 4, 5, 6)
    layer = fn.conv2d(6, **options)
    params, _ = layer.init(fn.key(0), x)
    y, pullback, _ = layer.vjp(params, x)
    assert y.shape == (0, 6, 5, 6)
    dparams, dx = pullback(y)
    assert dx.shape == x.shape
    assert_near(dparams, fn.tree.map(torch.zeros_like, params))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["all at once", "same, even", "one image", "depthwise"])
def test_conv2d_computes_in_the_dtype_of_its_input(name, dtype):
    options, shape = CASES[name]
    check_module(*pair_of(options, shape[-3]), randn(*shape, dtype=dtype))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv2d_pads_edges_in_the_dtype_of_its_input(mode, dtype):
    options = {"kernel_size": 3, "padding": 2, "padding_mode": mode}
    check_module(*pair_of(options, 4), randn(2, 4, 5, 6, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize(
    "rearrange",
    [
        transposed,
        strided,
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x[:, :, :1, :1].expand(x.shape),
    ],
    ids=["transposed", "strided", "channels_last", "expanded"],
)
def test_conv2d_takes_inputs_and_cotangents_that_are_not_contiguous(rearrange, mode, dtype):
    options = {"kernel_size": 3, "padding": 1, "padding_mode": mode}
    x, dy = (rearrange(randn(2, n, 8, 8, seed=n, dtype=dtype)) for n in (4, 6))
    check_module(*pair_of(options, 4), x, dy=dy)


def written_out(x, weight, bias, stride, dilation):
    """The sum over the kernel's points, one shifted view of x for each."""
    (rows, columns), (height, width) = weight.shape[2:], x.shape[2:]
    down = (height - dilation * (rows - 1) - 1) // stride + 1
    across = (width - dilation * (columns - 1) - 1) // stride + 1
    y = bias[:, None, None]
    for i in range(rows):
        for j in range(columns):
            top, left = i * dilation, j * dilation
            seen = x[
                :, :, top : top + stride * down : stride, left : left + stride * across : stride
            ]
            y = y + torch.einsum("bchw,oc->bohw", seen[:, :, :down, :across], weight[:, :, i, j])
    return y


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("padding", [0, 1])
def test_conv2d_is_its_formula(stride, dilation, padding):
    layer = fn.conv2d(6, (3, 2), stride, padding, dilation)
    params = {"weight": randn(6, 4, 3, 2), "bias": randn(6)}

    def formula(params, x):
        x = F.pad(x, [padding] * 4)
        return written_out(x, params["weight"], params["bias"], stride, dilation)

    check_against(formula, layer, params, randn(2, 4, 9, 8))


@given(
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
)
@settings(max_examples=40, deadline=None)
def test_conv2d_is_torchs_at_any_size(size, kernel, stride, padding, mode):
    options = {"kernel_size": kernel, "stride": stride, "padding": padding, "padding_mode": mode}
    check_module(*pair_of(options, 2), randn(1, 2, *size))


def test_conv2d_keeps_the_images_size_with_padding_same():
    for kernel in ((1, 2), (3, 4), (5, 6)):
        layer = fn.conv2d(2, kernel, padding="same", dilation=(2, 1))
        params, _ = layer.init(fn.key(0), torch.ones(1, 3, 9, 11))
        assert layer.apply(params, torch.ones(1, 3, 9, 11))[0].shape == (1, 2, 9, 11)


def test_conv2d_starts_within_torchs_bound():
    layer = fn.conv2d(40, (3, 5), groups=2)
    params, state = layer.init(fn.key(0), torch.ones(1, 8, 9, 9))
    bound = (4 * 3 * 5) ** -0.5
    assert state == {}
    for leaf in params.values():
        assert 0.9 * bound < leaf.abs().max() <= bound
        assert leaf.min() < 0 < leaf.max()


def test_conv2d_uses_the_initializers_and_dtype_it_is_given():
    layer = fn.conv2d(
        2,
        1,
        weight_init=fn.initializers.constant(3.0),
        bias_init=fn.initializers.constant(4.0),
        dtype=torch.float64,
    )
    params, _ = layer.init(fn.key(0), torch.ones(1, 3, 2, 2))
    assert torch.equal(params["weight"], torch.full((2, 3, 1, 1), 3.0, dtype=torch.float64))
    assert torch.equal(params["bias"], torch.full((2,), 4.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 0}, "conv2d: kernel_size must be one or two ints >= 1, got 0"),
        (
            {"kernel_size": (3, 3, 3)},
            "conv2d: kernel_size must be one or two ints >= 1, got (3, 3, 3)",
        ),
        ({"kernel_size": 3, "stride": 0}, "conv2d: stride must be one or two ints >= 1, got 0"),
        ({"kernel_size": 3, "padding": -1}, "conv2d: padding must be one or two ints >= 0, got -1"),
        (
            {"kernel_size": 3, "dilation": (1, 0)},
            "conv2d: dilation must be one or two ints >= 1, got (1, 0)",
        ),
        ({"kernel_size": 3, "groups": 4}, "conv2d: groups must divide out_channels, got 4, 6"),
        ({"kernel_size": 3, "groups": 0}, "conv2d: groups must divide out_channels, got 0, 6"),
        (
            {"kernel_size": 3, "padding": "full"},
            "conv2d: padding must be 'valid', 'same' or ints, got 'full'",
        ),
        (
            {"kernel_size": 3, "padding": "same", "stride": 2},
            "conv2d: padding='same' needs stride 1, got (2, 2)",
        ),
        (
            {"kernel_size": 3, "padding_mode": "edge"},
            "conv2d: padding_mode must be zeros, reflect, replicate or circular, got 'edge'",
        ),
    ],
)
def test_conv2d_refuses_wrong_options(options, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the whole message is compared
        fn.conv2d(6, **options)
    assert str(raised.value) == message


@pytest.mark.parametrize("out_channels", [0, -4])
def test_conv2d_refuses_to_have_no_kernels_as_torch_does(out_channels):
    with pytest.raises(ValueError, match=rf"^conv2d: out_channels must be .*, got {out_channels}$"):
        fn.conv2d(out_channels, 3)


PARAMS = {"weight": randn(6, 4, 3, 3), "bias": randn(6)}

MISUSES = {
    "channels": (
        PARAMS, randn(2, 3, 5, 5), ValueError,
        "conv2d: weight expects 4 channels, got (2, 3, 5, 5)",
    ),
    "rank 2": (
        PARAMS, randn(4, 5), ValueError,
        "conv2d: expects (batch, channels, height, width), got (4, 5)",
    ),
    "rank 5": (
        PARAMS, randn(1, 2, 4, 5, 5), ValueError,
        "conv2d: expects (batch, channels, height, width), got (1, 2, 4, 5, 5)",
    ),
    "integers": (
        PARAMS, torch.ones(2, 4, 5, 5, dtype=torch.uint8), TypeError,
        "conv2d: expects a floating-point tensor, got uint8 (2, 4, 5, 5)",
    ),
    "another dtype": (
        PARAMS, randn(2, 4, 5, 5, dtype=torch.float32), TypeError,
        "conv2d: weight is torch.float64, x is torch.float32",
    ),
    "no bias": (
        {"weight": PARAMS["weight"]}, randn(2, 4, 5, 5), ValueError,
        "conv2d: expects params ['bias', 'weight'], got ['weight']",
    ),
}  # fmt: skip


@pytest.mark.parametrize("misuse", MISUSES)
def test_conv2d_refuses(misuse):
    params, x, kind, message = MISUSES[misuse]
    for call in (fn.conv2d(6, 3).apply, fn.conv2d(6, 3).vjp):
        with pytest.raises(kind) as raised:
            call(params, x)
        assert str(raised.value) == message


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (fn.conv2d(6, 3), (2, 4, 2, 5)),
        (fn.conv2d(6, 3, padding=5, padding_mode="reflect"), (2, 4, 5, 5)),
        (fn.conv2d(6, 3, padding=6, padding_mode="circular"), (2, 4, 5, 5)),
    ],
    ids=["image smaller than kernel", "reflect beyond the image", "circle more than once"],
)
def test_conv2d_names_itself_when_the_image_does_not_fit(layer, shape):
    with pytest.raises(ValueError, match=r"^conv2d: does not fit float64 \(2, 4, "):
        layer.apply(PARAMS, randn(*shape))


def test_conv2d_refuses_channels_that_groups_do_not_divide():
    with pytest.raises(ValueError, match=r"^conv2d: groups must divide channels, got 2, 3$"):
        fn.conv2d(6, 3, groups=2).init(fn.key(0), torch.ones(1, 3, 5, 5))


@pytest.mark.parametrize(
    "wrong",
    [
        {"bias": randn(5)},
        {"bias": randn(6, dtype=torch.float32)},
        {"weight": randn(6, 4, 3, 2)},
        {"weight": randn(5, 4, 3, 3)},
        {"weight": randn(6, 4)},
    ],
    ids=["bias", "bias of another dtype", "kernel", "out_channels", "2-d weight"],
)
def test_conv2d_refuses_params_of_another_layer(wrong):
    with pytest.raises((ValueError, TypeError), match=r"^conv2d: "):
        fn.conv2d(6, 3).apply({**PARAMS, **wrong}, randn(2, 4, 5, 5))


@pytest.mark.parametrize(
    "dy", [(2, 6, 1, 1), (1, 6, 3, 3), (2, 1, 3, 3), (6, 3, 3), (2, 6, 4, 4), ()]
)
@pytest.mark.parametrize("half", [{}, {"params": False}, {"x": False}])
def test_conv2d_refuses_a_cotangent_of_another_shape_than_y(dy, half):
    _, pullback, _ = fn.conv2d(6, 3).vjp(PARAMS, randn(2, 4, 5, 5))
    with pytest.raises(ValueError, match=r"^conv2d: pullback expects dy of shape \(2, 6, 3, 3\)"):
        pullback(randn(*dy), **half)
