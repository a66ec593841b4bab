"""The laws of the protocol as calls, for the library's layers and for one's own.

`check_layer`, `check_loss` and `check_optimizer` raise AssertionError with the law that is
broken, where, and by how much. They need nothing but torch and optree.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet import random, tree
from funcnet.core import Layer, Loss, Optimizer, Params, Pullback, Tree
from funcnet.optimizers.transforms import apply_updates
from funcnet.transforms import jit as compilation, vmap as mapping


def check_layer(
    layer: Layer,
    x: Tree,
    *,
    key: Tensor | None = None,
    modes: Iterable[bool] = (True, False),
    derivative: bool = True,
    vmap: bool = True,
    meta: bool = True,
    jit: bool = False,
    rtol: float = 1e-10,
) -> None:
    """Check that a layer keeps the laws of the protocol; it is computed in float64.

    1. Pure: the same arguments give the same result bit for bit; no argument and no residual is
       changed; torch's random generator is not touched.
    2. No autograd: it works in inference mode, and results need no gradient.
    3. ``vjp`` gives the output and state of ``apply``.
    4. The pullback is the derivative by autograd and by finite differences, linear in dy, and
       callable again and in halves.
    5. ``dparams`` has the structure, shapes and dtypes of ``params``, dx those of x, the new
       state those of the state; the rule is a module-level function.
    6. ``init`` and ``apply`` run on meta tensors, and any memory layout gives the same result.
    7. Under vmap each member equals its solo run; under jit the results are the eager ones.

    Args:
        layer: the layer.
        x: an example input, a tree of tensors with values away from kinks and ties.
        key: for a layer that draws random numbers; default ``fn.key(0)``.
        modes: the values of ``train`` to check.
        derivative: False for a rule that is meant not to be the derivative.
        vmap, meta: False for a layer that cannot.
        jit: whether to compile it too, which takes seconds and a C++ compiler.
        rtol: the greatest relative error of the derivative in float64.

    Raises: AssertionError.

    >>> import funcnet as fn
    >>> check_layer(fn.serial(fn.linear(3), fn.tanh()), torch.ones(4, 2))
    """
    name = layer.name
    key = random.key(0) if key is None else key
    x = tree.map(torch.Tensor.detach, _to_float64(x))
    with _Globals(name):
        _check_laws(name, layer, x, key, tuple(modes), derivative, vmap, meta, jit, rtol)


def _check_laws(
    name: str,
    layer: Layer,
    x: Tree,
    key: Tensor,
    modes: tuple[bool, ...],
    derivative: bool,
    vmap: bool,
    meta: bool,
    jit: bool,
    rtol: float,
) -> None:
    params, state = _check_init(name, layer, random.fold_in(key, "params"), x)
    params, state = _to_float64(params), _to_float64(state)
    _require_strings(name, params)
    # At their first values parameters may hide a term: zeros, ones.
    params = _jitter(random.fold_in(key, "jitter"), params)
    for train in modes:
        call = _Call(f"{name} (train={train})", layer, params, x, state, key, train)
        _check_agreement(call)
        _check_structure(call)
        _check_purity(call)
        _check_linearity(call)
        if derivative:
            _check_derivative(call, rtol)
        _check_layouts(call)
        _check_single_precision(call)
        if meta:
            _check_meta(call)
        if vmap:
            _check_vmap(call)
        if jit:
            _check_jit(call)
    _check_defaults(name, layer, params, x, state, key)


def check_loss(
    loss: Loss,
    prediction: Tree,
    target: Tree,
    *,
    derivative: bool = True,
    vmap: bool = True,
    rtol: float = 1e-10,
) -> None:
    """Check that a loss keeps the laws of the protocol; it is computed in float64.

    Args:
        loss: the loss.
        prediction, target: examples, away from kinks.
        derivative: False for a rule that is meant not to be the derivative.
        vmap: False for a loss that cannot.
        rtol: the greatest relative error of the derivative.

    Raises: AssertionError.

    >>> import funcnet as fn
    >>> check_loss(fn.mse(), torch.ones(4, 2), torch.zeros(4, 2))
    """
    name = "loss"
    prediction, target = _to_float64(prediction), _to_float64(target)
    watched = _Watch(name, prediction=prediction, target=target)
    value, pullback = loss.vjp(prediction, target)
    applied = loss.apply(prediction, target)
    _require(isinstance(value, Tensor) and value.dim() == 0, name, "law 5: the value is a scalar")
    _equal(name, "law 3: vjp's value is apply's", applied, value)
    residuals = _Watch(f"{name}: pullback", residuals=pullback)
    gradient = pullback()
    _equal(name, "law 1: pullback() is pullback(1.0)", gradient, pullback(1.0))
    _equal(name, "law 1: the same pullback gives the same gradient", gradient, pullback())
    other = tree.map(lambda leaf: leaf * 0.5 if leaf.is_floating_point() else leaf, prediction)
    loss.vjp(other, target)
    _equal(name, "law 1: a pullback is not changed by another call", gradient, pullback())
    _alike(name, "law 5: dprediction is like the prediction", prediction, gradient)
    _close(name, "law 4: the pullback is linear", _scaled(gradient, -2.5), pullback(-2.5), rtol)
    scale = torch.tensor(-2.5, dtype=torch.float64)
    _close(name, "law 4: dvalue may be a tensor", _scaled(gradient, -2.5), pullback(scale), rtol)
    _require_module_level(name, pullback)
    residuals.check()
    watched.check()
    with torch.inference_mode():
        _equal(name, "law 2: no autograd", gradient, loss.vjp(prediction, target)[1]())
    if derivative:
        _close(
            name,
            "law 4: the pullback agrees with autograd",
            _autograd(lambda y: loss.apply(y, target), prediction, torch.ones_like(value)),
            gradient,
            rtol,
        )
    single = _cast(prediction, torch.float32), _cast(target, torch.float32)
    value32, pullback32 = loss.vjp(*single)
    _alike(name, "law 5: dprediction is like the prediction", single[0], pullback32())
    _require(value32.dtype == torch.float32, name, "law 5: the value has the prediction's dtype")
    if vmap:
        keys = random.split(random.key(1), 3)
        members = [_jitter(keys[member], prediction) for member in range(3)]

        def run(y: Tree) -> Tree:
            value, pullback = loss.vjp(y, target)
            return value, pullback()

        together, alone = mapping.vmap(run)(_stack(members)), [run(y) for y in members]
        _close(name, "law 7: under vmap each member equals its solo run", _stack(alone), together)


def check_optimizer(
    optimizer: Optimizer,
    params: Params,
    *,
    reference: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    steps: int = 10,
    vmap: bool = True,
    rtol: float = 1e-12,
) -> None:
    """Check that an optimizer keeps the laws of the protocol; it is computed in float64.

    Args:
        optimizer: the optimizer.
        params: an example, a nested dict of tensors.
        reference: makes a torch.optim optimizer of a list of parameters; if given, the params
            after ``steps`` steps must equal its.
        steps: how many.
        vmap: False for an optimizer that cannot.
        rtol: the greatest relative difference from the reference.

    Raises: AssertionError.

    >>> import funcnet as fn
    >>> check_optimizer(fn.adam(0.1), {"w": torch.ones(3)},
    ...                 reference=lambda params: torch.optim.Adam(params, 0.1))
    """
    name = "optimizer"
    params = _to_float64(params)
    key = random.key(0)
    state = optimizer.init_state(params)
    grads = [_noise(random.fold_in(key, step), params) for step in range(steps)]
    expected = [leaf.clone().requires_grad_() for leaf in tree.leaves(params)]
    peer = reference(expected) if reference is not None and expected else None
    current = params
    for step, grad in enumerate(grads):
        watched = _Watch(name, grads=grad, state=state, params=current)
        updates, new_state = optimizer.update(grad, state, current)
        again = optimizer.update(grad, state, current)
        _equal(name, "law 1: the same arguments, the same result", (updates, new_state), again)
        watched.check()
        _alike(name, "law 5: updates are like params", current, updates)
        _alike(name, "law 5: the state keeps its structure", state, new_state)
        for leaf in tree.leaves((updates, new_state)):
            _require(not leaf.requires_grad, name, "law 2: no autograd")
        current, state = apply_updates(current, updates), new_state
        if peer is not None:
            for leaf, gradient in zip(expected, tree.leaves(grad), strict=True):
                leaf.grad = gradient.clone()
            peer.step()
            _close(
                name,
                f"the params after step {step + 1} are torch.optim's",
                [leaf.detach() for leaf in expected],
                tree.leaves(current),
                rtol,
            )
    eager = optimizer.update(grads[0], optimizer.init_state(params), params)
    with torch.inference_mode():
        inferred = optimizer.update(grads[0], optimizer.init_state(params), params)
        _equal(name, "law 2: no autograd, so inference mode changes nothing", eager, inferred)
    single = _cast(params, torch.float32)
    start = optimizer.init_state(single)
    updates, after = optimizer.update(_noise(key, single), start, single)
    _alike(name, "law 5: updates are like params", single, updates)
    _alike(name, "law 5: the state is like the params", _cast(state, torch.float32), after)
    _alike(name, "law 5: the state keeps its structure", start, after)
    still, _ = optimizer.update(tree.map(torch.zeros_like, single), start, single)
    finite = all(bool(leaf.isfinite().all()) for leaf in tree.leaves(still))
    _require(finite, name, "gradients of 0 give finite updates")
    if vmap and tree.leaves(params):
        members = [_noise(random.fold_in(key, 100 + member), params) for member in range(3)]
        together = mapping.vmap(lambda p: _two_updates(optimizer, p))(_stack(members))
        alone = _stack([_two_updates(optimizer, p) for p in members])
        _close(name, "law 7: under vmap each member equals its solo run", alone, together)


def _two_updates(optimizer: Optimizer, params: Params) -> Tree:
    grads = tree.map(torch.sin, params)
    updates, state = optimizer.update(grads, optimizer.init_state(params), params)
    return updates, optimizer.update(updates, state, params)


class _Call:
    """A layer with arguments, a cotangent, and what it gave for them."""

    def __init__(
        self,
        name: str,
        layer: Layer,
        params: Params,
        x: Tree,
        state: Params,
        key: Tensor,
        train: bool,
    ) -> None:
        self.name, self.layer, self.params, self.x, self.state = name, layer, params, x, state
        self.key, self.train = key, train
        self.watch = _Watch(name, params=params, x=x, state=state, key=key)
        self.y, self.pullback, self.new_state = self.vjp()
        self.dy = _cotangent(random.fold_in(key, "dy"), self.y)
        self.dparams, self.dx = self.pullback(self.dy)

    def vjp(self, params: Params | None = None, x: Tree = None, state: Params | None = None) -> Any:
        return self.layer.vjp(
            self.params if params is None else params,
            self.x if x is None else x,
            self.state if state is None else state,
            key=self.key,
            train=self.train,
        )

    def apply(self, params: Params | None = None, x: Tree = None) -> Any:
        return self.layer.apply(
            self.params if params is None else params,
            self.x if x is None else x,
            self.state,
            key=self.key,
            train=self.train,
        )


def _check_init(name: str, layer: Layer, key: Tensor, x: Tree) -> tuple[Params, Params]:
    """The layer's params and state."""
    what = "law 1: init reads only the key and the shape, dtype and device of x"
    watched = _Watch(name, key=key, x=x)
    made = layer.init(key, x)
    _equal(name, what, made, layer.init(key, x))
    _equal(name, what, made, layer.init(key, tree.map(torch.zeros_like, x)))
    watched.check()
    single = _cast(x, torch.float32)
    if all(leaf.is_floating_point() for leaf in tree.leaves(x)):
        what = "law 5: params and state have the dtype of a floating x"
        _alike(name, what, _cast(made, torch.float32), layer.init(key, single))
    return made


