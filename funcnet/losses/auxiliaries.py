"""`auxiliary`: a loss beside which scalars that the net computed are added."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import Loss, LossPullback, Tree
from funcnet.errors import require

_NAME = "auxiliary"


def auxiliary_rule(
    residuals: dict[str, Any], dvalue: Tensor | float, weights: tuple[tuple[str, float], ...]
) -> Tree:
    """The loss's own gradient of the output, and ``weight dvalue`` of each scalar."""
    given, scale = dict(weights), dvalue * residuals.get("times", 1.0)
    scalars = {
        name: (torch.ones_like(scalar) * (given.get(name, 0.0) * scale)).to(scalar.dtype)
        for name, scalar in residuals["scalars"].items()
    }
    return residuals["loss"](dvalue), scalars


def auxiliary(loss: Loss, weights: Mapping[str, float]) -> Loss:
    """``loss(output, target) + sum of weight scalar`` for a prediction (output, scalars).

    It trains what a layer computes beside its output, such as the balance of `funcnet.experts`.

    Args:
        loss: of the output; its value is a scalar.
        weights: of the scalars by name. Those that have none are not added.

    Inputs:
        prediction, a tuple of the output and a dict of scalars; target, the loss's.
    VJP:
        ``doutput`` is the loss's, ``dscalar = dvalue weight``.
    Raises:
        ValueError: a prediction without a scalar of a name.

    >>> import funcnet as fn
    >>> balanced = auxiliary(fn.mse(), {"balance": 0.1})
    >>> prediction = (torch.tensor([3.0]), {"balance": torch.tensor(2.0)})
    >>> value, pullback = balanced.vjp(prediction, torch.tensor([2.0]))
    >>> value, pullback()
    (tensor(1.2000), (tensor([2.]), {'balance': tensor(0.1000)}))
    """
    static = tuple(sorted(weights.items()))

    def checked(prediction: Tree) -> tuple[Tree, dict[str, Tensor]]:
        pair = isinstance(prediction, tuple) and len(prediction) == 2
        scalars = prediction[1] if pair and isinstance(prediction[1], dict) else {}
        present = [name for name, scalar in scalars.items() if _is_scalar(scalar)]
        words = f"a prediction (output, scalars) with the scalars {sorted(weights)}"
        fits = pair and set(weights) <= set(present) and len(present) == len(scalars)
        require(fits, f"{_NAME}: expects {words}, got {tree.describe(prediction)}")
        return prediction[0], scalars

    def vjp(prediction: Tree, target: Tree) -> tuple[Tensor, LossPullback]:
        output, scalars = checked(prediction)
        value, pullback = loss.vjp(output, target)
        require(not value.dim(), f"{_NAME}: expects a loss with a scalar value, got {value.shape}")
        for name, weight in static:
            value = value + weight * scalars[name]
        residuals = {"loss": pullback, "scalars": scalars}
        return value, LossPullback(auxiliary_rule, residuals, (static,), value, _NAME)

    def apply(prediction: Tree, target: Tree) -> Tensor:
        return vjp(prediction, target)[0]

    of_loss = loss.fraction

    def fraction(
        prediction: Tree, target: Tree
    ) -> tuple[Tensor, Tensor | float | None, LossPullback]:
        assert of_loss is not None
        output, scalars = checked(prediction)
        numerator, n, pullback = of_loss(output, target)
        require(n is not None, f"{_NAME}: expects a mean, to which a scalar of a part can be added")
        times = torch.as_tensor(n, dtype=numerator.dtype, device=numerator.device)
        for name, weight in static:
            numerator = numerator + weight * scalars[name] * times
        residuals = {"loss": pullback, "scalars": scalars, "times": times}
        return numerator, n, LossPullback(auxiliary_rule, residuals, (static,), numerator, _NAME)

    return Loss(apply, vjp, fraction=None if of_loss is None else fraction)


def _is_scalar(scalar: Any) -> bool:
    return isinstance(scalar, Tensor) and not scalar.dim() and scalar.is_floating_point()
