"""What a loss requires of its prediction, target and weights, and how errors say it."""

from typing import Any

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


def check_several(name: str, prediction: Tree, parts: tuple[str, ...]) -> None:
    """Raise unless the prediction is a tuple of floating-point tensors of one shape and dtype."""
    fits = isinstance(prediction, tuple) and len(prediction) == len(parts)
    if not fits or not all(
        isinstance(part, Tensor) and part.is_floating_point() and part.dtype == prediction[0].dtype
        for part in prediction
    ):
        raise TypeError(
            f"{name}: expects a tuple ({', '.join(parts)}) of floating-point tensors of one dtype "
            f"as prediction, got {tree.describe(prediction)}"
        )
    if any(part.shape != prediction[0].shape for part in prediction):
        raise ValueError(
            f"{name}: expects {', '.join(parts)} of one shape, got {tree.describe(prediction)}"
        )


def labels(name: str, target: Tree, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A target of numbers, integers too, in the prediction's dtype."""
    if not isinstance(target, Tensor) or (
        target.dtype != like.dtype and (target.is_floating_point() or target.is_complex())
    ):
        raise TypeError(
            f"{name}: expects a target of integers or of dtype {like.dtype}, "
            f"got {tree.describe(target)}"
        )
    if tuple(target.shape) != shape:
        raise ValueError(
            f"{name}: expects a target of shape {shape} for a prediction of shape "
            f"{tuple(like.shape)}, got {tuple(target.shape)}"
        )
    return target.to(like.dtype)


def check_range(
    name: str, what: str, values: Tensor, low: float, high: float = float("inf")
) -> None:
    """Raise ValueError if a value is outside of [low, high].

    A NaN passes, so that ``check_finite`` can name the layer that it came from.
    """
    found = extremes(values)
    if found is not None and (found[0] < low or found[1] > high):
        bounds = f">= {low:g}" if high == float("inf") else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name}: expects {what} {bounds}, got {found[0]:g} to {found[1]:g}")


def check_signs(name: str, target: Tensor) -> None:
    """Raise ValueError if a number is neither -1 nor 1."""
    sizes = extremes(target.abs())
    if sizes is not None and (sizes[0] < 1 or sizes[1] > 1):
        raise ValueError(
            f"{name}: expects targets of -1 and 1, got sizes of {sizes[0]:g} to {sizes[1]:g}"
        )


def class_dim(prediction: Tensor) -> int:
    """The dimension of the classes: the second, or the only one."""
    return 1 if prediction.dim() > 1 else 0


def check_scores(name: str, prediction: Tree, weight: Tensor | None) -> None:
    """Raise unless the prediction has a dimension of classes, and a weight for each of them."""
    check_prediction(name, prediction)
    if prediction.dim() == 0:
        raise ValueError(f"{name}: expects (batch, classes, *) or (classes,), got ()")
    classes = prediction.shape[class_dim(prediction)]
    if weight is not None and tuple(weight.shape) != (classes,):
        raise ValueError(
            f"{name}: expects a weight for each of {classes} classes, got {tuple(weight.shape)}"
        )


def check_classes(
    name: str, prediction: Tensor, target: Tree, ignore_index: int | None = None
) -> None:
    """Raise unless the target has a class index, int64, for each example of the prediction."""
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        raise TypeError(
            f"{name}: expects a target of int64 class indices, got {tree.describe(target)}"
        )
    dim = class_dim(prediction)
    shape = (*prediction.shape[:dim], *prediction.shape[dim + 1 :])
    if tuple(target.shape) != shape:
        raise ValueError(
            f"{name}: expects a target of shape {shape} for predictions of shape "
            f"{tuple(prediction.shape)}, got {tuple(target.shape)}"
        )
    check_indices(name, target, 0, prediction.shape[dim], ignore_index)


def check_indices(
    name: str, target: Tensor, low: int, high: int, ignore_index: int | None = None
) -> None:
    """Raise ValueError if a class index other than ``ignore_index`` is outside of [low, high)."""
    found = extremes(target)
    if found is not None and (found[0] < low or found[1] >= high) and ignore_index is not None:
        found = extremes(target[target != ignore_index])
    if found is not None and (found[0] < low or found[1] >= high):
        raise ValueError(
            f"{name}: expects classes in [{low}, {high}), got {found[0]} to {found[1]}"
        )


def check_tensor(name: str, option: str, value: Any) -> None:
    """Raise TypeError unless an option is a tensor or None."""
    refuse_reduction(name, value)
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(f"{name}: expects a tensor as {option}, got {tree.describe(value)}")


def refuse_reduction(name: str, value: Any) -> None:
    """Raise TypeError for a string where another option belongs."""
    if isinstance(value, str):
        raise TypeError(
            f"{name}: got {value!r} in the place of another option; pass reduction={value!r}"
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
