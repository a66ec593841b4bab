"""Lifts: from the formulas of a layer to a `Layer`, with its signature and its checks."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

from torch import Tensor

from funcnet import runtime
from funcnet.batch_axis import BatchAxis
from funcnet.checks import MISSING, check_call, check_init, refuse_missing
from funcnet.core import (
    EMPTY,
    Applied,
    Forward,
    Grads,
    Key,
    Layer,
    Params,
    Pullback,
    Tree,
    function_name,
    global_form_of,
    told_by,
)
from funcnet.errors import refuse_state
from funcnet.params import Declaration, Param, declare
from funcnet.tree import describe, leaves

Step = tuple[Tree, Mapping[str, Tree], tuple[Hashable, ...]]
"""y, the residuals by name, and what else the backward pass is told."""


def stateless(
    init: Callable[..., Any],
    apply: Callable[[Params, Tree], Tree],
    vjp: Callable[[Params, Tree], tuple[Tree, Pullback]],
    *,
    name: str | None = None,
    mixes_examples: bool = False,
    breaks: Iterable[str] = (),
) -> Layer:
    """A layer without state and randomness, lifted from the short triple.

    Args:
        init: ``(key, x) -> params``, or what `declare` makes of a declaration: then x, and the
            params that are given, are checked at each call.
        apply: ``(params, x) -> y``.
        vjp: ``(params, x) -> (y, pullback)``.
        name: what errors and summaries call the layer; default the constructor's name.
        mixes_examples, breaks: see `Layer`.

    >>> import torch
    >>> import funcnet as fn
    >>> def scale_rule(residuals, dy, *, params, x):
    ...     dparams = {"scale": (dy * residuals["x"]).sum()} if params else None
    ...     return dparams, dy * residuals["scale"] if x else None
    >>> def scale():
    ...     def init(key, x):
    ...         return {"scale": torch.ones((), dtype=x.dtype, device=x.device)}
    ...     def apply(params, x):
    ...         return params["scale"] * x
    ...     def vjp(params, x):
    ...         return apply(params, x), fn.Pullback(scale_rule, {"x": x, **params})
    ...     return fn.stateless(init, apply, vjp)
    >>> scale()
    scale()
    >>> fn.testing.check_layer(scale(), torch.randn(4, 3, dtype=torch.float64))
    """
    name = name or function_name(apply)

    def full_apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Applied:
        if state:
            refuse_state(name, state)
        return apply(params, x), {}

    def forward(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        if state:
            refuse_state(name, state)
        y, pullback = vjp(params, x)
        return y, pullback, {}

    made: Any = init if isinstance(init, Declaration) else lambda key, x: (init(key, x), {})
    metadata: Any = {"mixes_examples": mixes_examples, "breaks": breaks}
    return stateful(made, forward, apply=full_apply, name=name, **metadata)


def stateful(
    init: Callable[..., Any],
    forward: Callable[..., Forward],
    *,
    keyed: bool = False,
    apply: Callable[..., Applied] | None = None,
    name: str | None = None,
    takes_axis: bool = False,
    **metadata: Any,
) -> Layer:
    """A layer with state or noise, lifted from one function, its forward pass.

    Its ``vjp`` is ``forward``, its ``apply`` is ``forward`` without the pullback, so the two
    agree.

    Args:
        init: ``(key, x) -> (params, state)``, or what `declare` makes of a declaration: then x,
            and the params and state that are given, are checked at each call.
        forward: ``(params, x, state, key, train) -> (y, pullback, state)``.
        keyed: whether it draws random numbers when ``train=True``. A call without a key is then
            an error.
        apply: ``(params, x, state, key, train) -> (y, state)``, for a layer that can do without
            the cost of its residuals.
        name: what errors and summaries call the layer; default the constructor's name.
        takes_axis: whether ``forward`` and ``apply`` take ``axis=``, a
            `funcnet.distributed.BatchAxis` where x is a rank's part of a batch, which makes the
            layer's global form; see `Layer`.
        metadata: see `Layer`; for layers that are made of others.

    The state that ``forward`` gets is a copy, since what a layer returns belongs to its caller.

    >>> import torch
    >>> import funcnet as fn
    >>> def noise_rule(residuals, dy, *, params, x):
    ...     return ({} if params else None), dy if x else None
    >>> def noise(std):
    ...     def forward(params, x, state, key, train):
    ...         y = x
    ...         if train:
    ...             y = x + std * fn.random.normal(key, x.shape, x.dtype, device=x.device)
    ...         return y, fn.Pullback(noise_rule, {}), {"calls": state["calls"] + 1}
    ...     def init(key, x):
    ...         return {}, {"calls": torch.zeros((), dtype=torch.int64, device=x.device)}
    ...     return fn.stateful(init, forward, keyed=True)
    >>> noise(0.1).apply({}, torch.zeros(2), {"calls": torch.tensor(0)})
    (tensor([0., 0.]), {'calls': tensor(1)})
    """
    name = name or function_name(forward)
    if takes_axis:
        whole = forward, apply

        def global_form(axis: BatchAxis) -> Layer:
            parts: Any = [each and partial(each, axis=axis) for each in whole]
            return stateful(init, parts[0], keyed=keyed, apply=parts[1], name=name, **metadata)

        return stateful(
            init, forward, keyed=keyed, apply=apply, name=name, global_form=global_form, **metadata
        )
    check = init.check if isinstance(init, Declaration) else None
    metadata = {"takes_key": keyed, **metadata}
    no_key = f"{name}: needs a key when train=True, got None; pass key=fn.key(...)"

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Any:
            if not (
                type(params) is type(state) is dict
                and type(x) is Tensor
                and (key is None or type(key) is Tensor)
            ):
                check_call(name, params, x, state, key)
            if check is not None:
                check(name, params, state, x)
            if keyed and train and key is None:
                raise ValueError(no_key)
            return function(params, x, {**state}, key, train)

        return call

    forward = checked(forward)
    applied = checked(apply) if apply else lambda *args: forward(*args)[::2]

    def full_init(key: Tensor, x: Tree = MISSING) -> tuple[Params, Params]:
        check_init(name, key, x)
        return init(key, x) if check is None else init(key, x, name)

    def full_apply(
        params: Params,
        x: Tree = MISSING,
        state: Params = EMPTY,
        *,
        key: Key = None,
        train: bool = False,
    ) -> Applied:
        if x is MISSING:
            refuse_missing(name, "apply", params)
        return applied(params, x, state, key, train)

    def vjp(
        params: Params,
        x: Tree = MISSING,
        state: Params = EMPTY,
        *,
        key: Key = None,
        train: bool = True,
    ) -> Forward:
        if x is MISSING:
            refuse_missing(name, "vjp", params)
        y, pullback, state = forward(params, x, state, key, train)
        return y, Pullback(pullback.rule, pullback.residuals, pullback.static, y, name), state

    return Layer(full_init, full_apply, vjp, forward=forward, name=name, **metadata)


def with_forward(
    layer: Layer,
    forward: Callable[..., Forward],
    again: Callable[[Layer], Layer] | None = None,
) -> Layer:
    """A leaf layer with another forward pass, of the same y: its pullback is another one.

    Args:
        layer: a leaf layer.
        forward: ``(params, x, state, key, train) -> (y, pullback, state)``.
        again: does the same to another layer, which is the global form of this one; without it
            there is none.

    >>> import torch
    >>> import funcnet as fn
    >>> net = fn.tanh()
    >>> def forward(params, x, state, key, train):
    ...     y, pullback, state = net.forward(params, x, state, key, train)
    ...     return y, fn.map_pullbacks(lambda path, each: each, pullback), state
    >>> with_forward(net, forward)
    tanh()
    """

    def apply(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Applied:
        return layer.apply(params, x, state, key=key, train=train)

    made = stateful(layer.init, forward, apply=apply, name=layer.name, **told_by(layer))
    made.global_form = again and global_form_of(layer, again)
    made.call = layer.call
    return made


KERNELS: dict[Callable[..., Any], Callable[..., Any]] = {}
"""PyTorch's fused kernels, by the formula that they compute."""


