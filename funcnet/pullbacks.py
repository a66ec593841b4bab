"""Pullbacks: the linear maps of cotangents that ``vjp`` returns, as pytrees of their residuals."""

from collections.abc import Callable, Hashable, Mapping
from functools import reduce
from typing import Any

import optree
import torch
from torch import Tensor

from funcnet import tree
from funcnet.compiler import loops
from funcnet.compiler.signature import register_node
from funcnet.deferred import (
    DEFER,
    Defer,
    Deferred,
    side_by_side,
    takes_deferral,
    term,
)
from funcnet.errors import require
from funcnet.runtime import is_transformed

Tree = Any
"""A pytree of tensors: a tensor, or a tuple or dict of trees."""


class Pullback:
    """The linear map from the cotangent of a layer's output to those of its params and input.

    It is a rule and the residuals that the forward pass left for it: ``pullback(dy)`` is
    ``rule(residuals, dy, *static, params=True, x=True)``. As a pytree node its leaves are the
    residual tensors, so optree functions map over, move, count and compress them.

    Args:
        rule: a module-level function ``(residuals, dy, *static, params, x) -> (dparams, dx)``.
            It gets a dict of its own and may empty it, to let residuals go early. It returns
            None for the half that was not asked for, and does not compute it.
        residuals: a dict from names to trees; other pullbacks may be among them.
        static: hashable arguments of the rule.
        y: the output, if known. Its shape is kept, and a ``dy`` of another is refused.
        name: of the layer, for errors; default that of the rule. `stateless` and `stateful` give
            the output and the name of the layers that they lift.

    >>> import funcnet as fn
    >>> y, pullback, _ = fn.tanh().vjp({}, torch.tensor([0.0, 1.0]))
    >>> pullback
    Pullback(elementwise_rule, residuals=['y'], static=(<function tanh_derivative at ...>,))
    >>> pullback(torch.ones(2))
    ({}, tensor([1.0000, 0.4200]))
    >>> pullback(torch.ones(()))
    Traceback (most recent call last):
    ...
    ValueError: tanh: pullback expects dy of shape (2,), got ()
    """

    __slots__ = ("expected", "residuals", "rule", "static")

    def __init__(
        self,
        rule: Callable[..., Any],
        residuals: Mapping[str, Tree],
        static: tuple[Hashable, ...] = (),
        y: Tree = None,
        name: str | None = None,
    ) -> None:
        self.rule = rule
        self.residuals = residuals
        self.static = static
        self.expected = None if y is None else (name, *kinds_of(y))

    def __call__(self, dy: Tree, *, params: bool = True, x: bool = True) -> tuple[Tree, Tree]:
        """``(dparams, dx)``; the half that is not asked for is None and costs nothing."""
        self._check(dy)
        return self.rule(dict(self.residuals), dy, *self.static, params=params, x=x)

    def _check(self, dy: Tree) -> None:
        if self.expected is None:
            return
        name, treedef, kinds = self.expected
        if type(dy) is Tensor and kinds == ((dy.shape, dy.dtype),) and dy.is_floating_point():
            return
        name = name or getattr(self.rule, "__name__", "").removesuffix("_rule")
        wrong, found = f"{name}: pullback expects", tree.describe(dy)
        try:
            cotangents = treedef.flatten_up_to(dy)
        except (ValueError, TypeError):
            form = f"a {treedef.type.__name__} of {treedef.num_children}"
            raise ValueError(f"{wrong} {form}, got {found}") from None
        got = tuple(dy.shape) if isinstance(dy, Tensor) else found
        for cotangent, (shape, dtype) in zip(cotangents, kinds, strict=True):
            if dtype.is_floating_point:
                fits = isinstance(cotangent, Tensor) and cotangent.shape == shape
                require(fits, f"{wrong} dy of shape {tuple(shape)}, got {got}")
                right = cotangent.dtype == dtype
                require(right, f"{wrong} dy of {dtype}, got {found}", TypeError)
            else:
                nothing = cotangent is None
                require(nothing, f"{wrong} dy None for an integer output, got {found}")

    def __repr__(self) -> str:
        rule, kind = getattr(self.rule, "__name__", self.rule), type(self).__name__
        return f"{kind}({rule}, residuals={list(self.residuals)}, static={self.static})"


_LEAF = optree.treespec_leaf()


def kinds_of(y: Tree) -> tuple[Any, tuple[Any, ...]]:
    """The structure of an output, and the shapes and dtypes of its leaves."""
    if type(y) is Tensor:
        return _LEAF, ((y.shape, y.dtype),)
    leaves, treedef = optree.tree_flatten(y)
    return treedef, tuple([(leaf.shape, leaf.dtype) for leaf in leaves])