def _generators() -> list[Tensor]:
    """The states of torch's generators, one for each device in use."""
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.random.get_rng_state(), *on_gpus]


class _Globals:
    """What of torch's global state no function may change: its generators and two settings."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.generators = _generators()
        self.settings = (torch.is_grad_enabled(), torch.get_default_dtype())

    def __exit__(self, kind: type | None, *error: object) -> None:
        settings = (torch.is_grad_enabled(), torch.get_default_dtype())
        torch.set_grad_enabled(self.settings[0])
        torch.set_default_dtype(self.settings[1])
        if kind is None:
            # A GPU that was first used here may not have had a generator before.
            pairs = zip(self.generators, _generators(), strict=False)
            same = all([torch.equal(before, after) for before, after in pairs])
            _require(same, self.name, "law 1: torch's random generator is not used")
            _require(settings == self.settings, self.name, "law 1: no global setting is changed")


def _check_agreement(call: _Call) -> None:
    y, state = call.apply()
    for leaf in tree.leaves((y, state, call.y, call.new_state, call.dparams, call.dx)):
        _require(not leaf.requires_grad, call.name, "law 2: results need no gradient")
    _equal(call.name, "law 3: vjp's output is apply's", y, call.y)
    _equal(call.name, "law 3: vjp's state is apply's", state, call.new_state)
    call.watch.check()


def _check_structure(call: _Call) -> None:
    _require(isinstance(call.pullback, Pullback), call.name, "law 5: vjp returns a Pullback")
    _alike(call.name, "law 5: dparams is like params", call.params, call.dparams)
    _alike(call.name, "law 5: dx is like x", call.x, call.dx, floating_only=True)
    _alike(call.name, "law 5: the new state is like the state", call.state, call.new_state)
    _require_module_level(call.name, call.pullback)
    leaves, treedef = optree.tree_flatten(call.pullback)
    rebuilt: Any = treedef.unflatten(leaves)
    _equal(
        call.name,
        "law 5: the pullback is a pytree of its residuals",
        (call.dparams, call.dx),
        rebuilt(call.dy),
    )
    again = optree.tree_structure(call.vjp()[1])
    same = treedef == again and hash(treedef) == hash(again)
    _require(same, call.name, "law 5: the pullback's treedef is the same each time")


def _check_purity(call: _Call) -> None:
    name, dy = call.name, call.dy
    residuals = _Watch(f"{name}: pullback", residuals=call.pullback, dy=dy)
    grads = (call.dparams, call.dx)
    _equal(name, "law 1: the same pullback gives the same result", grads, call.pullback(dy))
    residuals.check()
    y, pullback, state = call.vjp()
    _equal(name, "law 1: the same arguments, the same output", call.y, y)
    _equal(name, "law 1: the same arguments, the same state", call.new_state, state)
    _equal(name, "law 1: the same arguments, the same pullback", grads, pullback(dy))
    _equal(name, "law 1: the default dtype is not read", call.y, _with_default_dtype(call.vjp)[0])
    other = tree.map(lambda leaf: leaf * 0.5 if leaf.is_floating_point() else leaf, call.x)
    call.vjp(x=other)[1](dy)
    call.layer.apply(call.params, other, call.state, key=call.key, train=not call.train)
    _equal(name, "law 1: a pullback is not changed by another call", grads, call.pullback(dy))
    _equal(name, "law 1: a call does not see the one before it", call.y, call.vjp()[0])
    only_params, nothing = call.pullback(dy, x=False)
    _require(nothing is None, name, "law 4: x=False gives None for dx")
    _equal(name, "law 4: x=False gives the same dparams", call.dparams, only_params)
    nothing, only_x = call.pullback(dy, params=False)
    _require(nothing is None, name, "law 4: params=False gives None for dparams")
    _equal(name, "law 4: params=False gives the same dx", call.dx, only_x)
    _require(
        call.pullback(dy, params=False, x=False) == (None, None),
        name,
        "law 4: params=False, x=False gives (None, None)",
    )
    residuals.check()
    call.watch.check()
    with torch.inference_mode():
        y, pullback, _ = call.vjp()
        _equal(name, "law 2: no autograd, so inference mode changes nothing", call.y, y)
        _equal(name, "law 2: no autograd, so inference mode changes nothing", grads, pullback(dy))


def _with_default_dtype(function: Callable[[], Any]) -> Any:
    """What a function gives when the default dtype is another one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if before == torch.float32 else torch.float32)
    try:
        return function()
    finally:
        torch.set_default_dtype(before)


