"""`fixed_point`: a layer whose output solves an equation, and whose pullback solves its adjoint."""

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.backward.equations.iteration import Solver, solve
from funcnet.batch_axis import BatchAxis
from funcnet.checks import check_function, check_kind
from funcnet.combinators.combine import output_on_meta
from funcnet.core import (
    Applied,
    Forward,
    Grads,
    Key,
    Layer,
    Params,
    Probe,
    Pullback,
    Tree,
    around,
    barrier,
    pull,
    sum_cotangents,
)
from funcnet.deferred import defers, mapped
from funcnet.errors import check_count, locate, require
from funcnet.global_forms import in_global_form
from funcnet.lift import stateful

_NAME = "fixed_point"


def fixed_point(
    f: Layer,
    start: Callable[[Tree], Tree] | None = None,
    *,
    tol: float = 1e-5,
    max_iter: int = 50,
    history: int = 3,
    damping: float = 1.0,
    backward_tol: float | None = None,
    backward_max_iter: int | None = None,
    limit: float = 0.1,
) -> Layer:
    """``z = f(x, z)``, solved for z: a net of infinitely many equal layers, in the memory of one.

    z begins at 0 and is iterated until ``|f(x, z) - z| <= tol |f(x, z)|``, with Anderson
    acceleration: each step also uses what the last ``history`` steps have shown of f. Nothing of
    the iterations is kept but the last z. The same solver then finds the cotangents by f's own
    pullback at that z, whatever way led there. Under `jit` each of the two is one loop, which ends
    as soon as it has converged; under `vmap` each member has iterations of its own.

    Args:
        f: a layer of the pair ``(x, z)`` that gives the next z, of the shape and dtype of z: it
            should be a contraction in z, that is, bring any two z closer to each other. A
            `rnn_cell` is such a layer.
        start: the first z, as a function of x; no derivative goes through it. Default zeros like x.
        tol: the relative residual at which z has converged. All of z, with all examples of a batch,
            is one vector in these norms, so that examples have their iterations in common.
        max_iter: the most evaluations of f.
        history: of Anderson acceleration; 0 for the plain iteration. The solver holds twice as many
            tensors like z while it runs.
        damping: the part of the way to f(x, z) that a step goes, from 0 to 1.
        backward_tol, backward_max_iter: those of the backward pass; default the forward's.
        limit: the relative residual of the backward pass above which the cotangents are NaN.

    Inputs:
        x: a tree of tensors.
    Returns:
        z, the last value of f.
    Params: those of f.
    State:
        that of f, and ``fixed_point``: the ``iterations`` of the last call, the relative
        ``residual`` at their end, and whether it has ``converged``; see `solver_figures`. f is
        evaluated on the state that came in, and with the same key, at each iteration, so that a
        dropout within has one mask; the new state is that of the last evaluation.
    Metrics:
        `train_step` tells the three figures of the step's forward pass and, with ``backward_``
        before their names, of its backward pass by the path of the layer, as "1.residual". Of
        several calls they are means; ``converged`` is the part of them that has.
    VJP:
        ``u = dy + (df/dz)^T u``, solved for u; ``dparams = (df/dparams)^T u``,
        ``dx = (df/dx)^T u``. f runs once more at z, so that nothing but z is kept for it.
        If the solver ends with a residual above ``limit``, the cotangents are NaN, on which
        ``check_finite`` of `train_step` and ``apply_if_finite`` act: no wrong gradient is taken for
        a right one.
    Raises:
        ValueError: f does not keep the shape and dtype of z, or z is not floating point.

    Source: Bai et al. 2019, deep equilibrium models; Walker and Ni 2011, Anderson acceleration.

    >>> import funcnet as fn
    >>> f = fn.serial(fn.parallel(fn.identity(), fn.linear(3, bias=False)), fn.add(), fn.tanh())
    >>> net, x = fixed_point(f), torch.full((4, 3), 0.5)
    >>> params, state = net.init(fn.key(0), x)
    >>> z, state = net.apply(params, x, state)
    >>> again, _ = f.apply(params, (x, z))
    >>> torch.allclose(z, again, rtol=1e-4), bool(state["fixed_point"]["converged"])
    (True, True)
    """
    check_kind(_NAME, f, Layer)
    if start is not None:
        check_function(f"{_NAME}: start", start)
    forward_solver = Solver(tol, max_iter, history, damping)
    backward_solver = Solver(
        tol if backward_tol is None else backward_tol,
        max_iter if backward_max_iter is None else backward_max_iter,
        history,
        damping,
    )
    for prefix, solver in (("", forward_solver), ("backward_", backward_solver)):
        _check(prefix, solver)
    require(limit > 0, f"{_NAME}: limit must be above 0, got {limit!r}")
    return _solving(f, start, forward_solver, backward_solver, limit)