class LossPullback(Pullback):
    """The pullback of a loss: ``pullback(dvalue=1.0) -> dprediction``.

    ``dvalue`` is a tensor of the value's shape, or a number, which stands for a tensor full of it.

    Args:
        rule: a module-level function ``(residuals, dvalue, *static) -> dprediction``.
        residuals, static: see `Pullback`.
        y: the value; default any scalar. A ``dvalue`` of another shape is refused.
        name: of the loss, for errors; default that of the rule.

    >>> import funcnet as fn
    >>> value, pullback = fn.mse("none").vjp(torch.tensor([3.0, 2.0]), torch.zeros(2))
    >>> value, pullback(), pullback(torch.tensor([1.0, -1.0]))
    (tensor([9., 4.]), tensor([6., 4.]), tensor([ 6., -4.]))
    >>> pullback(torch.ones(3))
    Traceback (most recent call last):
    ...
    ValueError: mse: pullback expects dvalue of the value's shape (2,), got (3,)
    """

    __slots__ = ()

    def __call__(self, dvalue: Tensor | float = 1.0) -> Tree:  # type: ignore[override]
        if type(dvalue) is not float:  # as it is in a training step
            self._check(dvalue)
            if isinstance(dvalue, Tensor) and dvalue.dim() and self.expected is not None:
                # A scalar leaves the gradient's dtype as it is; so does what has dimensions.
                dvalue = dvalue.to(self.expected[2][0][1])
        return self.rule(dict(self.residuals), dvalue, *self.static)

    def _check(self, dvalue: Tensor | float) -> None:
        name, _, ((shape, _),) = self.expected or (None, None, _SCALAR)
        if isinstance(dvalue, Tensor):
            if dvalue.shape == shape:
                return
            expected, kind = f"dvalue of the value's shape {tuple(shape)}", ValueError
        elif isinstance(dvalue, (int, float)):
            return
        else:
            expected, kind = "a tensor or a number as dvalue", TypeError
        name = name or getattr(self.rule, "__name__", "").removesuffix("_rule")
        got = tuple(dvalue.shape) if isinstance(dvalue, Tensor) else tree.describe(dvalue)
        raise kind(f"{name}: pullback expects {expected}, got {got}")


_SCALAR = ((torch.Size(), None),)
"""The shape of a value of which nothing is known."""


def _register(kind: type[Pullback]) -> None:
    def flatten(pullback: Any) -> tuple[Any, Any, Any]:
        metadata = (pullback.rule, pullback.static, pullback.expected)
        return (pullback.residuals,), metadata, ("residuals",)

    def unflatten(metadata: Any, children: Any) -> Any:
        (rule, static, expected), (residuals,) = metadata, children
        pullback = kind(rule, residuals, static)
        pullback.expected = expected
        return pullback

    register_node(kind, flatten, unflatten, ("residuals",), ("rule", "static", "expected"))


_register(Pullback)
_register(LossPullback)


class Box(list[Tree]):
    """Cotangents, or gradients, that go when they are read: calls on the way hold the box alone.

    A call holds its arguments to its end. So in a net of nets there would be a cotangent for each
    level: 2 to 6 % of the memory of an eager step of a ResNet or a U-Net (compare.py).
    """