def _check_linearity(call: _Call) -> None:
    other = _cotangent(random.fold_in(call.key, "other dy"), call.y)
    mixed = tree.map(lambda a, b: 2.0 * a - 3.0 * b, call.dy, other)
    expected = tree.map(
        lambda a, b: 2.0 * a - 3.0 * b, (call.dparams, call.dx), call.pullback(other)
    )
    _close(call.name, "law 4: the pullback is linear in dy", expected, call.pullback(mixed))
    grads = (call.dparams, call.dx)
    zeros = tree.map(torch.zeros_like, grads)
    nothing = call.pullback(tree.map(torch.zeros_like, call.dy))
    _equal(call.name, "law 4: the pullback of 0 is 0", zeros, nothing)


def _check_derivative(call: _Call, rtol: float) -> None:
    inputs = (call.params, call.x)

    def output(arguments: Tree) -> Tree:
        return call.apply(*arguments)[0]

    expected = _autograd(output, inputs, call.dy)
    got = (call.dparams, call.dx)
    _close(call.name, "law 4: the pullback agrees with autograd", expected, got, rtol)
    # Steps are relative to the size of what they change.
    direction = _map_floating(
        lambda noise, leaf: noise * (_size(leaf) or 1.0),
        _noise(random.fold_in(call.key, "direction"), inputs),
        inputs,
    )
    step = 1e-6
    ahead, behind = (
        _inner(
            call.dy, output(_map_floating(lambda a, d, s=sign: a + s * step * d, inputs, direction))
        )
        for sign in (1, -1)
    )
    numeric = (ahead - behind) / (2 * step)
    analytic = _inner(_drop_integers(inputs, got), direction)
    size = _inner(_drop_integers(inputs, tree.map(torch.abs, got)), tree.map(torch.abs, direction))
    scale = max(abs(analytic), 1e-3 * size, 1e-6)
    _require(
        abs(numeric - analytic) <= 1e-5 * scale,
        call.name,
        "law 4: the pullback agrees with finite differences, "
        f"got {analytic:.9g}, expected {numeric:.9g}",
    )


