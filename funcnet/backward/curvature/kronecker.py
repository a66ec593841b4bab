"""Kronecker factors of the Fisher matrix: what a linear layer's deferred gradients tell of it."""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from funcnet.checks import check_kind
from funcnet.deferred import Deferred
from funcnet.errors import require
from funcnet.layers.linear import linear_rule
from funcnet.tree import describe


class KroneckerFactors(NamedTuple):
    """``A``, of a layer's inputs, and ``G``, of the cotangents of its outputs."""

    inputs: Tensor
    outputs: Tensor


class Rows(NamedTuple):
    """Inputs of a linear layer, with a 1 for its bias, and cotangents of one example's loss.

    Both have the examples first and the features last.
    """

    x: Tensor
    dy: Tensor

    def factors(self) -> KroneckerFactors:
        """The mean of ``x x^T``, and the mean over examples of the sums of ``dy dy^T``."""
        x, dy = self.x.flatten(0, -2), self.dy.flatten(0, -2)
        return KroneckerFactors(x.mT @ x / max(len(x), 1), dy.mT @ dy / max(len(self.dy), 1))

    def slopes(self, direction: Tensor) -> Tensor:
        """``<g, direction>`` for the gradient g of each example, which is not made."""
        return (torch.matmul(self.x, direction.mT) * self.dy).flatten(1).sum(1)


def linear_rows(
    deferred: Deferred, layers: Collection[str] | None = None, name: str = "linear_rows"
) -> dict[str, list[Rows]]:
    """The rows of the linear layers by path; several of one that is used several times.

    Args:
        deferred: gradients of the mean of the examples' losses.
        layers: the paths; default all linear layers.
        name: whose errors they are.

    Raises:
        ValueError: no linear layer is at one of these paths, or its examples are not first.
    """
    found: dict[str, list[Rows]] = {}
    terms = [each for each in deferred.terms() if layers is None or each[0] in layers]
    sizes = [len(dy) for _, term in terms if isinstance(dy := term.parts["dy"], Tensor)]
    for path, term in terms:
        pullback, dy = term.parts["pullback"], term.parts["dy"]
        if pullback.rule is not linear_rule:
            continue
        x, (bias,) = pullback.residuals["x"], pullback.static
        first = x.dim() > 1 and len(x) == sizes[0]
        got = f"{describe(x)} where the first layer has {sizes[0]} examples"
        require(first, f"{name}: {path!r} expects the examples in the first dimension, got {got}")
        wide = torch.promote_types(x.dtype, torch.float32)
        x, dy = x.to(wide), dy.to(wide) * len(x)
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1) if bias else x
        found.setdefault(path, []).append(Rows(x, dy))
    missing = sorted(set(layers or ()) - found.keys())
    require(not missing, f"{name}: expects linear layers, not what is at {missing}")
    return found


def kronecker_factors(deferred: Deferred) -> dict[str, KroneckerFactors]:
    """The Kronecker factors of each linear layer's block of the Fisher matrix, by its path.

    ``F = E[g g^T]`` with ``g = dy x^T`` is about ``E[x x^T] (x) E[dy dy^T] = A (x) G``, where x has
    a 1 behind it if there is a bias. An example with several positions, as in a sequence, has the
    sum of theirs in G.

    Args:
        deferred: gradients of the mean of the examples' losses, with the examples in the first
            dimension of each layer's x. With targets that are drawn from the model's prediction
            they are those of the Fisher matrix, with the data's those of the empirical one.

    Returns:
        `KroneckerFactors` (A, G) by path.
    Raises:
        ValueError: a layer whose x has not the examples first.

    Source: Martens and Grosse 2015; Eschenhagen et al. 2023, "K-FAC expand", for positions.

    >>> import funcnet as fn
    >>> net, x = fn.linear(1), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    >>> params, _ = net.init(fn.key(0), x)
    >>> _, pullback, _ = net.vjp(params, x)
    >>> deferred, _ = fn.defer(pullback)(torch.tensor([[0.5], [1.0]]))
    >>> kronecker_factors(deferred)[""]
    KroneckerFactors(inputs=tensor([[5., 1., 2.],
            [1., 2., 1.],
            [2., 1., 1.]]), outputs=tensor([[2.5000]]))
    """
    check_kind("kronecker_factors", deferred, Deferred)
    found = linear_rows(deferred, name="kronecker_factors")
    return {path: factors_of(rows) for path, rows in found.items()}


def factors_of(uses: list[Rows]) -> KroneckerFactors:
    """Those of a layer that is used several times: the mean of A, and the sum of G."""
    found = [rows.factors() for rows in uses]
    inputs, outputs = (torch.stack(each) for each in zip(*found, strict=True))
    return KroneckerFactors(inputs.mean(0), outputs.sum(0))
