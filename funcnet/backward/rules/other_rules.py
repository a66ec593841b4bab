"""`with_rule`: the same forward pass with another backward rule; `cotangent`: the identity so."""

from collections.abc import Callable, Collection, Hashable
from typing import Any

import torch
from torch import Tensor

from funcnet import tree
from funcnet.checks import check_function, check_kind
from funcnet.core import Forward, Grads, Key, Layer, Params, Pullback, Tree, kinds_of, told_by
from funcnet.deferred import Deferred, defers, takes_deferral
from funcnet.errors import locate, require
from funcnet.global_forms import in_global_form
from funcnet.layers.shape import identity
from funcnet.lift import stateful
from funcnet.random import fold_in

READABLE = ("pullback", "params", "x", "y", "state", "key")
"""What a rule may have among its residuals."""


def with_rule(
    layer: Layer,
    rule: Callable[..., Any],
    *static: Hashable,
    reads: Collection[str] = ("pullback",),
    init: Callable[[Tensor, Params, Tree], Params] | None = None,
    breaks: Collection[str] = ("derivative",),
    mixes_examples: bool = False,
    name: str = "with_rule",
) -> Layer:
    """The same layer with another backward rule.

    Args:
        layer: any layer. What is made is a leaf of a model: code that rewrites one layer by layer,
            such as `map_layers`, does not see the layer inside.
        rule: ``(residuals, dy, *static, params, x) -> (dparams, dx)``, a module-level function, as
            that of a `Pullback`. ``params`` and ``x`` tell which half is asked for; what it gives
            for the other is dropped. dparams may be None where the layer has no params. The layer's
            own pullback is called by `pull`.
        static: hashable arguments of the rule.
        reads: what the rule has among its residuals: "pullback", the layer's own pullback;
            "params", "x", "y", "state"; "key", a key of the rule's own, with which the layer needs
            one in training, and which is None if ``train=False``. Without "pullback" the layer's
            vjp does not run, so the rule must be whole.
        init: ``(key, params, x) -> dict``: tensors which the rule has among its residuals too, by
            their names, such as fixed random weights.
        breaks: the laws that it is not meant to keep, and that `funcnet.testing.check_layer`
            therefore leaves out: "derivative", and "linear" for a rule that is not linear in dy.
            With ``()`` it is another way to compute the same derivative.
        mixes_examples: whether the rule computes the cotangents of one example from those of others
            of its batch; see `Layer`.
        name: what errors and summaries call it.

    Params: those of the layer.
    State: the layer's, and ``rule``, what ``init`` made, which stays as it is.
    VJP: by the rule.
    Raises:
        ValueError: the rule gives cotangents of another structure or shape than params and x.
        TypeError: of another dtype.

    Source: ``jax.custom_vjp``; ``torch.autograd.Function``.

    Feedback alignment of a linear layer: the cotangent goes back through fixed random weights.

    >>> def feedback_rule(residuals, dy, *, params, x):
    ...     dparams, _ = fn.pull(residuals, "pullback", dy, params=params, x=False)
    ...     return dparams, dy @ residuals["feedback"] if x else None
    >>> def feedback(key, params, x):
    ...     return {"feedback": fn.random.normal(key, params["weight"].shape, x.dtype)}
    >>> net = with_rule(fn.linear(3), feedback_rule, init=feedback)
    >>> params, state = net.init(fn.key(0), torch.ones(4, 2))
    >>> y, pullback, _ = net.vjp(params, torch.ones(4, 2), state)
    >>> dparams, dx = pullback(torch.ones(4, 3))
    >>> torch.equal(dx[0], state["rule"]["feedback"].sum(0))
    True
    """
    check_kind(name, layer, Layer)
    check_function(f"{name}: rule", rule)
    reads = _names(name, "reads", reads, READABLE)
    breaks = _names(name, "breaks", breaks, ("derivative", "linear"))

    def made(key: Tensor, x: Tree) -> tuple[Params, Params]:
        params, state = layer.init(key, x)
        if init is None:
            return params, state
        own = init(fold_in(key, "rule"), params, x)
        tensors = isinstance(own, dict) and all(isinstance(each, Tensor) for each in own.values())
        what = f"expects init to give a dict of tensors, got {tree.describe(own)}"
        require(tensors, f"{name}: {what}", TypeError)
        taken = sorted({*own} & {*READABLE})
        require(not taken, f"{name}: init gives {taken}, names that residuals have already")
        inside = "rule" in state
        require(not inside, f"{name}: the layer has state of its own called 'rule'")
        return params, {**state, "rule": own}

    def split(state: Params) -> tuple[Params, Params]:
        """The rule's own tensors, and the state of the layer."""
        if init is None:
            return {}, state
        require("rule" in state, f"{name}: expects state as of init, got {sorted(state)}")
        return state["rule"], {each: state[each] for each in state if each != "rule"}

    def together(own: Params, state: Params) -> Params:
        return state if init is None else {**state, "rule": own}

    def apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Any:
        own, inner = split(state)
        y, inner = layer.apply(params, x, inner, key=key, train=train)
        return y, together(own, inner)

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        own, before = split(state)
        found: dict[str, Any] = {"params": params or {}, "x": x, "state": before or {}}
        if "pullback" in reads:
            y, found["pullback"], after = layer.forward(params, x, before, key, train)
        else:
            y, after = layer.apply(params, x, before, key=key, train=train)
        found["y"] = y
        found["key"] = fold_in(key, "rule") if train and key is not None else None
        residuals = {**{each: found[each] for each in reads}, **own}
        told = name, kinds_of(params), kinds_of(x), kinds_of(y)[1]
        checked = checked_deferring_rule if takes_deferral(rule) else checked_rule
        return y, Pullback(checked, residuals, (rule, told, *static)), together(own, after)

    keyed = "key" in reads
    told: dict[str, Any] = told_by(layer) | {
        "takes_key": keyed or layer.takes_key,
        "breaks": {*breaks, *layer.breaks},
        "mixes_examples": mixes_examples or layer.mixes_examples,
        "probe": None,
    }
    if not (keyed or mixes_examples):
        options: Any = {"init": init, "reads": reads, "breaks": breaks, "name": name}
        told["global_form"] = lambda axis: with_rule(
            in_global_form(layer, axis), rule, *static, **options
        )
    return stateful(made, forward, apply=apply, keyed=keyed, name=name, **told)


