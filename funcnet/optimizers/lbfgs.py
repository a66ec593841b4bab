"""L-BFGS: Newton's method with what the last gradients say about the curvature."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from funcnet import runtime, tree
from funcnet.core import Params, Tree
from funcnet.errors import check_count
from funcnet.optimizers.checks import Number, check_options, check_rate
from funcnet.optimizers.leaves import Leaves
from funcnet.optimizers.lift import check_state, zero_step
from funcnet.optimizers.param_trees import Trees

ValueAndGrad = Callable[[Params], tuple[Tensor, Params]]
"""``params -> (value, grads)``, the whole objective: a scalar, and a tree like the params."""


class Minimizer(NamedTuple):
    """An optimizer that calls the objective itself, as often as it needs: two pure functions.

    ``init_state(params) -> opt_state`` and
    ``step(value_and_grad, opt_state, params) -> (params, opt_state, value)``.
    """

    init_state: Callable[[Params], Tree]
    step: Callable[[ValueAndGrad, Tree, Params], tuple[Params, Tree, Tensor]]


class LbfgsState(NamedTuple):
    """What L-BFGS knows after some iterations; all params are one vector of n numbers.

    The counts of iterations and of evaluations, and of the pairs that were stored; the last
    direction (n,), its length, and the gradient (n,) it was found from; the changes s of the params
    and y of the gradients (history_size, n), the newest in place of the oldest, and ``1 / (y s)``;
    and the factor of the Hessian's first guess.
    """

    iterations: Tensor
    evaluations: Tensor
    stored: Tensor
    direction: Tensor
    length: Tensor
    grad: Tensor
    s: Tensor
    y: Tensor
    rho: Tensor
    scale: Tensor


def lbfgs(
    lr: Number = 1.0,
    max_iter: int = 20,
    max_eval: int | None = None,
    tolerance_grad: float = 1e-7,
    tolerance_change: float = 1e-9,
    history_size: int = 100,
    line_search_fn: str | None = None,
) -> Minimizer:
    """``p + t d`` with ``d = -H g``, where H is the inverse Hessian as the last gradients show it.

    Of the last changes of the params, ``s = t d``, and of the gradients, ``y = g - g_before``, H
    is made by the BFGS formula, from ``H = (y s) / (y y)``, for each pair with ``y s > 1e-10``:

        H = (1 - s y^T / (y s)) H (1 - y s^T / (y s)) + s s^T / (y s)

    A step is up to ``max_iter`` iterations of it, each with one evaluation of the objective or, if
    it searches along d, some. t is ``lr``, and ``min(1, 1 / sum|g|) lr`` at the very first; a
    search finds one for which the strong Wolfe conditions hold:

        f(p + t d) <= f(p) + 1e-4 t g d     and     |g(p + t d) d| <= 0.9 |g d|

    Args:
        lr: a number or a 0-d tensor.
        max_iter: the greatest number of iterations of one step.
        max_eval: the greatest number of evaluations of one step, but that a search ends; default
            ``max_iter * 5 // 4``.
        tolerance_grad: a step ends where no entry of g is greater.
        tolerance_change: and where the objective or all params change by less.
        history_size: of how many changes H is made. The state holds two vectors for each.
        line_search_fn: ``"strong_wolfe"``, or None for none.

    Returns:
        a `funcnet.optimizers.Minimizer`. Its ``step`` returns the objective's value at the params
        it was given.

    A step branches on values, and waits for the device to read them. So it runs eagerly, and is a
    TypeError under jit and vmap; what may be compiled is the ``value_and_grad`` it is given. For
    the objective to be one function, give it all data, no key and no dropout.

    Source: Liu and Nocedal 1989; Nocedal and Wright, Numerical Optimization, chapters 3 and 7;
    ``torch.optim.LBFGS``, whose ``step(closure)`` is one step here.

    >>> import funcnet as fn
    >>> x, target = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [3.0]])
    >>> net = fn.linear(1)
    >>> params, _ = net.init(fn.key(0), x)
    >>> value_and_grad = fn.value_and_grad(net, fn.mse())
    >>> def f(params):
    ...     return value_and_grad(params, (x, target))[:2]
    >>> minimizer = fn.lbfgs(line_search_fn="strong_wolfe")
    >>> params, opt_state, _ = minimizer.step(f, minimizer.init_state(params), params)
    >>> print(f"y = {params['weight'].item():.3f} x + {params['bias'].item():.3f}")
    y = 2.000 x + 1.000
    """
    check_rate("lbfgs", lr)
    check_count("lbfgs", max_iter=max_iter, history_size=history_size)
    max_eval = max_iter * 5 // 4 if max_eval is None else max_eval
    check_count("lbfgs", max_eval=max_eval)
    check_options("lbfgs", tolerance_grad=tolerance_grad, tolerance_change=tolerance_change)
    if line_search_fn not in (None, "strong_wolfe"):
        raise ValueError(f"lbfgs: line_search_fn must be 'strong_wolfe', got {line_search_fn!r}")

    def init_state(params: Params) -> LbfgsState:
        p = Trees(params).params
        x = _flat(p)
        count, history = zero_step(cast(Any, p)), x.new_zeros(history_size, x.numel())
        return LbfgsState(
            *(count, count.clone(), count.clone()),
            *(torch.zeros_like(x), count.double(), torch.zeros_like(x)),
            *(history, history.clone(), x.new_zeros(history_size), x.new_ones(())),
        )

    def step(
        value_and_grad: ValueAndGrad, opt_state: Tree, params: Params
    ) -> tuple[Params, Tree, Tensor]:
        if runtime.is_tracing() or runtime.is_batched():
            raise TypeError(
                "lbfgs: a step branches on values, and cannot run under jit or vmap; "
                "jit the value_and_grad that it is given instead"
            )
        trees = Trees(params)
        x = _flat(trees.params)
        state = _check_state(opt_state, x, history_size)

        def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
            value, grads = value_and_grad(trees.join(_apart(x, trees.params)))
            if not isinstance(value, Tensor) or value.dim():
                raise ValueError(f"lbfgs: expects a scalar value, got {tree.describe(value)}")
            return value, _flat(trees.split(grads, "lbfgs: grads")).to(x.dtype)

        value, g = evaluate(x)
        if x.numel() == 0 or bool(g.abs().max() <= tolerance_grad):
            return params, state._replace(evaluations=state.evaluations + 1), value
        search = None if line_search_fn is None else _strong_wolfe
        limits = (max_iter, max_eval, tolerance_grad, tolerance_change)
        x, state = _iterate(evaluate, search, lr, limits, state, x, float(value), g)
        return trees.join(_apart(x, trees.params)), state, value

    return Minimizer(init_state, step)


def _flat(leaves: Leaves) -> Tensor:
    parts = [leaf.reshape(-1) for leaf in leaves]
    return torch.cat(parts) if parts else torch.zeros(0)


def _apart(x: Tensor, like: Leaves) -> Leaves:
    parts = x.split([leaf.numel() for leaf in like]) if like.tensors else ()
    return Leaves(
        [part.reshape(leaf.shape).to(leaf.dtype) for part, leaf in zip(parts, like, strict=True)]
    )


def _check_state(opt_state: Tree, x: Tensor, history_size: int) -> LbfgsState:
    check_state("lbfgs", LbfgsState, opt_state)
    expected = (history_size, x.numel())
    if opt_state.s.shape != expected:
        raise ValueError(
            f"lbfgs: expects a history of shape {expected} for these params and history_size, "
            f"got {tuple(opt_state.s.shape)}"
        )
    return opt_state


def _iterate(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    search: Callable[..., tuple["_Point", int]] | None,
    lr: Number,
    limits: tuple[int, int, float, float],
    state: LbfgsState,
    x: Tensor,
    value: float,
    g: Tensor,
) -> tuple[Tensor, LbfgsState]:
    """The iterations of a step, from params x and the objective's value and gradient there."""
    max_iter, max_eval, tolerance_grad, tolerance_change = limits
    history = _History(state)
    iterations, evaluations = int(state.iterations), 1
    d, g_before = state.direction, state.grad
    t: Any = state.length
    for iteration in range(1, max_iter + 1):
        first = iterations == 0
        iterations += 1
        if not first:
            history.store(d.mul(t), g.sub(g_before))
        d = history.times(-g) if not first else -g
        g_before, value_before = g, value
        shrunk: Any = min(1.0, 1.0 / g.abs().sum()) if first else 1.0
        t = shrunk * lr if first else lr
        slope = g.dot(d)
        if slope > -tolerance_change:
            break
        if search is not None:

            def along(t: Any, x: Tensor = x, d: Tensor = d) -> "_Point":
                value, g = evaluate(x.add(d, alpha=float(t)))
                return _Point(t, float(value), g, g.dot(d))

            start, most = _Point(0.0, value, g, slope), max_eval - evaluations
            (t, value, g, _), count = search(along, t, d, start, most, tolerance_change)
            x, evaluations = x.add(d, alpha=float(t)), evaluations + count
        else:
            x = x.add(d, alpha=float(t))
            if iteration != max_iter:  # else nobody asks for it
                found, g = evaluate(x)
                value, evaluations = float(found), evaluations + 1
        if (
            evaluations >= max_eval
            or bool(g.abs().max() <= tolerance_grad)
            or bool(d.mul(t).abs().max() <= tolerance_change)
            or abs(value - value_before) < tolerance_change
        ):
            break
    s, y, rho, scale = history.tensors
    return x, LbfgsState(
        torch.full_like(state.iterations, iterations),
        state.evaluations + evaluations,
        torch.full_like(state.stored, history.stored),
        *(d, torch.as_tensor(t, dtype=torch.float64, device=x.device), g_before, s, y, rho, scale),
    )


