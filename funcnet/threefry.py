"""The hash behind the random numbers: Threefry-2x32 with 20 rounds.

From Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011. It maps
a key of two 32-bit words and a counter of two 32-bit words to two random words. Here tensors of
words have the dtype int32, whose addition wraps as that of unsigned words does.

The custom operators ``funcnet::threefry``, ``funcnet::threefry_at`` and ``funcnet::threefry_from``
hash many counters each. A recorded program has one of them where it would have a hundred elementary
operators.
"""

from typing import Any

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
"""The greatest 32-bit word."""

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def signed(word: Any) -> int:
    """The int32 with the bits of a 32-bit word."""
    word &= MASK
    return word - (1 << 32) if word >> 31 else word


def threefry_ints(k0: int, k1: int, x0: int, x1: int) -> tuple[int, int]:
    """Threefry-2x32 of one counter in Python integers: 3 us, where tensors take 150."""
    schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
    x0, x1 = (x0 + k0) & MASK, (x1 + k1) & MASK
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = (x0 + x1) & MASK
            x1 = (((x1 << rotation) | (x1 >> (32 - rotation))) & MASK) ^ x0
        x0 = (x0 + schedule[(group + 1) % 3]) & MASK
        x1 = (x1 + schedule[(group + 2) % 3] + group + 1) & MASK
    return x0, x1


def threefry_tensors(
    k0: int | Tensor, k1: int | Tensor, x0: int | Tensor, x1: Tensor
) -> tuple[Tensor, Tensor]:
    """Threefry-2x32 of int32 counters; the key is two ints or two int32 tensors.

    Works in place on buffers that it makes itself. The first sums are out of place, so that under
    vmap the buffers have a batch dimension if the key or the counter has one.
    """
    wrap = signed if isinstance(k0, int) else (lambda word: word)
    schedule = (k0, k1, wrap(k0 ^ k1 ^ _PARITY))
    x1 = x1 + k1
    x0 = x1 + (wrap(k0 + x0) if isinstance(x0, int) else x0 + k0)
    if x1.device.type == "meta":  # as in `summary`, where the rounds took half of the time
        return x0, x1
    for group in range(5):
        for turn, rotation in enumerate(_ROTATIONS[group % 2]):
            if group or turn:  # the first sum is made above
                x0 += x1
            # int32 is shifted right with its sign, which the mask removes.
            rotated = x1 >> (32 - rotation)
            rotated.bitwise_and_((1 << rotation) - 1)
            rotated.add_(x1, alpha=1 << rotation)
            rotated.bitwise_xor_(x0)
            x1 = rotated
        x0 += schedule[(group + 1) % 3]
        x1 += wrap(schedule[(group + 2) % 3] + group + 1)
    return x0, x1


def counters(start: int, n: int, device: torch.device) -> Tensor:
    """The low words of the counters start ... start + n - 1, as int32."""
    return torch.arange(start, start + n, device=device).to(torch.int32)


def hashes_from(k0: int | Tensor, k1: int | Tensor, start: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The hashes of the counters s ... s + n - 1 for each s of an int64 tensor: (*start, n)."""
    counter = start[..., None] + torch.arange(n, device=start.device)
    high, low = (counter >> 32).to(torch.int32), counter.to(torch.int32)
    return threefry_tensors(k0, k1, high, low)


_library = torch.library.Library("funcnet", "FRAGMENT")
_library.define("threefry(Tensor key, int start, int n) -> (Tensor, Tensor)")
_library.define("threefry_at(Tensor key, Tensor counter) -> (Tensor, Tensor)")
_library.define("threefry_from(Tensor key, Tensor start, int n) -> (Tensor, Tensor)")


@torch.library.impl(_library, "threefry", "CompositeExplicitAutograd")
def threefry_range(key: Tensor, start: int, n: int) -> tuple[Tensor, Tensor]:
    """The hashes of the counters start ... start + n - 1, all below 2**32."""
    return threefry_at(key, counters(start, n, key.device))


@torch.library.impl(_library, "threefry_at", "CompositeExplicitAutograd")
def threefry_at(key: Tensor, counter: Tensor) -> tuple[Tensor, Tensor]:
    """The hashes of an int32 tensor of counters; a key of shape (..., 2) broadcasts to it."""
    k0, k1 = key.to(torch.int32).unbind(-1)
    return threefry_tensors(k0, k1, 0, counter)


@torch.library.impl(_library, "threefry_from", "CompositeExplicitAutograd")
def threefry_from(key: Tensor, start: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The hashes of n counters from each number of an int64 tensor on, below 2**64."""
    k0, k1 = key.to(torch.int32).unbind(-1)
    return hashes_from(k0, k1, start, n)


@torch.library.register_fake("funcnet::threefry", lib=_library)
def _(key: Tensor, start: int, n: int) -> tuple[Tensor, Tensor]:
    words = [torch.empty(n, dtype=torch.int32, device=key.device) for _ in range(2)]
    return words[0], words[1]


@torch.library.register_fake("funcnet::threefry_at", lib=_library)
def _(key: Tensor, counter: Tensor) -> tuple[Tensor, Tensor]:
    words = [torch.empty_like(counter) for _ in range(2)]
    return words[0], words[1]


@torch.library.register_fake("funcnet::threefry_from", lib=_library)
def _(key: Tensor, start: Tensor, n: int) -> tuple[Tensor, Tensor]:
    shape = (*start.shape, n)
    words = [torch.empty(shape, dtype=torch.int32, device=start.device) for _ in range(2)]
    return words[0], words[1]


@torch.library.register_vmap("funcnet::threefry", lib=_library)
def _(info: Any, in_dims: Any, key: Tensor, start: int, n: int) -> Any:
    return _batched_threefry(info, (in_dims[0], None), key, counters(start, n, key.device))


@torch.library.register_vmap("funcnet::threefry_at", lib=_library)
def _batched_threefry(info: Any, in_dims: Any, key: Tensor, counter: Tensor) -> Any:
    if in_dims[0] is not None:
        key = key.movedim(in_dims[0], 0)
    if in_dims[1] is not None:
        counter = counter.movedim(in_dims[1], 0)
    k0, k1 = key.to(torch.int32).unbind(-1)
    if in_dims[0] is not None:
        ones = (1,) * (counter.dim() - (in_dims[1] is not None))
        k0, k1 = (word.reshape(-1, *ones) for word in (k0, k1))
    return threefry_tensors(k0, k1, 0, counter), (0, 0)


@torch.library.register_vmap("funcnet::threefry_from", lib=_library)
def _(info: Any, in_dims: Any, key: Tensor, start: Tensor, n: int) -> Any:
    mapped = in_dims[1] is not None
    start = start.movedim(in_dims[1], 0) if mapped else start
    words = key.to(torch.int32)
    if in_dims[0] is not None:
        words = words.movedim(in_dims[0], 0)
        words = words.reshape(-1, *[1] * (start.dim() - mapped + 1), 2)
    k0, k1 = words.unbind(-1)
    return hashes_from(k0, k1, start, n), (0, 0)
