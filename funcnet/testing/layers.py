"""`check_layer`: the laws of layers, each a named check of one layer with one set of arguments."""

from collections.abc import Callable, Iterable
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet import random, tree
from funcnet.core import Layer, Params, Pullback, Tree
from funcnet.testing.assertions import (
    Unchanged,
    alike,
    check_laws,
    close,
    equal,
    halves,
    list_of_laws,
    module_level,
    named,
    require,
    unchanged_globals,
)
from funcnet.testing.derivatives import autograd, require_finite_differences
from funcnet.testing.residuals import check_residuals
from funcnet.testing.samples import (
    cast,
    cotangent,
    non_contiguous,
    perturbed,
    scaled,
    stack,
)
from funcnet.transforms import jit as compilation, vmap as mapping


class Case:
    """A layer with arguments, a cotangent, and what it gave for them."""

    def __init__(
        self,
        layer: Layer,
        params: Params,
        x: Tree,
        state: Params,
        key: Tensor,
        train: bool,
        rtol: float,
    ) -> None:
        self.layer, self.params, self.x, self.state = layer, params, x, state
        self.key, self.train, self.rtol = key, train, rtol
        self.arguments = Unchanged(params=params, x=x, state=state, key=key)
        self.y, self.pullback, self.new_state = self.vjp()
        self.dy = cotangent(random.fold_in(key, "dy"), self.y)
        self.residuals = Unchanged(residuals=self.pullback, dy=self.dy)
        self.dparams, self.dx = self.pullback(self.dy)
        self.grads = halves((self.dparams, self.dx))

    def vjp(self, params: Params | None = None, x: Tree = None, state: Params | None = None) -> Any:
        """The layer's vjp; what is not given is the case's."""
        return self.layer.vjp(
            self.params if params is None else params,
            self.x if x is None else x,
            self.state if state is None else state,
            key=self.key,
            train=self.train,
        )

    def apply(self, params: Params | None = None, x: Tree = None) -> Any:
        """The layer's apply; what is not given is the case's."""
        return self.layer.apply(
            self.params if params is None else params,
            self.x if x is None else x,
            self.state,
            key=self.key,
            train=self.train,
        )


def check_init(case: Case) -> None:
    """Only the key and the shape, dtype and device of x are read; nested dicts of tensors result.

    The tensors have the dtype of a floating-point x.
    """
    key, x, init = random.fold_in(case.key, "params"), case.x, case.layer.init
    arguments = Unchanged(key=key, x=x)
    made = _made(init, key, x)
    what = "init reads only the key and the shape, dtype and device of x"
    equal(what, made, _made(init, key, x))
    equal(what, made, _made(init, key, tree.map(torch.zeros_like, x)))
    arguments.check()
    if all(leaf.is_floating_point() for leaf in tree.leaves(x)):
        what = "params and state have the dtype of a floating-point x"
        alike(what, cast(made, torch.float32), _made(init, key, cast(x, torch.float32)))
    _require_nested_dicts(case.params)


def _made(init: Callable[..., Any], key: Tensor, x: Tree) -> dict[str, Tree]:
    params, state = init(key, x)
    return {"params": params, "state": state}


def _require_nested_dicts(params: Params) -> None:
    for entry, child in params.items():
        require(isinstance(entry, str), "params are nested dicts with string keys")
        if not isinstance(child, Tensor):
            require(isinstance(child, dict), "params are nested dicts of tensors")
            _require_nested_dicts(child)


def check_pure(case: Case) -> None:
    """The same arguments give the same results bit for bit, and nothing that exists is changed.

    Neither an argument, nor a residual, nor torch's random generator, default dtype or grad mode;
    and no call sees another one.
    """
    dy, grads = case.dy, case.grads
    case.apply()
    case.arguments.check()
    case.residuals.check()
    equal("the same pullback gives the same result", grads, halves(case.pullback(dy)))
    y, pullback, state = case.vjp()
    equal("the same arguments, the same output", case.y, y)
    equal("the same arguments, the same state", case.new_state, state)
    equal("the same arguments, the same pullback", grads, halves(pullback(dy)))
    equal("the default dtype is not read", case.y, _with_other_default_dtype(case.vjp)[0])
    other = scaled(case.x, 0.5)
    case.vjp(x=other)[1](dy)
    case.layer.apply(case.params, other, case.state, key=case.key, train=not case.train)
    equal("a pullback is not changed by another call", grads, halves(case.pullback(dy)))
    equal("a call does not see the one before it", case.y, case.vjp()[0])
    case.residuals.check()
    case.arguments.check()


