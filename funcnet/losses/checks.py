"""What a loss requires of its prediction, target and weights, and how errors say it."""

import torch
from torch import Tensor

from funcnet import runtime, tree
from funcnet.core import Tree


def check_prediction(name: str, prediction: Tree) -> None:
    """Raise TypeError unless the prediction is a floating-point tensor."""
    if not isinstance(prediction, Tensor) or not prediction.is_floating_point():
        raise TypeError(
            f"{name}: expects a floating-point prediction, got {tree.describe(prediction)}"
        )


def check_pair(name: str, prediction: Tree, target: Tree) -> None:
    """Raise unless both are floating-point tensors of one shape and dtype: nothing broadcasts."""
    check_prediction(name, prediction)
    if not isinstance(target, Tensor) or target.dtype != prediction.dtype:
        raise TypeError(
            f"{name}: expects a target of dtype {prediction.dtype}, got {tree.describe(target)}"
        )
    if target.shape != prediction.shape:
        raise ValueError(
            f"{name}: expects a target of the prediction's shape {tuple(prediction.shape)}, "
            f"got {tuple(target.shape)}"
        )


def broadcastable(name: str, option: str, value: Tensor, prediction: Tensor) -> Tensor:
    """An option in the prediction's dtype; ValueError unless it broadcasts to its shape."""
    shape = prediction.shape
    try:
        fits = torch.broadcast_shapes(value.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name}: expects a {option} that broadcasts to the prediction's shape "
            f"{tuple(shape)}, got {tuple(value.shape)}"
        )
    return value.to(prediction.dtype)


def extremes(values: Tensor) -> tuple[float, float] | None:
    """The least and greatest value, or None where reading them would wait for a device."""
    if values.numel() == 0 or not values.is_cpu:
        return None
    low, high = (runtime.read(extreme) for extreme in values.aminmax())
    return None if low is None or high is None else (low, high)
