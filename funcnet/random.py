"""Random numbers as pure functions of a key, as in JAX.

A key is an int64 tensor of shape (2,) that holds two 32-bit words. Every draw hashes counters
with the key by Threefry-2x32 with 20 rounds (Salmon, Moraes, Dror and Shaw, "Parallel random
numbers: as easy as 1, 2, 3", 2011), in the layout that JAX calls partitionable. `key`, `split`,
`fold_in`, `bits`, `randint` and `permutation` give exactly the numbers of ``jax.random``; the
floating-point draws equal JAX's up to rounding. A number depends only on the key and on its own
index: not on the device, nor on whether it is drawn eagerly, compiled, under vmap or after a
restart. ``start`` is the index of the first number that is drawn: of a longer draw, some of its
numbers. It is an integer or a 0-d tensor; or a tensor of the shape's first sizes, which has an
index for each slice.

Words are held in int64 tensors, because torch has no arithmetic for uint32.
"""

import math
import zlib

import torch
from torch import Tensor

from funcnet import reference
from funcnet.draws import Device, Shape, check_key, hash_range, key_words, unsigned
from funcnet.runtime import is_tracing, read
from funcnet.threefry import MASK, signed, threefry_ints, threefry_tensors

__docformat__ = "google"
__doc__ = reference.described(__name__, __doc__)
__all__ = reference.names(__name__)


def key(seed: int, *, device: Device = None) -> Tensor:
    """A key from a seed: the words ``(0, seed mod 2**32)``, as ``jax.random.key`` makes them.

    Its device is ``device``, by default torch's default device.

    >>> key(42)
    tensor([ 0, 42])
    """
    if not isinstance(seed, int):
        raise TypeError(f"key: expects an integer seed, got {type(seed).__name__}")
    return torch.tensor([0, seed & MASK], dtype=torch.int64, device=device)


def split(key: Tensor, n: int = 2) -> Tensor:
    """``n`` new keys, shape (n, 2), whose draws are independent of each other.

    >>> split(key(0))
    tensor([[1797259609, 2579123966],
            [ 928981903, 3453687069]])
    """
    return hash_range(key, (n,), None, lambda x0, x1: unsigned(torch.stack((x0, x1), -1)))


def fold_in(key: Tensor, data: int | str | Tensor) -> Tensor:
    """A new key from a key and an integer below 2**32, a 0-d integer tensor, or a name.

    A name is folded in as its CRC-32.

    >>> fold_in(key(3), 7)
    tensor([2647473427, 4234374204])
    """
    check_key(key)
    if isinstance(data, str):
        data = zlib.crc32(data.encode())
    if isinstance(data, Tensor) and not data.is_floating_point() and data.dim() == 0:
        counter = read(data)
    elif isinstance(data, int):
        counter = data
    else:
        raise TypeError(f"fold_in: expects an integer, a 0-d integer tensor or a str, got {data!r}")
    if counter is not None and not 0 <= counter <= MASK:
        raise ValueError(f"fold_in: expects an integer in [0, 2**32), got {counter}")
    words = read(key)
    if words is not None and counter is not None:
        hashed = threefry_ints(words[0], words[1], 0, counter)
        return torch.tensor(hashed, dtype=torch.int64, device=key.device)
    if is_tracing() and type(counter) is int:
        words = torch.ops.funcnet.threefry(key, counter, 1)
        return unsigned(torch.cat(words))
    if not isinstance(data, Tensor):
        # Unlike torch.tensor, it does not wait for a device.
        data = torch.full((), signed(data), dtype=torch.int32, device=key.device)
    data = data.to(device=key.device, dtype=torch.int32)
    if is_tracing():
        return unsigned(torch.stack(torch.ops.funcnet.threefry_at(key, data), -1))
    k0, k1 = key_words(key, key.device)
    return unsigned(torch.stack(threefry_tensors(k0, k1, 0, data), -1))


def bits(
    key: Tensor,
    shape: Shape = (),
    *,
    width: int = 32,
    device: Device = None,
    start: int | Tensor = 0,
) -> Tensor:
    """Random words of ``width`` 8, 16, 32 or 64 bits, in an int64 tensor of ``shape``.

    A word of 64 bits is returned as the int64 with the same bits. ``start`` is the index of the
    first one, in a longer draw with the same key; or those of the slices along the first
    dimensions.

    >>> bits(key(0), (3,))
    tensor([4070199207, 4202968722, 1427181096])
    >>> bits(key(0), (2,), start=1)
    tensor([4202968722, 1427181096])
    >>> bits(key(0), (2, 2), start=torch.tensor([1, 0]))
    tensor([[4202968722, 1427181096],
            [4070199207, 4202968722]])
    """
    if width not in (8, 16, 32, 64):
        raise ValueError(f"bits: expects a width of 8, 16, 32 or 64, got {width}")

    def finish(x0: Tensor, x1: Tensor) -> Tensor:
        if width == 64:
            return (x0.to(torch.int64) << 32) | unsigned(x1)
        return x0.bitwise_xor_(x1).to(torch.int64) & ((1 << width) - 1)

    return hash_range(key, shape, device, finish, start)