def _solving(
    f: Layer,
    start: Callable[[Tree], Tree] | None,
    forward_solver: Solver,
    backward_solver: Solver,
    limit: float,
) -> Layer:
    """`fixed_point`, of its solvers."""

    def first(x: Tree) -> Tree:
        z = tree.map(torch.zeros_like, x) if start is None else start(x)
        floating = [isinstance(z, Tensor) and z.is_floating_point() for z in tree.leaves(z)]
        if not floating or not all(floating):
            hint = "; give start, a function of x" if start is None else ""
            got = tree.describe(z)
            raise ValueError(f"{_NAME}: expects floating-point tensors as z, got {got}{hint}")
        return z

    def init(key: Tensor, x: Tree) -> tuple[Params, Params]:
        z = first(x)
        try:
            params, state = f.init(key, (x, z))
            made = output_on_meta(f, tree.to_meta((x, z)), params, state)
        except Exception as error:
            locate(error, _NAME)
            raise
        _require_alike(z, made)
        taken = f"{_NAME}: f has state called {_NAME!r} at its top; put it into a serial"
        require(_NAME not in state, taken)
        return params, tree.merge(state, {_NAME: _no_figures(z)})

    def apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Applied:
        params, inside = _without(PROBE.entry, params), _without(_NAME, state)
        z = first(x)

        def evaluate(z: Tree) -> tuple[Tree, Params]:
            try:
                g, new_state = f.apply(params, (x, z), inside, key=key, train=train)
            except Exception as error:
                locate(error, _NAME)
                raise
            _require_alike(z, g)
            return g, new_state

        y, new_state, figures = solve(evaluate, z, forward_solver)
        return y, tree.merge(new_state, {_NAME: figures})

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        y, new_state = apply(params, x, state, key, train)
        own = _without(PROBE.entry, params)
        kept: dict[str, Any] = {"params": own, "x": x, "z": y, "state": _without(_NAME, state)}
        if PROBE.entry in params:
            kept["figures"] = new_state[_NAME]
        if key is not None and f.takes_key:
            kept["key"] = key
        static = (f, train, backward_solver, limit)
        return y, Pullback(fixed_point_rule, kept, static), new_state

    def rebuild(f: Layer) -> Layer:
        return _solving(f, start, forward_solver, backward_solver, limit)

    def global_form(axis: BatchAxis) -> Layer:
        solvers = [each._replace(axis=axis) for each in (forward_solver, backward_solver)]
        return _solving(in_global_form(f, axis), start, solvers[0], solvers[1], limit)

    return stateful(
        init,
        forward,
        apply=apply,
        name=_NAME,
        mixes_examples=True,
        probe=PROBE,
        global_form=global_form,
        **around(f, rebuild),
    )


