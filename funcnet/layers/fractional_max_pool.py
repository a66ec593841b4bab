"""Maxima over windows at random distances."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcnet import random, runtime
from funcnet.batch_axis import BatchAxis, first_index
from funcnet.core import Forward, Key, Layer, Params, Pullback
from funcnet.errors import require
from funcnet.layers.dropout import require_batch
from funcnet.layers.max_pool import put
from funcnet.layers.spatial import Size, like_x, require_spatial, sizes, spatial, values_of
from funcnet.lift import backward_rule, stateful, with_kernel
from funcnet.params import declare

aten = torch.ops.aten
Ratio = float | Sequence[float]


def _starts(samples: Tensor, size: int, windows: int, kernel: int) -> Tensor:
    """Where windows start: ``floor((i + u) alpha) - floor(u alpha)``, and the last at the end.

    ``alpha = (size - kernel) / (windows - 1)`` is their mean distance, u a sample in [0, 1) for
    each channel of each image.
    """
    last = samples.new_full((*samples.shape, 1), size - kernel, dtype=torch.int64)
    if windows == 1:
        return last
    alpha = samples.new_full((), size - kernel) / (windows - 1)
    steps = torch.arange(windows - 1, device=samples.device).to(samples.dtype)
    starts = ((steps + samples[..., None]) * alpha).long() - (samples * alpha).long()[..., None]
    return torch.cat([starts, last], -1)


def fractional_maxima(
    x: Tensor, kernel: tuple[int, ...], output_size: Sequence[int], samples: Tensor
) -> tuple[Tensor, Tensor]:
    """The maxima of the windows, and their indices into the spatial dimensions of x as one.

    ``samples`` is of shape (batch, channels, dimensions), of images width before height.
    """
    dims, size = len(kernel), x.shape[-len(kernel) :]
    samples = samples.reshape(*x.shape[:-dims], dims)
    order = reversed(range(dims)) if dims == 2 else range(dims)
    where = torch.zeros((), dtype=torch.int64, device=x.device)
    for dim, sample in zip(order, samples.unbind(-1), strict=True):
        starts = _starts(sample, size[dim], output_size[dim], kernel[dim])
        points = torch.arange(kernel[dim], device=x.device)
        shape = [1] * (2 * dims)
        shape[dim], shape[dims + dim] = output_size[dim], kernel[dim]
        places = (starts[..., None] + points).reshape(*sample.shape, *shape)
        where = where + places * math.prod(size[dim + 1 :])
    where = where.flatten(-dims)
    taken = x.flatten(-dims).gather(-1, where.flatten(-1 - dims)).reshape(where.shape)
    y, best = taken.max(-1)
    return y, where.gather(-1, best[..., None]).squeeze(-1)


def _fractional_max_pool_kernel(
    dy: Any, size: tuple[int, ...], kernel: tuple[int, ...], indices: Tensor
) -> Tensor:
    dy = values_of(dy)
    if runtime.is_transformed():  # it has no rule for vmap
        return put(dy, indices, size)
    images, volumes = aten.fractional_max_pool2d_backward, aten.fractional_max_pool3d_backward
    backward = images if len(size) == 2 else volumes
    return backward(dy, like_x(dy, size), kernel, dy.shape[-len(size) :], indices)


@with_kernel(_fractional_max_pool_kernel)
def fractional_max_pool_backward(
    dy: Any, size: tuple[int, ...], kernel: tuple[int, ...], indices: Tensor
) -> Tensor:
    """``dx[i] = sum of dy whose maximum was x[i]``."""
    return put(values_of(dy), indices, size)


def _fractional_max_pool(
    dims: int,
    kernel_size: Size,
    output_size: Size | None = None,
    output_ratio: Ratio | None = None,
    return_indices: bool = False,
    random_samples: Tensor | None = None,
) -> Layer:
    """The maxima of windows that lie at random distances, so that y has nearly any size.

    Along a dimension of size n, window i of m starts at ``floor((i + u) alpha) - floor(u alpha)``
    with ``alpha = (n - kernel) / (m - 1)``, the last at ``n - kernel``. For each channel of each
    image a sample u of U(0, 1) is drawn from the key. With ``train=False`` u is 1/2, so that the
    windows lie as evenly as they can; torch draws then, too.

    Args:
        kernel_size: (height, width) of the window, or one int for all.
        output_size: (height, width) of y, or one int for all.
        output_ratio: in its place y's size, as a part of x's, in (0, 1).
        return_indices: whether y is ``(y, indices)``, with indices into the dimensions
            (height, width) of x as one.
        random_samples: the samples, in the place of drawn ones: of shape (batch or more, channels,
            2), where that of the width comes before that of the height in 2 dimensions.

    Inputs:
        x of shape (batch, channels, height, width) or without a batch, floating; a key when
        ``train=True``, unless the samples are given.
    VJP:
        dy goes to where the maximum was found; the residual is these indices.
    Raises:
        ValueError: without a key, or where ``kernel + output_size - 1`` is more than the size
            of x, or as much, in 3 dimensions.

    Source: ``torch.nn.FractionalMaxPool2d``; Graham 2014, "Fractional max-pooling".

    >>> fn.fractional_max_pool2d(2, 3).apply({}, torch.arange(25.0).reshape(1, 5, 5))[0]
    tensor([[[ 6.,  8.,  9.],
             [16., 18., 19.],
             [21., 23., 24.]]])
    """
    name = f"fractional_max_pool{dims}d"
    kernel = sizes(f"{name}: kernel_size", kernel_size, dims, 1)
    one = (output_size is None) != (output_ratio is None)
    got = f"got {output_size} and {output_ratio}"
    require(one, f"{name}: expects either an output_size or an output_ratio, {got}")
    size_of = _output_size(name, dims, output_size, output_ratio)
    check = require_spatial(dims)
    pool = getattr(aten, name)

    @declare
    def init(x: Tensor) -> Params:
        params = check(x)
        size, wanted = x.shape[-dims:], size_of(x.shape[-dims:])
        most = [n - (dims == 3) for n in size]  # as torch has it
        fits = all([1 <= m <= end - k + 1 for k, m, end in zip(kernel, wanted, most, strict=True)])
        given = f"got {kernel} and {wanted} for x of size {tuple(size)}"
        require(fits, f"expects kernel_size + output_size - 1 of at most {tuple(most)}, {given}")
        if random_samples is not None:
            batch, channels = _batch(x, dims)
            got = tuple(random_samples.shape)
            fits = len(got) == 3 and got[0] >= batch and got[1:] == (channels, dims)
            expected = f"at least ({batch}, {channels}, {dims})"
            require(fits, f"expects random_samples of shape {expected}, got {got}")
        return params

    def forward(
        params: Params,
        x: Tensor,
        state: Params,
        key: Key,
        train: bool,
        axis: BatchAxis | None = None,
    ) -> Forward:
        size, shape = tuple(x.shape[-dims:]), (*_batch(x, dims), dims)
        if random_samples is not None:
            require(axis is None, f"{name}: random_samples are those of a whole batch, not a part")
            samples = random_samples[: shape[0]].to(x.device, x.dtype)
        elif train and key is not None:
            if axis is not None:
                require_batch(name, x, dims + 2, axis)
            start = first_index(axis, name, shape, x.device)
            samples = random.uniform(key, shape, x.dtype, device=x.device, start=start)
        else:
            samples = x.new_full(shape, 0.5)
        maxima = fractional_maxima if runtime.is_transformed() else pool
        y, indices = maxima(x, kernel, size_of(size), samples)
        static = (fractional_max_pool_backward, size, kernel)
        pullback = Pullback(backward_rule, {"indices": indices}, static)
        return (y, indices) if return_indices else y, pullback, state

    return stateful(init, forward, keyed=random_samples is None, name=name, takes_axis=True)


def _batch(x: Tensor, dims: int) -> tuple[int, int]:
    """The sizes of the batch and of the channels."""
    return (x.shape[0] if x.dim() == dims + 2 else 1), x.shape[-1 - dims]


def _output_size(
    name: str, dims: int, size: Size | None, ratio: Ratio | None
) -> Callable[[Sequence[int]], tuple[int, ...]]:
    """y's size of x's size."""
    if size is not None:
        fixed = sizes(f"{name}: output_size", size, dims, 1)
        return lambda size: fixed
    ratios = (ratio,) * dims if isinstance(ratio, (int, float)) else tuple(ratio or ())
    fits = len(ratios) == dims and all([0 < each < 1 for each in ratios])
    require(fits, f"{name}: output_ratio must be one or {dims} numbers in (0, 1), got {ratio}")
    return lambda size: tuple([int(n * each) for n, each in zip(size, ratios, strict=True)])


fractional_max_pool2d, fractional_max_pool3d = (
    spatial(_fractional_max_pool, dims) for dims in (2, 3)
)
