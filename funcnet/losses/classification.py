"""Losses of a choice among classes: `cross_entropy`, `nll`.

Both are ``-sum(q log p) / n`` with a target distribution q over the classes of each example. An
example with one class has q = the class's weight there, and 0 elsewhere; that form, `Picked`, is
not expanded to all classes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import Loss, LossPullback
from funcnet.losses.checks import check_pair, check_prediction, extremes
from funcnet.losses.lift import loss_of
from funcnet.losses.reductions import check_reduction, divided


class Options(NamedTuple):
    """The options of the losses of this file."""

    reduction: str
    ignore_index: int
    smoothing: float = 0.0


class Picked(NamedTuple):
    """A target distribution with one class for each example: its weight, and its index.

    Both have the prediction's number of dimensions, and size 1 in that of the classes.
    """

    weight: Tensor
    class_index: Tensor


def _class_dim(prediction: Tensor) -> int:
    return 1 if prediction.dim() > 1 else 0


def _by_class(weight: Tensor, prediction: Tensor) -> Tensor:
    """Weights of the classes in a shape that broadcasts against the prediction."""
    shape = [1] * prediction.dim()
    shape[_class_dim(prediction)] = -1
    return weight.to(prediction.dtype).reshape(shape)


def _picked(log_p: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Picked:
    """The class of each example, with weight 0 where it is ignored."""
    dim = _class_dim(log_p)
    target = target.unsqueeze(dim)
    kept = target != ignore_index
    index = torch.where(kept, target, 0)
    if weight is None:
        return Picked(kept.to(log_p.dtype), index)
    weights = _by_class(weight, log_p).expand_as(log_p)
    return Picked(torch.where(kept, weights.gather(dim, index), 0.0), index)


def _distribution(
    log_p: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor | Picked, Tensor | int]:
    """q and n of ``-sum(q log p) / n``."""
    reduction, ignore_index, smoothing = options
    dim = _class_dim(log_p)
    classes = log_p.shape[dim]
    if target.is_floating_point():
        q = target * (1 - smoothing) + smoothing / classes if smoothing else target
        if weight is not None:
            q = q * _by_class(weight, log_p)
        examples = log_p.numel() // classes if classes else 0
        return q, examples if reduction == "mean" else 1
    picked = _picked(log_p, target, weight, ignore_index)
    n = _wide_sum(picked.weight) if reduction == "mean" else 1
    if not smoothing:
        return picked, n
    kept = (target != ignore_index).unsqueeze(dim)
    q = (kept.to(log_p.dtype) * (smoothing / classes)).expand_as(log_p)
    if weight is not None:
        q = q * _by_class(weight, log_p)
    return q.scatter_add(dim, picked.class_index, picked.weight * (1 - smoothing)), n


def _wide_sum(values: Tensor) -> Tensor:
    """The sum in float32 at least: half precision cannot count far."""
    return values.sum(dtype=torch.promote_types(values.dtype, torch.float32))


def _value(log_p: Tensor, q: Tensor | Picked, n: Tensor | int) -> Tensor:
    """``-sum(q log p) / n``."""
    dtype = log_p.dtype
    if isinstance(q, Picked):
        log_p, q = log_p.gather(_class_dim(log_p), q.class_index), q.weight
    # A class of probability 0 counts 0, even where log p is -inf.
    return (-_wide_sum(torch.where(q == 0, 0.0, q * log_p)) / n).to(dtype)


def _class_loss(
    name: str,
    rule: Callable[..., Tensor],
    log_probabilities: Callable[[Tensor], Tensor],
    weight: Tensor | None,
    options: Options,
    *,
    takes_probabilities: bool,
) -> Loss:
    """The loss ``-sum(q log p) / n`` with log p a function of the prediction."""
    check_reduction(name, options.reduction)

    def vjp(prediction: Tensor, target: Tensor) -> tuple[Tensor, LossPullback]:
        _check_classes(name, prediction, target, weight, options.ignore_index)
        if target.is_floating_point():
            if not takes_probabilities:
                raise TypeError(f"{name}: expects int64 class indices, got {tree.describe(target)}")
            check_pair(name, prediction, target)
        log_p = log_probabilities(prediction)
        q, n = _distribution(log_p, target, weight, options)
        residuals: dict[str, Any] = {"log_p": log_p, "q": q}
        static: tuple[int, ...] = ()
        if isinstance(n, Tensor):
            residuals["n"] = n
        else:
            static = (n,)
        return _value(log_p, q, n), LossPullback(rule, residuals, static)

    return loss_of(vjp)


def _check_classes(
    name: str, prediction: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> None:
    check_prediction(name, prediction)
    if prediction.dim() == 0:
        raise ValueError(f"{name}: expects (batch, classes, *) or (classes,), got ()")
    dim = _class_dim(prediction)
    classes = prediction.shape[dim]
    if weight is not None and tuple(weight.shape) != (classes,):
        raise ValueError(
            f"{name}: expects a weight for each of {classes} classes, got {tuple(weight.shape)}"
        )
    if not isinstance(target, Tensor):
        raise TypeError(f"{name}: expects a tensor as target, got {tree.describe(target)}")
    if target.is_floating_point():
        return
    if target.dtype != torch.int64:
        raise TypeError(f"{name}: expects int64 class indices, got {tree.describe(target)}")
    shape = (*prediction.shape[:dim], *prediction.shape[dim + 1 :])
    if tuple(target.shape) != shape:
        raise ValueError(
            f"{name}: expects a target of shape {shape} for predictions of shape "
            f"{tuple(prediction.shape)}, got {tuple(target.shape)}"
        )
    found = extremes(target)
    if found is None or (found[0] >= 0 and found[1] < classes):
        return
    found = extremes(target[target != ignore_index])
    if found is not None and (found[0] < 0 or found[1] >= classes):
        raise ValueError(f"{name}: expects classes in [0, {classes}), got {found[0]} to {found[1]}")


def cross_entropy_rule(residuals: dict[str, Any], dvalue: Tensor | float, count: int = 1) -> Tensor:
    """``d (p sum(q) - q) / n`` with p the softmax and q the weighted target distribution."""
    log_p, q = residuals["log_p"], residuals["q"]
    dim = _class_dim(log_p)
    scale = divided(dvalue, residuals.get("n", count))
    if isinstance(q, Picked):
        scaled = q.weight * scale
        return (log_p.exp() * scaled).scatter_add(dim, q.class_index, -scaled)
    return (log_p.exp() * q.sum(dim, keepdim=True) - q) * scale


def cross_entropy(
    reduction: str = "mean",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Loss:
    """``-sum_c q_c log softmax(y)_c``, where q is the target distribution.

    Args:
        reduction: "sum", or "mean": over the examples, weighted by their class's weight.
        weight: of each class, shape (classes,).
        ignore_index: a class index that counts nothing.
        label_smoothing: e in [0, 1]: q becomes ``(1 - e) q + e / classes``.

    Inputs: prediction, logits (batch, classes, *) or (classes,); target, class indices, int64,
    of shape (batch, *) or (), or probabilities of the prediction's shape.
    VJP: ``dprediction = d (softmax(y) sum(q) - q) / n``.
    Raises: ValueError for a class out of range.
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
        return torch.log_softmax(logits, _class_dim(logits))

    return _class_loss(
        "cross_entropy",
        cross_entropy_rule,
        log_softmax,
        weight,
        Options(reduction, ignore_index, label_smoothing),
        takes_probabilities=True,
    )


