"""Data as values: what a loop over batches runs over."""

from collections.abc import Callable
from functools import lru_cache, partial
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from funcnet import runtime, tree
from funcnet.control_flow import scan
from funcnet.core import Tree
from funcnet.errors import require
from funcnet.random import bits, fold_in, permutation
from funcnet.threefry import MASK
from funcnet.tree.trees import shapes


def epoch_batches(key: Tensor | None, data: Tree, batch_size: int) -> Tree:
    """The batches of one epoch, stacked: what `scan` runs over.

    A last batch that is not full is left out, as in JAX's examples; the next epoch's key brings
    its data in.

    Args:
        key: shuffles the data; None keeps its order.
        data: a tree of tensors, or numpy arrays, of shape (n, ...), such as ``(x, target)``.
        batch_size: at most n.

    Returns:
        A tree of tensors of shape (n // batch_size, batch_size, ...).

    Raises:
        ValueError: the extents differ, or n is less than ``batch_size``.

    >>> import funcnet as fn
    >>> epoch_batches(fn.key(0), torch.arange(7), 3)
    tensor([[0, 1, 5],
            [6, 4, 3]])
    """
    data = on_device(None)(data)
    leaves = tree.leaves(data)
    size = _check("epoch_batches", data, batch_size)
    count = size // batch_size
    used = count * batch_size
    if key is None:
        return tree.map(lambda x: x[:used].unflatten(0, (count, batch_size)), data)
    order = permutation(key, size, device=leaves[0].device)[:used]
    return tree.map(lambda x: x[order].unflatten(0, (count, batch_size)), data)


def _check(name: str, data: Tree, batch_size: int) -> int:
    """The number of examples; raises unless batches of this size can be made of the data."""
    size = leading_extent(name, data)
    require(size, f"{name}: expects at least one example, got none")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"{name}: expects an integer batch_size, got {batch_size!r}")
    if not 1 <= batch_size <= size:
        raise ValueError(
            f"{name}: expects a batch_size from 1 to {size}, the number of examples, "
            f"got {batch_size}"
        )
    return size


def leading_extent(name: str, data: Tree, what: str = "tensors") -> int:
    """The extent of the first dimension, which all leaves must have in common."""
    extents = {tuple(getattr(leaf, "shape", ()))[:1] for leaf in tree.leaves(data)}
    if len(extents) != 1 or () in extents:
        got = tree.describe(data)
        raise ValueError(f"{name}: expects {what} with one leading extent, got {got}")
    return int(extents.pop()[0])


