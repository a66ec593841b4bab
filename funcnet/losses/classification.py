"""Losses of a choice among classes: `cross_entropy`, `nll`.

Both are ``-sum(q log p) / n`` with a target distribution q over the classes of each example. An
example with one class has q = the class's weight there, and 0 elsewhere; that form, `Picked`, is
not expanded to all classes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from funcnet import runtime
from funcnet.core import Loss
from funcnet.lift import with_kernel
from funcnet.losses.checks import (
    check_classes,
    check_pair,
    check_range,
    check_scores,
    check_tensor,
    class_dim,
)
from funcnet.losses.lift import Elements, loss_of
from funcnet.losses.reductions import wide_sum


class Options(NamedTuple):
    """The options of the losses of this file."""

    weight: Tensor | None
    ignore_index: int
    reduction: str
    smoothing: float = 0.0


class Picked(NamedTuple):
    """A target distribution with one class for each example: its weight, and its index.

    Both have the prediction's number of dimensions, and size 1 in that of the classes.
    """

    weight: Tensor
    class_index: Tensor


def by_class(weight: Tensor, prediction: Tensor) -> Tensor:
    """Weights of the classes in a shape that broadcasts against the prediction."""
    shape = [1] * prediction.dim()
    shape[class_dim(prediction)] = -1
    return weight.to(prediction.dtype).reshape(shape)


def _picked(log_p: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Picked:
    """The class of each example, with weight 0 where it is ignored."""
    dim = class_dim(log_p)
    target = target.unsqueeze(dim)
    kept = target != ignore_index
    index = torch.where(kept, target, 0)
    if weight is None:
        return Picked(kept.to(log_p.dtype), index)
    weights = by_class(weight, log_p).expand_as(log_p)
    return Picked(torch.where(kept, weights.gather(dim, index), 0.0), index)


def total_weight(
    target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """What "mean" divides by: the sum of the weights of the examples' classes."""
    kept = target != ignore_index
    if weight is None:
        return wide_sum(kept.to(dtype))
    weights = weight.to(dtype)[torch.where(kept, target, 0)]
    return wide_sum(torch.where(kept, weights, 0.0))


def _distribution(
    log_p: Tensor, target: Tensor, options: Options
) -> tuple[Tensor | Picked, Tensor | int | None]:
    """q, and the total that "mean" divides by, of ``-sum(q log p) / total``."""
    weight, ignore_index, reduction, smoothing = options
    dim = class_dim(log_p)
    classes = log_p.shape[dim]
    if target.is_floating_point():
        q = target * (1 - smoothing) + smoothing / classes if smoothing else target
        if weight is not None:
            q = q * by_class(weight, log_p)
        examples = log_p.numel() // classes if classes else 0
        return q, examples
    picked = _picked(log_p, target, weight, ignore_index)
    total = wide_sum(picked.weight) if reduction == "mean" else None
    if not smoothing:
        return picked, total
    kept = (target != ignore_index).unsqueeze(dim)
    q = (kept.to(log_p.dtype) * (smoothing / classes)).expand_as(log_p)
    if weight is not None:
        q = q * by_class(weight, log_p)
    return q.scatter_add(dim, picked.class_index, picked.weight * (1 - smoothing)), total


def _elements(log_p: Tensor, q: Tensor | Picked) -> Tensor:
    """``-sum(q log p)`` over the classes."""
    dim = class_dim(log_p)
    if isinstance(q, Picked):
        log_p, q = log_p.gather(dim, q.class_index), q.weight
    # A class of probability 0 counts 0, even where log p is -inf.
    return -torch.where(q == 0, 0.0, q * log_p).sum(dim)


def _class_loss(
    name: str,
    log_probabilities: Callable[[Tensor], Tensor],
    backward: Callable[..., Tensor],
    options: Options,
    *,
    takes_probabilities: bool,
) -> Loss:
    """The loss ``-sum(q log p) / n`` with log p a function of the prediction."""
    check_tensor(name, "weight", options.weight)

    def forward(prediction: Tensor, target: Tensor) -> Elements:
        check_scores(name, prediction, options.weight)
        if takes_probabilities and isinstance(target, Tensor) and target.is_floating_point():
            check_pair(name, prediction, target)
            check_range(name, "probabilities as target", target, 0, 1)
            if options.ignore_index >= 0:
                hint = f"ignores no class of probabilities, got ignore_index={options.ignore_index}"
                raise ValueError(f"{name}: {hint}")
        else:
            check_classes(name, prediction, target, options.ignore_index)
        log_p = log_probabilities(prediction)
        q, total = _distribution(log_p, target, options)
        return Elements(_elements(log_p, q), {"log_p": log_p, "q": q}, total=total)

    return loss_of(forward, backward, options.reduction, name=name)


