"""Our own cases of what slides or scales: convolution, pooling, padding, resampling."""

from typing import Any

from tests.parity.draws import Case, case, each, pooled, uniform

SIZES = {1: (7,), 2: (7, 6), 3: (5, 6, 4)}


def images(dims: int, channels: int = 4) -> tuple[int, ...]:
    return (2, channels, *SIZES[dims])


def odd(dims: int, *values: int) -> Any:
    """A value for each dimension, all different where there are several."""
    return values[:dims] if dims > 1 else values[0]


def convolutions(dims: int, lazy: bool = False) -> list[Case]:
    x, channels = images(dims), () if lazy else (4,)
    first = (*channels, 6, odd(dims, 3, 2, 1))
    found = each(
        *first,
        x=x,
        together=2,
        stride=[2, odd(dims, 2, 1, 3)],
        padding=[1, odd(dims, 1, 2, 0)],
        dilation=[2],
        groups=[2],
        bias=[False],
    )
    modes = ["reflect", "replicate", "circular"]
    found += [
        case(*first, padding=padding, padding_mode=mode, x=x)
        for mode in modes
        for padding in (0, 2, odd(dims, 1, 2, 0), "same")
    ]
    found += [
        case(*first, padding="same", dilation=2, x=x),
        case(*first, padding="valid", stride=2, x=x),
        case(*first, 1, 1, 1, 2, False, "circular", x=x),
        case(*channels, 8, 1, groups=4, x=x),
        case(*channels, 4, 3, padding=1, groups=4, x=x),
        case(*first, x=x[1:]),
        case(*first, padding="same", padding_mode="reflect", x=x[1:]),
        case(*first, x=(0, *x[1:])),
    ]
    return found


def transposed(dims: int, lazy: bool = False) -> list[Case]:
    x, channels = images(dims), () if lazy else (4,)
    first = (*channels, 6, odd(dims, 3, 2, 2))
    found = each(
        *first,
        x=x,
        together=2,
        stride=[2, odd(dims, 2, 1, 3)],
        padding=[1, odd(dims, 1, 0, 1)],
        dilation=[2],
        groups=[2],
        bias=[False],
    )
    larger = [2 * size + 1 for size in x[2:]]
    found += [
        case(*first, 2, 1, 1, x=x),
        case(*first, 2, 1, 1, 2, False, 2, "zeros", x=x),
        case(*first, stride=3, output_padding=odd(dims, 2, 1, 0), x=x),
        case(*channels, 6, 3, stride=2, x=x, forward={"output_size": larger}),
        case(*channels, 6, 3, stride=2, x=x, forward={"output_size": [2, 6, *larger]}),
        case(*first, x=x[1:]),
        case(*first, x=(0, *x[1:])),
    ]
    return found


def averages(dims: int) -> list[Case]:
    x = images(dims)
    found = each(
        odd(dims, 3, 2, 2),
        x=x,
        together=2,
        stride=[1, odd(dims, 2, 3, 1)],
        padding=[1],
        ceil_mode=[True],
        count_include_pad=[False],
        **({"divisor_override": [1, 5]} if dims > 1 else {}),
    )
    return [*found, case(3, 2, 1, True, False, x=x), case(2, x=x[1:]), case(2, x=(0, *x[1:]))]


def maxima(dims: int) -> list[Case]:
    x = images(dims)
    found = each(
        odd(dims, 3, 2, 2),
        x=x,
        together=2,
        stride=[1, odd(dims, 2, 3, 1)],
        padding=[1],
        dilation=[odd(dims, 2, 1, 2)],
        return_indices=[True],
        ceil_mode=[True],
    )
    return [*found, case(2, 2, 1, 1, True, True, x=x), case(2, x=x[1:])]


def unpooled(dims: int) -> list[Case]:
    x = images(dims)
    size = list(x[2:])
    return [
        case(2, x=[pooled(x, 2)]),
        case(3, 2, x=[pooled(x, 3, 2)]),
        case(3, 2, 1, x=[pooled(x, 3, 2, 1)], forward={"output_size": size}),
        case(2, stride=2, x=[pooled(x, 2)], forward={"output_size": list(x)}),
        case(odd(dims, 2, 3, 1), x=[pooled(x, odd(dims, 2, 3, 1))]),
    ]


def adaptive(dims: int, indices: bool) -> list[Case]:
    x = images(dims)
    sizes = [1, 3, 9, odd(dims, 2, 5, 3)]
    sizes += [odd(dims, None, 3, 2), (5, *[None] * (dims - 1))] if dims > 1 else []
    found = [case(size, x=x) for size in sizes] + [case(3, x=x[1:])]
    return found + ([case(3, True, x=x), case(2, return_indices=True, x=x[1:])] if indices else [])


