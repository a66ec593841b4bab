"""Iteration to a fixed point, plain or with Anderson acceleration: the solver of `fixed_point`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcnet import tree
from funcnet.backward.equations.loops import loop_with_values, written
from funcnet.batch_axis import BatchAxis
from funcnet.core import Tree

Evaluate = Callable[[Tree], tuple[Tree, Tree]]
"""``z -> (g(z), what else an evaluation gives)``."""


class Solver(NamedTuple):
    """How a fixed point is looked for."""

    tol: float
    """The relative residual, ``|g(z) - z| / |g(z)|``, at which it counts as found."""

    max_iter: int
    """The most evaluations of g."""

    history: int
    """How many past differences Anderson acceleration uses; 0 for none of it."""

    damping: float
    """The part of the way to g(z) that a step goes."""

    axis: BatchAxis | None = None
    """That of a batch of which z is a part; the solver then is that of the whole."""

    def total(self, x: Tensor) -> Tensor:
        """The sum of the ranks' sums."""
        return x if self.axis is None else self.axis.sum(x)


def solve(evaluate: Evaluate, start: Tree, solver: Solver) -> tuple[Tree, Tree, dict[str, Tensor]]:
    """The last g(z), what else its evaluation gave, and the figures of the iteration.

    It ends when the relative residual is at most ``tol``, or is NaN, or after ``max_iter``
    evaluations. The figures are the number of ``iterations``, which are evaluations, the relative
    ``residual`` of the last z, and whether it has ``converged``. All of z is one vector in the
    norms; its members under vmap are vectors, and have iterations, of their own.
    """
    g, other = evaluate(start)
    reads_z = solver.history > 0 or solver.damping != 1.0
    carry = {
        "z": start if reads_z else (),
        "g": g,
        "other": other,
        "iterations": torch.ones((), dtype=torch.int64, device=tree.device_of(g)),
        "residual": _relative_residual(start, g, solver),
        "past": _no_past(g, solver.history),
    }

    def goes_on(carry: Any) -> Tensor:
        return (carry["residual"] > solver.tol) & (carry["iterations"] < solver.max_iter)

    def body(carry: Any) -> Any:
        z, g, past, count = (carry[name] for name in ("z", "g", "past", "iterations"))
        new_z = _next(z, g, past, solver)
        new_g, other = evaluate(new_z)
        return {
            "z": new_z if reads_z else (),
            "g": new_g,
            "other": other,
            "iterations": count + 1,
            "residual": _relative_residual(new_z, new_g, solver),
            "past": past and _with_step(past, (z, g), (new_z, new_g), count - 1, solver),
        }

    carry = loop_with_values(goes_on, body, carry)
    residual = carry["residual"]
    converged = residual <= solver.tol
    found = {"iterations": carry["iterations"], "residual": residual, "converged": converged}
    return carry["g"], carry["other"], found


def _relative_residual(z: Tree, g: Tree, solver: Solver) -> Tensor:
    """``|g - z| / |g|``, which is 0 where both are."""
    norms = tree.global_norm(g), tree.global_norm(tree.map(torch.sub, g, z))
    size, difference = norms
    if solver.axis is not None:
        size, difference = solver.total(torch.stack(norms).square()).sqrt().unbind()
    return difference / size.clamp(min=_tiny(size))


def _tiny(values: Tensor) -> float:
    return torch.finfo(values.dtype).tiny


def _next(z: Tree, g: Tree, past: Any, solver: Solver) -> Tree:
    """``z + damping (g - z)``, less what the past steps say of it.

    With their changes of the residual r as rows of R, and of ``z + damping r`` as rows of S, gamma
    minimizes ``|r - gamma R|``: so much of them has been undone by going back ``gamma S``.
    """
    damping = solver.damping
    to = g if damping == 1.0 else tree.map(lambda z, g: z + damping * (g - z), z, g)
    if not past:
        return to
    residual = [_flat(g) - _flat(z) for g, z in _pairs(g, z)]
    gamma = _least_squares(past["residual"], residual, solver)
    steps = iter(past["step"])
    return tree.map(lambda leaf: leaf - _like(gamma.to(leaf.dtype) @ next(steps), leaf), to)


def _least_squares(rows: list[Tensor], target: list[Tensor], solver: Solver) -> Tensor:
    """The gamma that minimizes ``|target - gamma rows|``; 0 for a row of zeros.

    By the normal equations of rows of length 1: the last changes, which are the smallest, must
    count as the first ones do.
    """
    wide = [(_wide(each), _wide(leaf)) for each, leaf in zip(rows, target, strict=True)]
    gram = sum([each @ each.mT for each, _ in wide])
    right = sum([each @ leaf for each, leaf in wide])
    assert isinstance(gram, Tensor)
    assert isinstance(right, Tensor)
    if solver.axis is not None:
        both = solver.total(torch.cat([gram, right.unsqueeze(-1)], -1))
        gram, right = both[..., :-1], both[..., -1]
    squares = gram.diagonal()
    # Rows of zeros count as of length 1: at 0, forward mode would multiply 0 by an infinite slope.
    scale = torch.where(squares > _tiny(gram), squares, 1.0).rsqrt()
    ridge = 16 * torch.finfo(gram.dtype).eps
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    normal = scale[:, None] * gram * scale + ridge * unit
    return torch.linalg.solve_ex(normal, right * scale)[0] * scale


def _no_past(z: Tree, history: int) -> Any:
    if not history:
        return {}
    flat = [_flat(leaf) for leaf in tree.leaves(z)]
    return {
        name: [leaf.new_zeros(history, len(leaf)) for leaf in flat] for name in ("residual", "step")
    }


def _with_step(past: Any, before: Tree, after: Tree, number: Tensor, solver: Solver) -> Any:
    """The past with the latest step in place of the oldest."""
    place = number % solver.history
    made: dict[str, list[Tensor]] = {"residual": [], "step": []}
    for index, leaves in enumerate(zip(*map(tree.leaves, (*before, *after)), strict=True)):
        z, g, new_z, new_g = map(_flat, leaves)
        change, moved = new_g - g, new_z - z
        residual = change - moved
        step = change if solver.damping == 1.0 else moved + solver.damping * residual
        for name, row in (("residual", residual), ("step", step)):
            made[name].append(written(past[name][index], row, place))
    return made


def _pairs(a: Tree, b: Tree) -> Any:
    return zip(tree.leaves(a), tree.leaves(b), strict=True)


def _flat(leaf: Tensor) -> Tensor:
    return leaf.reshape(-1)


def _like(vector: Tensor, leaf: Tensor) -> Tensor:
    return vector.reshape(leaf.shape)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