def _by_example(d: Tensor | float, dim: int) -> Tensor | float:
    """The d of each example in a shape that broadcasts over its classes."""
    return d.unsqueeze(dim) if isinstance(d, Tensor) and d.dim() else d


def _cross_entropy_in_place(d: Tensor | float, *, log_p: Tensor, q: Tensor | Picked) -> Tensor:
    if not isinstance(q, Picked) or runtime.is_transformed(log_p):
        return cross_entropy_backward(d, log_p=log_p, q=q)
    # On a tensor of its own, which is a third of the memory traffic: 5 % of the step of a small
    # GPT (compare.py).
    dim, p = class_dim(log_p), log_p.exp()
    scaled = q.weight * _by_example(d, dim)
    return p.mul_(scaled).scatter_add_(dim, q.class_index, -scaled)


@with_kernel(_cross_entropy_in_place)
def cross_entropy_backward(d: Tensor | float, *, log_p: Tensor, q: Tensor | Picked) -> Tensor:
    """``d (p sum(q) - q)`` with p the softmax and q the weighted target distribution."""
    dim = class_dim(log_p)
    d = _by_example(d, dim)
    if isinstance(q, Picked):
        scaled = q.weight * d
        return (log_p.exp() * scaled).scatter_add(dim, q.class_index, -scaled)
    return (log_p.exp() * q.sum(dim, keepdim=True) - q) * d


def cross_entropy(
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Loss:
    """``-sum_c q_c log softmax(y)_c``, where q is the target distribution.

    Args:
        weight: of each class, shape (classes,).
        ignore_index: a class index that counts nothing.
        reduction: "none", "sum", or "mean": over the examples, weighted by their class's weight
            where the target has class indices.
        label_smoothing: e in [0, 1]: q becomes ``(1 - e) q + e / classes``.

    Inputs:
        prediction, logits ``(batch, classes, *)`` or (classes,); target, class indices, int64, of
        shape ``(batch, *)`` or (), or probabilities of the prediction's shape.
    Returns:
        with "none", a tensor of shape ``(batch, *)`` or ().
    VJP:
        ``dprediction = d (softmax(y) sum(q) - q) / n``.
    Raises:
        ValueError: a class, or a probability, out of range.

    Source: ``torch.nn.CrossEntropyLoss``.

    >>> logits = torch.tensor([[1e4, 0.0], [0.0, 0.0]])
    >>> value, pullback = cross_entropy().vjp(logits, torch.tensor([0, 1]))
    >>> value, pullback()
    (tensor(0.3466), tensor([[ 0.0000,  0.0000],
            [ 0.2500, -0.2500]]))
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"cross_entropy: label_smoothing must be in [0, 1], got {label_smoothing}")

    def log_softmax(logits: Tensor) -> Tensor:
        return torch.log_softmax(logits, class_dim(logits))

    return _class_loss(
        "cross_entropy",
        log_softmax,
        cross_entropy_backward,
        Options(weight, ignore_index, reduction, label_smoothing),
        takes_probabilities=True,
    )


def nll_backward(d: Tensor | float, *, log_p: Tensor, q: Picked) -> Tensor:
    """``-d weight`` at each example's class, else 0."""
    dim = class_dim(log_p)
    scaled = q.weight * _by_example(d, dim)
    return torch.zeros_like(log_p).scatter_add(dim, q.class_index, -scaled)


def nll(weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean") -> Loss:
    """``-y_t``: the negative log-likelihood of log-probabilities y.

    Args:
        weight: of each class, shape (classes,).
        ignore_index: a class index that counts nothing.
        reduction: "none", "sum", or "mean": over the examples, weighted by their class's weight.

    Inputs:
        prediction ``(batch, classes, *)`` or (classes,); target, class indices, int64.
    Returns:
        with "none", a tensor of the target's shape.
    VJP:
        ``dprediction = -d weight / n`` at the class, else 0.
    Raises:
        ValueError: a class out of range.

    Source: ``torch.nn.NLLLoss``.

    >>> nll().apply(torch.tensor([[-1.0, -2.0]]), torch.tensor([1]))
    tensor(2.)
    """
    return _class_loss(
        "nll",
        lambda log_p: log_p,
        nll_backward,
        Options(weight, ignore_index, reduction),
        takes_probabilities=False,
    )
