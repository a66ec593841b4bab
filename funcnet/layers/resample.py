"""Resampling: y at places between those of x, a linear map of each spatial dimension alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import runtime
from funcnet.core import EMPTY, Layer
from funcnet.errors import require
from funcnet.layers.avg_pool import adaptive_avg_pool_backward
from funcnet.layers.spatial import NAMES, Size, apply_each, sizes
from funcnet.lift import Step, parameterless, require_floating, with_kernel
from funcnet.params import Param

MODES: dict[str, tuple[int, ...]] = {
    "nearest": (1, 2, 3),
    "linear": (1,),
    "bilinear": (2,),
    "bicubic": (2,),
    "trilinear": (3,),
    "area": (1, 2, 3),
    "nearest-exact": (1, 2, 3),
    "lanczos": (2,),
}
"""The numbers of spatial dimensions that each mode is for."""

_NEAREST = ("nearest", "nearest-exact")


def _triangle(t: Tensor) -> Tensor:
    return (1.0 - t.abs()).clamp(min=0.0)


def _cubic(t: Tensor, a: float = -0.75) -> Tensor:
    """The cubic convolution kernel of Keys (1981), with slope a at 1."""
    t = t.abs()
    near = ((a + 2.0) * t - (a + 3.0)) * t * t + 1.0
    far = a * (((t - 5.0) * t + 8.0) * t - 4.0)
    return torch.where(t <= 1.0, near, torch.where(t < 2.0, far, 0.0))


def _cubic_of_pillow(t: Tensor) -> Tensor:
    return _cubic(t, -0.5)


def _lanczos(t: Tensor) -> Tensor:
    return torch.where(t.abs() < 3.0, torch.sinc(t) * torch.sinc(t / 3.0), 0.0)


_BY_DISTANCE: dict[tuple[str, bool], Callable[[Tensor], Tensor]] = {
    ("linear", False): _triangle,
    ("bilinear", False): _triangle,
    ("trilinear", False): _triangle,
    ("bicubic", False): _cubic,
    ("bilinear", True): _triangle,
    ("bicubic", True): _cubic_of_pillow,
    ("lanczos", True): _lanczos,
}
"""By mode and antialias: how much a value counts by its distance."""


class Resampling(NamedTuple):
    """How y is made of x: the options of `upsample` but the size.

    Args:
        mode, align_corners, antialias: those options.
        scales: how many times as large each dimension is to be; None for the ratio of the sizes.
    """

    mode: str
    align_corners: bool
    antialias: bool
    scales: tuple[float | None, ...]

    def matrices(self, size: Sequence[int], wanted: Sequence[int], like: Tensor) -> list[Tensor]:
        """What each value of x counts for in each of y, for each dimension, of shape (y, x).

        >>> Resampling("linear", False, False, (None,)).matrices([2], [4], torch.ones(1))
        [tensor([[1.0000, 0.0000],
                [0.7500, 0.2500],
                [0.2500, 0.7500],
                [0.0000, 1.0000]], dtype=torch.float64)]
        """
        given = zip(size, wanted, self.scales, strict=True)
        return [self._weights(*each, like.device) for each in given]

    def places(self, size: Sequence[int], wanted: Sequence[int], like: Tensor) -> list[Tensor]:
        """Which value of x each of y is, for each dimension, where it is the nearest one.

        Value o of y is at ``floor(o step)`` or, if exact, at ``floor((o + 1/2) step)``.

        >>> Resampling("nearest", False, False, (None,)).places([2], [4], torch.ones(1))
        [tensor([0, 0, 1, 1])]
        """
        # In torch's precision: the floor of a product shows how it was rounded.
        double = like.dtype == torch.float64 and like.device.type != "cuda"
        dtype, offset = (torch.float64 if double else torch.float32), 0.5 * (self.mode != "nearest")
        found = []
        for n, m, scale in zip(size, wanted, self.scales, strict=True):
            place = torch.arange(m, dtype=dtype, device=like.device) + offset
            found.append((place * (1.0 / scale if scale else n / m)).long().clamp(max=n - 1))
        return found

    def has_kernel(self, size: Sequence[int], wanted: Sequence[int]) -> bool:
        """Whether the backward pass of PyTorch is the transpose of its forward pass.

        For the nearest value it is where no product of a place and the step is rounded, and the
        step is the ratio of the sizes: these passes, and those for other orders in memory, round
        in their own ways. For others it is where no dimension keeps its size at a scale that is
        not 1, but is resampled in one of the passes.
        """
        given = [*zip(size, wanted, self.scales, strict=True)]
        if self.mode in _NEAREST:
            return all([(1024 * n / m).is_integer() and s in (None, m / n) for n, m, s in given])
        return all([n != m or s in (None, 1.0) for n, m, s in given])

    def _weights(self, size: int, wanted: int, scale: float | None, device: Any) -> Tensor:
        """A value of x counts by its distance from where that of y lies.

        Before and after x there are its first and its last value. With antialias there is nothing,
        distances are in steps where these are larger than 1, and all is divided by the sum.
        """
        place = torch.arange(wanted, dtype=torch.float64, device=device)[:, None]
        if size == wanted and (self.antialias or self.mode != "bicubic"):
            scale = 1.0  # whatever it was, as in torch
        step = 1.0 / scale if scale else size / wanted
        if self.align_corners:
            step = (size - 1) / (wanted - 1) if wanted > 1 else 0.0
        ends = self.align_corners and not self.antialias
        source = place * step if ends else (place + 0.5) * step - 0.5
        by_distance = _BY_DISTANCE[self.mode, self.antialias]
        if self.antialias:
            counts = by_distance((torch.arange(size, device=device) - source) / max(step, 1.0))
            return counts / counts.sum(1, keepdim=True)
        around = torch.arange(-2, size + 2, device=device)
        counts = by_distance(around - source)
        return counts.new_zeros(wanted, size).index_add(1, around.clamp(0, size - 1), counts)


def resample(x: Tensor, wanted: Sequence[int], how: Resampling) -> Tensor:
    """x times the matrix of each dimension, or its nearest values."""
    if how.mode not in _NEAREST:
        return apply_each(x, how.matrices(x.shape[2:], wanted, x))
    for dim, places in enumerate(how.places(x.shape[2:], wanted, x), 2):
        x = x.index_select(dim, places)
    return x


def _resample_kernel(dy: Tensor, size: tuple[int, ...], how: Resampling) -> Tensor:
    if _is_formula(size, dy.shape[2:], how) or not how.has_kernel(size, dy.shape[2:]):
        return resample_backward(dy, size, how)
    backward = runtime.interpolate_backward(how.mode, len(size), how.antialias)
    corners = () if how.mode in _NEAREST else (how.align_corners,)
    return backward(dy, dy.shape[2:], (*dy.shape[:2], *size), *corners, *how.scales)


@with_kernel(_resample_kernel)
def resample_backward(dy: Tensor, size: tuple[int, ...], how: Resampling) -> Tensor:
    """dy times the transposed matrix of each dimension, or added to the nearest values."""
    wanted = dy.shape[2:]
    if how.mode not in _NEAREST:
        return apply_each(dy, [each.mT for each in how.matrices(size, wanted, dy)])
    dx = dy.to(torch.promote_types(dy.dtype, torch.float32))
    for dim, places in enumerate(how.places(size, wanted, dy), 2):
        zeros = dx.new_zeros((*dx.shape[:dim], size[dim - 2], *dx.shape[dim + 1 :]))
        dx = zeros.index_add(dim, places, dx)
    return dx.to(dy.dtype)


def _is_formula(size: Sequence[int], wanted: Sequence[int], how: Resampling) -> bool:
    """Whether the formula is used in the place of PyTorch's operators."""
    if how.mode in _NEAREST and not how.has_kernel(size, wanted):
        return True
    if runtime.is_tracing():  # jit has a program for this one alone
        return how.mode != "nearest"
    # The others have rules for vmap.
    return how.mode in ("nearest-exact", "lanczos") and runtime.is_transformed()