def with_kernel(kernel: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a formula with a kernel for it, which `fastest` may choose in its place.

    Args:
        kernel: takes the formula's arguments. For the derivative of an `elementwise` layer it
            takes dy before them, and returns dx.
    """

    def register(formula: Callable[..., Any]) -> Callable[..., Any]:
        KERNELS[formula] = kernel
        return formula

    return register


def kernel_of(formula: Callable[..., Any], *tensors: Tensor) -> Callable[..., Any] | None:
    """The kernel for a formula, where there is one and it may be used for these tensors.

    A kernel need not have a derivative of its own, so it is not used where one is taken.
    """
    kernel = KERNELS.get(formula)
    return None if kernel is None or runtime.is_differentiated(*tensors) else kernel


def fastest(formula: Callable[..., Any], *tensors: Tensor) -> Callable[..., Any]:
    """The kernel for a formula where it may be used for these tensors, else the formula."""
    return kernel_of(formula, *tensors) or formula


def require_floating(x: Tree) -> Mapping[str, Param]:
    """The declaration of a layer without parameters, of a floating-point tensor."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"expects a floating-point tensor, got {describe(x)}")
    return EMPTY


def accept_any(x: Tree) -> Mapping[str, Param]:
    """The declaration of a layer without parameters, of any tree."""
    return EMPTY


def parameterless(
    forward: Callable[[Any], Step],
    backward: Callable[..., Tree],
    *,
    declaration: Callable[[Tree], Mapping[str, Param]] = require_floating,
    name: str | None = None,
) -> Layer:
    """A layer of x alone, from its forward and its backward pass.

    Args:
        forward: ``x -> (y, residuals, static)``: a dict of tensors and a tuple of hashable values.
        backward: ``(dy, *static, **residuals) -> dx``, a module-level function.
        declaration: raises ValueError or TypeError for an x that does not fit; default for one
            that is not a floating-point tensor.
        name: what errors and summaries call the layer; default the constructor's name.

    >>> import torch
    >>> import funcnet as fn
    >>> def straight_through(dy):
    ...     return dy
    >>> def sign():
    ...     def forward(x):
    ...         return x.sign(), {}, ()
    ...     return fn.parameterless(forward, straight_through)
    >>> y, pullback, _ = sign().vjp({}, torch.tensor([-2.0, 3.0]))
    >>> y, pullback(torch.ones(2))
    (tensor([-1.,  1.]), ({}, tensor([1., 1.])))
    """
    name = name or function_name(forward)

    def whole(params: Params, x: Tree, state: Params, key: Key, train: bool) -> Forward:
        try:
            y, residuals, static = forward(x)
        except Exception as error:
            # Others, such as those of a tensor without values, are not about the shape of x.
            if type(error) not in (RuntimeError, ValueError, IndexError, AttributeError):
                raise
            raise ValueError(f"{name}: does not fit {describe(x)}: {error}") from error
        return y, Pullback(backward_rule, residuals, (backward, *static)), state

    return stateful(declare(declaration), whole, name=name)


def backward_rule(
    residuals: Any, dy: Tree, backward: Any, *static: Any, params: bool, x: bool
) -> Grads:
    """The rule of a layer without parameters: ``dx = backward(dy, *static, **residuals)``."""
    if x:
        if backward in KERNELS:
            backward = fastest(backward, *leaves((dy, residuals)))
        dy = backward(dy, *static, **residuals)
    return ({} if params else None), dy if x else None


def elementwise(
    function: Callable[..., Tensor],
    derivative: Callable[..., Tensor],
    saves: Literal["x", "y"] = "x",
    *,
    options: tuple[Hashable, ...] = (),
    name: str | None = None,
) -> Layer:
    """``y = function(x)``, element by element; ``dx = dy derivative(x)``.

    Args:
        function: of x.
        derivative: of x or, where that is simpler, of y.
        saves: "x" or "y": what the derivative is a function of, which is the residual.
        options: passed to both after it, such as a slope.
        name: what errors and summaries call the layer; default the function's name.

    >>> import torch
    >>> import funcnet as fn
    >>> sine = fn.elementwise(torch.sin, torch.cos)
    >>> y, pullback, _ = sine.vjp({}, torch.zeros(2))
    >>> y, pullback(torch.ones(2))
    (tensor([0., 0.]), ({}, tensor([1., 1.])))
    >>> fn.testing.check_layer(sine, torch.randn(3))
    """
    if saves not in ("x", "y"):
        raise ValueError(f"elementwise: saves must be 'x' or 'y', got {saves!r}")

    static = (derivative, *options)

    def forward(params: Params, x: Tensor, state: Params, key: Key, train: bool) -> Forward:
        y = function(x, *options)
        return y, Pullback(elementwise_rule, {saves: x if saves == "x" else y}, static), state

    name = name or function.__name__
    return stateful(declare(require_floating), forward, name=name)


def elementwise_rule(
    residuals: Any, dy: Tensor, derivative: Any, *options: Any, params: bool, x: bool
) -> Grads:
    """``dx = dy derivative(saved, *options)``."""
    dx = times_derivative(dy, derivative, *residuals.values(), *options) if x else None
    return ({} if params else None), dx


def times_derivative(
    dy: Tensor, derivative: Callable[..., Tensor], saved: Tensor, *options: Any
) -> Tensor:
    """``dy derivative(saved, *options)``, by the kernel of an `elementwise` layer's derivative."""
    kernel = kernel_of(derivative, dy, saved)
    return kernel(dy, saved, *options) if kernel else dy * derivative(saved, *options)
