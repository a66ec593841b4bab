"""`neural_ode`: the solution of a differential equation whose right-hand side is a layer."""

from itertools import pairwise
from math import isfinite
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from funcnet import runtime, tree
from funcnet.backward.equations.adaptive_steps import Adaptive
from funcnet.backward.equations.equal_steps import Equal
from funcnet.backward.equations.runge_kutta import METHODS, Field, require_alike, time_dtype
from funcnet.checks import check_kind
from funcnet.combinators.combine import output_on_meta
from funcnet.core import (
    Applied,
    Forward,
    Grads,
    Key,
    Layer,
    Params,
    Pullback,
    Tree,
    around,
    barrier,
    pull,
)
from funcnet.errors import check_count, locate, require
from funcnet.lift import stateful

_NAME = "neural_ode"
_ADAPTIVE = "dopri5"


def neural_ode(
    f: Layer,
    t: tuple[float, float] | Tensor,
    steps: int,
    method: str = "rk4",
    *,
    takes_time: bool = False,
    keep: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-7,
) -> Layer:
    """The solution of ``dy/dt = f(y)`` that begins with ``y(t0) = x``.

    The gradients are those of the discrete solution, exactly: each step's pullback, from the last
    to the first. The y before each step is kept, and the step is run again in the backward pass, so
    that the memory is that of one step and of a y for each. Under `jit` the steps are one loop.

    Args:
        f: a layer that gives the derivative, of the shape and dtype of y.
        t: a pair of numbers ``(t0, t1)`` for y at t1; or a 1-d tensor of increasing times, of which
            the first is that of x, for y at each of them.
        steps: the number of equal steps from each time to the next; for "dopri5", the most steps,
            tried ones too, from the first time to the last.
        method: "euler", "midpoint" or "rk4", the classical one of order 4; or "dopri5", Dormand and
            Prince's of order 5, which chooses its steps by ``rtol`` and ``atol``. Under `jit` and
            `vmap` there is memory for ``steps`` times y then, as their number is not known.
        takes_time: whether f is a layer of the pair ``(t, y)``, with t a 0-d tensor.
        keep: k, to keep only every k-th y, where k divides ``steps``: the k steps in between are
            run a second time in the backward pass. Not for "dopri5".
        rtol, atol: of "dopri5": the error of a step, estimated by a solution of order 4, is at most
            ``atol + rtol |y|``, in the root mean square over all numbers of y.

    Inputs:
        x: a tree of floating-point tensors.
    Returns:
        y at t1, like x, or at all times, with those as the first dimension.
    Params: those of f.
    State:
        that of f after its last evaluation, each of which sees the state that came in, and has the
        same key. For "dopri5" also ``neural_ode``: the ``steps`` of the last call, those that were
        ``rejected``, the time it has ``reached``, and whether it has ``finished``. With too few
        ``steps`` it has not, and y is NaN. `solver_figures` makes metrics of them.
    VJP:
        the exact adjoint of the discrete solution, that is, of the steps that were taken; how their
        sizes, which "dopri5" chooses, depend on y is left out.
    Raises:
        ValueError: the times do not increase, or f does not keep the shape and dtype of y.

    ``torchdiffeq.odeint`` is the same, with these differences: its "rk4" is the 3/8 rule, and its
    "dopri5" interpolates at the times, where this one ends a step at each of them.

    Source: Chen et al. 2018; Hairer, Norsett and Wanner 1993; ``torchdiffeq.odeint``.

    >>> import funcnet as fn
    >>> decay = fn.linear(1, bias=False)
    >>> net = neural_ode(decay, (0.0, 2.0), steps=20)
    >>> net.apply({"weight": torch.tensor([[-1.0]])}, torch.ones(1))[0], torch.tensor(-2.0).exp()
    (tensor([0.1353]), tensor(0.1353))
    >>> at = neural_ode(decay, torch.tensor([0.0, 1.0, 2.0]), steps=10)
    >>> at.apply({"weight": torch.tensor([[-1.0]])}, torch.ones(1))[0].flatten()
    tensor([1.0000, 0.3679, 0.1353])
    """
    check_kind(_NAME, f, Layer)
    times, at_all = _times(t)
    check_count(_NAME, steps=steps, keep=keep)
    methods = [*METHODS, _ADAPTIVE]
    require(method in methods, f"{_NAME}: method must be one of {methods}, got {method!r}")
    adapts = method == _ADAPTIVE
    require(not (adapts and keep > 1), f"{_NAME}: keep is not for {_ADAPTIVE!r}, got {keep}")
    require(steps % keep == 0, f"{_NAME}: keep must divide steps, got {keep} and {steps}")
    for name, value in (("rtol", rtol), ("atol", atol)):
        require(value >= 0, f"{_NAME}: {name} must be at least 0, got {value!r}")
    require(rtol or atol, f"{_NAME}: rtol or atol must be above 0")
    solver: Any
    if adapts:
        solver = Adaptive(times, at_all, steps, rtol, atol)
    else:
        solver = Equal(times, at_all, steps, METHODS[method], keep)

    def init(key: Tensor, x: Tree) -> tuple[Params, Params]:
        _check_y(x)
        time = torch.zeros((), dtype=time_dtype(x), device=tree.device_of(x))
        given = (time, x) if takes_time else x
        try:
            params, state = f.init(key, given)
            made = output_on_meta(f, tree.to_meta(given), params, state)
        except Exception as error:
            locate(error, _NAME)
            raise
        require_alike(x, made)
        taken = f"{_NAME}: f has state called {_NAME!r} at its top; put it into a serial"
        require(_NAME not in state, taken)
        return params, _merged(state, solver.no_figures(x))

    def run(
        params: Params, x: Tree, state: Params, key: Key, train: bool, keeps: bool
    ) -> tuple[Tree, Tree, Params]:
        """y, what is kept of the steps, and the new state."""
        _check_y(x)
        field = Field(f, takes_time, train, params, _inside(state), key if f.takes_key else None)
        if not keeps and any([leaf.is_meta for leaf in tree.leaves(x)]):
            time = torch.empty((), dtype=time_dtype(x), device="meta")
            y, new_state = field(time, x)
            y = tree.map(lambda leaf: torch.stack([leaf] * len(times)), y) if at_all else y
            return y, None, _merged(new_state, solver.no_figures(x))
        y, kept, new_state, figures = solver.run(field, x, keeps)
        return y, kept, _merged(new_state, figures)

    def apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Applied:
        y, _, new_state = run(params, x, state, key, train, keeps=False)
        return y, new_state

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        y, steps_kept, new_state = run(params, x, state, key, train, keeps=True)
        kept = {"params": params or {}, "steps": steps_kept, "state": _inside(state)}
        if key is not None and f.takes_key:
            kept["key"] = key
        return y, Pullback(neural_ode_rule, kept, (f, takes_time, train, solver)), new_state

    def rebuild(f: Layer) -> Layer:
        options: Any = {"takes_time": takes_time, "keep": keep, "rtol": rtol, "atol": atol}
        return neural_ode(f, t, steps, method, **options)

    return stateful(
        init, forward, apply=apply, name=_NAME, mixes_examples=adapts, **around(f, rebuild)
    )


