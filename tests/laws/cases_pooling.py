"""Pooling, resampling, and moves between channels and pixels."""

from cases_spatial import BATCH, draw

import funcnet as fn

WINDOWS = {
    "plain": {"kernel_size": 2},
    "overlapping": {"kernel_size": 3, "stride": 2, "padding": 1},
    "ceil": {"kernel_size": 2, "stride": 3, "ceil_mode": True},
}
UNPADDED = {
    name: {k: v for k, v in options.items() if k != "padding"} for name, options in WINDOWS.items()
}
MODES = {1: ("linear",), 2: ("bilinear", "bicubic"), 3: ("trilinear",)}
FILTERS = ("bilinear", "bicubic", "lanczos")
ADAPTIVE = {1: 3, 2: (2, None), 3: (2, 3, 4)}
POSITIVE = {dims: x.abs() + 0.1 for dims, x in BATCH.items()}
DIMS = (1, 2, 3)


def made(name, dims, *args, **options):
    return getattr(fn, f"{name}{dims}d")(*args, **options)


def unpooled(dims, x):
    """Values and indices, as of a pooling."""
    return made("max_pool", dims, 2, return_indices=True).apply({}, x)[0]


LAYERS = {
    **{
        f"max_pool{dims}d {name}": (made("max_pool", dims, **options), BATCH[dims])
        for name, options in WINDOWS.items()
        for dims in DIMS
    },
    **{
        f"max_pool{dims}d dilated with indices": (
            made("max_pool", dims, 2, 1, dilation=2, return_indices=True), BATCH[dims][0],
        )
        for dims in DIMS
    },
    **{
        f"max_unpool{dims}d": (
            made("max_unpool", dims, 2), unpooled(dims, draw(6, *[4] * (dims + 1))),
        )
        for dims in DIMS
    },
    **{
        f"max_unpool{dims}d of a size": (
            made("max_unpool", dims, 2, output_size=BATCH[dims].shape), unpooled(dims, BATCH[dims]),
        )
        for dims in DIMS
    },
    **{
        f"avg_pool{dims}d {name}": (made("avg_pool", dims, **options), BATCH[dims])
        for name, options in WINDOWS.items()
        for dims in DIMS
    },
    **{
        f"avg_pool{dims}d of x alone": (
            made("avg_pool", dims, 3, 2, 1, True, False), BATCH[dims][0],
        )
        for dims in DIMS
    },
    **{
        f"avg_pool{dims}d by a divisor": (
            made("avg_pool", dims, 3, 2, 1, True, divisor_override=5), BATCH[dims],
        )
        for dims in DIMS
    },
    **{
        f"{name}{dims}d {size}": (made(name, dims, size), BATCH[dims])
        for name in ("adaptive_max_pool", "adaptive_avg_pool")
        for dims in DIMS
        for size in (ADAPTIVE[dims], 1)
    },
    **{
        f"adaptive_max_pool{dims}d with indices": (
            made("adaptive_max_pool", dims, 2, return_indices=True), BATCH[dims][0],
        )
        for dims in DIMS
    },
    "adaptive_avg_pool2d of equal windows": (fn.adaptive_avg_pool2d((3, 5)), BATCH[2]),
    **{
        f"lp_pool{dims}d {p} {name}": (made("lp_pool", dims, p, **options), POSITIVE[dims])
        for name, options in UNPADDED.items()
        for dims, p in zip(DIMS, (1.5, 2, 3), strict=True)
    },
    "lp_pool1d of infinity": (fn.lp_pool1d(float("inf"), 3), BATCH[1]),
    "lp_pool2d of -infinity": (fn.lp_pool2d(float("-inf"), 2), BATCH[2][0]),
    "fractional_max_pool2d": (fn.fractional_max_pool2d(2, (3, 4)), BATCH[2]),
    "fractional_max_pool2d with indices": (
        fn.fractional_max_pool2d((2, 1), output_ratio=0.5, return_indices=True), BATCH[2][0],
    ),
    "fractional_max_pool3d": (fn.fractional_max_pool3d((1, 2, 1), 2), BATCH[3]),
    "fractional_max_pool3d of samples": (
        fn.fractional_max_pool3d(
            1, output_ratio=(0.4, 0.7, 0.9), random_samples=fn.random.uniform(fn.key(1), (2, 4, 3))
        ),
        BATCH[3],
    ),
    **{
        f"upsample{dims} {mode}": (fn.upsample(scale_factor=2.5, mode=mode), BATCH[dims])
        for dims in DIMS
        for mode in (*MODES[dims], "nearest", "nearest-exact")
    },
    **{
        f"interpolate{dims} {mode} down to a size": (fn.interpolate(3, mode=mode), BATCH[dims])
        for dims in DIMS
        for mode in (*MODES[dims], "nearest", "nearest-exact", "area")
    },
    **{
        f"upsample{dims} {mode} aligned": (
            fn.upsample(scale_factor=1.3, mode=mode, align_corners=True,
                        recompute_scale_factor=True),
            BATCH[dims],
        )
        for dims in DIMS
        for mode in MODES[dims]
    },
    **{
        f"upsample2 {mode} antialias": (fn.upsample((3, 8), mode=mode, antialias=True), BATCH[2])
        for mode in FILTERS
    },
    "upsample2 doubled": (fn.upsample(scale_factor=2), BATCH[2]),
    "upsampling_nearest2d": (fn.upsampling_nearest2d(scale_factor=(2, 3)), BATCH[2]),
    "upsampling_bilinear2d": (fn.upsampling_bilinear2d(9), BATCH[2]),
    "pixel_shuffle": (fn.pixel_shuffle(2), BATCH[2]),
    "pixel_shuffle of a stack": (fn.pixel_shuffle(2), draw(4, 2, 3, 4, 2, 3)),
    "pixel_unshuffle": (fn.pixel_unshuffle(3), draw(5, 2, 1, 6, 3)),
    "channel_shuffle": (fn.channel_shuffle(2), BATCH[2]),
    "channel_shuffle of volumes": (fn.channel_shuffle(4), BATCH[3]),
}  # fmt: skip