def uniform(
    key: Tensor,
    shape: Shape = (),
    dtype: torch.dtype = torch.float32,
    minval: float | Tensor = 0.0,
    maxval: float | Tensor = 1.0,
    *,
    device: Device = None,
    start: int | Tensor = 0,
) -> Tensor:
    """Uniform draws from [minval, maxval).

    On [0, 1) a draw is ``u = k 2**-m``, with m the number of bits of the dtype's mantissa, and k
    a random integer of m bits. On another interval it is ``minval + u (maxval - minval)``, which
    is rounded, and may be rounded up to maxval: rarely in float32, often in bfloat16 and float16,
    as in JAX. ``start`` as in `bits`.

    >>> uniform(key(42), (3,))
    tensor([0.4887, 0.6798, 0.6163])
    """
    mantissa = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
    if dtype not in mantissa:
        raise TypeError(f"uniform: expects a floating-point dtype, got {dtype}")
    kept = mantissa[dtype]
    # JAX draws the fewest bits, of 8, 16, 32 and 64, that fill the mantissa.
    width = {52: 64, 23: 32, 10: 16, 7: 8}[kept]

    def finish(x0: Tensor, x1: Tensor) -> Tensor:
        if width == 64:
            x = (((x0.to(torch.int64) << 32) | unsigned(x1)) >> 12) & ((1 << 52) - 1)
        else:
            x = x0.bitwise_xor_(x1).bitwise_right_shift_(width - kept)
            x = x.bitwise_and_((1 << kept) - 1)
        return x.to(dtype).mul_(2.0**-kept)

    unit = hash_range(key, shape, device, finish, start)
    if not isinstance(minval, Tensor) and not isinstance(maxval, Tensor):
        if (minval, maxval) == (0.0, 1.0):
            return unit
        # While a function is traced, a number's value is not known.
        if not is_tracing():
            # In place on our own buffer. The bounds are rounded to the dtype, as JAX rounds them.
            low, high = _rounded(minval, dtype), _rounded(maxval, dtype)
            return unit.mul_(_rounded(high - low, dtype)).add_(low).clamp(min=low)
    lowest, highest = (
        bound.to(unit.device, dtype)
        if isinstance(bound, Tensor)
        else torch.full((), bound, dtype=dtype, device=unit.device)
        for bound in (minval, maxval)
    )
    if torch.broadcast_shapes(unit.shape, lowest.shape, highest.shape) != unit.shape:
        raise ValueError(
            f"uniform: expects bounds that broadcast to {tuple(unit.shape)}, "
            f"got {tuple(lowest.shape)} and {tuple(highest.shape)}"
        )
    return torch.maximum(unit * (highest - lowest) + lowest, lowest)


def _rounded(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=dtype, device="cpu").item()


def _next(value: float, toward: float, dtype: torch.dtype) -> float:
    """The number of a dtype next to ``value`` in the direction of ``toward``."""
    start, end = (torch.tensor(number, dtype=dtype, device="cpu") for number in (value, toward))
    return torch.nextafter(start, end).item()


def normal(
    key: Tensor,
    shape: Shape = (),
    dtype: torch.dtype = torch.float32,
    *,
    device: Device = None,
    start: int | Tensor = 0,
) -> Tensor:
    """Draws from N(0, 1): ``sqrt(2) erfinv(u)`` with u uniform on (-1, 1); ``start`` as in `bits`.

    >>> normal(key(42), (3,))
    tensor([-0.0283,  0.4671,  0.2957])
    """
    if not dtype.is_floating_point:
        raise TypeError(f"normal: expects a floating-point dtype, got {dtype}")
    u = uniform(key, shape, dtype, _next(-1.0, 0.0, dtype), 1.0, device=device, start=start)
    return u.erfinv_().mul_(math.sqrt(2.0))


def truncated_normal(
    key: Tensor,
    lower: float = -2.0,
    upper: float = 2.0,
    shape: Shape = (),
    dtype: torch.dtype = torch.float32,
    *,
    device: Device = None,
    start: int | Tensor = 0,
) -> Tensor:
    """Draws from N(0, 1), conditioned on being in (lower, upper); ``start`` as in `bits`.

    >>> truncated_normal(key(42), -1.0, 1.0, (3,))
    tensor([-0.0193,  0.3127,  0.2003])
    """
    if not lower < upper:
        raise ValueError(f"truncated_normal: expects lower < upper, got {lower} and {upper}")
    low, high = (math.erf(bound / math.sqrt(2.0)) for bound in (lower, upper))
    u = uniform(key, shape, dtype, low, high, device=device, start=start)
    inside = _next(lower, math.inf, dtype), _next(upper, -math.inf, dtype)
    return u.erfinv_().mul_(math.sqrt(2.0)).clamp(*inside)


