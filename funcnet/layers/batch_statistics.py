"""`batch_norm` of a rank's part of a batch, by the statistics of the whole: they are gathered."""

from typing import Any

import torch
from torch import Tensor

from funcnet.batch_axis import BatchAxis
from funcnet.core import Params


def by_channel(leaf: Any, x: Tensor) -> Any:
    """A tensor of shape (channels,), dimension 1 of x, so that it broadcasts against x."""
    return None if leaf is None else leaf.reshape(-1, *[1] * (x.dim() - 2))


def other_dims(x: Tensor) -> list[int]:
    """The dimensions of x but for that of the channels."""
    return [dim for dim in range(x.dim()) if dim != 1]


def average(running: Any, batch: Any, rate: Any) -> list[Tensor]:
    """``(1 - rate) running + rate batch``, of each two."""
    pairs = zip(running, batch, strict=True)
    return [((1 - rate) * old + rate * new).to(old.dtype) for old, new in pairs]


def statistics_of_all(x: Tensor, axis: BatchAxis) -> tuple[Tensor, Tensor, Tensor]:
    """The mean by channel, the sum of squared differences from it, and the number of values.

    Of all ranks' values, from what each tells of its own: as accurate as of all values at once, and
    bit for bit the same on all ranks (Chan, Golub and LeVeque 1979).
    """
    wide, channels = x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[1]
    count = x.numel() // max(channels, 1)
    own = [wide.new_zeros(channels), wide.new_zeros(channels)]
    if count:
        var, mean = torch.var_mean(wide, other_dims(x), correction=0)
        own = [mean, var * count]
    each = axis.gather(torch.cat([*own, wide.new_full((1,), count)]).unsqueeze(0))
    means, squares, counts = each[:, :channels], each[:, channels:-1], each[:, -1:]
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    return mean, (squares + counts * (means - mean).square()).sum(0), total


def means_over_examples(statistics: list[Tensor], axis: BatchAxis | None) -> list[Tensor]:
    """The means of tensors (examples, channels) over their examples, on all ranks of an axis."""
    if axis is None:
        return [each.mean(0) for each in statistics]
    sums = [each.sum(0) for each in statistics]
    count = sums[0].new_full((1,), len(statistics[0]))
    *total, number = axis.sum(torch.cat([*sums, count])).split([*map(len, sums), 1])
    return [each / number for each in total]


def normalize_by_all(
    params: Params, x: Tensor, running: Any, rate: Any, eps: float, axis: BatchAxis
) -> tuple[Tensor, dict[str, Tensor], Any]:
    """y, the residuals of `all_backward`, and the new running mean and variance, if any."""
    weight, bias = params.get("weight"), params.get("bias")
    mean, squares, count = statistics_of_all(x, axis)
    rstd = (squares / count + eps).rsqrt()
    y = (x - by_channel(mean, x)) * by_channel(rstd, x)
    y = y if weight is None else y * by_channel(weight, x)
    y = y if bias is None else y + by_channel(bias, x)
    residuals = {"x": x, "mean": mean, "rstd": rstd, "count": count}
    if weight is not None:
        residuals["weight"] = weight
    if running is not None:
        running = average(running, (mean, squares / (count - 1)), rate)
    return y.to(x.dtype), residuals, running


def all_backward(
    dy: Tensor,
    axis: BatchAxis,
    wanted: Any,
    *,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    count: Tensor,
    weight: Any = None,
) -> Any:
    """`funcnet.layers.norm.norm_backward` with means over the values of all ranks.

    dx is that of the sum of what all ranks make of their y; dweight and dbias are sums over the own
    values, so that the sum over ranks, or the mean, is right for them as for all params.
    """
    n, dims = (x - by_channel(mean, x)) * by_channel(rstd, x), other_dims(x)
    wide = dy.to(n.dtype)
    sums, products = wide.sum(dims), (wide * n).sum(dims)
    dx = dweight = dbias = None
    if wanted[0]:
        g, gn = axis.sum(torch.stack([sums, products])) / count
        scale = rstd if weight is None else rstd * weight
        dx = (by_channel(scale, x) * (wide - by_channel(g, x) - n * by_channel(gn, x))).to(x.dtype)
    if wanted[1]:
        dweight = products.to(weight.dtype)
    if wanted[2]:
        dbias = sums.to(weight.dtype)
    return dx, dweight, dbias