def _check_layouts(call: _Call) -> None:
    y, pullback, _ = call.vjp(x=tree.map(_scattered, call.x))
    what = "law 6: a non-contiguous {} gives the same result"
    _close(call.name, what.format("x"), call.y, y)
    dy = tree.map(_scattered, call.dy)
    _close(call.name, what.format("dy"), (call.dparams, call.dx), pullback(dy))
    ones = tree.map(torch.ones_like, call.dy)
    wide = tree.map(lambda leaf: leaf.new_ones(()).expand(leaf.shape), call.dy)
    _close(call.name, what.format("dy"), pullback(ones), pullback(wide))


def _check_single_precision(call: _Call) -> None:
    params, x, state = (_cast(part, torch.float32) for part in (call.params, call.x, call.state))
    y, pullback, new_state = call.vjp(params, x, state)
    dparams, dx = pullback(_cast(call.dy, torch.float32))
    single = f"{call.name} (float32)"
    _alike(single, "law 5: y has the dtype of x", _cast(call.y, torch.float32), y)
    _alike(single, "law 5: dparams is like params", params, dparams)
    _alike(single, "law 5: dx is like x", x, dx, floating_only=True)
    _alike(single, "law 5: the new state is like the state", state, new_state)
    what = "law 5: float32 gives what float64 gives, to rounding"
    _close(single, what, _to_float64(call.y), _to_float64(y), 1e-3)
    grads = (call.dparams, call.dx)
    _close(single, what, grads, tree.map(torch.Tensor.double, (dparams, dx)), 1e-3)


