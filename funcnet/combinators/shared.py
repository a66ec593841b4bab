"""`shared`: one layer for several inputs."""

from collections.abc import Mapping

from funcnet import tree
from funcnet.combinators.combine import Pull, Run, combine
from funcnet.core import Layer, Tree


def shared_forward(run: Run, x: tuple[Tree, ...]) -> tuple[Tree, Mapping[str, Tree]]:
    """The layer of each input."""
    if type(x) is not tuple or not x:
        raise ValueError(f"shared: expects a tuple of inputs, got {tree.describe(x)}")
    return tuple([run("", piece, use=index) for index, piece in enumerate(x)]), {}


def shared_backward(pull: Pull, dy: tuple[Tree, ...], residuals: Mapping[str, Tree]) -> Tree:
    """The pullback of each use; their gradients are summed."""
    uses = enumerate(dy)
    return tuple([pull("", piece, use=index, needed=pull.x) for index, piece in uses])


def shared(layer: Layer) -> Layer:
    """One layer, with one set of parameters, applied to each of a tuple of inputs.

    State passes from one use to the next; the key is folded by the index of the input.

    Args:
        layer: the one that is applied.

    Inputs:
        x, a tuple of trees of one shape.
    Returns:
        y, a tuple.
    Learned params:
        those of the layer.
    VJP:
        ``dparams`` is the sum over the uses.

    Source: siamese networks, Bromley et al. 1993.

    >>> import torch
    >>> import funcnet as fn
    >>> net = fn.shared(fn.linear(1, bias=False))
    >>> y, pullback, _ = net.vjp({"weight": torch.ones(1, 2)}, (torch.ones(2), torch.zeros(2)))
    >>> y
    (tensor([2.]), tensor([0.]))
    >>> pullback((torch.ones(1), torch.ones(1)))[0]
    {'weight': tensor([[1., 1.]])}
    """
    return combine("shared", {"": layer}, shared_forward, shared_backward)