def _with_other_default_dtype(function: Callable[[], Any]) -> Any:
    """What a function gives when the default dtype is another one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if before == torch.float32 else torch.float32)
    try:
        return function()
    finally:
        torch.set_default_dtype(before)


def check_vjp_equals_apply(case: Case) -> None:
    """With the same arguments vjp gives the same output and the same new state as apply."""
    y, state = case.apply()
    equal("vjp's output is apply's", y, case.y)
    equal("vjp's state is apply's", state, case.new_state)
    case.arguments.check()


def check_structure(case: Case) -> None:
    """dparams, dx and the new state have the structure, shapes and dtypes of params, x and state.

    Where x has integers, dx has None. The pullback is a `Pullback`: a pytree of its residuals, with
    a module-level rule and the same treedef at each call.
    """
    require(isinstance(case.pullback, Pullback), "vjp returns a Pullback")
    alike("dparams is like params", case.params, case.dparams)
    alike("dx is like x", case.x, case.dx, floating_only=True)
    alike("the new state is like the state", case.state, case.new_state)
    module_level(case.pullback)
    leaves, treedef = optree.tree_flatten(case.pullback)
    rebuilt: Any = treedef.unflatten(leaves)
    equal("the pullback is a pytree of its residuals", case.grads, halves(rebuilt(case.dy)))
    again = optree.tree_structure(case.vjp()[1])
    same = treedef == again and hash(treedef) == hash(again)
    require(same, "the pullback's treedef is the same each time")


def check_halves(case: Case) -> None:
    """``pullback(dy, x=False)`` gives dparams alone, ``params=False`` dx alone; the other is None.

    What is given is the same as when both are asked for.
    """
    dparams, nothing = case.pullback(case.dy, x=False)
    require(nothing is None, "x=False gives None for dx")
    equal("x=False gives the same dparams", case.dparams, dparams)
    nothing, dx = case.pullback(case.dy, params=False)
    require(nothing is None, "params=False gives None for dparams")
    equal("params=False gives the same dx", case.dx, dx)
    neither = case.pullback(case.dy, params=False, x=False)
    require(neither == (None, None), "params=False, x=False gives (None, None)")
    case.residuals.check()
    case.arguments.check()


def check_no_autograd(case: Case) -> None:
    """No result needs a gradient, and inference mode changes nothing."""
    for leaf in tree.leaves((case.apply(), case.y, case.new_state, case.grads)):
        require(not leaf.requires_grad, "results need no gradient")
    with torch.inference_mode():
        y, pullback, _ = case.vjp()
        equal("inference mode changes nothing in the output", case.y, y)
        equal(
            "inference mode changes nothing in the gradients", case.grads, halves(pullback(case.dy))
        )


def check_linear(case: Case) -> None:
    """The pullback is linear in dy, and gives 0 for 0."""
    other = cotangent(random.fold_in(case.key, "other dy"), case.y)

    def mixed(a: Tree, b: Tree) -> Tree:
        return tree.map(lambda a, b: 2.0 * a - 3.0 * b, a, b)

    expected = mixed(case.grads, halves(case.pullback(other)))
    close("the pullback is linear in dy", expected, halves(case.pullback(mixed(case.dy, other))))
    zeros = tree.map(torch.zeros_like, case.grads)
    nothing = halves(case.pullback(tree.map(torch.zeros_like, case.dy)))
    equal("the pullback of 0 is 0", zeros, nothing)


def check_derivative(case: Case) -> None:
    """The pullback agrees with torch's autograd through apply, and with finite differences."""
    inputs = (case.params, case.x)

    def output(arguments: Tree) -> Tree:
        return case.apply(*arguments)[0]

    dparams, dx = autograd(output, inputs, case.dy)
    close("the pullback agrees with autograd", halves((dparams, dx)), case.grads, case.rtol)
    key = random.fold_in(case.key, "direction")
    require_finite_differences(key, output, inputs, case.dy, (case.dparams, case.dx))


def check_memory_layout(case: Case) -> None:
    """An x or a dy that is not contiguous gives the same result."""
    y, pullback, _ = case.vjp(x=tree.map(non_contiguous, case.x))
    close("a non-contiguous x gives the same result", case.y, y)
    what = "a non-contiguous dy gives the same result"
    close(what, case.grads, halves(pullback(tree.map(non_contiguous, case.dy))))
    ones = tree.map(torch.ones_like, case.dy)
    expanded = tree.map(lambda leaf: leaf.new_ones(()).expand(leaf.shape), case.dy)
    close(what, halves(pullback(ones)), halves(pullback(expanded)))


def check_float32(case: Case) -> None:
    """Float32 gives what float64 gives, up to rounding, and all results are float32.

    Values are not compared where noise is drawn: the draws of two dtypes are different numbers.
    """
    params, x, state = (cast(part, torch.float32) for part in (case.params, case.x, case.state))
    y, pullback, new_state = case.vjp(params, x, state)
    dparams, dx = pullback(cast(case.dy, torch.float32))
    alike("y has the dtype of x", cast(case.y, torch.float32), y)
    alike("dparams is like params", params, dparams)
    alike("dx is like x", x, dx, floating_only=True)
    alike("the new state is like the state", state, new_state)
    if case.train and case.layer.takes_key:
        return
    what = "float32 gives what float64 gives, up to rounding"
    close(what, {"y": case.y}, {"y": cast(y, torch.float64)}, 1e-3)
    close(what, case.grads, tree.map(torch.Tensor.double, halves((dparams, dx))), 1e-3)