def upsample(
    size: Size | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    *,
    antialias: bool = False,
) -> Layer:
    """x at another number of places, between or among its own; fewer or more.

    Along each dimension, value o of y lies at ``(o + 1/2) step - 1/2`` in x, with step the ratio
    of the sizes, x's to y's, or ``1 / scale_factor``.

    Args:
        size: (height, width) of y, or one int for all.
        scale_factor: in its place y's size as a multiple of x's, which is rounded down.
        mode: how y is made of the values of x around it. "nearest": one value, at
            ``floor(o step)``; "nearest-exact": the nearest one. "linear", "bilinear" and
            "trilinear", for 1, 2 and 3 dimensions: two in each. "bicubic", for 2 dimensions: four
            in each. "area": `adaptive_avg_pool2d`. "lanczos", for 2 dimensions and with antialias:
            a windowed sinc of six.
        align_corners: whether the first and the last values of x and y lie at the same places, so
            that value o lies at ``o (size - 1) / (size' - 1)``; not for "nearest", "area" and
            "lanczos".
        recompute_scale_factor: whether step is the ratio of the sizes, where scale_factor is given.
        antialias: whether, where y is smaller than x, it is made of more values of x, as in Pillow;
            for "bilinear", "bicubic" and "lanczos".

    Inputs:
        x of shape ``(batch, channels, *size)``, with one to three spatial dimensions, floating.
    VJP:
        the transposed linear map. For "nearest", and sizes whose ratio is not that of the scale or
        not exact, torch's is not always that of its forward pass.
    Raises:
        ValueError: a mode that is not for x's number of dimensions.

    Source: ``torch.nn.Upsample``, ``torch.nn.functional.interpolate``.

    >>> upsample(scale_factor=2).apply({}, torch.tensor([[[1.0, 2.0]]]))[0]
    tensor([[[1., 1., 2., 2.]]])
    >>> upsample(3, mode="linear", align_corners=True).apply({}, torch.tensor([[[1.0, 2.0]]]))[0]
    tensor([[[1.0000, 1.5000, 2.0000]]])
    """
    options = (mode, align_corners, recompute_scale_factor, antialias)
    return _upsample("upsample", (1, 2, 3), size, scale_factor, *options)