class Batches:
    """A source ``(key, step) -> batch``, with the number of batches of an epoch; see `batches`."""

    def __init__(self, data: Tree, batch_size: int, shuffle: bool, drop_last: bool) -> None:
        self.data, self.batch_size, self.shuffle = data, batch_size, shuffle
        self.size = _check("batches", data, batch_size)
        self.steps_per_epoch = self.size // batch_size
        self.last = 0 if drop_last else self.size % batch_size
        self.steps_per_epoch += self.last > 0
        self.on_tensors = all([isinstance(leaf, Tensor) for leaf in tree.leaves(data)])

    def __repr__(self) -> str:
        shuffled = "shuffled, " if self.shuffle else ""
        each = f"{self.steps_per_epoch} batches of {self.batch_size} an epoch"
        return f"Batches({shuffled}{each}, of {shapes(self.data)})"

    def __call__(self, key: Tensor, step: int | Tensor) -> Tree:
        """The batch of a step, of the run with this key."""
        rows = self.rows(key, step)
        return tree.map(partial(_take, rows=rows), self.data)

    def rows(self, key: Tensor, step: int | Tensor) -> Tensor:
        """The indices of the examples in the batch of a step."""
        number = runtime.read(step) if isinstance(step, Tensor) else step
        if number is None:
            require(
                self.on_tensors and not self.last,
                "batches: arrays of numpy, and a short last batch, need a step whose value can be "
                "read: call the source outside of jit, vmap and scan",
                TypeError,
            )
            places = step % self.steps_per_epoch * self.batch_size
            places = places + torch.arange(self.batch_size, device=key.device)
            epoch = step // self.steps_per_epoch
            return _order(key, epoch, places, self.size) if self.shuffle else places
        epoch, place = divmod(int(number), self.steps_per_epoch)
        begin = place * self.batch_size
        end = min(begin + self.batch_size, self.size)
        if not self.shuffle:
            return torch.arange(begin, end, device="cpu")
        words = runtime.read(key)
        if words is None:
            return _order(key, epoch, torch.arange(begin, end, device=key.device), self.size)
        # Of many batches at once, which takes as many operations as one.
        run = max(1, _BLOCK // self.batch_size) * self.batch_size
        start = begin // run * run
        block = _block(tuple(words), epoch, start, min(start + run, self.size), self.size)
        return block[begin - start : end - start]


def batches(
    data: Tree, batch_size: int, *, shuffle: bool = True, drop_last: bool = True
) -> Batches:
    """Batches as a pure function of a key and the number of a step: ``source(key, step)``.

    Epoch e is the steps from ``e * source.steps_per_epoch`` on. It goes over the data in an order
    of its own, which the key and e determine. So there is nothing to save but the step, and a run
    that is resumed sees the batches that it would have seen. `funcnet.fit` takes a source for
    batches.

    Args:
        data: a tree, such as ``(x, target)``, of tensors or numpy arrays of shape (n, ...). Of
            a memory-mapped array, ``np.load(path, mmap_mode="r")``, only the rows of the batch
            are read; it may be larger than memory.
        batch_size: at most n.
        shuffle: False keeps the order of the data.
        drop_last: False for a short batch at the end of each epoch, of the examples that are left.

    Returns:
        A function ``(key, step) -> batch``, with the attribute ``steps_per_epoch``. ``key`` is
        that of the run, and ``step`` an int or a 0-d tensor; a batch of tensors. Of tensors, in
        batches of one size, it may be called under `jit`, `vmap` and `scan`.

    A row's place in the order is computed by itself, with no work over all n: the pair (i, j) with
    ``place = i b + j`` is permuted in eight rounds, ``i = (i + F(j)) mod a`` and
    ``j = (j + F(i)) mod b`` in turn, F a hash with a key for each round. The few places of a x b
    that are no rows are left by repeating that. Up to 1024 rows are sorted by random numbers.

    Source: a generalized Feistel cipher, Black and Rogaway 2002.

    >>> source = batches((torch.arange(6), torch.arange(6) % 2), 2)
    >>> source.steps_per_epoch, source(fn.key(0), 0)
    (3, (tensor([4, 5]), tensor([0, 1])))
    >>> torch.cat([source(fn.key(0), step)[0] for step in range(3, 6)])
    tensor([5, 1, 3, 2, 0, 4])
    """
    for option, value in (("shuffle", shuffle), ("drop_last", drop_last)):
        if not isinstance(value, bool):
            raise TypeError(f"batches: expects a bool as {option}, got {value!r}")
    return Batches(data, batch_size, shuffle, drop_last)


_BLOCK = 1 << 16
_SORTED = 1024
_ROUNDS = 8


def _take(leaf: Any, rows: Tensor) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf[rows.to(leaf.device)]
    # The rows are copied, out of a file too.
    return torch.as_tensor(leaf[rows.cpu().numpy()])


@lru_cache(maxsize=8)
def _block(words: tuple[int, int], epoch: int, begin: int, end: int, size: int) -> Tensor:
    """The rows at the places from ``begin`` to ``end`` of an epoch."""
    with torch.inference_mode(False):
        key = torch.tensor(words, dtype=torch.int64, device="cpu")
        return _order(key, epoch, torch.arange(begin, end, device="cpu"), size)


def _order(key: Tensor, epoch: int | Tensor, places: Tensor, size: int) -> Tensor:
    """The rows at some places of an epoch."""
    key = fold_in(fold_in(key, "epochs"), epoch)
    if size <= _SORTED:
        return permutation(key, size, device=places.device)[places]
    a, b = _factors(size)
    keys = bits(key, (_ROUNDS // 2, 2), device=places.device)
    rows = _permuted(places, keys, a, b)
    # One of the a b - size other places is left after that many times.
    for _ in range(a * b - size):
        rows = torch.where(rows < size, rows, _permuted(rows, keys, a, b))
    return rows


def _factors(size: int) -> tuple[int, int]:
    """a and b near the root of a size, with ``a b >= size`` by as little as possible."""
    root = isqrt(size)
    a = min(range(root, root // 8, -1), key=lambda a: -size % a)
    return a, -(-size // a)


def _permuted(places: Tensor, keys: Tensor, a: int, b: int) -> Tensor:
    def two_rounds(carry: Any, keys: Tensor) -> Any:
        i, j = carry
        i = (i + _hash(j ^ keys[0])) % a
        return (i, (j + _hash(i ^ keys[1])) % b), None

    # A loop: written out, the compiler would compute a round for each use of it in the next one.
    (i, j), _ = scan(two_rounds, (places // b, places % b), keys)
    return i * b + j


def _hash(x: Tensor) -> Tensor:
    """Mixes the bits of 32-bit words: xor with a shift, and products that int64 can hold."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & MASK
    return (x >> 16) ^ x


def pair(name: str, batch: Any) -> tuple[Tree, Tree]:
    """The x and the target of a batch."""
    if not isinstance(batch, (tuple, list)):
        got = tree.describe(batch)
        raise ValueError(f"{name}: expects a batch (x, target), got {got}")
    if len(batch) != 2:
        raise ValueError(
            f"{name}: expects a batch (x, target), got {len(batch)} things: "
            f"{tree.describe(tuple(batch))}; several inputs are a tuple or a dict, ((a, b), target)"
        )
    return batch[0], batch[1]


def on_device(device: torch.device | None) -> Callable[[Any], Tree]:
    """``batch -> batch`` of tensors on a device; of arrays of numpy, and of other tensors."""

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            if not hasattr(leaf, "__array__"):
                got = type(leaf).__name__
                raise TypeError(f"expects tensors or arrays, got a {got} among them")
            if leaf.dtype.kind not in "biufc":
                raise TypeError(f"expects arrays of numbers, got one of dtype {leaf.dtype}")
            # Torch warns of memory that must not be written to, such as a file's.
            leaf = torch.as_tensor(leaf if leaf.flags.writeable else leaf.copy())
        if device is None or leaf.device == device:
            return leaf
        return leaf.to(device, non_blocking=True)

    return partial(tree.map, moved)


def on_device_of(params: Tree) -> Callable[[Any], Tree]:
    """`on_device` of the params."""
    return on_device(next((leaf.device for leaf in tree.leaves(params)), None))