def checked_rule(
    residuals: Any, dy: Tree, rule: Any, told: Any, *static: Any, params: bool, x: bool
) -> Grads:
    """The rule, and an error where what it gives is not like params and x."""
    name, of_params, of_x, of_y = told
    names = list(residuals)
    try:
        given = rule(residuals, dy, *static, params=params, x=x)
    except KeyError as error:
        if error.args[0] not in READABLE or error.args[0] in names:
            raise
        what = f"the rule has no {error} among its residuals, only {names}; it needs reads="
        raise ValueError(f"{name}: {what}") from error
    except Exception as error:
        locate(error, f"{name}:")
        raise
    pair = isinstance(given, tuple) and len(given) == 2
    what = f"expects the rule to give (dparams, dx), got {tree.describe(given)}"
    require(pair, f"{name}: {what}", TypeError)
    dparams, dx = given
    if dparams is None and not of_params[1]:
        dparams = {}
    # A pullback may be mapped over parts of the batch; then x was of another shape than dx is.
    shapes = tree.map(lambda leaf: leaf.shape, tree.leaves(dy))
    whole = shapes == [shape for shape, dtype in of_y if dtype.is_floating_point]
    if params and not isinstance(dparams, Deferred):
        _check_like(name, "dparams", of_params, dparams, whole)
    if x:
        _check_like(name, "dx", of_x, dx, whole)
    return dparams if params else None, dx if x else None


@defers
def checked_deferring_rule(residuals: Any, dy: Tree, *static: Any, params: bool, x: bool) -> Grads:
    """The same of a rule that is decorated with `defers`."""
    return checked_rule(residuals, dy, *static, params=params, x=x)


def _check_like(name: str, what: str, told: Any, given: Tree, whole: bool) -> None:
    """Raise an error, by path, for cotangents that are not like what they are cotangents of."""
    treedef, kinds = told
    try:
        leaves = treedef.flatten_up_to(given)
    except (ValueError, TypeError):
        forms = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in kinds]
        expected, got = tree.describe(treedef.unflatten(forms)), tree.describe(given)
        raise ValueError(f"{name}: expects {what} like {expected}, got {got}") from None
    for path, leaf, (shape, dtype) in zip(treedef.paths(), leaves, kinds, strict=True):
        place = f"{name}: expects {what} {tree.path_string(path)}".rstrip()
        got = "None" if leaf is None else tree.describe(leaf)
        if not dtype.is_floating_point:
            require(leaf is None, f"{place} to be None, of integers, got {got}")
            continue
        require(isinstance(leaf, Tensor), f"{place} to be a tensor, got {got}", TypeError)
        fits = leaf.shape == shape or not whole
        require(fits, f"{place} of shape {tuple(shape)}, got {tuple(leaf.shape)}")
        require(leaf.dtype == dtype, f"{place} of {dtype}, got {got}", TypeError)


def _names(
    name: str, option: str, given: Collection[str], known: Collection[str]
) -> tuple[str, ...]:
    """The names, of which a string is one; ValueError for some that are none of the known ones."""
    names = (given,) if isinstance(given, str) else tuple(given)
    unknown = [each for each in names if each not in known]
    require(not unknown, f"{name}: {option} may have {list(known)}, got {unknown}")
    return names


def cotangent(
    function: Callable[..., Tree],
    *static: Hashable,
    reads: Collection[str] = (),
    breaks: Collection[str] = ("derivative",),
    mixes_examples: bool = False,
    name: str = "cotangent",
) -> Layer:
    """``y = x``; ``dx = function(dy)``: an identity that changes what comes back through it.

    Args:
        function: ``(dy, *static) -> dx``, a module-level function.
        static: hashable arguments of the function.
        reads: what it gets beside them, by name: "x", and "key", a key to draw from, with which the
            layer needs one in training, and which is None if ``train=False``.
        breaks: the laws that it is not meant to keep; see `with_rule`. A function that is not
            linear breaks ``("derivative", "linear")``.
        mixes_examples, name: see `with_rule`.

    Inputs: any tree. dy and dx are such trees too, with None for integers.

    Source: ``torch.Tensor.register_hook``.

    Cotangents clipped element by element, as in Graves 2013:

    >>> def clipped(dy):
    ...     return dy.clamp(-1, 1)
    >>> net = fn.serial(fn.linear(3), cotangent(clipped, breaks=("derivative", "linear")))
    >>> y, pullback, _ = cotangent(clipped).vjp({}, torch.zeros(3))
    >>> pullback(torch.tensor([-4.0, 0.5, 9.0]))[1]
    tensor([-1.0000,  0.5000,  1.0000])
    """
    check_function(f"{name}: function", function)
    reads = _names(name, "reads", reads, ("x", "key"))
    options: Any = {"reads": reads, "breaks": breaks, "mixes_examples": mixes_examples}
    return with_rule(identity(), cotangent_rule, function, *static, name=name, **options)


def cotangent_rule(
    residuals: Any, dy: Tree, function: Any, *static: Any, params: bool, x: bool
) -> Grads:
    """``dx = function(dy, *static, **what it reads)``."""
    return None, function(dy, *static, **residuals) if x else None
