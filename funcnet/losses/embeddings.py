"""Losses of how near embeddings are: `cosine_embedding`, `triplet_margin` and of any distance."""

from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.checks import check_kind
from funcnet.core import Layer, Loss
from funcnet.layers.distances import pairwise_distance
from funcnet.losses.checks import check_several, check_signs, labels, refuse_reduction
from funcnet.losses.lift import Elements, from_formulas, loss_of, times

Pair = tuple[Tensor, Tensor]

EPSILON = 9.999999960041972e-13
"""What PyTorch adds to a squared length: 1e-12 in float32, whatever the dtype."""


def _cosine(prediction: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """The cosine of each two vectors, and their squared lengths, kept from 0."""
    x1, x2 = prediction
    first, second = x1.square().sum(-1) + EPSILON, x2.square().sum(-1) + EPSILON
    return (x1 * x2).sum(-1) / (first * second).sqrt(), first, second


def _cosine_embedding(prediction: Pair, target: Tensor, margin: float) -> Tensor:
    cosine, _, _ = _cosine(prediction)
    return torch.where(target == 1, 1 - cosine, (cosine - margin).clamp(min=0))


def _cosine_embedding_derivative(prediction: Pair, target: Tensor, margin: float) -> Pair:
    x1, x2 = prediction
    cosine, first, second = _cosine(prediction)
    slope = torch.where(target == 1, -1.0, (cosine >= margin).to(cosine.dtype))
    across = (slope / (first * second).sqrt()).unsqueeze(-1)
    along = slope * cosine
    return (
        across * x2 - (along / first).unsqueeze(-1) * x1,
        across * x1 - (along / second).unsqueeze(-1) * x2,
    )


def _check_vectors(name: str, prediction: Pair, target: Tensor) -> Tensor:
    check_several(name, prediction, ("x1", "x2"))
    shape = tuple(prediction[0].shape)
    if len(shape) not in (1, 2):
        raise ValueError(
            f"{name}: expects x1 of shape (batch, features) or (features,), got {shape}"
        )
    target = labels(name, target, prediction[0], shape[:-1])
    check_signs(name, target)
    return target


def cosine_embedding(margin: float = 0.0, reduction: str = "mean") -> Loss:
    """``1 - cos(x1, x2)`` where the target is 1, ``max(0, cos(x1, x2) - margin)`` where it is -1.

    Args:
        margin: the cosine up to which vectors that should differ count nothing, in [-1, 1].
        reduction: "none", "mean" or "sum", over the examples.

    Inputs:
        prediction, a tuple (x1, x2), both (batch, features) or (features,); target, (batch,) or (),
        of -1 and 1.
    Returns:
        with "none", a tensor of the target's shape.
    VJP:
        ``dx1 = d s (x2 / (|x1| |x2|) - cos x1 / |x1|^2) / n`` with s = -1 where the target is 1,
        else [cos >= margin]; dx2 alike.
    Raises:
        ValueError: a target other than -1 and 1.

    Source: ``torch.nn.CosineEmbeddingLoss``.

    >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 1.0], [2.0, 2.0]])
    >>> cosine_embedding(reduction="none").apply(x, torch.tensor([1, -1]))
    tensor([1., 1.])
    """
    refuse_reduction("cosine_embedding", margin)
    return from_formulas(
        _cosine_embedding,
        _cosine_embedding_derivative,
        reduction,
        check=_check_vectors,
        options=(margin,),
        name="cosine_embedding",
    )


def triplet_backward(
    d: Tensor | float, *, active: Tensor, pullbacks: dict[str, Any], share: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``d [loss >= 0]`` into the distance to the positive, and its opposite into the other."""
    d = times(d, active)
    anchor, positive = pullbacks["near"](d, params=False)[1]
    more, negative = pullbacks["far"](-d if share is None else -d * share, params=False)[1]
    anchor = anchor + more
    if share is not None:
        more, other = pullbacks["between"](-d * (1 - share), params=False)[1]
        positive, negative = positive + more, negative + other
    return anchor, positive, negative


def _triplet(name: str, distance: Layer, margin: float, swap: bool, reduction: str) -> Loss:
    refuse_reduction(name, margin)
    if not margin > 0:
        raise ValueError(f"{name}: margin must be positive, got {margin}")

    def forward(prediction: tuple[Tensor, Tensor, Tensor], target: None) -> Elements:
        check_several(name, prediction, ("anchor", "positive", "negative"))
        if target is not None:
            raise TypeError(f"{name}: expects None as target, got {tree.describe(target)}")
        anchor, positive, negative = prediction
        near, near_pullback, _ = distance.vjp({}, (anchor, positive), train=False)
        far, far_pullback, _ = distance.vjp({}, (anchor, negative), train=False)
        pullbacks = {"near": near_pullback, "far": far_pullback}
        residuals: dict[str, Any] = {"pullbacks": pullbacks}
        if swap:
            between, pullbacks["between"], _ = distance.vjp({}, (positive, negative), train=False)
            # What the lesser of both gets of the gradient, which equal ones share.
            residuals["share"] = 0.5 + 0.5 * torch.sign(between - far)
            far = torch.minimum(far, between)
        excess = margin + near - far
        residuals["active"] = (excess >= 0).to(excess.dtype)
        return Elements(excess.clamp(min=0), residuals)

    return loss_of(forward, triplet_backward, reduction, name=name)


def triplet_margin(
    margin: float = 1.0,
    p: float = 2.0,
    eps: float = 1e-6,
    swap: bool = False,
    reduction: str = "mean",
) -> Loss:
    """``max(0, margin + |a - p| - |a - n|)``: a positive nearer to the anchor than a negative.

    Args:
        margin: by which it should be nearer.
        p: of the p-norm ``|x| = (sum |x_i + eps|^p)^(1 / p)``.
        eps: keeps the norm from 0.
        swap: whether the distance of positive and negative counts, where it is the lesser.
        reduction: "none", "mean" or "sum", over the examples.

    Inputs:
        prediction, a tuple (anchor, positive, negative), each ``(*, features)``; target, None.
    Returns:
        with "none", a tensor of shape ``(*)``.
    VJP:
        that of the distances, with ``d [loss >= 0] / n`` and its opposite.

    Source: ``torch.nn.TripletMarginLoss``; Balntas et al. 2016.

    >>> a, p, n = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]])
    >>> triplet_margin().apply((a, p, n), None)
    tensor(4.0000)
    """
    return _triplet("triplet_margin", pairwise_distance(p, eps), margin, swap, reduction)


def triplet_margin_with_distance(
    distance_function: Layer | None = None,
    *,
    margin: float = 1.0,
    swap: bool = False,
    reduction: str = "mean",
) -> Loss:
    """`triplet_margin` of any distance.

    Args:
        distance_function: a layer of a pair (x1, x2), without params; default the 2-norm of
            x1 - x2.
        margin, swap, reduction: see `triplet_margin`.

    Source: ``torch.nn.TripletMarginWithDistanceLoss``.

    >>> a, p, n = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]])
    >>> triplet_margin_with_distance(swap=True).apply((a, p, n), None)
    tensor(4.0000)
    """
    name = "triplet_margin_with_distance"
    distance = pairwise_distance() if distance_function is None else distance_function
    check_kind(name, distance, Layer, "distance_function")
    return _triplet(name, distance, margin, swap, reduction)
