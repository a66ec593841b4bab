"""What the layers have in common that end in a loss: an input beside its target."""

from typing import Any

from torch import Tensor

from funcnet import tree
from funcnet.errors import require

_NAMES = ("input", "target")


def input_and_target(x: Any) -> tuple[Tensor, Tensor]:
    """The parts of a tuple (input, target) or a dict of these; else ValueError or TypeError."""
    if isinstance(x, dict) and set(x) == set(_NAMES):
        x = tuple([x[name] for name in _NAMES])
    pair = type(x) is tuple and len(x) == 2 and all([isinstance(part, Tensor) for part in x])
    words = "expects a tuple (input, target) or a dict of both"
    require(pair, f"{words}, got {tree.describe(x)}")
    given, target = x
    floating = given.is_floating_point()
    require(floating, f"expects a floating-point input, got {tree.describe(given)}", TypeError)
    return given, target


def form_of(x: Any) -> Any:
    """The structure of x without its tensors, as a residual: `like_form` makes a dx of it."""
    return dict.fromkeys(x) if isinstance(x, dict) else (None, None)


def like_form(form: Any, dinput: Tensor | None, dtarget: Tensor | None = None) -> Any:
    """The dx of an input and a target, which has none unless it is floating."""
    if isinstance(form, dict):
        return {name: dinput if name == "input" else dtarget for name in form}
    return dinput, dtarget