def bernoulli(
    key: Tensor,
    p: float | Tensor = 0.5,
    shape: Shape | None = None,
    *,
    device: Device = None,
    start: int | Tensor = 0,
) -> Tensor:
    """Booleans that are True with probability ``p``: ``uniform(key, shape) < p``.

    ``start`` as in `bits`.

    >>> bernoulli(key(42), 0.5, (3,))
    tensor([ True, False, False])
    """
    if isinstance(p, Tensor):
        shape = p.shape if shape is None else shape
        if torch.broadcast_shapes(p.shape, tuple(shape)) != tuple(shape):
            raise ValueError(
                f"bernoulli: expects p that broadcasts to {tuple(shape)}, got {tuple(p.shape)}"
            )
        dtype, device = p.dtype, device if device is not None else p.device
    else:
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"bernoulli: expects a probability in [0, 1], got {p}")
        shape, dtype = () if shape is None else shape, torch.float32
    return uniform(key, shape, dtype, device=device, start=start) < p


def randint(
    key: Tensor,
    shape: Shape,
    minval: int,
    maxval: int,
    dtype: torch.dtype = torch.int64,
    *,
    device: Device = None,
    start: int | Tensor = 0,
) -> Tensor:
    """Integers from [minval, maxval): the remainder of random words of twice the dtype's width.

    The bias is below ``(maxval - minval) / 2**64``; ``maxval - minval`` is at most 2**31. ``start``
    as in `bits`.

    >>> randint(key(42), (3,), 0, 10, torch.int32)
    tensor([4, 4, 1], dtype=torch.int32)
    """
    width = {torch.int32: 32, torch.int64: 64}.get(dtype)
    if width is None:
        raise TypeError(f"randint: expects dtype int32 or int64, got {dtype}")
    if not isinstance(minval, int) or not isinstance(maxval, int):
        raise TypeError(f"randint: expects integer bounds, got {minval!r} and {maxval!r}")
    limits = torch.iinfo(dtype)
    if not (limits.min <= minval <= limits.max and limits.min <= maxval <= limits.max):
        raise ValueError(f"randint: expects bounds within {dtype}, got {minval} and {maxval}")
    span = max(maxval - minval, 1)
    if span > 1 << 31:
        raise ValueError(f"randint: expects a span of at most 2**31, got {span}")
    # JAX computes in unsigned words of the width, which wrap; with 64 bits nothing wraps here.
    multiplier = (((1 << width // 2) % span) ** 2 % (1 << width)) % span

    def remainder(words: Tensor) -> Tensor:
        if width == 32:
            return words % span
        low, high = words & MASK, (words >> 32) & MASK
        return ((high % span) * ((1 << 32) % span) + low % span) % span

    higher, lower = (
        bits(child, shape, width=width, device=device, start=start) for child in split(key)
    )
    offset = remainder(higher) * multiplier + remainder(lower)
    if width == 32:
        offset = offset & MASK
    return (offset % span + minval).to(dtype)


def permutation(key: Tensor, x: int | Tensor, axis: int = 0, *, device: Device = None) -> Tensor:
    """``0 ... x-1``, or the slices of a tensor along ``axis``, in random order.

    >>> permutation(key(42), 5)
    tensor([4, 2, 3, 0, 1])
    """
    if isinstance(x, Tensor):
        order = permutation(key, x.shape[axis], device=x.device)
        return x.index_select(axis, order)
    order = torch.arange(x, device=device if device is not None else key.device)
    # The 32-bit sort keys may tie: sort again until an order due to ties is unlikely, as JAX does.
    for _ in range(math.ceil(3 * math.log(max(1, x)) / math.log(MASK))):
        key, subkey = split(key).unbind()
        words = bits(subkey, (x,), device=order.device)
        order = order[torch.sort(words, stable=True).indices]
    return order


def categorical(key: Tensor, logits: Tensor, axis: int = -1, shape: Shape | None = None) -> Tensor:
    """Indices drawn with probabilities ``softmax(logits, axis)``, by the Gumbel-max trick.

    ``shape`` ends in the shape of ``logits`` without ``axis``, which is its default.

    >>> categorical(key(42), torch.zeros(3, 4))
    tensor([1, 3, 3])
    """
    batch = list(logits.shape)
    classes = batch.pop(axis)
    shape = tuple(batch if shape is None else shape)
    prefix = shape[: len(shape) - len(batch)]
    if shape[len(prefix) :] != tuple(batch):
        raise ValueError(f"categorical: expects a shape that ends in {tuple(batch)}, got {shape}")
    axis = axis % logits.dim() - logits.dim()
    full = list(shape)
    full.insert(len(full) + axis + 1, classes)
    tiny = torch.finfo(logits.dtype).tiny
    u = uniform(key, full, logits.dtype, tiny, 1.0, device=logits.device)
    return (logits - torch.log(-torch.log(u))).argmax(axis)