def powers(dims: int) -> list[Case]:
    x = uniform(*images(dims))
    return [
        *each(2, odd(dims, 3, 2, 2), x=images(dims), stride=[1, 3], ceil_mode=[True]),
        *each(3.0, 2, x=x, stride=[1], ceil_mode=[True]),
        case(1, 2, x=x),
        case(1.5, 2, 1, True, x=x),
        case(2, 2, x=images(dims)[1:]),
    ]


def fractional(dims: int) -> list[Case]:
    x = (2, 4, 7, 8, 6)[: dims + 2]
    found = [
        case(2, odd(dims, 4, 5, 3), x=x),
        case(odd(dims, 2, 3, 2), 3, x=x),
        case(2, None, 0.5, x=x),
        case(2, output_ratio=odd(dims, 0.5, 0.7, 0.6), x=x),
        case(2, 3, return_indices=True, x=x),
        case(2, 3, x=x[1:]),
    ]
    drawn = case(2, 3, x=x, _random_samples=uniform(2, 4, dims))
    return [*found, drawn, case(2, 3, None, True, x=x, _random_samples=uniform(2, 4, dims))]


def padded(dims: int, *value: float, least: int = 0) -> list[Case]:
    x = images(dims)
    sides = (1, 2, 0, 3, 2, 1)[: 2 * dims]
    found = [case(2, *value, x=x), case(sides, *value, x=x), case(1, *value, x=x[1:])]
    return found + ([case((-1, 2, *sides[2:]), *value, x=x)] if least < 0 else [])


def upsampled() -> list[Case]:
    modes = {1: ["nearest", "linear"], 2: ["nearest", "bilinear", "bicubic"]}
    modes[3] = ["nearest", "trilinear"]
    found = []
    for dims, names in modes.items():
        x = images(dims)
        for mode in [*names, "nearest-exact", *(["area"] if dims < 3 else [])]:
            found += [
                case(scale_factor=2, mode=mode, x=x),
                case(odd(dims, 9, 4, 5) if dims > 1 else 9, mode=mode, x=x),
                case(scale_factor=odd(dims, 1.7, 0.6, 1.3), mode=mode, x=x),
                case(scale_factor=1.7, mode=mode, recompute_scale_factor=True, x=x),
            ]
            if mode in ("linear", "bilinear", "bicubic", "trilinear"):
                found += [
                    case(None, 2, mode, True, x=x),
                    case(odd(dims, 9, 4, 5), None, mode, True, x=x),
                    case(scale_factor=0.6, mode=mode, align_corners=True, x=x),
                ]
    return found


def every_dimension() -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {}
    for dims in (1, 2, 3):
        found |= {
            f"Conv{dims}d": convolutions(dims),
            f"LazyConv{dims}d": convolutions(dims, lazy=True)[:6],
            f"ConvTranspose{dims}d": transposed(dims),
            f"LazyConvTranspose{dims}d": transposed(dims, lazy=True)[:6],
            f"AvgPool{dims}d": averages(dims),
            f"MaxPool{dims}d": maxima(dims),
            f"MaxUnpool{dims}d": unpooled(dims),
            f"AdaptiveAvgPool{dims}d": adaptive(dims, indices=False),
            f"AdaptiveMaxPool{dims}d": adaptive(dims, indices=True),
            f"LPPool{dims}d": powers(dims),
            f"ConstantPad{dims}d": padded(dims, 1.5, least=-1),
            f"ZeroPad{dims}d": padded(dims, least=-1),
            f"ReflectionPad{dims}d": padded(dims),
            f"ReplicationPad{dims}d": padded(dims, least=-1),
            f"CircularPad{dims}d": padded(dims),
        }
    return found


WINDOWS = {
    **every_dimension(),
    "FractionalMaxPool2d": fractional(2),
    "FractionalMaxPool3d": fractional(3),
    "Upsample": upsampled(),
    "UpsamplingNearest2d": [case(scale_factor=2, x=images(2)), case((9, 4), x=images(2))],
    "UpsamplingBilinear2d": [case(scale_factor=2, x=images(2)), case((9, 4), x=images(2))],
    "PixelShuffle": [case(2, x=images(2)), case(2, x=images(2)[1:]), case(1, x=images(2))],
    "PixelUnshuffle": [case(2, x=(2, 3, 4, 6)), case(3, x=(2, 6, 3))],
    "ChannelShuffle": [case(2, x=images(2)), case(4, x=images(1)), case(2, x=images(3))],
    "Unfold": each(
        (2, 3),
        x=images(2),
        together=2,
        dilation=[2, (2, 1)],
        padding=[1, (1, 2)],
        stride=[2, (1, 2)],
    )
    + [case(2, 1, 1, 2, x=images(2)), case(2, x=images(2)[1:])],
    "Fold": [
        case((5, 6), (2, 2), x=(2, 12, 20)),
        case((5, 6), 2, x=(12, 20)),
        case((5, 6), (2, 3), 1, (1, 0), (2, 1), x=(2, 12, 12)),
        case((5, 6), 2, dilation=2, padding=1, x=(2, 12, 30)),
        case(6, 2, stride=2, x=(2, 12, 9)),
    ],
}