def neural_ode_rule(
    residuals: dict[str, Any],
    dy: Tree,
    f: Layer,
    takes_time: bool,
    train: bool,
    solver: Any,
    *,
    params: bool,
    x: bool,
) -> Grads:
    """The pullbacks of the steps, each of which is run again, from the last to the first."""
    if not (params or x):
        return None, None
    again, dy = barrier((residuals, dy))
    field = Field(f, takes_time, train, again["params"], again["state"], again.get("key"))
    total = _no_gradients(field, dy, solver.at_all) if params else None
    dparams, dx = solver.run_back(field, again["steps"], dy, total)
    return dparams, dx if x else None


_GRADIENTS: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()
"""The structure of the gradients of an f, by its forward pass and the names of its params."""


def _no_gradients(field: Field, dy: Tree, at_all: bool) -> Params:
    """Zeros for the gradients that f's pullback gives: of a `freeze` around it not those of all."""
    params = tree.to_dotted(field.params)
    known = _GRADIENTS.setdefault(field.f.forward, {})
    names = field.train, *params
    if names not in known:
        y = tree.to_meta(tree.map(lambda leaf: leaf[0], dy) if at_all else dy)
        time = torch.empty((), dtype=time_dtype(y), device="meta")
        k, pullback = field.on_meta().forward(time, y)
        dparams = pull({"": pullback}, "", k, params=True, x=False)[0]
        known[names] = tree.paths(dparams), tree.flatten(dparams)[1]
    paths, treedef = known[names]
    zeros: Params = treedef.unflatten([torch.zeros_like(params[path]) for path in paths])
    return zeros


def _times(t: Any) -> tuple[tuple[float, ...], bool]:
    """The times as numbers, and whether y is asked for at all of them."""
    if isinstance(t, Tensor):
        fits = t.dim() == 1 and len(t) >= 2
        require(
            fits,
            f"{_NAME}: t must be a pair of numbers or a 1-d tensor of times, got "
            f"{tree.describe(t)}",
        )
        found = runtime.read(t.detach().cpu())
        require(found is not None, f"{_NAME}: t must have values when the layer is made", TypeError)
    else:
        numbers = isinstance(t, (tuple, list)) and all([_is_number(each) for each in t])
        fits = numbers and len(t) == 2
        require(fits, f"{_NAME}: t must be a pair of numbers or a 1-d tensor of times, got {t!r}")
        found = t
    times = tuple([float(each) for each in found])
    require(all(map(isfinite, times)), f"{_NAME}: t must be finite, got {times}")
    increase = all([before < after for before, after in pairwise(times)])
    require(increase, f"{_NAME}: t must increase, got {times}")
    return times, isinstance(t, Tensor)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_y(y: Tree) -> None:
    leaves = tree.leaves(y)
    fits = leaves and all([isinstance(y, Tensor) and y.is_floating_point() for y in leaves])
    require(
        fits, f"{_NAME}: expects floating-point tensors as x, got {tree.describe(y)}", TypeError
    )


def _inside(state: Params) -> Params:
    """The state of f."""
    return {name: part for name, part in state.items() if name != _NAME}


def _merged(state: Params, figures: Params) -> Params:
    return tree.merge(state, {_NAME: figures} if figures else {})
