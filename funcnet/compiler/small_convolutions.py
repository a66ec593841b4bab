"""Small convolutions in maps, as products of matrices.

A member of a population has images of which PyTorch's call takes longer than the arithmetic, which
is a product of few rows and columns: of 100 nets for images of 8 x 8, a step takes half the time so
(``compare.py --only "digits CNN"``).
"""

from typing import Any

import torch
from torch import Tensor

from funcnet.compiler.loops import Control
from funcnet.compiler.nodes import Graph, Node, graph_break, value_of

aten = torch.ops.aten

_MOST = 2**18
"""The greatest number of values in the windows of all images, 1 MiB of float32."""


def make_products(graph: Graph, loops: list[Control]) -> bool:
    """Have small convolutions in maps computed by products; whether there are any.

    The graph is to be recorded anew then: their nodes call a function of this module.
    """
    maps: list[bool] = []
    changed = False
    for node in graph.nodes:
        operator = graph_break(node)
        if operator == "funcnet::begin":
            maps.append(loops[node.args[1]].is_map)
        elif operator == "funcnet::end":
            maps.pop()
        elif any(maps) and node.target in _FUNCTIONS and _fits(node):
            node.target = _FUNCTIONS[node.target]
            changed = True
    return changed


def _fits(node: Node) -> bool:
    if node.target is aten.convolution.default:
        (x, weight), geometry, wants_dx = node.args[:2], node.args[3:9], False
    else:
        (x, weight), geometry, wants_dx = node.args[1:3], node.args[4:10], node.args[10][0]
    x, weight = value_of(x), value_of(weight)
    stride, padding, dilation, transposed, _, groups = geometry
    plain = x.dim() == 4 and x.is_cpu and x.dtype in (torch.float32, torch.float64)
    if not plain or transposed or groups != 1 or [*dilation] != [1, 1] or not x.numel():
        return False
    kernel = weight.shape[2:]
    # The gradient of x is a convolution itself, if no window is left out.
    whole = [*stride] == [1, 1] and all([p < k for p, k in zip(padding, kernel, strict=True)])
    if wants_dx and not whole:
        return False
    sizes = zip(x.shape[2:], kernel, stride, padding, strict=True)
    height, width = [(n + 2 * p - k) // s + 1 for n, k, s, p in sizes]
    return x.shape[0] * height * width * weight[0].numel() <= _MOST


def _windows(x: Tensor, kernel: Any, stride: Any, padding: Any) -> Tensor:
    """What the kernel sees, as rows: (images * places, channels * points), and the places."""
    (height, width), (top, left) = kernel, padding
    x = aten.constant_pad_nd(x, [left, left, top, top]).permute(0, 2, 3, 1)
    return x.unfold(1, height, stride[0]).unfold(2, width, stride[1])


def _product(windows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The images whose rows are ``windows weight^T + bias``."""
    rows = windows.reshape(-1, weight[0].numel())
    matrix = weight.reshape(len(weight), -1).t()
    y = rows @ matrix if bias is None else torch.addmm(bias, rows, matrix)
    return y.reshape(*windows.shape[:3], len(weight)).permute(0, 3, 1, 2).contiguous()


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, *rest: Any
) -> Tensor:
    """``aten::convolution``."""
    return _product(_windows(x, weight.shape[2:], stride, padding), weight, bias)


def convolution_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    *rest: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``aten::convolution_backward``: dx is dy convolved with the weight turned round."""
    wanted, kernel = rest[-1], weight.shape[2:]
    dx = dweight = None
    if wanted[0]:
        around = [size - 1 - each for size, each in zip(kernel, padding, strict=True)]
        turned = weight.flip(2, 3).transpose(0, 1)
        dx = _product(_windows(dy, kernel, (1, 1), around), turned)
    if wanted[1]:
        rows = _windows(x, kernel, stride, padding).reshape(-1, weight[0].numel())
        columns = dy.permute(0, 2, 3, 1).reshape(-1, len(weight))
        dweight = (columns.t() @ rows).reshape(weight.shape)
    return dx, dweight, dy.sum([0, 2, 3]) if wanted[2] else None


_FUNCTIONS = {
    aten.convolution.default: convolution,
    aten.convolution_backward.default: convolution_backward,
}
