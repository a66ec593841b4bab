"""Forms in which a tensor is stored in less memory: int8 by blocks, bits, another dtype or device.

A form is "int8", "bit", "bfloat16", "float16" or a `torch.device`. `encode` gives a dict of tensors
and what else `decode` needs.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet.errors import require
from funcnet.random import bits
from funcnet.runtime import is_transformed
from funcnet.tree import describe

Form = str | torch.device
"""How a tensor is stored."""

Told = tuple[Hashable, ...]
"""What `decode` needs beside the stored tensors: the form, the shape, the dtype and the device."""

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

BLOCK = 128
"""The most values that share a scale. float32 takes 1 + 4 / 128 bytes a value, for the 4 it had."""

# Below it 1 / scale overflows in float32; such values are rounded to 0.
_TINY = 1e-30

# The fastest of the sizes from 2**13 to 2**18 on CPUs with 1 MiB of L2 cache a core.
_CHUNK = 1 << 17


def check_form(name: str, form: Any, other: str = "None") -> None:
    """Raise ValueError unless it is a form; ``other`` is what else might have been given."""
    known = form in ("int8", "bit", *HALVES) or isinstance(form, torch.device)
    forms = "'int8', 'bfloat16', 'float16', 'bit', a torch.device"
    require(known, f"{name} expects {forms} or {other}, got {form!r}")


def encode(x: Tensor, form: Form, key: Tensor | None) -> tuple[dict[str, Tensor], Told]:
    """What to keep of a tensor, and what `decode` is told. A key is for stochastic rounding.

    Raises:
        ValueError: int8 of values of which some are not finite, where they can be read.
    """
    told = (form, tuple(x.shape), x.dtype, x.device)
    if form == "int8":
        values, scale = _to_int8(x, key)
        return {"values": values, "scale": scale}, told
    if form == "bit":
        return {"bits": _to_bits(x)}, told
    if isinstance(form, torch.device):
        return {"moved": x.to(form)}, told
    return {"narrow": x.to(HALVES[form])}, told


def decode(stored: dict[str, Tensor], told: Any) -> Tensor:
    """The tensor, or the nearest to it that the form has."""
    form, shape, dtype, device = told
    if form == "int8":
        return _from_int8(**stored, shape=shape, dtype=dtype)
    if form == "bit":
        return _from_bits(stored["bits"], shape)
    if isinstance(form, torch.device):
        return stored["moved"].to(device)
    return stored["narrow"].to(dtype)


def _to_int8(x: Tensor, key: Tensor | None) -> tuple[Tensor, Tensor]:
    """``values`` in -127 ... 127 in blocks, and a ``scale`` of each: ``x ~ values scale``.

    With a key a value between two steps becomes one of them at random, so that its mean is the
    value, up to 2**-9 of a step. A block with a value that is not finite has the scale NaN.
    """
    rows = _in_blocks(x)
    noise = None if key is None else _noise(key, rows)
    if is_transformed(x) or x.device.type != "cpu":
        return _round(rows, noise)
    values = torch.empty(rows.shape, dtype=torch.int8)
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = torch.empty((len(rows), 1), dtype=wide)
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):  # in chunks that stay in the cache
        part = slice(start, start + step)
        values[part], scale[part] = _round(rows[part], None if noise is None else noise[part])
    if not scale.isfinite().all():
        count = x.numel() - int(x.isfinite().sum())
        what = f"expects finite values, got {count} of {x.numel()} that are not"
        raise ValueError(f"int8 {what} in {describe(x)}")
    return values, scale


def _in_blocks(x: Tensor) -> Tensor:
    """The values in rows of one length: the greatest divisor of their number up to `BLOCK`."""
    size = x.numel()
    block = next(each for each in range(min(size, BLOCK), 0, -1) if size % each == 0)
    if block >= BLOCK // 4 or block == size:
        return x.reshape(-1, block)
    return F.pad(x.reshape(-1), (0, -size % BLOCK)).reshape(-1, BLOCK)


def _noise(key: Tensor, rows: Tensor) -> Tensor:
    """Random integers of 8 bits, with sign, eight of each word: the draws take most of the time."""
    count = rows.numel()
    words = bits(key, (-(-count // 8),), width=64, device=rows.device)
    if is_transformed(words):
        noise = torch.stack([(words << 56 - low) >> 56 for low in range(0, 64, 8)], -1)
    else:
        noise = words.view(torch.int8)
    return noise.reshape(-1)[:count].reshape(rows.shape)


def _round(rows: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """``values = rows / scale``, rounded to integers, with ``scale = max |rows| / 127``."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    largest = rows.abs().amax(-1, keepdim=True)
    steps = rows * (127 / largest.clamp_min(_TINY))
    if noise is None:
        steps = steps.round()
    else:
        # floor(step + u), with u = (noise + 2**7 + 1/2) / 2**8 between 0 and 1.
        steps = torch.add(steps, noise, alpha=2.0**-8).add_(0.5 + 2.0**-9).floor_()
    values = steps.clamp(-127, 127).to(torch.int8)
    # Of the greatest number 127 scale could be infinite, by rounding.
    info = torch.finfo(rows.dtype)
    scale = largest.clamp(_TINY, info.max * (1 - 4 * info.eps)) / 127
    return values, torch.where(largest.isfinite(), scale, torch.nan)


def _from_int8(values: Tensor, scale: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = torch.Size(shape).numel()
    x = values.to(scale.dtype).mul_(scale).to(dtype).reshape(-1)
    return x[:size].reshape(shape)


def _to_bits(mask: Tensor) -> Tensor:
    """A byte for eight of n values: bit i of byte j is value ``i n / 8 + j``, read in order."""
    mask = mask.reshape(-1)
    planes = F.pad(mask, (0, -mask.numel() % 8)).reshape(8, -1).to(torch.uint8)
    packed = planes[0]
    for bit in range(1, 8):
        packed = packed | planes[bit] << bit
    return packed


def _from_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    size = torch.Size(shape).numel()
    planes = torch.stack([packed >> bit & 1 for bit in range(8)])
    return planes.reshape(-1)[:size].to(torch.bool).reshape(shape)
