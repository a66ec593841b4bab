"""The protocol: what a layer, a loss, an optimizer and a training state are.

::

    Layer      = (init, apply, vjp)
      init (key, x)                                         -> (params, state)
      apply(params, x, state={}, *, key=None, train=False)  -> (y, state)
      vjp  (params, x, state={}, *, key=None, train=True)   -> (y, pullback, state)
           pullback(dy, *, params=True, x=True)             -> (dparams, dx)

    Loss       = (apply, vjp)
      apply(prediction, target)                             -> value
      vjp  (prediction, target)                             -> (value, pullback)
           pullback(dvalue=1.0)                             -> dprediction
      The value is a scalar or, with reduction="none", one number per element; dvalue has its
      shape, and a Python number stands for one that is the same for all elements.

    Optimizer  = (init_state, update)
      init_state(params)                                    -> opt_state
      update(grads, opt_state, params)                      -> (updates, opt_state)
"""

from collections.abc import Callable, Hashable, Mapping
from functools import reduce
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from funcnet import tree
from funcnet.errors import require

Tree = Any
"""A pytree of tensors: a tensor, or a tuple or dict of trees."""

Params = Mapping[str, Any]
"""A nested dict with string keys and tensor leaves. State is one too."""

Key = Tensor | None
"""A key of `funcnet.random`, or None where there is no randomness."""

Grads = tuple[Params | None, Tree]
"""``(dparams, dx)``; None for the half that was not asked for."""

EMPTY: Params = {}
"""The default for params and state that are absent. Nothing writes to it, and nobody gets it as a
result: a caller owns what is returned, and may write to it."""


class _Triple(NamedTuple):
    init: Callable[..., tuple[Params, Params]]
    apply: Callable[..., tuple[Tree, Params]]
    vjp: Callable[..., tuple[Tree, "Pullback", Params]]


class Layer(_Triple):
    """Three pure functions, ``(init, apply, vjp)``; see the module's docstring for the protocol.

    A layer is made by a constructor such as `linear`, by a combinator such as `serial`, by
    `stateless` or `stateful` from formulas, or directly: ``Layer(init, apply, vjp)``. It unpacks
    into its three functions. Beside them it carries metadata, for code that walks a model.

    Args:
        init, apply, vjp: the functions.
        forward: ``vjp`` with all arguments by position, and a pullback that checks no dy: what
            combinators call. `stateful` gives it; default ``vjp`` itself.
        name: what errors and summaries call the layer; default the name of its constructor.
        children: the layers that it is made of, by name. A child named "" has the very params
            and state of its parent.
        rebuild: makes the same layer of other children.
        takes_key: False for a layer that ignores the key, so that nobody need make one for it.

    >>> import funcnet as fn
    >>> net = fn.serial(fn.linear(3), fn.relu())
    >>> net.name, list(net.children), net.takes_key
    ('serial', ['0', '1'], False)
    """

    forward: Callable[..., tuple[Tree, "Pullback", Params]]
    name: str
    children: Mapping[str, "Layer"]
    rebuild: Callable[[Mapping[str, "Layer"]], "Layer"] | None
    takes_key: bool

    def __new__(
        cls,
        init: Callable[..., tuple[Params, Params]],
        apply: Callable[..., tuple[Tree, Params]],
        vjp: Callable[..., tuple[Tree, "Pullback", Params]],
        *,
        forward: Callable[..., tuple[Tree, "Pullback", Params]] | None = None,
        name: str | None = None,
        children: Mapping[str, "Layer"] = EMPTY,
        rebuild: Callable[[Mapping[str, "Layer"]], "Layer"] | None = None,
        takes_key: bool = True,
    ) -> "Layer":
        layer = super().__new__(cls, init, apply, vjp)
        layer.forward = forward or (
            lambda params, x, state, key, train: vjp(params, x, state, key=key, train=train)
        )
        layer.name = name or function_name(apply)
        layer.children, layer.rebuild, layer.takes_key = children, rebuild, takes_key
        return layer

    def _replace(self, **functions: Any) -> "Layer":
        """The layer with other functions, under the same name.

        It has no children any more: a layer that is rebuilt of them would lose the new functions.
        """
        return Layer(*super()._replace(**functions), name=self.name, takes_key=self.takes_key)

    def __repr__(self) -> str:
        inside = ", ".join(
            f"{child}={layer!r}" if child else repr(layer) for child, layer in self.children.items()
        )
        return f"{self.name}({inside})"


class Loss(NamedTuple):
    """Two pure functions, ``(apply, vjp)``, of a prediction and a target.

    The value is a scalar, which one can train on, or has one number per element.
    """

    apply: Callable[[Tree, Tree], Tensor]
    vjp: Callable[[Tree, Tree], tuple[Tensor, "LossPullback"]]


class _OptimizerFunctions(NamedTuple):
    init_state: Callable[[Params], Tree]
    update: Callable[[Tree, Tree, Params], tuple[Tree, Tree]]


class Optimizer(_OptimizerFunctions):
    """Two pure functions, ``(init_state, update)``: from gradients to what is added to params.

    ``name`` is what errors, and the state of a `chain`, call the optimizer; by default it is the
    name of the constructor that defines ``update``. ``update_leaves`` is ``update`` on flattened
    trees, if the optimizer was lifted from a formula: a chain flattens once for all its transforms.
    """

    name: str
    update_leaves: Callable[..., Any] | None

    def __new__(
        cls,
        init_state: Callable[[Params], Tree],
        update: Callable[[Tree, Tree, Params], tuple[Tree, Tree]],
        name: str | None = None,
        update_leaves: Callable[..., Any] | None = None,
    ) -> "Optimizer":
        optimizer = super().__new__(cls, init_state, update)
        optimizer.name, optimizer.update_leaves = name or function_name(update), update_leaves
        return optimizer

    def _replace(self, **changes: Any) -> "Optimizer":
        return Optimizer(*super()._replace(**changes), self.name)