def interpolate(
    size: Size | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Layer:
    """`upsample`, under the name and with the options of the function in torch.

    Args:
        size, scale_factor, mode, align_corners, recompute_scale_factor, antialias: as in
            `upsample`.

    Source: ``torch.nn.functional.interpolate``.

    >>> interpolate(scale_factor=0.5, mode="area").apply({}, torch.tensor([[[1.0, 3.0]]]))[0]
    tensor([[[2.]]])
    """
    options = (mode, align_corners, recompute_scale_factor, antialias)
    return _upsample("interpolate", (1, 2, 3), size, scale_factor, *options)


def upsampling_nearest2d(
    size: Size | None = None, scale_factor: float | Sequence[float] | None = None
) -> Layer:
    """`upsample` of images with mode "nearest".

    Args:
        size, scale_factor: as in `upsample`.

    Source: ``torch.nn.UpsamplingNearest2d``.

    >>> upsampling_nearest2d(2).apply({}, torch.ones(1, 1, 1, 1))[0].shape
    torch.Size([1, 1, 2, 2])
    """
    return _upsample("upsampling_nearest2d", (2,), size, scale_factor, "nearest")


def upsampling_bilinear2d(
    size: Size | None = None, scale_factor: float | Sequence[float] | None = None
) -> Layer:
    """`upsample` of images with mode "bilinear" and aligned corners.

    Args:
        size, scale_factor: as in `upsample`.

    Source: ``torch.nn.UpsamplingBilinear2d``.

    >>> upsampling_bilinear2d(3).apply({}, torch.tensor([[[[1.0, 2.0]]]]))[0][0, 0, 0]
    tensor([1.0000, 1.5000, 2.0000])
    """
    return _upsample("upsampling_bilinear2d", (2,), size, scale_factor, "bilinear", True)


def _upsample(
    name: str,
    dims: tuple[int, ...],
    size: Size | None,
    scale_factor: float | Sequence[float] | None,
    mode: str,
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Layer:
    """The layer, for inputs with one of some numbers of spatial dimensions."""
    require(mode in MODES, f"{name}: mode must be one of {', '.join(MODES)}, got {mode!r}")
    one = (size is None) != (scale_factor is None)
    require(one, f"{name}: expects either a size or a scale_factor, got {size} and {scale_factor}")
    aligns = align_corners is None or mode not in (*_NEAREST, "area")
    aligns = aligns and (mode != "lanczos" or not align_corners)
    require(aligns, f"{name}: align_corners is not for mode {mode!r}, got {align_corners}")
    fits = not recompute_scale_factor or size is None
    require(fits, f"{name}: recompute_scale_factor needs a scale_factor")
    known = antialias in [each for other, each in _BY_DISTANCE if other == mode]
    plain = mode in (*_NEAREST, "area") and not antialias
    modes = "bilinear, bicubic and lanczos, which needs it"
    require(known or plain, f"{name}: antialias is for {modes}, got {antialias} for {mode!r}")
    dims = tuple([each for each in MODES[mode] if each in dims])

    def factors(given: int) -> list[float]:
        """The scale of each dimension."""
        value = scale_factor if isinstance(scale_factor, Sequence) else [scale_factor] * given
        fits = len(value) == given
        require(fits, f"scale_factor must be one number or {given}, got {scale_factor}")
        return [float(each) for each in value if each is not None]

    def wanted(x: Tensor) -> tuple[int, ...]:
        """y's size."""
        own = tuple(x.shape[2:])
        if size is not None:
            return sizes("size", size, len(own), 1)
        scaled = tuple([int(n * each) for n, each in zip(own, factors(len(own)), strict=True)])
        require(min(scaled) >= 1, f"expects y of size >= 1, got {scaled} of x of size {own}")
        return scaled

    def declaration(x: Tensor) -> Mapping[str, Param]:
        require_floating(x)
        forms = " or ".join([f"(batch, channels, {NAMES[each]})" for each in dims])
        require(x.dim() - 2 in dims, f"expects {forms} for mode {mode!r}, got {tuple(x.shape)}")
        wanted(x)
        return EMPTY

    def forward(x: Tensor) -> Step:
        own, to = tuple(x.shape[2:]), wanted(x)
        scaled = size is None and not recompute_scale_factor
        scales = tuple(factors(len(own))) if scaled else (None,) * len(own)
        how = Resampling(mode, bool(align_corners), antialias, scales)
        if _is_formula(own, to, how):
            return resample(x, to, how), {}, (own, how)
        given: dict[str, Any] = {"scale_factor": scales} if scaled else {"size": to}
        options: dict[str, Any] = {"align_corners": align_corners, "antialias": antialias}
        return F.interpolate(x, mode=mode, **given, **options), {}, (own, how)

    def forward_of_area(x: Tensor) -> Step:
        return F.interpolate(x, wanted(x), mode="area"), {}, (tuple(x.shape[2:]),)

    if mode == "area":
        backward = adaptive_avg_pool_backward
        return parameterless(forward_of_area, backward, declaration=declaration, name=name)
    return parameterless(forward, resample_backward, declaration=declaration, name=name)