def _check_meta(call: _Call) -> None:
    x = tree.to_meta(call.x)
    params, state = call.layer.init(random.fold_in(call.key, "params"), x)
    what = "law 6: init runs on meta tensors, with the same shapes"
    _alike(call.name, what, tree.to_meta(call.params), _to_float64(params), device=True)
    _alike(call.name, what, tree.to_meta(call.state), _to_float64(state), device=True)
    y, _ = call.layer.apply(
        tree.to_meta(call.params), x, tree.to_meta(call.state), key=call.key, train=call.train
    )
    what = "law 6: apply runs on meta tensors, with the same shapes"
    _alike(call.name, what, tree.to_meta(call.y), y, device=True)


def _check_vmap(call: _Call) -> None:
    keys = random.split(random.fold_in(call.key, "members"), 3)
    members = [
        (
            _jitter(keys[member], call.params),
            _jitter(keys[member], call.x),
            call.state,
            keys[member],
            call.dy,
        )
        for member in range(3)
    ]

    run = _forward_backward(call)
    together = mapping.vmap(run)(_stack(members))
    alone = _stack([run(member) for member in members])
    _close(call.name, "law 7: under vmap each member equals its solo run", alone, together)


def _check_jit(call: _Call) -> None:
    run = _forward_backward(call)
    arguments = (call.params, call.x, call.state, call.key, call.dy)
    compiled = compilation.jit(run)(arguments)
    _close(call.name, "law 7: under jit the results are the eager ones", run(arguments), compiled)