@defers
def fixed_point_rule(
    residuals: dict[str, Any],
    dy: Tree,
    f: Layer,
    train: bool,
    solver: Solver,
    limit: float,
    *,
    params: Any,
    x: bool,
) -> Grads:
    """Solve ``u = dy + (df/dz)^T u`` by f's pullback at z, and pull u back to params and x."""
    if not (params or x):
        return None, None
    at, dy = barrier((residuals, dy))
    # It is linear in dy, and the squares of the norms must neither vanish nor overflow.
    scale = _largest(dy)
    scale = scale if solver.axis is None else solver.axis.max(scale)
    dy = tree.map(lambda leaf: leaf / scale.to(leaf.dtype), dy)
    _, pullback, _ = f.forward(at["params"], (at["x"], at["z"]), at["state"], at.get("key"), train)

    def evaluate(u: Tree) -> tuple[Tree, Params]:
        dz = pull({"": pullback}, "", u, params=False, x=True)[1][1]
        return sum_cotangents(dy, dz), {}

    u, _, figures = solve(evaluate, dy, solver)
    good = figures["residual"] <= limit
    u = tree.map(lambda leaf: torch.where(good, leaf * scale.to(leaf.dtype), torch.nan), u)
    dparams, both = pull({"": pullback}, "", u, params=params, x=x)
    if params and "figures" in at:
        dparams = mapped(_with_probe, dparams, _sums(at["figures"], figures))
    return dparams, both[0] if x else None


def _largest(dy: Tree) -> Tensor:
    """The largest magnitude, for what no derivative goes through; 1 where there is none."""
    found = [leaf.detach().abs().max() for leaf in tree.leaves(dy) if leaf.numel()]
    if not found:
        return torch.ones((), device=tree.device_of(dy))
    wide = reduce(torch.promote_types, [leaf.dtype for leaf in found])
    largest = torch.stack([leaf.to(wide) for leaf in found]).max()
    return torch.where(largest > 0, largest, 1.0)


def _with_probe(dparams: Params, told: Tensor) -> Params:
    return {**dparams, PROBE.entry: told}


def _sums(forward: Mapping[str, Tensor], backward: Mapping[str, Tensor]) -> Tensor:
    """1, and of both ways the iterations, the square of the residual, and whether it is too big."""
    told = [torch.ones_like(forward["residual"])]
    for found in (forward, backward):
        told += [found["iterations"], found["residual"].square(), ~found["converged"]]
    return torch.stack([each.to(torch.float32) for each in told])


def _figures(sums: Tensor, dvalue: Any) -> dict[str, Tensor]:
    """The means of the figures over the calls of a step."""
    calls, *each = sums.unbind(-1)
    named: dict[str, Tensor] = {}
    for prefix, part in (("", each[:3]), ("backward_", each[3:])):
        iterations, squares, failures = [number / calls for number in part]
        named[f"{prefix}iterations"] = iterations
        named[f"{prefix}residual"] = squares.sqrt()
        named[f"{prefix}converged"] = 1 - failures
    return named


PROBE = Probe("solved", 7, _figures)
"""What a training step is told of both solvers."""


def _check(prefix: str, solver: Solver) -> None:
    tol, damping = solver.tol, solver.damping
    require(tol > 0, f"{_NAME}: {prefix}tol must be above 0, got {tol!r}")
    check_count(_NAME, **{f"{prefix}max_iter": solver.max_iter})
    check_count(_NAME, 0, history=solver.history)
    require(0 < damping <= 1, f"{_NAME}: damping must be above 0 and at most 1, got {damping!r}")


def _without(name: str, entries: Params) -> Params:
    """The params or the state of f: all but an entry of the solver's own."""
    return {each: part for each, part in entries.items() if each != name}


def _no_figures(z: Tree) -> Mapping[str, Tensor]:
    """Figures of no call."""
    leaf = tree.leaves(z)[0]
    wide = torch.promote_types(leaf.dtype, torch.float32)
    kinds = {"iterations": torch.int64, "residual": wide, "converged": torch.bool}
    return {name: torch.zeros((), dtype=kind, device=leaf.device) for name, kind in kinds.items()}


def _require_alike(z: Tree, made: Tree) -> None:
    if not tree.alike(tree.to_meta(z), tree.to_meta(made)):
        raise ValueError(
            f"{_NAME}: f must keep the shape and dtype of z, {tree.describe(z)}, "
            f"got {tree.describe(made)}"
        )