def check_meta(case: Case) -> None:
    """Meta tensors go through init and apply, and give the same structure and shapes."""
    x = tree.to_meta(case.x)
    params, state = case.layer.init(random.fold_in(case.key, "params"), x)
    what = "init runs on meta tensors, with the same shapes"
    alike(what, tree.to_meta(case.params), cast(params, torch.float64), device=True)
    alike(what, tree.to_meta(case.state), cast(state, torch.float64), device=True)
    y, _ = case.layer.apply(
        tree.to_meta(case.params), x, tree.to_meta(case.state), key=case.key, train=case.train
    )
    what = "apply runs on meta tensors, with the same shapes"
    alike(what, tree.to_meta(case.y), y, device=True)


def check_vmap(case: Case) -> None:
    """Under vmap each member of a population has the results of its solo run."""
    members = [
        (perturbed(key, case.params), perturbed(key, case.x), case.state, key, case.dy)
        for key in random.split(random.fold_in(case.key, "members"), 3)
    ]
    run = _forward_backward(case)
    together = mapping.vmap(run)(stack(members))
    alone = stack([run(member) for member in members])
    close("under vmap each member equals its solo run", alone, together)


def check_jit(case: Case) -> None:
    """Under jit the results are the eager ones, up to rounding.

    Up to that of float32, where noise is drawn: a layer may draw in another dtype than that of x.
    """
    run = _forward_backward(case)
    arguments = (case.params, case.x, case.state, case.key, case.dy)
    compiled = compilation.jit(run)(arguments)
    rtol = 1e-6 if case.train and case.layer.takes_key else 1e-10
    close("under jit the results are the eager ones", run(arguments), compiled, rtol)


def _forward_backward(case: Case) -> Callable[[Tree], Tree]:
    def run(arguments: Tree) -> Tree:
        params, x, state, key, dy = arguments
        y, pullback, state = case.layer.vjp(params, x, state, key=key, train=case.train)
        return {"y": y, "state": state, **halves(pullback(dy))}

    return run


def check_defaults(case: Case) -> None:
    """``train`` is False by default in apply, and True in vjp."""
    arguments, key = (case.params, case.x, case.state), case.key
    y, state = case.layer.apply(*arguments, key=key, train=False)
    default, after = case.layer.apply(*arguments, key=key)
    expected, got = {"y": y, "state": state}, {"y": default, "state": after}
    equal("apply's default is train=False", expected, got)
    y, _, state = case.layer.vjp(*arguments, key=key, train=True)
    default, _, after = case.layer.vjp(*arguments, key=key)
    expected, got = {"y": y, "state": state}, {"y": default, "state": after}
    equal("vjp's default is train=True", expected, got)


LAWS: dict[str, Callable[[Case], None]] = {
    "init": check_init,
    "pure": check_pure,
    "vjp equals apply": check_vjp_equals_apply,
    "structure": check_structure,
    "halves": check_halves,
    "no autograd": check_no_autograd,
    "linear": check_linear,
    "derivative": check_derivative,
    "residuals": check_residuals,
    "memory layout": check_memory_layout,
    "float32": check_float32,
    "meta": check_meta,
    "vmap": check_vmap,
    "jit": check_jit,
    "defaults": check_defaults,
}
"""The laws of layers, in the order in which they are checked.

The first broken law is the one reported, so what explains most comes first: where results are
random or arguments are changed, apply and vjp differ too, and where these differ, so does the
derivative.
"""


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

    Args:
        layer: the layer.
        x: an example input, a tree of tensors with values away from kinks and ties.
        key: for a layer that draws random numbers; default ``fn.key(0)``.
        modes: the values of ``train`` to check.
        derivative: False for a rule that is meant not to be the derivative. Neither this law nor
            any other is checked that the layer says it breaks, ``layer.breaks``.
        vmap, meta: False for a layer that cannot.
        jit: whether to compile it too, which takes seconds and a C++ compiler.
        rtol: the greatest relative error of the derivative in float64.

    Raises:
        AssertionError: its message names the layer, the mode, the law, and what differs.

    The laws:

    {laws}

    >>> import funcnet as fn
    >>> check_layer(fn.serial(fn.linear(3), fn.tanh()), torch.ones(4, 2))
    """
    optional = {"derivative": derivative, "vmap": vmap, "meta": meta, "jit": jit}
    optional |= dict.fromkeys(layer.breaks, False)
    name = layer.name
    key = random.key(0) if key is None else key
    x = tree.map(torch.Tensor.detach, cast(x, torch.float64))
    with unchanged_globals(name):
        with named(name):
            params, state = cast(layer.init(random.fold_in(key, "params"), x), torch.float64)
            # First values, such as zeros and ones, may hide a term of a gradient.
            params = perturbed(random.fold_in(key, "jitter"), params)
        for train in modes:
            where = f"{name} (train={train})"
            with named(where):
                case = Case(layer, params, x, state, key, train, rtol)
            check_laws(where, LAWS, case, optional)


check_layer.__doc__ = (check_layer.__doc__ or "").replace("{laws}", list_of_laws(LAWS))