def _forward_backward(call: _Call) -> Callable[[Tree], Tree]:
    def run(arguments: Tree) -> Tree:
        params, x, state, key, dy = arguments
        y, pullback, state = call.layer.vjp(params, x, state, key=key, train=call.train)
        return y, state, pullback(dy)

    return run


def _check_defaults(
    name: str, layer: Layer, params: Params, x: Tree, state: Params, key: Tensor
) -> None:
    _equal(
        name,
        "apply's default is train=False",
        layer.apply(params, x, state, key=key, train=False),
        layer.apply(params, x, state, key=key),
    )
    trained, default = (
        layer.vjp(params, x, state, key=key, **mode) for mode in ({"train": True}, {})
    )
    _equal(
        name,
        "vjp's default is train=True",
        (trained[0], trained[2]),
        (default[0], default[2]),
    )


class _Watch:
    """Tensors that must not change: neither their version nor their values."""

    def __init__(self, name: str, **trees: Tree) -> None:
        self.name = name
        self.seen = [
            (what, leaf, leaf._version, leaf.clone())
            for what, watched in trees.items()
            for leaf in tree.leaves(watched)
        ]

    def check(self) -> None:
        for what, leaf, version, values in self.seen:
            same = leaf._version == version and _same(leaf, values)
            _require(same, self.name, f"law 1: {what} must not be changed in place")


def _require(condition: object, name: str, what: str) -> None:
    if not condition:
        raise AssertionError(f"{name}: broken: {what}")


def _require_strings(name: str, params: Params) -> None:
    for entry, child in params.items():
        _require(isinstance(entry, str), name, "params are nested dicts with string keys")
        if not isinstance(child, Tensor):
            _require(isinstance(child, dict), name, "params are nested dicts of tensors")
            _require_strings(name, child)