class TrainState(NamedTuple):
    """All that a training run is: restore it, and the run goes on bit for bit.

    ``step`` is a 0-d int64 tensor: the number of steps that were taken. The key of a step is
    ``fold_in(key, step)``.
    """

    params: Params
    state: Params
    opt_state: Tree
    key: Tensor
    step: Tensor


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
        name = name or function_name(self.rule).removesuffix("_rule")
        got = tuple(dvalue.shape) if isinstance(dvalue, Tensor) else tree.describe(dvalue)
        raise kind(f"{name}: pullback expects {expected}, got {got}")


_SCALAR = ((torch.Size(), None),)
"""The shape of a value of which nothing is known."""


Applied = tuple[Tree, Params]
"""What ``apply`` returns: y and the new state."""

Forward = tuple[Tree, Pullback, Params]
"""What ``vjp`` returns: y, the pullback and the new state."""


def _register(kind: type[Pullback]) -> None:
    def flatten(pullback: Any) -> tuple[Any, Any, Any]:
        metadata = (pullback.rule, pullback.static, pullback.expected)
        return (pullback.residuals,), metadata, ("residuals",)

    def unflatten(metadata: Any, children: Any) -> Any:
        (rule, static, expected), (residuals,) = metadata, children
        pullback = kind(rule, residuals, static)
        pullback.expected = expected
        return pullback

    optree.register_pytree_node(
        kind,  # type: ignore[arg-type]
        flatten,
        unflatten,
        namespace=optree.registry.__GLOBAL_NAMESPACE,
    )


_register(Pullback)
_register(LossPullback)


def pull(
    pullbacks: dict[str, Any], name: str, dy: Tree, *, params: bool, x: bool
) -> tuple[Tree, Tree]:
    """Take a child's pullback out of a rule's own dict and call it.

    In a training step nothing else holds the child's residuals by then, so they are freed as
    the backward pass consumes them, layer by layer. A pullback that somebody keeps keeps them.
    """
    pullback = pullbacks.pop(name)
    rule, residuals, static = pullback.rule, dict(pullback.residuals), pullback.static
    del pullback
    return rule(residuals, dy, *static, params=params, x=x)


def sum_cotangents(*cotangents: Tree) -> Tree:
    """The sum of the cotangents of a value that was used several times.

    None, the cotangent of an integer and of what was not asked for, counts as nothing.

    >>> sum_cotangents(torch.ones(2), None, torch.ones(2))
    tensor([2., 2.])
    """
    present = [cotangent for cotangent in cotangents if cotangent is not None]
    if not present:
        return None
    return reduce(lambda a, b: tree.map(torch.add, a, b), present)


def map_layers(function: Callable[[str, Layer], Layer], layer: Layer, path: str = "") -> Layer:
    """A model rebuilt with ``function(path, layer)`` in place of each layer, children first.

    ``path`` is the dotted path of the layer's parameters, "" for the model itself.

    >>> import funcnet as fn
    >>> paths = []
    >>> _ = map_layers(lambda path, layer: paths.append(path) or layer,
    ...                fn.serial(fn.linear(3), fn.relu()))
    >>> paths
    ['0', '1', '']
    """
    if layer.rebuild is not None:
        layer = layer.rebuild(
            {
                name: map_layers(function, child, join_paths(path, name))
                for name, child in layer.children.items()
            }
        )
    return function(path, layer)


def join_paths(path: str, name: str) -> str:
    """The dotted path of a child; a child named "" has its parent's.

    >>> join_paths("", "body"), join_paths("body", "0"), join_paths("body", "")
    ('body', 'body.0', 'body')
    """
    return ".".join([part for part in (path, name) if part])


def wrap(layer: Layer, functions: Callable[[Layer], Layer]) -> Layer:
    """A layer with other functions around its own, which keeps its name and its children.

    Args:
        layer: any layer.
        functions: ``layer -> layer``, such as ``lambda layer: layer._replace(vjp=...)``. It is
            called again for a layer that is rebuilt of other children.

    >>> import funcnet as fn
    >>> def halved(layer):
    ...     def apply(*args, **options):
    ...         y, state = layer.apply(*args, **options)
    ...         return y / 2, state
    ...     return layer._replace(apply=apply)
    >>> net = wrap(fn.serial(fn.relu()), halved)
    >>> net, net.apply({}, torch.ones(1))[0]
    (serial(0=relu()), tensor([0.5000]))
    """
    rebuild = layer.rebuild

    def rebuilt(children: Mapping[str, Layer]) -> Layer:
        assert rebuild is not None
        return wrap(rebuild(children), functions)

    return Layer(
        *functions(layer),
        name=layer.name,
        children=layer.children,
        rebuild=None if rebuild is None else rebuilt,
        takes_key=layer.takes_key,
    )


def function_name(function: Callable[..., Any]) -> str:
    """``linear`` for the function ``linear.<locals>.apply``."""
    return getattr(function, "__qualname__", type(function).__name__).split(".")[0]