def nll_rule(residuals: dict[str, Any], dvalue: Tensor | float, count: int = 1) -> Tensor:
    """``-d weight / n`` at each example's class, else 0."""
    log_p, q = residuals["log_p"], residuals["q"]
    scaled = q.weight * divided(dvalue, residuals.get("n", count))
    return torch.zeros_like(log_p).scatter_add(_class_dim(log_p), q.class_index, -scaled)


def nll(reduction: str = "mean", weight: Tensor | None = None, ignore_index: int = -100) -> Loss:
    """``-y_t``: the negative log-likelihood of log-probabilities y.

    Args:
        reduction: "sum", or "mean": over the examples, weighted by their class's weight.
        weight: of each class, shape (classes,).
        ignore_index: a class index that counts nothing.

    Inputs: prediction (batch, classes, *) or (classes,); target, class indices, int64.
    VJP: ``dprediction = -d weight / n`` at the class, else 0.
    Source: ``torch.nn.NLLLoss``.

    >>> nll().apply(torch.tensor([[-1.0, -2.0]]), torch.tensor([1]))
    tensor(2.)
    """
    return _class_loss(
        "nll",
        nll_rule,
        lambda log_p: log_p,
        weight,
        Options(reduction, ignore_index),
        takes_probabilities=False,
    )
