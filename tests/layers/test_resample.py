"""Resampling, and moves between channels and pixels, held to torch.nn."""

import pytest
import torch
from layers.oracle import assert_near, check_against, check_module, randn, strided, transposed
from torch import nn
from torch.nn import functional as F

import funcnet as fn
from funcnet.layers.avg_pool import adaptive_averages
from funcnet.layers.resample import Resampling, resample
from funcnet.layers.spatial import apply_each

BATCHES = {1: (2, 3, 7), 2: (2, 3, 6, 5), 3: (2, 3, 4, 3, 5)}
MODES = {1: ("linear",), 2: ("bilinear", "bicubic"), 3: ("trilinear",)}
OPTIONS = {
    "a size": {"size": 9},
    "sizes": {"size": {1: (3,), 2: (3, 8), 3: (2, 3, 7)}},
    "one value": {"size": 1},
    "twice": {"scale_factor": 2},
    "half": {"scale_factor": 0.5},
    "scales": {"scale_factor": {1: (3.0,), 2: (4.0, 0.5), 3: (2.0, 1.0, 3.0)}},
    "a broken scale": {"scale_factor": 1.7},
    "a scale that is recomputed": {"scale_factor": 1.7, "recompute_scale_factor": True},
}
ALIGNED = {True: {"align_corners": True}, False: {"align_corners": False}, None: {}}
ROWS = [
    (dims, mode, name, aligned)
    for dims in (1, 2, 3)
    for mode in ("nearest", "nearest-exact", "area", *MODES[dims])
    for name in OPTIONS
    for aligned in ((None, True, False) if mode in MODES[dims] else (None,))
]


def pair(dims, mode, name, aligned):
    options = {k: v[dims] if isinstance(v, dict) else v for k, v in OPTIONS[name].items()}
    options |= ALIGNED[aligned]
    return fn.upsample(mode=mode, **options), nn.Upsample(mode=mode, **options)


@pytest.mark.parametrize(("dims", "mode", "name", "aligned"), ROWS)
def test_upsample_is_torchs(dims, mode, name, aligned):
    layer, module = pair(dims, mode, name, aligned)
    for train in (True, False):
        check_module(layer, module, randn(*BATCHES[dims]), train=train)


