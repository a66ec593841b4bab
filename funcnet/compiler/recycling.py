"""Memory for the results of a program: that of earlier results which nobody has any more."""

import sys

import torch
from torch import Tensor

from funcnet.compiler.specs import Spec

_LEAST_BYTES = 2**18
"""The size from which on results get memory from a pool."""
_FIRST_CALLS = 2
"""How many calls keep no memory: a function that makes params is called once."""
_MOST = 2
"""How many results are remembered: one that the next call may read, and one to write to."""

_Memory = tuple[Tensor, torch.UntypedStorage]
"""A tensor and its storage."""


def _holders(memory: _Memory) -> tuple[int, int]:
    """How many have the storage: in C++, as tensors do, and in Python, as one has it from a tensor.

    >>> tensor = torch.ones(2)
    >>> memory = tensor, tensor.untyped_storage()
    >>> before = _holders(memory)
    >>> view, storage = tensor[1:], tensor.untyped_storage()
    >>> [now - then for now, then in zip(_holders(memory), before)]
    [1, 1]
    """
    return torch._C._storage_Use_Count(memory[1]._cdata), sys.getrefcount(memory[1])


def _of_nobody_else() -> tuple[int, int]:
    tensor = torch.empty(1)
    return _holders((tensor, tensor.untyped_storage()))


_ALONE = _of_nobody_else()


class Pool:
    """The memory of one result of a program, call after call.

    New memory of a large tensor comes from the operating system page by page: that is half of the
    time that the first half of a CNN's backward pass takes (17.5 to 10.7 ms, `first` in
    tests/benchmarks/deferred.py). So the last results are remembered; one that nobody else has is
    the next result. Threads may call a program at the same time: what one looks at, it takes out of
    the pool.

    Args:
        spec: of the result.

    >>> pool = Pool(Spec((1000, 1000), torch.float32, torch.device("cpu")))
    >>> first, second = pool.new(), pool.new()
    >>> kept = pool.new()
    >>> address = kept.data_ptr()
    >>> del kept
    >>> pool.new().data_ptr() == address
    True
    """

    def __init__(self, spec: Spec) -> None:
        self._spec, self._bytes = spec, spec.bytes
        self._calls = 0
        self._known: list[_Memory] = []

    @classmethod
    def of(cls, spec: Spec) -> "Pool | None":
        """A pool for a result, if it is large and on the CPU."""
        large = spec.bytes >= _LEAST_BYTES
        return cls(spec) if large and spec.device.type == "cpu" else None

    def new(self) -> Tensor:
        """A tensor whose values are not set, and whose memory nobody else has."""
        if self._calls < _FIRST_CALLS or torch.is_inference_mode_enabled():
            self._calls += 1
            return self._spec.empty()
        memory = self._free()
        if memory is None:
            tensor = self._spec.empty()
            memory = tensor, tensor.untyped_storage()
        result = memory[0].data
        self._known.append(memory)
        del self._known[:-_MOST]
        return result

    def _free(self) -> _Memory | None:
        """What nobody else has, taken out of the pool."""
        for _ in range(len(self._known)):
            try:
                memory = self._known.pop(0)
            except IndexError:  # another thread has it
                return None
            # Somebody may have resized it.
            if _holders(memory) == _ALONE and memory[1].nbytes() == self._bytes:
                return memory
            self._known.append(memory)
        return None

    def clear(self) -> None:
        """Forget all of it."""
        self._known.clear()