def _require_module_level(name: str, pullback: Pullback) -> None:
    def visit(node: Any) -> None:
        if not isinstance(node, Pullback):
            return
        rule = getattr(node.rule, "__qualname__", "<object>")
        _require("<" not in rule, name, f"law 5: the rule {rule} is a module-level function")
        hash(node.static)
        residuals: Any = node.residuals
        for leaf in optree.tree_leaves(residuals, is_leaf=lambda r: isinstance(r, Pullback)):
            visit(leaf)

    visit(pullback)


def _paths(node: Tree) -> dict[str, Any]:
    paths, leaves, _ = optree.tree_flatten_with_path(node, none_is_leaf=True)
    return {tree.path_string(path): leaf for path, leaf in zip(paths, leaves, strict=True)}


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b
    alike = a.shape == b.shape and a.dtype == b.dtype
    return alike and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _equal(name: str, what: str, expected: Tree, got: Tree) -> None:
    """Bit for bit, but for the sign of zero and the payload of NaN."""
    wanted, found = _paths(expected), _paths(got)
    _require(wanted.keys() == found.keys(), name, f"{what}: {list(wanted)} and {list(found)}")
    for path, leaf in wanted.items():
        _require(_same(leaf, found[path]), name, f"{what}: they differ at {path!r}")


def _close(name: str, what: str, expected: Tree, got: Tree, rtol: float = 1e-10) -> None:
    wanted, found = _paths(expected), _paths(got)
    _require(wanted.keys() == found.keys(), name, f"{what}: {list(wanted)} and {list(found)}")
    greatest = max((_size(leaf) for leaf in wanted.values()), default=0.0)
    for path, leaf in wanted.items():
        other = found[path]
        if leaf is None or other is None:
            _require(leaf is other, name, f"{what}: only one is None at {path!r}")
            continue
        _require(leaf.shape == other.shape, name, f"{what}: the shapes differ at {path!r}")
        error = _size((leaf - other).double()) if leaf.is_floating_point() else _size(leaf != other)
        # What is small beside the rest may be rounding of a sum that should vanish.
        scale = max(_size(leaf), 1e-3 * greatest)
        _require(
            error <= rtol * scale,
            name,
            f"{what}: at {path!r} the error is {error:.3g}, of {scale:.3g}",
        )


def _size(leaf: Any) -> float:
    return float(leaf.double().abs().max()) if isinstance(leaf, Tensor) and leaf.numel() else 0.0


def _alike(
    name: str,
    what: str,
    expected: Tree,
    got: Tree,
    *,
    floating_only: bool = False,
    device: bool = False,
) -> None:
    """The same structure, shapes and dtypes; None where an integer was, if floating_only."""
    wanted, found = _paths(expected), _paths(got)
    if floating_only:
        if got is None:
            found = dict.fromkeys(wanted)
        wanted = {
            path: leaf if leaf is not None and leaf.is_floating_point() else None
            for path, leaf in wanted.items()
        }
    _require(wanted.keys() == found.keys(), name, f"{what}: {list(wanted)} and {list(found)}")
    for path, leaf in wanted.items():
        other = found[path]
        if leaf is None or other is None:
            _require(leaf is other, name, f"{what}: at {path!r} only one is None")
            continue
        same = (leaf.shape, leaf.dtype) == (other.shape, other.dtype)
        same = same and (not device or leaf.device == other.device)
        _require(
            same,
            name,
            f"{what}: at {path!r} expected {tree.describe(leaf)}, got {tree.describe(other)}",
        )


def _map_floating(function: Callable[..., Tensor], node: Tree, *rest: Tree) -> Tree:
    return tree.map(
        lambda leaf, *others: function(leaf, *others) if leaf.is_floating_point() else leaf,
        node,
        *rest,
    )


def _cast(node: Tree, dtype: torch.dtype) -> Tree:
    return _map_floating(lambda leaf: leaf.to(dtype), node)


def _to_float64(node: Tree) -> Tree:
    return _cast(node, torch.float64)


def _scaled(node: Tree, factor: float) -> Tree:
    return _map_floating(lambda leaf: leaf * factor, node)


