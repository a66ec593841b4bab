"""Explicit Runge-Kutta methods: a step of one, and the step's pullback, from the same table."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet import tree
from funcnet.core import EMPTY, Key, Layer, Params, Pullback, Sums, Tree, pull
from funcnet.errors import locate


class Method(NamedTuple):
    """A Butcher tableau: ``k_i = f(t + c_i h, y + h sum_j a_ij k_j)``, ``y + h sum_i b_i k_i``."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]


METHODS = {
    "euler": Method((0.0,), ((),), (1.0,)),
    "midpoint": Method((0.0, 1 / 2), ((), (1 / 2,)), (0.0, 1.0)),
    "rk4": Method(
        (0.0, 1 / 2, 1 / 2, 1.0),
        ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
}
"""The methods of equal steps."""

DOPRI5 = Method(
    (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    ),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""Dormand and Prince 1980, of order 5, without the stage that only the error reads."""

DOPRI5_ERROR = (
    35 / 384 - 5179 / 57600,
    0.0,
    500 / 1113 - 7571 / 16695,
    125 / 192 - 393 / 640,
    -2187 / 6784 + 92097 / 339200,
    11 / 84 - 187 / 2100,
    -1 / 40,
)
"""The weights of the difference to the solution of order 4; the last is that of ``f(t + h, y1)``,
which is the first stage of the next step."""


class Field:
    """The right-hand side of ``dy/dt = f(t, y)``: a layer with the arguments of a call.

    Every evaluation has the same key and sees the state that came in.
    """

    def __init__(
        self, f: Layer, takes_time: bool, train: bool, params: Params, state: Params, key: Key
    ) -> None:
        self.f, self.takes_time, self.train = f, takes_time, train
        self.params, self.state, self.key = params, state, key

    def __call__(self, t: Tensor, y: Tree) -> tuple[Tree, Params]:
        """f, and its new state."""
        try:
            k, state = self.f.apply(
                self.params, self.input(t, y), self.state, key=self.key, train=self.train
            )
        except Exception as error:
            locate(error, "neural_ode")
            raise
        require_alike(y, k)
        return k, state

    def forward(self, t: Tensor, y: Tree) -> tuple[Tree, Pullback]:
        """f, and its pullback."""
        k, pullback, _ = self.f.forward(
            self.params, self.input(t, y), self.state, self.key, self.train
        )
        return k, pullback

    def on_meta(self) -> "Field":
        """The same without data."""
        given = tree.to_meta((self.params, self.state, self.key))
        return Field(self.f, self.takes_time, self.train, *given)

    def input(self, t: Tensor, y: Tree) -> Tree:
        """What f takes."""
        return (t, y) if self.takes_time else y


def require_alike(y: Tree, k: Tree) -> None:
    """Raise ValueError unless the derivative has the shape and dtype of y."""
    if not tree.alike(tree.to_meta(y), tree.to_meta(k)):
        expected, got = tree.describe(y), tree.describe(k)
        raise ValueError(f"neural_ode: f must keep the shape and dtype of y, {expected}, got {got}")


def time_dtype(y: Tree) -> torch.dtype:
    """The dtype of times: that of y, if it is no less than float32."""
    return torch.promote_types(tree.leaves(y)[0].dtype, torch.float32)


def plus(y: Tree, h: Tensor, weights: tuple[float, ...], ks: list[Tree]) -> Tree:
    """``y + h sum_i weights_i k_i``."""
    chosen = [(weight, k) for weight, k in zip(weights, ks, strict=True) if weight]
    if not chosen:
        return y
    factors, terms = zip(*chosen, strict=True)

    def one(leaf: Tensor, *each: Tensor) -> Tensor:
        return leaf + h.to(leaf.dtype) * weighted(factors, each)

    return tree.map(one, y, *terms)


def weighted(factors: Any, tensors: Any) -> Tensor:
    """The sum of tensors, each times its number."""
    total = factors[0] * tensors[0]
    for factor, each in zip(factors[1:], tensors[1:], strict=True):
        total = torch.add(total, each, alpha=factor)
    return total


def step(
    field: Field, method: Method, t: Tensor, h: Tensor, y: Tree, first: Tree = None
) -> tuple[Tree, list[Tree], Params]:
    """The y after a step, its stages, and the state after the last of them.

    ``first`` is ``f(t, y)``, if it is known.
    """
    ks, state = ([] if first is None else [first]), EMPTY
    for c, row in zip(method.c[len(ks) :], method.a[len(ks) :], strict=True):
        k, state = field(t + c * h, plus(y, h, row, ks))
        ks.append(k)
    return plus(y, h, method.b, ks), ks, state


def step_back(
    field: Field, method: Method, t: Tensor, h: Tensor, y: Tree, dy: Tree, total: Any
) -> tuple[Any, Tree]:
    """The pullback of a step that begins at y, which is run again for it.

    ``dk_i = h (b_i dy + sum_{j > i} a_ji ds_j)`` is the cotangent of a stage, ``ds_i`` that of the
    y it was evaluated at, by f's pullback, and ``dy + sum_i ds_i`` that of the y before the step.

    Args:
        total: the gradients of the params so far, or None for none; memory of the caller's own.
    """
    ks: list[Tree] = []
    pullbacks: dict[str, Any] = {}
    for index, (c, row) in enumerate(zip(method.c, method.a, strict=True)):
        k, pullbacks[str(index)] = field.forward(t + c * h, plus(y, h, row, ks))
        ks.append(k)
    del ks, k
    nothing = tree.map(torch.zeros_like, dy)
    later: list[Tree] = []  # the ds of the stages from this one on
    for index in reversed(range(len(method.c))):
        weights = [method.b[index], *[row[index] for row in method.a[index + 1 :]]]
        dk = plus(nothing, h, tuple(weights), [dy, *later])
        params = False if total is None else Sums(total)
        total, dx = pull(pullbacks, str(index), dk, params=params, x=True)
        ds = dx[1] if field.takes_time else dx
        later.insert(0, nothing if ds is None else ds)
    return total, plus(dy, torch.ones_like(h), (1.0,) * len(later), later)
