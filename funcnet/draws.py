"""Hashes of many counters with one key: what the draws of `funcnet.random` are made of."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from funcnet.runtime import is_tracing, read
from funcnet.threefry import MASK, counters, hashes_from, signed, threefry_tensors

Shape = Sequence[int]
Device = torch.device | str | None

# Of the sizes from 2**12 to 2**17 the fastest on CPUs with 1 MiB of L2 cache a core.
_BLOCK = 1 << 16


def check_key(key: Tensor) -> None:
    """Raise unless it is one key."""
    if not isinstance(key, Tensor) or key.dtype != torch.int64 or key.shape[-1:] != (2,):
        what = f"{key.dtype} {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)
        raise TypeError(
            f"expected a key, an int64 tensor of shape (2,) such as fn.key(0), got {what}"
        )
    if key.dim() != 1:
        raise ValueError(f"expected one key, got keys of shape {tuple(key.shape)}; use fn.vmap")


def key_words(key: Tensor, device: Device) -> tuple[int, int] | tuple[Tensor, Tensor]:
    """Its words as int32: numbers where they can be read, else tensors."""
    words = read(key)
    if words is not None:
        return signed(words[0]), signed(words[1])
    k0, k1 = key.to(device=device, dtype=torch.int32).unbind()
    return k0, k1


def hash_range(
    key: Tensor,
    shape: Shape,
    device: Device,
    finish: Callable[[Tensor, Tensor], Tensor],
    start: int | Tensor = 0,
) -> Tensor:
    """``finish(x0, x1)`` of the hashes of start ... start + n-1, in blocks that stay in the cache.

    A start of several numbers is that of each slice of the shape, along its first dimensions.
    """
    check_key(key)
    if any(extent < 0 for extent in shape):
        raise ValueError(f"expected a shape without negative sizes, got {tuple(shape)}")
    size = math.prod(shape)
    device = torch.device(device) if device is not None else key.device
    if not isinstance(start, int):
        start = _start(start, shape)
    if isinstance(start, Tensor):
        hashed = finish(*_hash_from(key, start, size // max(start.numel(), 1), device))
        return hashed.reshape((*shape, *hashed.shape[1:]))
    if start < 0:
        raise ValueError(f"expected a start of at least 0, got {start}")
    end = start + size
    if is_tracing() and end <= 1 << 32:
        hashed = finish(*torch.ops.funcnet.threefry(key.to(device), start, size))
        return hashed.reshape((*shape, *hashed.shape[1:]))
    k0, k1 = key_words(key, device)
    blocks: list[Tensor] = []
    block = max(size, 1) if device.type == "meta" else _BLOCK
    while start < end or not blocks:
        # No block goes beyond a multiple of 2**32, so the high word is one number a block.
        stop = min(end, start + block, ((start >> 32) + 1) << 32)
        high, low = signed(start >> 32), counters(start & MASK, stop - start, device)
        blocks.append(finish(*threefry_tensors(k0, k1, high, low)))
        start = stop
    hashed = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    return hashed.reshape((*shape, *hashed.shape[1:]))


def _start(start: Tensor, shape: Shape) -> int | Tensor:
    """The first index, as a number where that can be read; those of the slices otherwise."""
    if not isinstance(start, Tensor) or start.is_floating_point():
        raise TypeError(f"expected a start of integers, got {start!r}")
    if tuple(shape[: start.dim()]) != tuple(start.shape):
        raise ValueError(
            f"expected a start of the first sizes of {tuple(shape)}, got {tuple(start.shape)}"
        )
    value = read(start) if start.dim() == 0 else None
    return start if value is None else int(value)


def _hash_from(
    key: Tensor, start: Tensor, count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The hashes of ``count`` counters from each start on, as two vectors."""
    start = start.to(device, torch.int64)
    if is_tracing():
        x0, x1 = torch.ops.funcnet.threefry_from(key.to(device), start, count)
    else:
        k0, k1 = key_words(key, device)
        x0, x1 = hashes_from(k0, k1, start, count)
    return x0.flatten(), x1.flatten()


def unsigned(word: Tensor) -> Tensor:
    """The 32-bit words of an int32 tensor, as int64."""
    return word.to(torch.int64) & MASK