class _History:
    """The last changes of params and gradients, in buffers of a step's own."""

    def __init__(self, state: LbfgsState) -> None:
        self.s, self.y, self.rho = state.s.clone(), state.y.clone(), state.rho.clone()
        self.scale, self.stored = state.scale, int(state.stored)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As in the state."""
        return self.s, self.y, self.rho, self.scale

    def store(self, s: Tensor, y: Tensor) -> None:
        """Add a pair, unless the objective was not convex on the way."""
        ys = y.dot(s)
        if ys > 1e-10:
            slot = self.stored % len(self.rho)
            self.s[slot], self.y[slot], self.rho[slot] = s, y, 1.0 / ys
            self.scale, self.stored = ys / y.dot(y), self.stored + 1

    def times(self, q: Tensor) -> Tensor:
        """``H q``, by the two loops of Nocedal 1980."""
        size, q = len(self.rho), q.clone()
        oldest_first = [i % size for i in range(max(0, self.stored - size), self.stored)]
        factors = {}
        for i in reversed(oldest_first):
            factors[i] = self.s[i].dot(q) * self.rho[i]
            q.add_(self.y[i], alpha=-float(factors[i]))
        r = q * self.scale
        for i in oldest_first:
            r.add_(self.s[i], alpha=float(factors[i] - self.y[i].dot(r) * self.rho[i]))
        return r


class _Point(NamedTuple):
    """A point on the line: ``p + t d``, the objective, its gradient, and its derivative by t."""

    t: Any
    value: float
    grad: Tensor
    slope: Tensor


def _strong_wolfe(
    along: Callable[[Any], _Point],
    t: Any,
    d: Tensor,
    start: _Point,
    most: int,
    tolerance: float,
    c1: float = 1e-4,
    c2: float = 0.9,
) -> tuple[_Point, int]:
    """A point where the strong Wolfe conditions hold, or the lowest found, and the evaluations.

    Nocedal and Wright, algorithms 3.5 and 3.6, as in minFunc: from t on it goes further until an
    interval must hold such a point, and makes that smaller, each by cubic interpolation.
    """

    def too_high(point: _Point) -> bool:
        return bool(point.value > start.value + c1 * point.t * start.slope)

    def is_flat(point: _Point) -> bool:
        return bool(abs(point.slope) <= -c2 * start.slope)

    before, point, count, iteration = start, along(t), 1, 0
    bracket = [start, point]
    while iteration < most:
        bracket = [before, point]
        if too_high(point) or (iteration > 1 and point.value >= before.value):
            break
        if is_flat(point):
            return point, count
        if point.slope >= 0:
            break
        further = (point.t + 0.01 * (point.t - before.t), 10 * point.t)
        before, point = point, along(_cubic(before, point, *further))
        count, iteration = count + 1, iteration + 1
        bracket = [start, point]

    greatest_change = d.abs().max()
    hesitant = False  # whether the last t was close to an end of the interval
    low = 0 if bracket[0].value <= bracket[1].value else 1
    while iteration < most:
        left, right = sorted([bracket[0].t, bracket[1].t])
        if (right - left) * greatest_change < tolerance:
            break
        t, margin = _cubic(bracket[0], bracket[1], left, right), 0.1 * (right - left)
        close = bool(min(right - t, t - left) < margin)
        if close and (hesitant or t >= right or t <= left):
            t = right - margin if abs(t - right) < abs(t - left) else left + margin
            close = False
        hesitant = close
        point = along(t)
        count, iteration = count + 1, iteration + 1
        if too_high(point) or point.value >= bracket[low].value:
            bracket[1 - low] = point
            low = 0 if bracket[0].value <= bracket[1].value else 1
            continue
        if is_flat(point):
            return point, count
        if point.slope * (bracket[1 - low].t - bracket[low].t) >= 0:
            bracket[1 - low] = bracket[low]
        bracket[low] = point
    return bracket[low], count


def _cubic(a: _Point, b: _Point, least: Any, greatest: Any) -> Any:
    """Where the cubic polynomial through two points with these slopes is lowest, in an interval."""
    a, b = (a, b) if a.t <= b.t else (b, a)
    d1 = a.slope + b.slope - 3 * (a.value - b.value) / (a.t - b.t)
    square = d1**2 - a.slope * b.slope
    if square < 0 or square.isnan():
        return (least + greatest) / 2.0
    d2 = square.sqrt()
    t = b.t - (b.t - a.t) * ((b.slope + d2 - d1) / (b.slope - a.slope + 2 * d2))
    return min(max(t, least), greatest)