@pytest.mark.parametrize(("dims", "mode", "name", "aligned"), ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upsample_computes_in_the_dtype_of_its_input(dims, mode, name, aligned, dtype):
    layer, module = pair(dims, mode, name, aligned)
    check_module(layer, module, randn(*BATCHES[dims], dtype=dtype))


@pytest.mark.parametrize(("dims", "mode", "name", "aligned"), ROWS)
def test_the_formula_of_upsample_gives_what_torch_gives(dims, mode, name, aligned):
    layer, module = pair(dims, mode, name, aligned)
    x = randn(*BATCHES[dims])
    expected = module(x)
    how = layer.vjp({}, x)[1].static[-1]
    if mode == "area":
        given = adaptive_averages(x.shape[2:], expected.shape[2:], None)
        assert_near(apply_each(x, given), expected)
    else:
        assert_near(resample(x, expected.shape[2:], how), expected)
    assert_near(torch.vmap(lambda x: layer.apply({}, x)[0])(x[None])[0], expected)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(3, 2), (9, 3), (6, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("aligned", [None, True])
def test_antialias_is_that_of_interpolate(mode, size, dtype, aligned):
    options = {"mode": mode, "antialias": True}
    options |= {} if mode == "lanczos" else {"align_corners": aligned}
    layer, x = fn.upsample(size, **options), randn(*BATCHES[2], dtype=dtype)
    check_against(lambda params, x: F.interpolate(x, size, **options), layer, {}, x)
    assert_near(resample(x, size, layer.vjp({}, x)[1].static[-1]), layer.apply({}, x)[0])
    assert_near(torch.vmap(lambda x: layer.apply({}, x)[0])(x[None])[0], layer.apply({}, x)[0])


SCALES = [
    (size, scale)
    for size in (2, 3, 5, 7, 33)
    for scale in (0.4, 0.7, 1.0, 1.2, 1.5, 2.0, 2.1, 2.3, 3.0)
    if int(size * scale) > 0
]


@pytest.mark.parametrize(("size", "scale"), SCALES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic"])
def test_the_pullback_is_the_transpose_of_the_forward_pass_at_any_scale(size, scale, dtype, mode):
    """For each value of x, what it gives to y; torch's gradient is another at some scales."""
    layer = fn.upsample(scale_factor=(1.0, scale), mode=mode)
    ones = torch.eye(size, dtype=dtype)[:, None, None]
    y, pullback, _ = layer.vjp({}, torch.zeros(1, 1, 1, size, dtype=dtype))
    dy = randn(*y.shape, dtype=dtype)
    assert_near(pullback(dy)[1].flatten(), (layer.apply({}, ones)[0] * dy).sum((1, 2, 3)))


@pytest.mark.parametrize("rearrange", [transposed, strided, lambda x: x[..., :1].expand(x.shape)])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic", "area"])
def test_upsample_takes_inputs_and_cotangents_that_are_not_contiguous(mode, rearrange):
    layer, module = fn.upsample(8, mode=mode), nn.Upsample(8, mode=mode)
    check_module(layer, module, rearrange(randn(2, 3, 6, 6)), dy=rearrange(randn(2, 3, 8, 8)))


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic", "area"])
def test_upsample_takes_an_empty_batch(mode):
    check_module(fn.upsample(8, mode=mode), nn.Upsample(8, mode=mode), randn(0, 3, 6, 6))


@pytest.mark.parametrize("options", [{"size": 9}, {"size": (3, 7)}, {"scale_factor": (2.0, 1.5)}])
def test_the_names_for_images_are_torchs(options):
    x = randn(*BATCHES[2])
    check_module(fn.upsampling_nearest2d(**options), nn.UpsamplingNearest2d(**options), x)
    check_module(fn.upsampling_bilinear2d(**options), nn.UpsamplingBilinear2d(**options), x)


def test_options_are_taken_by_position():
    x = randn(*BATCHES[2])
    args = (None, 1.7, "bilinear", True, True)
    check_module(fn.upsample(*args), nn.Upsample(*args), x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fn.upsample(), "upsample: expects either a size or a scale_factor, got None and"),
        (
            lambda: fn.upsample(2, 2.0),
            "upsample: expects either a size or a scale_factor, got 2 an",
        ),
        (lambda: fn.upsample(2, mode="cubic"), "upsample: mode must be one of nearest, linear, "),
        (lambda: fn.upsample(2, align_corners=True), "upsample: align_corners is not for mode 'ne"),
        (
            lambda: fn.upsample(2, recompute_scale_factor=True),
            "upsample: recompute_scale_factor needs a scale_factor",
        ),
        (
            lambda: fn.upsample(2, mode="trilinear", antialias=True),
            "upsample: antialias is for bil",
        ),
        (
            lambda: fn.upsample(2, mode="lanczos"),
            "upsample: antialias is for bilinear, bicubic and",
        ),
        (lambda: fn.upsampling_nearest2d(), "upsampling_nearest2d: expects either a size or a sca"),
        (lambda: fn.pixel_shuffle(0), "pixel_shuffle: upscale_factor must be at least 1, got 0"),
        (lambda: fn.pixel_unshuffle(0), "pixel_unshuffle: downscale_factor must be at least 1, g"),
        (lambda: fn.channel_shuffle(0), "channel_shuffle: groups must be at least 1, got 0"),
    ],
)
def test_resampling_refuses_wrong_options(make, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the start of the message is compared
        make()
    assert str(raised.value).startswith(message)


X = randn(2, 3, 6, 5)
MISUSES = {
    "another rank": (
        fn.upsample(2, mode="linear"), X,
        "upsample: expects (batch, channels, length) for mode 'linear', got (2, 3, 6, 5)"),
    "one image": (
        fn.upsampling_bilinear2d(2), X[0],
        "upsampling_bilinear2d: expects (batch, channels, height, width) for mode 'bilinear'"),
    "sizes of another rank": (
        fn.upsample((1, 2, 3)), X, "upsample: size must be one or two ints >= 1, got (1, 2, 3)"),
    "scales of another rank": (
        fn.upsample(scale_factor=(2.0,)), X,
        "upsample: scale_factor must be one number or 2, got (2.0,)"),
    "a size of 0": (fn.upsample(0), X, "upsample: size must be one or two ints >= 1, got 0"),
    "a scale to nothing": (
        fn.upsample(scale_factor=0.1), X,
        "upsample: expects y of size >= 1, got (0, 0) of x of size (6, 5)"),
    "channels that are no squares": (
        fn.pixel_shuffle(2), X,
        "pixel_shuffle: expects a multiple of 4 channels, got (2, 3, 6, 5)"),
    "pixels that are no squares": (
        fn.pixel_unshuffle(2), X,
        "pixel_unshuffle: expects height and width that 2 divides, got (2, 3, 6, 5)"),
    "no channels": (
        fn.pixel_shuffle(1), X[0, 0],
        "pixel_shuffle: expects (*, channels, height, width), got (6, 5)"),
    "groups": (
        fn.channel_shuffle(2), X, "channel_shuffle: groups must divide channels, got 2, 3"),
    "a matrix": (
        fn.channel_shuffle(1), X[0, 0],
        "channel_shuffle: expects (batch, channels, *), got (6, 5)"),
}  # fmt: skip


@pytest.mark.parametrize("misuse", MISUSES)
def test_resampling_refuses(misuse):
    layer, x, message = MISUSES[misuse]
    for call in (layer.apply, layer.vjp):
        with pytest.raises(ValueError) as raised:  # noqa: PT011 - its start is compared
            call({}, x)
        assert str(raised.value).startswith(message)


def test_resampling_refuses_integers():
    with pytest.raises(TypeError, match=r"^upsample: expects a floating-point tensor, got int64"):
        fn.upsample(2).apply({}, torch.ones(1, 1, 2, dtype=torch.int64))


# Channels and pixels

MOVES = {
    "pixel_shuffle": (fn.pixel_shuffle(2), nn.PixelShuffle(2), (2, 8, 3, 4)),
    "pixel_shuffle by 3": (fn.pixel_shuffle(3), nn.PixelShuffle(3), (9, 3, 4)),
    "pixel_shuffle of a stack": (fn.pixel_shuffle(2), nn.PixelShuffle(2), (2, 3, 4, 3, 4)),
    "pixel_unshuffle": (fn.pixel_unshuffle(2), nn.PixelUnshuffle(2), (2, 3, 4, 6)),
    "pixel_unshuffle by 3": (fn.pixel_unshuffle(3), nn.PixelUnshuffle(3), (2, 3, 6)),
    "pixel_unshuffle of a stack": (fn.pixel_unshuffle(2), nn.PixelUnshuffle(2), (2, 1, 3, 4, 6)),
    "channel_shuffle": (fn.channel_shuffle(3), nn.ChannelShuffle(3), (2, 6, 3, 4)),
    "channel_shuffle of sequences": (fn.channel_shuffle(2), nn.ChannelShuffle(2), (2, 6, 3)),
    "channel_shuffle of volumes": (fn.channel_shuffle(2), nn.ChannelShuffle(2), (2, 4, 3, 2, 2)),
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rearrange", [torch.Tensor.contiguous, transposed, strided])
def test_a_move_is_torchs(name, dtype, rearrange):
    layer, module, shape = MOVES[name]
    for train in (True, False):
        check_module(layer, module, rearrange(randn(*shape, dtype=dtype)), train=train)


def test_a_move_takes_an_empty_batch_whose_gradient_torch_has_not():
    for layer, shape, moved in [
        (fn.pixel_shuffle(2), (0, 4, 2, 3), (0, 1, 4, 6)),
        (fn.pixel_unshuffle(2), (0, 1, 4, 6), (0, 4, 2, 3)),
        (fn.channel_shuffle(2), (0, 4, 2, 3), (0, 4, 2, 3)),
    ]:
        y, pullback, _ = layer.vjp({}, torch.zeros(shape))
        assert y.shape == moved
        assert pullback(y)[1].shape == shape


@pytest.mark.parametrize("name", MOVES)
def test_a_move_takes_integers_which_have_no_cotangent(name):
    layer, module, shape = MOVES[name]
    x = (10 * randn(*shape)).long()
    y, pullback, _ = layer.vjp({}, x)
    assert torch.equal(y, module(x))
    assert pullback(None) == ({}, None)


def test_resampling_in_half_precision_computes_in_float32():
    how = Resampling("linear", False, False, (None,))
    x = randn(1, 1, 9, dtype=torch.bfloat16)
    assert_near(resample(x, [13], how), resample(x.float(), [13], how).bfloat16(), 0.0)


def test_what_networks_use_daily_is_one_program_under_jit():
    layers = [
        *(fn.max_pool2d(2), fn.avg_pool2d(2), fn.adaptive_avg_pool2d(1), fn.pixel_shuffle(2)),
        *(fn.adaptive_avg_pool2d(3), fn.upsample(scale_factor=2)),
        fn.upsample(scale_factor=2, mode="bilinear"),
    ]

    def run(x):
        ys = []
        for layer in layers:
            y, pullback, _ = layer.vjp({}, x)
            ys += [y, pullback(y)[1]]
        return ys

    assert fn.jit(run).lower(torch.ones(2, 4, 6, 6)).why_not_one is None
