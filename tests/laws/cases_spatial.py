"""Convolutions, paddings and windows, over one, two and three spatial dimensions."""

import torch

import funcnet as fn


def draw(seed, *shape):
    return fn.random.normal(fn.key(seed), shape, torch.float64)


BATCH = {1: draw(1, 2, 4, 7), 2: draw(2, 2, 4, 6, 5), 3: draw(3, 2, 4, 3, 5, 4)}

CONVOLUTIONS = {
    "plain": {"kernel_size": 2},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated in groups": {"kernel_size": 2, "dilation": 2, "groups": 2, "bias": False},
    "same": {"kernel_size": 2, "padding": "same"},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "stride": 2},
}
TRANSPOSES = {
    "plain": {"kernel_size": 2},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "dilated in groups": {"kernel_size": 2, "dilation": 2, "groups": 2, "bias": False},
    "output padding over the stride": {"kernel_size": 2, "dilation": 3, "output_padding": 2},
}
PADS = {
    "reflection_pad": ((1, 2), (-1, 1)),
    "replication_pad": ((1, 3), (2, -1)),
    "circular_pad": ((1, 2), (-1, 2)),
    "zero_pad": ((1, 2), (-1, 2)),
}

LAYERS = {
    **{
        f"conv{dims}d {name}": (getattr(fn, f"conv{dims}d")(4, **options), BATCH[dims])
        for name, options in CONVOLUTIONS.items()
        for dims in (1, 2, 3)
    },
    **{
        f"conv_transpose{dims}d {name}": (
            getattr(fn, f"conv_transpose{dims}d")(4, **options),
            BATCH[dims],
        )
        for name, options in TRANSPOSES.items()
        for dims in (1, 2, 3)
    },
    **{
        f"{name}{dims}d {sides}": (
            getattr(fn, f"{name}{dims}d")(sides + (1,) * (2 * dims - 2)),
            BATCH[dims],
        )
        for name, cases in PADS.items()
        for sides in cases
        for dims in (1, 2, 3)
    },
    **{
        f"constant_pad{dims}d": (getattr(fn, f"constant_pad{dims}d")(2, 0.5), BATCH[dims])
        for dims in (1, 2, 3)
    },
    "conv1d of a sequence": (fn.conv1d(3, 3), BATCH[1][0]),
    "conv_transpose2d of an image": (fn.conv_transpose2d(3, 2), BATCH[2][0]),
    "conv_transpose2d of a size": (
        fn.conv_transpose2d(3, 2, 2, output_size=(13, 10)), BATCH[2],
    ),
    "unfold": (fn.unfold(2, padding=1, stride=2), BATCH[2]),
    "unfold dilated": (fn.unfold((2, 3), dilation=2), BATCH[2][0]),
    "fold": (fn.fold((4, 3), 2), BATCH[1][:, :, :6]),
    "fold strided": (fn.fold(4, 2, stride=2), BATCH[1][0, :, :4]),
}  # fmt: skip
