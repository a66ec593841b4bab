"""Trees of numpy arrays, and of arrays of other libraries by DLPack."""

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import Tree
from funcnet.errors import locate, require


def _map(name: str, function: Callable[[Any], Any], node: Tree) -> Tree:
    """``function`` leaf by leaf; its errors get the leaf's path in front."""

    def each(path: Any, leaf: Any) -> Any:
        try:
            return function(leaf)
        except Exception as error:
            at = f" at {tree.path_string(path)!r}" if path else ""
            locate(error, f"{name}:{at}")
            raise

    return optree.tree_map_with_path(each, node)


def _plain(leaf: Any) -> Tensor:
    wrong = f"expects a tensor, got {type(leaf).__name__}"
    require(isinstance(leaf, Tensor), wrong, TypeError)
    return leaf.detach().resolve_conj().resolve_neg()


def to_numpy(tensors: Tree) -> Tree:
    """A tree of tensors as one of numpy arrays.

    Args:
        tensors: any tree.

    Returns:
        arrays that share the memory of tensors on the CPU: do not write to them. Tensors of other
        devices are copied.
    Raises:
        TypeError: a leaf that is no tensor, or of a dtype that numpy does not have, such as
            bfloat16; with its path.
        ImportError: without numpy.

    Source: ``torch.Tensor.numpy``.

    >>> to_numpy({"weight": torch.ones(2)})
    {'weight': array([1., 1.], dtype=float32)}
    """

    def each(leaf: Any) -> Any:
        leaf = _plain(leaf)
        if leaf.dtype == torch.bfloat16:
            raise TypeError("numpy has no bfloat16; use fn.tree.map(torch.Tensor.float, tensors)")
        return leaf.cpu().numpy()

    _numpy()
    return _map("to_numpy", each, tensors)


def from_numpy(arrays: Tree) -> Tree:
    """A tree of numpy arrays as one of tensors on the CPU.

    Args:
        arrays: any tree of arrays, numpy's scalars and Python numbers.

    Returns:
        tensors that share the memory of the arrays; an array that cannot be written to, or has a
        negative stride or another byte order, is copied.
    Raises:
        TypeError: a dtype that torch does not have, such as that of strings; with its path.
        ImportError: without numpy.

    Source: ``torch.from_numpy``.

    >>> import numpy as np
    >>> from_numpy({"weight": np.arange(3.0), "step": np.int64(2)})
    {'weight': tensor([0., 1., 2.], dtype=torch.float64), 'step': tensor(2)}
    """
    np = _numpy()

    def each(leaf: Any) -> Tensor:
        array = np.asarray(leaf)
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if not array.flags.writeable or any([stride < 0 for stride in array.strides]):
            array = array.copy()
        try:
            return torch.from_numpy(array)
        except TypeError:
            wrong = f"expects an array of numbers, got {array.dtype} {array.shape}"
            raise TypeError(wrong) from None

    return _map("from_numpy", each, arrays)


def to_dlpack(tensors: Tree, from_dlpack: Callable[[Tensor], Any]) -> Tree:
    """A tree of tensors as one of another library's arrays, by DLPack.

    Args:
        tensors: any tree.
        from_dlpack: the other library's, such as ``np.from_dlpack``, ``jax.dlpack.from_dlpack``
            or ``cupy.from_dlpack``.

    Returns:
        arrays that share the memory of the tensors, if the library does not copy: neither may be
        written to while the other is in use. Where the arrays cannot change, as in JAX, the tensors
        must not.
    Raises:
        the library's errors, with the leaf's path in front.

    Source: https://dmlc.github.io/dlpack, ``torch.Tensor.__dlpack__``.

    >>> import numpy as np
    >>> to_dlpack({"weight": torch.ones(2)}, np.from_dlpack)
    {'weight': array([1., 1.], dtype=float32)}
    """
    return _map("to_dlpack", lambda leaf: from_dlpack(_plain(leaf)), tensors)


def from_dlpack(arrays: Tree) -> Tree:
    """A tree of arrays of any library that has DLPack, as one of tensors on the same devices.

    Args:
        arrays: any tree of arrays with a method ``__dlpack__``: of numpy, JAX, CuPy, ...

    Returns:
        tensors that share the memory of the arrays, if the library does not copy. Clone them before
        anything writes to them, ``jit(..., donate=)`` included.
    Raises:
        TypeError: a leaf without ``__dlpack__``; with its path.

    Source: ``torch.from_dlpack``.

    >>> import numpy as np
    >>> from_dlpack({"weight": np.ones(2, np.float32)})
    {'weight': tensor([1., 1.])}
    """

    def each(leaf: Any) -> Tensor:
        wrong = f"expects an array with __dlpack__, got {type(leaf).__name__}"
        require(hasattr(leaf, "__dlpack__"), wrong, TypeError)
        return torch.from_dlpack(leaf)

    return _map("from_dlpack", each, arrays)


def _numpy() -> Any:
    try:
        import numpy
    except ImportError as error:
        raise ImportError("funcnet.interop: needs numpy; pip install numpy") from error
    return numpy
