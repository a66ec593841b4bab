"""`export`: a layer as a program of ``torch.export``, or as an ONNX file."""

import importlib.util
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import EMPTY, Layer, Params, Tree
from funcnet.errors import require
from funcnet.interop.layer_module import to_module


def export(
    layer: Layer,
    params: Params,
    x: Tree,
    state: Params = EMPTY,
    *,
    dynamic_batch: bool = False,
    onnx: str | PathLike[str] | None = None,
) -> Any:
    """The layer's ``apply`` with ``train=False`` as a program that runs without funcnet.

    Args:
        layer, params, state: what is exported, by way of `to_module`.
        x: an example input: its shapes, dtypes and structure are those of the program. The parts of
            a tuple are the program's arguments; a dict is one argument.
        dynamic_batch: whether the first dimension of all tensors in x, which then must be at
            least 2, may have any size.
        onnx: the path of an ONNX file to write, too. It needs the packages onnx and onnxscript.

    Returns:
        a ``torch.export.ExportedProgram``; ``.module()`` runs it, ``torch.export.save`` saves it,
        and its ``state_dict`` has the dotted paths of params and state as keys.
    Raises:
        ImportError: a package is missing.
        ValueError: the size of the batch matters for what is computed, with dynamic_batch;
            torch's errors for what cannot be exported.

    Source: ``torch.export.export``, ``torch.onnx.export``.

    >>> import funcnet as fn
    >>> net, x = fn.serial(fn.linear(3), fn.relu()), torch.ones(4, 2)
    >>> params, _ = net.init(fn.key(0), x)
    >>> program = fn.interop.export(net, params, x, dynamic_batch=True)
    >>> program.module()(torch.ones(7, 2)).shape
    torch.Size([7, 3])
    """
    if onnx is not None:
        missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
        if missing:
            raise ImportError(
                f"export: onnx= needs {' and '.join(missing)}; pip install onnx onnxscript"
            )
    module = to_module(layer, params, state).eval().requires_grad_(False)
    args = x if type(x) is tuple else (x,)
    shapes = {"args": tree.map(_free_batch, args)} if dynamic_batch else None
    with torch.no_grad():
        program = torch.export.export(module, args, dynamic_shapes=shapes)
        if onnx is not None:
            torch.onnx.export(program, args, str(onnx), dynamo=True, verbose=False)
    return program


def _free_batch(leaf: Any) -> dict[int, Any]:
    """The dimensions of a tensor that may have any size; in all tensors the same one."""
    several = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] > 1
    expected = "tensors (batch, *) of at least 2 examples"
    require(several, f"export: dynamic_batch expects {expected}, got {tree.describe(leaf)}")
    return {0: torch.export.Dim("batch")}