def _noise(key: Tensor, node: Tree) -> Tree:
    """Normal draws like the leaves; zeros for integers."""
    leaves, treedef = optree.tree_flatten(node)
    drawn = [
        random.normal(random.fold_in(key, place), leaf.shape, torch.float64, device=leaf.device).to(
            leaf.dtype
        )
        if leaf.is_floating_point()
        else torch.zeros_like(leaf)
        for place, leaf in enumerate(leaves)
    ]
    return optree.tree_unflatten(treedef, drawn)


def _jitter(key: Tensor, node: Tree) -> Tree:
    """The leaves, each made smaller by up to 5 %, so that what was in [0, 1] stays there."""
    return _map_floating(
        lambda leaf, noise: leaf * (0.975 + 0.025 * torch.tanh(noise)), node, _noise(key, node)
    )


def _cotangent(key: Tensor, y: Tree) -> Tree:
    """A random cotangent of y; None for an integer."""
    return optree.tree_map(
        lambda leaf, noise: noise if leaf.is_floating_point() else None, y, _noise(key, y)
    )


def _scattered(leaf: Tensor) -> Tensor:
    """The same values with twice the strides."""
    return torch.stack((leaf, leaf), -1)[..., 0]


def _drop_integers(inputs: Tree, cotangents: Tree) -> Tree:
    """Cotangents with zeros where an integer has None."""
    wanted, treedef = optree.tree_flatten(inputs)
    found = _paths(cotangents)
    if len(found) != len(wanted):  # a whole tree of integers has the one cotangent None
        found = {
            path: found.get(path) if leaf.is_floating_point() else None
            for path, leaf in _paths(inputs).items()
        }
    filled = [
        torch.zeros_like(leaf) if other is None else other
        for leaf, other in zip(wanted, found.values(), strict=True)
    ]
    return optree.tree_unflatten(treedef, filled)


def _inner(a: Tree, b: Tree) -> float:
    """The sum of products; None counts nothing."""
    pairs = zip(_paths(a).values(), _paths(b).values(), strict=True)
    return math.fsum(
        float((left * right).sum())
        for left, right in pairs
        if left is not None and right is not None
    )


def _autograd(function: Callable[[Tree], Tree], inputs: Tree, dy: Tree) -> Tree:
    """The pullback of a function by torch's autograd; None for integers."""
    leaves, treedef = optree.tree_flatten(inputs)
    with torch.enable_grad():
        fresh = [leaf.detach().clone().requires_grad_(leaf.is_floating_point()) for leaf in leaves]
        outputs = function(optree.tree_unflatten(treedef, fresh))
        pairs = [
            (y, cotangent)
            for y, cotangent in zip(_paths(outputs).values(), _paths(dy).values(), strict=True)
            if cotangent is not None and y.requires_grad
        ]
        wanted = [leaf for leaf in fresh if leaf.requires_grad]
        if pairs and wanted:
            found = iter(
                torch.autograd.grad(
                    [y for y, _ in pairs], wanted, [d for _, d in pairs], allow_unused=True
                )
            )
        else:
            found = iter([])
    grads = []
    for leaf in fresh:
        gradient = next(found, None) if leaf.requires_grad else None
        if gradient is None and leaf.requires_grad:
            gradient = torch.zeros_like(leaf)
        grads.append(None if gradient is None else gradient.detach())
    return _collapse(inputs, optree.tree_unflatten(treedef, grads))


def _collapse(inputs: Tree, grads: Tree) -> Tree:
    """As a layer gives it: the one None for an x of integers alone."""
    if isinstance(inputs, tuple) and len(inputs) == 2:
        _, x = inputs
        if not any(leaf.is_floating_point() for leaf in tree.leaves(x)):
            return grads[0], None
    return grads


def _stack(members: list[Tree]) -> Tree:
    return optree.tree_map(lambda *leaves: torch.stack(leaves), *members)
