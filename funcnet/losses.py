"""Losses: constructors of pairs ``(apply, vjp)``, a scalar of a prediction and a target.

``reduction`` is "mean", over all elements unless the docstring says otherwise, or "sum".
Gradients are with respect to the prediction; ``d`` is the cotangent of the value.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from funcnet import runtime, tree
from funcnet.core import Loss, LossPullback


class Pointwise(NamedTuple):
    """``element(prediction, target, *options)`` and its derivative by the prediction."""

    element: Callable[..., Tensor]
    derivative: Callable[..., Tensor]


def _hinge_derivative(prediction: Tensor, target: Tensor, margin: float) -> Tensor:
    return torch.where(prediction * target < margin, -target, 0.0)


def _huber(distance: Tensor, delta: float) -> Tensor:
    return torch.where(distance <= delta, 0.5 * distance.square(), delta * (distance - 0.5 * delta))


def _bce_derivative(prediction: Tensor, target: Tensor) -> Tensor:
    # The denominator is kept from 0 as PyTorch does.
    spread = (prediction * (1 - prediction)).clamp(min=1e-12)
    return (prediction - target) / spread


# fmt: off
POINTWISE: dict[str, Pointwise] = {
    "mae": Pointwise(
        lambda y, t: (y - t).abs(),
        lambda y, t: torch.sign(y - t)),
    "huber": Pointwise(
        lambda y, t, delta: _huber((y - t).abs(), delta),
        lambda y, t, delta: (y - t).clamp(-delta, delta)),
    "smooth_l1": Pointwise(
        lambda y, t, beta: F.smooth_l1_loss(y, t, reduction="none", beta=beta),
        lambda y, t, beta: ((y - t) / beta).clamp(-1, 1) if beta else torch.sign(y - t)),
    "bce": Pointwise(
        lambda y, t: -(t * y.log().clamp(min=-100) + (1 - t) * (-y).log1p().clamp(min=-100)),
        _bce_derivative),
    "hinge": Pointwise(
        lambda y, t, margin: (margin - y * t).clamp(min=0),
        _hinge_derivative),
    "kl_div": Pointwise(
        lambda y, t, log_target: t.exp() * (t - y) if log_target else torch.xlogy(t, t) - t * y,
        lambda y, t, log_target: -t.exp() if log_target else -t),
}
# fmt: on


def pointwise_rule(
    residuals: dict[str, Tensor],
    dvalue: Tensor | float,
    name: str,
    reduction: str,
    *options: Any,
) -> Tensor:
    """``dprediction = d derivative(prediction, target) / n``."""
    prediction, target = residuals["prediction"], residuals["target"]
    derivative = POINTWISE[name].derivative(prediction, target, *options)
    if "weight" in residuals:
        derivative = derivative * residuals["weight"].to(prediction.dtype)
    return derivative * _scaled(dvalue, _count(prediction, reduction))


def _scaled(dvalue: Tensor | float, count: Tensor | float) -> Tensor | float:
    """``dvalue / count``, and 0 where nothing counts."""
    if isinstance(count, Tensor):
        return torch.where(count == 0, 0.0, dvalue / count)
    return dvalue / count if count else 0.0


def _count(prediction: Tensor, reduction: str) -> float:
    """What the sum over elements is divided by."""
    if reduction == "mean":
        return prediction.numel()
    batch = prediction.shape[0] if prediction.dim() else 1
    return {"sum": 1, "batchmean": batch, "half_mean": 2 * batch}[reduction]


def _reduced(elements: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return elements.mean()
    total = elements.sum()
    return total if reduction == "sum" else total / _count(elements, reduction)


def _check_reduction(name: str, reduction: str, *more: str) -> None:
    allowed = ("mean", "sum", *more)
    if reduction not in allowed:
        raise ValueError(f"{name}: reduction must be one of {allowed}, got {reduction!r}")


def _check_pair(name: str, prediction: Tensor, target: Tensor) -> None:
    """Two floating tensors of one shape and dtype: a loss must not broadcast."""
    try:
        fits = (
            prediction.dtype is target.dtype
            and prediction.is_floating_point()
            and prediction.shape == target.shape
        )
    except AttributeError:
        fits = False
    if fits:
        return
    if not isinstance(prediction, Tensor) or not prediction.is_floating_point():
        raise TypeError(
            f"{name}: expects a floating-point prediction, got {tree.describe(prediction)}"
        )
    if not isinstance(target, Tensor) or target.dtype != prediction.dtype:
        raise TypeError(
            f"{name}: expects a target of dtype {prediction.dtype}, got {tree.describe(target)}"
        )
    if target.shape != prediction.shape:
        raise ValueError(
            f"{name}: expects a target of the prediction's shape {tuple(prediction.shape)}, "
            f"got {tuple(target.shape)}"
        )


def _check_weight(name: str, option: str, weight: Tensor, prediction: Tensor) -> None:
    shape = prediction.shape
    try:
        fits = torch.broadcast_shapes(weight.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name}: expects a {option} that broadcasts to the prediction's shape "
            f"{tuple(shape)}, got {tuple(weight.shape)}"
        )


def _pointwise(
    name: str,
    reduction: str,
    *options: Hashable,
    weight: Tensor | None = None,
    check: Callable[[Tensor, Tensor], None] = lambda prediction, target: None,
) -> Loss:
    element = POINTWISE[name].element
    static = (name, reduction, *options)

    def apply(prediction: Tensor, target: Tensor) -> Tensor:
        _check_pair(name, prediction, target)
        if weight is not None:
            _check_weight(name, "weight", weight, prediction)
        check(prediction, target)
        elements = element(prediction, target, *options)
        return _reduced(
            elements if weight is None else elements * weight.to(elements.dtype), reduction
        )

    def vjp(prediction: Tensor, target: Tensor) -> tuple[Tensor, LossPullback]:
        residuals = {"prediction": prediction, "target": target}
        if weight is not None:
            residuals["weight"] = weight
        return apply(prediction, target), LossPullback(pointwise_rule, residuals, static)

    return Loss(apply, vjp)


def mse_rule(residuals: dict[str, Tensor], dvalue: Tensor | float, reduction: str) -> Tensor:
    """``dprediction = d 2 (prediction - target) / n``."""
    error = residuals["error"]
    return error * _scaled(2 * dvalue, _count(error, reduction))


def mse(reduction: str = "mean") -> Loss:
    """``(prediction - target)^2``; ``dprediction = 2 d (prediction - target) / n``.

    Args:
        reduction: "mean", "sum", or "half_mean": the sum over all divided by twice the batch's
            size, so that the gradient of an example is plainly ``prediction - target``.

    Source: ``torch.nn.MSELoss``.

    >>> value, pullback = mse().vjp(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))
    >>> value, pullback()
    (tensor(2.5000), tensor([1., 2.]))
    """
    _check_reduction("mse", reduction, "half_mean")
    static = (reduction,)

    def vjp(prediction: Tensor, target: Tensor) -> tuple[Tensor, LossPullback]:
        _check_pair("mse", prediction, target)
        error = prediction - target
        value = _reduced(error.square(), reduction)
        return value, LossPullback(mse_rule, {"error": error}, static)

    def apply(prediction: Tensor, target: Tensor) -> Tensor:
        return vjp(prediction, target)[0]

    return Loss(apply, vjp)


def mae(reduction: str = "mean") -> Loss:
    """``|prediction - target|``; ``dprediction = d sign(prediction - target) / n``.

    Source: ``torch.nn.L1Loss``.

    >>> mae().apply(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]))
    tensor(1.5000)
    """
    _check_reduction("mae", reduction)
    return _pointwise("mae", reduction)


def huber(reduction: str = "mean", delta: float = 1.0) -> Loss:
    """``e^2 / 2`` where ``|e| < delta``, else ``delta (|e| - delta / 2)``.

    ``e = prediction - target``; ``dprediction = d min(max(e, -delta), delta) / n``.
    Source: ``torch.nn.HuberLoss``.

    >>> huber().apply(torch.tensor([0.5, 3.0]), torch.tensor([0.0, 0.0]))
    tensor(1.3125)
    """
    _check_reduction("huber", reduction)
    if not delta > 0:
        raise ValueError(f"huber: delta must be positive, got {delta}")
    return _pointwise("huber", reduction, delta)


def smooth_l1(reduction: str = "mean", beta: float = 1.0) -> Loss:
    """``e^2 / (2 beta)`` where ``|e| < beta``, else ``|e| - beta / 2``.

    ``e = prediction - target``; ``dprediction = d min(max(e / beta, -1), 1) / n``.
    Source: ``torch.nn.SmoothL1Loss``.

    >>> smooth_l1().apply(torch.tensor([0.5, 3.0]), torch.tensor([0.0, 0.0]))
    tensor(1.3125)
    """
    _check_reduction("smooth_l1", reduction)
    if not beta >= 0:
        raise ValueError(f"smooth_l1: beta must be >= 0, got {beta}")
    return _pointwise("smooth_l1", reduction, beta)


def bce(reduction: str = "mean", weight: Tensor | None = None) -> Loss:
    """Binary cross-entropy ``-(t log p + (1 - t) log(1 - p))`` of probabilities.

    Both logs are kept at least -100, so the loss stays finite at p = 0 and 1.

    Args:
        reduction: "mean" or "sum".
        weight: of each element; broadcasts.

    VJP: ``dprediction = d (p - t) / max(p (1 - p), 1e-12) / n``.
    Raises: ValueError for a probability outside [0, 1].
    Source: ``torch.nn.BCELoss``.

    >>> bce().apply(torch.tensor([0.0, 0.5]), torch.tensor([1.0, 1.0]))
    tensor(50.3466)
    """
    _check_reduction("bce", reduction)

    def check(prediction: Tensor, target: Tensor) -> None:
        for name, values in (("probabilities", prediction), ("targets", target)):
            extremes = _extremes(values)
            # NaN passes: it is check_finite's to name where it came from.
            if extremes is not None and (extremes[0] < 0 or extremes[1] > 1):
                raise ValueError(
                    f"bce: expects {name} in [0, 1], got {extremes[0]:g} to {extremes[1]:g}"
                )

    return _pointwise("bce", reduction, weight=weight, check=check)


def _extremes(values: Tensor) -> tuple[float, float] | None:
    """The least and greatest value, where they can be read without waiting for a device."""
    if values.numel() == 0 or not values.is_cpu:
        return None
    low, high = (runtime.read(extreme) for extreme in values.aminmax())
    return None if low is None or high is None else (low, high)


def hinge(reduction: str = "mean", margin: float = 1.0) -> Loss:
    """``max(0, margin - t y)`` of scores y and targets of -1 and 1.

    VJP: ``dprediction = -d t [t y < margin] / n``.
    Source: Crammer and Singer 2001; ``optax.losses.hinge_loss``.

    >>> hinge().apply(torch.tensor([0.5, -2.0]), torch.tensor([1.0, -1.0]))
    tensor(0.2500)
    """
    _check_reduction("hinge", reduction)
    return _pointwise("hinge", reduction, margin)


def kl_div(reduction: str = "mean", log_target: bool = False) -> Loss:
    """``t (log t - y)`` of log-probabilities y and probabilities t.

    Args:
        reduction: "mean" over all elements, "sum", or "batchmean", the mathematical definition.
        log_target: whether the target holds log-probabilities too.

    VJP: ``dprediction = -d t / n``.
    Source: ``torch.nn.KLDivLoss``.

    >>> kl_div("sum").apply(torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]))
    tensor(0.6931)
    """
    _check_reduction("kl_div", reduction, "batchmean")
    return _pointwise("kl_div", reduction, log_target)


def bce_with_logits_rule(
    residuals: dict[str, Tensor], dvalue: Tensor | float, reduction: str
) -> Tensor:
    """``d ((1 - t) s - pos_weight t (1 - s)) / n`` with ``s = sigmoid(y)``."""
    logits, target = residuals["prediction"], residuals["target"]
    positive = target
    if "pos_weight" in residuals:
        positive = target * residuals["pos_weight"].to(target.dtype)
    gradient = (1 - target) * torch.sigmoid(logits) - positive * torch.sigmoid(-logits)
    if "weight" in residuals:
        gradient = gradient * residuals["weight"].to(gradient.dtype)
    return gradient * _scaled(dvalue, _count(logits, reduction))


def bce_with_logits(
    reduction: str = "mean", weight: Tensor | None = None, pos_weight: Tensor | None = None
) -> Loss:
    """`bce` of ``sigmoid(y)``, exact for any logit y.

    Args:
        reduction: "mean" or "sum".
        weight: of each element; broadcasts.
        pos_weight: of the positive targets; broadcasts.

    VJP: with ``s = sigmoid(y)``, ``d ((1 - t) s - pos_weight t (1 - s)) / n``.
    Source: ``torch.nn.BCEWithLogitsLoss``.

    >>> bce_with_logits().apply(torch.tensor([0.0, 1e4]), torch.tensor([1.0, 1.0]))
    tensor(0.3466)
    """
    _check_reduction("bce_with_logits", reduction)
    options = {"weight": weight, "pos_weight": pos_weight}
    given = {name: value for name, value in options.items() if value is not None}

    def apply(prediction: Tensor, target: Tensor) -> Tensor:
        _check_pair("bce_with_logits", prediction, target)
        for option, value in given.items():
            _check_weight("bce_with_logits", option, value, prediction)
        ready: Any = {name: value.to(prediction.dtype) for name, value in given.items()}
        return F.binary_cross_entropy_with_logits(prediction, target, reduction=reduction, **ready)

    def vjp(prediction: Tensor, target: Tensor) -> tuple[Tensor, LossPullback]:
        residuals = {"prediction": prediction, "target": target, **given}
        return apply(prediction, target), LossPullback(
            bce_with_logits_rule, residuals, (reduction,)
        )

    return Loss(apply, vjp)


class _Picked(NamedTuple):
    """A target distribution with one class an example: its weight and its place among classes."""

    weight: Tensor
    place: Tensor


def _class_dim(prediction: Tensor) -> int:
    return 1 if prediction.dim() > 1 else 0


def _along(weight: Tensor, prediction: Tensor) -> Tensor:
    """Weights by class in a shape that broadcasts against the prediction."""
    dim = _class_dim(prediction)
    weight = weight.to(prediction.dtype)
    return weight.reshape([-1 if d == dim else 1 for d in range(prediction.dim())])


def _check_classes(
    name: str, prediction: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> None:
    if not isinstance(prediction, Tensor) or not prediction.is_floating_point():
        raise TypeError(
            f"{name}: expects a floating-point prediction, got {tree.describe(prediction)}"
        )
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
    extremes = _extremes(target)
    if extremes is None or (extremes[0] >= 0 and extremes[1] < classes):
        return
    extremes = _extremes(target[target != ignore_index])
    if extremes is not None and (extremes[0] < 0 or extremes[1] >= classes):
        raise ValueError(
            f"{name}: expects classes in [0, {classes}), got {extremes[0]} to {extremes[1]}"
        )


def _picked(log_p: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> _Picked:
    """The class of each example, with weight 0 where it is ignored; both have a class dim."""
    dim = _class_dim(log_p)
    kept = target != ignore_index
    place = torch.where(kept, target, 0).unsqueeze(dim)
    kept = kept.unsqueeze(dim)
    if weight is None:
        return _Picked(kept.to(log_p.dtype), place)
    expanded = _along(weight, log_p).expand_as(log_p)
    return _Picked(torch.where(kept, expanded.gather(dim, place), 0.0), place)


def _distribution(
    log_p: Tensor,
    target: Tensor,
    reduction: str,
    weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
) -> tuple[Tensor | _Picked, Tensor | int]:
    """q and n of ``value = -sum q log p / n``; q is dense unless it has one class an example."""
    dim = _class_dim(log_p)
    classes = log_p.shape[dim]
    if target.is_floating_point():
        q = target * (1 - smoothing) + smoothing / classes if smoothing else target
        if weight is not None:
            q = q * _along(weight, log_p)
        count = log_p.numel() // classes if classes else 0
        return q, count if reduction == "mean" else 1
    picked = _picked(log_p, target, weight, ignore_index)
    n = _total(picked.weight) if reduction == "mean" else 1
    if not smoothing:
        return picked, n
    kept = (target != ignore_index).unsqueeze(dim)
    q = (kept.to(log_p.dtype) * (smoothing / classes)).expand_as(log_p)
    if weight is not None:
        q = q * _along(weight, log_p)
    return q.scatter_add(dim, picked.place, picked.weight * (1 - smoothing)), n


def _total(weight: Tensor) -> Tensor:
    return weight.sum(dtype=torch.promote_types(weight.dtype, torch.float32))


def _class_value(log_p: Tensor, q: Tensor | _Picked, n: Tensor | int) -> Tensor:
    if isinstance(q, _Picked):
        log_p, q = log_p.gather(_class_dim(log_p), q.place), q.weight
    # A class of probability 0 counts 0, even where log p is -inf.
    # Half precision cannot count far.
    exact = torch.promote_types(log_p.dtype, torch.float32)
    total = torch.where(q == 0, 0.0, q * log_p).sum(dtype=exact)
    return (-total / n).to(log_p.dtype)


def cross_entropy_rule(
    residuals: dict[str, Tensor],
    dvalue: Tensor | float,
    reduction: str,
    ignore_index: int,
    smoothing: float,
) -> Tensor:
    """``d (p sum(q) - q) / n`` with p the softmax and q the weighted target distribution."""
    log_p = residuals["log_p"]
    dim = _class_dim(log_p)
    q, n = _distribution(
        log_p, residuals["target"], reduction, residuals.get("weight"), ignore_index, smoothing
    )
    scale = _scaled(dvalue, n)
    if isinstance(q, _Picked):
        weight = q.weight * scale
        return (log_p.exp() * weight).scatter_add(dim, q.place, -weight)
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
    _check_reduction("cross_entropy", reduction)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"cross_entropy: label_smoothing must be in [0, 1], got {label_smoothing}")

    def check(prediction: Tensor, target: Tensor) -> None:
        _check_classes("cross_entropy", prediction, target, weight, ignore_index)
        if target.is_floating_point():
            _check_pair("cross_entropy", prediction, target)

    def forward(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        check(prediction, target)
        log_p = torch.log_softmax(prediction, _class_dim(prediction))
        q, n = _distribution(log_p, target, reduction, weight, ignore_index, label_smoothing)
        return _class_value(log_p, q, n), log_p

    def apply(prediction: Tensor, target: Tensor) -> Tensor:
        return forward(prediction, target)[0]

    def vjp(prediction: Tensor, target: Tensor) -> tuple[Tensor, LossPullback]:
        value, log_p = forward(prediction, target)
        residuals = {"log_p": log_p, "target": target}
        if weight is not None:
            residuals["weight"] = weight
        static = (reduction, ignore_index, label_smoothing)
        return value, LossPullback(cross_entropy_rule, residuals, static)

    return Loss(apply, vjp)


def nll_rule(
    residuals: dict[str, Tensor], dvalue: Tensor | float, shape: tuple[int, ...]
) -> Tensor:
    """``-d weight / n`` at each example's class, else 0."""
    gradient = -(residuals["weight"] * _scaled(dvalue, residuals["n"]))
    dim = 1 if len(shape) > 1 else 0
    return gradient.new_zeros(shape).scatter_add(dim, residuals["place"], gradient)


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
    _check_reduction("nll", reduction)

    def forward(prediction: Tensor, target: Tensor) -> tuple[Tensor, _Picked, Tensor]:
        _check_classes("nll", prediction, target, weight, ignore_index)
        if target.is_floating_point():
            raise TypeError(f"nll: expects int64 class indices, got {tree.describe(target)}")
        picked = _picked(prediction, target, weight, ignore_index)
        n = _total(picked.weight if reduction == "mean" else prediction.new_ones(()))
        return _class_value(prediction, picked, n), picked, n

    def apply(prediction: Tensor, target: Tensor) -> Tensor:
        return forward(prediction, target)[0]

    def vjp(prediction: Tensor, target: Tensor) -> tuple[Tensor, LossPullback]:
        value, picked, n = forward(prediction, target)
        residuals = {"weight": picked.weight, "place": picked.place, "n": n}
        return value, LossPullback(nll_rule, residuals, (tuple(prediction.shape),))

    return Loss(apply, vjp)