def takes_box(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a rule that wants its dy in a `Box` where the caller has it in one."""
    _TAKE_BOXES.add(rule)
    return rule


_TAKE_BOXES: set[Callable[..., Any]] = set()


class Sums:
    """Gradients of other batches, to which new ones are added as they come.

    A pullback that gets it for ``params=True`` gives the sums. Outside of transformations they are
    written to the memory of ``total``, which must be the caller's own: so over several batches
    there is one tree of gradients, and not a second one for the last batch.
    """

    __slots__ = ("total",)

    def __init__(self, total: Tree) -> None:
        self.total = total

    def of(self, total: Tree) -> "Sums":
        """The same for a part of the gradients, such as a child's."""
        return Sums(total)

    def plus(self, dparams: Tree) -> Tree:
        """The sums with the gradients of one layer."""
        return tree.map(_plus, self.total, dparams)


def _plus(total: Tensor, gradient: Tensor) -> Tensor:
    if total.shape != gradient.shape:
        expected, got = tuple(total.shape), tuple(gradient.shape)
        raise ValueError(f"grads: expects shape {expected}, got {got}")
    return total + gradient if is_transformed(total, gradient) else total.add_(gradient)


def takes_sums(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a rule that takes `Sums` for ``params=True``, and gives the sums as dparams."""
    _TAKE_SUMS.add(rule)
    return rule


_TAKE_SUMS: set[Callable[..., Any]] = set()


def pull(
    pullbacks: dict[str, Any], name: str, dy: Tree | Box, *, params: bool | Sums | Defer, x: bool
) -> tuple[Tree, Tree]:
    """Take a child's pullback out of a rule's own dict and call it.

    In a training step nothing else holds the child's residuals by then, so they are freed as
    the backward pass consumes them, layer by layer. A pullback that somebody keeps keeps them.

    What a rule gets for ``params`` it hands on: it may be ``DEFER``, and dparams a `Deferred`.

    >>> import funcnet as fn
    >>> def reversed_rule(residuals, dy, *, params, x):
    ...     return fn.pull(residuals, "layer", -dy, params=params, x=x)
    >>> _, pullback, _ = fn.tanh().vjp({}, torch.zeros(2))
    >>> Pullback(reversed_rule, {"layer": pullback})(torch.ones(2))
    ({}, tensor([-1., -1.]))
    """
    pullback = pullbacks.pop(name)
    rule, residuals, static = pullback.rule, dict(pullback.residuals), pullback.static
    del pullback
    if isinstance(dy, Box) and rule not in _TAKE_BOXES:
        dy = dy.pop()
    if isinstance(params, Sums) and rule not in _TAKE_SUMS:
        dparams, dx = rule(residuals, dy, *static, params=True, x=x)
        return params.plus(dparams), dx
    if params is DEFER and not takes_deferral(rule):
        deferred = term(Pullback, rule, residuals, static, dy)
        return deferred, rule(residuals, dy, *static, params=False, x=x)[1] if x else None
    return rule(residuals, dy, *static, params=params, x=x)


def defer(pullback: Pullback) -> Callable[..., tuple[Deferred, Tree]]:
    """The half of a pullback that makes cotangents of inputs; the other half comes later.

    Args:
        pullback: what a layer's ``vjp`` gave.

    Returns:
        ``(dy, *, x=True) -> (deferred, dx)``. ``gradients(deferred)`` is dparams, at any later
        time: each half has its own cost alone, and both together that of ``pullback(dy)``.

    So a pipeline sends dx on before it computes gradients, the norm of all gradients is had with
    one layer's in memory at a time, and gradients of single examples are weighted before they are
    summed.

    Source: Qi et al. 2023, "Zero Bubble Pipeline Parallelism", for the two halves.

    >>> import funcnet as fn
    >>> net = fn.serial(fn.linear(3), fn.tanh(), fn.linear(1))
    >>> params, _ = net.init(fn.key(0), torch.ones(4, 2))
    >>> y, pullback, _ = net.vjp(params, torch.ones(4, 2))
    >>> deferred, dx = defer(pullback)(torch.ones(4, 1))
    >>> deferred, dx.shape
    (Deferred(['0', '2']), torch.Size([4, 2]))
    >>> list(fn.tree.to_dotted(fn.gradients(deferred)))
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    if not isinstance(pullback, Pullback) or isinstance(pullback, LossPullback):
        got = type(pullback).__name__
        raise TypeError(f"defer: expects the pullback that a layer's vjp gives, got {got}")

    def first_half(dy: Tree, *, x: bool = True) -> tuple[Deferred, Tree]:
        pullback._check(dy)
        return pull({"": pullback}, "", dy, params=DEFER, x=x)

    return first_half


def barrier(values: Tree) -> Tree:
    """The same tensors, of which the compiler may compute nothing before this point.

    For a rule that computes something again in the backward pass to save memory: under `jit` the
    compiler sees that it was computed before, and would keep it. With the cotangent and the
    residuals through a barrier it may start only when the cotangent is there. In eager mode it
    does nothing.

    Args:
        values: a tree of tensors.

    >>> import funcnet as fn
    >>> def sine_rule(residuals, dy, *, params, x):
    ...     x_again, dy = fn.barrier((residuals["x"], dy))
    ...     return ({} if params else None), dy * x_again.cos() if x else None
    """
    leaves, treedef = optree.tree_flatten(values)
    return treedef.unflatten(loops.barrier(leaves))


def sum_cotangents(*cotangents: Tree) -> Tree:
    """The sum of the cotangents of a value that was used several times.

    None, the cotangent of an integer and of what was not asked for, counts as nothing. The sum of
    Deferreds is a `Deferred` that has their terms.

    >>> sum_cotangents(torch.ones(2), None, torch.ones(2))
    tensor([2., 2.])
    """
    present = [cotangent for cotangent in cotangents if cotangent is not None]
    if not present:
        return None
    return reduce(_sum, present)


def _sum(a: Tree, b: Tree) -> Tree:
    if type(a) is Tensor and type(b) is Tensor:
        return a + b
    return optree.tree_map(
        lambda a, b: side_by_side(a, b) if isinstance(a, Deferred) else torch.add(a, b),
        *(a, b),
        is_leaf=lambda node: isinstance(node, Deferred),
    )
